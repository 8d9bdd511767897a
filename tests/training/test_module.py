"""HassModule: the mean over all loss positions, logged values, errors, and that it learns."""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from training_toys import make_data, make_module, make_small_trainer

from hass_lightning.data.batches import FeatureDataset, collate
from hass_lightning.losses import FeatureRegression, LossTerm
from hass_lightning.training.last_checkpoint import LastCheckpoint
from hass_lightning.training.module import Schedule


@pytest.fixture
def batches(data):
    """Return two batches of different sizes, and both in one."""
    dataset = FeatureDataset(data.stores()[0])
    rows = [dataset[index] for index in range(6)]
    return collate(rows[:2]), collate(rows[2:]), collate(rows)


def step(module, batch, world_size=1, global_rows=None):
    """Run one training step with a mock trainer; return the gradient and the logged values."""
    logged = {}
    rows = int(batch[0].loss_mask[:, :-1].sum()) if global_rows is None else global_rows
    module._trainer = SimpleNamespace(
        world_size=world_size, accumulate_grad_batches=1, global_step=7,
        datamodule=SimpleNamespace(rows_of_step=lambda step: rows),
    )  # fmt: skip
    module.log = lambda name, value, **_: logged.update({name: value})
    module.log_dict = lambda values, **_: logged.update(values)
    module.zero_grad()
    module.training_step(batch, 0).backward()
    return [p.grad.clone() for p in module.draft.parameters()], logged


def test_two_processes_have_the_gradient_of_one_with_both_batches(tiny, batches):
    module = make_module(tiny)
    first, second, both = batches
    rows = [int(batch.loss_mask.sum()) for batch, _ in (first, second)]
    assert rows[0] != rows[1]
    whole, _ = step(module, both)
    one, _ = step(module, first, 2, sum(rows))
    other, _ = step(module, second, 2, sum(rows))
    for a, b, c in zip(one, other, whole, strict=True):
        torch.testing.assert_close((a + b) / 2, c, atol=1e-6, rtol=1e-4)


