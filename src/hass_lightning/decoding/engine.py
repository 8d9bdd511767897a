"""The decoding loop shared by all decoders: prefill, then cycles of drafting and verifying until the answer ends.

Decoders differ only in their proposer. Stop tokens, length limits, timing and the trace are the same for all. The
target's cache is written in place, and the accepted path is gathered.
Shapes: K newly accepted tokens, N tree nodes, D hidden, V vocabulary (see the legend in types.py).
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """Proposes draft trees for one answer. It may keep state (a cache, the tokens so far) between cycles."""

    max_nodes: int  # maximum number of tree nodes, including the root

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree | None:
        """Return the next draft tree, rooted at the last token, or None to let the target decode one token.

        Args:
            token_ids: the K new tokens since the last call; in the first call, all tokens except the prompt's first.
            features: [K, W], target features of the token *before* each of them.
        """
        ...


class PhaseClock:
    """Measures wall-clock time by phase; a CUDA device is synchronized at each call of `lap`."""

    def __init__(self, device: torch.device):
        self.seconds = {"prefill": 0.0, "draft": 0.0, "verify": 0.0, "bookkeeping": 0.0}
        self._device = device if device.type == "cuda" else None
        self._last = self._now()

    def _now(self) -> float:
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        return perf_counter()

    def skip(self) -> None:
        """Do not count the time since the last call."""
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """Add the time since the last call to `phase`."""
        now = self._now()
        self.seconds[phase] += now - self._last
        self._last = now


def answer_limit(models: DecodingModels, prompt: list[int], max_new_tokens: int) -> int:
    """Return the maximum length of the answer: `max_new_tokens`, or less if the target's context ends before.

    Raises:
        ValueError: if the prompt is empty or fills the context, or `max_new_tokens` is below 1.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token (a chat template adds some).")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    room = models.target.max_length - len(prompt)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but target {models.target.name} takes {models.target.max_length} in "
            "total: shorten or remove the prompt."
        )
    return min(max_new_tokens, room)


def cut(token_ids: list[int], room: int, stop: frozenset[int]) -> tuple[list[int], bool]:
    """Truncate tokens after a stop token or at `room` tokens; return them and whether the answer ends there."""
    for count, token in enumerate(token_ids[:room], start=1):
        if token in stop or count == room:
            return token_ids[:count], True
    return token_ids, False


class Selector(Protocol):
    """Chooses the tokens of an answer one after the other, instead of `Sampling` and the target's end tokens."""

    def __call__(self, logits: Tensor) -> tuple[int, bool]:
        """Return the token after all tokens chosen so far, given the target's logits [V], and whether it is the last.

        It is called once per token of the answer, in order, and never for a draft token that is rejected.
        """
        ...


