"""Reading and validation of a target's tokenizer, template, weights and fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hass_lightning.runs.machine import working_dtype
from hass_lightning.target_model.requirements import check_fits
from hass_lightning.target_model.source import sha256_file
from hass_lightning.target_model.weights import (
    check_report,
    check_stored,
    empty_model,
    read_config,
    read_ends,
    read_tokenizer,
)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """Return a dtype by name (`auto`: `working_dtype`)."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return working_dtype(device)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype not in known:
        raise ValueError(f"target.dtype={dtype} must be one of auto, {', '.join(known)}.")
    return known[dtype]


def refuse_settings(attn_implementation: str, device: str, device_map: Any) -> None:
    """Raise an error for settings that no target supports.

    Raises:
        ValueError: eager attention, or a GPU if there is none.
    """
    if attn_implementation == "eager":
        raise ValueError(
            "target.attn_implementation=eager adds boolean tree masks to the scores, which makes verification "
            "wrong: use sdpa."
        )
    if str(device).startswith("cuda") and device_map is None and not torch.cuda.is_available():
        raise ValueError(f"target.device={device}, but torch finds no GPU on this machine: set target.device=cpu.")


def read_model(
    folder: Path,
    name: str,
    template: str | None,
    dtype: torch.dtype,
    *,
    attn_implementation: str,
    device: str,
    trust_remote_code: bool,
    num_layers: int | None,
    device_map: str | Mapping[str, Any] | None,
    head_only: bool,
) -> tuple[Any, Any]:
    """Return (tokenizer, model) of a folder; the arguments are those of `TargetModel.load`.

    Raises:
        ValueError: the model does not fit, or its weights are damaged or not in the files.
    """
    from transformers import AutoModelForCausalLM

    code: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    options: dict[str, Any] = {} if num_layers is None else {"num_hidden_layers": num_layers}
    empty = empty_model(
        read_config(folder, **code, **options), folder, dtype=dtype, trust_remote_code=trust_remote_code
    )
    check_fits(empty, name)
    check_stored(folder, empty, first_layers=num_layers is not None)
    if device_map is not None:
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    try:
        tokenizer = read_tokenizer(folder, template, **code)
        if head_only:
            return tokenizer, read_ends(folder, empty, dtype, device)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **code,
            **options,
        )
        model, report = loaded
        check_report(folder, model, report, first_layers=num_layers is not None)
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged ({error}): remove it, or copy it again.") from error
    return tokenizer, model


def refuse_mismatch(folder: Path, tokenizer: Any, model: Any, sizes: Mapping[str, Any] | None) -> None:
    """Raise an error for a tokenizer of another model, or a config.json that differs from `target.sizes`.

    Raises:
        ValueError: naming both values.
    """
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > vocab_size:  # without added tokens, such as a padding token without an embedding
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens and the model {vocab_size}: it belongs to "
            "another model. Set target.path to a folder whose tokenizer belongs to its weights."
        )
    if wrong := {key: value for key, value in (sizes or {}).items() if getattr(model.config, key, value) != value}:
        raise ValueError(f"target.sizes says {wrong}, but the config.json in {folder} differs: correct target.sizes.")


def refuse_offloaded_ends(model: Any) -> None:
    """Raise an error if the embedding or the LM head is not in memory, where the draft head needs them.

    Raises:
        ValueError: `target.device_map` offloads one of them to disk.
    """
    if any(end.weight.is_meta for end in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise ValueError(
            "target.device_map offloads the embedding or the LM head to disk, but the draft head needs them in "
            "memory: set a device for embed_tokens and lm_head in target.device_map."
        )


def model_fingerprint(folder: Path, chat_template: str | None, num_layers: int) -> str:
    """Return the SHA-256 of config, tokenizer, template and weights of a folder: what features depend on (not dtype).

    Args:
        folder: the model folder.
        chat_template: the template that replaces the tokenizer's own, if any.
        num_layers: number of layers of the model as read.
    """
    digest = hashlib.sha256()
    names = ["config.json", "tokenizer.json", "tokenizer.model"]
    if chat_template is not None:
        digest.update(f"chat template:{chat_template}\n".encode())
    else:
        names.append("chat_template.jinja")
    for file in [*(folder / name for name in names), *sorted(folder.glob("*.safetensors"))]:
        if not file.exists():
            continue
        if file.name != "config.json":
            digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
            continue
        config = json.loads(file.read_text())
        config.pop("transformers_version", None)
        content = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        digest.update(f"{file.name}:{content}\n".encode())
        if num_layers != config["num_hidden_layers"]:
            digest.update(f"first {num_layers} layers\n".encode())
    return digest.hexdigest()
