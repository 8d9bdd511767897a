"""`hass-report`: a sweep as a table with intervals, effects, claims and one page. Needs neither network nor W&B.

hass-report runs=runs/sweeps/paper_ablation                      # a sweep folder, or …
hass-report 'runs=[runs/eagle,runs/hass]' baseline=eagle         # … run folders
hass-report runs=runs/sweeps/top_k records=runs/benchmark/top_k  # heads that hass-benchmark measured together
hass-report 'why=[runs/eagle,runs/hass]'                         # which keys, code or data differ, in one line
hass-report runs=runs/sweeps/top_k wandb=workspace               # the W&B dashboard of the sweep as code
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from hass_lightning.cli import command
from hass_lightning.report.study import StudyRun, load_runs, study_report, why_line
from hass_lightning.report.study.analysis import Study, analyse
from hass_lightning.report.study.claims import claims_of
from hass_lightning.report.study.runs import read_run
from hass_lightning.report.study.workspace import save_workspace, workspace_spec

log = logging.getLogger(__name__)


@command("report")
def main(config: DictConfig) -> dict[str, Any]:
    """Report a study, or say why two runs differ; the last line of output is one JSON object."""
    if config.why:
        return {"why": explain(as_list(config.why))}
    if config.wandb not in (None, "workspace"):
        raise ValueError(f"wandb={config.wandb} is not known: wandb=workspace writes the dashboard of the sweep.")
    paths = as_list(config.runs)
    runs = load_runs(paths, as_list(config.records))
    study = analyse(runs, config.baseline, config.decoder)
    folder = output_folder(config, paths)
    title = Path(paths[0]).resolve().name if len(paths) == 1 else folder.name
    files = {ending: str(path) for ending, path in study_report(study, folder, title).items()}
    if config.wandb:
        spec = workspace_spec(study, title, config.wandb_project, config.wandb_entity)
        files["workspace"] = save_workspace(spec, folder)
    return result(study, runs, files)


def as_list(value: Any) -> list[str]:
    """One folder or a list of them, as a list."""
    if value in (None, ""):
        return []
    return [str(each) for each in value] if isinstance(value, ListConfig | list) else [str(value)]


def explain(paths: list[str]) -> str:
    """The line of `why`, printed to stdout as well.

    Raises:
        ValueError: not two run folders.
    """
    folders = [Path(path) for path in paths]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if len(folders) != 2 or missing:
        raise ValueError(f"why={paths} must name two run folders{f'; not there: {missing}' if missing else ''}.")
    line = why_line(*(read_run(folder) for folder in folders))
    print(line, flush=True)
    return line


def output_folder(config: DictConfig, paths: list[str]) -> Path:
    """`output_dir`; else the sweep folder itself where there is one; else a folder named after the command."""
    if config.output_dir:
        return Path(config.output_dir)
    if len(paths) == 1 and (Path(paths[0]) / "ledger.jsonl").is_file():
        return Path(paths[0])
    return Path(config.paths.run_dir)


def result(study: Study, runs: list[StudyRun], files: dict[str, str]) -> dict[str, Any]:
    """The line of JSON: cells, claims, effects, where the files are."""
    cells = [
        {"cell": row.label, "num_seeds": row.num_seeds, "tau": row.tau.value, "tau_low": row.tau.low,
         "tau_high": row.tau.high, "seconds": row.seconds.value}
        for row in study.rows
    ]  # fmt: skip
    tests = [
        {"name": effect.contrast.name, "kind": effect.contrast.kind, "verdict": effect.verdict,
         "ratio": effect.ratio.value, "low": effect.ratio.low, "high": effect.ratio.high,
         "p_adjusted": effect.p_adjusted}
        for effect in (*study.comparisons, *study.effects)
    ]  # fmt: skip
    return {
        "metric": study.metric,
        "baseline": study.rows[study.baseline].label,
        "unit": study.unit,
        "num_runs": len(runs),
        "num_left_out": len(study.left_out),
        "cells": [{key: known(value) for key, value in cell.items()} for cell in cells],
        "tests": tests,
        "claims": [asdict(claim) for claim in claims_of(study)],
        "files": files,
    }


def known(value: Any) -> Any:
    """None for nan, which JSON has no word for."""
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    main()
