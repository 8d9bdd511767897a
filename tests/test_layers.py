"""Who may import whom, how large a module may grow, and that the contracts would notice a breach."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "hass_lightning"
MODULES = sorted(SOURCE.rglob("*.py"))
COMMANDS = {
    "train.py", "prepare.py", "benchmark.py", "report_command.py", "export.py", "import_head.py", "doctor.py", "cli.py",
    "provenance.py", "planning.py",
}  # fmt: skip


def lint_imports(root):
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from importlinter.cli import lint_imports_command as c; c()"
    )
    command = [sys.executable, "-c", code, str(root / "src"), "--no-cache", "--config", str(root / "pyproject.toml")]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_the_import_contracts_hold():
    pytest.importorskip("importlinter")
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "breach"),
    [
        ("target/head.py", "import hass_lightning.training.module"),
        ("decoding/tree.py", "import lightning"),
        ("data/features.py", "from omegaconf import DictConfig"),
        ("losses/terms.py", "import transformers"),
    ],
)
def test_the_contracts_notice_a_breach(tmp_path, module, breach):
    pytest.importorskip("importlinter")
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "src" / "hass_lightning" / module
    path.write_text(path.read_text() + f"\n{breach}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout


def imports(path, top_level):
    """First names of what a module imports; `top_level`: only what importing it imports, too."""
    tree = ast.parse(path.read_text())
    skipped = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda) if top_level else ()

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, skipped):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name.split(".")[0] for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level:
                yield (child.module or "").split(".")[0]
            yield from walk(child)

    return set(walk(tree))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_frameworks_stay_at_the_edge(path):
    name, folder = path.name, path.relative_to(SOURCE).parts[0]
    every, first = imports(path, top_level=False), imports(path, top_level=True)
    assert not first & {"wandb", "deepspeed", "datasets", "vllm", "matplotlib"}, "to be imported where it is used"
    if folder != name or name not in COMMANDS:
        assert not every & {"hydra", "omegaconf"}
        if folder != "training" and name != "datamodule.py":
            assert "lightning" not in every
    if folder not in ("target", "draft") and str(path.relative_to(SOURCE)) != "data/tokens.py":
        assert "transformers" not in every


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_is_small_and_has_a_name(path):
    assert len(path.read_text().splitlines()) <= 350
    assert path.name not in ("utils.py", "helpers.py", "common.py")


@pytest.mark.slow
def test_the_core_works_without_lightning_hydra_and_wandb():
    core = ("target", "draft", "losses", "decoding", "measure")
    code = "import sys\nfor name in ('lightning', 'hydra', 'omegaconf', 'wandb'): sys.modules[name] = None\n" + "".join(
        f"import hass_lightning.{name}\n" for name in core
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_every_job_of_a_sweep_imports_first_is_light():
    code = "import sys, hass_lightning.cli; print({'torch', 'transformers', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
