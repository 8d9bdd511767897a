"""What a run costs in marked rows and FLOPs, known before it starts: batch n is a function of (seed, n).

So a budget becomes a number of steps, and the learning rate and every schedule end where the budget does.
Shapes: B batch, T tokens, R marked rows, D hidden, J alignment steps, Vd draft vocabulary (types.py has the legend).
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
from hass_lightning.types import Tokens


@dataclass(frozen=True)
class BatchShape:
    """What decides the cost of a batch: B, T (padded), R, and the rows whose estimates are needed."""

    batch: int
    length: int
    marked: int
    needed: int


def step_flops(config: Any, vocab_size: int, shape: BatchShape, alignment: Alignment) -> float:
    """FLOPs of one forward and backward of the head, its LM head included: 2 a multiplied pair, matrix products alone.

    Args:
        config: the head's LlamaConfig. vocab_size: Vd. alignment: with a number as its depth.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    rows = shape.batch * (shape.length - 1)
    fuse = 2 * rows * 2 * hidden * hidden
    projections = 2 * rows * hidden * (queries + 2 * keys)
    attention = 4 * shape.batch * (shape.length - 1) ** 2 * queries
    rest = 2 * shape.needed * hidden * (queries + 3 * ffn)
    logits = 2 * shape.marked * hidden * vocab_size
    # backward: weights and inputs, twice the forward; fc's inputs have no gradient, nor has the frozen LM head's weight
    step = 2 * fuse + 3 * (projections + rest) + 2 * logits
    # the exact mask multiplies one band whole (the others are diagonals), the leaky one every band
    num_whole = sum(range(1, alignment.depth + 1)) if alignment.mask == "leaky" else alignment.depth
    total = alignment.depth * step + 3 * num_whole * attention + logits  # and the target's own logits, once
    if alignment.gradient == "bptt":
        total += (alignment.depth - 1) * fuse
    if alignment.checkpoint:
        total += alignment.depth * (2 * rows * hidden * queries + rest) + num_whole * attention
    return float(total)


class RunCost:
    """The cost of the first n optimizer steps of a run, for any n.

    Args:
        sequences: the training sequences. batch_size: of a step's batch over all processes. seed: of their order.
        accumulate: batches in a step. config: the head's. vocab_size: Vd. alignment: its depth may be a schedule.
    """

    def __init__(
        self, sequences: Sequence[Tokens], batch_size: int, seed: int, accumulate: int, config: Any, vocab_size: int,
        alignment: Alignment,
    ):  # fmt: skip
        self.sequences, self.accumulate = sequences, accumulate
        self.config, self.vocab_size, self.alignment = config, vocab_size, alignment
        order = BatchOrder([len(sequence) for sequence in sequences], batch_size, seed, sys.maxsize)
        self._order = iter(order)
        self._batches: list[list[int]] = []
        self._rows: dict[int, int] = {}  # by batch
        self._needed: dict[tuple[int, int], int] = {}  # by sequence and depth
        self._flops: dict[tuple[int, int], float] = {}  # by batch and depth

    def batches(self, step: int) -> range:
        """The numbers of the batches of a step."""
        last = (step + 1) * self.accumulate
        while len(self._batches) < last:
            self._batches.append([index for _, index in next(self._order)])
        return range(last - self.accumulate, last)

    def step(self, number: int, progress: float = 0.0, alignment: Alignment | None = None) -> tuple[int, float]:
        """(marked rows over all processes, FLOPs) of one step, at its progress and with this alignment or another."""
        now = (alignment or self.alignment).at(progress)
        batches = self.batches(number)
        return sum(self._marked(batch) for batch in batches), sum(self._batch_flops(batch, now) for batch in batches)

    def tokens(self, num_steps: int) -> int:
        """Marked rows of the first `num_steps` steps."""
        return sum(self._marked(batch) for step in range(num_steps) for batch in self.batches(step))

    def flops(self, num_steps: int, alignment: Alignment | None = None) -> float:
        """FLOPs of a run of `num_steps` steps."""
        return sum(self.step(number, number / num_steps, alignment)[1] for number in range(num_steps))

    def _marked(self, batch: int) -> int:
        if batch not in self._rows:
            self._rows[batch] = sum(int(self.sequences[i].loss_mask[:-1].sum()) for i in self._batches[batch])
        return self._rows[batch]

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
                self._marked(batch),
                sum(self._needed_rows(index, alignment.depth) for index in indices),
            )
            self._flops[batch, alignment.depth] = step_flops(self.config, self.vocab_size, shape, alignment)
        return self._flops[batch, alignment.depth]

    def steps_within(
        self,
        limit: int | None,
        tokens: float | None = None,
        flops: float | None = None,
        match_depth: int | None = None,
    ) -> int | None:
        """The number of steps that a budget buys, at least 1; None without any limit.

        Args:
            limit: steps at most. tokens, flops: what may be spent. match_depth: spend the FLOPs of `limit` steps at
                this depth; `limit` is then no limit itself.

        Raises:
            ValueError: `match_depth` without `limit`, or a budget that is not positive.
        """
        if any(value is not None and value <= 0 for value in (tokens, flops, match_depth)):
            raise ValueError(f"compute.tokens={tokens}, flops={flops}, match_depth={match_depth} must be positive.")
        if match_depth is not None:
            if limit is None:
                raise ValueError(
                    f"compute.match_depth={match_depth} takes the FLOPs of trainer.max_epochs or max_steps at that "
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
    """The greatest n ≥ 1 (≤ limit) whose cost is within the budget; `cost` grows with n."""
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
    """Logs what is spent: compute/tokens (marked rows, all processes), compute/flops, compute/seconds."""

    def __init__(self, cost: RunCost):
        self.cost = cost
        self._seconds, self._since = 0.0, 0.0
        self._counted, self._tokens, self._flops = 0, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training, over all attempts."""
        return {"seconds": self._seconds + time.perf_counter() - self._since if self._since else self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._seconds = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def spent(self, step: int, num_steps: int) -> dict[str, float]:
        """Marked rows and FLOPs of the first `step` of `num_steps` steps."""
        for number in range(self._counted, step):
            tokens, flops = self.cost.step(number, number / num_steps)
            self._tokens, self._flops = self._tokens + tokens, self._flops + flops
        self._counted = max(self._counted, step)
        return {"tokens": self._tokens, "flops": self._flops}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log every `log_every_n_steps`."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            spent = self.spent(trainer.global_step, trainer.max_steps) | self.state_dict()
            pl_module.log_dict({f"compute/{name}": float(value) for name, value in spent.items()})
