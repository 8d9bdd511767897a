"""Harmonized context alignment (HCA, paper §3.2): several training steps that see what decoding will see.

Step j runs the head on features that are j-1 drafts deep. Row t then sees, for each position 0 … t exactly once, the
true feature (positions ≤ t-(j-1)) or the head's own estimate from step i (position t-(j-1-i)): hass.md §2.2.

Shapes: B batch, T rows, D hidden (types.py has the legend).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hass_lightning.draft.attention import Band, banded_attention
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
    bands: list[Band],
    alignment: Alignment,
    rows: Tensor | None,
) -> Tensor:
    """One alignment step from its fused input `u` [B, T, D] and all bands: the estimates [B, T, D]."""
    queries = draft.layer.self_attn.queries(u, rotary)
    attended = banded_attention(queries, bands, draft.attention, alignment.mask == "leaky")
    return draft.layer.finish(u, attended, rows)


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
    bands: list[Band] = []
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
