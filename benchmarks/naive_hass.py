"""A simple HASS step with the cost structure of the official code, as a baseline (docs/deviations.md).

Each step projects all bands again, stacks the scores of all bands in one [J, B, H, T, T] tensor, computes logits, soft
targets and log-probabilities in fp32 over the full vocabulary for every position, searches the top-K again, and has a
separate backward pass. Unlike in the official code, the mask is exact (masked scores are -inf), so that the losses
equal those of `hass_lightning`. The weights are those of an `EagleDraft`.
Shapes: B batch, T positions, D hidden, H heads, V vocabulary, J bands.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hass_lightning.draft import EagleDraft


def naive_forward(draft: EagleDraft, embeddings: Tensor, bands: list[Tensor], rotary) -> Tensor:
    """Predict features [B, T, D] in step J from all bands of features [B, T, D], the target features first."""
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
    mask = torch.stack(masks)[:, None, None].to(q.dtype)  # [J, 1, 1, T, T]; each position is visible in one band
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
    """Compute the losses of HASS (feature 1, soft cross-entropy 0.1, top-K 1) and add their gradients to the head.

    Args:
        draft: the head.
        lm_head: [V, D].
        embeddings: [B, T, D], embeddings of tokens t+1.
        inputs: [B, T, D], target features t.
        targets: [B, T, D], target features t+1.
        mask: [B, T], the loss mask.
        depth: number of alignment steps.
        k: K of the top-K loss.

    Returns:
        The loss, summed over the steps.
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
