"""What an interrupted run goes on from, wherever it was interrupted: kill -9, Ctrl-C, or a full disk while saving."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint

from hass_lightning.ledger import REQUEUE_EXIT_CODE

log = logging.getLogger(__name__)


def find_last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in `folder`, if any; a damaged one is named and left for the next save to replace."""
    for path in (Path(folder) / name for name in ("last.ckpt", "last.ckpt.old")):
        if path.exists():
            if _is_whole(path):
                return str(path)
            log.warning("the checkpoint %s is damaged and not used: the run goes back to the one before it, or to the "
                        "start", path)  # fmt: skip
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the checksums hold that torch.save writes (its files are zip archives)."""
    files = sorted(checkpoint.rglob("*.pt")) if checkpoint.is_dir() else [checkpoint]
    if checkpoint.is_dir() and not (checkpoint / "latest").exists():
        return False
    try:
        return bool(files) and all(zipfile.ZipFile(file).testzip() is None for file in files)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` (a folder under DeepSpeed) in `folder`, replaced as a whole, so that a kill leaves the old one.

    A ModelCheckpoint with `every_n_train_steps` would not do: it saves before the validation of the same step, so that
    a run killed in that validation would never make up for it; and it copies over the only checkpoint where the
    temporary folder is another disk. Here the step of a validation is saved after it.

    The first Ctrl-C (SIGINT) ends the run after the current step, with a checkpoint; the second one at once. SIGTERM
    (preemption) does the same, and the exit code asks the launcher to start the run again.

    Args:
        every_n_train_steps: optimizer steps between two checkpoints.
    """

    def __init__(self, folder: str, every_n_train_steps: int = 100):
        if every_n_train_steps < 1:
            raise ValueError(f"callbacks.last_checkpoint.every_n_train_steps={every_n_train_steps} must be at least 1.")
        self.folder, self.every_n_train_steps = Path(folder), every_n_train_steps
        self._received, self._saved_step = 0, -1  # the signal that asked for the end, if one did
        self._previous: dict[int, Any] = {}  # the handlers that were there before

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take over SIGINT and SIGTERM (from Lightning, whose handler broadcasts in the middle of a step)."""
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Give the signals back."""
        self._give_back(*self._previous)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back(*self._previous)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save at every n-th optimizer step, unless a validation follows (`on_validation_end` saves then)."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = self._stop(trainer)
        due = trainer.global_step % self.every_n_train_steps == 0 and trainer.global_step != self._saved_step
        if stop or (due and (batch_idx + 1) % int(trainer.val_check_batch or 1)):
            self._save(trainer)
        if stop:
            self._end(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save what the validation knows, the other callbacks' best values included."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._save(trainer)
        if self._stop(trainer):
            self._end(trainer)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._received = number
        log.warning("%s: this step is finished and saved first (Ctrl-C: stop at once)", signal.Signals(number).name)
        self._give_back(signal.SIGINT)

    def _give_back(self, *numbers: int) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                if number in self._previous:
                    signal.signal(number, self._previous.pop(number))

    def _end(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            sys.exit(0)  # another code, and Lightning's observer would kill the first process while it closes its logs
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(REQUEUE_EXIT_CODE)

    def _stop(self, trainer: L.Trainer) -> bool:
        """Whether any process was interrupted: they must all stop at the same step."""
        if trainer.world_size == 1:
            return bool(self._received)
        return bool(trainer.strategy.reduce_boolean_decision(bool(self._received), all=False))

    def _save(self, trainer: L.Trainer) -> None:
        last, old, new = (self.folder / f"last.ckpt{end}" for end in ("", ".old", ".new"))
        self._saved_step = trainer.global_step
        try:
            trainer.save_checkpoint(new)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            _remove(new)
            raise ValueError(
                f"the checkpoint {new} could not be written ({error}): free disk space, or move paths.root. The one "
                "before it is kept: the same command goes on from there."
            ) from error
        if trainer.is_global_zero:
            if last.is_dir():  # a folder cannot be replaced in one step
                shutil.rmtree(old, ignore_errors=True)
                os.replace(last, old)
            os.replace(new, last)
            shutil.rmtree(old, ignore_errors=True)
        trainer.strategy.barrier("last checkpoint")
