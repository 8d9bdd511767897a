"""The runs of a study, read from a sweep folder (its ledger) or from run folders, without network or model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hass_lightning.measure.record import BASELINE, Record, read_records
from hass_lightning.report.curves import Curve, read_curves
from hass_lightning.report.provenance_text import flatten
from hass_lightning.runs.files import read_json
from hass_lightning.runs.ledger import Ledger
from hass_lightning.runs.old_names import new_name

ABSENT = "(absent)"  # the value of a key that a config does not have
# Keys that name, locate, log or control a run without affecting its result.
NO_SETTING = (
    "paths", "hydra", "logger", "name", "study", "hparams_search", "fresh", "job", "ckpt_path", "debug",
    "callbacks.progress", "status", "trainer.rendezvous_timeout",
)  # fmt: skip


def decides_nothing(key: str) -> bool:
    """Return whether a config key does not affect the result of a run."""
    return f"{key}.".startswith(tuple(f"{name}." for name in NO_SETTING))


@dataclass(eq=False)
class StudyRun:
    """One run: its settings and its results.

    `settings` are the config keys that can affect the result, flattened and without `seed`. Values that depend on the
    machine (`hass.by_machine`) are those of its machine, if the run recorded them. `overrides` are the overrides of its
    command line, by key.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    status: str = "completed"
    error: str = ""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Its training curves."""
        return read_curves(self.folder)

    def last(self, name: str) -> float | None:
        """Return the last logged value of a curve."""
        curve = self.curves.get(name)
        return curve[-1][1] if curve else None

    def at_best(self, name: str) -> float | None:
        """Return the value at the validation that selected the head (largest acceptance length), or the last value."""
        chosen = max(self.curves.get("val/acceptance_length", []), key=lambda point: point[1], default=None)
        values = dict(self.curves.get(name, []))
        return values[chosen[0]] if chosen and chosen[0] in values else self.last(name)


def load_runs(
    paths: str | Path | Sequence[str | Path], records: str | Path | Sequence[str | Path] = ()
) -> list[StudyRun]:
    """Return the runs of a sweep folder, of several sweep folders, or of single run folders.

    Args:
        paths: one folder or a list.
        records: folders (or files) of a `hass-benchmark` run that measured these heads together, labeled by the names
            of their run folders. Its records replace the runs' own. Runs without a record in it are left out, because
            their own records have other questions.

    Raises:
        ValueError: a folder that is neither a sweep nor a run, or records that match no run.
    """
    runs: list[StudyRun] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        runs += _load(Path(path))
    if not runs:
        raise ValueError("runs is empty: set it to a sweep folder (runs/sweeps/<name>) or a list of run folders.")
    benchmarks = [Path(path) for path in ([records] if isinstance(records, str | Path) else records)]
    measured = [run for path in benchmarks for run in _take_records(runs, path)]
    if benchmarks:
        where = ", ".join(map(str, benchmarks))
        for run in runs:
            if run not in measured and run.status == "completed":
                run.status, run.error = "not measured", f"records: {where} did not measure this head with the others"
    return runs


def _load(path: Path) -> list[StudyRun]:
    ledger = Ledger(path)
    if ledger.path.is_file():
        found = []
        for entry in ledger.latest().values():
            run = read_run(ledger.folder_of(entry), entry.overrides)
            run.status, run.error = entry.status, entry.error or ""
            run.metrics = run.metrics or entry.result
            found.append(run)
        return found
    if (path / ".hydra").is_dir() or (path / "metrics.json").is_file():
        return [read_run(path)]
    below = sorted(folder.parent for folder in path.glob("*/metrics.json"))
    if below:
        return [read_run(folder) for folder in below]
    raise ValueError(
        f"runs: {path} is neither a sweep folder (with ledger.jsonl) nor a run folder (with metrics.json or .hydra); "
        "hass-train -m … prints its sweep folder at the end."
    )


def read_run(folder: Path, overrides: Sequence[str] | None = None) -> StudyRun:
    """Read one run folder; anything missing or damaged is left empty."""
    config = _yaml(folder / ".hydra" / "config.yaml")
    if overrides is None:
        written = _yaml(folder / ".hydra" / "overrides.yaml")
        overrides = [str(each) for each in written] if isinstance(written, list) else []
    flat = flatten(config) if isinstance(config, dict) else {}
    noted = flatten(read_json(folder / "resume_config.json"))
    # not every interpolation: `${seed}` would give each seed a cell of its own
    resolved = {key: noted[key] for key, value in flat.items() if "${hass.by_machine" in str(value) and key in noted}
    settings = {key: new_name(value) for key, value in (flat | resolved).items() if not decides_nothing(key)}
    seed = settings.pop("seed", 0)
    records_file = folder / "records.jsonl"
    metrics = read_json(folder / "metrics.json")
    return StudyRun(
        folder,
        settings,
        {key.lstrip("+~"): value for key, _, value in (override.partition("=") for override in overrides)},
        seed if isinstance(seed, int) else 0,
        metrics,
        read_json(folder / "provenance.json"),
        read_records(records_file) if records_file.is_file() else [],
        "completed" if metrics else "unfinished",
    )


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return {}


def _take_records(runs: list[StudyRun], path: Path) -> list[StudyRun]:
    """Set each run's records to those of its head and of the baseline, and return the runs that have any."""
    records = read_records(path / "records.jsonl" if path.is_dir() else path)
    shared = [record for record in records if record.decoder == BASELINE or not record.draft]
    taken = []
    for run in runs:
        names = (run.name, f"{run.folder.resolve().parent.name}/{run.name}")
        own = [record for record in records if record.draft in names]
        if own:
            run.records = [*shared, *own]
            taken.append(run)
    if not taken:
        labels = sorted({record.draft for record in records if record.draft})
        raise ValueError(
            f"records: {path} measured {', '.join(labels) or 'no head'}, but none of these is a run folder of runs."
        )
    return taken


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys whose values are not all equal, with the value in each mapping."""
    keys = dict.fromkeys(key for each in settings for key in each)
    columns = {key: [each.get(key, ABSENT) for each in settings] for key in keys}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}
