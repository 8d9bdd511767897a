"""Measurement of draft heads: benchmark, metrics and statistics."""

from hass_lightning.measure.benchmark import run_benchmark
from hass_lightning.measure.metrics import acceptance_length
from hass_lightning.measure.record import Record, read_records
from hass_lightning.measure.statistics import Interval, holm, ratio_interval
from hass_lightning.measure.summary import summarize
from hass_lightning.measure.verdicts import compare, compare_benchmarks, compare_methods

__all__ = [
    "Interval", "Record", "acceptance_length", "compare", "compare_benchmarks", "compare_methods", "holm",
    "ratio_interval", "read_records", "run_benchmark", "summarize",
]  # fmt: skip
