"""Loss terms beside the paper's three: those its appendix compares with top-K, and divergences beyond it.

The paper's text was not at hand (hass.md §1.3 lists the names alone): where a name leaves a choice, the docstring says
which reading this is. Shapes: R rows, Vd draft vocabulary, K kept tokens (types.py has the legend); p target, q draft.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from hass_lightning.losses.terms import LossTerm, Rows, TopK


class TopP(LossTerm):
    """L = -Σ_{v ∈ N} p_v log q_v, N the nucleus: the most probable tokens that together just reach mass `top_p`.

    Top-P of the paper's appendix: as many tokens as the row needs, instead of K. Nothing is renormalised, as in HAD;
    nucleus as in Holtzman et al., arXiv 1904.09751.
    """

    top_p: float

    def __init__(self, weight: Any = 1.0, top_p: Any = 0.9):
        super().__init__(weight)
        self.number("top_p", top_p, least=0)

    def forward(self, rows: Rows) -> Tensor:
        """[R]."""
        probs, indices = rows.target.top_k(rows.target.probs.shape[-1])
        before = probs.cumsum(-1) - probs  # the mass of the more probable tokens
        width = max(1, int((before < self.top_p).sum(-1).max()))
        kept = torch.where(before < self.top_p, probs, 0)[:, :width]
        return -torch.linalg.vecdot(kept, rows.log_probs_at(indices[:, :width]))


class NormedTopK(TopK):
    """L = -Σ_{v ∈ top-K of p} p̂_v log q_v with p̂ summing to 1: every row weighs the same, however flat p is.

    Normed Top-K of the paper's appendix. `linear`: p̂ = p / Σ_{top-K} p. `softmax`: p̂ = softmax of the K probabilities
    (of the logits it would be `linear` again), which is nearly uniform. q is normalised over the whole vocabulary.
    """

    def __init__(self, weight: Any = 1.0, k: Any = 10, norm: Literal["linear", "softmax"] = "linear"):
        super().__init__(weight, k)
        if norm not in ("linear", "softmax"):
            raise ValueError(f"model.loss.terms.<NormedTopK>.norm={norm} is neither linear nor softmax.")
        self.norm = norm

    def forward(self, rows: Rows) -> Tensor:
        """[R]."""
        probs, indices = rows.target.top_k(self.k)
        normed = probs.softmax(-1) if self.norm == "softmax" else probs / probs.sum(-1, keepdim=True)
        return -torch.linalg.vecdot(normed, rows.log_probs_at(indices))


class BidirectionalTopK(TopK):
    """L = -Σ_{v ∈ A ∪ B} p_v log q_v, A the top-K of p, B the top-K of q: also what the draft would wrongly propose.

    Bi-directional Top-K of the paper's appendix, each token of the union counted once.
    """

    def forward(self, rows: Rows) -> Tensor:
        """[R]."""
        probs, indices = rows.target.top_k(self.k)
        own = rows.draft_logits.detach().topk(indices.shape[-1]).indices
        new = (own.unsqueeze(-1) != indices.unsqueeze(-2)).all(-1)  # [R, K], not in A
        own_probs = torch.where(new, rows.target.probs.gather(-1, own), 0)
        log_q = rows.log_probs_at(torch.cat([indices, own], dim=-1))
        return -torch.linalg.vecdot(torch.cat([probs, own_probs], dim=-1), log_q)


class RecallAtK(TopK):
    """L = 1 - (1/K) Σ_{v ∈ top-K of p} σ((K - r_v) / a), with the smooth rank r_v = 1 + Σ_{u ≠ v} σ((z_u - z_v) / b).

    Recall@k surrogate (Patel et al., arXiv 2108.11179) with the target's top-K as the positives and the draft's
    logits z as the scores: the share of them among the draft's K first. a = k_temperature; b = rank_temperature, 0.01
    in the source, for cosine similarities: logits spread wider. Needs [R, K, Vd] numbers: lower chunk_rows.
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
        """[R]."""
        z = rows.draft_logits
        _, indices = rows.target.top_k(self.k)
        above = (z.unsqueeze(-2) - z.gather(-1, indices).unsqueeze(-1)) / self.rank_temperature  # [R, K, Vd]
        rank = 0.5 + above.sigmoid().sum(-1)  # the token itself adds σ(0) = ½
        return 1 - ((indices.shape[-1] - rank) / self.k_temperature).sigmoid().mean(-1)


class LogitDifferences(TopK):
    """L = D(target's top-K) + D(draft's top-K), D(S) = KL(softmax_{i<j} (y_i - y_j)/T ‖ softmax_{i<j} (z_i - z_j)/T).

    BiLD, bi-directional logits difference (Li et al., arXiv 2406.13555): y the target's logits, z the draft's, pairs
    ordered by whoever chose S. The order within the top-K counts, the tail not at all. Defaults are the source's.
    """

    def __init__(self, weight: Any = 1.0, k: Any = 8, temperature: float = 3.0):
        super().__init__(weight, k)
        self.number("k", k, least=2, whole=True)  # a pair needs two
        if temperature <= 0:
            raise ValueError(f"model.loss.terms.<LogitDifferences>.temperature={temperature} must be above 0.")
        self.temperature = temperature

    def forward(self, rows: Rows) -> Tensor:
        """[R]."""
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
    """L = Σ_v q_v (log q_v - log p_v): seeks a mode of p instead of covering it (MiniLLM, arXiv 2306.08543)."""

    def forward(self, rows: Rows) -> Tensor:
        """[R]."""
        log_q = rows.log_probs
        return torch.linalg.vecdot(log_q.exp(), log_q - rows.target.log_probs)


class JensenShannon(LossTerm):
    """L = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q): symmetric, at most log 2 (Lin 1991; GKD, arXiv 2306.13649)."""

    def forward(self, rows: Rows) -> Tensor:
        """[R]."""
        log_p, log_q = rows.target.log_probs, rows.log_probs
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        forward = torch.linalg.vecdot(rows.target.probs, log_p - log_m)
        return 0.5 * (forward + torch.linalg.vecdot(log_q.exp(), log_q - log_m))


class TotalVariation(LossTerm):
    """L = ½ Σ_v |p_v - q_v| = 1 - Σ_v min(p_v, q_v): one minus the probability that a sampled draft is accepted.

    DistillSpec (arXiv 2310.08461) trains with it; the identity is that of Leviathan et al., arXiv 2211.17192.
    """

    def forward(self, rows: Rows) -> Tensor:
        """[R]."""
        return 0.5 * (rows.target.probs - rows.log_probs.exp()).abs().sum(-1)


class ExpectedAcceptance(LossTerm):
    """L = -log Σ_v min(p_v, q_v): maximises the expected acceptance of a sampled draft.

    The negative log-acceptance of LK losses (arXiv 2602.23881): total variation's direction, a row's gradient divided
    by its acceptance, so that it does not vanish where p and q hardly overlap. Its hybrid with KL is two terms of ours.
    """

    def forward(self, rows: Rows) -> Tensor:
        """[R]."""
        # in logs: q underflows in fp32 where a head is still bad, and a row without any overlap has no gradient
        return -torch.minimum(rows.target.log_probs, rows.log_probs).logsumexp(-1)
