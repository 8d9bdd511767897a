"""Llama layers for decoding: what transformers computes in half as many operations, whose cost is most of a step.

Projections that read the same input are one product, query and key heads are rotated together, norms are one call. The
weights are not copied: a module's own parameters become views of the joined ones. Training keeps the modules' code.
Shapes: B rows, N tokens, D hidden, H heads, G key/value heads, d head size (types.py has the legend).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from hass_lightning.target.cache import KVCache
from hass_lightning.target.linear import inputs_first, linear

Rotary = tuple[Tensor, Tensor]  # cos [B, N, 1, d], and sin with the sign of the rotated half


def joined(*layers: nn.Linear) -> Tensor:
    """The weights of `layers` one below the other, `[sum of outputs, inputs]`; their parameters become views of it."""
    weight = inputs_first(torch.cat([layer.weight.detach() for layer in layers]))
    start = 0
    for layer in layers:
        layer.weight.data = weight[start : start + layer.out_features]
        start += layer.out_features
    return weight


def rotary_of(cos: Tensor, sin: Tensor) -> Rotary:
    """Transformers' angles [B, N, d] in the form that `rotate` takes."""
    half = sin.shape[-1] // 2
    return cos.unsqueeze(2), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(2)


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of [B, N, heads, d]: `x cos + rotate_half(x) sin`, the sign moved from x to sin."""
    cos, signed_sin = rotary
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * signed_sin


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `LlamaRMSNorm`, its rounding in half precision included."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return weight * F.rms_norm(x.float(), weight.shape, None, epsilon).to(x.dtype)


def additive(mask: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask [B, 1, N, keys] as what is added to the scores of `group_size` heads packed into one."""
    if mask is None:
        return None
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return added.repeat(1, 1, group_size, 1)


class LlamaLayer:
    """One decoder layer over joined weights; without `input_norm` it is the layer of an EAGLE head."""

    def __init__(self, attention: Any, mlp: Any, input_norm: Any, post_norm: Any, *, num_heads: int, num_kv_heads: int):
        self.qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj.weight.detach()
        self.gate_up = joined(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj.weight.detach()
        self.input_norm = None if input_norm is None else input_norm.weight.detach()
        self.post_norm, self.epsilon = post_norm.weight.detach(), post_norm.variance_epsilon
        self.act = mlp.act_fn
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = attention.head_dim

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def __call__(self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: KVCache, index: int) -> Tensor:
        """Hidden states [B, N, D] after the layer; its keys and values are written to `cache`.

        `mask` is `additive`'s; without one N tokens see each other causally (on an empty cache), one sees all.
        """
        normed = x if self.input_norm is None else rms_norm(x, self.input_norm, self.epsilon)
        x = x + linear(self._attend(normed, rotary, mask, cache, index), self.out)
        gate, up = linear(rms_norm(x, self.post_norm, self.epsilon), self.gate_up).chunk(2, dim=-1)
        return x + linear(self.act(gate) * up, self.down)

    def _attend(self, u: Tensor, rotary: Rotary, mask: Tensor | None, cache: KVCache, index: int) -> Tensor:
        batch, count, groups = u.shape[0], u.shape[1], self.num_kv_heads
        heads = linear(u, self.qkv).unflatten(-1, (-1, self.head_dim))  # [B, N, H + 2G, d]
        rotated = rotate(heads[:, :, : self.num_heads + groups], rotary)
        queries, new_keys = rotated[:, :, : self.num_heads], rotated[:, :, self.num_heads :].transpose(1, 2)
        keys, values = cache.update(new_keys, heads[:, :, self.num_heads + groups :].transpose(1, 2), index)
        if mask is None and count > 1:
            assert keys.shape[2] == count, "several tokens on top of a cache need a mask"
            attended = F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys, values, is_causal=True, enable_gqa=self.group_size > 1
            )
            return attended.transpose(1, 2).flatten(2)
        # the query heads of a group as more rows of one head: same numbers, several times as fast on a CPU
        packed = queries.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).reshape(batch, groups, -1, self.head_dim)
        attended = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask)
        return attended.unflatten(2, (-1, count)).permute(0, 3, 1, 2, 4).reshape(batch, count, -1)


class LlamaStep:
    """The forward of a plain `LlamaForCausalLM`, from token ids to features, on a `KVCache`."""

    def __init__(self, model: LlamaForCausalLM):
        self.base = model.model
        config = model.config
        self.layers = [
            LlamaLayer(
                layer.self_attn,
                layer.mlp,
                layer.input_layernorm,
                layer.post_attention_layernorm,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            )
            for layer in self.base.layers
        ]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model` is a plain Llama (LLaMA 2 and 3, Vicuna, SmolLM2, …), whose code this repeats."""
        if type(model) is not LlamaForCausalLM or model.config._attn_implementation != "sdpa":
            return False
        if hasattr(model, "hf_device_map") or any(each.is_meta for each in model.parameters()):
            return False  # layers on several devices, or none at all
        linears = [module for name, module in model.model.named_modules() if name.endswith("_proj")]
        # quantised or adapted layers are other classes; biases are in no published Llama
        return all(type(each) is nn.Linear and each.bias is None for each in linears)

    def __call__(self, input_ids: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Features [B, N, D]; arguments as in `TargetModel.forward`."""
        x = F.embedding(input_ids, self.base.embed_tokens.weight)
        rotary = rotary_of(*self.base.rotary_emb(x, position_ids=positions))
        mask = cache.causal_mask(x.shape[1]) if mask is None else mask
        added = additive(mask, self.layers[0].group_size, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, added, cache, index)
        return rms_norm(x, self.base.norm.weight, self.base.norm.variance_epsilon)
