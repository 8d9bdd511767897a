"""The models passed to a decoder, and the protocol of decoders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from hass_lightning.draft import DraftHead, SavedDraft
from hass_lightning.target_model import DraftVocabulary, TargetModel
from hass_lightning.types import DecodeResult, Sampling


@dataclass
class DecodingModels:
    """The models of one decoding run. `Decoder.check` raises an error if one that the decoder needs is missing.

    Args:
        target: the model that verifies. Its features become those that the head reads.
        draft: a draft head in the target's dtype and on its device.
        vocabulary: the draft vocabulary (None: the full LM head).
        small: a small causal LM with the target's vocabulary, for `DraftModel`.
        trace: record `DecodeResult.logit_gaps` (greedy decoding only; costs a top-2 over the verified logits).
    """

    target: TargetModel
    draft: DraftHead | None = None
    vocabulary: DraftVocabulary | None = None
    small: TargetModel | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        if self.draft is not None and self.target.feature_layers != self.draft.feature_layers:
            self.target = self.target.reading(self.draft.feature_layers)

    @classmethod
    def of(cls, target: TargetModel, saved: SavedDraft, small: TargetModel | None = None) -> DecodingModels:
        """Prepare a saved head for decoding with `target`: in its dtype and on its device."""
        draft = saved.for_decoding(target.dtype, target.device)
        return cls(target, draft, target.head.draft_vocabulary(saved.token_ids), small)

    @cached_property
    def draft_vocabulary(self) -> DraftVocabulary:
        """`vocabulary`, or the target's full LM head."""
        return self.vocabulary if self.vocabulary is not None else self.target.head.draft_vocabulary()


class Decoder(Protocol):
    """A decoding method. Its fields are its settings; it holds no model and no state."""

    @property
    def name(self) -> str:
        """Name in records and tables (the file name in conf/decoding)."""
        ...

    @property
    def acceptance(self) -> str:
        """Acceptance rule above temperature 0: `none`, `deterministic` or `sampled` (see verify.py)."""
        ...

    def check(self, models: DecodingModels) -> None:
        """Raise ValueError if a model is missing or does not fit the settings."""
        ...

    def generate(
        self,
        models: DecodingModels,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        generator: torch.Generator | None = None,
    ) -> DecodeResult:
        """Decode the answer to `prompt`, with its trace.

        Args:
            models: the models.
            prompt: token ids, at least one.
            max_new_tokens: maximum length of the answer, including the end token.
            sampling: the sampling parameters.
            generator: a CPU generator, the only source of randomness (None: torch's global generator).

        Raises:
            ValueError: if the prompt is empty or too long, `max_new_tokens` is below 1, or a model does not fit.
        """
        ...

    def stream(
        self,
        models: DecodingModels,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        generator: torch.Generator | None = None,
    ) -> Iterator[DecodeResult]:
        """Decode as `generate` does, and yield the growing result after each forward of the target.

        Raises:
            ValueError: as in `generate`.
        """
        ...
