"""Callbacks that save the best head, log tokens per second, and decode validation prompts."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from hass_lightning.decoding import Autoregressive, Decoder, DecodingModels
from hass_lightning.draft import SavedDraft, save_draft
from hass_lightning.draft.checkpoint import holds_head
from hass_lightning.measure.benchmark import run_benchmark, summarize
from hass_lightning.measure.metrics import conditional_rates
from hass_lightning.measure.record import BASELINE, Record
from hass_lightning.target_model.model import TargetModel
from hass_lightning.training.strategy import whole_parameters
from hass_lightning.types import Conversation

log = logging.getLogger(__name__)


def head_notes(target: TargetModel, module: Any, step: int) -> dict[str, Any]:
    """Return the metadata that is saved with a head: its target, loss terms, alignment depth and step."""
    return {
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "alignment_depth": module.alignment.depth,
        "loss_terms": {name: float(term.weight) for name, term in module.loss.terms.items()},
        "step": step,
    }


def save_head(folder: Path, trainer: L.Trainer, module: Any, **notes: Any) -> None:
    """Save the current head. Every process must call this (ZeRO-3 gathers the weights); only the first one writes."""
    with whole_parameters(module.draft):
        if trainer.is_global_zero:
            target = trainer.datamodule.target  # type: ignore[attr-defined]
            everything = head_notes(target, module, trainer.global_step) | notes
            save_draft(folder, module.draft, module.token_ids, everything)


def module_of(pl_module: Any, head: str | None) -> Any:
    """Return the module of a head: the one that is trained, or one of several."""
    return pl_module if head is None else pl_module.modules_by_name[head]


class SaveBestDraft(L.Callback):
    """Saves the head to `folder` whenever `monitor` improves, in the format that decoding, export and serving read.

    Args:
        folder: the folder.
        monitor: the metric; the greatest value is the best.
        head: name of the head in a `HeadsModule`, whose metrics begin with it. None: the only one.
    """

    def __init__(self, folder: str, monitor: str = "val/acceptance_length", head: str | None = None):
        self.folder, self.head, self.best = Path(folder), head, float("-inf")
        self.noted = monitor  # name of the value in the notes of the head
        self.monitor = monitor if head is None else f"{head}/{monitor}"

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint, which differs between the heads of a run."""
        return super().state_key if self.head is None else f"{super().state_key}:{self.head}"

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value if its head is in `folder`. It is not if the checkpoint belongs to another run."""
        self.best = state_dict["best"] if holds_head(self.folder) else float("-inf")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the head if the validation has logged a better value."""
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None or float(value) <= self.best:
            return
        self.best = float(value)
        save_head(self.folder, trainer, module_of(pl_module, self.head), **{self.noted: self.best})


class KeepLastDraft(L.Callback):
    """Saves the last head when training ends and no validation has selected one, and records this in its config."""

    def __init__(self, folder: Path, head: str | None = None):
        self.folder, self.head = folder, head

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the last head if there is none. A validation that follows may still select one."""
        self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the last head if the run was resumed after its last step: Lightning then skips `on_train_end`."""
        missing = trainer.strategy.broadcast(not holds_head(self.folder))
        if missing:
            save_head(self.folder, trainer, module_of(pl_module, self.head), chosen_by="none")


