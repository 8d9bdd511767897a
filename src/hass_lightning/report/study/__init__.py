"""A study: several runs, read from their folders, compared and put on one page."""

from hass_lightning.report.study.page import study_report
from hass_lightning.report.study.runs import StudyRun, load_runs
from hass_lightning.report.study.why import why_line

__all__ = ["StudyRun", "load_runs", "study_report", "why_line"]
