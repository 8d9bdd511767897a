"""EAGLE-3 in the trainer: the features that it reads, its loss, its FLOPs, its plan, and runs from end to end."""

import contextlib
import json
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_compute import KERNELS
from torch.utils.flop_counter import FlopCounterMode
from training_toys import make_data, make_module

from hass_lightning.data.batches import FeatureDataset, collate
from hass_lightning.data.features import bytes_per_token
from hass_lightning.draft import Alignment, Eagle3Draft, unroll
from hass_lightning.draft.alignment import needed_rows
from hass_lightning.draft.checkpoint import save_draft
from hass_lightning.draft.initialize import initialize, start_from
from hass_lightning.losses import DraftLoss, FeatureRegression, SoftCrossEntropy, TopK
from hass_lightning.runs.config import config_folder
from hass_lightning.training.compute import BatchShape, step_flops
from hass_lightning.training.from_config import build_module
from hass_lightning.training.module import HassModule

OVERRIDES = [
    "experiment=smoke", "model/draft=eagle3", "model/loss=eagle3", "model.draft.vocab_size=200",
    "model.draft.start=target", "model.alignment.depth=4", "model.alignment.step_weights=0.8",
    "model.alignment.gradient=bptt", "model.alignment.edge=drop", "model.alignment.alive=3",
]  # fmt: skip
ALIGNMENT = Alignment(4, step_weights=0.8, gradient="bptt", edge="drop")


class NoTracker(contextlib.nullcontext):
    """Instead of the counter's table by module, whose hooks do not allow `autograd.grad` of a module's own weight."""

    parents = ("Global",)


def make_eagle3(target, alignment=ALIGNMENT, token_ids=None, terms=None, **options):
    torch.manual_seed(0)
    draft = Eagle3Draft.from_target(target.config, vocab_size=None if token_ids is None else len(token_ids), **options)
    loss = DraftLoss(terms or {"soft_ce": SoftCrossEntropy()})
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    return HassModule(draft, loss, alignment, target.head, optimizer, token_ids=token_ids)


def make_batch(data, count=4):
    dataset = FeatureDataset(data.stores()[0])
    return collate([dataset[index] for index in range(count)])[0]


@pytest.fixture
def wide(tiny, tmp_path):
    """The toy corpus with the features of both layers of the tiny target."""
    data = make_data(tiny, tmp_path)
    data.read_layers((0, 1))
    return data


def test_the_loss_is_the_soft_cross_entropy_of_rows_with_a_root(tiny, wide):
    """The module's loss, gradients included, against its definition row by row."""
    token_ids = torch.arange(20, 150)
    module, batch = make_eagle3(tiny, token_ids=token_ids), make_batch(wide)
    prepared = module.prepare(batch)
    mask, dropped = prepared.mask, prepared.num_dropped
    assert dropped > 0
    total = module.aligned_loss(batch).total
    size = tiny.hidden_size
    target = tiny.head.draft_vocabulary(token_ids).logits(batch.features[:, 1:, -size:]).softmax(-1)
    expected = 0.0
    draft = module.draft
    steps = unroll(draft, tiny.head.embed(batch.input_ids[:, 1:]), batch.features[:, :-1], ALIGNMENT)
    for number, features in enumerate(steps):
        log_q = draft.lm_head(draft.norm(features)).log_softmax(-1)
        rows = -(target * log_q).sum(-1)
        rooted = torch.arange(mask.shape[1]) >= number
        expected = expected + 0.8**number * rows[mask & rooted].sum() / mask.sum()
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*draft.named_parameters(), strict=True)
    ours, theirs = torch.autograd.grad(total, parameters), torch.autograd.grad(expected, parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=name)


def test_terms_of_hass_are_computed_on_it_unchanged(tiny, wide):
    terms = {"feature": FeatureRegression(), "soft_ce": SoftCrossEntropy(0.1), "top_k": TopK()}
    output = make_eagle3(tiny, terms=terms).aligned_loss(make_batch(wide))
    assert {name.split("/")[0] for name in output.values} == set(terms)
    assert torch.isfinite(output.total)


