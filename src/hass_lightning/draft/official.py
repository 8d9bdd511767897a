"""Read a published EAGLE-1/2 or HASS checkpoint: config.json with model.safetensors or pytorch_model.bin.

Key names are those of serving_formats.md §2.2 (hass.md §6.1). Nothing is guessed: every tensor of the file must be one
that the head has, and the other way round. Shapes: D hidden, V vocabulary (types.py has the legend).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from hass_lightning.draft.checkpoint import OURS, SavedDraft, check_tensors, load_draft, save_draft
from hass_lightning.draft.eagle import EagleDraft, draft_config
from hass_lightning.target.source import hub_folder

log = logging.getLogger(__name__)
FILES = ["config.json", "model.safetensors", "pytorch_model.bin", "draft_vocab.safetensors"]
EMBEDDING = "embed_tokens.weight"  # a frozen copy of the target's: checked and left out


def import_head(path: str, output_dir: str | Path, revision: str | None = None) -> SavedDraft:
    """Read a head from a folder or a hub id and write it to `output_dir/draft`, in the dtype of its file.

    Raises:
        ValueError: no head there, damaged, or keys that do not fit (both sides are named).
    """
    folder = hub_folder(path, revision, key="path", patterns=FILES)
    config = json.loads((folder / "config.json").read_text())
    if OURS in config:  # one of ours, exported with format=hub
        saved = load_draft(folder)
        dtype = getattr(torch, saved.notes.get("dtype", "float32"))
        saved.draft.to(dtype)
    else:
        tensors = read_tensors(folder)
        draft = official_draft(str(folder), config, tensors)
        dtype = draft.fc.weight.dtype
        saved = SavedDraft(draft, None, {})
    saved.notes |= {"imported_from": str(path), "revision": revision, "dtype": str(dtype).removeprefix("torch.")}
    save_draft(Path(output_dir) / "draft", saved.draft, saved.token_ids, saved.notes)
    return saved


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder; a pickle may hold nothing else (`weights_only`).

    Raises:
        ValueError: no file, a damaged one, or a pickle with other things in it.
    """
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.exists():
        try:
            return load_file(safe)
        except SafetensorError as error:
            raise ValueError(f"{safe} is damaged ({error}): copy it again.") from error
    if not pickled.exists():
        raise ValueError(f"{folder} holds neither {safe.name} nor {pickled.name}: set path to a head's folder.")
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # rubbish ends in a KeyError, an IndexError, anything
        raise ValueError(
            f"{pickled} is refused ({type(error).__name__}): it is damaged, or holds more than tensors, which could "
            "run code when read. Copy it again, or ask its author for safetensors."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{pickled} holds other things than named tensors: it is refused.")
    return dict(tensors)


def official_draft(where: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> EagleDraft:
    """The head of a published checkpoint, in the file's dtype.

    Whether `fc` has a bias is decided by the file: the configs of the official code say nothing, or the wrong thing
    (hass.md §7.2).

    Raises:
        ValueError: keys, shapes or dtypes that are not those of an EAGLE-1/2 head.
    """
    if any(name.startswith(("midlayer.", "d2t", "t2d")) for name in tensors):
        raise ValueError(f"{where} is an EAGLE-3 head (midlayer.*): only EAGLE-1, EAGLE-2 and HASS heads are read.")
    fc_bias = "fc.bias" in tensors
    if config.get("bias", fc_bias) is not fc_bias:
        log.warning("%s: config.json says bias=%s, but the file %s fc.bias: the file decides", where,
                    config["bias"], "has" if fc_bias else "has no")  # fmt: skip
    if config.get("num_hidden_layers", 1) != 1:
        log.warning("%s: config.json says num_hidden_layers=%s; a head has one", where, config["num_hidden_layers"])
    draft = EagleDraft(draft_config(LlamaConfig.from_dict(config)), fc_bias=fc_bias)
    shapes = {name: tuple(value.shape) for name, value in draft.state_dict().items()}
    if EMBEDDING in tensors:
        shapes[EMBEDDING] = (draft.config.vocab_size, draft.config.hidden_size)
    check_tensors(where, shapes, tensors)
    dtypes = {str(value.dtype) for value in tensors.values()}
    if len(dtypes) > 1:
        raise ValueError(f"{where} mixes the dtypes {', '.join(sorted(dtypes))}: convert it to one.")
    draft.to(tensors["fc.weight"].dtype).load_state_dict({n: t for n, t in tensors.items() if n != EMBEDDING})
    return draft
