"""The result files of methods, from which `experiments/heads.md` is made (methods_page.py).

A method is what the runs of one cell have in common: they differ only in the seed. Its file is small and committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from hass_lightning.measure.factorial import interval_over_seeds
from hass_lightning.measure.record import BASELINE, Record, group_by, read_records
from hass_lightning.measure.statistics import Interval
from hass_lightning.measure.verdicts import metric_interval, speedup_interval
from hass_lightning.report.provenance_text import without_paths
from hass_lightning.report.study.cells import make_cells, show
from hass_lightning.report.study.runs import StudyRun
from hass_lightning.runs.files import read_json, write_json

Content = Mapping[str, Any]
Groups = dict[tuple[Any, ...], list[Record]]
SHOWN = ("model.", "data.batch_size", "data.max_answer_tokens", "data.noise", "trainer.max_steps", "trainer.precision")
HIDDEN = ("_partial_", "chunk_rows", "compile", "checkpoint", "attention", "fused")  # no effect on the result
UNNAMED = ("seed", "paths", "logger", "study", "name", "fresh", "num_threads", "callbacks", "hydra")


def add_method(folder: Path, method: str, runs: Sequence[StudyRun], records: Sequence[str]) -> Path:
    """Write the result file of a method.

    Args:
        folder: the folder of the result files.
        method: its name. If `runs` are several cells, it also chooses one: a level of a factor, such as `eagle3` of
            `experiment=eagle3`.
        runs: finished runs (load_runs).
        records: run folders of hass-benchmark that measured these heads. τ is that of the one with the most questions,
            the speedup that of the one with the most timed questions.

    Returns:
        the file.

    Raises:
        ValueError: no such cell, or records that lack its heads.
    """
    if not method.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"method={method} names a file: use letters, digits, - and _.")
    if not records:
        raise ValueError(
            f"records is empty: name the run folders of hass-benchmark that measured the heads of {method}."
        )
    cells = make_cells([run for run in runs if run.status == "completed"])
    fitting = [cell for cell in cells if len(cells) == 1 or method in map(show, cell.levels.values())]
    if len(fitting) != 1:
        known = "; ".join(cell.label for cell in cells) or "none"
        raise ValueError(
            f"method={method} fits {len(fitting)} cells of runs ({known}): give the run folders of one cell."
        )
    own = sorted(fitting[0].runs, key=lambda run: run.seed)
    folders = [Path(path) for path in records]
    results = list(_results(own, [read_records(path / "records.jsonl") for path in folders]))
    if not results:
        names = ", ".join(run.name for run in own)
        raise ValueError(
            f"records={', '.join(records)}: no decoder was measured with every head of {method} ({names})."
        )
    measured = [read_json(path / "provenance.json") for path in folders]
    newest = max((path / "records.jsonl").stat().st_mtime for path in folders)
    content = {
        "method": method,
        "overrides": [
            without_paths(f"{key}={value}")
            for key, value in own[0].overrides.items()
            if key.split(".")[0] not in UNNAMED
        ],
        "config": _essentials(own[0]),
        "seeds": [run.seed for run in own],
        "rows": _mean([run.metrics.get("train_tokens") for run in own]),
        "flops": _mean([run.metrics.get("train_flops") for run in own]),
        "data": sorted({str(run.metrics.get("data_hash")) for run in own}),
        "results": results,
        "commit": list(dict.fromkeys(_commit(each) for each in [*(run.provenance for run in own), *measured])),
        "processor": sorted({str(each.get("device")) for each in measured}),
        "date": datetime.fromtimestamp(newest, UTC).date().isoformat(),
    }
    write_json(folder / f"{method}.json", content)
    return folder / f"{method}.json"


def _essentials(run: StudyRun) -> dict[str, Any]:
    settings = read_json(run.folder / "resume_config.json") or run.settings
    return {
        key: without_paths(value) if isinstance(value, str) else value
        for key, value in sorted(settings.items())
        if key.startswith(SHOWN) and value is not None and not key.endswith(HIDDEN)
    }


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if isinstance(value, int | float)]
    return sum(known) / len(known) if known else None


def _commit(provenance: Content) -> str:
    return f"{str(provenance.get('git_commit'))[:12]}{' with changes' if provenance.get('git_dirty') else ''}"


def _results(runs: Sequence[StudyRun], sources: Sequence[Sequence[Record]]) -> Iterator[dict[str, Any]]:
    """Yield a result for each benchmark, decoder and sampling that some source measured with all runs."""
    found: dict[tuple[Any, ...], list[tuple[list[list[Record]], list[Record]]]] = {}
    for records in sources:
        groups: Groups = group_by(records, lambda r: (r.draft, r.benchmark, r.sampling, r.target, r.decoder))
        heads = dict.fromkeys(key[0] for key in groups)
        labels = [
            next((each for each in heads if each in (run.name, f"{run.folder.resolve().parent.name}/{run.name}")), None)
            for run in runs
        ]
        for draft, *rest in groups:
            sides = [groups.get((label, *rest), []) for label in labels]
            if draft == labels[0] and all(sides):
                baseline = groups.get(("", *rest[:3], BASELINE), [])
                found.setdefault(tuple(rest), []).append((sides, baseline))
    for (benchmark, sampling, target, decoder), measured in found.items():
        sides, _ = max(measured, key=lambda each: len(_questions(each[0][0])))
        timed = [each for each in measured if all(record.seconds for side in (*each[0], each[1]) for record in side)]
        timed = [each for each in timed if each[1]]
        speed: list[float] | None = None
        if timed:
            own, baseline = max(timed, key=lambda each: len(_questions(each[0][0])))
            speed = _rounded(_over_seeds([speedup_interval(side, baseline) for side in own]))
        questions = _questions(sides[0])
        yield {
            "benchmark": benchmark,
            "decoder": decoder,
            "settings": sides[0][0].settings,
            **asdict(sampling),
            "target": target,
            "max_new_tokens": sides[0][0].max_new_tokens,
            "num_questions": len(questions),
            "questions": sha256("\n".join(questions).encode()).hexdigest()[:12],
            "tau": _rounded(_over_seeds([metric_interval(side) for side in sides])),
            "speedup": speed,
        }


def _questions(records: Sequence[Record]) -> list[str]:
    return sorted({record.prompt_id for record in records})


def _over_seeds(intervals: Sequence[Interval]) -> Interval:
    """Return the only interval (over questions), or the interval of several seeds' values."""
    return intervals[0] if len(intervals) == 1 else interval_over_seeds([each.value for each in intervals])


def _rounded(interval: Interval) -> list[float]:
    return [round(value, 4) for value in astuple(interval)]