def test_an_eagle_head_trains_the_same_on_the_features_of_eagle3(tiny, tmp_path, wide):
    narrow = make_data(tiny, tmp_path)
    assert wide.stores()[0].folder != narrow.stores()[0].folder
    results = []
    for data in (narrow, wide):
        module = make_module(tiny)
        total = module.aligned_loss(make_batch(data)).total
        results.append((total, *torch.autograd.grad(total, module.draft.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_set_of_features_named_in_the_config_serves_both_heads(tiny, tmp_path, wide):
    shared = make_data(tiny, tmp_path, feature_layers=[0, 1])
    for layers in ((), (0, 1)):
        shared.read_layers(layers)
        assert shared.stores()[0].folder == wide.stores()[0].folder
    with pytest.raises(ValueError, match=r"data\.feature_layers=\[0, 1\], but the head reads the layers \[1\]"):
        shared.read_layers((1,))


def test_features_online_and_in_eight_bits_are_those_of_the_cache(tiny, tmp_path, wide):
    exact = make_batch(wide)
    assert exact.features.shape[-1] == 3 * tiny.hidden_size
    assert bytes_per_token(wide.target) - bytes_per_token(tiny) == 2 * 4 * tiny.hidden_size
    assert bytes_per_token(wide.target, True) - bytes_per_token(tiny, True) == 2 * (tiny.hidden_size + 4)
    online, small = make_data(tiny, tmp_path, features="online"), make_data(tiny, tmp_path, eight_bit_cache=True)
    for data, tolerance in ((online, 1e-5), (small, 0.02)):
        data.read_layers((0, 1))
        batch = make_batch(data)
        for part, near in zip(exact.features.chunk(3, -1), batch.features.chunk(3, -1), strict=True):
            worst = (part - near).abs().amax(-1) / part.abs().amax(-1).clamp(min=1e-6)
            assert worst.max() < tolerance  # of each layer's own largest magnitude
        assert torch.equal(batch.target_ids, exact.target_ids)


def test_it_starts_from_the_target_and_from_a_head_of_the_same_vocabulary(tiny, tmp_path):
    token_ids = torch.arange(5, 90)
    module = make_eagle3(tiny, token_ids=token_ids, start="target")
    initialize(module.draft, tiny, iter(()), token_ids)
    assert torch.equal(module.draft.lm_head.weight, tiny.head.lm_head[token_ids])
    assert torch.equal(module.draft.norm.weight, tiny.model.model.norm.weight)
    save_draft(tmp_path, module.draft, token_ids, {})
    other = make_eagle3(tiny, token_ids=token_ids).draft
    start_from(other, tmp_path, token_ids)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), module.draft.parameters(), strict=True))
    with pytest.raises(ValueError, match="LM head of another draft vocabulary"):
        start_from(other, tmp_path, token_ids + 1)


@pytest.mark.parametrize("gradient", ["detach", "bptt"])
@pytest.mark.parametrize("lm_head", ["own", "target"])
def test_flops_are_within_5_percent_of_pytorchs_count(tiny, wide, lm_head, gradient):
    batch, alignment = make_batch(wide, 6), Alignment(3, gradient=gradient)
    module = make_eagle3(tiny, alignment, lm_head=lm_head)
    counter = FlopCounterMode(display=False, custom_mapping=KERNELS)
    counter.mod_tracker = NoTracker()
    with counter:
        module.aligned_loss(batch).total.backward()
    mask = batch.loss_mask[:, :-1]
    shape = BatchShape(*batch.input_ids.shape, int(mask.sum()), int(needed_rows(mask, 3).sum()))
    ours = step_flops(module.draft.products(), len(module.vocabulary), shape, alignment)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_plan_counts_its_parameters_and_its_features():
    from hydra import compose, initialize_config_dir

    from hass_lightning.runs.config import config_folder
    from hass_lightning.training.plan import plan_run

    sizes = "{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 32, num_attention_heads: 4, "
    sizes += "num_key_value_heads: 2, vocab_size: 1000, head_dim: 16}"
    shared = [f"+target.sizes={sizes}", "estimate.num_tokens=1000000", "estimate.device=a100_80gb"]
    with initialize_config_dir(config_folder(), version_base="1.3"):
        plans = [
            plan_run(compose("train", overrides=["experiment=smoke", f"model/draft={kind}", *shared]), 1e12)
            for kind in ("eagle", "eagle3")
        ]
    eagle, eagle3 = plans
    assert eagle3["disk_gb"] == pytest.approx(4 * eagle["disk_gb"], rel=0.15)
    assert eagle3["draft_parameters"] - eagle["draft_parameters"] == (
        3 * 64 * 64 - 2 * 64 * 64 + 64 * 64 * 2 + 3 * 64 + 64 * 1000  # fc, wider q, k and v, norms, LM head
    )


def test_the_smoke_path_trains_decodes_losslessly_exports_and_is_imported(call_command, tmp_path):
    done = call_command("train", *OVERRIDES, "logger=csv", "trainer.max_steps=4", "name=e3")
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert (result["num_checked"], result["num_identical"]) == (2, 2)
    for command, *words in (
        ("export", "target=tiny", f"draft={result['run_dir']}", "format=sglang", "output_dir=served"),
        ("import_head", "path=served", "output_dir=mine"),
        ("benchmark", "draft=mine", "target=tiny", "benchmarks=[smoke]", "limit=2", "replay=true", "max_new_tokens=12"),
    ):
        done = call_command(command, *words)
        assert done.code == 0, done.err


def test_the_doctor_learns_a_conversation_by_heart_with_it(call_command):
    done = call_command("doctor", *OVERRIDES, "model.alignment.alive=null", "overfit_steps=200")
    result = json.loads(done.out.splitlines()[-1])
    errors = [finding for finding in result["findings"] if finding["status"] == "error"]
    assert not errors, errors
    assert {"overfit", "reload", "features", "probe_step"} <= {finding["check"] for finding in result["findings"]}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_cpu", "deepspeed_zero2"])
def test_two_processes_train_it_and_decode_losslessly(run_command, trainer):
    extra = ["trainer.accelerator=cpu"] if trainer.startswith("deepspeed") else []
    done = run_command(
        "train", *OVERRIDES, f"trainer={trainer}", "trainer.max_steps=4", *extra, "trainer.precision=32-true"
    )
    assert done.code == 0, done.err[-3000:]
    result = json.loads(done.out.splitlines()[-1])
    assert (result["num_checked"], result["num_identical"]) == (2, 2)


def test_zero_3_is_refused(tiny, wide):
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose("train", overrides=[*OVERRIDES, "trainer=deepspeed_zero3"])
    with pytest.raises(ValueError, match=r"trainer\.strategy\.stage=3 .* trainer=deepspeed_zero2"):
        build_module(config, wide)
