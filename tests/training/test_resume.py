"""A resumed run equals the uninterrupted one bitwise, wherever it was interrupted."""

import errno
import os
import shutil
import signal

import lightning.pytorch as L
import pytest
import torch
from training_toys import make_data, make_module, make_small_trainer

from hass_lightning.losses import SoftCrossEntropy, TopK
from hass_lightning.runs.ledger import REQUEUE_EXIT_CODE
from hass_lightning.training.callbacks import SaveBestDraft
from hass_lightning.training.last_checkpoint import LastCheckpoint, find_last_checkpoint

NUM_STEPS = 12


def state(trainer, module):
    """Return the complete training state and the last validation."""
    optimizer = trainer.optimizers[0].state_dict()
    flat = {f"model.{name}": value for name, value in module.state_dict().items()}
    for number, values in optimizer["state"].items():
        flat |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    flat["lr"] = torch.tensor([group["lr"] for group in optimizer["param_groups"]])
    flat["step"] = torch.tensor(trainer.global_step)
    metrics = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    return flat | metrics


class KeepsAll(LastCheckpoint):
    """Keeps a copy of each last.ckpt, as a kill at that moment would leave it."""

    def _save(self, trainer):
        super()._save(trainer)
        shutil.copy(self.folder / "last.ckpt", self.folder / f"step{trainer.global_step}.ckpt")


def run(tiny, cache, folder, accumulate=1, noise=0.1, checkpoint=None, seed=0):
    data = make_data(tiny, cache, noise=noise, batch_size=2)
    every = KeepsAll(folder / "checkpoints", every_n_train_steps=1)
    best = SaveBestDraft(str(folder / "draft"))
    trainer = make_small_trainer(
        data, folder, [best, every], max_steps=NUM_STEPS, max_epochs=None, val_check_interval=5 * accumulate,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    module = make_module(tiny, seed=seed)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    return state(trainer, module) | {"best": torch.tensor(best.best)}


@pytest.fixture(scope="module", params=[1, 3], ids=["", "accumulated"])
def whole(request, tiny, tmp_path_factory):
    """The uninterrupted run: (accumulate, cache, folder with a checkpoint per step, final state)."""
    cache, folder = tmp_path_factory.mktemp("features"), tmp_path_factory.mktemp("whole")
    return request.param, cache, folder, run(tiny, cache, folder, request.param)


# 4 and 6 are between validations, 5 and 10 are validated; an epoch of 10 batches ends at step 10 (or within a step)
@pytest.mark.parametrize("step", [4, 5, 11, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 6, 10))])
def test_resumed_equals_uninterrupted_bitwise(whole, tiny, tmp_path, step):
    accumulate, cache, folder, expected = whole
    checkpoint = str(folder / "checkpoints" / f"step{step}.ckpt")
    shutil.copytree(folder / "draft", tmp_path / "draft")  # a run resumes next to its best head
    resumed = run(tiny, cache, tmp_path, accumulate, checkpoint=checkpoint, seed=5)
    if step >= 10:  # no validation is left to run: the last one was before the checkpoint
        expected = {name: value for name, value in expected.items() if not name.startswith("val/")}
    assert set(resumed) == set(expected)
    different = [name for name in expected if not torch.equal(resumed[name], expected[name])]
    assert not different


def scheduled_run(tiny, cache, folder, checkpoint=None, seed=0):
    """Depth 1 with soft cross-entropy only, then depth 3 with top-K: the two stages as one run."""
    data = make_data(tiny, cache, noise=0.1, batch_size=2)
    every = KeepsAll(folder / "checkpoints", every_n_train_steps=1)
    trainer = make_small_trainer(data, folder, [every], max_steps=6, max_epochs=None, val_check_interval=3)
    terms = {"soft_ce": SoftCrossEntropy(0.1), "top_k": TopK(weight={0: 0, 0.5: 1}, k={0: 3, 0.8: 8})}
    module = make_module(tiny, depth={0: 1, 0.5: 3}, terms=terms, seed=seed)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    return state(trainer, module), module


@pytest.mark.slow
def test_resumed_run_restores_its_schedules(tiny, features, tmp_path):
    expected, module = scheduled_run(tiny, features, tmp_path)
    assert (module.alignment.depth, module.loss.terms["top_k"].weight, module.loss.terms["top_k"].k) == (3, 1, 8)
    assert "val/top_k/step3" in expected
    resumed, _ = scheduled_run(tiny, features, tmp_path / "b", str(tmp_path / "checkpoints" / "step2.ckpt"), seed=5)
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []
    plain = torch.load(tmp_path / "checkpoints" / "step2.ckpt", weights_only=True)
    assert plain["global_step"] == 2


def test_the_comparison_can_fail(whole, tiny, tmp_path):
    accumulate, cache, _, expected = whole
    other = run(tiny, cache, tmp_path, accumulate, seed=5)
    assert any(not torch.equal(other[name], expected[name]) for name in expected if name.startswith("model."))


