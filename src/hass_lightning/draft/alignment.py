"""Harmonized context alignment (HCA, paper §3.2): several training steps that see what decoding will see.

Step j runs the head on features that are j-1 drafts deep. Row t then sees, for each position 0 … t exactly once, the
true feature (positions ≤ t-(j-1)) or the head's own estimate from step i (position t-(j-1-i)): hass.md §2.2.

Shapes: B batch, T rows, D hidden, H heads, G key/value heads, d head size (types.py has the legend).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hass_lightning.draft.eagle import EagleDraft
from hass_lightning.schedules import Scheduled, scheduled


@dataclass(frozen=True)
class Alignment:
    """How training is aligned with decoding.

    Args:
        depth: number of alignment steps; 1 is EAGLE's own training, 3 the paper's choice. May be a schedule (`at`).
        step_weights: weight of each step's loss, default 1 each (the official code sums the steps); a number β weighs
            step j with β^(j-1) (the paper re-weights its steps, too).
        mask: `exact`, or `leaky` as in the official code, which puts masked scores at 0 instead of -inf before the
            softmax (hass.md §7.1); for the ablation only.
        gradient: `detach` the features between the steps as the official code does, or `bptt`: back-propagate through
            them as well, which truncates back-propagation through time at `depth` steps.
        checkpoint: recompute the layer in the backward instead of keeping its activations (less memory, more time).
    """

    depth: Any = 3
    step_weights: tuple[float, ...] | float | None = None
    mask: Literal["exact", "leaky"] = "exact"
    gradient: Literal["detach", "bptt"] = "detach"
    checkpoint: bool = False

    def __post_init__(self):
        greatest = max(int(value) for value in self.depths.values)
        if self.mask not in ("exact", "leaky"):
            raise ValueError(f"model.alignment.mask={self.mask} is neither exact nor leaky.")
        if self.gradient not in ("detach", "bptt"):
            raise ValueError(f"model.alignment.gradient={self.gradient} is neither detach nor bptt.")
        if isinstance(self.step_weights, int | float):
            if self.step_weights <= 0:
                raise ValueError(f"model.alignment.step_weights={self.step_weights}: as β it must be above 0.")
            weights = tuple(float(self.step_weights) ** step for step in range(greatest))
            object.__setattr__(self, "step_weights", weights)
        elif self.step_weights is not None:
            object.__setattr__(self, "step_weights", tuple(float(weight) for weight in self.step_weights))
            if len(self.step_weights) != greatest:
                raise ValueError(
                    f"model.alignment.step_weights has {len(self.step_weights)} values for depth {greatest}: give "
                    "one a step, a number β for β^(step-1), or null for equal weights."
                )

    @property
    def depths(self) -> Scheduled:
        """The depth as a function of progress."""
        return scheduled("model.alignment.depth", self.depth, least=1, whole=True)

    def at(self, progress: float) -> Alignment:
        """The alignment with its depth at `progress` (0 to 1) of the run."""
        if not isinstance(self.depth, Mapping):
            return self
        depth = int(self.depths.at(progress))
        weights = self.step_weights and self.step_weights[:depth]  # type: ignore[index]
        return replace(self, depth=depth, step_weights=weights)

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight a step."""
        return self.step_weights or (1.0,) * self.depth  # type: ignore[return-value]


def visible(num_rows: int, num_bands: int, band: int, device: torch.device | str = "cpu") -> Tensor:
    """Which columns of `band` a row sees in the step with `num_bands` bands: bool [T, T] (row, column)."""
    row = torch.arange(num_rows, device=device)[:, None]
    column = torch.arange(num_rows, device=device)[None, :]
    if band == 0:
        return column <= row - (num_bands - 1)
    return column == row - (num_bands - 1 - band)


def _shift(x: Tensor, count: int) -> Tensor:
    """Rows moved `count` down along the token axis (-2), zeros above."""
    if count == 0:
        return x
    return torch.cat([torch.zeros_like(x[..., :count, :]), x[..., :-count, :]], dim=-2)


