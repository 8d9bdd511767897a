"""Simulated acceptance: what a chain of drafts would have survived on given answers, without decoding.

Shapes: B batch, T tokens, J steps (types.py has the legend).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.draft import Alignment, EagleDraft, unroll
from hass_lightning.target.head import DraftVocabulary, TargetHead


@torch.no_grad()
def simulated_hits(
    draft: EagleDraft,
    head: TargetHead,
    vocabulary: DraftVocabulary,
    input_ids: Tensor,
    features: Tensor,
    loss_mask: Tensor,
    lengths: Tensor,
    depth: int,
    chunk_rows: int = 256,
) -> dict[str, Tensor]:
    """Counts for τ_sim = 1 + mean over chain starts s of Σ_j Π_{i≤j} hit_i[s+i-1].

    Rows are aligned in HASS, so a chain runs along a diagonal: step i at row s+i-1 has seen i-1 own features. A hit is
    the draft's argmax being the answer's next token; a chain ends where the answer ends, and outside the draft
    vocabulary.

    Args:
        input_ids: [B, T]. features: [B, T, D]. loss_mask: [B, T] on rows. lengths: [B]. depth: J.

    Returns:
        scalar counts. `starts`, `hits1` … `hitsJ` (marginal), `survived1` … `survivedJ` (joint), and of the chains
        alive after j-1 steps: `reached1` … `reachedJ`, whose answer has a token j, and `forced1` … `forcedJ`, whose
        token j the head gets right where it sees true features alone (its step 1 at that row).
    """
    length = input_ids.shape[1]
    # rows whose answer token t+2 exists, whatever the other sequences' lengths
    exists = torch.arange(length - 2, device=lengths.device) < lengths[:, None] - 2
    mask = loss_mask[:, : length - 2] & exists.to(loss_mask.device)
    wanted = input_ids[:, 2:]
    embeddings = head.embed(input_ids[:, 1:])
    hits = []
    wanted_rows = loss_mask[:, :-1]
    for estimate in unroll(draft, embeddings, features[:, :-1], Alignment(depth), wanted_rows):
        rows = estimate[:, : length - 2][mask]
        proposed = [vocabulary.logits(part, decoding=False).argmax(-1) for part in rows.split(chunk_rows)]
        hit = torch.zeros_like(mask)
        if proposed:
            hit[mask] = vocabulary.to_token_ids(torch.cat(proposed)) == wanted[mask]
        hits.append(hit)
    counts = {"starts": mask.sum()}
    alive = mask
    for step, hit in enumerate(hits, start=1):
        counts[f"hits{step}"] = hit.sum()
        counts[f"reached{step}"] = (alive & _ahead(mask, step - 1)).sum()
        counts[f"forced{step}"] = (alive & _ahead(hits[0], step - 1)).sum()
        alive = alive & _ahead(hit, step - 1)
        counts[f"survived{step}"] = alive.sum()
    return counts


def _ahead(rows: Tensor, number: int) -> Tensor:
    """[B, T] moved forward: row s holds what stood at s + number; False behind the end."""
    moved = torch.zeros_like(rows)
    moved[:, : rows.shape[1] - number] = rows[:, number:]
    return moved
