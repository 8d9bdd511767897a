"""What a decoder is given: the models, and the protocol every decoder follows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from hass_lightning.draft import EagleDraft
from hass_lightning.target import DraftVocabulary, TargetModel
from hass_lightning.types import DecodeResult, Sampling


@dataclass
class DecodingModels:
    """The models of one decoding run. A decoder refuses what it needs and does not find (`Decoder.check`).

    Args:
        target: the verified model. draft: an EAGLE head in the target's dtype, on its device.
        vocabulary: the LM head rows the draft head proposes from (default: all of them).
        small: a small causal LM with the target's vocabulary, for `DraftModel`.
        trace: record `DecodeResult.logit_gaps` (greedy decoding only; costs a top-2 over the verified logits).
    """

    target: TargetModel
    draft: EagleDraft | None = None
    vocabulary: DraftVocabulary | None = None
    small: TargetModel | None = None
    trace: bool = False

    @cached_property
    def draft_vocabulary(self) -> DraftVocabulary:
        """`vocabulary`, or the target's full LM head."""
        return self.vocabulary if self.vocabulary is not None else self.target.head.draft_vocabulary()


class Decoder(Protocol):
    """A way to decode. Its fields are its settings; it holds no model and no state."""

    @property
    def name(self) -> str:
        """What records and tables call it (the file name in conf/decoding)."""
        ...

    @property
    def acceptance(self) -> str:
        """The acceptance rule above temperature 0: `none`, `deterministic` or `sampled` (see verify.py)."""
        ...

    def check(self, models: DecodingModels) -> None:
        """Raise ValueError when a model is missing or does not fit the settings."""
        ...

    def generate(
        self,
        models: DecodingModels,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        generator: torch.Generator | None = None,
    ) -> DecodeResult:
        """The answer to `prompt` and its trace.

        Args:
            prompt: token ids, at least one. max_new_tokens: longest answer, the end token counted.
            generator: a CPU generator, the only source of randomness (None: torch's global one).

        Raises:
            ValueError: empty or over-long prompt, `max_new_tokens` below 1, models that do not fit.
        """
        ...
