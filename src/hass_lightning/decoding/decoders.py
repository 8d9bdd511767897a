"""The decoders: settings that Hydra builds, each one YAML in conf/decoding. They hold no model and no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hass_lightning.decoding.batch import decode_batch
from hass_lightning.decoding.drafting import DynamicTreeProposer, SampledChainProposer, StaticTreeProposer
from hass_lightning.decoding.engine import Proposer, answer_limit, decode
from hass_lightning.decoding.lookup import LookupProposer
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.decoding.small import SmallModelProposer
from hass_lightning.decoding.tree import StaticPlan, num_candidates
from hass_lightning.types import DecodeResult, Sampling


def _at_least(key: str, value: int, least: int, meaning: str) -> None:
    if value < least:
        raise ValueError(f"decoding.{key}={value} must be at least {least} ({meaning}).")


class _Speculative:
    """What all decoders share: a proposer on the one engine."""

    name: ClassVar[str]

    @property
    def acceptance(self) -> str:
        """Acceptance rule above temperature 0."""
        return "deterministic"

    def check(self, models: DecodingModels) -> None:
        """Raise ValueError when a model is missing or does not fit."""

    def _proposer(
        self,
        models: DecodingModels,
        prompt: list[int],
        limit: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Proposer | None:
        raise NotImplementedError

    def generate(
        self,
        models: DecodingModels,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        generator: torch.Generator | None = None,
    ) -> DecodeResult:
        """See `Decoder.generate`."""
        self.check(models)
        limit = answer_limit(models, prompt, max_new_tokens)
        with torch.inference_mode():
            proposer = self._proposer(models, prompt, limit, sampling, generator)
        return decode(models, proposer, prompt, limit, sampling=sampling, generator=generator)


@dataclass(frozen=True)
class Autoregressive(_Speculative):
    """One token a target forward: the baseline of every speedup."""

    name: ClassVar[str] = "autoregressive"

    @property
    def acceptance(self) -> str:
        """Nothing is proposed."""
        return "none"

    def _proposer(self, models, prompt, limit, sampling, generator) -> None:
        return None

    def generate_batch(
        self, models: DecodingModels, prompts: list[list[int]], max_new_tokens: int
    ) -> list[DecodeResult]:
        """Greedy answers to all prompts at once (batch.decode_batch)."""
        return decode_batch(models, prompts, max_new_tokens, depth=0)


@dataclass(frozen=True)
class PromptLookup(_Speculative):
    """Proposes what followed the same words earlier in the text; needs no training.

    Args:
        max_ngram: longest run of last tokens that is looked up; shorter ones are tried after it.
        num_tokens: tokens proposed after a match.
    """

    max_ngram: int = 3
    num_tokens: int = 8
    name: ClassVar[str] = "prompt_lookup"

    def __post_init__(self):
        _at_least("max_ngram", self.max_ngram, 1, "tokens that must match")
        _at_least("num_tokens", self.num_tokens, 1, "proposed tokens")

    def _proposer(self, models, prompt, limit, sampling, generator) -> Proposer:
        return LookupProposer(prompt, self.max_ngram, self.num_tokens, models.target.device)


@dataclass(frozen=True)
class DraftModel(_Speculative):
    """Classical speculative decoding with a small causal LM of the same vocabulary (arXiv 2211.17192).

    Args:
        depth: tokens it drafts in a cycle, drawn from its own processed distribution (argmax at temperature 0).
    """

    depth: int = 4
    name: ClassVar[str] = "draft_model"

    def __post_init__(self):
        _at_least("depth", self.depth, 1, "drafted tokens a cycle")

    @property
    def acceptance(self) -> str:
        """min(1, p/q)."""
        return "sampled"

    def check(self, models: DecodingModels) -> None:
        """Raise ValueError without a small model of the target's vocabulary."""
        target, small = models.target, models.small
        if small is None:
            raise ValueError("decoding=draft_model needs a small causal LM, and none is given: set small_model.")
        if small.head.vocab_size != target.head.vocab_size:
            raise ValueError(
                f"small model {small.name} has {small.head.vocab_size} tokens and target {target.name} "
                f"{target.head.vocab_size}: decoding=draft_model needs the same vocabulary."
            )

    def _proposer(self, models, prompt, limit, sampling, generator) -> Proposer:
        return SmallModelProposer(models, prompt, self.depth, limit, sampling=sampling, generator=generator)


class _OnHead(_Speculative):
    """Decoders that draft with the EAGLE head."""

    @property
    def _width(self) -> int:
        return 1

    def check(self, models: DecodingModels) -> None:
        """Raise ValueError without a head, or with one that does not fit."""
        target, draft = models.target, models.draft
        if draft is None:
            raise ValueError(f"decoding={self.name} needs a trained draft head, and none is given.")
        if draft.config.hidden_size != target.hidden_size:
            raise ValueError(
                f"the draft head has hidden size {draft.config.hidden_size} and target {target.name} "
                f"{target.hidden_size}: give the head that was trained on this target."
            )
        if draft.fc.weight.dtype != target.dtype:
            raise ValueError(
                f"the draft head is {draft.fc.weight.dtype}, target {target.name} {target.dtype}: cast it."
            )
        if self._width > len(models.draft_vocabulary):
            raise ValueError(
                f"decoding={self.name} offers {self._width} tokens after one, but the draft vocabulary has "
                f"{len(models.draft_vocabulary)}: make the tree narrower."
            )


