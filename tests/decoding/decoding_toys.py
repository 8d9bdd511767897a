"""Tiny targets, draft heads that are never, always or sometimes right, and enumeration of random outcomes."""

from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hass_lightning.draft import Eagle3Draft, EagleDraft, draft_config
from hass_lightning.target_model import TargetModel


def make_target(
    vocab=31, layers=2, hidden=32, dtype=torch.float32, seed=0, eos=None, max_length=128, scale=3.0, sharp=1.0
) -> TargetModel:
    """Create a random Llama with weights large enough for varied texts; `sharp` scales its logits."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=max_length, bos_token_id=None, eos_token_id=eos,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= scale
    model.lm_head.weight.data *= sharp
    return TargetModel(model, SimpleNamespace(eos_token_id=eos, all_special_ids=[]), "toy", ".")


def make_draft(target, seed=1) -> EagleDraft:
    torch.manual_seed(seed)
    return EagleDraft(draft_config(target.config)).eval().to(target.dtype)


def make_eagle3(target, seed=1, vocab_size=None) -> Eagle3Draft:
    """An EAGLE-3 head that reads all layers of `make_target`; weights as large as those of the target."""
    torch.manual_seed(seed)
    draft = Eagle3Draft.from_target(target.config, vocab_size=vocab_size)
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3
    return draft.eval().to(target.dtype)


@torch.inference_mode()
def greedy_text(target, prompt, count, stop=frozenset()):
    """Reference implementation of greedy decoding: the whole sequence through the model for each token, no cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(target.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


class OneHotVocabulary:
    """Reads the score of a token directly from the feature, so that a stub can choose its draft tokens."""

    token_ids = None

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def logits(self, features, decoding=True):
        return 50 * features[..., : self.size]

    def to_token_ids(self, indices):
        return indices


class KnowingDraft(EagleDraft):
    """Knows the greedy text: correct at position p of the sequence if `right(p)`, else off by one token."""

    def __init__(self, target, text, right):
        super().__init__(draft_config(target.config))
        self.to(target.dtype)
        self.vocab = target.head.vocab_size
        assert self.vocab <= target.hidden_size
        self.text, self.right = text, right

    def forward(self, embeddings, features, cache=None, positions=None, mask=None):
        if positions is None:
            positions = torch.arange(cache.length, cache.length + embeddings.shape[1])[None]
        out = torch.zeros_like(features)
        for column, position in enumerate(positions[0].tolist()):
            after = position + 2  # position t reads token t+1 and predicts token t+2
            token = self.text[after] if after < len(self.text) else 0
            out[0, column, token if self.right(after) else (token + 1) % self.vocab] = 1
        return out


class BigramDraft(EagleDraft):
    """Proposes `table[token]` in any context, which is sometimes correct; works for trees and ragged batches."""

    def __init__(self, target, table):
        super().__init__(draft_config(target.config))
        self.to(target.dtype)
        self.embed_tokens, self.table = target.head.embed_tokens, table

    def forward(self, embeddings, features, cache=None, positions=None, mask=None):
        token = torch.cdist(embeddings, self.embed_tokens[None].to(embeddings.dtype)).argmin(-1)
        return torch.nn.functional.one_hot(self.table[token], features.shape[-1]).to(features.dtype)


def bigram_table(target, prompts, count=60):
    """Return the most frequent next token of each token in greedy texts of the target."""
    counts = torch.zeros(target.head.vocab_size, target.head.vocab_size)
    for prompt in prompts:
        text = [*prompt, *greedy_text(target, prompt, count)]
        for first, second in pairwise(text):
            counts[first, second] += 1
    return counts.argmax(-1)


class Enumerator:
    """Replaces the two random functions of sampling.py and enumerates all outcomes with exact probabilities."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr("hass_lightning.decoding.sampling.bernoulli", self.bernoulli)
        monkeypatch.setattr("hass_lightning.decoding.sampling.categorical", self.categorical)
        self.prefix: list[int] = []

    def _choose(self, weights: list[float]) -> int:
        """Choose the outcome given by the prefix, or the first possible one, and record how many there are."""
        possible = [index for index, weight in enumerate(weights) if weight > 0]
        if len(possible) == 1:
            return possible[0]
        if self.step == len(self.prefix):
            self.prefix.append(0)
        self.sizes.append(len(possible))
        index = possible[self.prefix[self.step]]
        self.step += 1
        self.probability *= weights[index]
        return index

    def bernoulli(self, thresholds, generator):
        return torch.tensor([bool(self._choose([1 - a, a])) for a in thresholds.clamp(0, 1).tolist()])

    def categorical(self, weights, generator):
        rows = weights.reshape(-1, weights.shape[-1])
        rows = rows / rows.sum(-1, keepdim=True)
        return torch.tensor([self._choose(row) for row in rows.tolist()]).reshape(weights.shape[:-1])

    def distribution(self, function) -> dict:
        """Return {result: probability} of a function with random draws; the probabilities sum to 1."""
        found: dict = defaultdict(float)
        self.prefix = []
        while True:
            self.step, self.sizes, self.probability = 0, [], 1.0
            result = function()
            found[result] += self.probability
            while self.prefix and self.prefix[-1] + 1 == self.sizes[len(self.prefix) - 1]:
                self.prefix.pop()
            if not self.prefix:
                return dict(found)
            self.prefix[-1] += 1


def total_variation(first: dict, second: dict) -> float:
    return sum(abs(first.get(key, 0) - second.get(key, 0)) for key in first.keys() | second.keys()) / 2
