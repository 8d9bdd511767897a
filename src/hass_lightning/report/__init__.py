"""Tables, plots and self-contained HTML pages of runs and benchmarks."""

from hass_lightning.report.pages import benchmark_report, run_report
from hass_lightning.report.summary_tables import paper_table, plain_table
from hass_lightning.report.tables import Table

__all__ = ["Table", "benchmark_report", "paper_table", "plain_table", "run_report"]
