"""Additional loss terms: the alternatives to top-K in the paper's appendix, and other divergences.

The terms of the appendix follow their names (docs/method.md, HAD), not its text, which was not available; docstrings
state the interpretation where a name is ambiguous. In all formulas p is the target's distribution and q the draft's.
Shapes: R loss positions, Vd draft vocabulary, K kept tokens (see the legend in types.py).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from hass_lightning.losses.terms import LossTerm, Rows, TopK


class TopP(LossTerm):
    """Top-P loss of the paper's appendix: cross-entropy over the nucleus of the target's distribution.

    L = -Σ_{v ∈ N} p_v log q_v, where N is the smallest set of most probable tokens whose mass reaches `top_p` (Holtzman
    et al., arXiv 1904.09751). As in HAD, nothing is renormalized; unlike K, the size of N differs between positions.
    """

    top_p: float

    def __init__(self, weight: Any = 1.0, top_p: Any = 0.9):
        super().__init__(weight)
        self.number("top_p", top_p, least=0)

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        probs, indices = rows.target.top_k(rows.target.probs.shape[-1])
        before = probs.cumsum(-1) - probs  # mass of the more probable tokens
        width = max(1, int((before < self.top_p).sum(-1).max()))
        kept = torch.where(before < self.top_p, probs, 0)[:, :width]
        return -torch.linalg.vecdot(kept, rows.log_probs_at(indices[:, :width]))


class NormedTopK(TopK):
    """Normed top-K loss of the paper's appendix: every position has the same total weight, however flat p is.

    L = -Σ_{v ∈ top-K of p} p̂_v log q_v with Σ p̂ = 1. q is normalized over the whole draft vocabulary.

    Args:
        norm: `linear` uses p̂ = p / Σ_{top-K} p. `softmax` uses the softmax of the K probabilities, which is nearly
            uniform (the softmax of their logits would equal `linear`).

    Raises:
        ValueError: if `norm` is neither.
    """

    def __init__(self, weight: Any = 1.0, k: Any = 10, norm: Literal["linear", "softmax"] = "linear"):
        super().__init__(weight, k)
        if norm not in ("linear", "softmax"):
            raise ValueError(f"model.loss.terms.<NormedTopK>.norm={norm} is neither linear nor softmax.")
        self.norm = norm

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        probs, indices = rows.target.top_k(self.k)
        normed = probs.softmax(-1) if self.norm == "softmax" else probs / probs.sum(-1, keepdim=True)
        return -torch.linalg.vecdot(normed, rows.log_probs_at(indices))


class BidirectionalTopK(TopK):
    """Bi-directional top-K loss of the paper's appendix; includes tokens that the draft would wrongly propose.

    L = -Σ_{v ∈ A ∪ B} p_v log q_v, where A is the top-K of p and B the top-K of q. Each token of the union counts once.
    """

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        probs, indices = rows.target.top_k(self.k)
        own = rows.draft_logits.detach().topk(indices.shape[-1]).indices
        new = (own.unsqueeze(-1) != indices.unsqueeze(-2)).all(-1)  # [R, K], not in A
        own_probs = torch.where(new, rows.target.probs.gather(-1, own), 0)
        log_q = rows.log_probs_at(torch.cat([indices, own], dim=-1))
        return -torch.linalg.vecdot(torch.cat([probs, own_probs], dim=-1), log_q)


class RecallAtK(TopK):
    """Differentiable recall@K surrogate (Patel et al., arXiv 2108.11179).

    L = 1 - (1/K) Σ_{v ∈ top-K of p} σ((K - r_v) / a), with the smooth rank r_v = 1 + Σ_{u ≠ v} σ((z_u - z_v) / b).
    The target's top-K tokens are the positives and the draft's logits z the scores. Allocates [R, K, Vd] numbers, so
    lower `chunk_rows` if memory is short.

    Args:
        k_temperature: a.
        rank_temperature: b. The source uses 0.01 for cosine similarities; logits are spread wider.

    Raises:
        ValueError: if a temperature is not above 0.
    """

    def __init__(self, weight: Any = 1.0, k: Any = 10, k_temperature: float = 1.0, rank_temperature: float = 0.1):
        super().__init__(weight, k)
        if k_temperature <= 0 or rank_temperature <= 0:
            raise ValueError(
                f"model.loss.terms.<RecallAtK>: k_temperature={k_temperature} and rank_temperature={rank_temperature} "
                "must be above 0."
            )
        self.k_temperature, self.rank_temperature = k_temperature, rank_temperature

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        z = rows.draft_logits
        _, indices = rows.target.top_k(self.k)
        above = (z.unsqueeze(-2) - z.gather(-1, indices).unsqueeze(-1)) / self.rank_temperature  # [R, K, Vd]
        rank = 0.5 + above.sigmoid().sum(-1)  # the token itself adds σ(0) = ½
        return 1 - ((indices.shape[-1] - rank) / self.k_temperature).sigmoid().mean(-1)


class LogitDifferences(TopK):
    """Bi-directional logits difference, BiLD (Li et al., arXiv 2406.13555), with the defaults of the source.

    L = D(target's top-K) + D(draft's top-K), D(S) = KL(softmax_{i<j} (y_i - y_j)/T ‖ softmax_{i<j} (z_i - z_j)/T),
    where y are the target's logits and z the draft's. Pairs are ordered by the model whose top-K S is. The loss depends
    on the order within the top-K and not on the tail.

    Raises:
        ValueError: if `k` is below 2 or `temperature` is not above 0.
    """

    def __init__(self, weight: Any = 1.0, k: Any = 8, temperature: float = 3.0):
        super().__init__(weight, k)
        self.number("k", k, least=2, whole=True)  # a pair needs two tokens
        if temperature <= 0:
            raise ValueError(f"model.loss.terms.<LogitDifferences>.temperature={temperature} must be above 0.")
        self.temperature = temperature

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        _, indices = rows.target.top_k(self.k)
        own = rows.draft_logits.detach().topk(indices.shape[-1]).indices
        return self._divergence(rows, indices) + self._divergence(rows, own)

    def _divergence(self, rows: Rows, indices: Tensor) -> Tensor:
        first, second = torch.triu_indices(indices.shape[-1], indices.shape[-1], offset=1, device=indices.device)
        log_target, log_draft = (
            ((chosen[:, first] - chosen[:, second]) / self.temperature).log_softmax(-1)
            for chosen in (rows.target.logits.gather(-1, indices), rows.draft_logits.gather(-1, indices))
        )
        return torch.linalg.vecdot(log_target.exp(), log_target - log_draft)


class ReverseKL(LossTerm):
    """Reverse KL divergence, which is mode-seeking (MiniLLM, arXiv 2306.08543): L = Σ_v q_v (log q_v - log p_v)."""

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        log_q = rows.log_probs
        return torch.linalg.vecdot(log_q.exp(), log_q - rows.target.log_probs)


class JensenShannon(LossTerm):
    """Jensen-Shannon divergence, symmetric and at most log 2 (Lin 1991; GKD, arXiv 2306.13649).

    L = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q).
    """

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        log_p, log_q = rows.target.log_probs, rows.log_probs
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        forward = torch.linalg.vecdot(rows.target.probs, log_p - log_m)
        return 0.5 * (forward + torch.linalg.vecdot(log_q.exp(), log_q - log_m))


class TotalVariation(LossTerm):
    """Total variation distance, one minus the acceptance probability of a sampled draft token.

    L = ½ Σ_v |p_v - q_v| = 1 - Σ_v min(p_v, q_v) (Leviathan et al., arXiv 2211.17192). Used for training by DistillSpec
    (arXiv 2310.08461).
    """

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        return 0.5 * (rows.target.probs - rows.log_probs.exp()).abs().sum(-1)


class ExpectedAcceptance(LossTerm):
    """Negative log acceptance probability of a sampled draft token (LK losses, arXiv 2602.23881).

    L = -log Σ_v min(p_v, q_v). Its gradient is that of the total variation distance divided by the acceptance
    probability of the position, so it does not vanish where p and q hardly overlap. For the source's hybrid with KL,
    combine two terms.
    """

    def forward(self, rows: Rows) -> Tensor:
        """Loss of each position [R]."""
        # in log space: q of an untrained head underflows in fp32, and positions without overlap have no gradient then
        return -torch.minimum(rows.target.log_probs, rows.log_probs).logsumexp(-1)
