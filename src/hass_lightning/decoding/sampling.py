"""Processed distributions and random draws of the decoders.

All random numbers come from one CPU generator, so that a seed gives the same text on any device.
Shapes: V vocabulary, N nodes (see the legend in types.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.types import Sampling


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Convert logits [..., V] to the processed distribution [..., V]: temperature, then top-k, then top-p.

    Computed in fp32 (fp64 for fp64 logits). Used for every distribution that is sampled from: the draft's, the target's
    and that of the bonus token (which the official code does not process, docs/method.md, Verification).
    """
    assert sampling.temperature > 0, "temperature 0 is an argmax, not a distribution"
    scores = logits if logits.dtype == torch.float64 else logits.float()
    scores = scores / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        # indices instead of a threshold, so that ties cannot admit more than k tokens
        values, indices = scores.topk(sampling.top_k, dim=-1)
        kept = _nucleus(values.softmax(-1), sampling.top_p)
        return torch.zeros_like(scores).scatter(-1, indices, kept)
    p = scores.softmax(-1)
    if sampling.top_p >= 1:
        return p
    values, indices = p.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(p).scatter(-1, indices, _nucleus(values, sampling.top_p))


def best(logits: Tensor) -> Tensor:
    """Greedy token [...] of logits [..., V], the first of equals.

    Four times faster than `torch.argmax` for bf16 on a CPU.
    """
    return logits.max(-1).indices


def _nucleus(sorted_p: Tensor, top_p: float) -> Tensor:
    """Keep the smallest prefix of a descending distribution whose mass reaches `top_p`, and renormalise it."""
    if top_p >= 1:
        return sorted_p
    before = sorted_p.cumsum(-1) - sorted_p
    kept = sorted_p.masked_fill(before >= top_p, 0)
    kept[..., 0] = sorted_p[..., 0]
    return kept / kept.sum(-1, keepdim=True)


def categorical(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample one index [...] per distribution from unnormalised `weights` [..., V] by inverse transform sampling."""
    cumulative = weights.double().cumsum(-1)
    uniform = torch.rand(weights.shape[:-1], dtype=torch.float64, generator=generator).to(weights.device)
    threshold = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)


def bernoulli(thresholds: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample independent booleans [N] that are True with probability `thresholds` [N]."""
    uniform = torch.rand(thresholds.shape, dtype=torch.float64, generator=generator)
    return uniform.to(thresholds.device) < thresholds
