"""A plain HASS step with the cost structure of the official code, as a baseline (hass.md §2.5, §7.8-7.11).

All bands are projected again in each step, scores of all bands are one stacked [J, B, H, T, T] tensor, logits, soft
targets and log-probabilities are fp32 over the full vocabulary for every row, the top-K is searched again in each step,
and each step has a backward of its own. Unlike the official code the mask is exact (masked scores at -inf), so that the
losses are those of `hass_lightning`. The weights are those of an `EagleDraft`.
Shapes: B batch, T rows, D hidden, H heads, V vocabulary, J bands.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hass_lightning.draft import EagleDraft


def naive_forward(draft: EagleDraft, embeddings: Tensor, bands: list[Tensor], rotary) -> Tensor:
    """The estimate [B, T, D] of step J from all bands of features [B, T, D], oldest first."""
    attention = draft.layer.self_attn
    fused = [draft.fuse(embeddings, features) for features in bands]
    q = attention.queries(fused[-1], rotary)  # [B, H, T, d]
    projected = [attention.keys_values(u, rotary) for u in fused]
    groups = q.shape[1] // projected[0][0].shape[1]
    keys = torch.stack([k.repeat_interleave(groups, 1) for k, _ in projected])  # [J, B, H, T, d]
    values = torch.stack([v.repeat_interleave(groups, 1) for _, v in projected])
    num_rows, num_bands = q.shape[2], len(bands)
    causal = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q.device).tril()
    masks = [causal.tril(-(num_bands - 1))]
    for band in range(1, num_bands):
        back = num_bands - 1 - band
        masks.append(causal.tril(-back) & ~causal.tril(-back - 1))
    mask = torch.stack(masks)[:, None, None].to(q.dtype)  # [J, 1, 1, T, T]; each column is seen in one band
    scores = (q[None] @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5  # [J, B, H, T, T]
    scores = (scores * mask).sum(0).masked_fill(~causal, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    attended = ((weights[None] * mask) @ values).sum(0)
    return draft.layer.finish(fused[-1], attended)


def naive_step(
    draft: EagleDraft,
    lm_head: Tensor,
    embeddings: Tensor,
    inputs: Tensor,
    targets: Tensor,
    mask: Tensor,
    depth: int,
    k: int = 10,
) -> float:
    """Losses of HASS (feature 1, soft cross-entropy 0.1, top-K 1) with their gradients added to the head.

    Args:
        embeddings: [B, T, D] of tokens t+1. inputs: [B, T, D], features t. targets: [B, T, D], features t+1.
        mask: [B, T], the rows that count.

    Returns:
        the loss, summed over the steps.
    """
    rotary = draft.rotary(torch.arange(inputs.shape[1], device=inputs.device)[None])
    with torch.no_grad():
        probs = (targets @ lm_head.T).float().softmax(-1)  # [B, T, V]
    wanted, count = mask.to(inputs.dtype), mask.sum()
    bands, total = [inputs], 0.0
    for _ in range(depth):
        estimate = naive_forward(draft, embeddings, bands, rotary)
        log_q = (estimate @ lm_head.T).float().log_softmax(-1)
        soft = -(wanted[..., None] * (probs * log_q)).sum() / count
        top, indices = probs.topk(k, dim=-1)
        top_k = -(wanted[..., None] * (top * log_q.gather(-1, indices))).sum() / count
        feature = (wanted * F.smooth_l1_loss(estimate, targets, reduction="none").mean(-1)).sum() / count
        loss = feature + 0.1 * soft + top_k
        loss.backward()
        total += float(loss.detach())
        bands.append(torch.cat([inputs[:, :1], estimate[:, :-1]], dim=1).detach())
    return total
