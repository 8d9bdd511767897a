"""Distributions that are sampled from, and the two kinds of random event of a decoder.

All randomness is drawn on the host from one CPU generator, so that a seed gives the same text on any device.
Shapes: R rows, V vocabulary, N nodes (types.py has the legend).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.types import Sampling


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [..., V] to the processed distribution [..., V]: temperature, then top-k, then top-p.

    Computed in fp32 (fp64 logits stay fp64). Every distribution that is sampled from goes through here: the draft's,
    the target's, and the one the bonus token is drawn from (the official code forgets that one, hass.md §5.3).
    """
    assert sampling.temperature > 0, "temperature 0 is an argmax, not a distribution"
    scores = logits if logits.dtype == torch.float64 else logits.float()
    scores = scores / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        # the indices of topk, not a threshold: ties must not let a k+1st token in
        values, indices = scores.topk(sampling.top_k, dim=-1)
        kept = _nucleus(values.softmax(-1), sampling.top_p)
        return torch.zeros_like(scores).scatter(-1, indices, kept)
    p = scores.softmax(-1)
    if sampling.top_p >= 1:
        return p
    values, indices = p.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(p).scatter(-1, indices, _nucleus(values, sampling.top_p))


def best(logits: Tensor) -> Tensor:
    """The greedy choice [...] of logits [..., V], the first of equals.

    `argmax` by another name: for bf16 on a CPU torch's own takes four times as long as `max`.
    """
    return logits.max(-1).indices


def _nucleus(sorted_p: Tensor, top_p: float) -> Tensor:
    """The smallest head of a descending distribution that holds `top_p`, renormalised."""
    if top_p >= 1:
        return sorted_p
    before = sorted_p.cumsum(-1) - sorted_p
    kept = sorted_p.masked_fill(before >= top_p, 0)
    kept[..., 0] = sorted_p[..., 0]
    return kept / kept.sum(-1, keepdim=True)


def categorical(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index [...] a row of unnormalised `weights` [..., V], by the inverse CDF of a host uniform."""
    cumulative = weights.double().cumsum(-1)
    uniform = torch.rand(weights.shape[:-1], dtype=torch.float64, generator=generator).to(weights.device)
    threshold = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)


def bernoulli(thresholds: Tensor, generator: torch.Generator | None) -> Tensor:
    """True with probability `thresholds` [N], independently: bool [N]."""
    uniform = torch.rand(thresholds.shape, dtype=torch.float64, generator=generator)
    return uniform.to(thresholds.device) < thresholds