@torch.inference_mode()
def decode_cycles(
    models: DecodingModels,
    proposer: Proposer | None,
    prompt: list[int],
    max_new_tokens: int,
    *,
    sampling: Sampling,
    generator: torch.Generator | None,
    selector: Selector | None = None,
) -> Iterator[DecodeResult]:
    """Decode one answer, autoregressively if `proposer` is None; arguments and errors as in `Decoder.generate`.

    Args:
        selector: chooses the tokens and the end of the answer; `sampling`, `generator` and the target's end tokens are
            then not used, and a draft token is accepted if it is the one chosen. None: as `sampling` says.

    Yields:
        The same result after each forward of the target, with the new tokens appended. The time that the caller takes
        is not counted.
    """
    target = models.target if proposer is not None else models.target.reading(())
    device, greedy = target.device, sampling.temperature == 0
    stop = target.eos_token_ids if selector is None else frozenset()
    limit = answer_limit(models, prompt, max_new_tokens)
    clock = PhaseClock(device)
    max_nodes = proposer.max_nodes if proposer is not None else 1
    cache = target.new_cache(1, len(prompt) + limit + max_nodes)
    seen = torch.ones(max_nodes, cache.capacity, dtype=torch.bool, device=device)  # all nodes attend to accepted tokens
    result = DecodeResult([], [], [], [], clock.seconds)

    def choose(logits: Tensor) -> tuple[int, bool]:
        return selector(logits) if selector else (int(_next_token(logits, sampling, generator)), False)

    features = target.forward(torch.tensor([prompt], device=device), cache)[0]  # [T, W]
    cache.advance(len(prompt))
    logits = target.head.logits(features[-1:])  # [1, V]
    first, last = choose(logits[0])
    if models.trace and greedy:
        result.logit_gaps += _gaps(logits)
    result.token_ids, ended = cut([first], limit, stop)
    ended = ended or last
    new = [*prompt[1:], first]
    clock.lap("prefill")
    yield result
    clock.skip()

    while not ended:
        tree = proposer.propose(new, features) if proposer is not None else None
        clock.lap("draft")
        if tree is None:
            token = torch.tensor([[new[-1]]], device=device)
            features = target.forward(token, cache)[0]
            logits = target.head.logits(features)
            following, last = choose(logits[0])
            new, path, proposals, depth = [following], [0], [], 0
        else:
            shape = tree.shape
            mask = torch.cat([seen[: len(shape), : cache.length], shape.mask], dim=1)
            # tokens of a node past the context limit are truncated anyway; its position only has to be valid
            positions = (shape.depths + cache.length).clamp(max=target.max_length - 1)
            features = target.forward(tree.token_ids[None], cache, positions[None], mask[None, None])[0]
            logits = target.head.logits(features)  # [N, V]
            if selector is not None:
                path, new, drafted, last = follow(tree, logits, selector)
                depth = int(shape.depths.max())
            else:
                on_path, bonus = verify(tree, logits, sampling, generator)
                # the only device-to-host transfer of the cycle: tokens, path, greatest depth, bonus token
                packed = torch.cat([tree.token_ids, on_path.long(), shape.depths.max()[None], bonus[None]]).tolist()
                drafted, flags = packed[: len(shape)], packed[len(shape) : -2]
                path, depth = [node for node, kept in enumerate(flags) if kept], packed[-2]
                new = [*(drafted[node] for node in path[1:]), packed[-1]]
            proposals = drafted[1:]
        clock.lap("verify")
        if path[-1] == len(path) - 1:  # the accepted columns are already in place
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
        kept, ended = cut(new, limit - len(result.token_ids), stop)
        ended = ended or last
        result.token_ids += kept
        result.logit_gaps = result.logit_gaps[: len(result.token_ids)]
        clock.lap("bookkeeping")
        yield result
        clock.skip()


def follow(tree: DraftTree, logits: Tensor, selector: Selector) -> tuple[list[int], list[int], list[int], bool]:
    """Verify a draft tree token by token with a selector.

    Args:
        tree: the draft tree.
        logits: [N, V], target logits after each node.
        selector: chooses the token after each accepted node.

    Returns:
        The accepted path from the root, the new tokens (one per node of the path), the tokens of all nodes, and whether
        the answer ends with the last new token.
    """
    drafted, parents = tree.token_ids.tolist(), tree.shape.parents.tolist()
    edges = zip(parents, drafted, strict=True)
    children = {edge: node for node, edge in enumerate(edges) if node}
    path, new = [0], []
    while True:
        token, last = selector(logits[path[-1]])
        new.append(token)
        node = children.get((path[-1], token))
        if last or node is None:
            return path, new, drafted, last
        path.append(node)


def _next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Choose a token [] from the target's logits [V]."""
    if sampling.temperature == 0:
        return draws.best(logits)
    return draws.categorical(draws.probabilities(logits, sampling), generator)


def _gaps(logits: Tensor) -> list[float]:
    """Top-1 minus top-2 logit for each of the logits [K, V], a measure of how close a greedy choice was to a tie."""
    top = logits.topk(2, dim=-1).values.float()
    return (top[:, 0] - top[:, 1]).tolist()
