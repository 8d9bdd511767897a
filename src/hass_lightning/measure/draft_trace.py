"""What a head does along a draft: its features and attention beside the target's, its confidence, and its hits.

Computed for drafts that start at every position of a known answer, with the alignment steps of HCA: step j at a
position sees exactly the context of draft depth j, if the tokens drafted before are those of the answer.
Shapes: T tokens of prompt and answer, W width of the features, D hidden, K depths, n positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hass_lightning.decoding.models import DecodingModels
from hass_lightning.draft import Alignment, unroll
from hass_lightning.draft.attention import Band, predicted_share

CHUNK_ROWS = 256


@dataclass(frozen=True)
class DepthTrace:
    """One draft depth at the n positions of an answer where a draft can reach it.

    `norm` and `cosine` compare the feature that the head predicts with what it reads of the target there. `own` is the
    share of the attention on features that the head predicted itself, averaged over heads. `confidence` is the
    probability of the draft's most probable token, `hit` whether it is the token of the answer, and `reached` whether
    all tokens before it in the draft were hits.
    """

    norm: Tensor  # [n], ‖predicted‖ / ‖target's‖
    cosine: Tensor  # [n]
    own: Tensor  # [n]
    confidence: Tensor  # [n]
    hit: Tensor  # [n] bool
    reached: Tensor  # [n] bool


@torch.no_grad()
def trace_drafts(
    models: DecodingModels, prompt: Sequence[int], answer: Sequence[int], features: Tensor, depth: int
) -> list[DepthTrace]:
    """Trace drafts of up to `depth` tokens from every position of an answer.

    The first drafted token is at the earliest the answer's second one, because the prefill yields the first.

    Args:
        models: target and head.
        prompt: token ids.
        answer: token ids.
        features: [T, W], the target's features of prompt and answer.
        depth: K.
    """
    assert models.draft is not None
    draft, head, vocabulary = models.draft, models.target.head, models.draft_vocabulary
    tokens = torch.tensor([*prompt, *answer], device=features.device)
    true = draft.read(features[None])[0].float()  # [T, D]
    shares: list[Tensor] = []

    def watch(queries: Tensor, bands: Sequence[Band]) -> None:
        shares.append(predicted_share(queries, bands)[0].mean(0).float())  # [T-1]

    steps = unroll(
        draft, head.embed(tokens[None, 1:]), features[None, :-1], Alignment(depth), watch=watch
    )  # row t predicts feature t+1 and token t+2
    first = len(prompt) - 1
    traces: list[DepthTrace] = []
    alive = torch.ones(max(0, len(tokens) - 2 - first), dtype=torch.bool, device=tokens.device)  # of chain starts
    for step, predicted in enumerate(steps):
        rows = torch.arange(first + step, len(tokens) - 2, device=tokens.device)
        alive = alive[: len(rows)]
        own, wanted = predicted[0, rows], true[rows + 1]
        confidence, best = _most_probable(models, own)
        hit = vocabulary.to_token_ids(best) == tokens[rows + 2]
        norm = own.float().norm(dim=-1) / wanted.norm(dim=-1)
        cosine = torch.nn.functional.cosine_similarity(own.float(), wanted, dim=-1)
        traces.append(DepthTrace(norm, cosine, shares[step][rows], confidence, hit, alive))
        alive = alive & hit
    return traces


def _most_probable(models: DecodingModels, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return probability [n] and draft index [n] of the most probable token of features [n, D]."""
    assert models.draft is not None
    found: list[tuple[Tensor, Tensor]] = []
    for part in features.split(CHUNK_ROWS):
        logits = models.draft.logits(part, models.draft_vocabulary, False).float()
        highest, index = logits.max(-1)
        found.append(((highest - logits.logsumexp(-1)).exp(), index))
    if not found:
        return features.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=features.device)
    probs, indices = zip(*found, strict=True)
    return torch.cat(probs), torch.cat(indices)


@torch.no_grad()
def entropies(models: DecodingModels, features: Tensor) -> Tensor:
    """Return the entropy in nats of the target's next-token distribution at features [n, W]: [n], float32."""
    found = []
    for part in features.split(CHUNK_ROWS):
        log_probs = models.target.head.logits(part).float().log_softmax(-1)
        found.append(-(log_probs.exp() * log_probs).sum(-1))
    return torch.cat(found) if found else features.new_zeros(0)