def test_bucket_has_the_loss_and_gradient_of_its_single_sequences(tiny, data):
    """Padding, other sequences and chunks have no effect: no diagonal and no causal column leaves its sequence."""
    dataset = FeatureDataset(data.stores()[0])
    rows = [dataset[index] for index in range(5)]
    module = make_module(tiny)
    together = module.aligned_loss(*collate(rows), normalizer=1.0).total
    alone = sum(module.aligned_loss(*collate([row]), normalizer=1.0).total for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    parameters = list(module.draft.parameters())
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (together, alone)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.slow
def test_a_compiled_head_has_the_same_gradient_and_the_same_files(tiny, batches):
    module, compiled = make_module(tiny), make_module(tiny, compile=True)
    for batch in batches:  # different numbers of loss positions
        for a, b in zip(step(module, batch)[0], step(compiled, batch)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert compiled.draft.layer.mlp._compiled_call_impl is not None
    assert list(compiled.draft.state_dict()) == list(module.draft.state_dict())


def test_accumulated_batches_have_the_gradient_of_one_large_batch(tiny, data_folder, tmp_path):
    """The mean is over all loss positions of the step, not a mean of means. SGD shows the scale; Adam would hide it."""
    data = make_data(tiny, data_folder, batch_size=2)
    module = make_module(tiny, schedule=Schedule(warmup_fraction=0, decay="constant"))
    module.make_optimizer = partial(torch.optim.SGD, lr=1.0)
    before = {name: value.clone() for name, value in module.draft.named_parameters()}
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": None}
    trainer = make_small_trainer(data, tmp_path, max_steps=1, max_epochs=None, **options)
    trainer.fit(module, datamodule=data)
    dataset, batches = FeatureDataset(data.stores()[0]), [data._order.batch(number)[1] for number in range(3)]
    assert len({sum(int(dataset[index]["loss_mask"].sum()) for index in batch) for batch in batches}) > 1
    fresh = make_module(tiny)
    fresh.aligned_loss(*collate([dataset[index] for batch in batches for index in batch])).total.backward()
    for name, value in fresh.draft.named_parameters():
        step = before[name] - dict(module.draft.named_parameters())[name]
        torch.testing.assert_close(step, value.grad, rtol=1e-3, atol=1e-6)


def test_logged_loss_is_the_weighted_mean_over_loss_positions_summed_over_steps(tiny, batches):
    module = make_module(tiny, depth=2)
    _, logged = step(module, batches[2])
    terms = {"feature": 1.0, "soft_ce": 0.1, "top_k": 1.0}
    expected = sum(w * logged[f"train/{name}/step{j}"] for name, w in terms.items() for j in (1, 2))
    torch.testing.assert_close(logged["train/loss"], expected.float(), rtol=1e-5, atol=1e-6)
    assert 0 <= logged["train/accuracy/step1"] <= 1
    assert logged["train/dropped_rows"] == 0
    assert module.example_tokens == int(batches[2][0].loss_mask.sum())


def test_positions_dropped_by_pruning_are_excluded_and_counted(tiny, batches):
    batch, _ = batches[2]
    wanted = batch.target_ids[:, 1:][batch.loss_mask[:, :-1]]
    kept = wanted.unique()[::2]
    module = make_module(tiny, token_ids=kept)
    gradients, logged = step(module, batches[2])
    dropped = sum(int(token) not in kept.tolist() for token in wanted)
    assert 0 < dropped < len(wanted)
    assert float(logged["train/dropped_rows"]) == pytest.approx(dropped / len(wanted))
    assert module.example_tokens == len(wanted) - dropped
    # the same positions removed from the loss mask by hand give the same step
    by_hand = collate([FeatureDataset.__getitem__(SimpleNamespace(store=s, noise=0), 0) for s in [_Row(batch, kept)]])
    assert int(by_hand[0].loss_mask.sum()) <= len(wanted)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


class _Row:
    """The first sequence of a batch without the loss positions whose target argmax is not in the draft vocabulary."""

    ids = ("x",)

    def __init__(self, batch, kept):
        self.batch, self.kept = batch, kept

    def read(self, index):
        length = int(self.batch.lengths[0])
        mask = self.batch.loss_mask[0, :length].clone()
        mask[:-1] &= torch.isin(self.batch.target_ids[0, 1:length], self.kept)
        names = ("input_ids", "target_ids", "features")
        return {name: getattr(self.batch, name)[0, :length] for name in names} | {"loss_mask": mask}


def test_batch_without_loss_positions_gives_a_zero_step(tiny, batches):
    batch, inputs = batches[0]
    batch.loss_mask[:] = False
    gradients, logged = step(make_module(tiny), (batch, inputs))
    assert float(logged["train/loss"]) == 0
    assert not any(gradient.any() for gradient in gradients)


def test_training_reduces_the_loss(tiny, data, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    module = make_module(tiny)
    trainer = make_small_trainer(data, tmp_path, loggers=[logger], max_steps=60, max_epochs=None, val_check_interval=30)
    before = validate(tiny, data, tmp_path)
    trainer.fit(module, datamodule=data)
    losses = column(tmp_path, "train/loss")
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    after = trainer.callback_metrics
    assert after["val/loss"] < 0.8 * before["val/loss"]
    # accuracy of the target's argmax; the text was not generated by the target
    accuracy = column(tmp_path, "train/accuracy/step1")
    assert sum(accuracy[-5:]) > sum(accuracy[:5]) + 0.5
    survival = [float(after[f"val/survival/step{j}"]) for j in range(1, 6)]
    assert survival == sorted(survival, reverse=True)
    assert float(after["val/acceptance_length"]) == pytest.approx(1 + sum(survival), abs=1e-5)
    rates = column(tmp_path, "lr-AdamW") or [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates[-1] < 3e-5  # the schedule ends where the run ends


def validate(tiny, data, folder):
    trainer = make_small_trainer(data, folder, max_steps=1, max_epochs=None)
    return trainer.validate(make_module(tiny), datamodule=data, verbose=False)[0]


def column(folder, name):
    import csv

    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_validation_is_the_same_for_any_batch_size(tiny, data_folder, tmp_path):
    results = [validate(tiny, make_data(tiny, data_folder, batch_size=size), tmp_path) for size in (1, 4)]
    assert set(results[0]) == set(results[1])
    for name, value in results[0].items():
        assert value == pytest.approx(results[1][name], rel=1e-4, abs=1e-6), name


def test_validation_unrolls_to_one_depth_whatever_the_training_depth(tiny, data, tmp_path):
    trainer = make_small_trainer(data, tmp_path, max_steps=1, max_epochs=None)
    results = [trainer.validate(make_module(tiny, depth=d), datamodule=data, verbose=False)[0] for d in (1, 3)]
    shared = [name for name in results[0] if name.startswith(("val/accuracy", "val/survival", "val/acceptance"))]
    assert len(shared) == 11
    assert {name: results[0][name] for name in shared} == {name: results[1][name] for name in shared}


class Breaks(LossTerm):
    """Returns NaN from step `at` on, in alignment step 2."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, rows):
        self.calls += rows.step == 2
        value = rows.draft_features.square().mean(-1)
        return value * float("nan") if rows.step == 2 and self.calls > self.at else value


def test_nan_loss_stops_with_step_and_term_and_keeps_the_checkpoint(tiny, data, tmp_path):
    module = make_module(tiny, terms={"feature": FeatureRegression(), "mine": Breaks(7)})
    saver = LastCheckpoint(tmp_path, every_n_train_steps=2)
    trainer = make_small_trainer(data, tmp_path, [saver], max_steps=20, max_epochs=None, val_check_interval=100)
    with pytest.raises(ValueError, match=r"not finite at step 7 \(terms: mine/step2\).*model\.optimizer\.lr"):
        trainer.fit(module, datamodule=data)
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert state["global_step"] == 6
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_nan_feature_is_detected(tiny, data, tmp_path, monkeypatch):
    original = FeatureDataset.__getitem__

    def planted(self, key):
        row = original(self, key)
        if isinstance(key, tuple) and key[0] == 1:  # the second epoch
            row["inputs"] = row["inputs"] * float("inf")
        return row

    monkeypatch.setattr(FeatureDataset, "__getitem__", planted)
    trainer = make_small_trainer(data, tmp_path, max_steps=20, max_epochs=None, val_check_interval=100)
    with pytest.raises(ValueError, match=r"not finite at step 5 \(terms: feature/step1"):
        trainer.fit(make_module(tiny), datamodule=data)


def test_online_and_cached_features_give_the_same_loss_curve(tiny, data_folder, tmp_path):
    curves = []
    for features in ("cached", "online"):
        data = make_data(tiny, data_folder, features=features, noise=0.1)
        logger = CSVLogger(tmp_path / features, name="", version="")
        trainer = make_small_trainer(data, tmp_path, loggers=[logger], max_steps=8, max_epochs=None)
        trainer.fit(make_module(tiny), datamodule=data)
        curves.append(column(tmp_path / features, "train/loss"))
    assert len(curves[0]) == 8
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_early_stopping_stops(tiny, data, tmp_path):
    stopper = EarlyStopping("val/acceptance_length", mode="max", patience=2, min_delta=100.0)
    trainer = make_small_trainer(data, tmp_path, [stopper], max_steps=40, max_epochs=None, val_check_interval=3)
    trainer.fit(make_module(tiny), datamodule=data)
    assert trainer.global_step == 9


class Seen(L.Callback):
    """The ids of every batch."""

    def __init__(self):
        self.ids = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ids.append(tuple(sorted(batch[0].ids)))


def test_accumulated_batches_make_one_step(tiny, data, tmp_path):
    seen, plain = Seen(), Seen()
    options = {"val_check_interval": 100, "gradient_clip_val": None}
    trainer = make_small_trainer(
        data, tmp_path, [seen], max_steps=4, max_epochs=None, accumulate_grad_batches=3, **options
    )
    trainer.fit(make_module(tiny), datamodule=data)
    assert (trainer.global_step, len(seen.ids)) == (4, 12)
    trainer = make_small_trainer(data, tmp_path, [plain], max_steps=12, max_epochs=None, **options)
    trainer.fit(make_module(tiny), datamodule=data)
    assert seen.ids == plain.ids


# --- schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_warm_up_then_decay(decay):
    schedule = Schedule(warmup_fraction=0.1, decay=decay, final_fraction=0.2)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(1.0 if decay == "constant" else 0.2)
    assert factors[55] == pytest.approx(1.0 if decay == "constant" else 0.6)
    assert all(a >= b - 1e-12 for a, b in pairwise(factors[10:]))
    assert schedule.factor(1000, 100) == factors[100]


def test_a_schedule_of_one_step():
    assert Schedule().factor(0, 1) == 1.0
    assert Schedule(warmup_fraction=0).factor(0, 1) == 1.0
    assert Schedule(warmup_fraction=0, warmup_start="zero").factor(0, 1) == 1.0


@pytest.mark.parametrize(
    "option",
    [{"decay": "exponential"}, {"warmup_fraction": 1.0}, {"warmup_fraction": -0.1}, {"warmup_start": "nought"}],
)
def test_invalid_schedule_names_the_key_of_the_model(option):
    with pytest.raises(ValueError, match=f"model.schedule.{next(iter(option))}"):
        Schedule(**option)
