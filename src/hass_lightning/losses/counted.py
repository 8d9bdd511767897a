"""Which loss positions count in each alignment step.

In step j, the row at position t belongs to the chain that starts at its root, position t-(j-1), and step j-1 of that
chain is the row at t-1. Two options leave rows out: those without a root, and GRIFFIN's alive mask (arXiv 2502.11018).
Shapes: B batch, T positions, R loss positions, J alignment steps, Vd draft vocabulary (see the legend in types.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


class CountedRows:
    """The loss positions that count in each step, known for step j once the logits of step j-1 were seen.

    Args:
        mask: bool [B, T], the loss positions; all tensors over R follow their order.
        depth: number of steps J.
        drop_edge: leave out rows at t < j-1, whose chain would start before the sequence.
        alive: leave a row out of step j once its token was not among this many most probable draft tokens in an earlier
            step of its chain (None: never). Earlier rows that are no loss positions count as right.
        tokens: [R], draft index of the text's token that each row predicts, -1 outside the draft vocabulary.
    """

    def __init__(self, mask: Tensor, depth: int, drop_edge: bool, alive: int | None, tokens: Tensor):
        position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask]  # [R]
        number = torch.full(mask.shape, -1, dtype=torch.int64, device=mask.device)
        number[mask] = torch.arange(position.shape[0], device=mask.device)
        self.previous = number.roll(1, dims=1)[mask]  # [R], row at t-1, -1 if it is no loss position
        self.previous[position == 0] = -1
        self.alive, self.tokens = alive, tokens
        steps = torch.arange(depth, device=mask.device)[:, None]
        self.rooted = position >= steps if drop_edge else torch.ones_like(position >= steps)  # [J, R]
        self.right = torch.ones_like(self.rooted)  # [J, R] whether the chain is alive after each step

    def at(self, step: int, rows: slice) -> Tensor:
        """Whether `rows` count in `step` (from 0), bool [rows]."""
        return self.rooted[step, rows] & self._alive(step, rows)

    def _alive(self, step: int, rows: slice) -> Tensor:
        previous = self.previous[rows]
        return (
            self.right[step - 1, previous] | (previous < 0) if step > 0 else torch.ones_like(previous, dtype=torch.bool)
        )

    def see(self, step: int, rows: slice, logits: Tensor) -> None:
        """Note which of `rows` have their token among the draft's most probable ones.

        Args:
            step: from 0. The steps of the rows before, and the steps before of these rows, were seen.
            rows: consecutive loss positions.
            logits: [rows, Vd] of this step.
        """
        if self.alive is None:
            return
        tokens = self.tokens[rows]
        own = logits.gather(-1, tokens.clamp(min=0)[:, None])
        right = ((logits > own).sum(-1) < self.alive) & (tokens >= 0)
        self.right[step, rows] = right & self._alive(step, rows)
