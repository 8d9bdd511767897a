"""The checkpoint from which an interrupted run resumes, whether by kill -9, Ctrl-C or a full disk while saving."""

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

from hass_lightning.runs.signals import PREEMPTION, ask_to_be_started_again, preemption_signals

log = logging.getLogger(__name__)
LAYOUT_FILE = "layout.json"  # in a DeepSpeed checkpoint folder (resume.py)


def find_last_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint in `folder`, or None.

    A damaged checkpoint is logged and left for the next save to replace.
    """
    for path in (Path(folder) / name for name in ("last.ckpt", "last.ckpt.old")):
        if path.exists():
            if is_whole(path):
                return str(path)
            log.warning("the checkpoint %s is damaged and not used: the run resumes from the previous one, or starts "
                        "again", path)  # fmt: skip
    return None


def is_whole(checkpoint: Path) -> bool:
    """Check the checksums that torch.save writes (its files are zip archives)."""
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
    """Keeps `last.ckpt` (a folder under DeepSpeed) in `folder` and replaces it atomically.

    This is not a ModelCheckpoint with `every_n_train_steps` for two reasons. ModelCheckpoint saves before the
    validation of the same step, so a run killed during that validation would never repeat it. It also copies over the
    only checkpoint if the temporary folder is on another file system. Here a step that is validated is saved after its
    validation.

    The first Ctrl-C (SIGINT) ends the run after the current step with a checkpoint; the second one ends it immediately.
    A preemption signal (SIGTERM, SIGUSR1, SIGHUP) has the effect of the first, with an exit code that asks for a
    restart; an additional Ctrl-C does not change that.

    Args:
        folder: the folder of the checkpoint.
        every_n_train_steps: number of optimizer steps between checkpoints.
    """

    layout: Any = None  # of a DeepSpeed run (resume.Layout); recorded in its checkpoint folders

    def __init__(self, folder: str, every_n_train_steps: int = 100):
        if every_n_train_steps < 1:
            raise ValueError(f"callbacks.last_checkpoint.every_n_train_steps={every_n_train_steps} must be at least 1.")
        self.folder, self.every_n_train_steps = Path(folder), every_n_train_steps
        self._received, self._saved_step = 0, -1  # the signal that requested the stop
        self._previous: dict[int, Any] = {}  # the previous handlers

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Install the signal handlers in place of Lightning's, which broadcast or save in the middle of a step."""
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *preemption_signals()):
                self._previous[number] = signal.signal(number, self._on_signal)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Restore the previous signal handlers."""
        self._restore_handlers(*self._previous)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Restore the previous signal handlers."""
        self._restore_handlers(*self._previous)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save every n-th optimizer step, unless a validation follows (then `on_validation_end` saves)."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = self._stop(trainer)
        due = trainer.global_step % self.every_n_train_steps == 0 and trainer.global_step != self._saved_step
        if stop or (due and (batch_idx + 1) % int(trainer.val_check_batch or 1)):
            self._save(trainer)
        if stop:
            self._end(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save after the validation, including the updated best values of other callbacks."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._save(trainer)
        if self._stop(trainer):
            self._end(trainer)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._received in PREEMPTION:
            return  # the run ends with this step in any case
        self._received = number
        hint = " (Ctrl-C: stop immediately)" if number == signal.SIGINT else ""
        log.warning("%s: this step is finished and saved first%s", signal.Signals(number).name, hint)
        if number == signal.SIGINT:
            self._restore_handlers(signal.SIGINT)

    def _restore_handlers(self, *numbers: int) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                if number in self._previous:
                    signal.signal(number, self._previous.pop(number))

    def _end(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            sys.exit(0)  # with another code, Lightning's observer would kill the first process while it closes its logs
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._previous.pop(signal.SIGINT, None)  # keep it ignored
        ask_to_be_started_again()

    def _stop(self, trainer: L.Trainer) -> bool:
        """Return whether any process was interrupted; all must stop at the same step."""
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
                f"the checkpoint {new} could not be written ({error}): free disk space, or change paths.root. The "
                "previous checkpoint is kept, and the same command resumes from it."
            ) from error
        if trainer.is_global_zero:
            if new.is_dir() and self.layout is not None:
                self.layout.write(new)
            if last.is_dir():  # a folder cannot be replaced atomically
                shutil.rmtree(old, ignore_errors=True)
                os.replace(last, old)
            os.replace(new, last)
            shutil.rmtree(old, ignore_errors=True)
        trainer.strategy.barrier("last checkpoint")
