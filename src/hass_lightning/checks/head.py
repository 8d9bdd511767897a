"""Checks of a saved head against its target: engines load a wrong head without an error and then accept no tokens.

The rules are those of the engines' loaders (docs/serving.md). Shapes: D hidden, V vocabulary (see the legend in
types.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hass_lightning.checks.finding import Finding, error, ok, run_check, warning
from hass_lightning.draft import DraftHead
from hass_lightning.draft.checkpoint import empty_head
from hass_lightning.draft.head import draft_config
from hass_lightning.draft.head_config import OURS, read_head_config
from hass_lightning.draft.rope import head_rope
from hass_lightning.serving.reference import rope_readings
from hass_lightning.target_model.model import TargetModel
from hass_lightning.target_model.source import local_path

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
FROZEN = {"embed_tokens.weight": "embed_tokens", "lm_head.weight": "lm_head"}  # optional copies of the target's tensors


def check_head(path: str | Path, target: TargetModel) -> list[Finding]:
    """Return all findings about the head in a folder (or in `draft/` of a run folder).

    Raises:
        ValueError: if there is no head.
    """
    folder = local_path(str(path))
    folder = folder / "draft" if (folder / "draft" / "config.json").exists() else folder
    if not (folder / "config.json").exists() or not (folder / "model.safetensors").exists():
        raise ValueError(f"draft={path} contains no config.json and model.safetensors: import a published head first.")
    raw = read_head_config(folder)
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as damage:
        return [
            error("head_tensors", f"{folder / 'model.safetensors'} is damaged: {damage}", "export or copy it again.")
        ]
    expected = empty_head(str(path), raw, tensors, target.config)
    return [
        *run_check(check_config, raw, target),
        *run_check(check_head_rope, raw, target),
        *run_check(check_head_bias, raw, tensors),
        *run_check(check_tensors, tensors, expected),
        *run_check(check_frozen_copies, tensors, target, expected),
        *run_check(check_origin, raw.get(OURS, {}), target),
    ]


def check_config(raw: dict[str, Any], target: TargetModel) -> list[Finding]:
    """Check sizes, layers and special tokens of config.json."""
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
        findings.append(error("head_config", "; ".join(wrong), "use the values of the target's config.json."))
    known, least = raw.get("max_position_embeddings"), wanted.max_position_embeddings
    if not isinstance(known, int) or known < least:
        message = f"max_position_embeddings is {known!r}, the target's {least}: engines size the rotary cache by it"
        findings.append(
            error("head_config", message, f"set it to {least}: long requests crash or degrade (vllm#48894).")
        )
    return findings or [ok("head_config", "sizes, layers, tokens and positions are the target's")]


def check_head_rope(raw: dict[str, Any], target: TargetModel) -> Finding:
    """Check that the rope of the saved head fits the target: missing scaling affects only long contexts."""
    wanted = {"partial_rotary_factor": 1.0, **head_rope(target.config)}
    wrong = [
        f"{key} is {own.get(key)!r} in {spelling}, the target's {wanted.get(key)!r}"
        for spelling, own in rope_readings(raw).items()
        for key in own | wanted
        if own.get(key) != wanted.get(key)
    ]
    if wrong:
        cure = (
            "write the target's values in both spellings, as hass-export does: engines differ in which one they read."
        )
        return error("head_rope", "; ".join(wrong), cure)
    return ok("head_rope", f"rope is the target's ({wanted.get('rope_type', 'default')})")


def check_head_bias(raw: dict[str, Any], tensors: dict[str, Tensor]) -> Finding:
    """Check `fc.bias`: EAGLE's config calls it `bias`, but vLLM reads that key as biases of q, k, v and o."""
    bias = tensors.get("fc.bias")
    if bias is None and (raw.get("bias") or raw.get(OURS, {}).get("fc_bias")):
        message = "the config says that fc has a bias, but the file has none: engines use a random one (sglang#5773)"
        return error("head_bias", message, "export it again; without a bias, the config has no such key.")
    biased = any(name.endswith("q_proj.bias") for name in tensors)
    if biased and not (raw.get("qkv_bias") or raw.get("attention_bias")):
        message = "q, k and v have biases in the file, but config.json does not say so: engines ignore them"
        return error("head_bias", message, "write qkv_bias: true, or export it again (hass-export).")
    if raw.get("bias") or raw.get("mlp_bias") or (raw.get("attention_bias") and not biased):
        message = "config.json sets bias, attention_bias or mlp_bias: vLLM creates biases that are not in the file"
        return error("head_bias", message, "remove the key, unless the folder is only for the EAGLE code.")
    if bias is not None and bool(bias.any()):
        message = (
            f"fc has a bias (max |b| = {float(bias.abs().max()):.2g}), which vLLM does not support: it accepts "
            "few draft tokens"
        )
        return warning("head_bias", message, "serve it with SGLang, or train with model.draft.fc_bias=false.")
    return ok("head_bias", "fc has no bias that an engine could ignore")


def check_tensors(tensors: dict[str, Tensor], head: DraftHead) -> Finding:
    """Check names and shapes against those of an empty head, and values for signs of failed training."""
    qkv_bias, expected = any(name.endswith("q_proj.bias") for name in tensors), head.state_dict()
    problems = [f"{name} is missing (an engine uses random numbers)" for name in expected if name not in tensors]
    allowed = {*expected, *FROZEN, "fc.bias", "d2t", "t2d", *(("layers.0.self_attn.o_proj.bias",) if qkv_bias else ())}
    problems += [f"{name} is unknown (ignored or rejected by engines)" for name in sorted(set(tensors) - allowed)]
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            problems.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}")
        elif not tensor.isfinite().all():
            problems.append(f"{name} is not finite")
        elif tensor.ndim > 1 and tensor.min() == tensor.max():
            problems.append(f"{name} is constant: it was never trained")
    if problems:
        return error(
            "head_tensors", "; ".join(problems), "export it again (hass-export), or get the complete checkpoint."
        )
    return ok("head_tensors", f"{len(tensors)} tensors, none missing, unknown or constant")


def check_frozen_copies(tensors: dict[str, Tensor], target: TargetModel, head: DraftHead) -> Finding:
    """Check that an embedding or LM head in the file is the target's, because some engines use the file's."""
    wrong = []
    for name in (set(FROZEN) & set(tensors)) - set(head.state_dict()):  # an LM head of its own is trained
        own, theirs = tensors[name].float(), getattr(target.head, FROZEN[name]).cpu().float()
        same = own.shape == theirs.shape and (own - theirs).norm() <= 0.02 * theirs.norm()
        if not same:
            wrong.append(name)
    if wrong:
        message = (
            f"{', '.join(sorted(wrong))} in the file differs from the target's: it is random or belongs to another "
            "model"
        )
        return error("head_frozen_copies", message, "remove it from the file: engines share the target's.")
    return ok("head_frozen_copies", "embedding and LM head are the target's")


def check_origin(notes: dict[str, Any], target: TargetModel) -> Finding:
    """Check that the head was trained for these weights."""
    known = notes.get("target_fingerprint")
    if known and not target.is_known_as(known):
        message = (
            f"the head was trained for {notes.get('target')} ({known[:12]}), but this is {target.fingerprint[:12]}"
        )
        return warning("head_origin", message, f"set target={notes.get('target')}, or fine-tune it for this one.")
    return ok("head_origin", "trained for this target" if known else "the folder does not record the target")
