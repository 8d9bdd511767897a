"""Progress of training: a bar in the list of the command that runs, or one plain line every few seconds."""

from __future__ import annotations

import contextlib
import logging
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as L

from hass_lightning.runs.screen import current_screen
from hass_lightning.runs.stages import Bar

log = logging.getLogger(__name__)
TAU = "val/acceptance_length"


class ProgressLines(L.Callback):
    """Says step, loss, τ_sim, learning rate, steps a second and the time left.

    On a terminal this is the bar of the stage `training`, and the best head so far. Elsewhere it is a line after the
    first step, every `every_n_seconds`, and at the end.

    Args:
        every_n_seconds: seconds between two lines; nothing is logged during validation.
    """

    def __init__(self, every_n_seconds: float = 15.0):
        self.every_n_seconds = every_n_seconds
        self._started, self._first_step, self._last = 0.0, 0, float("-inf")
        self._best: tuple[float, int] | None = None  # τ_sim, step
        self._bar: Bar | None = None
        self._open = contextlib.ExitStack()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the timer."""
        self._started, self._first_step = time.monotonic(), trainer.global_step
        screen = current_screen()
        if screen is not None and screen.console is not None and trainer.is_global_zero:
            self._bar = self._open.enter_context(screen.bar("training", trainer.max_steps, "step"))
            self._bar.done = self._bar.known = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance the bar; one line, if it is time for it."""
        if self._bar is not None:
            self._bar.done = trainer.global_step
            self._note(trainer)
            return
        now, ended = time.monotonic(), trainer.global_step >= trainer.max_steps
        if not trainer.is_global_zero or not (ended or now - self._last >= self.every_n_seconds):
            return
        self._last = now
        loss = trainer.callback_metrics.get("train/loss")
        done, seconds = trainer.global_step - self._first_step, now - self._started
        rate = done / seconds if seconds > 0 else 0.0
        left = timedelta(seconds=round((trainer.max_steps - trainer.global_step) / rate)) if rate else "unknown"
        text = "?" if loss is None else f"{float(loss):.4f}"
        tau = trainer.callback_metrics.get(TAU)
        more = "" if tau is None else f", τ_sim {float(tau):.3f}"
        log.info(
            "step %d of %d, loss %s, %.2f steps/s, %s left%s",
            *(trainer.global_step, trainer.max_steps, text, rate, left, more),
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Remember the best head."""
        tau = trainer.callback_metrics.get(TAU)
        if tau is not None and (self._best is None or float(tau) > self._best[0]):
            self._best = float(tau), trainer.global_step
        if self._bar is not None:
            self._note(trainer)

    def _note(self, trainer: L.Trainer) -> None:
        screen = current_screen()
        assert screen is not None
        loss, rate = trainer.callback_metrics.get("train/loss"), learning_rate(trainer)
        parts = [] if loss is None else [f"loss {float(loss):.3f}"]
        if self._best is not None:
            last = trainer.callback_metrics.get(TAU)
            now = "" if last is None else f"τ_sim {float(last):.3f} "
            parts.append(f"{now}(best {self._best[0]:.3f} at step {self._best[1]})")
        screen.note = "   ".join([*parts, *([] if rate is None else [f"lr {rate:.1e}"])])

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self._open.close()
        self._bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar."""
        self.on_fit_end(trainer, pl_module)


def learning_rate(trainer: L.Trainer) -> float | None:
    """Return the learning rate of the first parameter group."""
    optimizers = trainer.optimizers
    return float(optimizers[0].param_groups[0]["lr"]) if optimizers else None
