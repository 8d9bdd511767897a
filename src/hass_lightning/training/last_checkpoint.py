"""What an interrupted run goes on from, wherever it was interrupted: kill -9, Ctrl-C, or a full disk while saving."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint

log = logging.getLogger(__name__)


def find_last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in `folder`, if any."""
    candidates = (Path(folder) / name for name in ("last.ckpt", "last.ckpt.old"))
    return next((str(path) for path in candidates if path.exists()), None)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` (a folder under DeepSpeed) in `folder`, replaced as a whole, so that a kill leaves the old one.

    A ModelCheckpoint with `every_n_train_steps` would not do: it saves before the validation of the same step, so that
    a run killed in that validation would never make up for it; and it copies over the only checkpoint where the
    temporary folder is another disk. Here the step of a validation is saved after it.

    The first Ctrl-C (SIGINT) ends the run after the current step, with a checkpoint; the second one at once.

    Args:
        every_n_train_steps: optimizer steps between two checkpoints.
    """

    def __init__(self, folder: str, every_n_train_steps: int = 100):
        if every_n_train_steps < 1:
            raise ValueError(f"callbacks.last_checkpoint.every_n_train_steps={every_n_train_steps} must be at least 1.")
        self.folder, self.every_n_train_steps = Path(folder), every_n_train_steps
        self._interrupted, self._saved_step = False, -1
        self._previous: Any = None  # the handler of SIGINT that was there before

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take over SIGINT."""
        self._interrupted = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Give SIGINT back."""
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give SIGINT back."""
        self._give_back()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save at every n-th optimizer step, unless a validation follows (`on_validation_end` saves then)."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = self._stop(trainer)
        due = trainer.global_step % self.every_n_train_steps == 0 and trainer.global_step != self._saved_step
        if stop or (due and (batch_idx + 1) % int(trainer.val_check_batch or 1)):
            self._save(trainer)
        if stop:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save what the validation knows, the other callbacks' best values included."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._save(trainer)
        if self._stop(trainer):
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: Any) -> None:
        self._interrupted = True
        log.warning("interrupted: this step is finished and saved first (Ctrl-C again: stop at once)")
        self._give_back()

    def _give_back(self) -> None:
        if self._previous is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _stop(self, trainer: L.Trainer) -> bool:
        """Whether any process was interrupted: they must all stop at the same step."""
        if trainer.world_size == 1:
            return self._interrupted
        return bool(trainer.strategy.reduce_boolean_decision(self._interrupted, all=False))

    def _save(self, trainer: L.Trainer) -> None:
        last, old, new = (self.folder / f"last.ckpt{end}" for end in ("", ".old", ".new"))
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if last.is_dir():  # a folder cannot be replaced in one step
                shutil.rmtree(old, ignore_errors=True)
                os.replace(last, old)
            os.replace(new, last)
            shutil.rmtree(old, ignore_errors=True)
        trainer.strategy.barrier("last checkpoint")
