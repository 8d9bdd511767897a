"""Loss terms of EAGLE (feature regression, soft cross-entropy) and HASS (top-K; paper §3.1, docs/method.md, HAD).

A term returns one unreduced value per position, in fp32 or wider. `DraftLoss` masks, weights, averages and chunks.
Shapes: R loss positions, D hidden, Vd draft vocabulary, K kept tokens (see the legend in types.py).
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
    """Features and distributions of the target at some loss positions, shared by all alignment steps and terms."""

    features: Tensor  # [R, D], the features to estimate
    logits: Tensor  # [R, Vd], over the draft vocabulary
    _probs: Tensor | None = None
    _narrow: Tensor | None = None
    _log_probs: Tensor | None = None
    _top: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def probs(self) -> Tensor:
        """Soft targets p [R, Vd]: the target's distribution, renormalized over the draft vocabulary."""
        if self._probs is None:
            self._probs = self.logits.softmax(-1)
        return self._probs

    def probs_in(self, dtype: torch.dtype) -> Tensor:
        """`probs`, cast to `dtype` if it has a lower precision."""
        if dtype.itemsize >= self.probs.dtype.itemsize:
            return self.probs
        if self._narrow is None or self._narrow.dtype != dtype:
            self._narrow = self.probs.to(dtype)
        return self._narrow

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities log p [R, Vd]; finite where p underflows."""
        if self._log_probs is None:
            self._log_probs = self.logits.log_softmax(-1)
        return self._log_probs

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the K largest probabilities [R, K] and their indices [R, K]."""
        if k not in self._top:
            self._top[k] = tuple(self.probs.topk(min(k, self.probs.shape[-1])))  # type: ignore[assignment]
        return self._top[k]


@dataclass
class Rows:
    """Input of a loss term: draft features and logits with gradient, target values without.

    `draft_logits` is enough for any term. The properties and methods below are cheaper: `DraftLoss` computes their
    gradients without an additional [R, Vd] tensor for each use (chunk.py).
    """

    draft_features: Tensor  # [R, D], f
    draft_logits: Tensor  # [R, Vd], z = H f
    target: TargetRows
    step: int  # alignment step, starting at 1
    _lse: Tensor | None = None
    _log_probs: Tensor | None = None

    @property
    def log_normalizer(self) -> Tensor:
        """Log-normalizer log Σ_v exp z_v [R], shared by the terms: log q = z - log_normalizer."""
        if self._lse is None:
            self._lse = self.draft_logits.logsumexp(-1)
        return self._lse

    @property
    def expected_logit(self) -> Tensor:
        """Expected logit Σ_v p_v z_v [R] under the target's distribution."""
        return torch.linalg.vecdot(self.target.probs, self.draft_logits)

    @property
    def log_probs(self) -> Tensor:
        """Draft log-probabilities log q [R, Vd]. `log_probs_at` gives K of them without an [R, Vd] tensor."""
        if self._log_probs is None:
            self._log_probs = self.draft_logits - self.log_normalizer.unsqueeze(-1)
        return self._log_probs

    def logits_at(self, indices: Tensor) -> Tensor:
        """Logits z [R, K] at the draft vocabulary indices [R, K]."""
        return self.draft_logits.gather(-1, indices)

    def log_probs_at(self, indices: Tensor) -> Tensor:
        """Log-probabilities log q [R, K] at the draft indices [R, K], normalized over the whole draft vocabulary."""
        return self.logits_at(indices) - self.log_normalizer.unsqueeze(-1)


class LossTerm(nn.Module):
    """Base class of loss terms.

    Subclasses implement `forward(rows) -> [R]` and are listed in `model.loss.terms`. The weight, and every value set
    through `number`, may be a schedule (schedules.py) instead of a number.
    """

    weight: float

    def __init__(self, weight: Any = 1.0):
        super().__init__()
        self.schedules: dict[str, Scheduled] = {}
        self.number("weight", weight, least=0)

    def number(self, name: str, value: Any, least: float | None = None, whole: bool = False) -> None:
        """Set `self.<name>` to a number, or to a schedule that `set_progress` evaluates at each step."""
        self.schedules[name] = scheduled(f"model.loss.terms.<{type(self).__name__}>.{name}", value, least, whole)
        setattr(self, name, self.schedules[name].at(0))

    def set_progress(self, progress: float) -> None:
        """Set every scheduled number to its value at `progress` (0 to 1)."""
        for name, schedule in self.schedules.items():
            setattr(self, name, schedule.at(progress))

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R], without the weight."""
        raise NotImplementedError


class FeatureRegression(LossTerm):
    """Smooth L1 regression onto the target's feature, L_v = mean_d SmoothL1(f_d - g_d) (EAGLE; docs/method.md, HAD)."""

    def __init__(self, weight: Any = 1.0, beta: float = 1.0):
        super().__init__(weight)
        self.beta = beta

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R], averaged over the hidden dimension."""
        target = rows.target.features.to(rows.draft_features.dtype)
        return F.smooth_l1_loss(rows.draft_features, target, reduction="none", beta=self.beta).mean(-1)


class SoftCrossEntropy(LossTerm):
    """Cross-entropy with soft targets over the draft vocabulary (EAGLE; docs/method.md, HAD).

    L_p = -Σ_v p_v log q_v = lse(z) - Σ_v p_v z_v.
    """

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        return rows.log_normalizer - rows.expected_logit


class TopK(LossTerm):
    """Harmonized objective distillation (HAD), the top-K loss (paper §3.1; docs/method.md, HAD).

    L_topK = -Σ_{v ∈ top-K of p} p_v log q_v; p and q are not renormalized.
    """

    k: int

    def __init__(self, weight: Any = 1.0, k: Any = 10):
        super().__init__(weight)
        self.number("k", k, least=1, whole=True)

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        probs, indices = rows.target.top_k(self.k)
        return -torch.linalg.vecdot(probs, rows.log_probs_at(indices))
