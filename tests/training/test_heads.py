"""Several heads in one pass: each is that of its separate run, to the last bit."""

import json
import shutil
from functools import partial

import pytest
import torch
from training_toys import make_data, make_module, make_small_trainer

from hass_lightning.draft import load_draft
from hass_lightning.losses import DraftLoss, FeatureRegression, SoftCrossEntropy, TopK, compute_together
from hass_lightning.training.heads import HeadsModule
from hass_lightning.training.last_checkpoint import LastCheckpoint
from hass_lightning.training.module import HassModule, Schedule


def terms(**weights):
    every = {"feature": FeatureRegression, "soft_ce": SoftCrossEntropy, "top_k": TopK}
    return {name: every[name](weight) for name, weight in weights.items()}


def cells(target, **options):
    """Heads that differ in depth, loss, learning rate, decay and schedule."""
    eagle = make_module(target, depth=1, terms=terms(feature=1.0, soft_ce=0.1), **options)
    hass = make_module(target, depth=3, lr=1e-3, seed=1, **options)
    hass.make_optimizer = partial(torch.optim.AdamW, lr=1e-3, betas=(0.8, 0.99), weight_decay=0.1)
    top_k = make_module(target, depth=2, terms=terms(top_k=1.0), seed=2, **options)
    top_k.schedule = Schedule(warmup_fraction=0.3, decay="linear")
    return {"eagle": eagle, "hass": hass, "top_k": top_k}


def weights(module):
    return {name: value.clone() for name, value in module.draft.state_dict().items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equal_to_separate_runs_to_the_last_bit(tiny, tmp_path, accumulate):
    settings = {"max_steps": 6, "max_epochs": None, "gradient_clip_val": 0.05, "accumulate_grad_batches": accumulate}
    token_ids = torch.arange(0, tiny.head.vocab_size, 2)
    separate, metrics = {}, {}
    for name, module in cells(tiny, token_ids=token_ids).items():
        data = make_data(tiny, tmp_path, noise=0.1)
        trainer = make_small_trainer(data, tmp_path / name, **settings)
        trainer.fit(module, datamodule=data)
        separate[name], metrics[name] = weights(module), dict(trainer.callback_metrics)
    together = HeadsModule(cells(tiny, token_ids=token_ids))
    data = make_data(tiny, tmp_path, noise=0.1)
    trainer = make_small_trainer(data, tmp_path / "together", **settings)
    trainer.fit(together, datamodule=data)
    assert trainer.global_step == 6
    for name, module in together.modules_by_name.items():
        for key, value in weights(module).items():
            assert torch.equal(value, separate[name][key]), (name, key)
        for key, value in metrics[name].items():
            if key.startswith("val/"):
                assert torch.equal(trainer.callback_metrics[f"{name}/{key}"], value), (name, key)


class KeepsAll(LastCheckpoint):
    """Keeps a copy of each last.ckpt, as a kill at that moment would leave it."""

    def _save(self, trainer):
        super()._save(trainer)
        shutil.copy(self.folder / "last.ckpt", self.folder / f"step{trainer.global_step}.ckpt")


def test_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path):
    found = []
    for checkpoint in (None, str(tmp_path / "step3.ckpt")):
        heads, data = HeadsModule(cells(tiny)), make_data(tiny, tmp_path, noise=0.1)
        trainer = make_small_trainer(
            data, tmp_path, [KeepsAll(tmp_path, every_n_train_steps=1)], max_steps=8, max_epochs=None
        )
        trainer.fit(heads, datamodule=data, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
        assert trainer.global_step == 8
        found.append({name: weights(module) for name, module in heads.modules_by_name.items()})
    whole, resumed = found
    different = [(name, key) for name in whole for key in whole[name]
                 if not torch.equal(whole[name][key], resumed[name][key])]  # fmt: skip
    assert not different


def test_target_logits_are_computed_once(tiny, tmp_path):
    modules = cells(tiny)
    heads = HeadsModule(modules)
    batch, _ = next(iter(_batches(tiny, tmp_path)))
    calls = []
    vocabulary = heads.modules_by_name["eagle"].vocabulary
    compute = vocabulary.logits
    vocabulary.logits = lambda rows, decoding=True: (calls.append(rows.requires_grad), compute(rows, decoding))[1]
    prepared = modules["eagle"].prepare(batch)
    compute_together([module.start_loss(prepared, 1.0) for module in modules.values()])
    depths = sum(module.alignment.depth for module in modules.values())
    assert calls.count(False) == 1 and calls.count(True) == depths


def _batches(target, folder):
    data = make_data(target, folder)
    trainer = make_small_trainer(data, folder, max_steps=1)
    data.trainer = trainer
    return data.train_dataloader()


def test_heads_that_do_not_fit_together_are_refused(tiny, tmp_path):
    first, second = make_module(tiny), make_module(tiny, token_ids=torch.arange(50))
    with pytest.raises(ValueError, match=r"heads\.b has another target or model\.draft\.vocab_size than a"):
        HeadsModule({"a": first, "b": second})
    with pytest.raises(ValueError, match="no head"):
        HeadsModule({})
    other = make_module(tiny)
    other.loss = DraftLoss({"top_k": TopK()}, temperature=2.0)
    batch, _ = next(iter(_batches(tiny, tmp_path)))
    HeadsModule({"a": first, "b": other})
    with pytest.raises(ValueError, match=r"model\.loss\.temperature"):
        compute_together([each.start_loss(first.prepare(batch), 1.0) for each in (first, other)])


def test_modules_are_children_that_know_the_trainer(tiny):
    heads = HeadsModule({"a": make_module(tiny)})
    assert all(isinstance(child, HassModule) for child in heads.children())


def test_command_trains_and_measures_each_head_as_its_own_run_does(call_command):
    common = ["experiment=smoke", "logger=csv", "trainer.max_steps=4", "callbacks.decoding.num_prompts=2",
              "callbacks.decoding.num_checked=0", "callbacks.decoding.max_new_tokens=8"]  # fmt: skip
    heads = "+heads={eagle: {loss: eagle, alignment: {depth: 1}}, hass: {optimizer: {lr: 2e-3}}}"
    done = call_command("train", *common, heads, "name=together")
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert set(result["heads"]) == {"eagle", "hass"}
    alone = ["model/loss=eagle", "model.alignment.depth=1"]
    done = call_command("train", *common, *alone, "name=alone")
    assert done.code == 0, done.err
    separate = json.loads(done.out.splitlines()[-1])
    one, other = load_draft(f"{result['run_dir']}/eagle"), load_draft(separate["run_dir"])
    weights = one.draft.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in other.draft.state_dict().items())
    assert one.notes["alignment_depth"] == 1 and set(one.notes["loss_terms"]) == set(other.notes["loss_terms"])
    assert result["heads"]["eagle"]["acceptance_length"] == separate["acceptance_length"]
    again = call_command("train", *common, heads, "name=together")  # finished
    assert json.loads(again.out.splitlines()[-1]) == result


