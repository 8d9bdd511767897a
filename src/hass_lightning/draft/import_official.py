"""Import published EAGLE-1/2, HASS and EAGLE-3 checkpoints: config.json with model.safetensors or pytorch_model.bin.

Key names are in docs/method.md (The head). Loading is strict: the tensors of the file and of the head must be the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hass_lightning.draft.checkpoint import SavedDraft, check_tensors, load_draft, save_draft
from hass_lightning.draft.eagle import EagleDraft
from hass_lightning.draft.eagle3 import LAYER_IDS, Eagle3Draft
from hass_lightning.draft.head import draft_config
from hass_lightning.draft.head_config import OURS, llama_config, read_head_config
from hass_lightning.draft.rope import check_readable
from hass_lightning.target_model.hub import hub_folder

log = logging.getLogger(__name__)
FILES = ["config.json", "model.safetensors", "pytorch_model.bin", "draft_vocab.safetensors"]
EMBEDDING = "embed_tokens.weight"  # frozen copy of the target's embedding: its shape is checked, then it is dropped


def import_head(
    path: str, output_dir: str | Path, revision: str | None = None, feature_layers: Sequence[int] | None = None
) -> SavedDraft:
    """Read a head from a folder or hub id and write it to `output_dir/draft`, in the dtype of its file.

    Args:
        path: the folder or hub id.
        output_dir: where to write it.
        revision: of the hub id.
        feature_layers: layers of the target that an EAGLE-3 head reads, if its config.json does not name them.

    Raises:
        ValueError: if there is no head, its file is damaged, or its keys or shapes do not match the config.
    """
    folder = hub_folder(path, revision, key="path", patterns=FILES)
    config = read_head_config(folder)
    if OURS in config:  # one of ours, exported with format=hub
        saved = load_draft(folder)
        dtype = getattr(torch, saved.notes.get("dtype", "float32"))
        saved.draft.to(dtype)
    else:
        tensors = read_tensors(folder)
        if "d2t" in tensors:
            saved = official_eagle3(str(folder), config, tensors, feature_layers)
        else:
            saved = SavedDraft(official_draft(str(folder), config, tensors), None, {})
        dtype = saved.draft.dtype
    saved.notes |= {"imported_from": str(path), "revision": revision, "dtype": str(dtype).removeprefix("torch.")}
    save_draft(Path(output_dir) / "draft", saved.draft, saved.token_ids, saved.notes)
    return saved


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint folder. Pickles are read with `weights_only`.

    Raises:
        ValueError: if there is no file, it is damaged, or a pickle holds anything but tensors.
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
    except Exception as error:  # a damaged pickle may raise KeyError, IndexError and others
        raise ValueError(
            f"{pickled} is refused ({type(error).__name__}): it is damaged, or holds more than tensors, which could "
            "run code when read. Copy it again, or ask its author for safetensors."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{pickled} contains objects other than named tensors, which is not supported.")
    return dict(tensors)


def official_draft(where: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> EagleDraft:
    """Build the head of a published checkpoint, in the file's dtype.

    The tensors determine whether `fc`, q, k and v have biases, because the configs of the official code do not contain
    it, or are wrong (docs/method.md, The head).

    Args:
        where: the folder, for error messages.
        config: config.json.
        tensors: the tensors by name.

    Raises:
        ValueError: if keys, shapes or dtypes are not those of an EAGLE-1/2 head.
    """
    if any(name.startswith("midlayer.") for name in tensors):
        raise ValueError(f"{where} is an EAGLE-3 head (midlayer.*) without d2t: copy the whole head again.")
    fc_bias = "fc.bias" in tensors
    if config.get("bias", fc_bias) is not fc_bias:
        log.warning("%s: config.json has bias=%s, but the file %s fc.bias: the config is ignored", where,
                    config["bias"], "has" if fc_bias else "has no")  # fmt: skip
    if config.get("num_hidden_layers", 1) != 1:
        log.warning("%s: config.json has num_hidden_layers=%s; a head has one", where, config["num_hidden_layers"])
    check_readable(where, config)
    own = draft_config(llama_config(where, config), qkv_bias="layers.0.self_attn.q_proj.bias" in tensors)
    draft = EagleDraft(own, fc_bias=fc_bias)
    shapes = {name: tuple(value.shape) for name, value in draft.state_dict().items()}
    if EMBEDDING in tensors:
        shapes[EMBEDDING] = (draft.config.vocab_size, draft.config.hidden_size)
    check_tensors(where, shapes, tensors)
    _check_one_dtype(where, tensors)
    draft.to(tensors["fc.weight"].dtype).load_state_dict({n: t for n, t in tensors.items() if n != EMBEDDING})
    return draft


def official_eagle3(
    where: str, config: dict[str, Any], tensors: dict[str, Tensor], feature_layers: Sequence[int] | None = None
) -> SavedDraft:
    """Build the EAGLE-3 head of a published checkpoint, with its draft vocabulary, in the file's dtype.

    Args:
        where: the folder, for error messages.
        config: config.json.
        tensors: the tensors by name; the layer is `midlayer.` or `layers.0.`.
        feature_layers: layers of the target that it reads, if the config does not name them.

    Raises:
        ValueError: if keys, shapes, dtypes or the draft vocabulary are not those of an EAGLE-3 head, or the layers are
            unknown.
    """
    for key in ("norm_before_residual", "norm_output", "fc_norm", "norm_before_fc"):
        if config.get(key):
            raise ValueError(f"{where} has {key}={config[key]}: only EAGLE-3 heads without this option are supported.")
    named = (config.get("eagle_config") or {}).get(LAYER_IDS) or config.get(LAYER_IDS) or feature_layers
    if not named:
        raise ValueError(
            f"{where}: config.json names no {LAYER_IDS}: set feature_layers to the layers of the target that the head "
            "reads. In the official code these are [2, n//2, n-3] of n layers."
        )
    check_readable(where, config)
    tensors = {name.replace("layers.0.", "midlayer.", 1): value for name, value in tensors.items()}
    offsets, kept = tensors.pop("d2t"), tensors.pop("t2d", None)
    token_ids = offsets.long() + torch.arange(len(offsets))
    llama = llama_config(where, config)
    eagle = {"use_aux_hidden_state": True, LAYER_IDS: [int(layer) for layer in named]}
    draft = Eagle3Draft(draft_config(llama, draft_vocab_size=len(token_ids), eagle_config=eagle), len(token_ids))
    shapes = {name: tuple(value.shape) for name, value in draft.state_dict().items()}
    if EMBEDDING in tensors:
        shapes[EMBEDDING] = (llama.vocab_size, llama.hidden_size)
    check_tensors(where, shapes, tensors)
    _check_one_dtype(where, tensors)
    if token_ids.tolist() != sorted(set(token_ids.tolist())) or token_ids[-1] >= llama.vocab_size or token_ids[0] < 0:
        raise ValueError(
            f"{where}: d2t does not give ascending token ids below {llama.vocab_size}: get the file again."
        )
    if kept is not None and kept.nonzero()[:, 0].tolist() != token_ids.tolist():
        raise ValueError(f"{where}: t2d and d2t name different tokens: get the file again.")
    draft.to(tensors["fc.weight"].dtype).load_state_dict({n: t for n, t in tensors.items() if n != EMBEDDING})
    return SavedDraft(draft, None if len(token_ids) == llama.vocab_size else token_ids, {})


def vocabulary_tensors(token_ids: Tensor | None, vocab_size: int) -> dict[str, Tensor]:
    """`d2t` and `t2d` of a draft vocabulary, as EAGLE-3 heads are published.

    Args:
        token_ids: [Vd], ascending (None: full).
        vocab_size: V.

    Returns:
        d2t, int64 [Vd]: token id minus draft index. t2d, bool [V]: whether a token is in the draft vocabulary.
    """
    ids = torch.arange(vocab_size) if token_ids is None else token_ids.cpu()
    kept = torch.zeros(vocab_size, dtype=torch.bool)
    kept[ids] = True
    return {"d2t": ids - torch.arange(len(ids)), "t2d": kept}


def _check_one_dtype(where: str, tensors: dict[str, Tensor]) -> None:
    dtypes = {str(value.dtype) for value in tensors.values()}
    if len(dtypes) > 1:
        raise ValueError(f"{where} mixes the dtypes {', '.join(sorted(dtypes))}: convert it to one dtype.")
