"""Every key of conf/trainer/default.yaml and conf/train.yaml accepts a value, or refuses it and says how to fix it."""

import math
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hass_lightning.runs.config import config_folder
from hass_lightning.runs.names import MAX_NAME, run_label, run_name
from hass_lightning.training.from_config import make_trainer
from hass_lightning.training.setting_rules import RUN, TRAINER
from hass_lightning.training.settings import check_settings

CONF = Path(config_folder())
ODD = [
    None, True, False, 0, 1, -1, 2, -2, 0.0, 0.5, 1.0, 1.5, -0.5, math.inf, math.nan, 10**12, "", "auto", "nope", "0",
    "00:00:00:02", "2026", [], [0, 1], {}, {"seconds": 1}, {"_target_": "os.system"},
]  # fmt: skip


def leaves(node, prefix=""):
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{name}.")
        else:
            yield name


def keys_of(file, *left_out):
    content = OmegaConf.to_container(OmegaConf.load(CONF / file))
    return {key for key in leaves(content) if not key.startswith(left_out)}


@pytest.fixture(scope="module")
def config():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", ["experiment=smoke", "paths.run_dir=run", "name=smoke", "logger=csv"])
    OmegaConf.set_struct(composed, False)
    return composed


def test_every_key_has_a_rule():
    assert keys_of("trainer/default.yaml", "_target_") == set(TRAINER)
    assert keys_of("train.yaml", "defaults", "hydra") == set(RUN)


@pytest.mark.parametrize("key", [*(f"trainer.{name}" for name in TRAINER), *RUN])
def test_a_value_is_accepted_or_refused_by_name(config, key):
    accepted = 0
    for value in ODD:
        changed = config.copy()
        OmegaConf.update(
            changed, key, OmegaConf.create(value) if isinstance(value, dict | list) else value, merge=False
        )
        try:
            check_settings(changed)
            accepted += 1
        except ValueError as error:
            sentence, last = str(error), key.rpartition(".")[2]
            assert re.search(rf"\b{last}=", sentence), (value, sentence)
            assert len(sentence) > len(f"{key}={value}") + 15, sentence  # how to fix it
    assert accepted < len(ODD), "nothing is refused"


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    from hass_lightning.data.datamodule import FeatureDataModule
    from hass_lightning.types import Conversation, Message

    class Corpus:
        def load(self, target):
            return [
                Conversation(str(n), (Message("user", f"the cat {n}"), Message("assistant", "sat on a mat")))
                for n in range(30)
            ]

    folder = tmp_path_factory.mktemp("features")
    return FeatureDataModule(Corpus(), tiny, num_validation=6, batch_size=4, cache_dir=str(folder))


@pytest.mark.parametrize("name", sorted(set(TRAINER) - {"default_root_dir"}))
def test_accepted_values_are_accepted_by_the_trainer(config, data, tmp_path, name):
    """No value passes the rules that Lightning would then refuse with its own message."""
    for value in ODD:
        changed = config.copy()
        changed.trainer.default_root_dir = str(tmp_path)
        node = OmegaConf.create(value) if isinstance(value, dict | list) else value
        OmegaConf.update(changed, f"trainer.{name}", node, merge=False)
        try:
            check_settings(changed)
        except ValueError:
            continue
        if name == "strategy" and isinstance(value, dict):
            continue  # any custom class
        if changed.trainer.max_epochs in (None, -1) and changed.trainer.max_steps in (None, -1):
            with pytest.raises(ValueError, match=r"trainer\.max_epochs, trainer\.max_steps"):
                make_trainer(changed, data, [], [])
            continue
        trainer = make_trainer(changed, data, [], [])
        assert trainer.max_steps >= 1 and trainer.val_check_batch is None


MEANINGS = {  # 6 batches per epoch; two epochs
    "check_val_every_n_epoch=2": (12, 12), "check_val_every_n_epoch=1": (12, 6), "limit_train_batches=1": (2, 1),
    "limit_train_batches=0.5": (6, 3), "val_check_interval=1.5": (12, 9), "val_check_interval=1": (12, 1),
    "max_epochs=0.5": (3, 3), "max_steps=5": (5, 5), "check_val_every_n_epoch=null": (12, 6),
}  # fmt: skip


@pytest.mark.parametrize("override", MEANINGS)
def test_epochs_and_batches_give_the_expected_numbers_of_steps(config, data, tmp_path, override):
    key, value = override.split("=")
    changed = config.copy()
    changed.trainer.default_root_dir = str(tmp_path)
    changed.trainer[key] = OmegaConf.create(f"x: {value}").x
    check_settings(changed)
    trainer = make_trainer(changed, data, [], [])
    assert (trainer.max_steps, trainer.val_check_interval) == MEANINGS[override]


TOGETHER = {
    ("trainer.check_val_every_n_epoch=2", "trainer.val_check_interval=0.5"): "check_val_every_n_epoch=2",
    ("trainer.max_time=00:01:00:00", "compute.seconds=5"): "compute.seconds=5",
    ("optimized_metric=val/acceptance_length",): "optimized_metric=val/acceptance_length",
    ("optimized_metric=nope",): "optimized_metric=nope",
    ("trainer=gpu",): "trainer.accelerator=gpu",
    ("trainer.devices=[0,1]",): "trainer.devices",
    ("init_from=nowhere",): "init_from=nowhere",
    ("data.batch_size=four",): "data.batch_size=four",
    ("seed=abc",): "seed=abc",
    ("trainer.max_time=3600",): "trainer.max_time=3600",
}


