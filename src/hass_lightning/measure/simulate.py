"""Simulated acceptance: the number of draft tokens of a chain that would be accepted, without decoding.

Shapes: B batch, T tokens, J steps (see the legend in types.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.draft import Alignment, DraftHead, unroll
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
from hass_lightning.target_model.lm_head import TargetHead


@torch.no_grad()
def simulated_hits(
    draft: DraftHead,
    head: TargetHead,
    vocabulary: DraftVocabulary,
    input_ids: Tensor,
    features: Tensor,
    loss_mask: Tensor,
    lengths: Tensor,
    depth: int,
    chunk_rows: int = 256,
) -> dict[str, Tensor]:
    """Return the counts for τ_sim = 1 + mean over chain starts s of Σ_j Π_{i≤j} hit_i[s+i-1].

    Positions are aligned in HASS, so a chain runs along a diagonal: step i at position s+i-1 has read i-1 predicted
    features. A hit means that the draft's argmax is the answer's next token. A chain ends at the end of the answer and
    at a token that is not in the draft vocabulary.

    Args:
        draft: the head.
        head: the target's embedding and LM head.
        vocabulary: the draft vocabulary.
        input_ids: [B, T].
        features: [B, T, W].
        loss_mask: [B, T].
        lengths: [B].
        depth: J.
        chunk_rows: number of positions whose logits are in memory at once.

    Returns:
        scalar counts: `starts`; `hits1` … `hitsJ` (marginal); `survived1` … `survivedJ` (joint); and for the chains
        that survived j-1 steps, `reached1` … `reachedJ`, those whose answer has a token j, and `forced1` … `forcedJ`,
        those whose token j the head predicts when it reads target features only (its step 1 at that position).
    """
    length = input_ids.shape[1]
    # positions whose answer token t+2 exists, whatever the lengths of the other sequences
    exists = torch.arange(length - 2, device=lengths.device) < lengths[:, None] - 2
    mask = loss_mask[:, : length - 2] & exists.to(loss_mask.device)
    wanted = input_ids[:, 2:]
    embeddings = head.embed(input_ids[:, 1:])
    hits = []
    wanted_rows = loss_mask[:, :-1]
    for estimate in unroll(draft, embeddings, features[:, :-1], Alignment(depth), wanted_rows):
        rows = estimate[:, : length - 2][mask]
        proposed = [draft.logits(part, vocabulary, False).argmax(-1) for part in rows.split(chunk_rows)]
        hit = torch.zeros_like(mask)
        if proposed:
            hit[mask] = vocabulary.to_token_ids(torch.cat(proposed)) == wanted[mask]
        hits.append(hit)
    counts = {"starts": mask.sum()}
    alive = mask
    for step, hit in enumerate(hits, start=1):
        counts[f"hits{step}"] = hit.sum()
        counts[f"reached{step}"] = (alive & _shifted(mask, step - 1)).sum()
        counts[f"forced{step}"] = (alive & _shifted(hits[0], step - 1)).sum()
        alive = alive & _shifted(hit, step - 1)
        counts[f"survived{step}"] = alive.sum()
    return counts


def _shifted(rows: Tensor, number: int) -> Tensor:
    """Return [B, T] shifted forward: position s has the value of s + number, or False past the end."""
    moved = torch.zeros_like(rows)
    moved[:, : rows.shape[1] - number] = rows[:, number:]
    return moved
