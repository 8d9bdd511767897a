"""The frozen target LLM behind three methods: tokens to features, with or without a cache.

Shapes: B batch, T tokens, D hidden, V vocabulary, C cache capacity (types.py has the legend).
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from hass_lightning.target.source import hub_folder, sha256_file

log = logging.getLogger(__name__)


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


class TargetModel:
    """A Hugging Face causal LM, frozen, in evaluation mode. Never a submodule of a LightningModule.

    Attributes:
        config: the LM's config. tokenizer: its tokenizer. head: its embedding and LM head. folder: where it was read.
    """

    def __init__(self, model, tokenizer, name: str, folder: Path):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.folder = Path(folder)
        self.config = model.config
        lm_head = model.get_output_embeddings()
        self.head = TargetHead(model.get_input_embeddings().weight, lm_head.weight, getattr(lm_head, "bias", None))
        if LlamaStep.fits(model):
            self._step = LlamaStep(model)
        else:
            use_few_row_linears(model)
            self._step = self._transformers_step
        self._cached_step, self.compiled = self._step, False

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
        compile: bool = False,
    ) -> TargetModel:
        """Read a target from a folder or a hub id.

        Args:
            path: a model folder or a hub id (`owner/name`). revision: of the hub id.
            dtype: `auto` (bf16 where it is fast), `float32`, `bfloat16`, `float16`.
            attn_implementation: of transformers. `eager` misreads boolean tree masks: refused.
            num_layers: keep the first layers alone (a small model for `DraftModel` where no trained one exists).
            compile: see `compile`.

        Raises:
            ValueError: the model cannot be found or read; the message names the cure.
        """
        if attn_implementation == "eager":
            raise ValueError(
                "target.attn_implementation=eager adds boolean tree masks to the scores and verifies wrongly: use sdpa."
            )
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = hub_folder(str(path), revision)
        code: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        fewer = {} if num_layers is None else {"num_hidden_layers": num_layers}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **code)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=resolve_dtype(dtype, device),
                attn_implementation=attn_implementation,
                use_safetensors=True,
                **code,
                **fewer,
            )
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder} are damaged ({error}): remove it, or copy it again.") from error
        vocab_size = model.get_input_embeddings().weight.shape[0]
        if tokenizer.vocab_size > vocab_size:  # without added tokens, such as a padding token that nobody embeds
            raise ValueError(
                f"the tokenizer in {folder} knows {tokenizer.vocab_size} tokens and the model {vocab_size}: it is "
                "another model's. Set target.path to a folder whose tokenizer belongs to its weights."
            )
        target = cls(model.to(device), tokenizer, name, folder)
        if compile:
            target.compile()
        return target

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
        """Longest sequence the target was made for, in tokens."""
        return int(self.config.max_position_embeddings)

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
        names = ("config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja")
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
        return self.model.base_model(input_ids=input_ids.to(self.device), use_cache=False).last_hidden_state

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, cache: KVCache, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Features [B, N, D] of N new tokens on top of `cache`, which is written but not advanced.

        Args:
            input_ids: [B, N]. positions: [B, N] (default: cache.length …). mask: bool [B, 1, N, keys], True = attend
                (default: causal).
        """
        if positions is None:
            positions = torch.arange(cache.length, cache.length + input_ids.shape[1], device=self.device)[None]
        step = self._step if cache.length == 0 else self._cached_step
        return step(input_ids, cache, positions, mask)

    def compile(self, backend: str = "inductor") -> None:
        """Run `torch.compile` over what follows a prefill, at the first forward of each number of tokens.

        A draft head for this target is compiled, too (`SavedDraft.for_decoding`), so that a speedup compares like with
        like. Batches of ragged rows and the copy in fp32 stay as they are.
        """
        step = self._step.__call__ if isinstance(self._step, LlamaStep) else self._step
        self._cached_step, self.compiled = torch.compile(step, dynamic=True, backend=backend), True

    def _transformers_step(self, input_ids: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None) -> Tensor:
        """The same for any causal LM, by transformers."""
        if mask is None and input_ids.shape[1] == 1 and self.device.type == "cpu":
            # 1.2x faster with a mask that hides nothing: transformers then packs the query heads of a group
            mask = torch.ones(1, 1, 1, cache.length + 1, dtype=torch.bool)
        output = self.model.base_model(
            input_ids=input_ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return output.last_hidden_state

    def in_dtype(self, dtype: torch.dtype) -> TargetModel:
        """A second copy of this target in another dtype."""
        from copy import deepcopy

        return TargetModel(deepcopy(self.model).to(dtype), self.tokenizer, self.name, self.folder)

    def in_fp32(self) -> TargetModel:
        """This target in fp32, where identity is checked: itself, or a second copy."""
        return self if self.dtype == torch.float32 else self.in_dtype(torch.float32)