def banded_attention(queries: Tensor, bands: list[tuple[Tensor, Tensor]], leaky: bool = False) -> Tensor:
    """Attention of step `len(bands)`: causal on the true features, one diagonal a predicted band, one softmax.

    Args:
        queries: [B, H, T, d] of the newest band. bands: keys and values, each [B, G, T, d], oldest (true) first.
        leaky: the official code's softmax (hass.md §7.1).

    Returns:
        [B, H, T, d].
    """
    batch, heads, num_rows, head_dim = queries.shape
    groups = bands[0][0].shape[1]
    q = queries.reshape(batch, groups, heads // groups, num_rows, head_dim) * head_dim**-0.5
    if leaky:
        return _leaky_attention(q, bands).reshape(queries.shape)
    row = torch.arange(num_rows, device=q.device)
    true_keys, true_values = bands[0]
    causal = visible(num_rows, len(bands), 0, q.device)
    # finfo.min, not -inf: a row without any true feature (t < j-1) must not turn into NaN in the backward
    lowest = torch.finfo(q.dtype).min
    scores = [(q @ true_keys.unsqueeze(2).transpose(-1, -2)).masked_fill(~causal, lowest)]  # [B, G, H/G, T, T]
    values = []
    for band in range(1, len(bands)):
        shift = len(bands) - 1 - band
        keys = _shift(bands[band][0], shift).unsqueeze(2)
        diagonal = (q * keys).sum(-1).masked_fill(row < shift, lowest)
        scores.append(diagonal.unsqueeze(-1))
        values.append(_shift(bands[band][1], shift).unsqueeze(2))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = torch.cat(scores, dim=-1).softmax(-1, dtype=dtype).to(q.dtype)
    output = weights[..., :num_rows] @ true_values.unsqueeze(2)
    for number, value in enumerate(values):
        output = output + weights[..., num_rows + number, None] * value
    return output.reshape(queries.shape)


def _leaky_attention(q: Tensor, bands: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The official softmax: the bands' masked scores are summed, masked columns count as exp(0), weights are masked."""
    num_rows = q.shape[-2]
    masks = [visible(num_rows, len(bands), band, q.device) for band in range(len(bands))]
    pairs = list(zip(bands, masks, strict=True))
    scores = sum((q @ keys.unsqueeze(2).transpose(-1, -2)) * mask for (keys, _), mask in pairs)
    weights = scores.softmax(-1)  # type: ignore[union-attr]
    return sum((weights * mask) @ values.unsqueeze(2) for (_, values), mask in pairs)  # type: ignore[return-value]


def needed_rows(rows: Tensor, depth: int) -> Tensor:
    """Rows [B, T] whose estimates the wanted `rows` depend on: themselves and the depth-1 rows before each."""
    needed = rows.clone()
    for distance in range(1, depth):
        needed[:, :-distance] |= rows[:, distance:]
    return needed


def _step(
    draft: EagleDraft,
    u: Tensor,
    rotary: tuple[Tensor, Tensor],
    bands: list[tuple[Tensor, Tensor]],
    alignment: Alignment,
    rows: Tensor | None,
) -> Tensor:
    """One alignment step from its fused input `u` [B, T, D] and all bands: the estimates [B, T, D]."""
    queries = draft.layer.self_attn.queries(u, rotary)
    return draft.layer.finish(u, banded_attention(queries, bands, alignment.mask == "leaky"), rows)


def unroll(
    draft: EagleDraft, embeddings: Tensor, features: Tensor, alignment: Alignment, rows: Tensor | None = None
) -> Iterator[Tensor]:
    """The head's features f^1 … f^J, one alignment step after the other.

    Bands are projected once and keep their graph, so that one backward of the summed step losses has the gradient of
    the official code's J backwards. Between the steps features are detached, unless `alignment.gradient` is bptt.

    Args:
        embeddings: [B, T, D] of tokens t+1. features: [B, T, D], the target's, of tokens t.
        rows: bool [B, T], the rows whose estimates are wanted (None: all). Prompts and padding then skip the larger
            part of the layer; what is yielded for other rows means nothing.

    Yields:
        [B, T, D], the estimate of feature t+1 by a draft j deep.
    """
    if rows is not None:
        rows = needed_rows(rows, alignment.depth)
    layer = draft.layer
    positions = torch.arange(features.shape[1], device=features.device)[None]
    rotary = draft.rotary(positions)
    u = draft.fuse(embeddings, features)
    bands: list[tuple[Tensor, Tensor]] = []
    for step in range(alignment.depth):
        bands.append(layer.self_attn.keys_values(u, rotary))
        if alignment.checkpoint and torch.is_grad_enabled():
            estimate = checkpoint(_step, draft, u, rotary, list(bands), alignment, rows, use_reentrant=False)
        else:
            estimate = _step(draft, u, rotary, bands, alignment, rows)
        yield estimate
        if step + 1 < alignment.depth:
            own = torch.cat([features[:, :1].to(estimate.dtype), estimate[:, :-1]], dim=1)
            u = draft.fuse(embeddings, own if alignment.gradient == "bptt" else own.detach())
