from __future__ import annotations

import math
from dataclasses import replace

import pytest
from report_factory import make_record, make_records

from hass_lightning.measure.summary import summarize
from hass_lightning.report.decoding_plots import bars_figure, cost_figure, depth_figure, phase_figure, prompts_figure
from hass_lightning.report.headline import fastest, headline_tiles
from hass_lightning.report.series import colors_of, series_of


@pytest.fixture(scope="module")
def records():
    return make_records()


@pytest.fixture(scope="module")
def rows(records):
    return summarize(records)


def test_equal_lines_have_equal_colours_at_all_temperatures(records):
    series = list(series_of(records))
    assert [each.label for each in series][:3] == [
        "autoregressive · T=0",
        "eagle · chain · T=0",
        "eagle · dynamic_tree · T=0",
    ]
    assert len(series) == 10 and len(colors_of(series)) == 5


def test_bars_have_the_intervals_of_the_rows(rows):
    figure = bars_figure(rows, "acceptance_length", "τ")
    chain = next(trace for trace in figure.data if trace.name == "hass · chain")
    row = next(r for r in rows if (r["draft"], r["decoder"], r["temperature"]) == ("hass", "chain", 0.0))
    place = chain.x.index(row["benchmark"])
    assert chain.y[place] == row["acceptance_length"]
    assert chain.error_y.array[place] == pytest.approx(row["acceptance_length_high"] - row["acceptance_length"])
    assert chain.error_y.arrayminus[place] == pytest.approx(row["acceptance_length"] - row["acceptance_length_low"])


def test_one_benchmark_shows_the_baseline(records):
    rows = summarize([record for record in records if record.benchmark == "gsm8k" and not record.temperature])
    assert "autoregressive" in {trace.name for trace in bars_figure(rows, "speedup", "speedup").data}


def test_depth_rates():
    figure = depth_figure([make_record(accepted=(2, 0, 3, 1))])
    rates, survival = (list(trace.y) for trace in figure.data)
    assert rates == [pytest.approx(3 / 4), pytest.approx(2 / 3), pytest.approx(1 / 2)]
    assert survival[-1] == pytest.approx(1 / 4)


def test_depth_figure_with_the_simulated_chain_only():
    figure = depth_figure([], {"val/survival/step1": [(9, 0.5)], "val/survival/step2": [(9, 0.25)]})
    assert list(figure.data[0].y) == [0.5, 0.5] and list(figure.data[1].y) == [0.5, 0.25]
    assert depth_figure([], {"val/survival/step1": [(9, 0.0)], "val/survival/step2": [(9, 0.0)]}) is not None


def test_phases_are_in_milliseconds_per_token():
    record = make_record(accepted=(1, 1), cycle_seconds=0.05)  # 0.1 s for 5 tokens, 70 % verifying
    figure = phase_figure([record])
    verify = next(trace for trace in figure.data if trace.name == "verify")
    assert verify.x[0] == pytest.approx(1000 * 0.07 / 5)


def test_prompts_need_a_baseline(records):
    assert len(prompts_figure(records).data) == 8
    assert prompts_figure([record for record in records if record.draft]) is None


def test_unknown_values_are_not_drawn(rows):
    broken = [{**row, "speedup": math.nan, "acceptance_length_low": None} for row in rows]
    assert bars_figure(broken, "speedup", "speedup") is None
    assert bars_figure(broken, "acceptance_length", "τ") is not None
    assert cost_figure([{"predicted_speedup": math.nan, "measured_speedup": 1.0}, {}]) is None
    assert len(cost_figure([{"predicted_speedup": 1.1, "measured_speedup": 1.0, "name": "x"}]).data) == 3


def test_nothing_measured():
    assert bars_figure([], "speedup", "") is None
    assert [figure([]) for figure in (depth_figure, phase_figure, prompts_figure, cost_figure)] == [None] * 4
    assert headline_tiles([]) == [] and fastest([]) is None


def test_an_answer_that_differs_in_fp32_is_a_defect(records, rows):
    assert not any(tile.bad for tile in headline_tiles(rows))
    broken = next(record for record in records if record.fp32_identical)
    tiles = headline_tiles(summarize([replace(broken, fp32_identical=False)]))
    assert [(tile.name, tile.value) for tile in tiles if tile.bad] == [("identical in fp32", "0/1")]


def test_markup_in_names_is_escaped():
    figure = phase_figure([make_record(draft="<b>x</b>"), make_record(draft="y")])
    assert any("&lt;b&gt;" in label for label in figure.data[0].y)
