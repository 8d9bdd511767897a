"""The one loop behind every decoder: prefill, then draft, verify and keep, until the answer ends.

Decoders differ in their proposer alone. Stop tokens, length limits, timing and the trace are the same for all, and the
target's cache is written in place and gathered along the accepted path.
Shapes: K newly accepted tokens, N tree nodes, D hidden, V vocabulary (types.py has the legend).
"""

from __future__ import annotations

from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from hass_lightning.decoding import sampling as draws
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.decoding.tree import DraftTree
from hass_lightning.decoding.verify import verify
from hass_lightning.types import DecodeResult, Sampling


class Proposer(Protocol):
    """Drafts for one answer. It keeps what it needs (its own cache, the tokens so far) between the cycles."""

    max_nodes: int  # greatest number of tree nodes, the root counted

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree | None:
        """The next tree, rooted at the last token; None to let the target decode one token by itself.

        Args:
            token_ids: the K tokens that are new since the last call; in the first call all tokens but the prompt's
                first. features: [K, D], the target's, of the tokens *before* each of them (row t of the draft head).
        """
        ...


class PhaseClock:
    """Splits wall-clock time by phase; a CUDA device is waited for at each split."""

    def __init__(self, device: torch.device):
        self.seconds = {"prefill": 0.0, "draft": 0.0, "verify": 0.0, "bookkeeping": 0.0}
        self._device = device if device.type == "cuda" else None
        self._last = self._now()

    def _now(self) -> float:
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        return perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last call as `phase`."""
        now = self._now()
        self.seconds[phase] += now - self._last
        self._last = now


def answer_limit(models: DecodingModels, prompt: list[int], max_new_tokens: int) -> int:
    """Longest answer: `max_new_tokens`, or what the target's context leaves.

    Raises:
        ValueError: nothing to decode from, or no room for an answer.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token (the chat template adds some by itself).")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    room = models.target.max_length - len(prompt)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but target {models.target.name} takes {models.target.max_length} in "
            "all: shorten the prompt or leave it out."
        )
    return min(max_new_tokens, room)


def cut(token_ids: list[int], room: int, stop: frozenset[int]) -> tuple[list[int], bool]:
    """The tokens up to a stop token (kept) or to `room`, and whether the answer ends there."""
    for count, token in enumerate(token_ids[:room], start=1):
        if token in stop or count == room:
            return token_ids[:count], True
    return token_ids, False


@torch.inference_mode()
def decode(
    models: DecodingModels,
    proposer: Proposer | None,
    prompt: list[int],
    max_new_tokens: int,
    *,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> DecodeResult:
    """One answer; `proposer` None decodes token by token. Arguments and errors as in `Decoder.generate`."""
    target = models.target
    device, greedy = target.device, sampling.temperature == 0
    limit = answer_limit(models, prompt, max_new_tokens)
    clock = PhaseClock(device)
    max_nodes = proposer.max_nodes if proposer is not None else 1
    cache = target.new_cache(1, len(prompt) + limit + max_nodes)
    seen = torch.ones(max_nodes, cache.capacity, dtype=torch.bool, device=device)  # every node sees what was accepted
    result = DecodeResult([], [], [], [], clock.seconds)

    features = target.forward(torch.tensor([prompt], device=device), cache)[0]  # [T, D]
    cache.advance(len(prompt))
    logits = target.head.logits(features[-1:])  # [1, V]
    first = int(_next_token(logits[0], sampling, generator))
    if models.trace and greedy:
        result.logit_gaps += _gaps(logits)
    result.token_ids, ended = cut([first], limit, target.eos_token_ids)
    new = [*prompt[1:], first]
    clock.lap("prefill")

    while not ended:
        tree = proposer.propose(new, features) if proposer is not None else None
        clock.lap("draft")
        if tree is None:
            token = torch.tensor([[new[-1]]], device=device)
            features = target.forward(token, cache)[0]
            logits = target.head.logits(features)
            new, path, proposals, depth = [int(_next_token(logits[0], sampling, generator))], [0], [], 0
        else:
            shape = tree.shape
            mask = torch.cat([seen[: len(shape), : cache.length], shape.mask], dim=1)
            # a node past the context limit can only add tokens that are cut: its position must merely be valid
            positions = (shape.depths + cache.length).clamp(max=target.max_length - 1)
            features = target.forward(tree.token_ids[None], cache, positions[None], mask[None, None])[0]
            logits = target.head.logits(features)  # [N, V]
            on_path, bonus = verify(tree, logits, sampling, generator)
            # the one transfer of the cycle: tokens, path, greatest depth, bonus token
            packed = torch.cat([tree.token_ids, on_path.long(), shape.depths.max()[None], bonus[None]]).tolist()
            drafted, flags = packed[: len(shape)], packed[len(shape) : -2]
            path = [node for node, kept in enumerate(flags) if kept]
            proposals, depth = drafted[1:], packed[-2]
            new = [*(drafted[node] for node in path[1:]), packed[-1]]
        clock.lap("verify")
        if path[-1] == len(path) - 1:  # the accepted columns already lie where they belong
            cache.advance(len(path))
            features = features[: len(path)]
            rows = logits[: len(path)]
        else:
            indices = torch.tensor(path, device=device)
            cache.keep(indices)
            features = features[indices]
            rows = logits[indices] if models.trace else logits
        if models.trace and greedy:
            result.logit_gaps += _gaps(rows)
        result.accepted.append(len(path) - 1)
        result.drafted.append(depth)
        result.nodes.append(len(proposals))
        result.proposals.append(proposals)
        kept, ended = cut(new, limit - len(result.token_ids), target.eos_token_ids)
        result.token_ids += kept
        clock.lap("bookkeeping")
    result.logit_gaps = result.logit_gaps[: len(result.token_ids)]
    return result


def _next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """A token [] from the target's logits [V]."""
    if sampling.temperature == 0:
        return draws.best(logits)
    return draws.categorical(draws.probabilities(logits, sampling), generator)


def _gaps(logits: Tensor) -> list[float]:
    """Top-1 minus top-2 logit of each row [K, V]: how close a greedy choice was to a tie."""
    top = logits.topk(2, dim=-1).values.float()
    return (top[:, 0] - top[:, 1]).tolist()
