"""The frozen target LLM behind three methods: tokens to features, with or without a cache.

Shapes: B batch, T tokens, D hidden, V vocabulary, C cache capacity (types.py has the legend).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hass_lightning.target.cache import KVCache
from hass_lightning.target.head import TargetHead
from hass_lightning.target.linear import use_few_row_linears
from hass_lightning.target.llama import LlamaStep
from hass_lightning.target.source import hub_folder, local_path, sha256_file

log = logging.getLogger(__name__)
GENERATION_TAG = r"\{%-?\s*(?:end)?generation\s*-?%\}"  # transformers' own tag around answers


def working_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bf16 where the hardware multiplies it fast (GPU, AMX, AVX-512 BF16), else fp32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def resolve_dtype(dtype: str | torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """A dtype from its name (`auto`: `working_dtype`)."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return working_dtype(device)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype not in known:
        raise ValueError(f"target.dtype={dtype} is none of auto, {', '.join(known)}.")
    return known[dtype]


def read_template(path: str) -> str:
    """A Jinja chat template from its file.

    Raises:
        ValueError: there is no such file, or it is no Jinja.
    """
    from jinja2 import Environment, TemplateSyntaxError

    file = local_path(path)
    if not file.is_file():
        raise ValueError(
            f"target.chat_template={path} does not exist: give a Jinja file, or null for the tokenizer's own."
        )
    text = file.read_text(encoding="utf-8")
    try:
        Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]).parse(re.sub(GENERATION_TAG, "", text))
    except TemplateSyntaxError as error:
        raise ValueError(f"target.chat_template={path} is no Jinja template: {error} (line {error.lineno}).") from error
    return text


