"""Hand-made records, and a target and decoders with prescribed answers."""

from types import SimpleNamespace

import torch

from hass_lightning.decoding import DecodingModels
from hass_lightning.measure.record import Record
from hass_lightning.types import Conversation, DecodeResult, Message


def make_record(prompt="1", turn=0, accepted=(), drafted=None, nodes=None, seconds=None, **fields) -> Record:
    """Return a record of decoder `tree`, by default with drafted depth 3 and 6 nodes per cycle."""
    values = {"benchmark": "b", "draft": "head", "decoder": "tree", "num_tokens": sum(accepted) + len(accepted) + 1}
    return Record(
        prompt_id=prompt,
        turn=turn,
        accepted=list(accepted),
        drafted=list(drafted if drafted is not None else [3] * len(accepted)),
        nodes=list(nodes if nodes is not None else [6] * len(accepted)),
        seconds=dict(seconds or {"prefill": 0.25, "draft": 0.25, "verify": 0.25, "bookkeeping": 0.25}),
        **(values | fields),
    )


class ToyTokenizer:
    """One token per character; the template marks the speaker."""

    chat_template = "one line a message"

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True):
        return "".join(f"{m['role'][0]}:{m['content']}|" for m in messages) + "a:"

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids)


class ToyHead(str):
    """A head that is told apart by its name."""

    feature_layers = ()


def toy_models(draft="head", dtype=torch.float32, max_length=1000, name="toy") -> DecodingModels:
    target = SimpleNamespace(
        tokenizer=ToyTokenizer(), max_length=max_length, name=name, dtype=dtype, device=torch.device("cpu"),
        feature_layers=(),
    )  # fmt: skip
    return DecodingModels(target, None if draft is None else ToyHead(draft))


class StubDecoder:
    """Answers with `answer(prompt, models)`, a list of token ids, and records the prompts that it gets."""

    def __init__(self, name, answer=None, head=True, seconds=1.0, acceptance="deterministic"):
        self.name, self.answer, self.head, self.seconds, self.acceptance = name, answer, head, seconds, acceptance
        self.asked: list[tuple] = []

    def check(self, models):
        if self.head and models.draft is None:
            raise ValueError(f"{self.name} needs a draft head")

    def generate(self, models, prompt, max_new_tokens, sampling, generator):
        self.asked.append((models, "".join(map(chr, prompt)), max_new_tokens, sampling, generator.initial_seed()))
        ids = self.answer(prompt, models) if self.answer else [ord("x"), ord("y"), ord("z")]
        ids = ids[:max_new_tokens]
        cycles = max(len(ids) - 1, 0)
        gaps = [0.5 + position for position in range(len(ids))] if models.trace else []
        return DecodeResult(
            ids, [0] * cycles, [1] * cycles, [1] * cycles, {"prefill": 0.1, "verify": self.seconds}, logit_gaps=gaps
        )


def question(identifier, *texts, category="") -> Conversation:
    return Conversation(str(identifier), tuple(Message("user", text) for text in texts), category)
