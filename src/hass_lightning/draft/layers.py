"""The decoder layer of a draft head: a Llama layer whose attention input is the head's (docs/method.md, The head).

Shapes: B batch, T tokens, D hidden, H heads, G key/value heads, d head size (see the legend in types.py).
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

from hass_lightning.target_model.cache import KVCache


class DraftAttention(nn.Module):
    """Projections of the head's attention. The caller computes the attention itself.

    Args:
        config: the head's config.
        width: size of the attention's input. Default: D.
    """

    def __init__(self, config: LlamaConfig, width: int | None = None):
        super().__init__()
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads or config.num_attention_heads)
        self.head_dim = int(config.head_dim or config.hidden_size // self.num_heads)
        hidden, d = config.hidden_size, self.head_dim
        width = width or hidden
        bias = bool(getattr(config, "qkv_bias", False))  # of published heads for Qwen2; its name in the official code
        self.q_proj = nn.Linear(width, self.num_heads * d, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * d, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * d, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * d, hidden, bias=False)

    def _split(self, projected: Tensor, num_heads: int) -> Tensor:
        return projected.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)

    def queries(self, u: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated queries [B, H, T, d] of `u` [B, T, width]."""
        q = self._split(self.q_proj(u), self.num_heads)
        cos, sin = rotary
        return apply_rotary_pos_emb(q, q, cos.to(q.dtype), sin.to(q.dtype))[0]

    def keys_values(self, u: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, G, T, d] of `u` [B, T, width]."""
        k = self._split(self.k_proj(u), self.num_kv_heads)
        cos, sin = rotary
        k = apply_rotary_pos_emb(k, k, cos.to(k.dtype), sin.to(k.dtype))[0]
        return k, self._split(self.v_proj(u), self.num_kv_heads)


class DraftLayer(nn.Module):
    """Decoder layer `y = h + Attn(u)`, `f = y + MLP(RMSNorm(y))`, with the parameter names of published EAGLE heads.

    The head gives the attention's input `u` and the residual `h` (the same tensor in EAGLE).

    Args:
        config: the head's config.
        width: size of `u`. Default: D.
    """

    def __init__(self, config: LlamaConfig, width: int | None = None):
        super().__init__()
        self.self_attn = DraftAttention(config, width)
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def sizes(self) -> tuple[int, int]:
        """Sizes of the output, D, and of all queries, H·d."""
        return self.self_attn.o_proj.out_features, self.self_attn.o_proj.in_features

    def products(self) -> tuple[int, int]:
        """Numbers multiplied per position by q, k and v, and by the output projection and the MLP."""
        attention, mlp = self.self_attn, self.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        rest = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return sum(each.weight.numel() for each in projections), sum(each.weight.numel() for each in rest)

    def finish(self, residual: Tensor, attended: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return features [B, T, D], given the residual [B, T, D] and the attention output [B, H, T, d].

        With `rows` (bool [B, T]), only those positions are computed and the others are 0.
        """
        attended = attended.transpose(1, 2).flatten(2)
        if rows is not None:
            output = torch.zeros_like(residual)
            output[rows] = self.finish_rows(residual[rows], attended[rows]).to(residual.dtype)
            return output
        return self.finish_rows(residual, attended)

    def finish_rows(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Return `f = y + MLP(norm(y))`, `y = h + o(attended)`, for `h` [..., D] and `attended` [..., H·d]."""
        y = residual + self.self_attn.o_proj(attended)
        return y + self.mlp(self.post_attention_layernorm(y))

    def forward(
        self,
        u: Tensor,
        residual: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Run the layer with causal attention over `u`, or over `cache` with a boolean `mask` [B, 1, T, keys]."""
        q = self.self_attn.queries(u, rotary)
        k, v = self.self_attn.keys_values(u, rotary)
        if cache is not None:
            k, v = cache.update(k, v, 0)
        causal = mask is None and q.shape[2] > 1
        assert not causal or q.shape[2] == k.shape[2], "several positions with a non-empty cache need a mask"
        if causal:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            # query heads of a group as additional queries of one head: same values, several times faster on a CPU
            group_size = q.shape[1] // k.shape[1]
            rows = q.unflatten(1, (k.shape[1], group_size)).flatten(2, 3)
            if mask is not None:
                mask = mask.repeat(1, 1, group_size, 1)
            attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)
        return self.finish(residual, attended)


class RotaryAngles:
    """Cosine and sine of the target's rotary embedding, always in fp32 (not a module, so that no cast applies)."""

    def __init__(self, config: LlamaConfig):
        self._embedding = LlamaRotaryEmbedding(config)

    def frequencies(self) -> tuple[Tensor, float]:
        """Inverse frequencies [d/2] and the factor on cos and sin, as they are for short sequences."""
        return self._embedding.original_inv_freq.cpu(), float(self._embedding.attention_scaling)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [B, T, d] in fp32, of positions [B, T]."""
        self._embedding.to(positions.device)
        with torch.autocast(positions.device.type, enabled=False):
            return self._embedding(torch.empty(0, dtype=torch.float32, device=positions.device), positions)
