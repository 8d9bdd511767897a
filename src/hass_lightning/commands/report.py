"""`hass-report`: report a sweep as a table with intervals, effects, claims and one page.

hass-report runs=runs/sweeps/paper_ablation                      # a sweep: its report/ folder has the page
hass-report 'runs=[runs/eagle,runs/hass]' baseline=eagle         # run folders: runs/report/eagle,hass
hass-report runs=runs/sweeps/top_k records=runs/benchmark/top_k  # heads that hass-benchmark measured together
hass-report 'why=[runs/eagle,runs/hass]'                         # which keys, code or data differ, in one line
hass-report records=runs/benchmark served=metrics.txt             # accepted by position: an engine against our records
hass-report 'gap={reference: paper.yaml, mine: runs/benchmark}'   # explain a published τ against a measured one
hass-report runs=runs/sweeps/top_k wandb=workspace               # the W&B dashboard of the sweep as code
hass-report table=experiments/heads                              # write the page of all methods from their result files
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from hass_lightning.commands.command import command
from hass_lightning.report.gap import gap_report
from hass_lightning.report.methods import add_method
from hass_lightning.report.methods_page import write_methods_page
from hass_lightning.report.served import served_report
from hass_lightning.report.study import StudyRun, load_runs, study_report, why_line
from hass_lightning.report.study.analysis import Study, analyse
from hass_lightning.report.study.claims import claims_of
from hass_lightning.report.study.runs import read_run
from hass_lightning.report.study.workspace import save_workspace, workspace_spec
from hass_lightning.runs.names import shortened
from hass_lightning.runs.screen import stdout_console

log = logging.getLogger(__name__)


@command("report")
def main(config: DictConfig) -> dict[str, Any]:
    """Report a study, or explain how two runs differ; the last line of output is one JSON object."""
    if config.why:
        return {"why": explain(as_list(config.why))}
    if config.served:
        return compare_with_engine(config)
    if config.gap:
        return explain_published(config)
    if config.table:
        return table_of_methods(config)
    if config.wandb not in (None, "workspace"):
        raise ValueError(f"wandb={config.wandb} is not supported: wandb=workspace writes the dashboard of the sweep.")
    paths = as_list(config.runs)
    runs = load_runs(paths, as_list(config.records))
    study = analyse(runs, config.baseline, config.decoder)
    folder = output_folder(config.output_dir, paths)
    title = Path(paths[0]).resolve().name if len(paths) == 1 else folder.name
    files = {ending: str(path) for ending, path in study_report(study, folder, title).items()}
    if config.wandb:
        spec = workspace_spec(study, title, config.wandb_project, config.wandb_entity)
        files["workspace"] = save_workspace(spec, folder)
    return result(study, runs, files)


def as_list(value: Any) -> list[str]:
    """Return one folder or a list of folders as a list."""
    if value in (None, ""):
        return []
    return [str(each) for each in value] if isinstance(value, ListConfig | list) else [str(value)]


def explain(paths: list[str]) -> str:
    """Print and return the line of `why`.

    Raises:
        ValueError: if `paths` are not two run folders.
    """
    folders = [Path(path) for path in paths]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if len(folders) != 2 or missing:
        raise ValueError(f"why={paths} must name two run folders{f'; missing: {missing}' if missing else ''}.")
    line = why_line(*(read_run(folder) for folder in folders))
    stdout_console().print(line, soft_wrap=True, markup=False)
    return line


def compare_with_engine(config: DictConfig) -> dict[str, Any]:
    """Compare the counts of a serving engine with the records of one run of hass-benchmark.

    Raises:
        ValueError: if `records` is not one folder.
    """
    folders = as_list(config.records)
    if len(folders) != 1:
        raise ValueError(f"records={folders} must be one run folder of hass-benchmark for served={config.served}.")
    return served_report(
        Path(folders[0]),
        config.served,
        Path(config.output_dir) if config.output_dir else None,
        before=config.served_before,
        head=config.head,
        decoder=config.decoder,
        temperature=config.temperature,
    )


def explain_published(config: DictConfig) -> dict[str, Any]:
    """Explain a published acceptance length against a measured one.

    Raises:
        ValueError: if `gap` does not consist of `reference` and `mine`.
    """
    gap = OmegaConf.to_container(config.gap, resolve=True)
    if not isinstance(gap, dict) or set(gap) != {"reference", "mine"}:
        raise ValueError(f"gap={gap} must have the keys reference and mine.")
    return gap_report(
        gap["reference"],
        gap["mine"],
        Path(config.output_dir) if config.output_dir else None,
        prompts=config.prompts,
        head=config.head,
        decoder=config.decoder,
        temperature=config.temperature,
    )


def table_of_methods(config: DictConfig) -> dict[str, Any]:
    """Add the runs as a method if `method` names it, and write the page of all methods.

    Raises:
        ValueError: `runs` or `records` do not fit, or a result file is damaged.
    """
    folder = Path(config.table)
    added = {}
    if config.method:
        runs = load_runs(as_list(config.runs))
        added = {"method": str(add_method(folder, str(config.method), runs, as_list(config.records)))}
    return {"files": {**added, "page": str(write_methods_page(folder))}}


def output_folder(output_dir: str | None, paths: list[str]) -> Path:
    """Return `output_dir`, `report/` in a single folder, or `report/<their names>` next to the first of several."""
    if output_dir:
        return Path(output_dir)
    if len(paths) == 1:
        return Path(paths[0]) / "report"
    names = [Path(path).resolve().name for path in paths]
    return Path(paths[0]).resolve().parent / "report" / shortened(",".join(names), paths)


def result(study: Study, runs: list[StudyRun], files: dict[str, str]) -> dict[str, Any]:
    """Return the line of JSON: cells, claims, effects, and the paths of the files."""
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
    """Return None for nan, which JSON cannot represent, and any other value unchanged."""
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    main()
