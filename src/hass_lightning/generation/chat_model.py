"""A target and its draft head in one object that answers questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding import Decoder, DecodingModels
from hass_lightning.types import DecodeResult, Message, Sampling


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: the answer without special tokens.
        result: its token ids, and the number of tokens accepted by each target forward.
    """

    text: str
    result: DecodeResult

    @property
    def tokens_per_forward(self) -> float:
        """Acceptance length τ of this answer."""
        return self.result.acceptance_length

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second after the prefill."""
        return self.result.tokens_per_second


@dataclass(frozen=True)
class Chunk:
    """The part of an answer that one target forward added.

    Attributes:
        text: the new text. A character that spans several tokens is part of the chunk with its last token.
        num_tokens: the number of new tokens.
        result: the answer so far.
    """

    text: str
    num_tokens: int
    result: DecodeResult


@dataclass(frozen=True)
class ChatModel:
    """A target with its draft head.

    Args:
        models: the target and its head.
        decoder: a decoder of `hass_lightning.decoding`.
    """

    models: DecodingModels
    decoder: Decoder

    def generate(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> Answer:
        """Generate the answer to a question.

        Args:
            prompt: the question, or a conversation that ends with it.
            max_new_tokens: maximum length of the answer, including the end token.
            sampling: the sampling parameters; greedy by default.
            seed: seed of the random numbers for sampling.

        Raises:
            ValueError: as in `Decoder.generate`, or if the target has no chat template.
        """
        *_, last = self.stream(prompt, max_new_tokens, sampling, seed)
        return Answer(self.decode(last.result.token_ids), last.result)

    def stream(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
        decoder: Decoder | None = None,
    ) -> Iterator[Chunk]:
        """Generate the answer as `generate` does, and yield the new text after each target forward.

        Args:
            decoder: the decoder to use (None: that of this object).
        """
        messages = [Message("user", prompt)] if isinstance(prompt, str) else prompt
        ids = encode_prompt(self.models.target.tokenizer, messages)
        generator = torch.Generator().manual_seed(seed)
        written, num_tokens = "", 0
        for result in (decoder or self.decoder).stream(self.models, ids, max_new_tokens, sampling, generator):
            text = self.decode(result.token_ids)
            whole = text.rstrip("�")  # without the bytes of an incomplete character
            new, written = whole[len(written) :], whole
            yield Chunk(new, len(result.token_ids) - num_tokens, result)
            num_tokens = len(result.token_ids)
        if len(text) > len(written):
            yield Chunk(text[len(written) :], 0, result)

    def decode(self, token_ids: list[int]) -> str:
        """The text of `token_ids` without special tokens."""
        text: str = self.models.target.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
