from __future__ import annotations

import csv
import io
import math

import pytest
from rich.console import Console

from hass_lightning.report.summary_tables import mean_cell, paper_table, plain_table
from hass_lightning.report.tables import Cell, Column, Table


def row(draft, decoder, benchmark, tau, speed, temperature=0.0, **more):
    base = {"draft": draft, "decoder": decoder, "benchmark": benchmark, "temperature": temperature}
    base |= {"acceptance_length": tau[0], "acceptance_length_low": tau[1], "acceptance_length_high": tau[2]}
    base |= {"speedup": speed[0], "speedup_low": speed[1], "speedup_high": speed[2]}
    return base | {"num_prompts": 20, "tokens_per_second": 30.04, **more}


ONE = (1.0, 1.0, 1.0)
ROWS = [  # not in order, as a benchmark in random order writes them
    row("my_head", "dynamic_tree", "mt_bench", (2.5, 2.3, 2.75), (1.8, 1.6, 2.0), num_identical=19, num_compared=20),
    row("", "autoregressive", "mt_bench", ONE, ONE),
    row("", "autoregressive", "gsm8k", ONE, ONE),
    row("my_head", "dynamic_tree", "gsm8k", (3.5, 3.3, 3.7), (2.2, 2.0, 2.4), num_identical=20, num_compared=20),
]


def printed(table: Table) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(table.rich())
    return console.export_text()


def test_paper_markdown():
    assert paper_table(ROWS).markdown() == (
        "| decoder | mt_bench speedup | mt_bench τ | gsm8k speedup | gsm8k τ | mean speedup | mean τ |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| autoregressive | 1.00× | 1.00 | 1.00× | 1.00 | 1.00× | 1.00 |\n"
        "| dynamic_tree | 1.80× [1.60, 2.00] | 2.50 [2.30, 2.75] | 2.20× [2.00, 2.40] | 3.50 [3.30, 3.70] "
        "| 2.00× [1.86, 2.14] | 3.00 [2.86, 3.16] |\n"
        "\n"
        "τ: tokens per target forward, bonus token counted; [95 % interval]\n"
    )


def test_paper_latex():
    assert paper_table(ROWS[:2]).latex() == (
        "\\begin{tabular}{lrr}\n"
        "\\toprule\n"
        " & \\multicolumn{2}{c}{mt\\_bench} \\\\\n"
        "\\cmidrule(lr){2-3}\n"
        "decoder & speedup & $\\tau$ \\\\\n"
        "\\midrule\n"
        "autoregressive & 1.00$\\times$ & 1.00 \\\\\n"
        "dynamic\\_tree & 1.80$\\times$ {\\scriptsize [1.60, 2.00]} & 2.50 {\\scriptsize [2.30, 2.75]} \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
        "% τ: tokens per target forward, bonus token counted; [95 % interval]\n"
    )


def test_csv_keeps_all_digits_and_ends():
    lines = list(csv.DictReader(io.StringIO(paper_table(ROWS).csv())))
    assert lines[1]["decoder"] == "dynamic_tree"
    assert float(lines[1]["mt_bench_acceptance_length_high"]) == 2.75
    assert float(lines[1]["mean_speedup"]) == pytest.approx(2.0)


def test_plain_table_shows_checks_and_benchmarks():
    text = plain_table(ROWS).markdown()
    assert "| dynamic_tree | mt_bench | 2.50 [2.30, 2.75] | 1.80× [1.60, 2.00] | 30.0 | 20 | 19/20 |" in text
    assert "fp32" not in text  # nothing was checked in fp32


def test_columns_appear_for_keys_that_differ():
    sampled = row("other", "chain", "mt_bench", (2.0, 1.9, 2.1), (1.5, 1.4, 1.6), 1.0, rule="sampled")
    headers = [column.header for column in plain_table([*ROWS, sampled]).columns]
    assert headers[:4] == ["draft", "decoder", "T", "benchmark"]
    again = row("other", "tree", "mt_bench", (2.0, 1.9, 2.1), (1.5, 1.4, 1.6), 1.0, rule="deterministic")
    assert "rule" in [column.header for column in plain_table([*ROWS, sampled, again]).columns]


def test_lines_are_ordered_by_temperature_then_baseline():
    rows = [row("b", "chain", "x", ONE, ONE, 1.0), *ROWS[::-1], row("a", "chain", "x", ONE, ONE, 1.0)]
    lines = [[cell.value for cell in line[:3]] for line in plain_table(rows).lines]
    assert [line[0] for line in lines] == ["", "", "my_head", "my_head", "a", "b"]


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_unknown_numbers_are_dashes(nothing):
    rows = [row("d", "chain", "x", (nothing,) * 3, (1.5, nothing, nothing)), ROWS[1]]
    for table in (plain_table(rows), paper_table(rows)):
        assert "nan" not in (table.markdown() + table.latex() + printed(table)).lower()
        assert "–" in table.markdown() and "1.50×" in table.markdown() and "[" not in table.markdown().split("τ:")[0]
    assert "nan" not in paper_table(rows).csv()


def test_empty_rows():
    assert plain_table([]).lines == [] and paper_table([]).lines == []
    assert plain_table([]).markdown().startswith("| decoder")


def test_mean_needs_every_benchmark():
    lonely = row("", "prompt_lookup", "gsm8k", (1.4, 1.3, 1.5), (1.1, 1.0, 1.2))
    table = paper_table([*ROWS, lonely])
    line = next(line for line in table.lines if line[0].value == "prompt_lookup")
    assert [cell.value for cell in line[1:]] == [None, None, 1.1, 1.4, None, None]


def test_mean_interval_is_narrower_by_sqrt_n():
    cell = mean_cell([Cell(2.0, 1.6, 2.4)] * 4)
    assert (cell.value, cell.low, cell.high) == (2.0, pytest.approx(1.8), pytest.approx(2.2))
    assert mean_cell([]) == Cell()


def test_names_are_escaped():
    rows = [row("a|b&c_%", "chain", "x", ONE, ONE), row("plain", "chain", "x", ONE, ONE)]
    assert "a\\|b&c_%" in plain_table(rows).markdown()
    assert "a|b\\&c\\_\\%" in plain_table(rows).latex()


def test_terminal_does_not_interpret_markup():
    rows = [row("[red]x[/red]", "chain", "x", ONE, ONE), row("plain", "chain", "x", ONE, ONE)]
    assert "[red]x[/red]" in printed(plain_table(rows))


def test_baseline_compared_with_itself_has_no_interval():
    assert Column("x", "x").text(Cell(1.0, 1 - 1e-16, 1 + 1e-15)) == "1.00"


def test_small_numbers_are_not_zero():
    column = Column("p", "p", digits=3)
    assert column.number(Cell(0.0001)) == "<0.001" and column.number(Cell(0.0)) == "0.000"
