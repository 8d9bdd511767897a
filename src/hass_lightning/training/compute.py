"""Training compute of a run in loss positions and FLOPs, computed before the run starts.

This is possible because batch n is a function of (seed, n). A compute budget is converted to a number of steps, so the
learning rate and every schedule end when the budget is used up.
Shapes: B batch, T tokens, R loss positions, D hidden, J alignment steps, Vd draft vocabulary (see the legend in
types.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as L

from hass_lightning.data.order import BatchOrder
from hass_lightning.draft.alignment import Alignment, needed_rows
from hass_lightning.draft.head import Products
from hass_lightning.types import Tokens


@dataclass(frozen=True)
class BatchShape:
    """Sizes that determine the cost of a batch: B, T (padded), R, and the number of predicted features needed."""

    batch: int
    length: int
    marked: int
    needed: int


def step_flops(products: Products, vocab_size: int, shape: BatchShape, alignment: Alignment) -> float:
    """Return the FLOPs of one forward and backward pass of the head including its LM head.

    Only matrix products are counted, with 2 FLOPs per multiply-add.

    Args:
        products: sizes of the head's matrix products.
        vocab_size: Vd.
        shape: sizes of the batch.
        alignment: the alignment, with a number as its depth.
    """
    rows = shape.batch * (shape.length - 1)
    read, fuse, projections = (2 * rows * each for each in (products.read, products.fuse, products.projections))
    attention = 4 * shape.batch * (shape.length - 1) ** 2 * products.queries
    rest = 2 * shape.needed * products.rest
    logits = 2 * shape.marked * products.hidden * vocab_size
    # the backward pass costs twice the forward pass: gradients of weights and of inputs. The inputs of fc and the
    # weight of a frozen LM head need no gradient
    step = 2 * fuse + 3 * (projections + rest) + (3 if products.trains_lm_head else 2) * logits
    # the exact mask computes one band as a full matrix (the others are diagonals), the leaky mask computes every band
    # so
    num_whole = sum(range(1, alignment.depth + 1)) if alignment.mask == "leaky" else alignment.depth
    # plus the target's logits, computed once, and its features, read once
    total = alignment.depth * step + 3 * num_whole * attention + logits + 2 * read
    if alignment.gradient == "bptt":
        total += (alignment.depth - 1) * fuse
    if alignment.checkpoint:
        total += alignment.depth * (2 * rows * products.hidden * products.queries + rest) + num_whole * attention
    return float(total)


class RunCost:
    """Cost of the first n optimizer steps of a run, for any n.

    Args:
        sequences: the training sequences.
        batch_size: batch size over all processes.
        seed: seed of the order of the sequences.
        accumulate: number of batches per step.
        products: sizes of the head's matrix products.
        vocab_size: Vd.
        alignment: the alignment; its depth may be a schedule.
    """

    def __init__(
        self, sequences: Sequence[Tokens], batch_size: int, seed: int, accumulate: int, products: Products,
        vocab_size: int, alignment: Alignment,
    ):  # fmt: skip
        self.sequences, self.accumulate = sequences, accumulate
        self.products, self.vocab_size, self.alignment = products, vocab_size, alignment
        order = BatchOrder([len(sequence) for sequence in sequences], batch_size, seed, sys.maxsize)
        self._order = iter(order)
        self._batches: list[list[int]] = []
        self._positions: dict[int, int] = {}  # by batch
        self._needed: dict[tuple[int, int], int] = {}  # by sequence and depth
        self._flops: dict[tuple[int, int], float] = {}  # by batch and depth

    def batches(self, step: int) -> range:
        """Return the batch numbers of a step."""
        last = (step + 1) * self.accumulate
        while len(self._batches) < last:
            self._batches.append([index for _, index in next(self._order)])
        return range(last - self.accumulate, last)

    def step(self, number: int, progress: float = 0.0, alignment: Alignment | None = None) -> tuple[int, float]:
        """Return (loss positions over all processes, FLOPs) of one step at `progress`, with `alignment` if given."""
        now = (alignment or self.alignment).at(progress)
        batches = self.batches(number)
        return sum(self._loss_positions(batch) for batch in batches), sum(
            self._batch_flops(batch, now) for batch in batches
        )

    def tokens(self, num_steps: int) -> int:
        """Return the number of loss positions of the first `num_steps` steps."""
        return sum(self._loss_positions(batch) for step in range(num_steps) for batch in self.batches(step))

    def flops(self, num_steps: int, alignment: Alignment | None = None) -> float:
        """Return the FLOPs of a run of `num_steps` steps."""
        return sum(self.step(number, number / num_steps, alignment)[1] for number in range(num_steps))

    def _loss_positions(self, batch: int) -> int:
        if batch not in self._positions:
            self._positions[batch] = sum(int(self.sequences[i].loss_mask[:-1].sum()) for i in self._batches[batch])
        return self._positions[batch]

    def _needed_rows(self, index: int, depth: int) -> int:
        if (index, depth) not in self._needed:
            mask = self.sequences[index].loss_mask[None, :-1]
            self._needed[index, depth] = int(needed_rows(mask, depth).sum())
        return self._needed[index, depth]

    def _batch_flops(self, batch: int, alignment: Alignment) -> float:
        if (batch, alignment.depth) not in self._flops:
            indices = self._batches[batch]
            shape = BatchShape(
                len(indices),
                max(len(self.sequences[index]) for index in indices),
                self._loss_positions(batch),
                sum(self._needed_rows(index, alignment.depth) for index in indices),
            )
            self._flops[batch, alignment.depth] = step_flops(self.products, self.vocab_size, shape, alignment)
        return self._flops[batch, alignment.depth]

    def steps_within(
        self, limit: int | None, tokens: float | None = None, flops: float | None = None, match_depth: int | None = None
    ) -> int | None:
        """Return the number of steps that fit the budget, at least 1; None without any limit.

        Args:
            limit: maximum number of steps.
            tokens: maximum number of loss positions.
            flops: maximum number of FLOPs.
            match_depth: use the FLOPs that `limit` steps take at this depth as the budget; `limit` itself is then
                ignored.

        Raises:
            ValueError: `match_depth` without `limit`, or a budget that is not positive.
        """
        if any(value is not None and value <= 0 for value in (tokens, flops, match_depth)):
            raise ValueError(f"compute.tokens={tokens}, flops={flops}, match_depth={match_depth} must be positive.")
        if match_depth is not None:
            if limit is None:
                raise ValueError(
                    f"compute.match_depth={match_depth} uses the FLOPs of trainer.max_epochs or max_steps at that "
                    "depth: set one of them."
                )
            matched = self.flops(limit, replace(self.alignment, depth=int(match_depth), step_weights=None))
            flops, limit = min(matched, flops or matched), None
        found = [] if limit is None else [limit]
        if tokens is not None:
            found.append(_largest(self.tokens, tokens, limit))
        if flops is not None:
            found.append(_largest(self.flops, flops, limit))
        return min(found, default=None)


def _largest(cost: Callable[[int], float], budget: float, limit: int | None) -> int:
    """Return the largest n ≥ 1 (≤ limit) whose cost is within the budget; `cost` must increase with n."""
    high = 1
    while cost(high) <= budget:
        if limit is not None and high >= limit:
            return limit
        high *= 2
    low = max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


class ComputeMeter(L.Callback):
    """Logs the training compute: compute/tokens (loss positions of all processes), compute/flops, compute/seconds."""

    def __init__(self, cost: RunCost):
        self.cost = cost
        self._seconds, self._since = 0.0, 0.0
        self._counted, self._tokens, self._flops = 0, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of training over all attempts."""
        return {"seconds": self._seconds + time.perf_counter() - self._since if self._since else self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seconds of training."""
        self._seconds = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the timer."""
        self._since = time.perf_counter()

    def spent(self, step: int, num_steps: int) -> dict[str, float]:
        """Return the loss positions and FLOPs of the first `step` of `num_steps` steps."""
        for number in range(self._counted, step):
            tokens, flops = self.cost.step(number, number / num_steps)
            self._tokens, self._flops = self._tokens + tokens, self._flops + flops
        self._counted = max(self._counted, step)
        return {"tokens": self._tokens, "flops": self._flops}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the compute every `log_every_n_steps` steps."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            spent = self.spent(trainer.global_step, trainer.max_steps) | self.state_dict()
            pl_module.log_dict({f"compute/{name}": float(value) for name, value in spent.items()})
