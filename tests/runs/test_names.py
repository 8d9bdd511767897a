"""Folder names of sweep cells; counts with their nouns."""

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from hass_lightning.runs.names import LONGEST_NAME, cell_folder, counted


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model/loss=hass", "model.alignment.depth=3", "seed=0"], "loss=hass,depth=3,seed=0"),
        (["experiment=hass", "data.batch_size=2", "study=x", "logger=csv"], "experiment=hass,batch_size=2"),
        (["model.alignment.depth=3", "decoding.depth=6"], "alignment.depth=3,decoding.depth=6"),
        (["depth=3", "decoding.depth=6"], "depth=3,decoding.depth=6"),
        (["+model.loss.terms.mine={_target_: a.B, weight: 0.5}"], "mine=target_a.B_weight_0.5"),
        (["~model.loss.terms.feature", "seed=1"], "no_feature,seed=1"),
        (["model.alignment.step_weights=[1.0,0.8,0.6]"], "step_weights=1.0_0.8_0.6"),
        (["model.loss.terms.top_k.weight={0:0,0.8:1}"], "weight=0_0_0.8_1"),
        (["data.source.path='/data/my chats.jsonl'"], "path=data_my_chats.jsonl"),
        (["init_from=../../etc", "seed=-1"], "init_from=.._.._etc,seed=-1"),
        (["study=x"], "defaults"),
        ([], "defaults"),
    ],
)
def test_a_cell_is_named_by_what_it_sets(overrides, name):
    assert cell_folder(overrides) == name


@pytest.mark.parametrize("value", ["x" * 300, "\u0e01" * 300, "a/b$c{d}e'f\"g h\n;*?~"])
def test_any_value_gives_one_folder_that_hydra_takes_in_quotes(value):
    name = cell_folder([f"data.source.path={value}", "seed=0"])
    assert re.fullmatch(r"[\w.+=,-]+", name, re.ASCII) and len(name) <= LONGEST_NAME
    parsed = OverridesParser.create().parse_override(f"draft='runs/sweeps/x/{name}'")
    assert parsed.value() == f"runs/sweeps/x/{name}" and not parsed.is_sweep_override()


def test_long_names_stay_apart():
    names = {cell_folder([f"{'a' * 120}=1", f"seed={seed}"]) for seed in range(20)}
    assert len(names) == 20 and all(len(name) == LONGEST_NAME for name in names)
    assert cell_folder(["b=" + "x" * 98]) == "b=" + "x" * 98


def test_counts_have_their_noun():
    assert [counted(n, "seed") for n in (0, 1, 2)] == ["0 seeds", "1 seed", "2 seeds"]


def test_run_folder_elsewhere_holds_the_config(tmp_path):
    from hass_lightning.runs.provenance import keep_hydra_config

    own, run = tmp_path / "own", tmp_path / "run"
    (own / ".hydra").mkdir(parents=True)
    (own / ".hydra" / "config.yaml").write_text("seed: 1\n")
    for folder in (run, own):
        keep_hydra_config(folder, own)
        assert (folder / ".hydra" / "config.yaml").read_text() == "seed: 1\n"