class Throughput(L.Callback):
    """Logs loss positions per second and the fraction of time spent waiting for data."""

    def __init__(self) -> None:
        self._positions, self._time, self._waited = 0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the timer."""
        self._positions, self._waited = pl_module.example_tokens, self._waited_so_far(trainer)
        self._time = time.perf_counter()

    @staticmethod
    def _waited_so_far(trainer: L.Trainer) -> float:
        return getattr(trainer.train_dataloader, "waited_seconds", 0.0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the rates every `log_every_n_steps` steps."""
        now = time.perf_counter()
        if trainer.global_step % trainer.log_every_n_steps == 0 and now > self._time:  # type: ignore[attr-defined]
            elapsed = now - self._time
            rows = (pl_module.example_tokens - self._positions) * trainer.world_size
            pl_module.log("train/tokens_per_second", rows / elapsed, prog_bar=True)
            waited = self._waited_so_far(trainer)
            pl_module.log("train/data_wait_fraction", (waited - self._waited) / elapsed)
            self._positions, self._time, self._waited = pl_module.example_tokens, now, waited

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Restart the timer, so that validation counts neither as training nor as waiting."""
        self.on_train_start(trainer, pl_module)


class DecodingBenchmark(L.Callback):
    """Decodes validation prompts with the head and autoregressively, interleaved, on the same engine.

    Args:
        decoder: the speculative decoder.
        num_prompts: number of validation questions.
        max_new_tokens: maximum number of tokens per answer.
        num_checked: number of questions that are also decoded in fp32, where greedy outputs must be identical.
        every_n_validations: measure after every n-th validation; 0 measures only when the run ends.
        seed: seed of the decoding benchmark.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_prompts: int = 40,
        max_new_tokens: int = 128,
        num_checked: int = 8,
        every_n_validations: int = 0,
        seed: int = 0,
    ):
        self.decoder, self.num_prompts, self.max_new_tokens = decoder, num_prompts, max_new_tokens
        self.num_checked, self.every_n_validations, self.seed = num_checked, every_n_validations, seed
        self._validations = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations."""
        self._validations = state_dict["validations"]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check that decoding is possible during training.

        Raises:
            ValueError: if `every_n_validations` is set under ZeRO-3.
        """
        config = getattr(trainer.strategy, "config", None) or {}
        if self.every_n_validations and config.get("zero_optimization", {}).get("stage") == 3:
            raise ValueError(
                "callbacks.decoding.every_n_validations must be 0 under ZeRO-3 (its weights are partitioned over "
                "processes and decoding would deadlock): measure afterwards with hass-benchmark draft=<run folder>."
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure on the first process after every n-th validation, while the other processes wait."""
        if trainer.sanity_checking or not self.every_n_validations:
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        if trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            saved = SavedDraft(pl_module.draft, pl_module.token_ids, {})
            rows, records, _ = self.measure(data.target, saved, data.validation_conversations, check=False)
            for logger in trainer.loggers:
                logger.log_metrics(decode_metrics(rows, records), step=trainer.global_step)
        trainer.strategy.barrier("decoding benchmark")

    def measure(
        self,
        target: TargetModel,
        saved: SavedDraft,
        conversations: list[Conversation],
        records_path: Path | None = None,
        check: bool = True,
    ) -> tuple[list[dict[str, Any]], list[Record], dict[str, Any]]:
        """Measure a head on validation prompts.

        Returns:
            (summary rows, records, result of the fp32 comparison: num_checked and num_identical).
        """
        prompts = [conversation.without_answers() for conversation in conversations[: self.num_prompts]]

        def models(dtype: torch.dtype, frozen: TargetModel) -> DecodingModels:
            vocabulary = frozen.head.draft_vocabulary(saved.token_ids)
            return DecodingModels(frozen, saved.for_decoding(dtype, frozen.device), vocabulary)

        fp32 = None
        if check and self.num_checked:
            fp32 = {"draft": models(torch.float32, target.in_fp32())}
        records = run_benchmark(
            {"draft": models(target.dtype, target)},
            {BASELINE: Autoregressive(), self.decoder.name: self.decoder},
            prompts,
            max_new_tokens=self.max_new_tokens,
            benchmark="validation",
            seed=self.seed,
            records_path=records_path,
            checked_prompts=self.num_checked if check else 0,
            fp32_models=fp32,
        )
        rows = summarize(records)
        checked = [r.fp32_identical for r in records if r.fp32_identical is not None]
        return rows, records, {"num_checked": len(checked), "num_identical": sum(checked)}


def decode_metrics(rows: list[dict[str, Any]], records: list[Record]) -> dict[str, float]:
    """Return the metrics to log: decode/acceptance_length, decode/speedup, decode/accept_rate/depth1, …"""
    row = next(row for row in rows if row["decoder"] != BASELINE)
    names = ("acceptance_length", "speedup", "tokens_per_second")
    metrics = {f"decode/{name}": row[name] for name in names if row.get(name) is not None}
    rates = conditional_rates(record for record in records if record.decoder != BASELINE)
    return metrics | {f"decode/accept_rate/depth{depth}": rate for depth, rate in enumerate(rates, start=1)}
