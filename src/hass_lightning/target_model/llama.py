"""Llama layers for decoding: the same computation as transformers with half as many operations.

The overhead per operation dominates a decoding step on a CPU. Projections with the same input are one matrix product,
query and key heads are rotated together, and a norm is one call. Weights are not copied: the parameters of the modules
become views of the joined weights. Training uses the modules.
Shapes: B sequences, N tokens, D hidden, H heads, G key/value heads, d head size (see the legend in types.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from hass_lightning.target_model.cache import KVCache
from hass_lightning.target_model.linear import FrozenWeight

Rotary = tuple[Tensor, Tensor]  # cos [B, N, 1, d], and sin with the sign of the rotated half


def joined(*layers: nn.Linear) -> FrozenWeight:
    """Join the weights of `layers` to `[sum of outputs, inputs]`; their parameters become views of the result."""
    if len(layers) == 1:
        return FrozenWeight(layers[0].weight)
    weight = FrozenWeight(torch.cat([layer.weight.detach() for layer in layers]), reorder=True)
    start = 0
    for layer in layers:
        layer.weight.data = weight.dense()[start : start + layer.out_features]
        start += layer.out_features
    return weight


def _projections(attention: Any, mlp: Any) -> tuple[tuple[nn.Linear, ...], ...]:
    """Return the modules that are joined in each of `LlamaLayer.weights`."""
    queries_keys_values = (attention.q_proj, attention.k_proj, attention.v_proj)
    return queries_keys_values, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


def rotary_of(cos: Tensor, sin: Tensor) -> Rotary:
    """Convert the angles of transformers, each [B, N, d], to the format of `rotate`."""
    half = sin.shape[-1] // 2
    return cos.unsqueeze(2), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(2)


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Apply the rotary embedding `x cos + rotate_half(x) sin` to [B, N, heads, d]; the sign is in sin instead of x."""
    cos, signed_sin = rotary
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * signed_sin


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Same as `LlamaRMSNorm`, including its rounding in half precision."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return weight * F.rms_norm(x.float(), weight.shape, None, epsilon).to(x.dtype)


