"""Module names of earlier versions, in existing configs, run folders and programs."""

from __future__ import annotations

import importlib.util
import re
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

COMMANDS = ("train", "prepare", "benchmark", "doctor", "export", "import_head")
RUNS = ("files", "ledger", "names", "progress", "provenance", "redaction", "wandb_key")
MOVED = {name: f"commands.{name}" for name in COMMANDS} | {name: f"runs.{name}" for name in RUNS}
MOVED |= {"cli": "commands.command", "report_command": "commands.report", "target": "target_model"}
MOVED |= {"estimate": "training.estimate", "planning": "training.plan"}
RENAMED = {
    "target_model": {"head": "lm_head"},
    "data": {"answers": "answered_questions", "batching": "continuous_batching", "requests": "generation_requests"},
    "draft": {"official": "import_official"},
    "losses": {"passes": "reductions"},
    "decoding": {"small": "small_model", "lookup": "prompt_lookup"},
    "measure": {
        "records": "metrics", "trace": "record", "cells": "benchmark_cells", "known_answer": "decoder_replay",
        "replay": "tree_replay", "identity": "lossless", "pieces": "token_kinds",
    },
    "serving": {"profiles": "engines", "package": "export", "gate": "export_checks"},
    "checks": {"fit": "head_fits_target"},
    "runs": {"process": "ranks"},
}  # fmt: skip


def new_name(value: Any) -> Any:
    """Convert an old dotted name or `package://` path in hass_lightning to the current one; others are unchanged."""
    if not isinstance(value, str):
        return value
    value = re.sub(r"^(hass_lightning\.|package://)(\w+)(?=[./]|$)", lambda m: m[1] + MOVED.get(m[2], m[2]), value)
    return re.sub(
        r"^hass_lightning\.(\w+)\.(\w+)(?=\.|$)",
        lambda m: f"hass_lightning.{m[1]}.{RENAMED.get(m[1], {}).get(m[2], m[2])}",
        value,
    )


class OldNames(MetaPathFinder, Loader):
    """Import hook that imports the current module for an old name, with a DeprecationWarning; also for `python -m`."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: D102
        found = importlib.util.find_spec(name) if (name := new_name(fullname)) != fullname else None
        if found is None:
            return None
        warnings.warn(f"{fullname} is now {name}", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, self, origin=found.origin)

    def create_module(self, spec: ModuleSpec) -> Any:  # noqa: D102
        module = importlib.import_module(new_name(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        """Restore the spec of the module, which has already run: the import system has set that of the old name."""
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, fullname: str) -> Any:
        """Return the code for `python -m`."""
        spec: Any = importlib.util.find_spec(new_name(fullname))
        return spec.loader.get_code(spec.name)
