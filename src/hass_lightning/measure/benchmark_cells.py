"""The cells of a benchmark (draft, decoder, sampling) and the turns of its prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from time import perf_counter
from typing import Any

import torch

from hass_lightning.decoding.models import Decoder, DecodingModels
from hass_lightning.measure.record import BASELINE
from hass_lightning.types import Conversation, DecodeResult, Message, Sampling


@dataclass(frozen=True)
class Cell:
    """One combination of draft, decoder and sampling, measured on every prompt."""

    draft: str  # "" if the decoder uses no head
    label: str
    decoder: Decoder
    models: DecodingModels
    sampling: Sampling

    @property
    def is_baseline(self) -> bool:
        """Whether this cell is the baseline for speed and answers."""
        return self.label == BASELINE

    @property
    def rule(self) -> str:
        """The acceptance rule."""
        return self.decoder.acceptance if self.sampling.temperature > 0 else "greedy"

    @property
    def settings(self) -> dict[str, Any]:
        """The decoder's fields after a round trip through JSON, so that a new record equals one read back."""
        return json.loads(json.dumps(asdict(self.decoder))) if is_dataclass(self.decoder) else {}

    def decode(self, prompt: list[int], max_new_tokens: int, seed: int = 0) -> DecodeResult:
        """Decode one answer. Seconds that the decoder assigns to no phase count as bookkeeping."""
        device = self.models.target.device
        generator = torch.Generator().manual_seed(seed)
        _synchronize(device)
        start = perf_counter()
        result = self.decoder.generate(self.models, prompt, max_new_tokens, self.sampling, generator)
        _synchronize(device)
        missing = perf_counter() - start - result.total_seconds
        if missing > 0:
            result.seconds["bookkeeping"] = result.seconds.get("bookkeeping", 0.0) + missing
        return result

    def on(self, target: Any) -> Cell:
        """Return the same cell with another target or a replacement of it."""
        return replace(self, models=replace(self.models, target=target))

    def traced(self) -> Cell:
        """Return the same cell with logit gaps recorded (slower; not for timing)."""
        return replace(self, models=replace(self.models, trace=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def uses_head(decoder: Decoder, models: DecodingModels) -> bool:
    """Return whether the decoder drafts with the head, in which case it refuses models without one.

    Raises:
        ValueError: if the models do not fit for another reason.
    """
    try:
        decoder.check(replace(models, draft=None))
    except ValueError:
        decoder.check(models)
        return True
    return False


def plan_cells(
    models: Mapping[str, DecodingModels], decoders: Mapping[str, Decoder], samplings: Sequence[Sampling]
) -> list[Cell]:
    """Return every (draft, decoder, sampling); a decoder that uses no head appears once, not once per draft.

    Raises:
        ValueError: nothing to measure, drafts of different targets, or a decoder that does not fit its models.
    """
    if not models or not decoders or not samplings:
        raise ValueError("a benchmark needs at least one model, one decoder and one temperature.")
    targets = {(each.target.name, each.target.dtype) for each in models.values()}
    if len(targets) > 1:
        listed = ", ".join(sorted(f"{name} in {dtype}" for name, dtype in targets))
        raise ValueError(f"a benchmark measures one target, got {listed}: run them separately.")
    cells = []
    for label, decoder in decoders.items():
        name = BASELINE if decoder.name == BASELINE else label
        first = next(iter(models.values()))
        chosen = list(models.items()) if uses_head(decoder, first) else [("", first)]
        for draft, each in chosen:
            decoder.check(each)
            cells += [Cell(draft, name, decoder, each, sampling) for sampling in samplings]
    return cells


def turn_messages(conversation: Conversation) -> list[tuple[Message, ...]]:
    """Return the messages that each turn adds: a user message, and for the first turn all messages before it.

    A conversation that contains answers is one turn, up to its last user message.
    """
    messages = conversation.messages
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    if not users:
        return []
    if any(message.role == "assistant" for message in messages[: users[-1]]):
        return [messages[: users[-1] + 1]]
    return [messages[: users[0] + 1], *((messages[index],) for index in users[1:])]


def seed_of(*parts: object) -> int:
    """Return a seed that depends only on `parts`, not on the process or the order of work."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