@pytest.mark.parametrize("overrides", TOGETHER, ids=" ".join)
def test_impossible_settings_are_one_sentence_without_a_traceback(train, overrides):
    done = train(*overrides)
    assert done.code == 1 and not done.traced
    assert TOGETHER[overrides] in done.error


@pytest.mark.parametrize("head", ["smollm2_135m_eagle", "smollm2_135m_hass"])
def test_run_can_start_from_a_packaged_head(config, head):
    changed = config.copy()
    changed.init_from = f"package://heads/{head}"
    check_settings(changed)


# --- names -----------------------------------------------------------------------------------------------------------


def test_run_name_may_be_a_number_or_empty():
    assert run_name("experiment=smoke,name=2026").startswith("2026")
    assert run_name("experiment=smoke,name=null") == run_name("experiment=smoke")
    assert run_label(2026, "seed=1") == "2026 seed=1"
    assert run_label(None, "") == "run"


def test_long_name_is_shortened_and_remains_unique():
    from hass_lightning.runs.ledger import sweep_name

    first, second = (run_name(f"name={'s' * 300}{end}") for end in "ab")
    assert first != second and len(first.encode()) <= MAX_NAME + 9
    assert len(sweep_name("ü" * 300, "train", [])) <= MAX_NAME
    assert run_name(f"name={'s' * 100}") == "s" * 100


@pytest.mark.parametrize("name", ["2026", "null"])
def test_a_run_with_such_a_name_trains(train, name):
    done = train(f"name={name}", "trainer.max_steps=1")
    assert done.code == 0, done.err


# --- W&B -------------------------------------------------------------------------------------------------------------


def test_tags_are_truncated_to_the_limit_of_wandb():
    import wandb

    from hass_lightning.training.wandb_logging import short_tags

    tags = short_tags(["tiny", "", None, "depth " + "{0:1,0.1:2}" * 20])
    assert tags[0] == "tiny" and len(tags) == 2 and len(tags[1]) == 64
    assert wandb.Settings(run_tags=tuple(tags)).run_tags == tuple(tags)


@pytest.mark.parametrize("variable", [("WANDB_DISABLED", "true"), ("WANDB_MODE", "disabled")], ids=str)
def test_wandb_can_be_disabled_by_the_environment(train, monkeypatch, variable):
    monkeypatch.setenv(*variable)
    done = train("logger=wandb", "trainer.max_steps=1")
    assert done.code == 0, done.err
    assert "W&B is disabled" in done.out
    assert not (Path(done.result["run_dir"]) / "wandb").exists()


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_interpolated_hydra_override_is_resolved_by_each_job():
    from hydra_plugins.hass_lightning_launcher._process import job_command

    words = ["+hydra.job.env_set.MY_SEED=${seed}", "hydra.sweep.subdir=${hydra.job.num}"]
    node = {
        "job": {"config_name": "train", "num": "???"},
        "runtime": {"config_sources": []},
        "overrides": {"hydra": words},
    }
    multirun = OmegaConf.create({"seed": 0, "hydra": node})
    job = OmegaConf.create({"seed": 5})
    command = job_command(multirun, job, ["-m", "x"], ["seed=5"], Path("folder"), 0)
    assert "+hydra.job.env_set.MY_SEED='5'" in command
    assert not [word for word in command if "subdir" in word]


def test_a_sweeps_name_does_not_resolve_its_overrides():
    from hydra_plugins.hass_lightning_launcher.launcher import _cell_folder, _sweep_name

    overrides = OmegaConf.create({"o": ["hydra.sweep.subdir=${missing}", "a=${seed}"], "seed": 3})
    assert len(_sweep_name(None, "train", overrides.o, overrides.o)) == 12
    assert _cell_folder(overrides.o) == _cell_folder(["hydra.sweep.subdir=${missing}", "a=${seed}"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [("a=range(1,6)", [1, 2, 3, 4, 5]), ("a=range(0,10,4)", [0, 4, 8]), ("a=range(3)", [0, 1, 2]),
     ("a=range(0.0,1.0,0.25)", [0.0, 0.25, 0.5, 0.75])],
)  # fmt: skip
def test_optuna_excludes_the_end_of_a_range(override, expected):
    implementation = pytest.importorskip("hydra_plugins.hydra_optuna_sweeper._impl")
    from hydra_plugins.hass_lightning_launcher.optuna import half_open

    space, _ = implementation.create_params_from_overrides([half_open(override)])
    values = space["a"]
    step = getattr(values, "step", None) or values.q
    drawn = [values.low + n * step for n in range(100)]
    assert [value for value in drawn if value <= values.high + 1e-9] == pytest.approx(expected)
    with pytest.raises(ValueError, match="empty range"):
        half_open("a=range(3,3)")
    assert half_open("a=choice(1,2)") == "a=choice(1,2)" and half_open("a=1") == "a=1"


def test_search_without_a_study_maximizes_and_needs_a_metric(config):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    from hydra_plugins.hass_lightning_launcher.optuna import adopt, check_metric

    with initialize_config_dir(str(CONF), version_base="1.3"):
        for words, direction in ([], "maximize"), (["hydra.sweeper.direction=minimize"], "minimize"):
            composed = compose("train", ["hydra/sweeper=optuna", *words], return_hydra_config=True)
            adopt(composed)
            assert composed.hydra.sweeper.direction == direction
            assert composed.hydra.sweeper._target_.endswith("HalfOpenOptunaSweeper")
    check_metric(config)
    blind = config.copy()
    blind.callbacks.decoding = None
    with pytest.raises(ValueError, match=r"optimized_metric=decode/acceptance_length.*callbacks\.decoding"):
        check_metric(blind)
