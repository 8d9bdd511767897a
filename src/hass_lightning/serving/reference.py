"""A second implementation of the EAGLE head, from its exported files alone: what the gate compares against.

It shares no code with `draft/` (nor with transformers): a wrong name, layout, rope or order would differ here.
Shapes: T rows, D hidden, H heads, G key/value heads, d head size, V vocabulary (types.py has the legend).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hass_lightning.target import TargetHead


def rotary_frequencies(config: dict, head_dim: int) -> Tensor:
    """Inverse frequencies [d/2] from `rope_theta` and `rope_scaling` (none, linear, llama3).

    Raises:
        ValueError: another kind of scaling.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = float(config["rope_theta"]) ** -steps
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    kind, factor = scaling["rope_type"], scaling.get("factor", 1.0)
    if kind in ("default", "linear"):
        return frequencies / factor
    if kind != "llama3":
        raise ValueError(f"rope_type={kind} is not checked by the export gate, which knows default, linear and llama3.")
    # Llama 3.1: long waves are slowed down by `factor`, short ones kept, those between are interpolated
    waves = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # turns in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


class ReferenceHead:
    """The head in a folder, computed in float32, one sequence at a time, nothing cached."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.frequencies = rotary_frequencies(self.config, self.config["head_dim"])

    def _rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * self.frequencies  # [T, d/2]
        cos, sin = angles.cos().float(), angles.sin().float()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def features(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """[T, D] of tokens t+1 and [T, D] of tokens t to the estimate [T, D] of features t+1."""
        weight = {name.removeprefix("layers.0."): tensor for name, tensor in self.tensors.items()}
        rows, d = embeddings.shape[0], self.config["head_dim"]
        u = torch.cat([embeddings, features], dim=-1) @ weight["fc.weight"].T + weight.get("fc.bias", torch.zeros(1))
        q, k, v = ((u @ weight[f"self_attn.{name}_proj.weight"].T).view(rows, -1, d).transpose(0, 1) for name in "qkv")
        q, k = self._rotate(q), self._rotate(k)
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))  # [H, T, d]
        scores = q @ k.transpose(1, 2) / math.sqrt(d)
        future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        y = u + attended.transpose(0, 1).reshape(rows, -1) @ weight["self_attn.o_proj.weight"].T
        scale = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        normed = y * scale * weight["post_attention_layernorm.weight"]
        gate = torch.nn.functional.silu(normed @ weight["mlp.gate_proj.weight"].T)
        return y + (gate * (normed @ weight["mlp.up_proj.weight"].T)) @ weight["mlp.down_proj.weight"].T

    def chain(self, head: TargetHead, token_ids: list[int], features: Tensor, depth: int) -> list[int]:
        """`depth` greedy drafts after `token_ids` [T+1], whose first T tokens have the target's `features` [T, D]."""
        token_ids, drafted = list(token_ids), []
        for _ in range(depth):
            own = self.features(head.embed(torch.tensor(token_ids[1:])), features)[-1:]
            drafted.append(int(head.logits(own).argmax()))
            token_ids.append(drafted[-1])
            features = torch.cat([features, own])
        return drafted
