"""The averaged head: its weights, validation, saving and resuming, and that training is unchanged."""

import json
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from test_resume import KeepsAll
from training_toys import make_data, make_module, make_small_trainer

from hass_lightning.draft import load_draft
from hass_lightning.training.averaging import AverageHead
from hass_lightning.training.callbacks import SaveBestDraft
from hass_lightning.training.strategy import CPUDeepSpeedStrategy

NUM_STEPS, DECAY = 9, 0.8


class Weights(L.Callback):
    """Records the trained weights after every step, and those used by a validation."""

    def __init__(self):
        self.trained, self.validated = [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained.append({name: p.detach().clone() for name, p in pl_module.draft.named_parameters()})

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.validated[trainer.global_step] = {n: p.detach().clone() for n, p in pl_module.draft.named_parameters()}


def run(tiny, cache, folder, average=True, checkpoint=None, seed=0):
    data = make_data(tiny, cache, batch_size=2)
    weights, best = Weights(), SaveBestDraft(str(folder / "draft"), monitor="val/accuracy/step1")
    every = KeepsAll(folder / "checkpoints", every_n_train_steps=1)
    mean = [AverageHead(DECAY)] if average else []
    trainer = make_small_trainer(
        data, folder, [every, weights, best, *mean], max_steps=NUM_STEPS, max_epochs=None, val_check_interval=3
    )
    module = make_module(tiny, seed=seed)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return SimpleNamespace(weights=weights, module=module, trainer=trainer, best=best, folder=folder)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """The same run with and without the average."""
    cache = tmp_path_factory.mktemp("features")
    return {on: run(tiny, cache, tmp_path_factory.mktemp("run"), on) for on in (True, False)} | {"cache": cache}


def averages(trained):
    """Return the average after each step, computed from its definition."""
    mean, found = None, []
    for count, weights in enumerate(trained):
        keep = min(DECAY, (1 + count) / (10 + count))
        mean = weights if mean is None else {n: keep * mean[n] + (1 - keep) * value for n, value in weights.items()}
        found.append(mean)
    return found


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in second)


def test_training_is_not_changed(runs):
    ours, plain = runs[True].weights.trained, runs[False].weights.trained
    assert len(ours) == len(plain) == NUM_STEPS
    assert all(equal(one, other) for one, other in zip(ours, plain, strict=True))


def test_validation_and_final_head_use_the_average(runs):
    found = runs[True]
    expected = averages(found.weights.trained)
    assert sorted(found.weights.validated) == [3, 6, 9]
    for step, weights in found.weights.validated.items():
        assert_close(weights, expected[step - 1])
        assert not equal(weights, found.weights.trained[step - 1])
    assert_close(dict(found.module.draft.named_parameters()), expected[-1])
    plain = runs[False]
    assert found.trainer.callback_metrics["val/loss"] != plain.trainer.callback_metrics["val/loss"]


def test_the_saved_head_is_the_validated_one(runs):
    found = runs[True]
    step = json.loads((found.folder / "draft" / "config.json").read_text())["hass_lightning"]["step"]
    saved = load_draft(found.folder / "draft").draft
    assert_close(dict(saved.named_parameters()), found.weights.validated[step])


def test_checkpoints_contain_both_weights(runs):
    found = runs[True]
    for step in (2, 3, 7):  # 3: saved after a validation
        content = torch.load(found.folder / "checkpoints" / f"step{step}.ckpt", weights_only=True)
        trained = {name.removeprefix("draft."): value for name, value in content["current_model_state"].items()}
        assert equal(trained, found.weights.trained[step - 1])
        mean = {name.removeprefix("draft."): value for name, value in content["state_dict"].items()}
        assert_close(mean, averages(found.weights.trained)[step - 1])


@pytest.mark.parametrize("step", [2, 6])
def test_resumed_run_equals_the_uninterrupted_one_bitwise(runs, tiny, tmp_path, step):
    checkpoint = str(runs[True].folder / "checkpoints" / f"step{step}.ckpt")
    found = run(tiny, runs["cache"], tmp_path, checkpoint=checkpoint, seed=5)
    assert all(equal(a, b) for a, b in zip(found.weights.trained, runs[True].weights.trained[step:], strict=True))
    assert equal(found.module.state_dict(), runs[True].module.state_dict())
    assert equal(found.weights.validated[9], runs[True].weights.validated[9])
    assert found.best.best == runs[True].best.best


def test_frozen_embedding_and_lm_head_are_not_copied(runs, tiny):
    average = next(each for each in runs[True].trainer.callbacks if isinstance(each, AverageHead))
    copied = average._average_model.module
    assert copied.head.lm_head.data_ptr() == tiny.head.lm_head.data_ptr()
    assert copied.vocabulary.weight.data_ptr() == tiny.head.lm_head.data_ptr()
    assert copied.draft is not runs[True].module.draft


def test_deepspeed_is_refused_by_name(tiny):
    trainer = SimpleNamespace(strategy=CPUDeepSpeedStrategy(stage=2))
    with pytest.raises(ValueError, match=r"callbacks\.average does not work with DeepSpeed.*trainer=ddp"):
        AverageHead().setup(trainer, make_module(tiny), "fit")


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_out_of_range_is_named(decay):
    with pytest.raises(ValueError, match=rf"callbacks\.average\.decay={decay}"):
        AverageHead(decay)
