"""The studies of conf/hparams_search: each has the expected cells, every cell builds, small versions run to reports."""

import json
import math
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import LlamaConfig

from browser import CHROMIUM, check_page, open_page
from hass_lightning.measure.factorial import strength
from hass_lightning.runs.config import config_folder
from hass_lightning.runs.ledger import Ledger
from hass_lightning.training import from_config

CONF = Path(config_folder())
NUM_CELLS = {
    "paper_ablation": 12, "top_k": 21, "loss_variants": 12, "alignment_depth": 5, "step_weights": 6,
    "data_fraction": 8, "self_distillation": 6, "mask_leak": 4, "detach_vs_bptt": 12, "equal_compute": 12,
    "optuna": 30, "eagle3_parts": 16, "heads": 5, "heads_equal_flops": 5,
}  # fmt: skip


def study(name):
    """Return a study without resolving its interpolations."""
    written = OmegaConf.to_container(OmegaConf.load(CONF / "hparams_search" / f"{name}.yaml"), resolve=False)
    if "hydra" not in written:  # the cells of another study, which is its first default
        written = vars(study(written["defaults"][0])) | written
    return SimpleNamespace(**{"sweeper": written.get("hydra", written)["sweeper"], **written})


@cache
def base():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train")


def overrides(name):
    """Return the overrides of every cell, from Hydra's sweeper."""
    params = [f"{key}={value}" for key, value in study(name).sweeper["params"].items()]
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
    return [list(job) for job in batch]


def test_every_study_is_listed_with_its_question():
    names = {path.stem for path in (CONF / "hparams_search").glob("*.yaml")}
    assert names == set(NUM_CELLS)
    listed = (CONF.parent / "experiments" / "README.md").read_text()
    for name in names:
        assert f"hparams_search={name}" in listed, name
        assert study(name).study == f"{name}_${{budget}}"
        assert (
            any("early_stopping" in str(default) for default in study(name).defaults) or "heads" in study(name).defaults
        )


@pytest.mark.parametrize("name", sorted(set(NUM_CELLS) - {"optuna"}))
def test_study_has_the_expected_cells_and_each_can_be_built(name):
    cells = overrides(name)
    assert len(cells) == len({tuple(cell) for cell in cells}) == NUM_CELLS[name]
    for override in {each for cell in cells for each in cell}:
        key, value = override.split("=", 1)
        if "/" in key:
            assert (CONF / key / f"{value}.yaml").is_file(), override
            continue
        if key == "experiment":
            assert (CONF / key / f"{value}.yaml").is_file(), override
            continue
        if key == "parts":  # a node of the study itself: see the test below
            continue
        if key == "data.source.answers":  # from the study's own data
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


