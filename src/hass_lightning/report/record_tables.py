"""Tables made from records: the conventions of other tools, and pairwise comparisons of heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from hass_lightning.measure import compare_benchmarks
from hass_lightning.measure.metrics import conventions
from hass_lightning.measure.record import Record, select
from hass_lightning.report.series import series_of
from hass_lightning.report.tables import Column, Table


def conventions_table(records: Sequence[Record]) -> Table | None:
    """Return acceptance of the same traces under the conventions of other tools; None without speculative series."""
    rows = [
        {"line": each.label} | conventions(group) for each, group in series_of(records).items() if not each.is_baseline
    ]
    if not rows:
        return None
    columns = [Column(name.replace("_", " "), name, numeric=name != "line") for name in rows[0]]
    note = "measure/metrics.py defines each; all are computed from the same trace."
    return Table.of(columns, rows, notes=[note])


def comparison_table(records: Sequence[Record]) -> Table | None:
    """Return each pair of heads on the same questions, one row per decoder, sampling and benchmark; None with one head.

    The p-value (sign-flip permutation, Holm's method over the benchmarks) determines the verdict, not the interval.
    """
    columns = [
        *(Column(name, name, numeric=False) for name in ("heads", "decoder", "benchmark")),
        Column("more tokens per forward", "difference_percent", digits=1, unit=" %", interval=True),
        Column("p (Holm)", "p_adjusted", digits=3),
        Column("resolvable", "detectable_percent", digits=1, unit=" %"),
        Column("questions", "num_questions", digits=0),
        Column("verdict", "verdict", numeric=False),
    ]
    rows = []
    for label, group in _by_decoder(records).items():
        for base, other in combinations(sorted({record.draft for record in group}), 2):
            found = compare_benchmarks(select(group, draft=other), select(group, draft=base))
            for benchmark, comparison in found.items():
                word = "fewer" if comparison.ratio.value < 1 else "more"
                rows.append(
                    {
                        "heads": f"{other} over {base}",
                        "decoder": label,
                        "benchmark": benchmark,
                        "difference_percent": comparison.ratio.percent,
                        "p_adjusted": comparison.p_adjusted,
                        "detectable_percent": 100 * comparison.detectable,
                        "num_questions": comparison.num_questions,
                        "verdict": word if comparison.significant else "no difference is shown",
                    }
                )
    note = "These results hold for these heads on these questions; a verdict on training methods needs several seeds. "
    note += "Resolvable: the difference that this number of questions detects with 80 % power."
    return Table.of(columns, rows, notes=[note]) if rows else None


def _by_decoder(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group records with a head by decoder and sampling, the heads together."""
    groups: dict[str, list[Record]] = {}
    for record in sorted((r for r in records if r.draft), key=lambda r: (r.temperature, r.decoder)):
        sampling = f"T={record.temperature:g}"
        sampling += f", top-p={record.top_p:g}" if record.top_p != 1 else ""
        sampling += f", top-k={record.top_k}" if record.top_k else ""
        groups.setdefault(f"{record.decoder}, {sampling}", []).append(record)
    return groups