def test_the_frozen_target_is_in_no_checkpoint(whole, tiny):
    _, _, folder, _ = whole
    content = torch.load(folder / "checkpoints" / "step4.ckpt", weights_only=True)  # plain containers only
    sizes = {tuple(value.shape) for value in content["state_dict"].values()}
    assert tuple(tiny.head.lm_head.shape) not in sizes


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


class Stops(L.Callback):
    """Calls a function once at a step: at the start of its first batch, or in its validation."""

    def __init__(self, action, at=4, in_validation=False):
        self.action, self.at, self.in_validation, self.done = action, at, in_validation, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.in_validation and trainer.global_step == self.at and not self.done:
            self.done = True
            self.action()

    def on_validation_start(self, trainer, pl_module):
        if self.in_validation and trainer.global_step == self.at:
            self.action()


def stopped(tiny, cache, folder, *callbacks, every=2, accumulate=1):
    data = make_data(tiny, cache, batch_size=2)
    trainer = make_small_trainer(
        data, folder, [*callbacks, LastCheckpoint(folder / "checkpoints", every)], max_steps=NUM_STEPS, max_epochs=None,
        val_check_interval=5 * accumulate, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(make_module(tiny), datamodule=data)


def saved_step(folder):
    return torch.load(find_last_checkpoint(folder / "checkpoints"), weights_only=False)["global_step"]


class KilledError(BaseException):
    """Represents a kill: nothing catches it."""


def kill():
    raise KilledError


@pytest.mark.parametrize(("at", "in_validation", "step"), [(4, False, 4), (5, False, 5), (10, True, 8), (5, True, 4)])
def test_a_kill_leaves_the_checkpoint_before_it(tiny, features, tmp_path, at, in_validation, step):
    """The step of a validation is saved after it: if killed during the validation, the run validates again."""
    with pytest.raises(KilledError):
        stopped(tiny, features, tmp_path, Stops(kill, at, in_validation))
    assert saved_step(tmp_path) == step


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("accumulate", "at", "in_validation", "step"), [(1, 7, False, 8), (3, 7, False, 8), (3, 5, True, 5)]
)
def test_ctrl_c_leaves_a_checkpoint_of_the_very_step(tiny, features, tmp_path, at, in_validation, step, accumulate):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        stopped(tiny, features, tmp_path, Stops(interrupt, at, in_validation), every=100, accumulate=accumulate)
    assert saved_step(tmp_path) == step
    signal.signal(signal.SIGINT, before)  # Lightning then ignores it


def test_sigterm_saves_this_step_and_requests_a_restart(tiny, features, tmp_path):
    before, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        stopped(tiny, features, tmp_path, Stops(lambda: os.kill(os.getpid(), signal.SIGTERM), 7), every=100)
    signal.signal(signal.SIGINT, interrupt)  # ignored from then on: Ctrl-C does not change the exit code
    assert ended.value.code == REQUEUE_EXIT_CODE
    assert saved_step(tmp_path) == 8
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigint_handler_is_restored_after_a_run(tiny, features, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    stopped(tiny, features, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert saved_step(tmp_path) == NUM_STEPS - NUM_STEPS % 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt"]


def test_a_kill_while_saving_leaves_the_old_checkpoint(tiny, features, tmp_path, monkeypatch):
    original = L.Trainer.save_checkpoint

    def half(self, path, *rest, **options):
        if self.global_step == 6:
            path.write_bytes(b"half")
            raise KilledError
        original(self, path, *rest, **options)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", half)
    with pytest.raises(KilledError):
        stopped(tiny, features, tmp_path)
    assert saved_step(tmp_path) == 5


def flip_a_byte(content):
    content[len(content) // 2] ^= 1
    return content


DAMAGES = {"a byte": flip_a_byte, "cut": lambda content: content[:-1000], "empty": lambda content: b""}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_named_and_the_previous_one_used(whole, tmp_path, caplog, damage):
    _, _, folder, _ = whole
    for step, name in (("4", "last.ckpt.old"), ("5", "last.ckpt")):
        shutil.copy(folder / "checkpoints" / f"step{step}.ckpt", tmp_path / name)
    last = tmp_path / "last.ckpt"
    assert find_last_checkpoint(tmp_path) == str(last)
    last.write_bytes(damage(bytearray(last.read_bytes())))
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "last.ckpt.old")
    assert f"{last} is damaged" in caplog.text
    (tmp_path / "last.ckpt.old").unlink()
    assert find_last_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_full_disk_while_saving_is_one_sentence_and_keeps_the_old_checkpoint(
    tiny, features, tmp_path, monkeypatch, error
):
    original = L.Trainer.save_checkpoint

    def full(self, path, *rest, **options):
        original(self, path, *rest, **options)
        if self.global_step == 6:
            path.write_bytes(path.read_bytes()[:1000])
            raise error

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(ValueError, match=r"last\.ckpt\.new could not be written.*free disk space.*resumes from it"):
        stopped(tiny, features, tmp_path)
    assert saved_step(tmp_path) == 5
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
