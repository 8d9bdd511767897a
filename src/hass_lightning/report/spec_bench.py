"""Spec-Bench's own table: the row of its leaderboard, from the records of `benchmarks=[spec_bench]`."""

from __future__ import annotations

from collections.abc import Sequence

from hass_lightning.measure.metrics import hass_speedup, spec_bench_acceptance_length
from hass_lightning.measure.record import Record, select
from hass_lightning.report.series import series_of
from hass_lightning.report.tables import Column, Table

NAME = "spec_bench"  # of conf/benchmark
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
TASKS = {  # header of the leaderboard -> categories of question.jsonl (`evaluation/speed.py`)
    "Multi-turn Conversation": MT_BENCH,
    "Translation": ("translation",),
    "Summarization": ("summarization",),
    "Question Answering": ("qa",),
    "Mathematical Reasoning": ("math_reasoning",),
    "Retrieval-aug. Generation": ("rag",),
}
NOTE = (
    "Spec-Bench's convention: speedup is the ratio of the mean tokens/s over questions, prefill included; #Mean "
    "Accepted Tokens is the mean over all cycles, bonus token counted. The leaderboard has the mean of three runs."
)


def spec_bench_table(records: Sequence[Record]) -> Table | None:
    """Return one row per series with the columns of Spec-Bench's leaderboard; None without its records.

    The speedups of the six tasks, the accepted tokens and the overall speedup follow `evaluation/speed.py` of
    hemingkx/Spec-Bench, except that the baseline's text is not tokenized again. A task without prompts, or without a
    baseline, has no speedup.
    """
    kept = select(records, benchmark=NAME)
    groups = series_of(kept)
    rows = []
    for series, group in groups.items():
        if series.is_baseline:
            continue
        base = [record for each, found in groups.items() if each.is_baseline for record in found]
        parts = {task: [r for r in group if r.category in categories] for task, categories in TASKS.items()}
        rows.append(
            {
                "Models": series.label,
                **{task: hass_speedup(part, base) for task, part in parts.items()},
                "#Mean Accepted Tokens": spec_bench_acceptance_length(group),
                "Overall": hass_speedup(group, base),
            }
        )
    if not rows:
        return None
    columns = [
        Column("Models", "Models", numeric=False),
        *(Column(task, task, unit="x") for task in TASKS),
        Column("#Mean Accepted Tokens", "#Mean Accepted Tokens"),
        Column("Overall", "Overall", unit="x"),
    ]
    return Table.of(columns, rows, notes=[NOTE])
