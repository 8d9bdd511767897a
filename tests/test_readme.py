"""The files that README and docs name exist, and their commands compose. .ci/run runs install and pytest lines."""

import re
import shlex
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from hass_lightning.measure import metrics
from hass_lightning.runs.config import config_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONF = Path(config_folder())
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def commands(text):
    """Return the hass-* lines of the bash blocks, with continuation lines joined."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        joined = block.replace("\\\n", " ")
        yield from re.findall(r"^(?:pip install .* && )?(hass-\w+ *.*)$", joined, flags=re.MULTILINE)


IN_README = list(dict.fromkeys(commands(README)))
IN_DOCS = list(dict.fromkeys(line for page in PAGES for line in commands(page.read_text()) if line not in IN_README))


def every_choice(line):
    """Yield (program, overrides) of a command line, one for each cell of a sweep."""
    program, *words = [word for word in shlex.split(line, comments=True) if word not in ("-m", "--cfg", "job")]
    parser = OverridesParser.create()
    choices = []
    for word in words:
        override = parser.parse_override(word)
        sweep = override.is_sweep_override()
        choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
                       if sweep else [word])  # fmt: skip
    for overrides in product(*choices):
        yield program, list(overrides)


def test_there_are_commands():
    assert len(IN_README) >= 10
    assert len(IN_DOCS) >= 20


@pytest.mark.parametrize("line", IN_README)
def test_a_command_of_the_readme_composes(line):
    with initialize_config_dir(config_folder(), version_base="1.3"):
        for program, overrides in every_choice(line):
            assert compose(program.removeprefix("hass-"), overrides=overrides)


@pytest.mark.slow
def test_the_commands_of_the_docs_compose_with_the_tiny_target():
    broken = {}
    with initialize_config_dir(config_folder(), version_base="1.3"):
        for line in IN_DOCS:
            program, overrides = next(every_choice(line))  # the cells of a sweep differ only in values
            name = program.removeprefix("hass-")
            try:
                takes_target = re.search(
                    r"^  - (target|train)\b", (CONF / f"{name}.yaml").read_text(), flags=re.MULTILINE
                )
                targets = [word.removeprefix("target=") for word in overrides if word.startswith("target=")]
                assert all((CONF / "target" / f"{target}.yaml").exists() for target in targets)
                others = [word for word in overrides if not word.startswith("target=")]
                assert compose(name, overrides=[*others, *(["target=tiny"] if takes_target else [])])
            except Exception as error:
                broken[line] = error
    assert not broken


def test_the_glossary_has_every_convention():
    text = (ROOT / "docs/metrics.md").read_text()
    data_and_readers = {"BASELINE", "Question", "Record", "Totals", "matched", "read_records", "select", "totals",
                        "totals_by_question"}  # fmt: skip
    missing = [name for name in metrics.__all__ if name not in data_and_readers and f"`{name}`" not in text]
    assert not missing


def test_every_page_is_on_the_site_and_every_check_is_on_the_page_of_the_doctor():
    site = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in PAGES if str(page.relative_to(ROOT / "docs")) not in site]
    assert not [page.name for page in (ROOT / "experiments").glob("*.md") if f"experiments/{page.name}" not in site]
    names = set()
    for module in (ROOT / "src/hass_lightning/checks").glob("*.py"):
        names |= set(re.findall(r'(?:ok|warning|error)\)?\(\s*"(\w+)"', module.read_text()))
    page = (ROOT / "docs/tasks/doctor.md").read_text()
    assert len(names) > 25
    assert not {name for name in names if f"`{name}`" not in page and not name.startswith("head_")}


def test_tree_of_the_readme_matches_the_files():
    (tree,) = re.findall(r"## Where things are\s+```\n(.*?)```", README, flags=re.DOTALL)
    folder, missing = ROOT, []
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        parent = ROOT / "src/hass_lightning" if line.startswith("  ") else folder
        missing += [name for name in names if not (parent / name).exists()]
    assert not missing
