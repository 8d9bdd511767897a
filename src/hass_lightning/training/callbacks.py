"""Small callbacks: the best head as files, tokens per second, decoding on validation prompts."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from hass_lightning.decoding import Autoregressive, Decoder, DecodingModels
from hass_lightning.draft import SavedDraft, save_draft
from hass_lightning.measure.benchmark import run_benchmark, summarize
from hass_lightning.measure.records import conditional_rates
from hass_lightning.measure.trace import BASELINE, Record
from hass_lightning.target.model import TargetModel
from hass_lightning.training.strategy import whole_parameters
from hass_lightning.types import Conversation

log = logging.getLogger(__name__)


class SaveBestDraft(L.Callback):
    """Writes the head to `folder` whenever `monitor` improves: the files that decoding, export and serving read."""

    def __init__(self, folder: str, monitor: str = "val/acceptance_length"):
        self.folder, self.monitor, self.best = Path(folder), monitor, float("-inf")

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value so far."""
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save if the validation just logged a better value."""
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None or float(value) <= self.best:
            return
        self.best = float(value)
        with whole_parameters(pl_module.draft):
            self._save(trainer, pl_module)

    def _save(self, trainer: L.Trainer, pl_module: Any) -> None:
        target = trainer.datamodule.target  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            notes = {
                "target": target.name,
                "target_fingerprint": target.fingerprint,
                "alignment_depth": pl_module.alignment.depth,
                "loss_terms": {name: float(term.weight) for name, term in pl_module.loss.terms.items()},
                "step": trainer.global_step,
                self.monitor: self.best,
            }
            save_draft(self.folder, pl_module.draft, pl_module.token_ids, notes)


class Throughput(L.Callback):
    """Logs marked rows a second and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self._rows, self._time, self._waited = 0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._rows, self._waited = pl_module.example_tokens, self._waited_so_far(trainer)
        self._time = time.perf_counter()

    @staticmethod
    def _waited_so_far(trainer: L.Trainer) -> float:
        return getattr(trainer.train_dataloader, "waited_seconds", 0.0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log every `log_every_n_steps`."""
        now = time.perf_counter()
        if trainer.global_step % trainer.log_every_n_steps == 0 and now > self._time:  # type: ignore[attr-defined]
            elapsed = now - self._time
            rows = (pl_module.example_tokens - self._rows) * trainer.world_size
            pl_module.log("train/tokens_per_second", rows / elapsed, prog_bar=True)
            waited = self._waited_so_far(trainer)
            pl_module.log("train/data_wait_fraction", (waited - self._waited) / elapsed)
            self._rows, self._time, self._waited = pl_module.example_tokens, now, waited

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Validation is neither training nor waiting."""
        self.on_train_start(trainer, pl_module)


class DecodingBenchmark(L.Callback):
    """Decodes validation prompts with the head and without, interleaved, on the same engine.

    Args:
        decoder: the speculative decoder. num_prompts: validation questions. max_new_tokens: an answer.
        num_checked: of them decoded in fp32 as well, where greedy outputs must be identical.
        every_n_validations: 0 = only when the run ends.
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
        """Validations so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what cannot decode while it trains."""
        config = getattr(trainer.strategy, "config", None) or {}
        if self.every_n_validations and config.get("zero_optimization", {}).get("stage") == 3:
            raise ValueError(
                "callbacks.decoding.every_n_validations must be 0 under ZeRO-3 (its weights are spread over processes "
                "and decoding would deadlock): measure afterwards with hass-benchmark draft=<run folder>."
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Every n validations: measure on one process, the others wait."""
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
        """Measure a head.

        Returns:
            (summary rows, records, the fp32 identity check: num_checked and num_identical).
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
    """The logged names of a measurement: decode/acceptance_length, decode/speedup, decode/accept_rate/depth1, …"""
    row = next(row for row in rows if row["decoder"] != BASELINE)
    names = ("acceptance_length", "speedup", "tokens_per_second")
    metrics = {f"decode/{name}": row[name] for name in names if row.get(name) is not None}
    rates = conditional_rates(record for record in records if record.decoder != BASELINE)
    return metrics | {f"decode/accept_rate/depth{depth}": rate for depth, rate in enumerate(rates, start=1)}
