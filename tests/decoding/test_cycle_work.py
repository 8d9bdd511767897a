"""Work per cycle: logits only where needed, and one transfer to the host."""

import pytest
import torch
from decoding_toys import make_draft, make_target
from torch.utils._python_dispatch import TorchDispatchMode

from hass_lightning.decoding import Autoregressive, Chain, DecodingModels, DynamicTree, Hybrid, StaticTree
from hass_lightning.draft import EagleDraft
from hass_lightning.target_model import KVCache, TargetModel
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
from hass_lightning.target_model.lm_head import TargetHead

PROMPT = [3, 1, 4, 1, 5, 2, 6, 0]


class Transfers(TorchDispatchMode):
    """Counts operations that synchronize with the host on a GPU (`tolist` is no operation and counted by a patch)."""

    # in inference mode `item` is not decomposed
    WAITING = ("item", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if any(name.startswith(waiting) for waiting in self.WAITING) or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def models():
    target = make_target(vocab=7, seed=4)  # with few tokens, random heads are sometimes accepted
    return DecodingModels(target, make_draft(target))


@pytest.mark.parametrize(
    "decoder", [Autoregressive(), Chain(4), StaticTree(), DynamicTree(12, 4, 3), Hybrid(12, 4, 3)], ids=lambda d: d.name
)
def test_one_host_transfer_per_cycle(decoder, models, monkeypatch):
    lists = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or original(tensor))
    decoder.generate(models, PROMPT, 2)  # constants are built once

    def transfers(length):
        lists.clear()
        with Transfers() as mode:
            result = decoder.generate(models, PROMPT, length)
        return len(lists) + len(mode.found), len(result.accepted)

    short, long = transfers(8), transfers(40)
    assert long[1] > short[1]
    assert long[0] - short[0] == long[1] - short[1]


def test_transfer_counter_counts_synchronizing_operations():
    x = torch.arange(3.0)
    for wait in (lambda: int(x[0]), lambda: x[x > 1], lambda: bool(x[1]), x.nonzero, x[2].item):
        for inference in (False, True):
            with torch.inference_mode(inference), Transfers() as mode:
                wait()
            assert len(mode.found) == 1


@pytest.mark.parametrize("decoder", [Chain(4), StaticTree(), DynamicTree(12, 4, 3)], ids=lambda d: d.name)
def test_lm_head_and_draft_head_run_only_on_needed_tokens(decoder, models, monkeypatch):
    """LM head: the last token of the prompt, then each node. Draft head: new tokens and expanded nodes."""
    rows = {"target": [], "guess": [], "head": [], "forward": []}

    def spied(owner, name, key, count):
        original = getattr(owner, name)

        def call(self, *args, **kwargs):
            rows[key].append(count(*args))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    spied(TargetHead, "logits", "target", lambda features: features.shape[0])
    spied(DraftVocabulary, "logits", "guess", lambda features: features.shape[0])
    spied(EagleDraft, "forward", "head", lambda embeddings, *_: embeddings.shape[1])
    spied(TargetModel, "forward", "forward", lambda ids, *_: ids.shape[1])
    result = decoder.generate(models, PROMPT, 30)
    nodes = [count + 1 for count in result.nodes]  # and the root
    assert rows["forward"] == [len(PROMPT), *nodes]
    assert rows["target"] == [1, *nodes]
    levels = decoder.depth if decoder.name == "dynamic_tree" else max(result.drafted)
    cycles = [rows["head"][start : start + levels] for start in range(0, len(rows["head"]), levels)]
    assert cycles[0][0] == len(PROMPT)  # the prompt without its first token, and the first new token
    assert [cycle[0] for cycle in cycles[1:]] == [count + 1 for count in result.accepted[:-1]]
    expanded = {"chain": [1, 1, 1], "dynamic_tree": [3, 3, 3]}.get(decoder.name)
    if expanded:
        assert all(cycle[1:] == expanded for cycle in cycles)
    inner = len({tuple(path[:-1]) for path in getattr(decoder, "paths", [])} - {()})
    if decoder.name == "static_tree":
        assert all(sum(cycle[1:]) == inner for cycle in cycles)  # nodes with children, but no leaves
    assert len(rows["guess"]) == len(rows["head"])
    assert all(count == 1 for count in rows["guess"][::levels])


def test_cache_is_allocated_once(models, monkeypatch):
    made = []
    original = KVCache.__init__

    def counted(self, *args, **kwargs):
        made.append(1)
        original(self, *args, **kwargs)

    monkeypatch.setattr(KVCache, "__init__", counted)
    DynamicTree(12, 4, 3).generate(models, PROMPT, 30)
    assert len(made) == 2  # of the target and the head
