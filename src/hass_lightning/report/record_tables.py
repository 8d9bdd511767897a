"""Tables made from records: the conventions of other tools, and head against head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from hass_lightning.measure import compare_benchmarks
from hass_lightning.measure.records import Record, conventions, select
from hass_lightning.report.series import series_of
from hass_lightning.report.tables import Cell, Column, Table


def conventions_table(records: Sequence[Record]) -> Table | None:
    """The same traces under the acceptance conventions of other tools; None without a speculative line."""
    series = {each: group for each, group in series_of(records).items() if not each.is_baseline}
    if not series:
        return None
    names = list(conventions(records))
    columns = [Column("line", "line", numeric=False), *(Column(name.replace("_", " "), name) for name in names)]
    lines = []
    for each, group in series.items():
        found = conventions(group)
        lines.append([Cell(each.label), *(Cell(found[name]) for name in names)])
    return Table(columns, lines, notes=["measure/records.py defines each; one trace, so that all are comparable."])


def comparison_table(records: Sequence[Record]) -> Table | None:
    """Each pair of heads on the same questions, a line a decoder, sampling and benchmark; None with one head.

    The p-value (sign-flip permutation, Holm over the benchmarks) decides the verdict, not the interval.
    """
    columns = [
        Column("heads", "heads", numeric=False),
        Column("decoder", "decoder", numeric=False),
        Column("benchmark", "benchmark", numeric=False),
        Column("more tokens per forward", "difference_percent", digits=1, unit=" %", interval=True),
        Column("p (Holm)", "p_adjusted", digits=3),
        Column("resolvable", "detectable_percent", digits=1, unit=" %"),
        Column("questions", "num_questions", digits=0),
        Column("verdict", "verdict", numeric=False),
    ]
    lines = []
    for label, group in _by_decoder(records).items():
        drafts = sorted({record.draft for record in group})
        for base, other in combinations(drafts, 2):
            found = compare_benchmarks(select(group, draft=other), select(group, draft=base))
            for benchmark, comparison in found.items():
                ratio = comparison.ratio
                percent = [100 * (end - 1) for end in (ratio.value, ratio.low, ratio.high)]
                word = "fewer" if ratio.value < 1 else "more"
                lines.append(
                    [
                        Cell(f"{other} over {base}"),
                        Cell(label),
                        Cell(benchmark),
                        Cell(*percent),
                        Cell(comparison.p_adjusted),
                        Cell(100 * comparison.detectable),
                        Cell(comparison.num_questions),
                        Cell(word if comparison.significant else "no difference is shown"),
                    ]
                )
    note = "About these heads on these questions; a verdict on training methods needs several seeds. "
    note += "Resolvable: the difference that so many questions find with 80 % power."
    return Table(columns, lines, notes=[note]) if lines else None


def _by_decoder(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records with a head by decoder and sampling, the heads together."""
    groups: dict[str, list[Record]] = {}
    for record in sorted((r for r in records if r.draft), key=lambda r: (r.temperature, r.decoder)):
        sampling = f"T={record.temperature:g}"
        sampling += f", top-p={record.top_p:g}" if record.top_p != 1 else ""
        sampling += f", top-k={record.top_k}" if record.top_k else ""
        groups.setdefault(f"{record.decoder}, {sampling}", []).append(record)
    return groups
