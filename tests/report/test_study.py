from __future__ import annotations

import csv
import json
import re
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy import stats
from study_factory import config_of, write_cell, write_records, write_sweep
from test_pages import Tags, check_self_contained

from hass_lightning.measure.factorial import Contrast, Effect
from hass_lightning.measure.statistics import Interval
from hass_lightning.report.curves import loss_terms, read_curves
from hass_lightning.report.study import load_runs, why_line
from hass_lightning.report.study.analysis import analyse
from hass_lightning.report.study.cells import find_factors, find_grid, make_cells
from hass_lightning.report.study.claims import claims_of
from hass_lightning.report.study.figures import gap_figure, response_figure
from hass_lightning.report.study.page import subtitle
from hass_lightning.report.study.runs import StudyRun, read_run
from hass_lightning.report.study.tables import cells_table, effects_table, front, notes
from hass_lightning.report.study.workspace import build_report, build_workspace, save_workspace, workspace_spec
from hass_lightning.runs.config import config_folder
from hass_lightning.runs.ledger import Entry, Ledger

CONF = Path(config_folder())
CORNERS = [("eagle", 1), ("eagle", 3), ("hass", 1), ("hass", 3)]
NULL = dict.fromkeys(CORNERS, 0.6)
INTERACTION = NULL | {("hass", 3): 0.72}


def shown(study):
    return {
        effect.contrast.name for effect in (*study.comparisons, *study.effects) if effect.verdict in ("better", "worse")
    }


def cell(tmp_path, name, overrides=(), **settings):
    return StudyRun(tmp_path / name, settings, dict(each.split("=", 1) for each in overrides))


# --- a sweep, read and reported --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A sweep with a known effect of depth, reported by the command."""
    folder = tmp_path_factory.mktemp("sweeps") / "paper_ablation"
    return write_sweep(folder, {corner: 0.55 + 0.15 * (corner[1] == 3) for corner in CORNERS}, seeds=(0, 1, 2))


def test_known_main_effect_is_claimed_and_every_file_written(reported, call_command):
    done = call_command("report", f"runs={reported}")
    assert done.code == 0, done.err
    result = json.loads(done.out.strip().splitlines()[-1])
    assert (result["metric"], result["unit"], result["baseline"]) == (
        "acceptance_length",
        "seeds",
        "loss=eagle, depth=1",
    )
    assert [each["cell"] for each in result["cells"]] == [f"loss={loss}, depth={depth}" for loss, depth in CORNERS]
    verdicts = {test["name"]: test["verdict"] for test in result["tests"]}
    assert verdicts["depth: 3 against 1"] == verdicts["loss=eagle, depth=3 against loss=eagle, depth=1"] == "better"
    assert verdicts["loss: hass against eagle"] == verdicts["loss hass × depth 3"] == "no difference is shown"
    assert set(result["files"]) == {"html", "md", "tex", "csv"}
    written = reported / "report"
    tags = Tags((written / "report.html").read_text())
    check_self_contained(tags)
    for expected in ("Main effects and interactions", "Exposure gap", "τ against training compute", "What differs"):
        assert expected in tags.text
    assert "/home/someone" not in tags.text
    (line, *_) = csv.DictReader((written / "table.csv").open())
    assert float(line["tau_low"]) < float(line["tau"]) < float(line["tau_high"])
    assert {"a1_low", "speedup_high", "tflops", "tokens_thousands", "val_loss"} <= set(line)
    assert (written / "table.tex").read_text().startswith("\\begin{tabular}")
    assert "| depth: 3 against 1 | main effect |" in (written / "report.md").read_text()
    assert "better" in done.err  # the table on the terminal


