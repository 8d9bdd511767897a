"""The W&B dashboard of a study as code, saved online with wandb-workspaces or written to a file."""

from __future__ import annotations

import importlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from hass_lightning.report.study.analysis import Study
from hass_lightning.report.study.cells import partition
from hass_lightning.report.study.claims import claims_of
from hass_lightning.report.study.runs import differing
from hass_lightning.runs.wandb_key import has_wandb_key, wandb_server
from hass_lightning.target_model.hub import server_answers

log = logging.getLogger(__name__)
SPEC_FILE = "wandb_workspace.json"
AXES = {
    "step": "trainer/global_step",
    "tokens": "compute/tokens",
    "FLOPs": "compute/flops",
    "seconds": "compute/seconds",
}


def workspace_spec(study: Study, name: str, project: str, entity: str | None = None) -> dict[str, Any]:
    """Return sections and panels that show the ablation as plain data; `kind` is a class of wandb_workspaces.

    They show acceptance and loss over every axis of compute, acceptance rates by depth, and final values per cell, for
    the runs of the sweep's group, grouped by what distinguishes its cells.
    """
    deepest = max((len(row.rates) for row in study.rows), default=0)
    steps = max((len(row.accuracies) for row in study.rows), default=0)

    def lines(x: str, *y: str) -> dict[str, Any]:
        return {"kind": "LinePlot", "x": x, "y": list(y)}

    def bars(*metrics: str) -> dict[str, Any]:
        return {"kind": "BarPlot", "metrics": list(metrics)}

    def section(title: str, *panels: dict[str, Any]) -> dict[str, Any]:
        return {"name": title, "panels": list(panels)}

    step, tau, loss = AXES["step"], "val/acceptance_length", "val/loss"
    sections = [
        section("At a glance", bars("final/acceptance_length"), bars("final/speedup"), lines(step, tau)),
        *(section(f"By {title}", lines(axis, tau), lines(axis, loss)) for title, axis in AXES.items()),
        section(
            "By depth",
            *(bars(f"decode/accept_rate/depth{depth}") for depth in range(1, deepest + 1)),
            *(lines(step, f"val/accuracy/step{number}") for number in range(1, steps + 1)),
        ),
        section("Loss", lines(step, "train/loss"), lines(step, loss)),
    ]
    return {
        "name": f"Study {name}",
        "entity": entity,
        "project": project,
        "group": name,
        "group_by": _keys(study),
        "sections": sections,
        "claims": [f"{claim.text} ({claim.evidence})" for claim in claims_of(study)],
    }


def _keys(study: Study) -> list[str]:
    """Return a config key for each factor: one with its name if that differs, otherwise one with the same partition."""
    differ = differing([cell.settings for cell in study.cells])
    keys = []
    for factor in study.cells[0].levels:
        parts = partition([cell.levels[factor] for cell in study.cells])
        named = [key for key in differ if f".{key}".endswith(f".{factor}")]
        keys += (named or [key for key, values in differ.items() if partition(values) == parts])[:1]
    return keys


def save_workspace(spec: dict[str, Any], folder: Path) -> str:
    """Save the workspace and a W&B report with the claims; if that is not possible, write the description to a file.

    Returns:
        the URL of the workspace, or the path of the file.
    """
    path = folder / SPEC_FILE
    path.write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
    missing = _missing()
    if not missing:
        spec = spec | {"entity": spec["entity"] or _default_entity()}
        missing = "" if spec["entity"] else "set the owner of the project: wandb_entity=<you or your team>"
    if missing:
        log.warning("the W&B workspace is described in %s but not saved: %s", path, missing)
        return str(path)
    workspace = build_workspace(spec)
    workspace.save()
    build_report(spec).save()
    return str(workspace.url)


def _missing() -> str:
    """Return what prevents saving the workspace and how to fix it; empty if nothing does."""
    try:
        importlib.import_module("wandb_workspaces.workspaces")
    except ImportError:
        return "pip install wandb-workspaces, then the same command"
    if not has_wandb_key() or os.environ.get("WANDB_MODE") == "offline":
        return (
            "`wandb login` or set WANDB_API_KEY (and not WANDB_MODE=offline), upload the runs with `wandb sync`, then "
            "the same command"
        )
    return "" if server_answers(wandb_server()) else f"the W&B server {wandb_server()} does not answer"


def _default_entity() -> str | None:
    """Return the default entity of the user's W&B account; None if the server does not return one."""
    import wandb
    from wandb.errors import Error

    try:
        return wandb.Api().default_entity
    except Error as error:
        log.warning("W&B returned no default entity: %s", error)
        return None


def _panels(module: Any, section: dict[str, Any]) -> list[Any]:
    return [
        getattr(module, panel["kind"])(**{key: value for key, value in panel.items() if key != "kind"})
        for panel in section["panels"]
    ]


def build_workspace(spec: dict[str, Any]) -> Any:
    """Return the description as a `wandb_workspaces.workspaces.Workspace`, not yet saved."""
    reports: Any = importlib.import_module("wandb_workspaces.reports.v2")
    workspaces: Any = importlib.import_module("wandb_workspaces.workspaces")
    expressions: Any = importlib.import_module("wandb_workspaces.expr")
    return workspaces.Workspace(
        name=spec["name"],
        entity=spec["entity"],
        project=spec["project"],
        sections=[
            workspaces.Section(name=section["name"], panels=_panels(reports, section), is_open=number < 2)
            for number, section in enumerate(spec["sections"])
        ],
        runset_settings=workspaces.RunsetSettings(
            filters=[expressions.Metric("Group") == spec["group"]],
            groupby=[expressions.Config(key) for key in spec["group_by"]],
        ),
    )


def build_report(spec: dict[str, Any]) -> Any:
    """Return the claims and the first panels as a W&B report, not yet saved."""
    reports: Any = importlib.import_module("wandb_workspaces.reports.v2")
    group = f"Metric('Group') == '{spec['group']}'"
    runset = reports.Runset(entity=spec["entity"], project=spec["project"], filters=group)
    return reports.Report(
        entity=spec["entity"],
        project=spec["project"],
        title=spec["name"],
        blocks=[
            reports.H1(text="Claims"),
            reports.UnorderedList(items=spec["claims"]),
            reports.PanelGrid(runsets=[runset], panels=_panels(reports, spec["sections"][0])),
        ],
    )
