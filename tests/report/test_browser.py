"""The pages in a real browser, without network: nothing is reported on its console and every figure is drawn."""

from __future__ import annotations

import pytest
from report_factory import Words, make_records, write_run
from study_factory import write_sweep

from browser import CHROMIUM, check_page
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
