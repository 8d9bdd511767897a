"""The config.json of a head: reading, rotary settings, and the class of the head."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from hass_lightning.draft.eagle import EagleDraft
from hass_lightning.draft.head import DraftHead
from hass_lightning.runs.files import read_json_object

OURS = "hass_lightning"  # key of config.json for values that serving engines do not read


def read_head_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a head.

    Raises:
        ValueError: if it is not a JSON object.
    """
    return read_json_object(folder / "config.json", "export or copy the head again")


def llama_config(where: str, raw: Mapping[str, Any]) -> LlamaConfig:
    """Convert the config.json of a head to a Llama config.

    Raises:
        ValueError: if a size is missing or has the wrong type.
    """
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        if type(raw.get(key)) is not int or raw[key] < 1:
            raise ValueError(f"{where}: config.json has {key}={raw.get(key)!r}: it must be the number of the head.")
    try:
        return LlamaConfig.from_dict(deepcopy(dict(raw)))  # from_dict modifies its argument
    except Exception as error:  # the validators of transformers raise their own exception types
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: config.json is not a valid Llama config ({text}): correct it.") from error


def rope_fields(config: Any) -> dict[str, Any]:
    """Rotary settings in both formats: `rope_theta` with `rope_scaling`, and `rope_parameters` of transformers 5.

    Engines read one or the other, and silently use 10,000 without scaling if theirs is missing.
    """
    rope = dict(config.rope_parameters)
    scaling = None
    if rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        scaling["type"] = rope["rope_type"]
    part = {"partial_rotary_factor": rope["partial_rotary_factor"]} if "partial_rotary_factor" in rope else {}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, **part, "rope_parameters": rope}


def class_note(draft: DraftHead) -> dict[str, str]:
    """Return the note from which `load_draft` finds the class of a head; empty for EAGLE, as in earlier versions."""
    kind = type(draft)
    return {} if kind is EagleDraft else {"head": f"{kind.__module__}.{kind.__qualname__}"}


def class_of(where: str, notes: Mapping[str, Any]) -> type[DraftHead]:
    """Return the class of a saved head. A module of this package is imported; others must be imported already.

    Raises:
        ValueError: if there is no such head.
    """
    name = str(notes.get("head", f"{EagleDraft.__module__}.{EagleDraft.__qualname__}"))
    module_name, _, class_name = name.rpartition(".")
    try:
        inside = module_name.startswith("hass_lightning.draft.")
        module = importlib.import_module(module_name) if inside else sys.modules[module_name]
        kind = getattr(module, class_name)
    except (ImportError, KeyError, AttributeError):
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, DraftHead)):
        raise ValueError(
            f"{where} contains a head of the unknown class {name}: put its file into "
            "src/hass_lightning/draft/, or import its module first."
        )
    return kind
