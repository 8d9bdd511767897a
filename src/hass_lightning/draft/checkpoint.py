"""A saved head: `model.safetensors` (published key names), `config.json`, `draft_vocab.safetensors` if pruned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from hass_lightning.draft.eagle import EagleDraft
from hass_lightning.files import write_whole, written_aside
from hass_lightning.target import TargetModel
from hass_lightning.target.linear import use_few_row_linears

OURS = "hass_lightning"  # the key of config.json that holds what engines do not read


@dataclass
class SavedDraft:
    """A head read back: the module, its draft vocabulary (None: full) and what was noted when it was saved."""

    draft: EagleDraft
    token_ids: Tensor | None
    notes: dict[str, Any]

    def for_decoding(self, dtype: torch.dtype, device: torch.device | str) -> EagleDraft:
        """A copy of the head in the target's dtype, on its device."""
        copy = deepcopy(self.draft).to(device=device, dtype=dtype).eval().requires_grad_(False)
        use_few_row_linears(copy)
        copy.join_layer()
        return copy

    def check_fit(self, label: str, target: TargetModel) -> None:
        """Refuse a head that belongs to another target.

        Raises:
            ValueError: naming both sides.
        """
        config = self.draft.config
        if (config.hidden_size, config.vocab_size) != (target.hidden_size, target.head.vocab_size):
            raise ValueError(
                f"the head {label} (hidden {config.hidden_size}, vocabulary {config.vocab_size}) does not fit the "
                f"target {target.name} (hidden {target.hidden_size}, vocabulary {target.head.vocab_size}): set "
                "target=… to the one it was trained for."
            )
        known = self.notes.get("target_fingerprint")
        if known and known != target.fingerprint:
            raise ValueError(
                f"the head {label} was trained for {self.notes.get('target')} ({known[:12]}), and this target is "
                f"{target.name} ({target.fingerprint[:12]}): set target=… to that one."
            )


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def check_tensors(where: str, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    """Both sides of a state dict: what is missing, what nobody expects, what has another shape.

    Raises:
        ValueError: naming the keys.
    """
    missing, extra = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    wrong = [f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}" for name, shape in shapes.items()
             if name in found and tuple(found[name].shape) != tuple(shape)]  # fmt: skip
    if missing or extra or wrong:
        raise ValueError(
            f"{where} does not fit its config: missing {missing}, unexpected {extra}, wrong shape {wrong}."
        )


def rope_fields(config: Any) -> dict[str, Any]:
    """The rotary settings in both spellings: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`.

    Engines differ in which they read; a spelling that is missing falls back to 10,000 without scaling.
    """
    rope = dict(config.rope_parameters)
    scaling = None
    if rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        scaling["type"] = rope["rope_type"]
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "rope_parameters": rope}


def save_draft(folder: str | Path, draft: EagleDraft, token_ids: Tensor | None, notes: dict[str, Any]) -> Path:
    """Write a head. `notes` (target name, fingerprint, alignment, …) stand in config.json under `hass_lightning`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in draft.state_dict().items()}
    with written_aside(folder / "model.safetensors") as aside:
        save_file(tensors, aside)
    if token_ids is not None:
        save_token_ids(folder, token_ids)
    config = draft.config.to_dict() | {"architectures": ["LlamaForCausalLMEagle"]} | rope_fields(draft.config)
    config[OURS] = notes | {"fc_bias": draft.fc.bias is not None}
    write_whole(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")
    return folder


def save_token_ids(folder: Path, token_ids: Tensor) -> None:
    """Write a draft vocabulary beside its head."""
    with written_aside(folder / "draft_vocab.safetensors") as aside:
        save_file({"token_ids": token_ids.cpu().contiguous()}, aside)


def save_start(path: Path, draft: EagleDraft, features: str | None) -> None:
    """What a head was before training (hashes by tensor), and the features it learns from: `hass-export` compares."""
    hashes = {name: tensor_hash(value) for name, value in draft.state_dict().items()}
    write_whole(path, json.dumps({"features": features, "tensors": hashes}, indent=2) + "\n")


def load_draft(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> SavedDraft:
    """Read a head from its folder, or from a run folder that holds one in `draft/`.

    Raises:
        ValueError: no head there, a damaged file, or keys that do not fit (both sides are named).
    """
    folder = Path(path)
    if not (folder / "config.json").exists() and (folder / "draft" / "config.json").exists():
        folder = folder / "draft"
    if not (folder / "model.safetensors").exists() or not (folder / "config.json").exists():
        raise ValueError(f"{path} holds no draft head (config.json and model.safetensors, there or in draft/).")
    raw = json.loads((folder / "config.json").read_text())
    notes = raw.pop(OURS, {})
    if raw.get("rope_parameters"):  # LlamaConfig would mix both spellings
        raw = {key: value for key, value in raw.items() if key not in ("rope_theta", "rope_scaling")}
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"{folder / 'model.safetensors'} is damaged ({error}): export or train the head again."
        ) from error
    draft = EagleDraft(LlamaConfig.from_dict(raw), fc_bias=notes.get("fc_bias", "fc.bias" in tensors))
    check_tensors(str(folder), {name: tuple(value.shape) for name, value in draft.state_dict().items()}, tensors)
    draft.load_state_dict(tensors)
    vocab = folder / "draft_vocab.safetensors"
    token_ids = load_file(vocab)["token_ids"] if vocab.exists() else None
    return SavedDraft(draft.to(device=device, dtype=dtype).eval(), token_ids, notes)
