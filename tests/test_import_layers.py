"""Import layers, module sizes, and that the import contracts detect a violation."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hass_lightning
from hass_lightning.runs.old_names import MOVED

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "hass_lightning"
MODULES = sorted(SOURCE.rglob("*.py"))
OLD_IMPORT = rf"(from|import|_target_:) hass_lightning\.({'|'.join(MOVED)})\b"
MAY_IMPORT_TRANSFORMERS = ("data/tokens.py", "generation/custom_generate.py")
ROOM_FOR_HYDRA = ("commands", "runs/config.py", "runs/provenance.py", "training/plan.py")


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
        ("target_model/lm_head.py", "import hass_lightning.training.module"),
        ("decoding/tree.py", "import lightning"),
        ("data/features.py", "from omegaconf import DictConfig"),
        ("losses/terms.py", "import transformers"),
        ("measure/metrics.py", "from hass_lightning.commands.errors import user_error"),
        ("training/fit.py", "from hass_lightning.report import run_report"),
        ("runs/names.py", "import hass_lightning.target_model"),
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
    """Return the first names of a module's imports; `top_level`: only of those executed when it is imported."""
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
    name, place = path.name, str(path.relative_to(SOURCE))
    every, first = imports(path, top_level=False), imports(path, top_level=True)
    assert not first & {"wandb", "deepspeed", "datasets", "vllm", "matplotlib"}, "to be imported where it is used"
    if name != "from_config.py" and not place.startswith(ROOM_FOR_HYDRA):
        assert not every & {"hydra", "omegaconf"}
    if not place.startswith(("commands", "training")) and name != "datamodule.py":
        assert "lightning" not in every
    if not place.startswith(("target_model", "draft")) and place not in MAY_IMPORT_TRANSFORMERS:
        assert "transformers" not in every


def code_of(path):
    """Return the Python code of a file; of a notebook, its code cells."""
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("folder", ["notebooks", "benchmarks", "experiments"])
def test_library_users_import_no_command(folder):
    files = [path for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".ipynb")]
    assert files
    importing = [path.name for path in files if "hass_lightning" in code_of(path)]
    assert importing
    commands = r"(from|import) hass_lightning\.commands|from hass_lightning import .*\bcommands\b"
    assert not [path.name for path in files if re.search(f"{commands}|{OLD_IMPORT}", code_of(path))]


def test_the_package_and_its_configs_use_no_old_name():
    every = [*MODULES, *(ROOT / "conf").rglob("*.yaml")]
    assert not [str(path) for path in every if re.search(OLD_IMPORT, path.read_text())]


def test_the_package_has_no_loose_modules_but_two():
    loose = {path.name for path in SOURCE.iterdir() if path.is_file()}
    assert loose == {"__init__.py", "types.py", "schedules.py"}


def test_importing_the_package_loads_no_framework_and_has_its_names():
    heavy = "{'torch', 'transformers', 'lightning', 'hydra', 'numpy', 'rich'}"
    code = f"import sys, hass_lightning\nprint({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert len(hass_lightning.__all__) == 12
    for name in hass_lightning.__all__:
        assert getattr(hass_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        hass_lightning.Nothing  # noqa: B018


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_is_small_and_has_a_name(path):
    assert len(path.read_text().splitlines()) <= 350
    assert path.name not in ("utils.py", "helpers.py", "common.py")


@pytest.mark.slow
def test_the_core_works_without_lightning_hydra_and_wandb():
    core = ("target_model", "draft", "losses", "decoding", "measure")
    code = "import sys\nfor name in ('lightning', 'hydra', 'omegaconf', 'wandb'): sys.modules[name] = None\n" + "".join(
        f"import hass_lightning.{name}\n" for name in core
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_launcher_imports_no_heavy_library():
    code = (
        "import sys, hass_lightning.commands.command\nprint({'torch', 'transformers', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
