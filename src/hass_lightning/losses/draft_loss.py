"""The loss of all alignment steps over a frozen LM head, in chunks of rows.

No [rows, vocabulary] tensor outlives its chunk: the gradient with respect to the features is taken inside the forward,
chunk by chunk, and handed to autograd as it is. Shapes: R rows, D hidden, J steps, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hass_lightning.losses.chunk import Chunk
from hass_lightning.losses.terms import LossTerm, TargetRows
from hass_lightning.target.head import DraftVocabulary

# Of one [rows, vocabulary] tensor on (a CPU, other devices). The C library hands a block of 32 MB or more back to the
# system at once, and fetching it again, page by page, takes longer than what is computed in it.
CHUNK_BYTES = (24 << 20, 256 << 20)


@dataclass
class LossOutput:
    """The total (with its gradient) and what is logged."""

    total: Tensor  # scalar
    values: dict[str, Tensor]  # "<term>/step<j>": sum over the rows, unweighted, detached
    hits: Tensor  # [J, R] bool: the draft's argmax is the wanted index


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to the step features was computed beforehand."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *features: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [feature.dtype for feature in features]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        # in fp32 until the end: a loss scaled for fp16 exceeds its range
        return None, None, *[(upstream[0] * g).to(dtype) for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)]


class DraftLoss(nn.Module):
    """Weighted sum of loss terms over masked rows and alignment steps.

    Args:
        terms: named terms; the name is the metric's name. A term with weight 0 is not computed.
        chunk_rows: rows whose logits are in memory at once, some six fp32 tensors of [rows, vocabulary]. None: so many
            that one such tensor takes CHUNK_BYTES.
        temperature: of the distillation. Both distributions are softmax(logits / temperature), in every term; the
            weights are yours to adapt (Hinton et al., arXiv 1503.02531, multiply by temperature²).
    """

    def __init__(self, terms: Mapping[str, LossTerm], chunk_rows: int | None = None, temperature: float = 1.0):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"model.loss.temperature={temperature} must be above 0 (1: the target's own).")
        self.temperature = temperature
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(
                f"model.loss.chunk_rows={chunk_rows} must be at least 1, or null to follow the vocabulary."
            )
        self.terms = nn.ModuleDict(dict(terms))
        self.chunk_rows = chunk_rows
        if not any(max(term.schedules["weight"].values) > 0 for term in terms.values()):
            raise ValueError("model.loss.terms has no term with a weight above 0: there is nothing to learn.")

    def _logits(self, vocabulary: DraftVocabulary, features: Tensor, dtype: torch.dtype) -> Tensor:
        logits = vocabulary.logits(features, decoding=False).to(dtype)
        return logits if self.temperature == 1 else logits / self.temperature

    def set_progress(self, progress: float) -> None:
        """Bring scheduled weights and K to their values at `progress` (0 to 1)."""
        for term in self.terms.values():
            term.set_progress(progress)  # type: ignore[operator]

    def forward(
        self,
        step_features: Sequence[Tensor],
        target_features: Tensor,
        vocabulary: DraftVocabulary,
        wanted: Tensor,
        normalizer: Tensor | float,
        step_weights: Sequence[float] | None = None,
    ) -> LossOutput:
        """Loss of the rows.

        Args:
            step_features: J tensors [R, D], the draft's estimates. target_features: [R, D].
            wanted: [R] draft index of the target's argmax (for the hits). normalizer: what the sums are divided by
                (the number of rows, over all processes).
            step_weights: one weight a step, default 1.
        """
        weights = step_weights or (1.0,) * len(step_features)
        active = {name: term for name, term in self.terms.items() if term.weight > 0}  # type: ignore[operator]
        num_rows = target_features.shape[0]
        with_gradient = torch.is_grad_enabled() and any(feature.requires_grad for feature in step_features)
        device = target_features.device
        wide = torch.float64 if step_features[0].dtype == torch.float64 else torch.float32
        gradients = [torch.zeros_like(feature, dtype=wide) for feature in step_features]
        total = torch.zeros((), device=device, dtype=wide)
        values = {
            f"{name}/step{step}": torch.zeros((), device=device, dtype=wide)
            for name in active
            for step in range(1, len(step_features) + 1)
        }
        hits = torch.zeros(len(step_features), num_rows, dtype=torch.bool, device=device)
        chunk_rows = self.chunk_rows or max(1, CHUNK_BYTES[device.type != "cpu"] // (4 * len(vocabulary)))
        scratch = torch.empty(min(chunk_rows, num_rows), len(vocabulary), device=device, dtype=wide)
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            with torch.no_grad():
                logits = self._logits(vocabulary, target_features[rows], wide)
                target = TargetRows(target_features[rows].to(wide), logits)
            for number, features in enumerate(step_features):
                leaf = features[rows].detach().requires_grad_(with_gradient)
                with torch.set_grad_enabled(with_gradient):
                    draft_logits = self._logits(vocabulary, leaf, wide)
                # autocast would take the dot products of the terms in bf16
                with torch.set_grad_enabled(with_gradient), torch.autocast(device.type, enabled=False):
                    ends = [x.detach().requires_grad_(with_gradient) for x in (leaf.to(wide), draft_logits)]
                    seen = Chunk(ends[0], ends[1], target, number + 1, scratch=scratch[: len(leaf)])
                    loss = torch.zeros((), device=device, dtype=wide)
                    for name, term in active.items():
                        value = term(seen).sum()
                        values[f"{name}/step{number + 1}"] += value.detach()
                        loss = loss + term.weight * value  # type: ignore[operator]
                    loss = loss * weights[number]
                    to_features, to_logits = seen.gradients(loss) if loss.requires_grad else (None, None)
                    if to_features is not None and to_logits is not None:
                        # sums, divided in fp32 below: in fp16 the tail of (q - p) / N is zero
                        (through,) = torch.autograd.grad(draft_logits, leaf, to_logits)
                        gradients[number][rows] = (through.to(wide) + to_features) / normalizer
                total += loss.detach() / normalizer
                hits[number, rows] = draft_logits.detach().argmax(-1) == wanted[rows]
        if with_gradient:
            total = _KnownGradient.apply(total, gradients, *step_features)
        return LossOutput(total, values, hits)
