"""Every YAML composes with its command; every `_target_` exists and accepts every key of its node."""

import inspect
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from transformers import get_linear_schedule_with_warmup

from hass_lightning.runs.config import config_folder
from hass_lightning.runs.names import run_name

CONF = Path(config_folder())
COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml"))
GROUPED = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml") if path.parent != CONF)
NOT_ALONE = {Path("hydra/default.yaml")}  # a part of every command; `hydra/…` cannot be selected like other groups


@cache
def composed(config_name, *overrides):
    """Return a composed config, which is shared and must not be changed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config_name, overrides=list(overrides))


def groups_of(command):
    """Return the config groups in a command's own defaults list."""
    defaults = OmegaConf.load(CONF / f"{command}.yaml").get("defaults", [])
    names = [next(iter(entry)) for entry in defaults if not isinstance(entry, str)]
    return {str(name).removeprefix("optional ").removeprefix("override ").strip("/") for name in names}


def nodes(content, path=""):
    """Yield every node with a `_target_`, and its path."""
    if isinstance(content, dict):
        if "_target_" in content:
            yield path, content
        for key, value in content.items():
            yield from nodes(value, f"{path}.{key}".lstrip("."))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from nodes(value, f"{path}[{number}]")


OURS = {"lightning.pytorch.Trainer": {"rendezvous_timeout"}}  # keys that `make_trainer` uses itself


def check_nodes(config):
    """Check that each `_target_` resolves, accepts its keys, and gets its required arguments."""
    found = list(nodes(OmegaConf.to_container(config, resolve=False)))
    for path, node in found:
        target = hydra.utils.get_object(node["_target_"])
        parameters = inspect.signature(target).parameters
        keys = {key for key in node if not (key.startswith("_") and key.endswith("_"))}
        keys -= OURS.get(node["_target_"], set())
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            assert keys <= set(parameters), f"{path}: {node['_target_']} does not take {keys - set(parameters)}"
        if not node.get("_partial_"):
            needed = {
                name
                for name, p in parameters.items()
                if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            }
            assert needed <= keys, f"{path}: {node['_target_']} also needs {needed - keys}"
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes_without_any_override(command):
    check_nodes(composed(command))


@pytest.mark.parametrize("path", GROUPED, ids=str)
def test_every_config_composes_with_every_command_that_has_its_group(path):
    if path in NOT_ALONE:
        return
    group, name = str(path.parent), path.stem
    top = group.split("/")[0]
    if top == "experiment":  # a folder of experiments is not a group
        group, name = top, str(path.relative_to(top).with_suffix(""))
    takers = [command for command in COMMANDS if top in groups_of(command)]
    if len(takers) > 1 and name not in ("tiny", "smoke"):  # a group that fits once fits
        takers = ["train"]
    if group == "model/loss" and name not in ("eagle", "hass"):  # each fits wherever these two fit
        takers = []
    for command in takers:
        if path in (Path("callbacks/early_stopping.yaml"), Path("callbacks/average.yaml")):
            config = composed(command, f"+callbacks@callbacks.{name}={name}")
            assert (
                config.callbacks[name]._target_.lower().startswith(("lightning", "hass_lightning.training.averaging"))
            )
            assert config.callbacks.last_checkpoint is not None
        else:
            config = composed(command, f"{group}={name}")
        check_nodes(config)
    if not takers:  # selected by name, as in `benchmarks=[…]` of hass-benchmark
        config = composed(f"{group}/{name}")
        assert check_nodes(config), f"{path} belongs to no command and builds nothing"


def test_config_check_detects_a_wrong_target_a_wrong_key_and_a_missing_one():
    good = {"_target_": "hass_lightning.types.Sampling", "temperature": 0}
    assert len(check_nodes(OmegaConf.create({"a": [good], "b": good}))) == 2
    with pytest.raises(AssertionError, match="temperatur"):
        check_nodes(OmegaConf.create({"a": {"_target_": "hass_lightning.types.Sampling", "temperatur": 0}}))
    with pytest.raises(AssertionError, match="also needs"):
        check_nodes(OmegaConf.create({"a": {"_target_": "hass_lightning.data.prompts.JsonLines"}}))
    with pytest.raises(ImportError):
        check_nodes(OmegaConf.create({"a": {"_target_": "hass_lightning.types.Nothing"}}))


@pytest.mark.parametrize(
    ("experiment", "terms", "depth"),
    [
        ("eagle", {"feature", "soft_ce"}, 1),
        ("had", {"feature", "soft_ce", "top_k"}, 1),
        ("hca", {"feature", "soft_ce"}, 3),
        ("hass", {"feature", "soft_ce", "top_k"}, 3),
    ],
)
def test_the_four_cells_differ_only_in_loss_and_depth(experiment, terms, depth):
    config = composed("train", f"experiment={experiment}")
    assert (set(config.model.loss.terms), config.model.alignment.depth) == (terms, depth)
    base = OmegaConf.to_container(composed("train", "experiment=hass"), resolve=False)
    other = OmegaConf.to_container(config, resolve=False)
    for content in (base, other):
        del content["model"]["loss"]["terms"], content["model"]["alignment"]["depth"]
    assert base == other


