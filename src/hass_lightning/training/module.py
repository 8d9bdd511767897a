"""The LightningModule: a draft head, its loss and its alignment. The frozen target is not part of it.

Shapes: B batch, T tokens, R loss positions, D hidden, J alignment steps, Vd draft vocabulary (see the legend in
types.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import Tensor

from hass_lightning.draft import Alignment, DraftHead, unroll
from hass_lightning.losses import CountedRows, DraftLoss, LossOutput, LossPass, compute_together
from hass_lightning.measure.simulate import simulated_hits
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
from hass_lightning.target_model.lm_head import TargetHead
from hass_lightning.training.own_tokens import own_token_loss
from hass_lightning.types import FeatureBatch


@dataclass(frozen=True)
class Schedule:
    """Learning rate schedule: linear warm-up, then cosine, linear or no decay over the remaining optimizer steps.

    Args:
        warmup_fraction: fraction of the steps used for warm-up.
        decay: shape of the decay: cosine, linear or constant.
        final_fraction: learning rate factor at the end.
        warmup_start: with `first_step`, the factor of warm-up step s is (s+1)/warmup. With `zero` it is s/warmup, with
            warmup rounded down, as in transformers' `get_linear_schedule_with_warmup`, which the official code uses;
            its first step changes only the optimizer's moments.
    """

    warmup_fraction: float = 0.02
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: float = 0.0
    warmup_start: Literal["first_step", "zero"] = "first_step"

    def __post_init__(self) -> None:
        if self.decay not in ("cosine", "linear", "constant"):
            raise ValueError(f"model.schedule.decay={self.decay} is none of cosine, linear, constant.")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"model.schedule.warmup_fraction={self.warmup_fraction} must lie in [0, 1).")
        if self.warmup_start not in ("first_step", "zero"):
            raise ValueError(f"model.schedule.warmup_start={self.warmup_start} is neither first_step nor zero.")

    def factor(self, step: int, num_steps: int) -> float:
        """Return the learning rate factor at `step` of `num_steps`."""
        if self.warmup_start == "zero":
            warmup, offset = math.floor(self.warmup_fraction * num_steps + 1e-9), 0  # 0.29 * 100 is below 29
        else:
            warmup, offset = max(1, round(self.warmup_fraction * num_steps)), 1
        if step < warmup:
            return (step + offset) / warmup
        progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
        return self.final_fraction + (1 - self.final_fraction) * shape[self.decay]


@dataclass
class PreparedBatch:
    """What the loss of one batch needs and the head does not change."""

    batch: FeatureBatch
    inputs: Tensor  # [B, T-1, W], features of tokens t, with noise
    embeddings: Tensor  # [B, T-1, D], embeddings of tokens t+1
    mask: Tensor  # [B, T-1] bool, loss positions
    wanted: Tensor  # [R], draft indices of the target's argmax
    targets: Tensor  # [R, D], the features to estimate
    num_dropped: Tensor  # positions dropped by pruning


class HassModule(L.LightningModule):
    """LightningModule that trains a draft head.

    Args:
        draft: the head.
        loss: the loss over all alignment steps.
        alignment: the alignment (HCA).
        head: the target's frozen embedding and LM head.
        optimizer: a partial that is called with the parameters.
        schedule: learning rate schedule.
        token_ids: token ids of the draft vocabulary; None: full vocabulary.
        validation_depth: number of alignment steps in validation, whatever the training depth (a head validated at
            depth 1 could never accept more than one token).
        compile: whether to use torch.compile for the head's MLP and norm.
    """

    def __init__(
        self,
        draft: DraftHead,
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
        self.alignment = alignment.at(0.0)  # current values, see `follow_schedules`
        self.head, self.token_ids = head, token_ids
        self.make_optimizer, self.schedule = optimizer, schedule or Schedule()
        self.validation_depth = validation_depth
        self.vocabulary: DraftVocabulary = head.draft_vocabulary(token_ids)
        self.example_tokens = 0  # loss positions of this process so far
        self._validation: dict[str, Tensor] = {}
        if compile:  # the number of rows differs from batch to batch
            for part in (draft.layer.mlp, draft.layer.post_attention_layernorm):
                part.compile(dynamic=True)

    @property
    def modules_by_name(self) -> dict[str, HassModule]:
        """Itself as the only head, whose name is empty; see `HeadsModule`."""
        return {"": self}

    def metric_names(self) -> set[str]:
        """Return the names of the metrics that training and validation log, for callbacks with `monitor=…`."""
        depth = int(max(self.planned_alignment.depths.values))
        parts = [f"{name}/step{step}" for name in self.loss.terms for step in range(1, depth + 1)]
        parts += ["loss", *(f"accuracy/step{step}" for step in range(1, depth + 1))]
        names = {f"{stage}/{part}" for stage in ("train", "val") for part in parts}
        for step in range(1, self.validation_depth + 1):
            names |= {f"val/{part}/step{step}" for part in ("accuracy", "survival", "forced_accuracy")}
        return names | {"val/acceptance_length", "train/dropped_rows", "train/gradient_norm"}

    def setup(self, stage: str) -> None:
        """Move the target's embedding and LM head to this process's device, in the dtype of the training step."""
        dtype = None if self.trainer.precision in ("bf16-mixed", "16-mixed") else torch.float32
        if self.trainer.precision == "bf16-true":
            dtype = torch.bfloat16
        self.head = self.head.to(self.device, dtype)
        self.vocabulary = self.head.draft_vocabulary(self.token_ids)

    def on_train_start(self) -> None:
        """Announce the amount of computation to the loss, which short runs do not compile (losses/reductions.py)."""
        rows = self.trainer.datamodule.rows_of_step(0) / self.trainer.world_size  # type: ignore[attr-defined]
        depth = max(int(value) for value in self.planned_alignment.depths.values)
        num_logits = int(self.trainer.estimated_stepping_batches) * rows * depth * len(self.vocabulary)
        self.loss.compiler.decide(num_logits, self.device)

    def follow_schedules(self) -> None:
        """Set scheduled weights, K and depth. They depend only on the current step, so resuming is exact."""
        progress = min(1.0, self.trainer.global_step / max(1, int(self.trainer.estimated_stepping_batches)))
        self.loss.set_progress(progress)
        self.alignment = self.planned_alignment.at(progress)

    def on_train_batch_start(self, batch: tuple[FeatureBatch, Tensor | None], batch_idx: int) -> None:
        """Update the scheduled values."""
        self.follow_schedules()

    def prepare(self, batch: FeatureBatch, noisy: Tensor | None = None) -> PreparedBatch:
        """Return loss positions, inputs and labels of a batch; `noisy` [B, T, W] replaces its features as input."""
        marked = batch.loss_mask[:, :-1]
        index = self.vocabulary.to_indices(batch.target_ids[:, 1:].clamp(min=0))
        mask = marked & (index >= 0)
        return PreparedBatch(
            batch,
            (batch.features if noisy is None else noisy)[:, :-1],
            self.head.embed(batch.input_ids[:, 1:]),
            mask,
            index[mask],
            self.head.last(batch.features)[:, 1:][mask],
            marked.sum() - mask.sum(),
        )

    def start_loss(self, prepared: PreparedBatch, normalizer: Tensor | float) -> LossPass:
        """Run the alignment steps, and return the loss to be computed by `compute_together`."""
        mask = prepared.mask
        steps = [f[mask] for f in unroll(self.draft, prepared.embeddings, prepared.inputs, self.alignment, mask)]
        weights, counted = self.alignment.weights, self._counted(prepared.batch, mask)
        return self.loss_pass(steps, prepared.targets, prepared.wanted, normalizer, weights, counted=counted)

    def loss_pass(
        self,
        steps: Sequence[Tensor],
        targets: Tensor,
        wanted: Tensor,
        normalizer: Tensor | float,
        weights: Sequence[float],
        counted: CountedRows | None = None,
        first_step: int = 1,
    ) -> LossPass:
        """Return the loss of predicted features [R, D] of some steps; see `LossPass`."""
        return LossPass(
            self.loss, steps, targets, self.vocabulary, wanted, normalizer, weights,
            draft_logits=lambda rows: self.draft.logits(rows, self.vocabulary, decoding=False),
            draft_output=self.draft.output, trained=self.draft.logit_parameters(), counted=counted,
            first_step=first_step,
        )  # fmt: skip

    def aligned_loss(
        self, batch: FeatureBatch, noisy: Tensor | None = None, normalizer: Tensor | float | None = None
    ) -> LossOutput:
        """Compute the loss of one batch over all alignment steps.

        `normalizer` defaults to the number of loss positions in the batch.
        """
        prepared = self.prepare(batch, noisy)
        if normalizer is None:
            normalizer = max(1, prepared.wanted.shape[0])
        return compute_together([self.start_loss(prepared, normalizer)])[0]

    def _counted(self, batch: FeatureBatch, mask: Tensor) -> CountedRows | None:
        """Which rows of `mask` [B, T-1] count in each step; None: all."""
        alignment = self.alignment
        if alignment.edge == "keep" and alignment.alive is None:
            return None
        tokens = torch.nn.functional.pad(batch.input_ids[:, 2:], (0, 1))[mask]  # the token that each row predicts
        indices = self.vocabulary.to_indices(tokens)
        return CountedRows(mask, alignment.depth, alignment.edge == "drop", alignment.alive, indices)

    def normalizer(self) -> float:
        """Return the divisor of the loss of a batch, with which the step is a mean over all its loss positions."""
        # gradients are averaged over processes and accumulated batches: their number · Σ_local / Σ N is the global mean
        parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        rows = self.trainer.datamodule.rows_of_step(self.trainer.global_step)  # type: ignore[attr-defined]
        return max(1, rows) / parts

    def training_step(self, batch: tuple[FeatureBatch, Tensor | None], batch_idx: int) -> Tensor:
        """Compute the loss as a mean over the loss positions of all processes and accumulated batches."""
        prepared, normalizer = self.prepare(*batch), self.normalizer()
        if self.alignment.reads_own_tokens(self.trainer.global_step):
            target = self.trainer.datamodule.target  # type: ignore[attr-defined]
            output = own_token_loss(self, target, prepared, normalizer)
        else:
            (output,) = compute_together([self.start_loss(prepared, normalizer)])
        self.check_finite(output)
        self.example_tokens += len(prepared.wanted)
        self.log("train/loss", output.total.detach(), prog_bar=True, sync_dist=self.trainer.world_size > 1)
        self.log_dict(self.training_metrics(prepared, output))
        return output.total

    def check_finite(self, output: LossOutput) -> None:
        """Check the loss of a batch.

        Raises:
            ValueError: it is not finite.
        """
        if not torch.isfinite(output.total):
            broken = [name for name, value in output.values.items() if not torch.isfinite(value)]
            raise ValueError(
                f"the loss is not finite at step {self.global_step} (terms: {', '.join(broken) or 'their sum'}): lower "
                "model.optimizer.lr or trainer.gradient_clip_val, or use trainer.precision=32-true. The last good "
                "checkpoint is kept."
            )

    def training_metrics(self, prepared: PreparedBatch, output: LossOutput) -> dict[str, Tensor]:
        """Return the means over the loss positions of a batch to log."""
        count = prepared.mask.sum().float().clamp(min=1)
        logged = {f"train/{name}": value / count for name, value in output.values.items()}
        accuracy = output.hits.float().sum(-1) / count
        logged |= {f"train/accuracy/step{step + 1}": value for step, value in enumerate(accuracy)}
        return logged | {"train/dropped_rows": prepared.num_dropped.float() / (count + prepared.num_dropped)}

    def on_validation_epoch_start(self) -> None:
        """Reset the sums and update the scheduled values, so that the validation loss is that of the current step."""
        self._validation = {}
        self.follow_schedules()

    def validation_step(self, batch: tuple[FeatureBatch, Tensor | None], batch_idx: int) -> None:
        """Compute the loss at the training depth and the simulated acceptance up to `validation_depth`."""
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
        """Log the means over the validation data."""
        logged = self.validation_metrics()
        length = logged.pop("val/acceptance_length", None)
        self.log_dict(logged)
        if length is not None:
            self.log("val/acceptance_length", length, prog_bar=True)

    def validation_metrics(self) -> dict[str, Tensor]:
        """Reduce the sums of the validation over processes once, and return the means."""
        if not self._validation:
            return {}
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
        return {name: value.float() for name, value in logged.items()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm before clipping."""
        gradients = [p.grad for p in self.draft.parameters() if p.grad is not None]
        if gradients and self.trainer.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    def own_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of the head's parameters."""
        optimizer = self.make_optimizer([p for p in self.draft.parameters() if p.requires_grad])
        return allow_clipping(optimizer, self.trainer.precision)

    def learning_rate_factor(self) -> Callable[[int], float]:
        """Return the learning rate factor as a function of the optimizer step of the run."""
        num_steps = int(self.trainer.estimated_stepping_batches)
        return lambda step: self.schedule.factor(step, num_steps)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and a per-step schedule over the estimated number of optimizer steps."""
        optimizer = self.own_optimizer()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def allow_clipping(optimizer: torch.optim.Optimizer, precision: Any) -> torch.optim.Optimizer:
    """Let Lightning clip the gradients of a fused optimizer, which it refuses because it could unscale them itself.

    Without a GradScaler (precision 16-mixed) there is nothing to unscale.
    """
    if precision != "16-mixed" and hasattr(optimizer, "_step_supports_amp_scaling"):
        optimizer._step_supports_amp_scaling = False
    return optimizer
