"""Reference implementations of the heads that read exported files, for the export checks.

They share no code with `draft/` or transformers, so a wrong name, layout, rope or order leads to different values.
Shapes: T positions, D hidden, W width of the target's features, H heads, G key/value heads, d head size, V vocabulary
(see the legend in types.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hass_lightning.target_model import TargetHead


def rope_readings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rope that engines read from a config, by the keys that they read.

    `rope_parameters` is read by vLLM with transformers 5, and top-level keys replace missing values. `rope_theta and
    rope_scaling` are read by SGLang, and by vLLM with transformers 4; for both, `partial_rotary_factor` is top-level.
    """
    root = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    neutral = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    scaling = dict(config.get("rope_scaling") or {})
    old = {key: value for key, value in scaling.items() if key not in ("type", "rope_theta", "partial_rotary_factor")}
    readings = {"rope_theta and rope_scaling": neutral | {"rope_type": scaling.get("type", "default")} | old | root}
    if config.get("rope_parameters"):
        readings["rope_parameters"] = neutral | root | config["rope_parameters"]
    return readings


def rotary_frequencies(rope: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Return inverse frequencies [d/2] (0 for dimensions that are not rotated), and the factor of cos and sin.

    Raises:
        ValueError: if engines compute this kind of rope differently.
    """
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    steps = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
    frequencies, scale = float(rope["rope_theta"]) ** -steps, 1.0
    kind, factor = rope["rope_type"], float(rope.get("factor") or 1.0)
    if kind == "linear":
        frequencies = frequencies / factor
    elif kind == "llama3":
        # Llama 3.1: low frequencies are divided by `factor`, high ones are kept, and those between are interpolated
        waves = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # turns in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((waves - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    elif kind == "yarn":
        # arXiv 2309.00071: the same with bounds given as dimensions, and with scaled attention
        def dimension(turns: float) -> float:
            length = rope["original_max_position_embeddings"]
            return rotated * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

        low = max(math.floor(dimension(rope.get("beta_fast") or 32)), 0)
        high = min(math.ceil(dimension(rope.get("beta_slow") or 1)), rotated - 1)
        ramp = (torch.arange(rotated // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)
        slowed = ramp.clamp(0, 1)
        frequencies = frequencies * (1 - slowed + slowed / factor)
        scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    elif kind != "default":
        raise ValueError(
            f"engines compute rope_type={kind} differently (they agree on default, linear, llama3 and yarn): train the "
            "head again, which sets one of these."
        )
    still = torch.zeros(head_dim // 2 - len(frequencies), dtype=torch.float64)
    return torch.cat([frequencies, still]), scale


class ReferenceHead:
    """The EAGLE head in an exported folder, computed in float32 for one sequence, without a cache."""

    prefix = "layers.0."  # prefix of the layer's tensors

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        readings = rope_readings(self.config)
        rope = readings.get("rope_parameters") or readings["rope_theta and rope_scaling"]
        self.frequencies, self.scale = rotary_frequencies(rope, self.config["head_dim"])

    def _rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * self.frequencies  # [T, d/2]
        cos, sin = (angles.cos() * self.scale).float(), (angles.sin() * self.scale).float()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _bias(self, projection: str) -> Tensor:
        """Return the bias that an engine adds: `attention_bias` sets all; `qkv_bias` overrides it for q, k and v."""
        wanted = self.config.get("attention_bias", False)
        if projection != "o_proj":
            wanted = self.config.get("qkv_bias", wanted)
        return self.tensors[f"{self.prefix}self_attn.{projection}.bias"] if wanted else torch.zeros(1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.tensors[name]

    def read(self, features: Tensor) -> Tensor:
        """Return the input features [T, D] of the head, given the target's features [T, W]."""
        return features[:, -self.config["hidden_size"] :]

    def inputs(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the attention and the residual [T, D], given embeddings and features [T, D]."""
        bias = self.tensors.get("fc.bias", torch.zeros(1))
        u = torch.cat([embeddings, features], dim=-1) @ self.tensors["fc.weight"].T + bias
        return u, u

    def logits(self, head: TargetHead, features: Tensor) -> Tensor:
        """Compute logits [T, Vd] of predicted features [T, D]."""
        return head.logits(features)

    def token_id(self, index: int) -> int:
        """Return the token id of a draft index."""
        return index

    def features(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Predict features t+1 [T, D] from embeddings [T, D] of tokens t+1 and features [T, D] of tokens t."""
        weight = {name.removeprefix(self.prefix): tensor for name, tensor in self.tensors.items()}
        rows, d = embeddings.shape[0], self.config["head_dim"]
        u, residual = self.inputs(embeddings, features)
        projected = [u @ weight[f"self_attn.{name}_proj.weight"].T + self._bias(f"{name}_proj") for name in "qkv"]
        q, k, v = (each.view(rows, -1, d).transpose(0, 1) for each in projected)
        q, k = self._rotate(q), self._rotate(k)
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))  # [H, T, d]
        scores = q @ k.transpose(1, 2) / math.sqrt(d)
        future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        y = (
            residual
            + attended.transpose(0, 1).reshape(rows, -1) @ weight["self_attn.o_proj.weight"].T
            + self._bias("o_proj")
        )
        normed = self._norm(y, f"{self.prefix}post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(normed @ weight["mlp.gate_proj.weight"].T)
        return y + (gate * (normed @ weight["mlp.up_proj.weight"].T)) @ weight["mlp.down_proj.weight"].T

    def chain(self, head: TargetHead, token_ids: list[int], features: Tensor, depth: int) -> list[int]:
        """Return `depth` greedy draft tokens after `token_ids` [T+1], whose first T tokens have `features` [T, W]."""
        token_ids, drafted = list(token_ids), []
        features = self.read(features)
        for _ in range(depth):
            own = self.features(head.embed(torch.tensor(token_ids[1:])), features)[-1:]
            drafted.append(self.token_id(int(self.logits(head, own).argmax())))
            token_ids.append(drafted[-1])
            features = torch.cat([features, own])
        return drafted


class Eagle3Reference(ReferenceHead):
    """The EAGLE-3 head in an exported folder, with its own LM head and draft vocabulary."""

    prefix = "midlayer."

    def __init__(self, folder: Path):
        super().__init__(folder)
        ids = folder / "draft_vocab.safetensors"  # only in the layout of hass_lightning
        offsets = self.tensors.get("d2t", torch.zeros(self.tensors["lm_head.weight"].shape[0])).long()
        self.token_ids = load_file(ids)["token_ids"] if ids.exists() else torch.arange(len(offsets)) + offsets

    def read(self, features: Tensor) -> Tensor:
        """Project the target's layers [T, W - D] with `fc`."""
        return features[:, : -self.config["hidden_size"]] @ self.tensors["fc.weight"].T

    def inputs(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed embedding joined with the normed feature, and the feature as the residual."""
        normed = self._norm(embeddings, "midlayer.input_layernorm.weight")
        return torch.cat([normed, self._norm(features, "midlayer.hidden_norm.weight")], dim=-1), features

    def logits(self, head: TargetHead, features: Tensor) -> Tensor:
        """Compute logits [T, Vd] with the file's LM head, after its final norm."""
        return self._norm(features, "norm.weight") @ self.tensors["lm_head.weight"].T

    def token_id(self, index: int) -> int:
        """Return the token id of a draft index in the file's draft vocabulary."""
        return int(self.token_ids[index])