@dataclass(frozen=True)
class Chain(_OnHead):
    """The EAGLE head with one token a level.

    Args:
        depth: drafted tokens a cycle.
        proposals: above temperature 0, `deterministic` drafts the head's best token (accepted with its target
            probability), `sampled` draws from the head (min(1, p/q), what serving engines do). Equal at temperature 0.
    """

    depth: int = 3
    proposals: Literal["deterministic", "sampled"] = "sampled"
    name: ClassVar[str] = "chain"

    def __post_init__(self):
        _at_least("depth", self.depth, 1, "drafted tokens a cycle")
        if self.proposals not in ("deterministic", "sampled"):
            raise ValueError(f"decoding.proposals={self.proposals} is neither deterministic nor sampled.")

    @property
    def acceptance(self) -> str:
        """As `proposals` says."""
        return self.proposals

    def _proposer(self, models, prompt, limit, sampling, generator) -> Proposer:
        if self.proposals == "sampled" and sampling.temperature > 0:
            return SampledChainProposer(models, self.depth, len(prompt) + limit, sampling=sampling, generator=generator)
        plan = StaticPlan.build(tuple((0,) * depth for depth in range(1, self.depth + 1)), models.target.device)
        return StaticTreeProposer(models, plan, len(prompt) + limit)

    def generate_batch(
        self, models: DecodingModels, prompts: list[list[int]], max_new_tokens: int
    ) -> list[DecodeResult]:
        """Greedy answers to all prompts at once (batch.decode_batch)."""
        self.check(models)
        return decode_batch(models, prompts, max_new_tokens, self.depth)


# EAGLE's tree of 26 nodes is made for a GPU; these nine fit what a CPU verifies at the price of one token
SMALL_TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0))


@dataclass(frozen=True)
class StaticTree(_OnHead):
    """EAGLE-1's fixed tree.

    Args:
        paths: each node as the ranks from the root down to it: [0] is the best first token, [0, 1] the second best
            token after it. A node's parent must be listed too.
    """

    paths: Sequence[Sequence[int]] = SMALL_TREE
    name: ClassVar[str] = "static_tree"

    def __post_init__(self):
        paths = tuple(tuple(int(rank) for rank in path) for path in self.paths)
        object.__setattr__(self, "paths", paths)
        known = set(paths)
        if not paths:
            raise ValueError("decoding.paths is empty: give at least one path, such as [[0]].")
        if len(known) != len(paths):
            raise ValueError("decoding.paths names a node twice: give each path once.")
        for path in paths:
            if not path or min(path) < 0:
                raise ValueError(f"decoding.paths has {list(path)}: a path is one or more ranks, the best is 0.")
            if len(path) > 1 and path[:-1] not in known:
                raise ValueError(f"decoding.paths has {list(path)} but not its parent {list(path[:-1])}: add it.")

    @property
    def _width(self) -> int:
        return max(max(path) for path in self.paths) + 1

    def _proposer(self, models, prompt, limit, sampling, generator) -> Proposer:
        plan = StaticPlan.build(self.paths, models.target.device)  # type: ignore[arg-type]
        return StaticTreeProposer(models, plan, len(prompt) + limit)


@dataclass(frozen=True)
class DynamicTree(_OnHead):
    """EAGLE-2's tree, which HASS decodes with: the candidates the head believes in most.

    Args:
        num_nodes: tokens the target verifies in a cycle, the root counted (EAGLE-2: 60).
        depth: levels below the root (EAGLE-2: 6). width: nodes expanded a level, and guesses a node (EAGLE-2: 10).
    """

    num_nodes: int = 16
    depth: int = 4
    width: int = 4
    name: ClassVar[str] = "dynamic_tree"

    def __post_init__(self):
        _at_least("num_nodes", self.num_nodes, 2, "the root and one draft token")
        _at_least("depth", self.depth, 1, "levels below the root")
        _at_least("width", self.width, 1, "nodes expanded a level")
        candidates = num_candidates(self.depth, self.width)
        if self.num_nodes - 1 > candidates:
            raise ValueError(
                f"decoding.num_nodes={self.num_nodes} exceeds the root and the {candidates} candidates of depth "
                f"{self.depth} and width {self.width}: lower it to {candidates + 1}, or raise depth or width."
            )

    @property
    def _width(self) -> int:
        return self.width

    def _proposer(self, models, prompt, limit, sampling, generator) -> Proposer:
        return DynamicTreeProposer(models, self.num_nodes, self.depth, self.width, len(prompt) + limit)
