"""Every file of conf/trainer builds; DeepSpeed and DDP train on two CPU processes, save and resume."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer

from hass_lightning.runs.config import config_folder
from hass_lightning.training.strategy import CPUDeepSpeedStrategy, check_trainer_config

OUR_KEYS = {"rendezvous_timeout"}  # keys of conf/trainer that the Trainer does not have
TRAINERS = sorted(path.stem for path in Path(config_folder(), "trainer").glob("*.yaml"))
TOY = Path(__file__).with_name("strategy_toy.py")


def trainer_config(name, *overrides):
    with initialize_config_dir(config_folder(), version_base="1.3"):
        return compose(overrides=["+paths.run_dir=runs", f"+trainer={name}", *overrides]).trainer


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_has_known_keys_and_passes_its_own_check(name):
    config = trainer_config(name)
    check_trainer_config(config)
    assert config._target_ == "lightning.pytorch.Trainer"
    known = set(inspect.signature(Trainer.__init__).parameters) | OUR_KEYS
    assert set(config) - {"_target_"} <= known


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_builds_on_the_cpu(name, tmp_path):
    config = trainer_config(name, "trainer.accelerator=cpu", "trainer.precision=32-true")
    config = {key: value for key, value in config.items() if key not in OUR_KEYS}
    trainer = instantiate(config, logger=False, default_root_dir=str(tmp_path))
    assert trainer.world_size == config["devices"]
    if name.startswith("deepspeed"):
        assert isinstance(trainer.strategy, CPUDeepSpeedStrategy)
        assert trainer.strategy.config["zero_optimization"]["stage"] == int(name[-1])
        assert trainer.strategy.exclude_frozen_parameters
        json.dumps(trainer.strategy.config)  # plain containers only


@pytest.mark.parametrize("name", [name for name in TRAINERS if name.startswith("deepspeed")])
def test_deepspeed_refuses_clipping_by_value(name):
    with pytest.raises(ValueError, match=r"trainer\.gradient_clip_algorithm=value.*norm only"):
        check_trainer_config(trainer_config(name, "trainer.gradient_clip_algorithm=value"))
    check_trainer_config(
        trainer_config(name, "trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_val=null")
    )


def test_deepspeed_named_by_a_string_is_checked_too():
    with pytest.raises(ValueError, match="norm only"):
        check_trainer_config(
            {"strategy": "deepspeed_stage_2", "gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
        )


@pytest.mark.parametrize("name", ["cpu", "ddp", "ddp_cpu"])
def test_others_clip_by_value(name):
    check_trainer_config(trainer_config(name, "trainer.gradient_clip_algorithm=value"))


@pytest.mark.parametrize(
    "name, override, message",
    [
        ("deepspeed_zero2", "trainer.strategy.offload_parameters=true", "needs ZeRO stage 3"),
        ("deepspeed_zero0", "trainer.strategy.offload_optimizer=true", "needs ZeRO stage 1, 2 or 3"),
    ],
)
def test_offload_needs_its_stage(name, override, message):
    with pytest.raises(ValueError, match=message):
        check_trainer_config(trainer_config(name, override))


def train(trainer, folder, max_epochs, checkpoint="", *overrides):
    env = {key: value for key, value in os.environ.items() if "RANK" not in key and key != "WORLD_SIZE"}
    command = [sys.executable, str(TOY), trainer, str(folder), str(max_epochs), str(checkpoint), *overrides]
    done = subprocess.run(
        command,
        check=False,
        env={**env, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def weights(folder, trainer):
    checkpoint = folder / "last.ckpt"
    if trainer.startswith("deepspeed"):
        file = folder / "consolidated.pt"
        from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

        convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint), str(file))
        checkpoint = file
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_cpu", "deepspeed_zero2", "deepspeed_zero3"])
def test_resumed_equals_uninterrupted(trainer, tmp_path):
    folders = {name: tmp_path / name for name in ("straight", "first", "second")}
    for folder in folders.values():
        folder.mkdir()
    straight = train(trainer, folders["straight"], 4)
    train(trainer, folders["first"], 2)
    resumed = train(trainer, folders["second"], 4, folders["first"] / "last.ckpt")
    assert straight["world_size"] == 2
    assert resumed == straight
    expected, found = weights(folders["straight"], trainer), weights(folders["second"], trainer)
    assert {key for key in found if key.startswith("trained.")} == {
        key for key in expected if key.startswith("trained")
    }
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    if trainer.startswith("deepspeed"):
        assert not any(key.startswith("frozen.") for key in found)


@pytest.mark.slow
def test_zero_stages_equal_ddp_with_accumulation_and_clipping(tmp_path):
    names = ["ddp_cpu", "deepspeed_zero0", "deepspeed_zero2"]
    results = {}
    for name in names:
        (tmp_path / name).mkdir()
        results[name] = train(name, tmp_path / name, 2)
    for name in names[1:]:
        assert results[name]["loss"] == pytest.approx(results["ddp_cpu"]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer, overrides",
    [
        ("deepspeed_zero2", ["trainer.strategy.offload_optimizer=true"]),
        ("deepspeed_zero3", ["trainer.strategy.offload_optimizer=true", "trainer.strategy.offload_parameters=true"]),
    ],
)
def test_offload_runs_with_torch_adamw(trainer, overrides, tmp_path):
    (tmp_path / "plain").mkdir()
    plain = train(trainer, tmp_path / "plain", 1)
    offloaded = train(trainer, tmp_path, 1, "", *overrides)
    assert offloaded["loss"] == pytest.approx(plain["loss"], rel=1e-5)
