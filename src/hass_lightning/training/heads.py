"""Several heads trained in one pass over the data: the cells of a sweep that share target, data and batch order.

Features, embeddings, the target's logits and soft targets are computed once per batch. Everything else is that of the
separate runs: each head has its own loss, alignment, gradient clipping, optimizer settings and schedule. The heads have
no parameter in common, so one backward pass of the summed losses gives each head the gradient of its own loss, and on a
CPU the weights are those of the separate runs to the last bit (tests/training/test_heads.py).

All heads are parameter groups of one optimizer. Lightning then counts one step per batch, which the order of the
batches, schedules and resuming depend on; with manual optimization it would count one per head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hass_lightning.losses import compute_together
from hass_lightning.training.callbacks import KeepLastDraft, SaveBestDraft
from hass_lightning.training.module import HassModule, allow_clipping
from hass_lightning.types import FeatureBatch

SHARED = ("last_checkpoint", "throughput", "learning_rate", "progress")  # callbacks that do not depend on a head


class HeadsModule(L.LightningModule):
    """Trains several heads on the same batches. Metrics are those of `HassModule`, as `<name>/train/loss` etc.

    Args:
        modules: a module per head, by name, with the same target and draft vocabulary.

    Raises:
        ValueError: there is no module, they differ in target, draft vocabulary or class of the optimizer, or one reads
            its own tokens, for which the others have no labels.
    """

    def __init__(self, modules: Mapping[str, HassModule]):
        super().__init__()
        if not modules:
            raise ValueError("heads has no head to train.")
        self.names = tuple(modules)
        self.example_tokens = 0  # loss positions of this process so far
        self._own: list[torch.optim.Optimizer] = []
        first = next(iter(modules.values()))
        for name, module in modules.items():
            if module.head is not first.head or not _equal(module.token_ids, first.token_ids):
                raise ValueError(f"heads.{name} has another target or model.draft.vocab_size than {self.names[0]}.")
            if module.planned_alignment.inputs == "own_tokens":
                raise ValueError(f"heads.{name}.alignment.inputs=own_tokens needs a run of its own.")
            module.vocabulary = first.vocabulary  # one object: `compute_together` shares its logits
            # a direct child, to which Lightning passes the Trainer
            self.add_module(f"head_{name}", module)

    @property
    def modules_by_name(self) -> dict[str, HassModule]:
        """The module of each head."""
        return {name: getattr(self, f"head_{name}") for name in self.names}

    def setup(self, stage: str) -> None:
        """Set up the first module and give its embedding and LM head to the others."""
        first, *others = self.modules_by_name.values()
        first.setup(stage)
        for module in others:
            module.head, module.vocabulary = first.head, first.vocabulary

    def on_train_start(self) -> None:
        """Announce the amount of computation to each loss."""
        for module in self.modules_by_name.values():
            module.on_train_start()

    def on_train_batch_start(self, batch: tuple[FeatureBatch, Tensor | None], batch_idx: int) -> None:
        """Update the scheduled values."""
        for module in self.modules_by_name.values():
            module.follow_schedules()

    def training_step(self, batch: tuple[FeatureBatch, Tensor | None], batch_idx: int) -> Tensor:
        """Return the sum of the heads' losses, each a mean over the loss positions of the step."""
        modules = self.modules_by_name
        first = modules[self.names[0]]
        prepared, normalizer = first.prepare(*batch), first.normalizer()
        outputs = compute_together([module.start_loss(prepared, normalizer) for module in modules.values()])
        self.example_tokens += len(prepared.wanted)
        for (name, module), output in zip(modules.items(), outputs, strict=True):
            module.check_finite(output)
            logged = {"train/loss": output.total.detach()} | module.training_metrics(prepared, output)
            self.log_dict(_named(name, logged))
        total = torch.stack([output.total for output in outputs]).sum()
        self.log("train/loss", total.detach(), prog_bar=True, sync_dist=self.trainer.world_size > 1)
        return total

    def on_validation_epoch_start(self) -> None:
        """Reset the sums of each head."""
        for module in self.modules_by_name.values():
            module.on_validation_epoch_start()

    def validation_step(self, batch: tuple[FeatureBatch, Tensor | None], batch_idx: int) -> None:
        """Validate each head."""
        for module in self.modules_by_name.values():
            module.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the means of each head."""
        for name, module in self.modules_by_name.items():
            self.log_dict(_named(name, module.validation_metrics()))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each head by its own norm."""
        for own in self._own:
            self.clip_gradients(own, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """Return one optimizer with the parameter groups of all heads, and a schedule for each group.

        Raises:
            ValueError: if the heads have different classes of optimizers.
        """
        modules = list(self.modules_by_name.values())
        self._own = [module.own_optimizer() for module in modules]
        if len({type(own) for own in self._own}) > 1:
            raise ValueError("heads must have the same model.optimizer._target_; its settings may differ.")
        groups = [dict(group) for own in self._own for group in own.param_groups]
        optimizer = allow_clipping(modules[0].make_optimizer(groups), self.trainer.precision)
        factors = [
            module.learning_rate_factor()
            for module, own in zip(modules, self._own, strict=True)
            for _ in own.param_groups
        ]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _named(name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in values.items()}


def heads_callbacks(callbacks: Mapping[str, Callback], heads: Sequence[str], run_dir: Path) -> dict[str, Callback]:
    """Return those of `callbacks` that do not depend on a head, and for each head those that save it."""
    kept = {name: callback for name, callback in callbacks.items() if name in SHARED}
    for head in heads:
        kept[f"best_draft_{head}"] = SaveBestDraft(str(run_dir / head / "draft"), head=head)
        kept[f"last_draft_{head}"] = KeepLastDraft(run_dir / head / "draft", head)
    return kept
