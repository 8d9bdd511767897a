"""Loss terms: EAGLE's two and HASS's top-K (paper §3.1; hass.md §1.2). One class, one formula, one weight.

A term sees rows and returns one number a row, unreduced, in fp32 (or wider). Masking, weighting, averaging and
chunking are `DraftLoss`'s. Shapes: R rows, D hidden, Vd draft vocabulary, K kept tokens (types.py has the legend).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hass_lightning.schedules import Scheduled, scheduled


@dataclass
class TargetRows:
    """What the target says at some rows: computed once, shared by all alignment steps and terms."""

    features: Tensor  # [R, D], the features to be estimated
    logits: Tensor  # [R, Vd], over the draft vocabulary
    _probs: Tensor | None = None
    _log_probs: Tensor | None = None
    _top: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def probs(self) -> Tensor:
        """Soft targets p [R, Vd]: the target's distribution, renormalised over the draft vocabulary."""
        if self._probs is None:
            self._probs = self.logits.softmax(-1)
        return self._probs

    @property
    def log_probs(self) -> Tensor:
        """log p [R, Vd], finite where p underflows."""
        if self._log_probs is None:
            self._log_probs = self.logits.log_softmax(-1)
        return self._log_probs

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """The K largest probabilities [R, K] and their indices [R, K]."""
        if k not in self._top:
            self._top[k] = tuple(self.probs.topk(min(k, self.probs.shape[-1])))  # type: ignore[assignment]
        return self._top[k]


@dataclass
class Rows:
    """The rows a loss term sees: the draft's side with gradient, the target's without.

    `draft_logits` serves any term. What the methods give is the same by a cheaper way: `DraftLoss` then takes the
    gradient without a [R, Vd] tensor for each of them (chunk.py).
    """

    draft_features: Tensor  # [R, D], f
    draft_logits: Tensor  # [R, Vd], z = H f
    target: TargetRows
    step: int  # alignment step, from 1
    _lse: Tensor | None = None
    _log_probs: Tensor | None = None

    @property
    def log_normalizer(self) -> Tensor:
        """log Σ_v exp z_v [R], shared by the terms: log q = z - log_normalizer."""
        if self._lse is None:
            self._lse = self.draft_logits.logsumexp(-1)
        return self._lse

    @property
    def expected_logit(self) -> Tensor:
        """Σ_v p_v z_v [R], under the target's distribution."""
        return torch.linalg.vecdot(self.target.probs, self.draft_logits)

    @property
    def log_probs(self) -> Tensor:
        """log q [R, Vd]; for K of them take `log_probs_at`, which spares a [R, Vd] tensor."""
        if self._log_probs is None:
            self._log_probs = self.draft_logits - self.log_normalizer.unsqueeze(-1)
        return self._log_probs

    def logits_at(self, indices: Tensor) -> Tensor:
        """z at the draft indices [R, K]: [R, K]."""
        return self.draft_logits.gather(-1, indices)

    def log_probs_at(self, indices: Tensor) -> Tensor:
        """log q at the draft indices [R, K], normalised over the whole vocabulary: [R, K]."""
        return self.logits_at(indices) - self.log_normalizer.unsqueeze(-1)


class LossTerm(nn.Module):
    """One term of the loss: subclass it, implement `forward(rows) -> [R]`, name it in `model.loss.terms`.

    The weight, and what a term passes through `number`, may be a schedule (schedules.py) instead of a number.
    """

    weight: float

    def __init__(self, weight: Any = 1.0):
        super().__init__()
        self.schedules: dict[str, Scheduled] = {}
        self.number("weight", weight, least=0)

    def number(self, name: str, value: Any, least: float | None = None, whole: bool = False) -> None:
        """Set `self.<name>` to a number, or to what its schedule says at each step."""
        self.schedules[name] = scheduled(f"model.loss.terms.<{type(self).__name__}>.{name}", value, least, whole)
        setattr(self, name, self.schedules[name].at(0))

    def set_progress(self, progress: float) -> None:
        """Bring every number to its value at `progress` (0 to 1)."""
        for name, schedule in self.schedules.items():
            setattr(self, name, schedule.at(progress))

    def forward(self, rows: Rows) -> Tensor:
        """One loss a row [R], without the weight."""
        raise NotImplementedError


class FeatureRegression(LossTerm):
    """L_v = mean_d SmoothL1(f_d - g_d): EAGLE's regression onto the target's feature (hass.md §1.2)."""

    def __init__(self, weight: Any = 1.0, beta: float = 1.0):
        super().__init__(weight)
        self.beta = beta

    def forward(self, rows: Rows) -> Tensor:
        """[R], the mean over the hidden dimension."""
        target = rows.target.features.to(rows.draft_features.dtype)
        return F.smooth_l1_loss(rows.draft_features, target, reduction="none", beta=self.beta).mean(-1)


class SoftCrossEntropy(LossTerm):
    """L_p = -Σ_v p_v log q_v = lse(z) - Σ_v p_v z_v over the (draft) vocabulary (hass.md §1.2)."""

    def forward(self, rows: Rows) -> Tensor:
        """[R]."""
        return rows.log_normalizer - rows.expected_logit


class TopK(LossTerm):
    """HAD: L_topK = -Σ_{v ∈ top-K of p} p_v log q_v; p and q are not renormalised (paper §3.1; hass.md §1.2)."""

    k: int

    def __init__(self, weight: Any = 1.0, k: Any = 10):
        super().__init__(weight)
        self.number("k", k, least=1, whole=True)

    def forward(self, rows: Rows) -> Tensor:
        """[R]."""
        probs, indices = rows.target.top_k(self.k)
        return -torch.linalg.vecdot(probs, rows.log_probs_at(indices))
