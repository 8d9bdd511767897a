"""A callback that watches a run: axes of compute beside every validation, and alerts before time is wasted."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L

from hass_lightning.training.wandb_logging import alert, define_axes


class Watch(L.Callback):
    """Logs what was spent beside each validation, so that acceptance can be drawn over tokens, FLOPs and seconds.

    Warns (in the log, and by a W&B alert) when the loss is not finite, and when acceptance falls while the loss falls:
    the head then learns something that decoding does not use, and the best head is behind it.

    Args:
        patience: validations in a row. min_drop: of the acceptance length below its best that counts as falling.
    """

    def __init__(self, patience: int = 2, min_drop: float = 0.01):
        if patience < 1 or min_drop < 0:
            raise ValueError(
                f"callbacks.watch: patience={patience} must be at least 1, min_drop={min_drop} not negative."
            )
        self.patience, self.min_drop = patience, min_drop
        self.best, self.lowest_loss, self.count = float("-inf"), float("inf"), 0

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {"best": self.best, "lowest_loss": self.lowest_loss, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.lowest_loss = state_dict["best"], state_dict["lowest_loss"]
        self.count = state_dict["count"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Tell W&B which metrics are axes."""
        if trainer.is_global_zero:
            define_axes(trainer.loggers)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The last known spending, in the same row as the validation's numbers."""
        spent = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("compute/")}
        if spent and not trainer.sanity_checking:
            pl_module.log_dict(spent)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compare with the best so far."""
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
        """A loss that is not finite ends the run (module.py); say so where somebody is told."""
        if isinstance(exception, ValueError) and "not finite" in str(exception) and trainer.is_global_zero:
            alert(trainer.loggers, "The loss is not finite", str(exception))
