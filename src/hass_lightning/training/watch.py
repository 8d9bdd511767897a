"""Callback that logs training compute with every validation and raises alerts."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L

from hass_lightning.training.wandb_logging import alert, define_axes


class Watch(L.Callback):
    """Logs the training compute with each validation, so that acceptance can be plotted over tokens, FLOPs and seconds.

    Warns (in the log and by a W&B alert) if the loss is not finite, or if acceptance falls while the loss falls. In the
    second case the head learns something that decoding does not use, and the best head is an earlier one.

    Args:
        patience: number of consecutive validations with falling acceptance before the alert.
        min_drop: how far the acceptance length must be below its best value to count as falling.
    """

    def __init__(self, patience: int = 2, min_drop: float = 0.01):
        if patience < 1 or min_drop < 0:
            raise ValueError(
                f"callbacks.watch: patience={patience} must be at least 1, and min_drop={min_drop} must not be "
                "negative."
            )
        self.patience, self.min_drop = patience, min_drop
        self.best, self.lowest_loss, self.count = float("-inf"), float("inf"), 0

    def state_dict(self) -> dict[str, Any]:
        """Return the best values and the count so far."""
        return {"best": self.best, "lowest_loss": self.lowest_loss, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best values and the count."""
        self.best, self.lowest_loss = state_dict["best"], state_dict["lowest_loss"]
        self.count = state_dict["count"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Tell W&B which metrics are axes."""
        if trainer.is_global_zero:
            define_axes(trainer.loggers)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the last training compute in the same row as the validation's metrics."""
        spent = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("compute/")}
        if spent and not trainer.sanity_checking:
            pl_module.log_dict(spent)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compare with the best values so far."""
        acceptance = trainer.callback_metrics.get("val/acceptance_length")
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.sanity_checking or acceptance is None or loss is None:
            return
        falling = float(acceptance) < self.best - self.min_drop and float(loss) < self.lowest_loss
        self.count = self.count + 1 if falling else 0
        if self.count >= self.patience and trainer.is_global_zero:
            alert(
                trainer.loggers,
                "Acceptance falls while the loss falls",
                f"step {trainer.global_step}: acceptance length {float(acceptance):.3f} (best {self.best:.3f}), "
                f"validation loss {float(loss):.4f} (lowest {self.lowest_loss:.4f}). The best head is in draft/.",
            )
        self.best = max(self.best, float(acceptance))
        self.lowest_loss = min(self.lowest_loss, float(loss))

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Send an alert if a loss that is not finite ended the run (module.py)."""
        if isinstance(exception, ValueError) and "not finite" in str(exception) and trainer.is_global_zero:
            alert(trainer.loggers, "The loss is not finite", str(exception))
