"""Decoders that draft with a draft head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from torch import Generator

from hass_lightning.decoding.batch import decode_batch
from hass_lightning.decoding.decoders import BaseDecoder
from hass_lightning.decoding.drafting import DynamicTreeProposer, SampledChainProposer, StaticTreeProposer
from hass_lightning.decoding.engine import Proposer
from hass_lightning.decoding.hybrid import HybridProposer
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.decoding.settings import at_least, check_tree
from hass_lightning.decoding.tree import StaticPlan
from hass_lightning.types import DecodeResult, Sampling


class HeadDecoder(BaseDecoder):
    """Base class of decoders that draft with a draft head."""

    @property
    def _width(self) -> int:
        return 1

    def check(self, models: DecodingModels) -> None:
        """Raise ValueError if there is no head, or it does not fit the target."""
        target, draft = models.target, models.draft
        if draft is None:
            raise ValueError(f"decoding={self.name} needs a trained draft head, but none is given: set draft.")
        if draft.config.hidden_size != target.hidden_size:
            raise ValueError(
                f"the draft head has hidden size {draft.config.hidden_size} and target {target.name} "
                f"{target.hidden_size}: use a head trained for this target."
            )
        if draft.dtype != target.dtype:
            raise ValueError(f"the draft head is {draft.dtype}, target {target.name} {target.dtype}: cast the head.")
        if self._width > len(models.draft_vocabulary):
            raise ValueError(
                f"decoding={self.name} needs {self._width} draft tokens per node, but the draft vocabulary has "
                f"{len(models.draft_vocabulary)}: use a narrower tree."
            )


@dataclass(frozen=True)
class Chain(HeadDecoder):
    """Chain of draft tokens from the head, one per level.

    Args:
        depth: draft tokens per cycle.
        proposals: rule above temperature 0. `deterministic` drafts the head's most probable token and accepts it with
            its target probability. `sampled` samples from the head and accepts with min(1, p/q), as serving engines do.
            Both are equal at temperature 0.
    """

    depth: int = 3
    proposals: Literal["deterministic", "sampled"] = "sampled"
    name: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        at_least("depth", self.depth, 1, "draft tokens per cycle")
        if self.proposals not in ("deterministic", "sampled"):
            raise ValueError(f"decoding.proposals={self.proposals} is neither deterministic nor sampled.")

    @property
    def acceptance(self) -> str:
        """Same as `proposals`."""
        return self.proposals

    def _proposer(
        self, models: DecodingModels, prompt: list[int], limit: int, sampling: Sampling, generator: Generator | None
    ) -> Proposer:
        if self.proposals == "sampled" and sampling.temperature > 0:
            return SampledChainProposer(models, self.depth, len(prompt) + limit, sampling=sampling, generator=generator)
        plan = StaticPlan.build(tuple((0,) * depth for depth in range(1, self.depth + 1)), models.target.device)
        return StaticTreeProposer(models, plan, len(prompt) + limit)

    def generate_batch(
        self, models: DecodingModels, prompts: list[list[int]], max_new_tokens: int
    ) -> list[DecodeResult]:
        """Decode greedy answers to all prompts in one batch (see `decode_batch`)."""
        self.check(models)
        return decode_batch(models, prompts, max_new_tokens, self.depth)


# EAGLE's tree of 26 nodes is meant for a GPU; a CPU verifies these nine nodes at about the cost of one token
SMALL_TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0))


@dataclass(frozen=True)
class StaticTree(HeadDecoder):
    """Fixed draft tree (EAGLE-1).

    Args:
        paths: each node as the list of ranks from the root: [0] is the most probable first token, [0, 1] the second
            most probable token after it. The parent of each node must also be listed.
    """

    paths: Sequence[Sequence[int]] = SMALL_TREE
    name: ClassVar[str] = "static_tree"

    def __post_init__(self) -> None:
        paths = tuple(tuple(int(rank) for rank in path) for path in self.paths)
        object.__setattr__(self, "paths", paths)
        known = set(paths)
        if not paths:
            raise ValueError("decoding.paths is empty: give at least one path, such as [[0]].")
        if len(known) != len(paths):
            raise ValueError("decoding.paths names a node twice: give each path once.")
        for path in paths:
            if not path or min(path) < 0:
                raise ValueError(f"decoding.paths has {list(path)}: a path is a list of one or more ranks from 0.")
            if len(path) > 1 and path[:-1] not in known:
                raise ValueError(f"decoding.paths has {list(path)} but not its parent {list(path[:-1])}: add it.")

    @property
    def _width(self) -> int:
        return max(max(path) for path in self.paths) + 1

    def _proposer(
        self, models: DecodingModels, prompt: list[int], limit: int, sampling: Sampling, generator: Generator | None
    ) -> Proposer:
        plan = StaticPlan.build(self.paths, models.target.device)  # type: ignore[arg-type]
        return StaticTreeProposer(models, plan, len(prompt) + limit)


@dataclass(frozen=True)
class DynamicTree(HeadDecoder):
    """Dynamic draft tree (EAGLE-2), also used by HASS: the candidates with the highest cumulative probability.

    Args:
        num_nodes: tokens verified per cycle, including the root (EAGLE-2: 60).
        depth: levels below the root (EAGLE-2: 6).
        width: nodes expanded per level, and children per expanded node (EAGLE-2: 10).
    """

    num_nodes: int = 16
    depth: int = 4
    width: int = 4
    name: ClassVar[str] = "dynamic_tree"

    def __post_init__(self) -> None:
        check_tree(self.num_nodes, self.depth, self.width)

    @property
    def _width(self) -> int:
        return self.width

    def _proposer(
        self, models: DecodingModels, prompt: list[int], limit: int, sampling: Sampling, generator: Generator | None
    ) -> Proposer:
        return DynamicTreeProposer(models, self.num_nodes, self.depth, self.width, len(prompt) + limit)


@dataclass(frozen=True)
class Hybrid(HeadDecoder):
    """The head's dynamic tree with prompt lookup as an additional branch, or a copied chain alone (see hybrid.py).

    Args:
        num_nodes, depth, width: as in `DynamicTree`; a copied branch without a tree uses all of `num_nodes`.
        max_ngram: longest n-gram to look up; shorter ones are tried after it.
    """

    num_nodes: int = 16
    depth: int = 3
    width: int = 4
    max_ngram: int = 3
    name: ClassVar[str] = "hybrid"

    def __post_init__(self) -> None:
        check_tree(self.num_nodes, self.depth, self.width)
        at_least("max_ngram", self.max_ngram, 1, "tokens that must match")

    @property
    def _width(self) -> int:
        return self.width

    def _proposer(
        self, models: DecodingModels, prompt: list[int], limit: int, sampling: Sampling, generator: Generator | None
    ) -> Proposer:
        return HybridProposer(models, prompt, len(prompt) + limit, **asdict(self))
