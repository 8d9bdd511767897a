"""The EAGLE draft head that HASS trains: `fc` on [embedding; feature], one Llama layer, frozen target ends.

Shapes: B batch, T tokens, D hidden (types.py has the legend). A *row* t pairs the token t+1 with the feature t.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from hass_lightning.draft.attention import Form, check_form
from hass_lightning.draft.layers import DraftLayer, RotaryAngles
from hass_lightning.target.cache import KVCache
from hass_lightning.target.llama import LlamaLayer, additive, rotary_of


def draft_config(target_config: Any) -> LlamaConfig:
    """The head's config: always one Llama layer; sizes, epsilon and rope follow the target's config."""
    heads = target_config.num_attention_heads
    return LlamaConfig(
        vocab_size=target_config.vocab_size,
        hidden_size=target_config.hidden_size,
        intermediate_size=target_config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=getattr(target_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
        hidden_act="silu",
        rms_norm_eps=getattr(target_config, "rms_norm_eps", 1e-6),
        max_position_embeddings=target_config.max_position_embeddings,
        rope_parameters=dict(target_config.rope_parameters),
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        bos_token_id=target_config.bos_token_id,
        eos_token_id=target_config.eos_token_id,
        pad_token_id=getattr(target_config, "pad_token_id", None),
    )


class EagleDraft(nn.Module):
    """An EAGLE-1/2/HASS head without embedding and LM head (those stay the target's, frozen).

    Parameter names and shapes are the published ones (hass.md §6.1) and do not depend on how the head was trained.
    """

    def __init__(
        self,
        config: LlamaConfig,
        fc_bias: bool = False,
        vocab_size: int | None = None,
        start: Literal["random", "least_squares"] = "random",
        attention: Form = "auto",
    ):
        super().__init__()
        if start not in ("random", "least_squares"):
            raise ValueError(f"model.draft.start={start} is neither random nor least_squares.")
        self.config = config
        self.start = start  # how a new head begins (initialize.py)
        self.attention = check_form(attention)  # of the training pass (attention.py)
        self.vocab_size = vocab_size  # of the draft vocabulary, None = full; no weight depends on it
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList([DraftLayer(config)])
        self.rotary = RotaryAngles(config)
        self.joined: LlamaLayer | None = None  # the layer as decoding runs it (join_layer)

    @classmethod
    def from_target(
        cls,
        target_config: Any,
        fc_bias: bool = False,
        vocab_size: int | None = None,
        start: Literal["random", "least_squares"] = "random",
        attention: Form = "auto",
    ) -> EagleDraft:
        """A new head for a target, from its config alone."""
        return cls(draft_config(target_config), fc_bias, vocab_size, start, attention)

    @property
    def layer(self) -> DraftLayer:
        """The one decoder layer."""
        return self.layers[0]  # type: ignore[return-value]

    def fuse(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """`u = fc([E(x_{t+1}); h_t])`, embedding first: [B, T, D] and [B, T, D] to [B, T, D]."""
        autocast = torch.is_autocast_enabled(embeddings.device.type)  # it casts by itself, without the detour over fp32
        dtype = embeddings.dtype if autocast else self.fc.weight.dtype
        return self.fc(torch.cat([embeddings.to(dtype), features.to(dtype)], dim=-1))

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One ordinary pass, as in decoding: rows in, the head's estimate of the next features out.

        Args:
            embeddings: [B, T, D] of tokens t+1. features: [B, T, D] of tokens t (the target's, or the head's own).
            cache: earlier rows; written, not advanced. positions: [B, T], default follows the cache.
            mask: bool [B, 1, T, keys], needed for several rows on top of a filled cache.

        Returns:
            Features [B, T, D] (in the target's post-norm space: `lm_head` reads them directly).
        """
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + embeddings.shape[1], device=embeddings.device)[None]
        u = self.fuse(embeddings, features)
        cos, sin = self.rotary(positions)
        if self.joined is None or cache is None:
            return self.layer(u, (cos, sin), cache, mask)
        rotary = rotary_of(cos.to(u.dtype), sin.to(u.dtype))
        group_size = self.layer.self_attn.num_heads // self.layer.self_attn.num_kv_heads
        return self.joined(u, rotary, additive(mask, group_size, u.dtype), cache, 0)

    def join_layer(self) -> None:
        """Decode with `LlamaLayer` from now on: for a frozen head that stays in its dtype, on its device."""
        attention, mlp, norm = self.layer.self_attn, self.layer.mlp, self.layer.post_attention_layernorm
        heads = {"num_heads": attention.num_heads, "num_kv_heads": attention.num_kv_heads}
        self.joined = LlamaLayer(attention, mlp, None, norm, **heads)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `capacity` rows."""
        weight, attention = self.fc.weight, self.layer.self_attn
        num_heads, head_dim = attention.num_kv_heads, attention.head_dim
        return KVCache(1, batch_size, num_heads, capacity, head_dim, weight.dtype, weight.device)
