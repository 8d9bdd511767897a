"""Module names, configs and run folders from before commands/, runs/ and target_model/ still work.

tests/old_run was written by `hass-train experiment=smoke` at commit c6bf54c, without checkpoints and report, and with
the records of two questions only.
"""

import importlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from hass_lightning.draft import load_draft
from hass_lightning.runs.config import config_folder
from hass_lightning.runs.old_names import MOVED, RENAMED, new_name
from hass_lightning.runs.provenance import refuse_other_config
from hass_lightning.target_model.template import read_template
from hydra_plugins.hass_lightning_launcher.launcher import _config_hash

OLD_RUN = Path(__file__).parent / "old_run"
OLD_MODULES = [*MOVED, *(f"target.{name}" for name in ("cache", "head", "linear", "llama", "model", "source", "tiny"))]
OLD_MODULES += [f"{package}.{name}" for package, names in RENAMED.items() for name in names]


def result_of(done):
    assert done.code == 0, done.err
    return json.loads(done.out.strip().splitlines()[-1])


@pytest.mark.parametrize("name", OLD_MODULES)
def test_old_module_name_imports_the_new_module_with_a_warning(name):
    old = f"hass_lightning.{name}"
    new = importlib.import_module(new_name(old))
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new.__name__}"):
        assert importlib.import_module(old) is new
    assert new.__spec__.name == new.__name__ != old


def test_other_names_are_unchanged():
    assert new_name("hass_lightning.target.tiny.tiny_llama") == "hass_lightning.target_model.tiny.tiny_llama"
    assert new_name("package://target/templates/vicuna.jinja") == "package://target_model/templates/vicuna.jinja"
    for same in (
        "hass_lightning.targets",
        "hass_lightning.training.module",
        "my_package.target",
        "package://data/x",
        3,
    ):
        assert new_name(same) == same
    with pytest.raises(ModuleNotFoundError, match=r"hass_lightning\.target\.nothing"):
        importlib.import_module("hass_lightning.target.nothing")


def test_old_names_of_functions_and_templates_resolve():
    from hass_lightning.target_model import source, tiny

    assert get_object("hass_lightning.target.source.packaged_gguf") is source.packaged_gguf
    assert get_object("hass_lightning.target.tiny.tiny_llama") is tiny.tiny_llama
    for name in ("vicuna", "deepseek_r1_distill"):
        template = read_template(f"package://target/templates/{name}.jinja")
        assert template == read_template(f"package://target_model/templates/{name}.jinja")


def test_python_m_runs_an_old_module_name():
    sys.modules.pop("hass_lightning.names", None)
    assert runpy.run_module("hass_lightning.names")["safe_name"]("../a b") == "_a_b"


def test_custom_config_with_an_old_name(call_command, tmp_path):
    own = tmp_path / "own" / "target"
    own.mkdir(parents=True)
    text = (Path(config_folder()) / "target" / "tiny.yaml").read_text()
    (own / "mine.yaml").write_text(text.replace("hass_lightning.target_model.", "hass_lightning.target."))
    assert "hass_lightning.target.tiny." in (own / "mine.yaml").read_text()
    words = ("experiment=smoke", "target=mine", f"hydra.searchpath=[file://{tmp_path}/own]")
    assert result_of(call_command("prepare", *words))["num_validation_conversations"] == 8


def test_old_names_do_not_change_the_config_hash(tmp_path):
    with initialize_config_dir(config_folder(), version_base="1.3"):
        now = compose("train", ["experiment=smoke", "name=smoke", "logger=csv", f"paths.run_dir={tmp_path}"])
    before = OmegaConf.create(OmegaConf.to_yaml(now).replace("hass_lightning.target_model.", "hass_lightning.target."))
    assert before.target._target_ != now.target._target_
    assert _config_hash(before) == _config_hash(now)
    refuse_other_config(tmp_path, before, begun=False)
    written = tmp_path / "resume_config.json"
    written.write_text(written.read_text().replace("hass_lightning.target_model.", "hass_lightning.target."))
    refuse_other_config(tmp_path, now, begun=True)
    now.model.alignment.depth = 2
    with pytest.raises(ValueError, match=r"model\.alignment\.depth"):
        refuse_other_config(tmp_path, now, begun=True)


@pytest.fixture
def old_run(tmp_path):
    """Return a copy of the run folder, under the name that `hass-train experiment=smoke` uses."""
    return Path(shutil.copytree(OLD_RUN, tmp_path / "runs" / "smoke"))


def test_old_run_is_reported_and_has_the_same_config_as_a_new_one(call_command, old_run, tmp_path):
    new = Path(shutil.copytree(old_run, tmp_path / "runs" / "again"))
    config = new / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("hass_lightning.target.", "hass_lightning.target_model."))
    assert "have the same config" in result_of(call_command("report", f"why=[{old_run},{new}]"))["why"]
    result = result_of(call_command("report", f"runs={old_run}", f"output_dir={tmp_path / 'report'}"))
    assert result["num_runs"] == 1
    assert result["cells"][0]["tau"] > 1
    assert Path(result["files"]["html"]).is_file()


def test_old_head_can_be_measured_exported_and_trained(call_command, old_run):
    few = ("data.num_validation=4", "skip=0", "limit=2", "max_new_tokens=8", "num_checked=1")
    rows = result_of(call_command("benchmark", "target=tiny", "data=smoke", f"draft={old_run}", *few))["rows"]
    (row,) = [row for row in rows if row["draft"] == "smoke"]
    assert row["acceptance_length"] >= 1
    assert row["num_identical"] == row["num_prompts"] == 2
    exported = result_of(call_command("export", "target=tiny", f"draft={old_run}", "format=eagle", "output_dir=served"))
    assert "config.json" in exported["files"]
    words = ("experiment=smoke", f"init_from={old_run}", "trainer.max_steps=1", "callbacks.decoding=null", "logger=csv")
    trained = Path(result_of(call_command("train", *words))["run_dir"])
    first, second = (load_draft(folder).draft.state_dict() for folder in (old_run, trained))
    assert first.keys() == second.keys()
    assert json.loads((trained / "start.json").read_text())["features"]