def _ends_alone(folder: Path, dtype: torch.dtype, device: str, code: dict[str, Any]) -> Any:
    """The model of `folder` without memory, but for its embedding and LM head."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, **code)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    ends = {"model.embed_tokens.weight": model.get_input_embeddings(), "lm_head.weight": model.get_output_embeddings()}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in set(tensors.keys()) & set(ends):
                weight = tensors.get_tensor(name).to(device=device, dtype=dtype)
                ends[name].weight = torch.nn.Parameter(weight, requires_grad=False)
    if config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _plain(device_map: str | Mapping[str, Any]) -> str | dict[str, Any]:
    return device_map if isinstance(device_map, str) else dict(device_map)


class TargetModel:
    """A Hugging Face causal LM, frozen, in evaluation mode. Never a submodule of a LightningModule.

    Attributes:
        config: the LM's config. tokenizer: its tokenizer. head: its embedding and LM head. folder: where it was read.
    """

    def __init__(
        self, model, tokenizer, name: str, folder: Path, chat_template: str | None = None, head_only: bool = False
    ):
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self.chat_template = chat_template  # None: the tokenizer's own
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.folder = Path(folder)
        self.config = model.config
        for key, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
            if (value := getattr(model.config, key, neutral)) not in (None, neutral):
                raise ValueError(
                    f"target {name} changes its logits after the LM head ({key}={value}), which is not supported: "
                    "sampled answers would not be the model's own. Take a LLaMA-like target."
                )
        self.head_only = head_only  # the layers between embedding and LM head were left out
        lm_head = model.get_output_embeddings()
        self.head = TargetHead(model.get_input_embeddings().weight, lm_head.weight, getattr(lm_head, "bias", None))
        self._step: Callable[[Tensor, KVCache, Tensor, Tensor | None], Tensor]
        if LlamaStep.fits(model):
            self._step = LlamaStep(model)
        else:
            use_few_row_linears(model)
            self._step = self._transformers_step

    @classmethod
    def load(
        cls,
        path: str | Path,
        name: str,
        revision: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        device: str = "cpu",
        trust_remote_code: bool = False,
        num_layers: int | None = None,
        chat_template: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        sizes: Mapping[str, Any] | None = None,
        head_only: bool = False,
    ) -> TargetModel:
        """Read a target from a folder or a hub id.

        Args:
            path: a model folder or a hub id (`owner/name`). revision: of the hub id.
            dtype: `auto` (bf16 where it is fast), `float32`, `bfloat16`, `float16`.
            attn_implementation: of transformers. `eager` misreads boolean tree masks: refused.
            num_layers: keep the first layers alone (a small model for `DraftModel` where no trained one exists).
            chat_template: a Jinja file instead of the tokenizer's own template (`package://`: one that ships here).
            device_map: spread the layers over devices through accelerate (`auto`: all GPUs, then the CPU, then a disk),
                for a target that fits none of them; for extraction, slow to decode with. `device` is then not used.
            head_only: read embedding and LM head alone: all that training on features already extracted needs.
            sizes: what its config.json must say; `plan=true` computes with it before the model is there.

        Raises:
            ValueError: the model cannot be found or read; the message names the cure.
        """
        if attn_implementation == "eager":
            raise ValueError(
                "target.attn_implementation=eager adds boolean tree masks to the scores and verifies wrongly: use sdpa."
            )
        if str(device).startswith("cuda") and device_map is None and not torch.cuda.is_available():
            raise ValueError(f"target.device={device}, and torch sees no GPU here: set target.device=cpu.")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        template = None if chat_template is None else read_template(chat_template)
        folder = hub_folder(str(path), revision)
        code: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        fewer = {} if num_layers is None else {"num_hidden_layers": num_layers}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **code)
            resolved = resolve_dtype(dtype, device)
            model: Any = (
                _ends_alone(folder, resolved, device, code)
                if head_only
                else AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=resolved,
                    attn_implementation=attn_implementation,
                    use_safetensors=True,
                    **code,
                    **fewer,
                    **({} if device_map is None else {"device_map": _plain(device_map)}),
                )
            )
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder} are damaged ({error}): remove it, or copy it again.") from error
        vocab_size = model.get_input_embeddings().weight.shape[0]
        if tokenizer.vocab_size > vocab_size:  # without added tokens, such as a padding token that nobody embeds
            raise ValueError(
                f"the tokenizer in {folder} knows {tokenizer.vocab_size} tokens and the model {vocab_size}: it is "
                "another model's. Set target.path to a folder whose tokenizer belongs to its weights."
            )
        wrong = {k: v for k, v in (sizes or {}).items() if num_layers is None and getattr(model.config, k, v) != v}
        if wrong:
            raise ValueError(f"target.sizes says {wrong}, the config.json in {folder} another: correct target.sizes.")
        if head_only:
            pass  # its ends are where they belong, and nothing else is there
        elif device_map is None:
            model = model.to(device)
        elif any(end.weight.is_meta for end in (model.get_input_embeddings(), model.get_output_embeddings())):
            raise ValueError(
                "target.device_map leaves the embedding or the LM head on the disk, but the draft head needs them in "
                "memory: name a device for embed_tokens and lm_head in target.device_map."
            )
        return cls(model, tokenizer, name, folder, template, head_only)

    @property
    def device(self) -> torch.device:
        """Where the target computes."""
        return self.head.lm_head.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the target computes in."""
        return self.head.lm_head.dtype

    @property
    def hidden_size(self) -> int:
        """Width of a feature."""
        return self.head.hidden_size

    @property
    def max_length(self) -> int:
        """Longest sequence the target was made for, in tokens; at most its sliding window (tree masks do not slide)."""
        longest, window = int(self.config.max_position_embeddings), getattr(self.config, "sliding_window", None)
        return longest if window is None else min(longest, int(window))

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer, from the generation config and the tokenizer."""
        ids: set[int] = set()
        for value in (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id):
            ids.update(value if isinstance(value, list) else [value] if value is not None else [])
        return frozenset(ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config, tokenizer, template and weights of the folder: what features depend on (not dtype)."""
        digest = hashlib.sha256()
        names = ["config.json", "tokenizer.json", "tokenizer.model"]
        if self.chat_template is not None:
            digest.update(f"chat template:{self.chat_template}\n".encode())
        else:
            names.append("chat_template.jinja")
        files = [self.folder / name for name in names] + sorted(self.folder.glob("*.safetensors"))
        for file in files:
            if not file.exists():
                continue
            if file.name == "config.json":
                config = json.loads(file.read_text())
                config.pop("transformers_version", None)
                content = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
            else:
                content = sha256_file(file)
            digest.update(f"{file.name}:{content}\n".encode())
            if file.name == "config.json" and self.config.num_hidden_layers != config["num_hidden_layers"]:
                digest.update(f"first {self.config.num_hidden_layers} layers\n".encode())
        return digest.hexdigest()

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `capacity` tokens."""
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return KVCache(config.num_hidden_layers, batch_size, num_heads, capacity, head_dim, self.dtype, self.device)

    @torch.inference_mode()
    def encode(self, input_ids: Tensor) -> Tensor:
        """Features [B, T, D] of right-padded token ids [B, T] (hidden states after the final norm).

        Padding needs no mask: under causal attention no real token sees what stands to its right.
        """
        self._need_layers()
        first = self.head.embed_tokens.device  # another one than the LM head's under a device_map
        return self.model.base_model(input_ids=input_ids.to(first), use_cache=False).last_hidden_state.to(self.device)

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, cache: KVCache, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Features [B, N, D] of N new tokens on top of `cache`, which is written but not advanced.

        Args:
            input_ids: [B, N]. positions: [B, N] (default: cache.length …). mask: bool [B, 1, N, keys], True = attend
                (default: causal).
        """
        self._need_layers()
        if positions is None:
            positions = torch.arange(cache.length, cache.length + input_ids.shape[1], device=self.device)[None]
        return self._step(input_ids, cache, positions, mask)

    def _transformers_step(self, input_ids: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None) -> Tensor:
        """The same for any causal LM, by transformers."""
        if mask is None and input_ids.shape[1] == 1 and self.device.type == "cpu":
            # 1.2x faster with a mask that hides nothing: transformers then packs the query heads of a group
            mask = torch.ones(1, 1, 1, cache.length + 1, dtype=torch.bool)
        output = self.model.base_model(
            input_ids=input_ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return output.last_hidden_state

    def _need_layers(self) -> None:
        if self.head_only:
            raise ValueError(
                "target.head_only=true reads no layers, but this run needs them: extract the features first "
                "(hass-prepare with the same words and target.head_only=false), and train with callbacks.decoding=null."
            )

    def in_dtype(self, dtype: torch.dtype) -> TargetModel:
        """A second copy of this target in another dtype."""
        from copy import deepcopy

        model = deepcopy(self.model).to(dtype)
        return TargetModel(model, self.tokenizer, self.name, self.folder, self.chat_template, self.head_only)

    def in_fp32(self) -> TargetModel:
        """This target in fp32, where identity is checked: itself, or a second copy."""
        return self if self.dtype == torch.float32 else self.in_dtype(torch.float32)