@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.bfloat16, (120_000, 100, 8, 16)), (torch.float32, (40_000, 48, 4, 8))], ids=str
)
def test_the_sizes_of_the_quickstart_follow_the_machine(monkeypatch, dtype, sizes):
    monkeypatch.setattr("hass_lightning.runs.machine.working_dtype", lambda device: dtype)
    config = composed.__wrapped__("train")
    data = config.data
    assert (data.max_answer_tokens, data.num_validation, data.batch_size, config.decoding.num_nodes) == sizes


@pytest.mark.parametrize(
    "overrides",
    [
        ["model/loss=eagle"],
        ["model.loss.terms.top_k.k=5"],
        ["~model.loss.terms.top_k"],
        ["+model.loss.terms.mine={_target_: hass_lightning.losses.TopK, k: 3}"],
        ["model.draft.vocab_size=64", "model.alignment.depth=1", "model.loss.terms.top_k.weight=0"],
    ],
    ids=str,
)
def test_the_overrides_that_the_design_promises(overrides):
    config = composed("train", "experiment=smoke", *overrides)
    check_nodes(config)
    loss = hydra.utils.instantiate(config.model.loss)
    assert set(loss.terms) == set(config.model.loss.terms)


@pytest.mark.parametrize("key", ["modle.alignment.depth", "model.alignment.dept", "target.pth", "data.max_lenght"])
def test_an_unknown_key_is_named(key):
    with pytest.raises(HydraException, match=key.split(".")[-1]):
        composed("train", "experiment=smoke", f"{key}=1")


def test_command_line_takes_precedence_over_the_experiment():
    config = composed("train", "experiment=smoke", "data.batch_size=2", "model.optimizer.lr=1", "trainer=ddp_cpu")
    assert (config.data.batch_size, config.model.optimizer.lr, config.trainer.devices) == (2, 1, 2)


@pytest.mark.parametrize("path", sorted((CONF / "target").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_target_has_a_device_and_the_large_ones_a_gpu(path):
    node, name = OmegaConf.load(path), path.stem
    if "defaults" in node or "smollm2" in name or name == "tiny":
        assert "defaults" in node or node.device == "cpu"
        return
    assert node.device == "cuda:0"
    assert node.device_map == ("auto" if "70b" in name or "32b" in name else None)
    assert node.head_only is False


def test_run_names_are_the_same_for_the_same_command_and_differ_for_another():
    assert run_name("") == "quickstart"
    assert run_name("experiment=smoke") == "smoke"
    assert run_name("experiment=smoke,fresh=true") == "smoke"
    first = run_name("experiment=smoke,seed=1,data.batch_size=2")
    assert first == run_name("data.batch_size=2,experiment=smoke,seed=1")
    assert first.startswith("smoke-")
    others = {run_name(f"experiment=smoke,seed={seed}") for seed in range(20)}
    assert len(others | {first}) == 21
    assert run_name("experiment=smoke,name=mine").startswith("mine-")


def test_run_names_depend_on_the_order_of_list_items():
    weights = ["[1,2,3,4]", "[1,3,2,4]", "[4,3,2,1]", "'a,b'", "'b,a'", "{a:[1,2],b:3}", "{a:[2,1],b:3}"]
    assert len({run_name(f"model.alignment.step_weights={value}") for value in weights}) == len(weights)
    assert run_name("a=[1,2],b='x, y'") == run_name("b='x, y',a=[1,2]")


def test_custom_configs_are_found_through_the_search_path(call_command, tmp_path):
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - smoke\n\ndata:\n  batch_size: 3\n"
    (own / "mine.yaml").write_text(text)
    done = call_command("train", "--cfg", "job", f"hydra.searchpath=[file://{tmp_path}/own]", "experiment=mine")
    assert done.code == 0, done.err
    config = OmegaConf.create(done.out)
    assert (config.data.batch_size, config.target.name) == (3, "tiny")


@pytest.mark.slow
def test_a_wheel_works_from_another_folder(tmp_path):
    root = CONF.parent
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", ".", "--no-deps", "-w", tmp_path], cwd=root, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"hass_lightning/conf/{path.relative_to(CONF)}" for path in CONF.rglob("*.yaml")} <= names
    assert any(name.startswith("hydra_plugins/") for name in names)
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
    elsewhere.mkdir()
    code = "import sys; sys.path[:0] = [sys.argv.pop(1)]; from hass_lightning.commands import train; "
    code += "print(train.__file__); train.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, installed, "--cfg", "job", "experiment=smoke"],
        cwd=elsewhere, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    assert first.startswith(str(installed))
    assert OmegaConf.create(rest).target.name == "tiny"


@pytest.fixture(autouse=True)
def no_hydra_left():
    yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("num_steps", [50, 100, 250, 1790, 5800])
def test_reproduce_has_the_official_schedule(num_steps):
    """Linear warm-up over 1 % (total_steps // 100) and linear decay to 0, by transformers' function, as officially."""
    schedule = hydra.utils.instantiate(composed("train", "experiment=reproduce/llama2_7b_chat").model.schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    official = get_linear_schedule_with_warmup(optimizer, num_steps // 100, num_steps)
    for step in range(num_steps + 1):
        assert schedule.factor(step, num_steps) == pytest.approx(official.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        official.step()
