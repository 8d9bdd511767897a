"""A saved head against the target it is for: engines load a wrong one without a word and then accept nothing.

The rules are those of the engines' loaders (docs/serving.md). Shapes: D hidden, V vocabulary (types.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hass_lightning.checks.finding import Finding, error, ok, warning
from hass_lightning.draft import EagleDraft
from hass_lightning.draft.checkpoint import OURS
from hass_lightning.draft.eagle import draft_config
from hass_lightning.target.model import TargetModel

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
FROZEN = {
    "embed_tokens.weight": "embed_tokens",
    "lm_head.weight": "lm_head",
}  # copies of the target's that may be there


def check_head(path: str | Path, target: TargetModel) -> list[Finding]:
    """All findings about the head in a folder (or in `draft/` of a run folder).

    Raises:
        ValueError: there is no head.
    """
    folder = Path(path)
    folder = folder / "draft" if (folder / "draft" / "config.json").exists() else folder
    if not (folder / "config.json").exists() or not (folder / "model.safetensors").exists():
        raise ValueError(f"draft={path} holds no config.json and model.safetensors: import a published head first.")
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as damage:
        return [
            error("head_tensors", f"{folder / 'model.safetensors'} is damaged: {damage}", "export or copy it again.")
        ]
    return [
        *check_config(raw, target),
        check_head_rope(raw, target),
        check_head_bias(raw, tensors),
        check_tensors(tensors, target),
        check_frozen_copies(tensors, target),
        check_origin(raw.get(OURS, {}), target),
    ]


def check_config(raw: dict[str, Any], target: TargetModel) -> list[Finding]:
    """Sizes, layers and special tokens of config.json."""
    wanted = draft_config(target.config)
    wrong = [
        f"{key} is {raw.get(key)!r}, the target's {getattr(wanted, key)}"
        for key in SIZES
        if raw.get(key) != getattr(wanted, key)
    ]
    if raw.get("num_hidden_layers") != 1:
        wrong.append(f"num_hidden_layers is {raw.get('num_hidden_layers')!r}, a head has 1")
    for key in ("bos_token_id", "eos_token_id"):
        if key in raw and raw[key] != getattr(wanted, key):
            wrong.append(f"{key} is {raw[key]!r}, the target's {getattr(wanted, key)}")
    findings = []
    if wrong:
        findings.append(error("head_config", "; ".join(wrong), "take the values of the target's config.json."))
    known, least = raw.get("max_position_embeddings"), wanted.max_position_embeddings
    if not isinstance(known, int) or known < least:
        message = f"max_position_embeddings is {known!r}, the target's {least}: engines size the rotary cache by it"
        findings.append(error("head_config", message, f"write {least}: long requests crash or degrade (vllm#48894)."))
    return findings or [ok("head_config", "sizes, layers, tokens and positions are the target's")]


def old_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """The rope settings that transformers 4 (and engines of its time) read of a config.json."""
    scaling = dict(raw.get("rope_scaling") or {})
    kind = scaling.pop("type", None)
    rope = {"rope_theta": raw.get("rope_theta", 10_000.0), "rope_type": kind or "default"}
    return rope | scaling


def check_head_rope(raw: dict[str, Any], target: TargetModel) -> Finding:
    """Rope of the saved head is the target's: dropped scaling shows at long contexts alone."""
    wanted = dict(draft_config(target.config).rope_parameters or {})
    spellings = {"rope_theta and rope_scaling": old_rope(raw), "rope_parameters": raw.get("rope_parameters") or wanted}
    wrong = [
        f"{key} is {own.get(key)!r} in {spelling}, the target's {wanted.get(key)!r}"
        for spelling, own in spellings.items()
        for key in own | wanted
        if own.get(key) != wanted.get(key)
    ]
    if wrong:
        cure = "write the target's values in both spellings, as hass-export does: engines differ in which they read."
        return error("head_rope", "; ".join(wrong), cure)
    return ok("head_rope", f"rope is the target's ({wanted.get('rope_type', 'default')})")


def check_head_bias(raw: dict[str, Any], tensors: dict[str, Tensor]) -> Finding:
    """`fc.bias`: EAGLE's config calls it `bias`, vLLM reads that key as biases of q, k, v and o."""
    bias = tensors.get("fc.bias")
    if bias is None and (raw.get("bias") or raw.get(OURS, {}).get("fc_bias")):
        message = "the config says that fc has a bias, and the file has none: engines keep a random one (sglang#5773)"
        return error("head_bias", message, "export it again; a head without bias says nothing of one.")
    if raw.get("bias") or raw.get("attention_bias") or raw.get("mlp_bias"):
        message = "config.json sets bias, attention_bias or mlp_bias: vLLM makes biases that are in no file"
        return error("head_bias", message, "remove the key, unless the folder is for the EAGLE code alone.")
    if bias is not None and bool(bias.any()):
        message = (
            f"fc has a bias (max |b| = {float(bias.abs().max()):.2g}): vLLM has no place for it and accepts little"
        )
        return warning("head_bias", message, "serve it with SGLang, or train with model.draft.fc_bias=false.")
    return ok("head_bias", "fc has no bias that an engine could lose")


def check_tensors(tensors: dict[str, Tensor], target: TargetModel) -> Finding:
    """Names and shapes in both directions; values that training leaves behind."""
    with torch.device("meta"):
        expected = EagleDraft(draft_config(target.config)).state_dict()
    problems = [f"{name} is missing (an engine keeps random numbers)" for name in expected if name not in tensors]
    allowed = {*expected, *FROZEN, "fc.bias"}
    problems += [f"{name} has no place in a head (dropped, or refused)" for name in sorted(set(tensors) - allowed)]
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            problems.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}")
        elif not tensor.isfinite().all():
            problems.append(f"{name} is not finite")
        elif tensor.ndim > 1 and tensor.min() == tensor.max():
            problems.append(f"{name} is constant: it was never trained")
    if problems:
        return error("head_tensors", "; ".join(problems), "export it again (hass-export), or get the whole checkpoint.")
    return ok("head_tensors", f"{len(tensors)} tensors, none missing, unknown or constant")


def check_frozen_copies(tensors: dict[str, Tensor], target: TargetModel) -> Finding:
    """An embedding or LM head in the file is the target's: some engines use the file's."""
    wrong = []
    for name in set(FROZEN) & set(tensors):
        own, theirs = tensors[name].float(), getattr(target.head, FROZEN[name]).cpu().float()
        same = own.shape == theirs.shape and (own - theirs).norm() <= 0.02 * theirs.norm()
        if not same:
            wrong.append(name)
    if wrong:
        message = f"{', '.join(sorted(wrong))} of the file differs from the target's: a random or another model's copy"
        return error("head_frozen_copies", message, "leave it out of the file: engines share the target's.")
    return ok("head_frozen_copies", "embedding and LM head are the target's")


def check_origin(notes: dict[str, Any], target: TargetModel) -> Finding:
    """The head was trained for these very weights."""
    known = notes.get("target_fingerprint")
    if known and known != target.fingerprint:
        message = f"the head was trained for {notes.get('target')} ({known[:12]}), this is {target.fingerprint[:12]}"
        return warning("head_origin", message, f"set target={notes.get('target')}, or fine-tune it for this one.")
    return ok("head_origin", "trained for this target" if known else "the folder does not say for which target")
