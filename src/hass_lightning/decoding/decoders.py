"""Decoders, each configured by a YAML file in conf/decoding. They hold settings, but no model and no state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from hass_lightning.decoding.batch import decode_batch
from hass_lightning.decoding.engine import Proposer, Selector, answer_limit, decode_cycles
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.decoding.prompt_lookup import LookupProposer
from hass_lightning.decoding.settings import at_least
from hass_lightning.decoding.small_model import SmallModelProposer
from hass_lightning.types import DecodeResult, Sampling


class BaseDecoder:
    """Base class of decoders: a proposer on the shared decoding loop."""

    name: ClassVar[str]

    @property
    def acceptance(self) -> str:
        """Acceptance rule above temperature 0."""
        return "deterministic"

    def check(self, models: DecodingModels) -> None:
        """Raise ValueError if a model is missing or does not fit."""

    def _proposer(
        self, models: DecodingModels, prompt: list[int], limit: int, sampling: Sampling, generator: Generator | None
    ) -> Proposer | None:
        raise NotImplementedError

    def generate(
        self,
        models: DecodingModels,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        generator: Generator | None = None,
    ) -> DecodeResult:
        """See `Decoder.generate`."""
        *_, result = self.stream(models, prompt, max_new_tokens, sampling, generator)
        return result

    def stream(
        self,
        models: DecodingModels,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        generator: Generator | None = None,
        selector: Selector | None = None,
    ) -> Iterator[DecodeResult]:
        """See `Decoder.stream`.

        Args:
            selector: chooses the tokens and the end of the answer instead of `sampling` (see `decode_cycles`).
        """
        self.check(models)
        limit = answer_limit(models, prompt, max_new_tokens)
        with torch.inference_mode():
            proposer = self._proposer(models, prompt, limit, sampling, generator)
        return decode_cycles(models, proposer, prompt, limit, sampling=sampling, generator=generator, selector=selector)


@dataclass(frozen=True)
class Autoregressive(BaseDecoder):
    """Autoregressive decoding: one token per target forward, the baseline of every speedup."""

    name: ClassVar[str] = "autoregressive"

    @property
    def acceptance(self) -> str:
        """Always `none`: there are no draft tokens."""
        return "none"

    def _proposer(
        self, models: DecodingModels, prompt: list[int], limit: int, sampling: Sampling, generator: Generator | None
    ) -> None:
        return None

    def generate_batch(
        self, models: DecodingModels, prompts: list[list[int]], max_new_tokens: int
    ) -> list[DecodeResult]:
        """Decode greedy answers to all prompts in one batch (see `decode_batch`)."""
        return decode_batch(models, prompts, max_new_tokens, depth=0)


@dataclass(frozen=True)
class PromptLookup(BaseDecoder):
    """Prompt lookup: draft the tokens that followed the same n-gram earlier in the text; needs no training.

    Args:
        max_ngram: longest n-gram to look up; shorter ones are tried after it.
        num_tokens: number of draft tokens after a match.
    """

    max_ngram: int = 3
    num_tokens: int = 8
    name: ClassVar[str] = "prompt_lookup"

    def __post_init__(self) -> None:
        at_least("max_ngram", self.max_ngram, 1, "tokens that must match")
        at_least("num_tokens", self.num_tokens, 1, "draft tokens")

    def _proposer(
        self, models: DecodingModels, prompt: list[int], limit: int, sampling: Sampling, generator: Generator | None
    ) -> Proposer:
        return LookupProposer(prompt, self.max_ngram, self.num_tokens, models.target.device)


@dataclass(frozen=True)
class DraftModel(BaseDecoder):
    """Standard speculative decoding with a small causal LM of the same vocabulary (arXiv 2211.17192).

    Args:
        depth: draft tokens per cycle, sampled from the small model's processed distribution (argmax at temperature 0).
    """

    depth: int = 4
    name: ClassVar[str] = "draft_model"

    def __post_init__(self) -> None:
        at_least("depth", self.depth, 1, "draft tokens per cycle")

    @property
    def acceptance(self) -> str:
        """Always `sampled`: accept with probability min(1, p/q)."""
        return "sampled"

    def check(self, models: DecodingModels) -> None:
        """Raise ValueError unless there is a small model with the target's vocabulary."""
        target, small = models.target, models.small
        if small is None:
            raise ValueError("decoding=draft_model needs a small causal LM, but none is given: set small_model.")
        if small.head.vocab_size != target.head.vocab_size:
            raise ValueError(
                f"small model {small.name} has {small.head.vocab_size} tokens and target {target.name} "
                f"{target.head.vocab_size}: decoding=draft_model needs the same vocabulary."
            )

    def _proposer(
        self, models: DecodingModels, prompt: list[int], limit: int, sampling: Sampling, generator: Generator | None
    ) -> Proposer:
        return SmallModelProposer(models, prompt, self.depth, limit, sampling=sampling, generator=generator)
