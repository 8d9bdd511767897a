"""`--help`: every example composes, every key and value exists, the text fits a screen, and torch is not imported."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from command_environment import command_environment
from hass_lightning.commands.conf_text import choices, default_value, find_key, groups_of, read_conf
from hass_lightning.commands.help import COMMANDS, KEYS, answer, help_text, overview, shown_groups
from hass_lightning.runs.config_folder import config_folder
from terminal import check_snapshot, run_in_terminal, script

CONF = Path(config_folder())


@cache
def composed(command, overrides=()):
    with initialize_config_dir(config_folder(), version_base="1.3"):
        return compose(command, overrides=list(overrides))


@pytest.mark.parametrize("command", COMMANDS)
def test_five_examples_compose(command):
    examples = [line for line, _ in read_conf(command).examples]
    assert len(examples) == 5
    for line in examples:
        program, *words = shlex.split(line)
        assert program == f"hass-{command}"
        overrides = [word for word in words if word != "-m"]
        if "-m" in words:  # the first cell of the sweep
            overrides = [word.split(",")[0] for word in overrides]
        assert composed(command, tuple(overrides))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_is_there_with_its_default_and_a_meaning(command):
    config = OmegaConf.to_container(composed(command), resolve=False)
    assert 3 <= len(KEYS[command]) <= 10
    for name in KEYS[command]:
        node = config
        for part in name.split("."):
            node = node[part]  # KeyError if the key does not exist
        shown = default_value(command, name)
        if "${" in shown or shown == "???":
            assert node == shown
        else:
            assert OmegaConf.to_container(OmegaConf.create(f"value: {shown}"))["value"] == node
        assert find_key(command, name)[1].comment, f"{name} has no comment"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_value_of_a_group_is_there(command):
    for group, key, names in shown_groups(command):
        if group in groups_of(command):
            # tests/test_configs.py composes each of them
            assert set(names) == set(choices(group)) - {"default"}
            assert all((CONF / group / f"{name}.yaml").is_file() for name in names)
        assert key.comment or group == "target", f"{group} has no comment"


def test_defaults_are_those_of_the_quickstart_not_of_the_file_that_defines_a_key():
    assert find_key("train", "model.optimizer.lr") == ("model/default", find_key("train", "model.optimizer.lr")[1])
    assert default_value("train", "model.optimizer.lr") == "1.0e-3"
    assert "3.0e-4" in (find_key("train", "model.optimizer.lr")[1].value)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [80, 100])
def test_help_fits_a_screen(command, width):
    text = help_text(command, width)
    lines = text.splitlines()
    longest = max(lines, key=len)
    assert len(longest) <= width or longest.lstrip().startswith("hass-")  # an example is not cut
    assert len(lines) <= 62


def test_the_values_of_a_group_are_explained():
    text = answer("train", ["--help", "model/loss"])
    assert text.count("\n") >= 11 and re.search(r"reverse_kl +EAGLE's two terms \+ KL", text)
    assert answer("train", ["--help", "nothing"]).startswith("hass-train")
    assert answer("train", ["seed=1"]) is None


def test_hass_alone_lists_the_commands_and_versions():
    text = overview()
    assert all(f"hass-{command}" in text for command in COMMANDS)
    assert "torch 2." in text and "hass-lightning" in text


def test_help_loads_neither_torch_nor_hydra(tmp_path, cache_dir):
    code = (
        "import sys; sys.argv = ['hass-train', '--help']\nfrom hass_lightning.commands.scripts import train\ntrain()\n"
        "print({'torch', 'hydra', 'lightning', 'transformers', 'rich'} & set(sys.modules))"
    )
    environment = command_environment(tmp_path, cache_dir)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_help_of_hass_train_looks_as_it_did(tmp_path, cache_dir, columns):
    environment = command_environment(tmp_path, cache_dir)
    environment.pop("COLUMNS", None)
    text, code = run_in_terminal([*script("train"), "--help"], columns, cwd=tmp_path, env=environment)
    assert code == 0
    check_snapshot(f"help_{columns}", text)
