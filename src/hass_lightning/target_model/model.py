"""The frozen target LLM: from tokens to features, with or without a cache.

Features are the last hidden state after the final norm, preceded by the inputs of the layers in `feature_layers`:
W = (layers + 1) · D values per token.
Shapes: B batch, T tokens, D hidden, V vocabulary, C cache capacity (see the legend in types.py).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hass_lightning.target_model.cache import KVCache
from hass_lightning.target_model.hub import hub_folder
from hass_lightning.target_model.kernels import set_mode
from hass_lightning.target_model.linear import freeze_linears
from hass_lightning.target_model.llama import LlamaStep
from hass_lightning.target_model.lm_head import TargetHead
from hass_lightning.target_model.read import (
    model_fingerprint,
    read_model,
    refuse_mismatch,
    refuse_offloaded_ends,
    refuse_settings,
    resolve_dtype,
)
from hass_lightning.target_model.requirements import check_fits, target_rope
from hass_lightning.target_model.template import read_template, with_options

log = logging.getLogger(__name__)


class TargetModel:
    """A frozen Hugging Face causal LM in evaluation mode. It is never a submodule of a LightningModule.

    Attributes:
        config: the LM's config.
        tokenizer: its tokenizer.
        head: its embedding and LM head.
        folder: the folder from which it was read.
        feature_layers: layers whose inputs precede the last hidden state in the features (see `reading`).
    """

    feature_layers: tuple[int, ...] = ()

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        folder: Path,
        chat_template: str | None = None,
        head_only: bool = False,
        borrowed: bool = False,
    ) -> None:
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self.chat_template = chat_template  # None: the tokenizer's template
        self.model = model if borrowed else model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.folder = Path(folder)
        self.config = model.config
        check_fits(model, name)
        self.head_only = head_only  # whether the layers between embedding and LM head were left out
        lm_head = model.get_output_embeddings()
        self.head = TargetHead(model.get_input_embeddings().weight, lm_head.weight, getattr(lm_head, "bias", None))
        self._step: Callable[..., list[Tensor]]  # see LlamaStep.__call__
        if borrowed:
            self._step = self._transformers_step
        elif LlamaStep.fits(model):
            self._step = LlamaStep(model)
            if extra := self._step.extra_bytes + self.head.output.extra_bytes:
                log.info("packed copies of the weights use %d MB more memory (target.packed=false: none)", extra >> 20)
        else:
            freeze_linears(model)
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
        packed: Literal["auto"] | bool = "auto",
        chat_template_options: Mapping[str, Any] | None = None,
    ) -> TargetModel:
        """Read a target from a folder or a hub id.

        Args:
            path: a model folder or a hub id (`owner/name`).
            name: name of the target in records and reports.
            revision: revision of the hub id.
            dtype: `auto` (bf16 if it is fast), `float32`, `bfloat16`, `float16`.
            attn_implementation: attention of transformers. `eager` misinterprets boolean tree masks and raises an
                error.
            device: device of the model.
            trust_remote_code: whether transformers may run code from the model's repository.
            num_layers: use only the first layers (a small model for `DraftModel` if no trained one exists).
            chat_template: a Jinja file instead of the tokenizer's own template (`package://`: a packaged one).
            chat_template_options: variables that the template reads, such as {enable_thinking: false}.
            device_map: distribute the layers over devices with accelerate (`auto`: all GPUs, then the CPU, then disk),
                for a target that fits on no single device. Suitable for extraction, slow for decoding. `device` is then
                not used.
            head_only: read only the embedding and the LM head, which suffice for training on features already
                extracted.
            packed: multiply few rows with oneDNN's packed copies of the weights. `auto`: if they are measured to be
                faster on this machine (kernels.py); `true`: always, without keeping the plain weights; `false`: never.
                The setting applies to the whole process, including the draft head and other targets.
            sizes: expected values in config.json; `plan=true` uses them before the model is downloaded.

        Raises:
            ValueError: the model cannot be found or read; the message says how to fix it.
        """
        refuse_settings(attn_implementation, device, device_map)
        set_mode(packed)
        template = None if chat_template is None else read_template(chat_template)
        folder = hub_folder(str(path), revision)
        tokenizer, model = read_model(
            folder, name, template, resolve_dtype(dtype, device), attn_implementation=attn_implementation,
            device=device, trust_remote_code=trust_remote_code, num_layers=num_layers, device_map=device_map,
            head_only=head_only,
        )  # fmt: skip
        if chat_template_options:
            template = with_options(tokenizer.chat_template, chat_template_options)
        refuse_mismatch(folder, tokenizer, model, sizes if num_layers is None else None)
        if device_map is not None and not head_only:
            refuse_offloaded_ends(model)
        elif not head_only:
            model = model.to(device)
        target = cls(model, tokenizer, name, folder, template, head_only)
        if isinstance(target._step, LlamaStep):
            target._step.release()
        return target

    def reading(self, layers: Sequence[int]) -> TargetModel:
        """Return this target with features that begin with the inputs of `layers`, ascending. Weights are shared.

        Raises:
            ValueError: if there is no such layer.
        """
        if tuple(layers) == self.feature_layers:
            return self
        wrong = [layer for layer in layers if not 0 <= layer < self.config.num_hidden_layers]
        if wrong or list(layers) != sorted(set(layers)):
            raise ValueError(
                f"layers {list(layers)} of target {self.name} must ascend from 0 to {self.config.num_hidden_layers - 1}"
                ": set model.draft.feature_layers and data.feature_layers accordingly."
            )
        other = copy(self)
        other.feature_layers = tuple(layers)
        return other

    @classmethod
    def around(cls, model: Any) -> TargetModel:
        """A target that decodes with the caller's causal LM as it is: no weight is copied, and nothing in it changes.

        It has no tokenizer and no end tokens, and no layers that are faster on a CPU: `load` gives those.

        Raises:
            ValueError: the model does not fit, or its attention cannot follow a tree mask.
        """
        if (attention := model.config._attn_implementation) != "sdpa":
            raise ValueError(
                f"attn_implementation={attention} does not take the boolean masks of draft trees: "
                'call model.set_attn_implementation("sdpa") first.'
            )
        return cls(model, None, type(model).__name__, Path(), borrowed=True)

    @property
    def device(self) -> torch.device:
        """Device of the target."""
        return self.head.lm_head.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the target."""
        return self.head.lm_head.dtype

    @property
    def hidden_size(self) -> int:
        """Size of a hidden state."""
        return self.head.hidden_size

    @property
    def feature_size(self) -> int:
        """Width W of the features."""
        return (len(self.feature_layers) + 1) * self.hidden_size

    @property
    def max_length(self) -> int:
        """Maximum number of tokens that is decoded exactly.

        At most the sliding window (tree masks do not slide) and the original length of longrope (beyond it, all angles
        depend on the last position).
        """
        longest, rope = int(self.config.max_position_embeddings), target_rope(self.config)
        # beyond the original length all angles change, but cached keys keep theirs
        if rope.get("rope_type") == "longrope":
            longest = min(longest, int(rope["original_max_position_embeddings"]))
        window = getattr(self.config, "sliding_window", None)
        return min(longest, int(window)) if window else longest

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer, from the generation config and the tokenizer."""
        ids: set[int] = set()
        for value in (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id):
            ids.update(value if isinstance(value, list) else [value] if value is not None else [])
        return frozenset(ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of config, tokenizer, chat template and weights: everything that a head depends on (not dtype)."""
        inside = self.chat_template is None and not (self.folder / "chat_template.jinja").exists()
        template = self.tokenizer.chat_template if inside else None  # from tokenizer_config.json
        if not template:
            return self.weights_fingerprint
        return hashlib.sha256(f"{self.weights_fingerprint}:{template}".encode()).hexdigest()

    def is_known_as(self, fingerprint: str) -> bool:
        """Return whether a head with this fingerprint is for this target (older ones exclude an inner template)."""
        return fingerprint in (self.fingerprint, self.weights_fingerprint)

    @cached_property
    def weights_fingerprint(self) -> str:
        """SHA-256 of the folder's config, tokenizer and weights, and of the template if it is a separate file.

        Features and answers of given token ids depend only on these, so their caches are named after it.
        """
        return model_fingerprint(self.folder, self.chat_template, self.config.num_hidden_layers)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for `batch_size` sequences of up to `capacity` tokens."""
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return KVCache(config.num_hidden_layers, batch_size, num_heads, capacity, head_dim, self.dtype, self.device)

    @torch.inference_mode()
    def encode(self, input_ids: Tensor) -> Tensor:
        """Return the features [B, T, W] of right-padded token ids [B, T].

        Padding needs no mask: with causal attention no real token attends to the padding on its right.
        """
        self._need_layers()
        if isinstance(self._step, LlamaStep) and self._step.released:
            cache = self.new_cache(*input_ids.shape)
            return self.forward(input_ids.to(self.device), cache)
        first = self.head.embed_tokens.device  # may differ from the LM head's device with a device_map
        return self._joined(self._states(self.feature_layers, input_ids=input_ids.to(first), use_cache=False))

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, cache: KVCache, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the features [B, N, W] of N new tokens after those in `cache`, which is written but not advanced.

        Args:
            input_ids: [B, N].
            cache: the cache.
            positions: [B, N] (default: cache.length …).
            mask: bool [B, 1, N, keys], True = attend (default: causal).
        """
        self._need_layers()
        if positions is None:
            positions = torch.arange(cache.length, cache.length + input_ids.shape[1], device=self.device)[None]
        return self._joined(self._step(input_ids, cache, positions, mask, self.feature_layers))

    def _transformers_step(
        self, input_ids: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None, kept: tuple[int, ...] = ()
    ) -> list[Tensor]:
        """Return the same as `LlamaStep` with the code of transformers, for any causal LM."""
        if mask is None and input_ids.shape[1] == 1 and self.device.type == "cpu":
            # 1.2x faster with a mask without effect, because transformers then packs the query heads of a group
            mask = torch.ones(1, 1, 1, cache.length + 1, dtype=torch.bool)
        inputs = {"position_ids": positions, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        return self._states(kept, input_ids=input_ids, **inputs)

    def _states(self, kept: tuple[int, ...], **inputs: Any) -> list[Tensor]:
        """The inputs of the layers `kept` and the last hidden state, by transformers' own forward."""
        output = self.model.base_model(**inputs, output_hidden_states=bool(kept))
        return [*(output.hidden_states[layer] for layer in kept), output.last_hidden_state]

    def _joined(self, states: list[Tensor]) -> Tensor:
        """Features [B, N, W] on this target's device."""
        return (
            torch.cat([each.to(self.device) for each in states], -1) if len(states) > 1 else states[0].to(self.device)
        )

    def _need_layers(self) -> None:
        if self.head_only:
            raise ValueError(
                "target.head_only=true reads no layers, but this run needs them: extract the features first "
                "(hass-prepare with the same overrides and target.head_only=false), and train with "
                "callbacks.decoding=null."
            )

    def in_dtype(self, dtype: torch.dtype) -> TargetModel:
        """Return a copy of this target in another dtype."""
        model = deepcopy(self.model)
        if isinstance(self._step, LlamaStep) and self._step.released:
            self._step.restore(model)
        model = model.to(dtype)
        other = TargetModel(model, self.tokenizer, self.name, self.folder, self.chat_template, self.head_only)
        return other.reading(self.feature_layers)

    def in_fp32(self) -> TargetModel:
        """Return this target in fp32 for the identity checks: itself, or a copy."""
        return self if self.dtype == torch.float32 else self.in_dtype(torch.float32)