def built(words):
    """Compose a cell, build its head for the tiny target, its loss and alignment, as a run does."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=words)
        sizes = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4)
        module = instantiate(config.model)
        return config, module.keywords["draft"](sizes), module.keywords["loss"], module.keywords["alignment"]


def test_the_parts_of_eagle3_are_a_half_fraction_and_each_cell_is_built_as_it_says():
    cells = [cell for (cell,) in overrides("eagle3_parts")]
    levels = []
    for cell in cells:
        config, draft, loss, alignment = built(["hparams_search=eagle3_parts", cell])
        found = {
            "layers": len(draft.feature_layers),
            "lm_head": "target" if draft.lm_head is None else "own",
            "gradient": alignment.gradient,
            "feature": loss.terms["feature"].weight,
            "top_k": loss.terms["top_k"].weight,
        }
        assert found == dict(config.parts), cell
        assert (alignment.depth, alignment.edge, alignment.weights[2]) == (7, "drop", pytest.approx(0.64))
        assert loss.terms["soft_ce"].weight == 0.1 and draft.start == "target"
        levels.append(found)
    eagle3 = {"layers": 3, "lm_head": "own", "gradient": "bptt", "feature": 0, "top_k": 0}
    assert levels[0] == eagle3
    factors = {name: sorted({each[name] for each in levels}, key=str) for name in eagle3}
    assert all(len(found) == 2 for found in factors.values())
    assert strength(levels, factors) == 4  # resolution V
    assert {sum(each[name] != eagle3[name] for name in eagle3) % 2 for each in levels} == {0}


def test_the_heads_are_those_of_their_papers_and_read_one_feature_set():
    kinds = {}
    for (cell,) in overrides("heads"):
        config, draft, loss, alignment = built(["hparams_search=heads", cell])
        assert draft.feature_layers in ((), (2, 4, 5)) and list(config.data.feature_layers) == [2, 15, 27]
        assert (draft.vocab_size, config.trainer.max_steps, config.compute.flops) == (8192, 90, None)
        kinds[cell.partition("=")[2]] = (type(draft).__name__, set(loss.terms), alignment.depth, alignment.alive)
    both, three = {"feature", "soft_ce"}, {"feature", "soft_ce", "top_k"}
    assert kinds == {
        "eagle": ("EagleDraft", both, 1, None),
        "hass": ("EagleDraft", three, 3, None),
        "hass_alive": ("EagleDraft", three, 3, 3),
        "eagle3": ("Eagle3Draft", {"soft_ce"}, 7, None),
        "eagle3_had": ("Eagle3Draft", {"soft_ce", "top_k"}, 7, None),
    }
    assert overrides("heads_equal_flops") == overrides("heads")


def test_heads_of_one_pass_are_the_cells_of_the_study(monkeypatch):
    """The command in the comment of heads.yaml."""
    text = (CONF / "hparams_search" / "heads.yaml").read_text()
    (word,) = re.findall(r"'(\+heads=.*?)'", re.sub(r"\n# +", " ", text), re.DOTALL)
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def node(group, name):
            return OmegaConf.select(compose(overrides=[f"+{group}={name}"]), group.replace("/", "."))

        def active(config):
            model = OmegaConf.to_container(config.model)
            terms = {name: term for name, term in model["loss"]["terms"].items() if term["weight"]}
            return model | {"loss": model["loss"] | {"terms": terms}}

        monkeypatch.setattr(from_config, "config_node", node)  # within a command, it asks Hydra for the search path
        config = compose("train", overrides=[word])
        for name, changes in config.heads.items():
            cell = compose("train", overrides=[f"experiment={name}"])
            assert active(from_config.config_of_head(config, name, changes)) == active(cell), name
    assert set(config.heads) == {"eagle", "hass", "eagle3", "eagle3_had", "hass_alive"}


AXES = {
    "paper_ablation": {"model/loss": ["eagle", "hass"], "model.alignment.depth": [1, 3], "seed": [0, 1, 2]},
    "alignment_depth": {"model.alignment.depth": [1, 2, 3, 4, 5]},
    "data_fraction": {"data.fraction": [0.125, 0.25, 0.5, 1], "model.alignment.depth": [1, 3]},
    "mask_leak": {"model.alignment.mask": ["exact", "leaky"], "model.alignment.depth": [1, 3]},
    "detach_vs_bptt": {"model.alignment.gradient": ["bptt", "detach"], "model.alignment.depth": [3, 5],
                       "seed": [0, 1, 2]},
    "equal_compute": {"model.alignment.depth": [1, 2, 3, 5], "seed": [0, 1, 2]},
    "top_k": {"model.loss.terms.top_k": [{"weight": 0}] + [
        {"k": k, "weight": weight} for k in (1, 5, 10, 50, 100) for weight in (0.1, 0.5, 1, 2)]},
}  # fmt: skip


@pytest.mark.parametrize("name", AXES)
def test_the_axes_of_a_study_are_those_of_its_question(name):
    found = {}
    for cell in overrides(name):
        for each in OverridesParser.create().parse_overrides(cell):
            values = found.setdefault(each.key_or_group, [])
            if each.value() not in values:
                values.append(each.value())
    assert found.keys() == AXES[name].keys()
    for key, values in AXES[name].items():
        assert sorted(map(str, found[key])) == sorted(map(str, values))


@pytest.mark.parametrize("budget", ["small", "full"])
@pytest.mark.parametrize("name", sorted(NUM_CELLS))
def test_a_study_composes_with_either_budget(name, budget):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[f"hparams_search={name}", f"budget={budget}"])
        steps = int(config.trainer.max_steps)
        questions = int(config.callbacks.decoding.num_prompts) if config.callbacks.decoding else None  # optuna: none
    assert config.study == f"{name}_{budget}"
    if name == "heads_equal_flops":
        assert steps == -1
    else:
        assert steps == 90 if budget == "small" else steps >= 150
    assert questions is None or (questions == 24 if budget == "small" else questions >= 80)
    assert config.callbacks.early_stopping.patience == (
        1000 if name in ("equal_compute", "heads", "heads_equal_flops") else 3
    )


def test_the_search_of_optuna_is_over_keys_that_exist():
    config = study("optuna")
    assert config.sweeper["n_trials"] == NUM_CELLS["optuna"]
    for key in config.sweeper["params"]:
        assert OmegaConf.select(base(), key, default="missing") != "missing", key
    assert config.optimized_metric == "simulated_acceptance_length"


# --- every study, small ----------------------------------------------------------------------------------------------

STEPS = ("trainer.max_epochs=-1", "trainer.max_steps=2", "trainer.val_check_interval=2")
TINY = ("experiment=smoke", "budget=custom", "logger=csv", "data.num_validation=4", "data.batch_size=2", *STEPS)
DECODE_LITTLE = (
    "callbacks.decoding.num_prompts=2", "callbacks.decoding.max_new_tokens=4", "callbacks.decoding.num_checked=1",
)  # fmt: skip


def small_axes(name):
    """Return the first two levels of each axis; for top_k, whose axis has two keys, the cell without it and 2 x 2."""
    levels = {}
    for cell in overrides(name):
        for each in cell:
            key, value = each.split("=", 1)
            levels.setdefault(key, {})[value] = None
    if name == "top_k":
        ((key, nodes),) = levels.items()
        chosen = [
            node for node in nodes if "k:" not in node or (("k:1," in node or "k:5," in node) and "weight:0." in node)
        ]
        return {key: chosen}
    # four cells of the fraction are enough; of the heads, EAGLE and EAGLE-3, which share their features
    chosen = {"parts": slice(4), "experiment": slice(0, 3, 2)}
    return {key: list(values)[chosen.get(key, slice(2))] for key, values in levels.items()}


def words_of(name, tmp_path, cache_dir):
    """Return the command line of a small version of a study."""
    words = [f"hparams_search={name}", *(TINY[1:] if "heads" in name else TINY)]
    if "heads" in name:  # the cells are experiments, so what `smoke` sets comes from the command line
        words += ["target=tiny", "data=smoke", "data.max_length=256", "data.feature_layers=[0,1]"]
        words += ["trainer.precision=32-true", "model.draft.vocab_size=64"]
    if name == "self_distillation":
        chats = tmp_path / "chats.jsonl"
        turns = [[("user", f"question {n}?"), ("assistant", f"the answer is {n * n}")] for n in range(24)]
        lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
        chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = f"{{_target_:hass_lightning.data.prompts.JsonLines,path:{chats}}}"
        words += ["~data.source.source", f"+data.source.source={source}", "data.source.max_tokens=8"]
    else:
        words += ["data.source.num_questions=24", "data.source.num_validation=4"]
        words += [f"data.source.output_dir={cache_dir}/small_corpus"]
    if name == "optuna":
        return [*words, "hydra.sweeper.n_trials=2"]
    axes = ",".join(f"{key}:'{','.join(values)}'" for key, values in small_axes(name).items())
    return [*words, *DECODE_LITTLE, f"hydra.sweeper.params={{{axes}}}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NUM_CELLS))
def test_every_study_runs_to_its_report(call_command, tmp_path, cache_dir, name):
    """In one process (hydra/launcher=basic), because the imports of 45 cells would take most of the time."""
    if name == "optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        num_runs = num_cells = 2
    else:
        sizes = {key: len(values) for key, values in small_axes(name).items()}
        num_runs = math.prod(sizes.values())
        num_cells = num_runs // sizes.get("seed", 1)
        assert all(size >= 2 for size in sizes.values())
    done = call_command("train", "-m", *words_of(name, tmp_path, cache_dir), "hydra/launcher=basic")
    assert done.code == 0, done.err[-3000:]
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert folder.name == f"{name}_custom"
    assert len(list(folder.glob("*/metrics.json"))) == num_runs
    done = call_command("report", f"runs={folder}", f"output_dir={tmp_path / 'report'}")
    assert done.code == 0, done.err[-3000:]
    found = json.loads(done.out.strip().splitlines()[-1])
    assert (len(found["cells"]), found["num_left_out"]) == (num_cells, 0)
    assert Path(found["files"]["html"]).is_file()


@pytest.mark.slow
def test_twelve_cells_extract_their_features_once_and_their_report_opens_offline(run_command, call_command, tmp_path):
    cache = tmp_path / "cache"
    words = ("hparams_search=paper_ablation", *TINY, *DECODE_LITTLE, "data.source.num_questions=24")
    words = (*words, "data.source.num_validation=4", "trainer.max_steps=1", "hydra.launcher.n_jobs=1")
    done = run_command("train", "-m", *words, env={"HASS_LIGHTNING_CACHE": str(cache)}, timeout=1100)
    assert done.code == 0, done.err[-3000:]
    result = json.loads(done.out.splitlines()[-1])
    assert (result["num_completed"], result["num_failed"]) == (NUM_CELLS["paper_ablation"], 0) == (12, 0)
    folder = Path(result["sweep_dir"])
    extracted = [path.read_text().count("features take ") for path in folder.glob("*/job.log")]
    assert sorted(extracted) == [0] * 11 + [2]  # training and validation, by one job
    shards = list((cache / "features").glob("*/shard-*.safetensors"))
    first_end = min(entry.time for entry in Ledger(folder).entries() if entry.status == "completed")
    assert len(shards) == 2 and all(path.stat().st_mtime < first_end for path in shards)

    done = call_command("report", f"runs={folder}")
    assert done.code == 0, done.err
    page = Path(json.loads(done.out.strip().splitlines()[-1])["files"]["html"])
    if CHROMIUM is None:
        pytest.skip("the page needs chromium (.ci/run installs it)")
    check_page(page, tmp_path / "profile", least_figures=3)
    picture = page.with_suffix(".png")
    open_page(page, tmp_path / "profile", f"--screenshot={picture}", "--window-size=1400,4000")
    assert picture.stat().st_size > 10_000
    print(f"screenshot: {picture}")
