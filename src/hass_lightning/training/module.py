"""The LightningModule: a draft head, its loss terms, its alignment. The frozen target stays outside of it.

Shapes: B batch, T tokens, R masked rows, D hidden, J alignment steps, Vd draft vocabulary (types.py has the legend).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import Tensor

from hass_lightning.draft import Alignment, EagleDraft, unroll
from hass_lightning.losses import DraftLoss, LossOutput
from hass_lightning.measure.simulate import simulated_hits
from hass_lightning.target.head import DraftVocabulary, TargetHead
from hass_lightning.types import FeatureBatch


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the run: linear warm-up, then cosine, linear or no decay, from the true number of steps."""

    warmup_fraction: float = 0.02
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: float = 0.0

    def __post_init__(self):
        if self.decay not in ("cosine", "linear", "constant"):
            raise ValueError(f"model.schedule.decay={self.decay} is none of cosine, linear, constant.")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"model.schedule.warmup_fraction={self.warmup_fraction} must lie in [0, 1).")

    def factor(self, step: int, num_steps: int) -> float:
        """What the learning rate is multiplied with at `step` of `num_steps`."""
        warmup = max(1, round(self.warmup_fraction * num_steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
        return self.final_fraction + (1 - self.final_fraction) * shape[self.decay]


class HassModule(L.LightningModule):
    """Trains one draft head.

    Args:
        draft: the head. loss: its terms. alignment: HCA. head: the target's frozen embedding and LM head.
        optimizer: a partial that takes the parameters. schedule: of the learning rate.
        token_ids: draft vocabulary, None = full. validation_depth: steps that validation unrolls, whatever the training
            depth was (else depth 1 could never accept more than one token).
        compile: torch.compile of the head's MLP and norm.
    """

    def __init__(
        self,
        draft: EagleDraft,
        loss: DraftLoss,
        alignment: Alignment,
        head: TargetHead,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Schedule | None = None,
        token_ids: Tensor | None = None,
        validation_depth: int = 5,
        compile: bool = False,
    ):
        super().__init__()
        self.draft, self.loss = draft, loss
        self.planned_alignment = alignment
        self.alignment = alignment.at(0.0)  # as it is now, see `follow_schedules`
        self.head, self.token_ids = head, token_ids
        self.make_optimizer, self.schedule = optimizer, schedule or Schedule()
        self.validation_depth = validation_depth
        self.vocabulary: DraftVocabulary = head.draft_vocabulary(token_ids)
        self.example_tokens = 0  # rows trained on by this process
        self._validation: dict[str, Tensor] = {}
        if compile:  # numbers of rows change with every batch
            for part in (draft.layer.mlp, draft.layer.post_attention_layernorm):
                part.compile(dynamic=True)

    def setup(self, stage: str) -> None:
        """Bring the frozen ends to this process's device, in the dtype the step computes in."""
        dtype = None if self.trainer.precision in ("bf16-mixed", "16-mixed") else torch.float32
        if self.trainer.precision == "bf16-true":
            dtype = torch.bfloat16
        self.head = self.head.to(self.device, dtype)
        self.vocabulary = self.head.draft_vocabulary(self.token_ids)

    def follow_schedules(self) -> None:
        """Bring scheduled weights, K and depth to where the run is: a function of the step, so resuming is exact."""
        progress = min(1.0, self.trainer.global_step / max(1, int(self.trainer.estimated_stepping_batches)))
        self.loss.set_progress(progress)
        self.alignment = self.planned_alignment.at(progress)

    def on_train_batch_start(self, batch: tuple[FeatureBatch, Tensor | None], batch_idx: int) -> None:
        """Follow the schedules."""
        self.follow_schedules()

    def _rows(self, batch: FeatureBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(mask [B, T-1] of rows that count, wanted draft index [R], number of marked rows dropped by the pruning)."""
        marked = batch.loss_mask[:, :-1]
        index = self.vocabulary.to_indices(batch.target_ids[:, 1:].clamp(min=0))
        mask = marked & (index >= 0)
        return mask, index[mask], marked.sum() - mask.sum()

    def aligned_loss(
        self, batch: FeatureBatch, noisy: Tensor | None = None, normalizer: Tensor | float | None = None
    ) -> LossOutput:
        """The loss of one batch, all alignment steps; `normalizer` defaults to the batch's own row count."""
        mask, wanted, _ = self._rows(batch)
        inputs = batch.features if noisy is None else noisy
        embeddings = self.head.embed(batch.input_ids[:, 1:])
        steps = [f[mask] for f in unroll(self.draft, embeddings, inputs[:, :-1], self.alignment, mask)]
        targets = batch.features[:, 1:][mask]
        if normalizer is None:
            normalizer = max(1, wanted.shape[0])
        return self.loss(steps, targets, self.vocabulary, wanted, normalizer, self.alignment.weights)

    def training_step(self, batch: tuple[FeatureBatch, Tensor | None], batch_idx: int) -> Tensor:
        """One aligned step; the mean is over the marked rows of all processes and of all accumulated batches."""
        features, noisy = batch
        mask, _, dropped = self._rows(features)
        num_rows = mask.sum().float()
        # gradients are averaged over processes and accumulated batches: their number · Σ_local / Σ N is the global mean
        parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        rows = self.trainer.datamodule.rows_of_step(self.trainer.global_step)  # type: ignore[attr-defined]
        output = self.aligned_loss(features, noisy, max(1, rows) / parts)
        if not torch.isfinite(output.total):
            broken = [name for name, value in output.values.items() if not torch.isfinite(value)]
            raise ValueError(
                f"the loss is not finite at step {self.global_step} (terms: {', '.join(broken) or 'their sum'}): lower "
                "model.optimizer.lr or trainer.gradient_clip_val, or use trainer.precision=32-true. The last good "
                "checkpoint is kept."
            )
        self.example_tokens += int(num_rows)
        count = num_rows.clamp(min=1)
        self.log("train/loss", output.total.detach(), prog_bar=True, sync_dist=self.trainer.world_size > 1)
        logged = {f"train/{name}": value / count for name, value in output.values.items()}
        accuracy = output.hits.float().sum(-1) / count
        logged |= {f"train/accuracy/step{step + 1}": value for step, value in enumerate(accuracy)}
        logged["train/dropped_rows"] = dropped.float() / (count + dropped)
        self.log_dict(logged)
        return output.total

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the last validation; its loss is that of the step reached."""
        self._validation = {}
        self.follow_schedules()

    def validation_step(self, batch: tuple[FeatureBatch, Tensor | None], batch_idx: int) -> None:
        """Loss at the training depth, acceptance simulated to `validation_depth`."""
        features, noisy = batch
        output = self.aligned_loss(features, noisy, 1.0)
        sums = {f"val/{name}": value for name, value in output.values.items()} | {"val/loss": output.total.detach()}
        sums["rows"] = torch.tensor(float(output.hits.shape[1]), device=self.device)
        sums |= simulated_hits(
            self.draft,
            self.head,
            self.vocabulary,
            features.input_ids,
            features.features if noisy is None else noisy,
            features.loss_mask,
            features.lengths,
            self.validation_depth,
        )
        for name, value in sums.items():
            self._validation[name] = self._validation.get(name, 0) + value.double()

    def on_validation_epoch_end(self) -> None:
        """Reduce the sums over processes once, and log the means."""
        if not self._validation:
            return
        names = sorted(self._validation)
        stacked = torch.stack([self._validation[name] for name in names]).to(self.device)
        if self.trainer.world_size > 1:
            stacked = self.trainer.strategy.reduce(stacked, reduce_op="sum")
        sums = dict(zip(names, stacked, strict=True))
        rows, starts = sums.pop("rows").clamp(min=1), sums.pop("starts").clamp(min=1)
        logged = {name: value / rows for name, value in sums.items() if name.startswith("val/")}
        for step in range(1, self.validation_depth + 1):
            logged[f"val/accuracy/step{step}"] = sums[f"hits{step}"] / rows
            logged[f"val/survival/step{step}"] = sums[f"survived{step}"] / starts
            if reached := sums[f"reached{step}"]:
                logged[f"val/forced_accuracy/step{step}"] = sums[f"forced{step}"] / reached
        survival = [sums[f"survived{step}"] for step in range(1, self.validation_depth + 1)]
        logged["val/acceptance_length"] = 1 + torch.stack(survival).sum() / starts
        self.log_dict({name: value.float() for name, value in logged.items() if name != "val/acceptance_length"})
        self.log("val/acceptance_length", logged["val/acceptance_length"].float(), prog_bar=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm before clipping."""
        gradients = [p.grad for p in self.draft.parameters() if p.grad is not None]
        if gradients and self.trainer.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    def configure_optimizers(self) -> Any:
        """The optimizer and a per-step schedule over Lightning's own count of optimizer steps."""
        optimizer = self.make_optimizer([p for p in self.draft.parameters() if p.requires_grad])
        if self.trainer.precision != "16-mixed" and hasattr(optimizer, "_step_supports_amp_scaling"):
            # Lightning refuses to clip for a fused optimizer that could unscale by itself; without a scaler none does
            optimizer._step_supports_amp_scaling = False
        num_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
