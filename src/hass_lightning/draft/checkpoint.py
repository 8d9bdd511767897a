"""Save and load draft heads.

A head folder holds `model.safetensors` (with the published key names), `config.json` and, for a pruned vocabulary,
`draft_vocab.safetensors`.
"""

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

from hass_lightning.draft.eagle3 import Eagle3Draft
from hass_lightning.draft.head import DraftHead, draft_config
from hass_lightning.draft.head_config import OURS, class_note, class_of, llama_config, read_head_config, rope_fields
from hass_lightning.draft.rope import as_rotated
from hass_lightning.runs.files import write_whole, written_aside
from hass_lightning.target_model import TargetModel
from hass_lightning.target_model.linear import freeze_linears
from hass_lightning.target_model.source import local_path


@dataclass
class SavedDraft:
    """A loaded head: the module, its draft vocabulary (None: full) and the notes saved with it."""

    draft: DraftHead
    token_ids: Tensor | None
    notes: dict[str, Any]

    def for_decoding(self, dtype: torch.dtype, device: torch.device | str) -> DraftHead:
        """Return a copy of the head for decoding, in the target's dtype and on its device."""
        copy = deepcopy(self.draft).to(device=device, dtype=dtype).eval().requires_grad_(False)
        freeze_linears(copy)
        copy.join_layer()
        return copy

    def check_sizes(self, label: str, target: TargetModel) -> None:
        """Check that the head has the sizes of `target`; arguments and errors as in `check_fit`."""
        config = self.draft.config
        if (config.hidden_size, config.vocab_size) != (target.hidden_size, target.head.vocab_size):
            raise ValueError(
                f"the head {label} (hidden {config.hidden_size}, vocabulary {config.vocab_size}) does not fit the "
                f"target {target.name} (hidden {target.hidden_size}, vocabulary {target.head.vocab_size}): set "
                "target=… to the target it was trained for."
            )

    def check_fit(self, label: str, target: TargetModel) -> None:
        """Check that the head was trained for `target`.

        Args:
            label: name of the head in error messages.
            target: the target.

        Raises:
            ValueError: if sizes or fingerprints differ; both are named.
        """
        self.check_sizes(label, target)
        target.reading(self.draft.feature_layers)  # raises an error for layers that the target does not have
        known = self.notes.get("target_fingerprint")
        if known and not target.is_known_as(known):
            raise ValueError(
                f"the head {label} was trained for {self.notes.get('target')} ({known[:12]}), but this target is "
                f"{target.name} ({target.fingerprint[:12]}): set target=… to that one."
            )


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def check_tensors(where: str, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    """Check a state dict for missing keys, unexpected keys and wrong shapes.

    Args:
        where: the file or folder, for error messages.
        shapes: expected shapes by name.
        found: the tensors by name.

    Raises:
        ValueError: if any key differs; all of them are named.
    """
    missing, extra = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    wrong = [f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}" for name, shape in shapes.items()
             if name in found and tuple(found[name].shape) != tuple(shape)]  # fmt: skip
    if missing or extra or wrong:
        raise ValueError(
            f"{where} does not fit its config: missing {missing}, unexpected {extra}, wrong shape {wrong}."
        )


def save_draft(folder: str | Path, draft: DraftHead, token_ids: Tensor | None, notes: dict[str, Any]) -> Path:
    """Write a head, with `notes` (target name, fingerprint, alignment, …) under `hass_lightning` in config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in draft.state_dict().items()}
    with written_aside(folder / "model.safetensors") as aside:
        save_file(tensors, aside)
    if token_ids is not None:
        save_token_ids(folder, token_ids)
    config = draft.config.to_dict() | {"architectures": [draft.architecture]} | rope_fields(draft.config)
    config[OURS] = notes | draft.saved_notes() | class_note(draft)
    write_whole(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")
    return folder


def empty_head(where: str, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], target_config: Any) -> DraftHead:
    """Create the head that a folder should contain for a target, on the meta device.

    Args:
        where: the folder, for error messages.
        raw: its config.json.
        tensors: its tensors, which determine the biases.
        target_config: the target's config, which determines the sizes.

    Raises:
        ValueError: if the kind of head is unknown.
    """
    notes, like = raw.get(OURS, {}), draft_config(target_config).to_dict()
    engine = raw.get("architectures") == [Eagle3Draft.architecture]
    kind = Eagle3Draft if engine and not notes else class_of(where, notes)
    no_size = {*like, OURS, "rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "bias", "qkv_bias"}
    config = draft_config(
        target_config,
        any(name.endswith("q_proj.bias") for name in tensors),
        **{key: value for key, value in raw.items() if key not in no_size},
    )
    with torch.device("meta"):
        return kind.from_saved(config, {"fc_bias": False}, tensors)


def save_token_ids(folder: Path, token_ids: Tensor) -> None:
    """Write a draft vocabulary to the folder of its head."""
    with written_aside(folder / "draft_vocab.safetensors") as aside:
        save_file({"token_ids": token_ids.cpu().contiguous()}, aside)


def save_start(path: Path, draft: DraftHead, features: str | None) -> None:
    """Write the hashes of a head's tensors before training and the name of its features, for `hass-export` to check."""
    hashes = {name: tensor_hash(value) for name, value in draft.state_dict().items()}
    write_whole(path, json.dumps({"features": features, "tensors": hashes}, indent=2) + "\n")


def holds_head(folder: Path) -> bool:
    """Whether `folder` contains a saved head."""
    return (folder / "config.json").exists() and (folder / "model.safetensors").exists()


def packaged_head(target: str) -> str | None:
    """Return the path of the packaged HASS head for a target (an argument of `load_draft`), or None."""
    path = f"package://heads/{target}_hass"
    return path if local_path(path).is_dir() else None


def head_folder(path: str | Path) -> Path:
    """Return the folder with the files of a head: `path` or `path/draft`. `package://heads/<name>` is a packaged head.

    Raises:
        ValueError: if neither contains a head.
    """
    folder = local_path(str(path))
    for candidate in (folder, folder / "draft"):
        if holds_head(candidate):
            return candidate
    raise ValueError(f"{path} contains no draft head (config.json and model.safetensors, there or in draft/).")


def load_draft(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> SavedDraft:
    """Load a head from its folder, from `draft/` of a run folder, or from the package.

    Args:
        path: the folder; `package://heads/<name>` is a head that ships with hass_lightning.

    Raises:
        ValueError: if there is no head, the file is damaged, or its keys or shapes do not match the config.
    """
    folder = head_folder(path)
    raw = read_head_config(folder)
    notes = raw.pop(OURS, {})
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"{folder / 'model.safetensors'} is damaged ({error}): export or train the head again."
        ) from error
    draft = class_of(str(folder), notes).from_saved(llama_config(str(folder), as_rotated(raw)), notes, tensors)
    check_tensors(str(folder), {name: tuple(value.shape) for name, value in draft.state_dict().items()}, tensors)
    draft.load_state_dict(tensors)
    vocab = folder / "draft_vocab.safetensors"
    token_ids = load_file(vocab)["token_ids"] if vocab.exists() else None
    return SavedDraft(draft.to(device=device, dtype=dtype).eval(), token_ids, notes)
