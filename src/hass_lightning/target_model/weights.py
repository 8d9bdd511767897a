"""Validation of the weights of a model folder, because transformers fills missing weights with random numbers.

The criterion is transformers' own report of missing, unexpected and mismatched tensors. It is computed from the headers
of the files with every tensor on the meta device: renamed and merged tensors are followed, and no weight is read.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hass_lightning.runs.files import read_json_object

log = logging.getLogger(__name__)
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHOWN = 4


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads: model.safetensors, or the shards of its index.

    Raises:
        ValueError: there are none, or a shard is missing.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise ValueError(
            f"{folder} contains no model.safetensors (nor an index of shards): copy the weights there, or convert "
            "pytorch_model*.bin (hass_lightning.target_model.source.safetensors_copy, as in "
            "conf/target/vicuna_7b.yaml)."
        )
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if missing := [name for name in names if not (folder / name).exists()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)} of its index: copy the complete checkpoint again.")
    return [folder / name for name in names]


def read_config(folder: Path, **options: Any) -> Any:
    """Read the config of a model folder.

    Raises:
        ValueError: config.json is not a JSON object, or not a config that transformers can read.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    read_json_object(file, "copy it again")
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except Exception as error:  # its validators raise exceptions of their own types
        text = " ".join(str(error).split())[:400]
        raise ValueError(f"{file} is not a config that transformers can read: {text}. Correct it there.") from error


def read_tokenizer(folder: Path, template: str | None = None, **options: Any) -> Any:
    """Read the tokenizer of a model folder with one chat template.

    The template is `template`, or the tokenizer's own; of several named ones, `default`.

    Raises:
        ValueError: transformers can read no tokenizer there, or none of its templates is named `default`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ImportError, KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {text}): copy tokenizer.json and "
            "tokenizer_config.json of the checkpoint there."
        ) from error
    own = tokenizer.chat_template
    if template is not None:
        tokenizer.chat_template = template
    elif isinstance(own, dict):
        if "default" not in own:
            raise ValueError(
                f"the tokenizer in {folder} has the chat templates {', '.join(sorted(own))} and none named default: "
                "write the one to use to a Jinja file and set target.chat_template to it."
            )
        log.info("of the chat templates %s the default one is used", ", ".join(sorted(own)))
        tokenizer.chat_template = own["default"]
    return tokenizer


def empty_model(config: Any, folder: Path, **options: Any) -> Any:
    """Return the causal LM of a config on the meta device.

    Raises:
        ValueError: transformers has no causal LM of this kind.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:  # inconsistent sizes raise any exception
        text = " ".join(str(error).split())
        if "Unrecognized configuration class" in text:
            text = (
                f"{folder} is not a causal LM: transformers has none for model_type={config.model_type}. Set "
                "target.path "
            )
            raise ValueError(f"{text}to a model that generates text.") from error
        raise ValueError(
            f"no model can be built from {folder}/config.json ({type(error).__name__}: {text[:300]}): correct it there."
        ) from error


def check_stored(folder: Path, model: Any, first_layers: bool = False) -> None:
    """Raise an error if the files of a folder do not contain the weights of `model`; only headers are read.

    Quantized weights are created by their quantizer while they are read, and checked then (`check_report`).

    Args:
        folder: the model folder.
        model: the model on the meta device.
        first_layers: whether `model` has only the first layers of what is stored.

    Raises:
        ValueError: naming some tensors and how to fix it.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    stored: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                stored |= {name: _meta_tensor(tensors, name) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder} are damaged ({error}): remove it, or copy it again.") from error
    try:
        report = _report(model, stored)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {folder} cannot be loaded into {type(model).__name__} "
            f"({' '.join(str(error).split())[:200]}): tensors are missing or have other shapes. Get the complete "
            "checkpoint."
        ) from error
    check_report(folder, model, report, first_layers)


def _meta_tensor(tensors: Any, name: str) -> Tensor:
    piece = tensors.get_slice(name)
    return torch.empty(piece.get_shape(), dtype=TYPES.get(piece.get_dtype(), torch.float32), device="meta")


def _report(model: Any, stored: dict[str, Tensor]) -> dict[str, Any]:
    """Return transformers' report of loading `stored` into a model like `model`."""
    options: dict[str, Any] = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    return type(model).from_pretrained(None, config=model.config, state_dict=stored, **options)[1]


