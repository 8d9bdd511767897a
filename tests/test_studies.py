"""The studies of conf/hparams_search: each has the cells it should, every cell builds, and one runs to its end."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hass_lightning.cli import config_folder

CONF = Path(config_folder())
NUM_CELLS = {
    "paper_ablation": 12, "top_k": 21, "loss_variants": 12, "alignment_depth": 5, "step_weights": 6,
    "data_fraction": 8, "self_distillation": 6, "mask_leak": 4, "detach_vs_bptt": 12, "equal_compute": 12,
    "optuna": 30,
}  # fmt: skip


def study(name):
    """A study as it is written, nothing resolved."""
    written = OmegaConf.to_container(OmegaConf.load(CONF / "hparams_search" / f"{name}.yaml"), resolve=False)
    return SimpleNamespace(**{"sweeper": written["hydra"]["sweeper"], **written})


@cache
def base():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train")


def overrides(name):
    """The overrides of every cell, as Hydra's sweeper makes them."""
    params = [f"{key}={value}" for key, value in study(name).sweeper["params"].items()]
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
    return [list(job) for job in batch]


def test_every_study_is_listed_with_what_it_asks():
    names = {path.stem for path in (CONF / "hparams_search").glob("*.yaml")}
    assert names == set(NUM_CELLS)
    listed = (CONF.parent / "experiments" / "README.md").read_text()
    for name in names:
        assert f"hparams_search={name}" in listed, name
        assert study(name).study == f"{name}_${{budget}}"
        assert any("early_stopping" in str(default) for default in study(name).defaults)


@pytest.mark.parametrize("name", sorted(set(NUM_CELLS) - {"optuna"}))
def test_a_study_has_the_cells_it_should_and_each_can_be_built(name):
    cells = overrides(name)
    assert len(cells) == len({tuple(cell) for cell in cells}) == NUM_CELLS[name]
    for override in {each for cell in cells for each in cell}:
        key, value = override.split("=", 1)
        if "/" in key:
            assert (CONF / key / f"{value}.yaml").is_file(), override
            continue
        if key == "data.source.answers":  # of the study's own data
            assert "answers" in OmegaConf.load(CONF / "data" / "first_turns.yaml").source
            continue
        top = key.split(".")[0]
        config = OmegaConf.create({top: base()[top]})
        assert OmegaConf.select(config, key, default="missing") != "missing", override
        (parsed,) = OverridesParser.create().parse_overrides([override])
        OmegaConf.update(config, key, parsed.value(), merge=True)
        if key.startswith("model."):
            instantiate(config.model.alignment)
            instantiate(config.model.loss)


def test_the_search_of_optuna_is_over_keys_that_exist():
    config = study("optuna")
    assert config.sweeper["n_trials"] == NUM_CELLS["optuna"]
    for key in config.sweeper["params"]:
        assert OmegaConf.select(base(), key, default="missing") != "missing", key
    assert config.optimized_metric == "simulated_acceptance_length"


@pytest.mark.slow
def test_a_study_runs_to_its_end_and_extracts_its_features_once(run_command, cache_dir):
    small = ["experiment=smoke", "budget=custom", "trainer.max_epochs=1", "callbacks.decoding.max_new_tokens=8"]
    options = ["callbacks.decoding.num_prompts=2", "logger=csv", "hydra.launcher.n_jobs=2"]
    before = set((cache_dir / "features").glob("*"))
    done = run_command("train", "-m", "hparams_search=mask_leak", *small, *options)
    assert done.code == 0, done.err[-3000:]
    result = json.loads(done.out.splitlines()[-1])
    assert (result["num_completed"], result["num_failed"]) == (NUM_CELLS["mask_leak"], 0)
    folder = Path(result["sweep_dir"])
    assert folder.name == "mask_leak_custom"
    metrics = [json.loads(path.read_text()) for path in folder.glob("*/metrics.json")]
    assert len(metrics) == 4
    assert len({m["train_flops"] for m in metrics}) > 1
    assert len(set((cache_dir / "features").glob("*")) - before) <= 2
