"""CONTRIBUTING.md names existing files; .gitignore covers what commands write; hooks and CI run the same tools."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
RECIPES = [name for name in SECTIONS if name.startswith("Add ")]
FOLDERS = ("src", "tests", "conf", "docs", "experiments", "benchmarks")


def paths_of(text):
    """Return every path in backticks that begins with a folder of the repository; `<name>` is a file to be written."""
    return [word for word in re.findall(r"`([^`\s]+)`", text) if word.split("/")[0] in FOLDERS and "/" in word]


def test_every_path_is_there():
    named = paths_of(TEXT)
    assert len(named) > 30
    missing = [path for path in named if "<" not in path and not (ROOT / path).exists()]
    missing += [path for path in named if "<" in path and not (ROOT / path).parent.is_dir()]
    assert not missing


@pytest.mark.parametrize(
    "thing", ["loss term", "alignment option", "decoder", "target family", "benchmark", "export layout"]
)
def test_a_recipe_is_one_screen_with_a_file_to_open_and_a_test_to_copy(thing):
    (name,) = [name for name in RECIPES if name.endswith(thing)]
    paths = paths_of(SECTIONS[name])
    assert len(SECTIONS[name].splitlines()) <= 24
    assert [path for path in paths if path.startswith(("src/", "conf/"))]
    assert [path for path in paths if path.startswith("tests/")]


def test_names_in_recipes_are_in_the_files_named_before_them():
    """A name such as `ReverseKL` or `sequential` in a recipe is in one of the files that the recipe names."""
    for name in RECIPES:
        files = [ROOT / path for path in paths_of(SECTIONS[name]) if (ROOT / path).is_file()]
        content = "\n".join(path.read_text() for path in files if path.suffix == ".py")
        words = re.findall(r"`(_?[A-Za-z]\w*)`", SECTIONS[name])
        assert not [word for word in words if not re.search(rf"\b{word}\b", content)], name


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs the git repository")
def test_git_ignores_what_commands_write_and_nothing_that_is_kept():
    written = [
        "runs/quickstart/metrics.json",
        "notebooks/runs/x/a",
        "outputs/x/train.log",
        "multirun/x/a",
        "data/a.jsonl",
    ]
    written += ["wandb/run/a", "a/b.ckpt", "served/config.json", "conf/local/default.yaml", "lightning_logs/a"]
    for path in written:
        assert subprocess.run(["git", "-C", ROOT, "check-ignore", "-q", path], check=False).returncode == 0, path
    listing = ["git", "-C", ROOT, "ls-files", "-ci", "--exclude-standard"]
    assert subprocess.run(listing, check=True, capture_output=True, text=True).stdout == ""


def test_hooks_need_no_network_and_run_what_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    tools = {hook["entry"].split()[0] for hook in hooks[0]["hooks"]}
    assert tools == {"ruff", "mypy", "lint-imports"}
    ci = (ROOT / ".ci" / "run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for tool in tools:
        assert re.search(rf"^{tool}\b", ci, re.M) and re.search(rf"^\t{tool}\b", makefile, re.M), tool
