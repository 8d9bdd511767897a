"""The pages in a real browser, without network: no message on its console, and every figure is drawn."""

from __future__ import annotations

import re

import pytest
from report_factory import Words, make_records, write_run
from study_factory import write_sweep

from browser import CHROMIUM, check_page, measure_page
from hass_lightning.measure.summary import summarize
from hass_lightning.report import benchmark_report, run_report
from hass_lightning.report.study import load_runs, study_report
from hass_lightning.report.study.analysis import analyse


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (.ci/run installs it)")
@pytest.mark.parametrize("kind", ["run", "benchmark", "study"])
def test_the_page_opens_without_network(tmp_path, kind):
    if kind == "study":
        rates = {(loss, depth): 0.5 + 0.05 * depth for loss in ("eagle", "hass") for depth in (1, 2, 3)}
        sweep = write_sweep(tmp_path / "sweep", rates, seeds=(0, 1))
        path = study_report(analyse(load_runs(sweep)), sweep, kind)["html"]
    else:
        folder = write_run(tmp_path / "run")
        records = make_records()
        report = run_report if kind == "run" else benchmark_report
        path = report(folder, summarize(records), records, Words())
    check_page(path, tmp_path / "profile", least_figures=5)


@pytest.fixture(scope="module")
def page_of_a_run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("page") / "run")
    records = make_records()
    return run_report(folder, summarize(records), records, Words())


def test_a_page_is_less_than_a_megabyte(page_of_a_run):
    assert 400_000 < page_of_a_run.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (.ci/run installs it)")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
def test_a_page_fits_a_phone_and_a_desktop_in_light_and_dark(page_of_a_run, tmp_path, width, dark):
    seen = measure_page(page_of_a_run, tmp_path / "profile", width, dark)
    assert width - 20 <= seen["width"] <= width  # less a scroll bar
    assert seen["needed"] <= seen["width"]
    assert len(seen["plots"]) >= 5 and max(seen["plots"]) <= seen["width"]
    red, green, blue = map(int, re.findall(r"\d+", seen["background"])[:3])
    assert (red + green + blue < 150) == dark
