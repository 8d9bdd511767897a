"""Exponential moving average of the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AverageHead(WeightAveraging):
    """Validates, decodes and saves an exponential moving average of the head, and ends the run with it.

    Training itself is not changed. Checkpoints contain both the trained and the averaged weights, so a resumed run is
    exact. Lightning's callback restores the trained weights before other callbacks save or decode; this one restores
    them afterwards. It must therefore come after those callbacks in the list (Lightning moves callbacks that write
    checkpoints to the end).

    Args:
        decay: decay rate of the average. In step n it is at most (1 + n) / (10 + n), so that the initial weights do not
            dominate a short average.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.average.decay={decay} must lie in [0, 1).")
        self.decay = decay
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        count = int(num_averaged)
        get_ema_multi_avg_fn(min(self.decay, (1 + count) / (10 + count)))(averaged, current, count)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Copy the head to the device on which it is trained.

        Raises:
            ValueError: if the strategy is DeepSpeed.
        """
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "callbacks.average does not work with DeepSpeed, whose checkpoints do not contain the average and "
                "whose stage 3 partitions the weights over processes: use trainer=ddp, or callbacks.average=null."
            )
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the averaged weights while other callbacks save; `on_validation_end` restores the trained ones."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Restore the trained weights."""
        super().on_validation_epoch_end(trainer, pl_module)
