"""Greedy decoding of several prompts in one batch, autoregressively or with chains of the draft head.

Each sequence has its own length, which is the same in both caches. A cycle writes `depth + 1` columns at this length
and keeps those of the accepted tokens. In a chain these are contiguous, so nothing is gathered. Columns after the
length are masked until they are overwritten. Finished sequences leave the batch.
Shapes: B sequences, K = depth + 1 columns per cycle, T prompt, D hidden, V vocabulary (see the legend in types.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.decoding import sampling as draws
from hass_lightning.decoding.engine import PhaseClock, answer_limit, cut
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.target_model import KVCache
from hass_lightning.types import DecodeResult


def _at(cache: KVCache, starts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Set `cache` to write `count` columns from each start [B]; return positions [B, K] and mask [B, 1, K, keys]."""
    columns = starts[:, None] + torch.arange(count, device=starts.device)
    cache.slots = columns
    cache.read_length = int(columns.max()) + 1
    keys = torch.arange(cache.read_length, device=starts.device)
    return columns, (keys <= columns[:, :, None])[:, None]


class _Batch:
    """Target and draft head over the running sequences; `starts` [B] is the accepted length in both caches."""

    def __init__(self, models: DecodingModels, prompts: list[list[int]], depth: int, limit: int):
        self.depth = depth
        self.draft = models.draft if depth > 0 else None
        self.target = models.target if self.draft is not None else models.target.reading(())
        self.vocabulary = models.draft_vocabulary if depth > 0 else None
        device = self.target.device
        self.starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.rows = torch.arange(len(prompts), device=device)
        longest = int(self.starts.max())
        capacity = longest + limit + depth + 1
        self.cache = self.target.new_cache(len(prompts), capacity)
        self.head_cache = self.draft.new_cache(len(prompts), capacity) if self.draft is not None else None
        # prefill: no prompt token attends to the right padding, which is overwritten later
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
        features = self.target.forward(ids, self.cache)  # [B, T, D]
        self.last = draws.best(self.target.head.logits(features[self.rows, self.starts - 1]))  # [B]
        shifted = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
        shifted[self.rows, self.starts - 1] = self.last
        # tokens and features that the head has not read yet
        self.unread, self.features = shifted, features
        self.read = torch.zeros_like(self.starts)

    def chain(self) -> Tensor:
        """Return the last token and the draft tokens [B, K]; first the head reads the accepted tokens."""
        tokens = [self.last]
        if self.draft is None or self.vocabulary is None or self.head_cache is None:
            return self.last[:, None]
        count = self.unread.shape[1]
        positions, mask = _at(self.head_cache, self.read, count)
        embeddings = self.target.head.embed(self.unread)
        output = self.draft(embeddings, self.features, self.head_cache, positions, mask)
        own = output[self.rows, self.starts - self.read - 1][:, None]  # [B, 1, D]
        for level in range(self.depth):
            if level > 0:
                positions, mask = _at(self.head_cache, self.starts + level - 1, 1)
                own = self.draft(self.target.head.embed(tokens[-1])[:, None], own, self.head_cache, positions, mask)
            tokens.append(self.vocabulary.to_token_ids(draws.best(self.draft.logits(own[:, 0], self.vocabulary))))
        return torch.stack(tokens, dim=1)

    def verify(self, chain: Tensor) -> tuple[Tensor, Tensor]:
        """Target's greedy tokens [B, K] after each token of the chain and number of accepted ones [B]."""
        positions, mask = _at(self.cache, self.starts, chain.shape[1])
        positions = positions.clamp(max=self.target.max_length - 1)
        self.features = self.target.forward(chain, self.cache, positions, mask)
        choice = draws.best(self.target.head.logits(self.features))
        accepted = (chain[:, 1:] == choice[:, :-1]).long().cumprod(-1).sum(-1)
        # an accepted token equals the choice before it, so the new tokens are the first accepted + 1 choices
        self.unread, self.read = choice, self.starts
        self.starts = self.starts + accepted + 1
        self.last = choice[self.rows, accepted]
        return choice, accepted

    def keep(self, rows: list[int]) -> None:
        """Remove all other sequences from the batch."""
        kept = torch.tensor(rows, device=self.starts.device)
        self.cache.select_rows(kept)
        if self.head_cache is not None:
            self.head_cache.select_rows(kept)
        for name in ("starts", "read", "last", "unread", "features"):
            setattr(self, name, getattr(self, name)[kept])
        self.rows = torch.arange(len(rows), device=kept.device)


@torch.inference_mode()
def decode_batch(
    models: DecodingModels, prompts: list[list[int]], max_new_tokens: int, depth: int
) -> list[DecodeResult]:
    """Decode greedy answers to all prompts in one batch.

    Args:
        models: the target and, for `depth` above 0, the draft head.
        prompts: token ids of each prompt.
        max_new_tokens: maximum length of an answer.
        depth: draft tokens per cycle (0: autoregressive).

    Returns:
        One result per prompt, in order, with the same tokens as batch size 1 up to rounding. `seconds` is the batch's
        wall-clock time divided by the number of prompts.

    Raises:
        ValueError: as in `Decoder.generate`, or if there is no prompt.
    """
    if not prompts:
        raise ValueError("no prompts are given: a batch needs at least one.")
    limits = [answer_limit(models, prompt, max_new_tokens) for prompt in prompts]
    stop = models.target.eos_token_ids
    clock = PhaseClock(models.target.device)
    batch = _Batch(models, prompts, depth, max(limits))
    results = [DecodeResult([], [], [], [], {}) for _ in prompts]
    running = list(range(len(prompts)))

    def emit(new: list[list[int]]) -> list[int]:
        """Append new tokens to the running answers and return the batch indices that are not finished."""
        unfinished = []
        for row, (number, tokens) in enumerate(zip(running, new, strict=True)):
            kept, ended = cut(tokens, limits[number] - len(results[number].token_ids), stop)
            results[number].token_ids += kept
            if not ended:
                unfinished.append(row)
        return unfinished

    unfinished = emit([[token] for token in batch.last.tolist()])
    clock.lap("prefill")
    while unfinished:
        if len(unfinished) < len(running):
            batch.keep(unfinished)
            running = [running[row] for row in unfinished]
        clock.lap("bookkeeping")
        chain = batch.chain()
        clock.lap("draft")
        choice, accepted = batch.verify(chain)
        counts, choices, drafted = accepted.tolist(), choice.tolist(), chain[:, 1:].tolist()
        clock.lap("verify")
        for row, number in enumerate(running):
            results[number].accepted.append(counts[row])
            results[number].drafted.append(depth)
            results[number].nodes.append(depth)
            results[number].proposals.append(drafted[row])
        unfinished = emit([tokens[: count + 1] for tokens, count in zip(choices, counts, strict=True)])
    clock.lap("bookkeeping")
    for result in results:
        result.seconds = {phase: seconds / len(prompts) for phase, seconds in clock.seconds.items()}
    return results