def check_report(folder: Path, model: Any, report: Mapping[str, Any], first_layers: bool = False) -> None:
    """Raise an error if transformers reports a missing, mismatched or ignored weight after loading.

    Tensors of modules that the model does not have (a vision tower, a value head) are allowed, as are further layers if
    only the first ones are wanted.

    Args:
        folder: the model folder.
        model: the model.
        report: transformers' report of loading.
        first_layers: whether `model` has only the first layers of what is stored.

    Raises:
        ValueError: naming some tensors and how to fix it.
    """
    missing = sorted(report["missing_keys"])
    wrong = [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in report["mismatched_keys"]]
    dropped = sorted(name for name in report["unexpected_keys"] if _belongs(name, model, first_layers))
    if not missing and not wrong and not dropped:
        return
    parts = []
    if missing:
        parts.append(f"lack {_listed(missing)}, which transformers would fill with random numbers")
    if wrong:
        parts.append(f"have other shapes than its config says ({_listed(sorted(wrong))})")
    if dropped:
        parts.append(f"contain {_listed(dropped)}, which {type(model).__name__} would ignore")
    cure = _cure(missing, sorted(report["unexpected_keys"]))
    raise ValueError(f"the weights in {folder} {', and '.join(parts)}: {cure}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _belongs(name: str, model: Any, first_layers: bool) -> bool:
    """Return whether an unused tensor belongs to one of the modules of the model, or to a layer after its last."""
    prefix = f"{model.base_model_prefix}."
    own = {module for module, _ in model.named_modules()}
    owner = name.rpartition(".")[0]
    if owner in own or prefix + owner in own:
        return bool(owner)
    numbered = re.match(r"(.*?)\.\d+\.", name)
    return not first_layers and numbered is not None and bool({numbered[1], prefix + numbered[1]} & own)


def _cure(missing: list[str], unexpected: list[str]) -> str:
    ends = {name: next((one for one in unexpected if one.endswith(f".{name}")), None) for name in missing}
    found = {name: other for name, other in ends.items() if other is not None}
    if found:
        name, other = next(iter(found.items()))
        before = other.removesuffix(name)
        return (
            f"they are stored there under the prefix {before!r}. Use the text model's own checkpoint, or save the "
            "tensors again without the prefix."
        )
    if missing and all(name.startswith(("lm_head.", "embed_out.", "output.")) for name in missing):
        return (
            "it is a base model without its LM head. Get the causal LM's checkpoint, or set tie_word_embeddings=true "
            "in config.json if its embedding is its LM head."
        )
    return "get the complete checkpoint and its config.json."


def read_ends(folder: Path, model: Any, dtype: torch.dtype, device: str) -> Any:
    """Read only the embedding and the LM head of `model` (on the meta device), whatever they are named in the files."""
    from transformers import GenerationConfig

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    wanted = {
        f"{name}.{key}": (module, key)
        for name, module in model.named_modules()
        if module is ends[0] or module is ends[1]
        for key in dict(module.named_parameters(recurse=False))
    }
    # files may use other names (embed_out); transformers knows which parameter a tensor becomes
    nothing = {"no.such.tensor": torch.empty(1, device="meta")}
    absent = set(_report(model, nothing)["missing_keys"]) & set(wanted)  # an LM head that is missing is the embedding
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                empty = _meta_tensor(tensors, name)
                if not empty.ndim or empty.shape[0] not in {end.weight.shape[0] for end in ends}:
                    continue
                read = absent - set(_report(model, {name: empty})["missing_keys"])
                for module, key in (wanted[parameter] for parameter in read):
                    weight = tensors.get_tensor(name).to(device=device, dtype=dtype)
                    setattr(module, key, torch.nn.Parameter(weight, requires_grad=False))
    if model.config.tie_word_embeddings:
        ends[1].weight = ends[0].weight
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
