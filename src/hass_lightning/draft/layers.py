"""The one decoder layer of an EAGLE head: a Llama layer without input norm (hass.md §3).

Shapes: B batch, T tokens, D hidden, H heads, G key/value heads, d head size (types.py has the legend).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from hass_lightning.target.cache import KVCache


class DraftAttention(nn.Module):
    """Projections of the head's attention; which keys a row sees is decided by the caller."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads or config.num_attention_heads)
        self.head_dim = int(config.head_dim or config.hidden_size // self.num_heads)
        hidden, d = config.hidden_size, self.head_dim
        self.q_proj = nn.Linear(hidden, self.num_heads * d, bias=False)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * d, bias=False)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * d, bias=False)
        self.o_proj = nn.Linear(self.num_heads * d, hidden, bias=False)

    def _split(self, projected: Tensor, num_heads: int) -> Tensor:
        return projected.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)

    def queries(self, u: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated queries [B, H, T, d] of `u` [B, T, D]."""
        q = self._split(self.q_proj(u), self.num_heads)
        cos, sin = rotary
        return apply_rotary_pos_emb(q, q, cos.to(q.dtype), sin.to(q.dtype))[0]

    def keys_values(self, u: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, G, T, d] of `u` [B, T, D]."""
        k = self._split(self.k_proj(u), self.num_kv_heads)
        cos, sin = rotary
        k = apply_rotary_pos_emb(k, k, cos.to(k.dtype), sin.to(k.dtype))[0]
        return k, self._split(self.v_proj(u), self.num_kv_heads)


class DraftLayer(nn.Module):
    """`y = u + Attn(u)`, `f = y + MLP(RMSNorm(y))`; parameter names are those of the published EAGLE heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def finish(self, u: Tensor, attended: Tensor, rows: Tensor | None = None) -> Tensor:
        """Features [B, T, D] from the residual `u` [B, T, D] and the heads' outputs [B, H, T, d].

        With `rows` (bool [B, T]) only those are computed; the others are 0.
        """
        attended = attended.transpose(1, 2).flatten(2)
        if rows is not None:
            every = torch.zeros_like(u)
            every[rows] = self.finish_rows(u[rows], attended[rows]).to(u.dtype)
            return every
        return self.finish_rows(u, attended)

    def finish_rows(self, u: Tensor, attended: Tensor) -> Tensor:
        """`y = u + o(attended)`, `f = y + MLP(norm(y))` for [..., D] and [..., H·d]."""
        y = u + self.self_attn.o_proj(attended)
        return y + self.mlp(self.post_attention_layernorm(y))

    def forward(
        self, u: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Ordinary attention: causal over `u` itself, or over `cache` under a boolean `mask` [B, 1, T, keys]."""
        q = self.self_attn.queries(u, rotary)
        k, v = self.self_attn.keys_values(u, rotary)
        if cache is not None:
            k, v = cache.update(k, v, 0)
        causal = mask is None and q.shape[2] > 1
        assert not causal or q.shape[2] == k.shape[2], "several rows on top of a cache need a mask"
        if causal:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            # the query heads of a group as more rows of one head: same numbers, several times as fast on a CPU
            group_size = q.shape[1] // k.shape[1]
            rows = q.unflatten(1, (k.shape[1], group_size)).flatten(2, 3)
            if mask is not None:
                mask = mask.repeat(1, 1, group_size, 1)
            attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)
        return self.finish(u, attended)


class RotaryAngles:
    """cos and sin of the target's rotary embedding, in fp32 whatever the head's dtype (so: no module, no buffer)."""

    def __init__(self, config: LlamaConfig):
        self._embedding = LlamaRotaryEmbedding(config)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, T] to (cos, sin), each [B, T, d] fp32."""
        self._embedding.to(positions.device)
        with torch.autocast(positions.device.type, enabled=False):
            return self._embedding(torch.empty(0, dtype=torch.float32, device=positions.device), positions)
