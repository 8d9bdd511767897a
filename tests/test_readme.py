"""What the README says is there and composes. Its install and pytest lines run in .ci/run."""

import re
import shlex
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from hass_lightning.cli import config_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:pip install .* && )?(hass-(?:train|benchmark|prepare).*)$", README, flags=re.MULTILINE)


def test_there_are_commands():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_composes(line):
    program, *words = [word for word in shlex.split(line, comments=True) if word != "-m"]
    parser = OverridesParser.create()
    choices = []
    for word in words:
        override = parser.parse_override(word)
        sweep = override.is_sweep_override()
        choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
                       if sweep else [word])  # fmt: skip
    with initialize_config_dir(config_folder(), version_base="1.3"):
        for overrides in product(*choices):
            assert compose(program.removeprefix("hass-"), overrides=list(overrides))


def test_the_tree_of_the_readme_is_there():
    (tree,) = re.findall(r"## Where things are\s+```\n(.*?)```", README, flags=re.DOTALL)
    folder, missing = ROOT, []
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        parent = ROOT / "src/hass_lightning" if line.startswith("  ") else folder
        missing += [name for name in names if not (parent / name).exists()]
    assert not missing
