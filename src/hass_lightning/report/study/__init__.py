"""Studies: several runs, read from their folders, compared and reported on one page."""

from hass_lightning.report.study.differences import why_line
from hass_lightning.report.study.page import study_report
from hass_lightning.report.study.runs import StudyRun, load_runs

__all__ = ["StudyRun", "load_runs", "study_report", "why_line"]
