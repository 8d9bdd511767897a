"""run_benchmark with the real decoders on a tiny random target."""

from dataclasses import replace

import pytest
import torch
from measure_toys import question

from hass_lightning.decoding import (
    Autoregressive,
    Chain,
    DecodingModels,
    DraftModel,
    DynamicTree,
    Hybrid,
    PromptLookup,
    StaticTree,
)
from hass_lightning.draft import EagleDraft, draft_config
from hass_lightning.measure import read_records, run_benchmark, summarize
from hass_lightning.measure.decoder_replay import RULE
from hass_lightning.target_model import TargetModel
from hass_lightning.target_model.tiny import tiny_llama
from hass_lightning.types import Sampling

PROMPTS = [question(0, "one two", "three"), question(1, "four")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASS_LIGHTNING_CACHE", str(tmp_path_factory.mktemp("cache")))
        target = TargetModel.load(tiny_llama(), "tiny", dtype="float32")
    torch.manual_seed(0)
    return DecodingModels(target, EagleDraft(draft_config(target.config)).eval(), small=target)


def every_decoder(tree):
    return {
        "autoregressive": Autoregressive(),
        "prompt_lookup": PromptLookup(),
        "draft_model": DraftModel(depth=3),
        "chain": Chain(depth=2),
        "static_tree": StaticTree(),
        "dynamic_tree": tree,
        "hybrid": Hybrid(tree.num_nodes, tree.depth, tree.width),
    }


def in_bf16(models):
    target = models.target.in_dtype(torch.bfloat16)
    draft = EagleDraft(models.draft.config).eval()
    draft.load_state_dict(models.draft.state_dict())
    return replace(models, target=target, draft=draft.bfloat16(), small=target)


def test_all_decoders_are_measured_and_lossless(models, tmp_path):
    decoders = every_decoder(DynamicTree(num_nodes=6, depth=2, width=3))
    path = tmp_path / "records.jsonl"
    records = run_benchmark(
        {"head": models},
        decoders,
        PROMPTS,
        max_new_tokens=13,
        samplings=(Sampling(), Sampling(1.0)),
        records_path=path,
        checked_prompts=1,
        num_warmup=0,
    )
    assert len(records) == 3 * len(decoders) * 2
    assert {r.key: r for r in read_records(path)} == {r.key: r for r in records}
    for record in records:
        assert record.num_tokens <= 13
        assert len(record.accepted) == len(record.drafted) == len(record.nodes) == len(record.proposals)
        assert sum(record.accepted) + len(record.accepted) + 1 >= record.num_tokens
        assert record.total_seconds > 0
    rows = {(row["decoder"], row["temperature"]): row for row in summarize(records)}
    for name in decoders:
        greedy = rows[name, 0.0]
        if name != "autoregressive":
            assert greedy["num_identical"] == greedy["num_compared"] == greedy["num_prompts"] == 2
            assert greedy["num_fp32_identical"] == greedy["num_checked"] == 1
    assert rows["autoregressive", 0.0]["acceptance_length"] == 1
    assert rows["autoregressive", 0.0]["speedup"] == pytest.approx(1, rel=1e-12)  # a quotient of products of times
    # the small model is the target itself: every draft token is accepted, greedy or sampled
    assert rows["draft_model", 0.0]["acceptance_length"] == rows["draft_model", 1.0]["acceptance_length"] == 4


@pytest.mark.parametrize("max_new_tokens", [1, 2, 13, 40])
def test_replay_accepts_what_decoding_accepts(models, max_new_tokens):
    """Cycle by cycle the same for every decoder, for both turns, and for an answer truncated anywhere by the limit."""
    decoders = every_decoder(DynamicTree(num_nodes=12, depth=4, width=3))
    # a small model that sometimes agrees, so that paths of every length occur
    small = TargetModel.load(tiny_llama(), "small", dtype="float32", num_layers=1)
    given = {"head": replace(models, small=small)}
    real, replayed = (
        run_benchmark(given, decoders, PROMPTS, max_new_tokens=max_new_tokens, num_warmup=0, replay=replay)
        for replay in (False, True)
    )
    assert [r.decoder for r in real] == [r.decoder for r in replayed]
    for one, two in zip(real, replayed, strict=True):
        assert (two.token_ids, two.accepted, two.drafted, two.nodes) == (
            one.token_ids, one.accepted, one.drafted, one.nodes,
        )  # fmt: skip
        assert two.proposals == one.proposals
        assert two.decoder == "autoregressive" or (two.rule, two.seconds, two.identical) == (RULE, {}, None)
    rows = {row["decoder"]: row for row in summarize(replayed)}
    assert rows["dynamic_tree"]["speedup"] is None and rows["dynamic_tree"]["tokens_per_second"] is None


def test_a_replay_needs_greedy_answers(models):
    for options in ({"samplings": (Sampling(1.0),)}, {"decoders": {"chain": Chain(depth=2)}}):
        given = {"decoders": {"autoregressive": Autoregressive(), "chain": Chain(depth=2)}} | options
        with pytest.raises(ValueError, match="replay=true needs the autoregressive decoder"):
            run_benchmark({"head": models}, prompts=PROMPTS, max_new_tokens=4, replay=True, **given)


def test_ties_in_bf16_are_audited(models):
    """Whatever the answers in bf16, they are exact in fp32, and a difference is recorded with position and gap."""
    low = in_bf16(models)
    records = run_benchmark(
        {"head": low},
        {"autoregressive": Autoregressive(), "dynamic_tree": DynamicTree(num_nodes=6, depth=2, width=3)},
        PROMPTS[1:],
        max_new_tokens=13,
        checked_prompts=1,
        fp32_models={"head": models},
        num_warmup=0,
    )
    tree = records[1]
    assert tree.target == "tiny/bfloat16"
    assert tree.fp32_identical is True
    assert (tree.difference is None) == bool(tree.identical)
    if tree.difference:
        assert tree.difference["gap"] >= 0
