"""Measuring what a draft head is worth: one benchmark function, one metric module, one statistics module."""

from hass_lightning.measure.benchmark import run_benchmark
from hass_lightning.measure.records import Record, acceptance_length, read_records
from hass_lightning.measure.statistics import Interval, holm, ratio_interval
from hass_lightning.measure.summary import summarize
from hass_lightning.measure.verdicts import compare, compare_benchmarks, compare_methods

__all__ = [
    "Interval",
    "Record",
    "acceptance_length",
    "compare",
    "compare_benchmarks",
    "compare_methods",
    "holm",
    "ratio_interval",
    "read_records",
    "run_benchmark",
    "summarize",
]