def additive(mask: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor | None:
    """Convert a boolean mask [B, 1, N, keys] to an additive [B, 1, group_size · N, keys] for grouped query heads."""
    if mask is None:
        return None
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return added.repeat(1, 1, group_size, 1)


class LlamaLayer:
    """A decoder layer with joined weights; with `input_norm` None it is the layer of an EAGLE head."""

    def __init__(self, attention: Any, mlp: Any, input_norm: Any, post_norm: Any, *, num_heads: int, num_kv_heads: int):
        self.qkv, self.out, self.gate_up, self.down = (joined(*modules) for modules in _projections(attention, mlp))
        self.input_norm = None if input_norm is None else input_norm.weight.detach()
        self.post_norm, self.epsilon = post_norm.weight.detach(), post_norm.variance_epsilon
        self.act = mlp.act_fn
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = attention.head_dim

    def weights(self) -> tuple[FrozenWeight, ...]:
        """Return the four joined weights of the layer."""
        return self.qkv, self.out, self.gate_up, self.down

    def release(self, attention: Any, mlp: Any) -> None:
        """Keep only the packed copies and free the weights of the modules."""
        for weight, modules in zip(self.weights(), _projections(attention, mlp), strict=True):
            weight.release()
            for module in modules:
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)

    def restore(self, attention: Any, mlp: Any) -> None:
        """Restore the weights of the modules from the packed copies."""
        for weight, modules in zip(self.weights(), _projections(attention, mlp), strict=True):
            parts = weight.dense().split([module.out_features for module in modules])
            for module, part in zip(modules, parts, strict=True):
                module.weight = nn.Parameter(part.clone(), requires_grad=False)

    @property
    def group_size(self) -> int:
        """Number of query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    def __call__(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: KVCache, index: int, residual: Tensor | None = None
    ) -> Tensor:
        """Compute the hidden states [B, N, D] after the layer and write its keys and values to `cache`.

        The attention reads `x`. Its output is added to `residual` [B, N, D], which is `x` by default.
        `mask` comes from `additive`. Without a mask, several tokens use causal attention (and need an empty cache), and
        a single token attends to all.
        """
        normed = x if self.input_norm is None else rms_norm(x, self.input_norm, self.epsilon)
        x = (x if residual is None else residual) + self.out(self._attend(normed, rotary, mask, cache, index))
        gate, up = self.gate_up(rms_norm(x, self.post_norm, self.epsilon)).chunk(2, dim=-1)
        return x + self.down(self.act(gate) * up)

    def _attend(self, u: Tensor, rotary: Rotary, mask: Tensor | None, cache: KVCache, index: int) -> Tensor:
        batch, count, groups = u.shape[0], u.shape[1], self.num_kv_heads
        heads = self.qkv(u).unflatten(-1, (-1, self.head_dim))  # [B, N, H + 2G, d]
        rotated = rotate(heads[:, :, : self.num_heads + groups], rotary)
        queries, new_keys = rotated[:, :, : self.num_heads], rotated[:, :, self.num_heads :].transpose(1, 2)
        keys, values = cache.update(new_keys, heads[:, :, self.num_heads + groups :].transpose(1, 2), index)
        if mask is None and count > 1:
            assert keys.shape[2] == count, "several tokens with a non-empty cache need a mask"
            attended = F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys, values, is_causal=True, enable_gqa=self.group_size > 1
            )
            return attended.transpose(1, 2).flatten(2)
        # query heads of a group as additional queries of one head: same values, several times faster on a CPU
        packed = queries.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).reshape(batch, groups, -1, self.head_dim)
        attended = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask)
        return attended.unflatten(2, (-1, count)).permute(0, 3, 1, 2, 4).reshape(batch, count, -1)


class LlamaStep:
    """Forward pass of a `LlamaForCausalLM` from token ids to features, with a `KVCache`."""

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

    @property
    def extra_bytes(self) -> int:
        """Additional memory in bytes of the packed copies."""
        return sum(weight.extra_bytes for layer in self.layers for weight in layer.weights())

    @property
    def released(self) -> bool:
        """Whether the weights of the model have been freed."""
        return self.layers[0].qkv.plain is None

    def release(self) -> bool:
        """Free the plain weights if only packed copies are used; return whether this is the case."""
        if not all(weight.choice.always_packed for layer in self.layers for weight in layer.weights()):
            return False
        for own, layer in zip(self.layers, self.base.layers, strict=True):
            own.release(layer.self_attn, layer.mlp)
        return True

    def restore(self, model: LlamaForCausalLM) -> None:
        """Restore the weights of `model`, a copy of the released model."""
        for own, layer in zip(self.layers, model.model.layers, strict=True):
            own.restore(layer.self_attn, layer.mlp)

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model` is a plain Llama (LLaMA 2 and 3, Vicuna, SmolLM2, …), which this class reimplements."""
        if type(model) is not LlamaForCausalLM or model.config._attn_implementation != "sdpa":
            return False
        if hasattr(model, "hf_device_map") or any(each.is_meta for each in model.parameters()):
            return False  # layers on several devices, or without weights
        linears = [module for name, module in model.model.named_modules() if name.endswith("_proj")]
        # quantized layers and adapters have other classes; no published Llama has biases
        return all(type(each) is nn.Linear and each.bias is None for each in linears)

    def __call__(
        self, input_ids: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None, kept: tuple[int, ...] = ()
    ) -> list[Tensor]:
        """Compute the inputs of the layers `kept`, ascending, and the last hidden state after the final norm.

        Each is [B, N, D]. Other arguments are those of `TargetModel.forward`.
        """
        x = F.embedding(input_ids, self.base.embed_tokens.weight)
        rotary = rotary_of(*self.base.rotary_emb(x, position_ids=positions))
        mask = cache.causal_mask(x.shape[1]) if mask is None else mask
        added = additive(mask, self.layers[0].group_size, x.dtype)
        states = []
        for index, layer in enumerate(self.layers):
            if index in kept:
                states.append(x)
            x = layer(x, rotary, added, cache, index)
        return [*states, rms_norm(x, self.base.norm.weight, self.base.norm.variance_epsilon)]