def test_list_of_runs_is_reported_next_to_the_first(reported, call_command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cells = [
        write_cell(tmp_path / "mine" / loss, config_of(loss, 1, 0), [f"model/loss={loss}"], 2.0)
        for loss in ("eagle", "hass")
    ]
    done = call_command("report", f"runs=[{cells[0]},{cells[1]}]")
    assert done.code == 0, done.err
    folder = tmp_path / "mine" / "report" / "eagle,hass"
    assert json.loads(done.out.splitlines()[-1])["files"]["html"] == str(folder / "report.html")
    assert (folder / "table.csv").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # no folder or log of the command itself


def test_counts_of_one_are_singular(tmp_path):
    study = analyse(load_runs(write_sweep(tmp_path / "s", {("hass", 3): 0.6})))
    assert subtitle(study).startswith("1 cell · 1 run · 1 seed · ")
    study = analyse(load_runs(write_sweep(tmp_path / "t", NULL, seeds=(0, 1))))
    assert subtitle(study).startswith(f"{len(NULL)} cells · {2 * len(NULL)} runs · 2 seeds · ")


def test_one_seed_is_tested_over_questions_and_reported_as_such(tmp_path):
    study = analyse(load_runs(write_sweep(tmp_path / "s", INTERACTION, num_questions=80)))
    assert study.unit == "questions"
    assert {"loss hass × depth 3", "loss=hass, depth=3 against loss=eagle, depth=1"} <= shown(study)
    assert "paired over questions" in " ".join(notes(study))
    assert all("80 questions" in claim.evidence for claim in claims_of(study))
    tau = study.rows[0].tau
    records = study.cells[0].runs[0].records
    ours = [record for record in records if record.draft]
    assert tau.value == pytest.approx(
        sum(sum(r.accepted) + len(r.accepted) for r in ours) / sum(len(r.accepted) for r in ours)
    )
    assert study.rows[0].rates[0].value == pytest.approx(
        np.mean([accepted >= 1 for record in ours for accepted in record.accepted])
    )


def test_sweeps_without_effects_rarely_claim_anything(tmp_path):
    """The whole pipeline from files to claims; its error rate is tested below."""
    claimed = [shown(analyse(load_runs(write_sweep(tmp_path / str(n), NULL, rng_seed=n)))) for n in range(6)]
    assert sum(bool(each) for each in claimed) <= 1


def most_false_alarms(count):
    """Return the 99.9 % quantile of the number of reports with a claim if the error rate is one in twenty."""
    return stats.binom.ppf(0.999, count, 0.05)


def test_null_reports_over_seeds_claim_an_effect_at_most_5_percent_of_the_time():
    """The whole family of a report: three cells against the baseline, two main effects, the interaction."""
    rng, claimed = np.random.default_rng(0), 0
    for _ in range(400):
        runs = [
            StudyRun(
                Path(f"{loss}-{depth}-{seed}"), {"loss": loss, "depth": depth}, {}, seed,
                {"acceptance_length": float(2 * np.exp(rng.normal(0.01 * seed, 0.02)))},
            )
            for loss, depth, seed in product(("eagle", "hass"), (1, 3), range(3))
        ]  # fmt: skip
        study = analyse(runs)
        assert (study.unit, len(study.comparisons), len(study.effects)) == ("seeds", 3, 3)
        claimed += bool(shown(study))
    assert claimed <= most_false_alarms(400)


@pytest.mark.slow
def test_null_reports_over_questions_claim_an_effect_at_most_5_percent_of_the_time(tmp_path):
    claimed = 0
    for number in range(200):
        study = analyse(load_runs(write_sweep(tmp_path / str(number), NULL, num_questions=40, rng_seed=100 + number)))
        assert (study.unit, len(study.comparisons), len(study.effects)) == ("questions", 3, 3)
        claimed += bool(shown(study))
    assert claimed <= most_false_alarms(200)


def test_records_of_a_common_benchmark_replace_those_of_runs(tmp_path):
    runs = [write_cell(tmp_path / loss, config_of(loss, 1, 0), [f"model/loss={loss}"]) for loss in ("eagle", "hass")]
    assert analyse(load_runs(runs)).metric == "simulated_acceptance_length"
    bench = tmp_path / "bench"
    bench.mkdir()
    lines = ""
    for number, loss in enumerate(("eagle", "hass")):
        write_records(bench, np.random.default_rng(number), 0.4 + 0.3 * number, 40, draft=loss)
        lines += (bench / "records.jsonl").read_text()
    (bench / "records.jsonl").write_text(lines)
    study = analyse(load_runs(runs, bench))
    assert (study.metric, study.unit) == ("acceptance_length", "questions")
    assert [effect.verdict for effect in study.comparisons] == ["better"]
    other = write_cell(tmp_path / "other", config_of("hass", 3, 0), ["model.alignment.depth=3"], tau=3.0)
    write_records(other, np.random.default_rng(5), 0.9, 40)  # of other questions: not comparable
    with_other = analyse(load_runs([*runs, other], bench))
    assert [name for name, _ in with_other.left_out] == ["other"]
    assert "did not measure this head" in with_other.left_out[0][1]
    assert [row.tau for row in with_other.rows] == [row.tau for row in study.rows]
    with pytest.raises(ValueError, match="measured eagle, hass, but none of these"):
        load_runs([tmp_path / "third"] if write_cell(tmp_path / "third", config_of("x", 1, 0), []) else [], bench)


def test_failed_runs_are_named_and_other_folders_refused(tmp_path):
    folder = write_sweep(tmp_path / "s", NULL, num_questions=5)
    Ledger(folder).append(
        Entry("lost", "failed", ["seed=9"], "hash", "/gone/lost", error="out of memory (exit code 1)")
    )
    study = analyse(load_runs(folder))
    assert study.left_out == [("lost", "out of memory (exit code 1)")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a sweep folder"):
        load_runs(tmp_path / "empty")
    with pytest.raises(ValueError, match="runs is empty"):
        load_runs([])
    with pytest.raises(ValueError, match="baseline=depth=9 matches 0 cells"):
        analyse(load_runs(folder), baseline="depth=9")
    assert analyse(load_runs(folder), baseline="loss=hass,depth=3").baseline == 3
    with pytest.raises(ValueError, match="decoder=medusa"):
        analyse(load_runs(folder), decoder="medusa")


# --- cells and factors -----------------------------------------------------------------------------------------------


def test_keys_that_change_together_are_one_factor_named_by_the_overrides(tmp_path):
    runs = [
        cell(tmp_path, "a", ["experiment=eagle"], **{"m.depth": 1}),
        cell(tmp_path, "b", ["experiment=had"], **{"m.depth": 1, "m.top_k.k": 10, "m.top_k.weight": 1.0}),
        cell(tmp_path, "c", ["experiment=hca"], **{"m.depth": 3}),
        cell(tmp_path, "d", ["experiment=hass"], **{"m.depth": 3, "m.top_k.k": 10, "m.top_k.weight": 1.0}),
    ]
    # four experiments that are fully crossed are two factors
    assert find_factors(runs) == {"depth": [1, 1, 3, 3], "top_k": ["without", "with", "without", "with"]}
    # three are not crossed, and the overrides of the command line distinguish them
    assert find_factors(runs[:3]) == {"experiment": ["eagle", "had", "hca"]}
    words = [cell(tmp_path, f"{k}", [f"model.k={k}", f"seed={k}"], **{"model.k": k}) for k in (1, 5)]
    assert find_factors(words) == {"k": [1, 5]}


def test_an_incomplete_crossing_loses_the_levels_that_are_missing_and_keeps_the_baseline(tmp_path):
    pairs = [(k, w) for k in (1, 10, 100) for w in (0.1, 1.0)] + [(10, 0.0)]
    runs = [cell(tmp_path, f"{k}-{w}", [f"k={k}", f"w={w}"], k=k, w=w) for k, w in pairs]
    cells = make_cells(runs)
    grid = find_grid(cells, baseline=2)
    assert grid.levels == {"k": [10, 1, 100], "w": [0.1, 1.0]}
    assert grid.left_out == ("w=0",)
    assert [cells[position].label for position in grid.cells][:2] == ["k=10, w=0.1", "k=10, w=1"]
    assert find_grid(make_cells(runs[:2]), 0) is None


def top_k_runs(tmp_path):
    """Runs with the overrides and merged configs of the cells of conf/hparams_search/top_k.yaml."""
    text = yaml.safe_load((CONF / "hparams_search" / "top_k.yaml").read_text())
    nodes = re.findall(r"\{.*?\}", text["hydra"]["sweeper"]["params"]["model.loss.terms.top_k"])
    runs = []
    for number, node in enumerate(nodes):
        override = f"model.loss.terms.top_k={node}"
        (parsed,) = OverridesParser.create().parse_overrides([override])
        merged = {f"model.loss.terms.top_k.{key}": level for key, level in ({"k": 10} | parsed.value()).items()}
        runs.append(cell(tmp_path, str(number), [override], **merged))
    return runs


@pytest.mark.parametrize("baseline", [0, 11])
def test_a_node_that_is_swept_whole_is_as_many_factors_as_it_has_keys(tmp_path, baseline):
    runs = top_k_runs(tmp_path)
    cells = make_cells(runs)
    assert len(cells) == 21
    assert (cells[0].label, cells[1].label) == ("weight=0", "weight=0.1, k=1")
    grid = find_grid(cells, baseline)
    assert len(grid.cells) == 20 and 0 not in grid.cells
    assert {name: set(levels) for name, levels in grid.levels.items()} == {
        "k": {1, 5, 10, 50, 100},
        "weight": {0.1, 0.5, 1, 2},
    }
    assert any("weight=0" in each for each in grid.left_out)
    rng = np.random.default_rng(0)
    for run in runs:
        run.folder.mkdir()
        write_records(run.folder, rng, 0.5, 12)
        run.records = read_run(run.folder).records
    study = analyse(runs, cells[baseline].label)
    kinds = [effect.contrast.kind for effect in study.effects]
    assert (kinds.count("main"), kinds.count("interaction")) == (4 + 3, 4 * 3)
    assert len(study.rows) == 21
    assert len({trace.xaxis for trace in response_figure(study).data}) == 2  # a panel per factor


def part_runs(tmp_path, left_out=0):
    """Runs with the overrides and merged configs of the cells of conf/hparams_search/eagle3_parts.yaml."""
    text = yaml.safe_load((CONF / "hparams_search" / "eagle3_parts.yaml").read_text())
    runs = []
    for number, node in enumerate(re.findall(r"\{.*?\}", text["hydra"]["sweeper"]["params"]["parts"])[left_out:]):
        (parsed,) = OverridesParser.create().parse_overrides([f"parts={node}"])
        merged = {f"parts.{key}": level for key, level in parsed.value().items()}
        runs.append(cell(tmp_path, str(number), [f"parts={node}"], **merged))
    return runs


def test_the_half_fraction_of_eagle3_parts_is_reported_by_its_effects(tmp_path):
    """A higher rate with one layer, and nothing else: found as such, and not as something else."""
    runs, rng = part_runs(tmp_path), np.random.default_rng(0)
    for run in runs:
        run.folder.mkdir()
        write_records(run.folder, rng, 0.5 + 0.2 * (run.settings["parts.layers"] == 1), 40)
        run.records = read_run(run.folder).records
    study = analyse(runs)
    assert study.rows[study.baseline].label == "layers=3, lm_head=own, gradient=bptt, feature=0, top_k=0"
    assert (len(study.cells), study.grid.strength, len(study.grid.cells)) == (16, 4, 16)
    kinds = [effect.contrast.kind for effect in study.effects]
    assert (kinds.count("main"), kinds.count("interaction")) == (5, 10)
    assert {each.contrast.name for each in study.effects if each.verdict != "no difference is shown"} == {
        "layers: 1 against 3"
    }
    found = study.effects[0].ratio
    assert found.low > 1.1 and study.effects[0].unit == "questions"
    text = effects_table(study).markdown()
    assert "16 of 32 combinations" in text and "layers: 3, 1; lm_head: own, target" in text


def test_a_fraction_with_a_missing_cell_has_no_effects(tmp_path):
    assert find_grid(make_cells(part_runs(tmp_path)), 0).strength == 4
    assert find_grid(make_cells(part_runs(tmp_path, left_out=1)), 0) is None


def test_overrides_are_parsed_as_by_hydra(tmp_path):
    runs = [cell(tmp_path, lr, [f"model.optimizer.lr={lr}"], x=float(lr)) for lr in ("1e-3", "3e-4", "1e-4")]
    assert find_factors(runs) == {"lr": [1e-3, 3e-4, 1e-4]}
    schedules = ["{0:0,0.8:1}", "{0:1}", "1.0"]
    runs = [cell(tmp_path, str(n), [f"w={each}"], w=each) for n, each in enumerate(schedules)]
    assert find_factors(runs) == {"w": ["{0:0,0.8:1}", "{0:1}", 1.0]}


def test_runs_that_differ_only_in_the_seed_are_one_cell(tmp_path):
    folder = write_sweep(tmp_path / "s", NULL, seeds=(0, 1), num_questions=3)
    cells = make_cells(load_runs(folder))
    assert [len(each.runs) for each in cells] == [2, 2, 2, 2]


def test_repeated_run_counts_once(tmp_path):
    """Two sweeps with a common cell: it counts once, and the other is named."""
    once = write_sweep(tmp_path / "a", INTERACTION, seeds=(0, 1))
    again = write_cell(tmp_path / "again", config_of("hass", 3, 1), [])
    write_records(again, np.random.default_rng(9), 0.72, 40)
    alone, both = analyse(load_runs([once])), analyse(load_runs([once, again]))
    assert len(both.left_out) == 1 and both.left_out[0][0] == "again"
    assert "the same settings and the same seed" in both.left_out[0][1]
    assert [effect.p_adjusted for effect in both.comparisons] == [effect.p_adjusted for effect in alone.comparisons]


def test_loss_and_compute_have_intervals_over_seeds(tmp_path):
    folder = tmp_path / "runs"
    for seed, loss in enumerate((1.4, 1.5, 1.6)):
        run = write_cell(folder / str(seed), config_of("hass", 3, seed), [f"seed={seed}"], tau=2.0)
        curves = run / "csv" / "metrics.csv"
        curves.write_text(curves.read_text().replace("1.5,", f"{loss},", 1))
    study = analyse(load_runs(folder))
    (row,) = study.rows
    assert 1.4 > row.loss.low < row.loss.value < row.loss.high
    assert row.loss.value == pytest.approx(1.5, abs=0.01)
    line = next(csv.DictReader(cells_table(study).csv().splitlines()))
    assert float(line["val_loss_low"]) == pytest.approx(row.loss.low, abs=1e-3)
    assert {"tokens_thousands_low", "tflops_high", "train_seconds_low"} <= set(line)
    alone = analyse(load_runs(folder / "0")).rows[0].loss
    assert alone.value == pytest.approx(1.4) and np.isnan(alone.low)


def test_exposure_gap_compares_target_features_with_decoding(tmp_path):
    """A head that is correct at 70 % on target features at all depths, and at 30 % on its own at depth 3, has a gap."""
    run = write_cell(tmp_path / "run", config_of("hass", 3, 0), [])
    write_records(run, np.random.default_rng(0), 0.5, 40)
    old = analyse(load_runs(run)).rows[0]
    assert old.forced == [old.accuracies[0]] * 3  # not logged yet: step 1 at every depth
    curves = run / "csv" / "metrics.csv"
    names, values = curves.read_text().splitlines()
    forced = [0.7, 0.72, 0.74]
    names += "".join(f",val/forced_accuracy/step{step}" for step in (1, 2, 3))
    curves.write_text(f"{names}\n{values},{','.join(map(str, forced))}\n")
    study = analyse(load_runs(run))
    assert study.rows[0].forced == forced
    left, right = gap_figure(study).data
    assert list(left.y) == pytest.approx([a - rate.value for a, rate in zip(forced, study.rows[0].rates, strict=True)])
    assert list(right.y) == pytest.approx([0, 0.04, 0.08])
    assert loss_terms(read_curves(run)) == []


def test_better_needs_the_interval_and_the_adjusted_p():
    contrast = Contrast("cell", "a against b", (1.0, -1.0))

    def verdict(low, high, p):
        return Effect(contrast, Interval(1.05, low, high), 0.01, p, "seeds", 3, 0.02).verdict

    assert verdict(1.01, 1.09, 0.01) == "better"
    assert verdict(1.01, 1.09, 0.06) == verdict(0.99, 1.11, 0.04) == "no difference is shown"
    worse = Effect(contrast, Interval(0.9, 0.85, 0.95), 0.01, 0.02, "seeds", 3, 0.02)
    assert worse.verdict == "worse"


def test_pareto_front(tmp_path):
    from types import SimpleNamespace

    rows = [SimpleNamespace(tau=SimpleNamespace(value=tau)) for tau in (2.0, 2.5, 2.4, 2.6)]
    assert front(rows, [10.0, 20.0, 30.0, 40.0]) == [0, 1, 3]


# --- why, and the workspace ------------------------------------------------------------------------------------------


def test_why_names_keys_code_and_data_in_one_line(tmp_path, call_command):
    one = write_cell(tmp_path / "one", config_of("eagle", 1, 0), [])
    two = write_cell(
        tmp_path / "two", config_of("eagle", 3, 1), [], git_commit="b" * 40, git_dirty=True,
        versions={"torch": "2.12"}, features={"train": "f2"},
    )  # fmt: skip
    done = call_command("report", f"why=[{one},{two}]")
    assert done.code == 0, done.err
    line, last = done.out.strip().splitlines()[-2:]
    assert json.loads(last)["why"] == line
    assert "model.alignment.depth (1 → 3), seed (0 → 1)" in line
    assert "commit aaaaaaaaaa → bbbbbbbbbb (with uncommitted changes: two), torch 2.13 → 2.12" in line
    assert line.endswith("data: other features (train f1 → f2).")
    same = why_line(read_run(one), read_run(one))
    assert "the same config; code: the same commit aaaaaaaaaa; data: the same features." in same
    assert call_command("report", f"why=[{one}]").code == 1


def test_workspace_is_written_to_a_file_if_it_cannot_be_saved(tmp_path, monkeypatch, caplog):
    study = analyse(load_runs(write_sweep(tmp_path / "s", NULL, num_questions=5)))
    spec = workspace_spec(study, "s", "hass_lightning")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    path = save_workspace(spec, tmp_path)
    assert json.loads(Path(path).read_text()) == spec
    assert "pip install wandb-workspaces" in caplog.text
    axes = {panel.get("x") for section in spec["sections"] for panel in section["panels"]} - {None}
    assert axes == {"trainer/global_step", "compute/tokens", "compute/flops", "compute/seconds"}
    bars = {
        metric for section in spec["sections"] for panel in section["panels"] for metric in panel.get("metrics", [])
    }
    assert {"decode/accept_rate/depth1", "decode/accept_rate/depth3", "final/acceptance_length"} <= bars
    assert spec["group"] == "s"
    loss, depth = spec["group_by"]
    assert loss.startswith("model.loss.terms.top_k.") and depth == "model.alignment.depth"


def test_the_workspace_is_grouped_by_the_keys_that_differ(tmp_path):
    """`weight` is that of the top-K term, not of another term that never changes."""
    cells = []
    for number, (k, weight) in enumerate([(1, 0.1), (1, 2.0), (5, 0.1), (5, 2.0)]):
        config = config_of("hass", 3, 0)
        config["model"]["loss"]["terms"]["top_k"] |= {"k": k, "weight": weight}
        cells.append(write_cell(tmp_path / str(number), config, [f"model.loss.terms.top_k={{k:{k},weight:{weight}}}"]))
    spec = workspace_spec(analyse(load_runs(cells)), "s", "hass_lightning")
    assert sorted(spec["group_by"]) == ["model.loss.terms.top_k.k", "model.loss.terms.top_k.weight"]


def test_a_key_that_follows_the_machine_is_compared_by_its_value(tmp_path):
    runs = []
    for seed, steps in enumerate((225, 150, 150)):
        config = config_of("hass", 3, seed) | {"trainer": {"max_steps": "${hass.by_machine:225,150}"}}
        config["data"] = {"seed": "${seed}"}
        runs.append(write_cell(tmp_path / str(seed), config, []))
        noted = {"trainer.max_steps": steps, "data.seed": seed}
        (runs[-1] / "resume_config.json").write_text(json.dumps(noted))
    first, second, third = map(read_run, runs)
    assert "trainer.max_steps (225 → 150)" in why_line(first, second)
    # runs that differ in the seed are one cell
    assert [len(cell.runs) for cell in analyse([first, second, third]).cells] == [1, 2]


def test_exposure_gap_is_that_of_the_saved_head(tmp_path):
    """It is the gap at the best validation; a worse last one belongs to another head."""
    cell = write_cell(tmp_path / "cell", config_of("hass", 3, 0), [])
    lines = [
        "step,val/acceptance_length,val/loss,val/accuracy/step1",
        "9,1.5,3.0,0.4",
        "19,1.9,2.0,0.6",
        "29,1.7,1.0,0.5",
    ]
    (cell / "csv" / "metrics.csv").write_text("\n".join(lines) + "\n")
    (row,) = analyse([read_run(cell)]).rows
    assert (row.accuracies, row.loss.value) == ([0.6], 2.0)


def test_workspace_and_report_are_built_with_their_classes(tmp_path):
    pytest.importorskip("wandb_workspaces")
    study = analyse(load_runs(write_sweep(tmp_path / "s", NULL, num_questions=5)))
    spec = workspace_spec(study, "s", "hass_lightning", "someone")
    workspace, report = build_workspace(spec), build_report(spec)
    assert [section.name for section in workspace.sections] == [section["name"] for section in spec["sections"]]
    assert [len(each.panels) for each in workspace.sections] == [len(each["panels"]) for each in spec["sections"]]
    assert (workspace.entity, workspace.project, report.project) == ("someone", "hass_lightning", "hass_lightning")
    assert list(report.blocks[1].items) == spec["claims"]


def test_login_and_default_entity_suffice_for_the_workspace(tmp_path, monkeypatch):
    from types import SimpleNamespace

    import wandb

    from hass_lightning.report.study import workspace

    saved = []
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", SimpleNamespace())
    monkeypatch.setattr(workspace, "server_answers", lambda server: True)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="someone"))
    for name in ("build_workspace", "build_report"):
        page = SimpleNamespace(save=lambda: None, url="https://wandb.ai/someone/p")
        monkeypatch.setattr(workspace, name, lambda spec, page=page: saved.append(spec["entity"]) or page)
    study = analyse(load_runs(write_sweep(tmp_path / "s", NULL, num_questions=5)))
    assert save_workspace(workspace_spec(study, "s", "p"), tmp_path) == "https://wandb.ai/someone/p"
    assert saved == ["someone", "someone"]


def test_cells_of_two_studies_are_named_by_what_differs(tmp_path):
    """Not by the names of the studies, which have no effect on results."""
    cells = []
    for number, mask in enumerate(("exact", "leaky")):
        config = config_of("hass", 3, 0)
        config["model"]["alignment"]["mask"] = mask
        words = [f"hparams_search={('alignment_depth', 'mask_leak')[number]}"]
        words += ["model.alignment.mask=leaky"] if mask == "leaky" else []
        cells.append(write_cell(tmp_path / mask, config, words, tau=2.0))
    assert [cell.label for cell in analyse(load_runs(cells)).cells] == ["mask=exact", "mask=leaky"]
