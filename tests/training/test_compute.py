"""Budgets: FLOPs against PyTorch's count, the number of steps of a budget, and a run that ends with its budget."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.flop_counter import FlopCounterMode
from training_toys import make_module, smoke_config

from hass_lightning.data.batches import FeatureDataset, collate
from hass_lightning.draft import Alignment
from hass_lightning.draft.alignment import needed_rows
from hass_lightning.training.compute import BatchShape, RunCost, step_flops
from hass_lightning.training.from_config import make_trainer


def scores_and_values(q, k, *rest, out_shape=None, **options):
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def backward_of_them(gradient, q, k, *rest, out_shape=None, **options):
    return 2 * scores_and_values(q, k)


# the CPU's flash attention is the only kernel that PyTorch's counter does not know
aten = torch.ops.aten
KERNELS = {
    aten._scaled_dot_product_flash_attention_for_cpu: scores_and_values,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_of_them,
}


@pytest.mark.parametrize(
    "alignment",
    [
        Alignment(1), Alignment(3), Alignment(3, gradient="bptt"), Alignment(2, checkpoint=True),
        Alignment(3, mask="leaky"),
    ],
    ids=["depth1", "depth3", "bptt", "checkpoint", "leaky"],
)  # fmt: skip
def test_flops_are_within_5_percent_of_pytorchs_count(tiny, data, alignment):
    dataset = FeatureDataset(data.stores()[0])
    batch, inputs = collate([dataset[index] for index in range(6)])
    wanted = batch.target_ids[:, 1:][batch.loss_mask[:, :-1]]
    module = make_module(tiny, token_ids=wanted.unique())  # the pruned vocabulary contains all labels
    module.alignment = alignment
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        module.aligned_loss(batch, inputs).total.backward()
    mask = batch.loss_mask[:, :-1]
    shape = BatchShape(*batch.input_ids.shape, int(mask.sum()), int(needed_rows(mask, alignment.depth).sum()))
    ours = step_flops(module.draft.products(), len(module.vocabulary), shape, alignment)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)


def cost(tiny, data, depth=3, accumulate=1):
    module = make_module(tiny, depth=depth)
    head = (module.draft.products(), len(module.vocabulary), module.planned_alignment)
    return RunCost(data.tokens()[0], data.batch_size, data.seed, accumulate, *head)


@pytest.mark.parametrize("depth", [1, {0: 1, 0.5: 3}], ids=["constant", "scheduled"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_budget_gives_the_largest_number_of_steps_that_fits(tiny, data, depth, accumulate):
    run = cost(tiny, data, depth, accumulate)
    for wanted in (1, 2, 7, 16):
        tokens, flops = run.tokens(wanted), run.flops(wanted)
        assert run.steps_within(None, tokens=tokens) == wanted == run.steps_within(None, tokens=tokens + 1)
        assert run.steps_within(None, flops=flops) == wanted
        assert run.steps_within(None, flops=flops * (1 - 1e-9)) == max(1, wanted - 1)
        assert run.steps_within(5, tokens=tokens, flops=2 * flops) == min(5, wanted)
    assert run.steps_within(9) == 9
    assert run.steps_within(None) is None


def test_depths_of_the_same_compute_differ_in_steps(tiny, data):
    three, one, two = (cost(tiny, data, depth) for depth in (3, 1, 2))
    assert three.steps_within(12, match_depth=3) == 12
    steps = [run.steps_within(12, match_depth=3) for run in (two, one)]
    assert 12 < steps[0] < steps[1] < 36
    assert one.flops(steps[1]) <= three.flops(12) < one.flops(steps[1] + 1)
    with pytest.raises(ValueError, match=r"compute\.match_depth=3.*max_steps"):
        one.steps_within(None, match_depth=3)
    with pytest.raises(ValueError, match=r"compute\.tokens=-1"):
        one.steps_within(None, tokens=-1)


def test_run_ends_with_its_budget_and_logs_its_compute(tiny, data, tmp_path):
    config = deepcopy(smoke_config())
    run = cost(tiny, data)
    config.compute.tokens = run.tokens(7)
    config.trainer.max_epochs = -1
    changed = {"precision": "32-true", "log_every_n_steps": 1, "enable_model_summary": False, "val_check_interval": 5}
    for key, value in (changed | {"enable_progress_bar": False, "default_root_dir": str(tmp_path)}).items():
        config.trainer[key] = value
    module, logger = make_module(tiny), CSVLogger(tmp_path, name="", version="")
    trainer = make_trainer(config, data, [], [logger], module)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == trainer.max_steps == 7
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("compute/")}
    assert logged["compute/tokens"] == run.tokens(7)
    assert logged["compute/flops"] == pytest.approx(run.flops(7), rel=1e-6)  # logged in float32
    assert 0 < logged["compute/seconds"] < 600
    assert module.example_tokens == run.tokens(7)  # counted by the module
    config.compute.tokens, config.compute.seconds = None, 1e-3
    config.trainer.max_steps = 7
    short = make_trainer(config, data, [], [logger], make_module(tiny))
    short.fit(make_module(tiny), datamodule=data)
    assert short.global_step < 7


def test_the_cost_of_another_alignment_is_that_of_its_own_run(tiny, data):
    one, three = cost(tiny, data, 1), cost(tiny, data, 3)
    assert one.flops(5, replace(one.alignment, depth=3)) == three.flops(5)