def test_heads_of_different_kinds_share_the_features_with_more_layers(call_command):
    common = ["experiment=smoke", "logger=csv", "trainer.max_steps=4", "model.draft.vocab_size=64",
              "callbacks.decoding=null"]  # fmt: skip
    deep = "alignment: {depth: 2, gradient: bptt}"
    heads = f"+heads={{e3: {{draft: eagle3, draft.start: target, loss: eagle3, {deep}}}, hass: {{}}}}"
    done = call_command("train", *common, heads, "name=together")
    assert done.code == 0, done.err
    together = json.loads(done.out.splitlines()[-1])["run_dir"]
    alone = {
        "e3": ["model/draft=eagle3", "model/loss=eagle3", "model.draft.start=target", "model.alignment.depth=2",
               "model.alignment.gradient=bptt"],
        "hass": [],
    }  # fmt: skip
    for name, words in alone.items():
        done = call_command("train", *common, *words, f"name={name}")
        assert done.code == 0, done.err
        separate = load_draft(json.loads(done.out.splitlines()[-1])["run_dir"])
        found = load_draft(f"{together}/{name}")
        assert len(found.token_ids) == len(separate.token_ids) == 64
        weights = found.draft.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in separate.draft.state_dict().items()), name


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("{a: {alignment: {dept: 1}}}", "heads.a.alignment"),
        ("{a: {loss: egle}}", "egle"),
        ("{a b: {}}", "letters, digits"),
    ],
)
def test_mistakes_are_named(call_command, heads, message):
    done = call_command("train", "experiment=smoke", "logger=csv", f"+heads={heads}")
    assert done.code != 0 and message in done.err + done.out
