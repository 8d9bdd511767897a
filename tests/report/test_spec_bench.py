"""Spec-Bench's table against its own formula, written as loops over questions."""

import math
import random
from statistics import mean

import pytest
from report_factory import make_record

from hass_lightning.report.pages import benchmark_report
from hass_lightning.report.spec_bench import MT_BENCH, TASKS, spec_bench_table

CATEGORIES = [*MT_BENCH, "translation", "summarization", "qa", "math_reasoning", "rag"]


def records(categories=CATEGORIES):
    rng, found = random.Random(0), []
    for number, category in enumerate(2 * categories):
        for decoder, draft, depth in (("autoregressive", "", 0), ("chain", "hass", 3)):
            accepted = tuple(rng.randint(0, depth) for _ in range(rng.randint(3, 9)))
            seconds = 0.02 + 0.01 * rng.random()
            found.append(
                make_record(decoder, draft, "spec_bench", f"q{number}", accepted, depth, cycle_seconds=seconds)
            )
            found[-1].category = category
    return found


def spec_bench(kept, base, task):
    """Return (mean accepted tokens, speedup) as `evaluation/speed.py` computes them."""
    categories = CATEGORIES if task == "overall" else TASKS[task]

    def speeds(side):
        return [r.num_tokens / sum(r.seconds.values()) for r in side if r.category in categories]

    lengths = [count + 1 for r in kept if r.category in categories for count in r.accepted]
    return mean(lengths), mean(speeds(kept)) / mean(speeds(base))


def test_row_follows_spec_bench():
    found = records()
    base, kept = ([r for r in found if (r.decoder == "chain") is drafts] for drafts in (False, True))
    (line,) = spec_bench_table(found).lines
    values = dict(zip([column.key for column in spec_bench_table(found).columns], [c.value for c in line], strict=True))
    for task in TASKS:
        assert values[task] == pytest.approx(spec_bench(kept, base, task)[1])
    length, speedup = spec_bench(kept, base, "overall")
    assert values["#Mean Accepted Tokens"] == pytest.approx(length)
    assert values["Overall"] == pytest.approx(speedup)


def test_header_is_that_of_the_leaderboard():
    header, _, row, *_ = spec_bench_table(records()).markdown().splitlines()
    assert header == (
        "| Models | Multi-turn Conversation | Translation | Summarization | Question Answering "
        "| Mathematical Reasoning | Retrieval-aug. Generation | #Mean Accepted Tokens | Overall |"
    )
    assert row.count("x |") == 7


def test_missing_task_and_missing_baseline_have_no_speedup():
    found = records(["rag", "qa"])
    (line,) = spec_bench_table(found).lines
    assert [math.isnan(cell.value) for cell in line[1:]] == [True, True, True, False, True, False, False, False]
    (line,) = spec_bench_table([r for r in found if r.decoder == "chain"]).lines
    assert math.isnan(line[-1].value) and line[-2].value > 1
    assert spec_bench_table([make_record()]) is None


def test_benchmark_report_contains_the_row(tmp_path):
    page = benchmark_report(tmp_path, [], records()).read_text()
    assert "Row of Spec-Bench" in page and "#Mean Accepted Tokens" in page
    assert (tmp_path / "spec_bench.md").read_text().startswith("| Models |")
