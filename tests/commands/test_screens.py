"""Output of commands: recorded sessions of a run and a sweep on terminals of 80 and 120 columns, and without one."""

import io
import json
import logging
import os
import re
import subprocess
import warnings

import pytest
from rich.console import Console

from command_environment import command_environment
from hass_lightning.commands.ending import show_ending, show_sweep_ending, sweep_table
from hass_lightning.runs.ledger import Entry
from hass_lightning.runs.progress import progress_bar
from hass_lightning.runs.screen import Screen, stage
from hydra_plugins.hass_lightning_launcher._cell_lines import CellLines
from terminal import check_snapshot, foreign_lines, run_in_terminal, script, wrapped_lines

STAGES = ["target", "answers", "features", "training", "measuring", "report"]
RESULT = {
    "acceptance_length": 2.44, "acceptance_length_low": 2.26, "acceptance_length_high": 2.62, "speedup": 1.26,
    "speedup_low": 1.18, "speedup_high": 1.35, "num_prompts": 24, "num_checked": 5, "num_identical": 5,
    "train_seconds": 1240.0, "run_dir": "runs/quickstart",
}  # fmt: skip


def cell(number, loss, depth, **more):
    words = ["experiment=smoke", f"model/loss={loss}", f"model.alignment.depth={depth}"]
    return Entry(
        f"c{number}", more.pop("status", "completed"), words, "", f"runs/sweeps/s/loss={loss},depth={depth}", **more
    )


CELLS = [
    cell(0, "eagle", 1, result=RESULT),
    cell(1, "eagle", 3, result=RESULT | {"acceptance_length": 2.51}),
    cell(2, "hass", 1, result={**RESULT, "speedup": None, "speedup_low": None}),
    cell(3, "hass", 0, status="failed", error="model.alignment.depth=0 must be at least 1. (exit code 1)\n  more"),
]


# --- in this process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_the_end_of_a_run_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = io.StringIO()
    show_ending("train", RESULT, {"W&B": "wandb sync runs/quickstart/wandb/offline-run-1"}, out)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    (row,) = [line for line in lines if "acceptance length τ" in line]
    assert "2.44" in row and "[2.26, 2.62]" in row
    assert sum("wandb sync" in line for line in lines) == 1
    assert sum(line.startswith("  hass-") for line in lines) == 3


@pytest.mark.parametrize("columns", [80, 120])
def test_the_end_of_a_sweep_has_its_axes_its_best_cell_and_why_one_failed(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = io.StringIO()
    show_sweep_ending(CELLS, "runs/sweeps/s", None, out)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= columns
    head = next(line for line in lines if "interval" in line)
    assert head.split()[:2] == ["loss", "depth"] and "experiment" not in head
    (best,) = [line for line in lines if line.endswith("best")]
    assert "eagle" in best and "2.51" in best
    (reason,) = [line for line in lines if line.startswith("✗")]
    assert reason == "✗ loss=hass,depth=0: model.alignment.depth=0 must be at least 1. (exit code 1)"
    assert sum(row.startswith((" eagle", " hass")) or row.startswith(("eagle", "hass")) for row in lines) == 4


def test_a_table_is_never_folded():
    console = Console(file=io.StringIO(), width=70)
    console.print(sweep_table(CELLS))
    rows = [line for line in console.file.getvalue().splitlines() if "eagle" in line or "hass" in line]
    assert len(rows) == len(CELLS)


def test_stages_are_ticked_off_and_a_failed_one_is_marked():
    out = io.StringIO()
    screen = Screen(["target", "answers", "training"], out, out)
    with pytest.raises(ValueError, match="broken"), screen.shown():
        with stage("target") as loading:
            loading.detail = "tiny"
        with stage("starting"):
            pass
        with progress_bar("questions", 40, "question") as bar:
            bar.update(40)
        with stage("answers"), progress_bar("answers", 40, "answer") as bar:
            bar.update(10)
            assert bar.count == "10/40 answers"
            raise ValueError("broken")
    lines = [line.split()[:2] for line in out.getvalue().splitlines()]
    assert lines == [["✓", "target"], ["✗", "answers"], ["·", "training"]]


def test_a_cell_has_a_line_with_its_remaining_time_while_it_runs(tmp_path):
    out = io.StringIO()
    screen = Screen((), out, out)
    log_file = tmp_path / "job.log"
    log_file.write_text("12:00:00 stage: training\n12:00:15 step 8 of 16, loss 6.1, 3.90 steps/s, 0:00:02 left\n")
    with screen.shown():
        lines = CellLines()
        lines.started("c0", "experiment=smoke,max_steps=4,loss=eagle,depth=1", log_file)
        lines.tick(2, 1)
        console = Console(file=io.StringIO(), width=80)
        console.print(screen)
        (line,) = console.file.getvalue().splitlines()
        assert "loss=eagle,depth=1" in line and "stage: 0:00:02 left" in line
        lines.ended("c0", "experiment=smoke,max_steps=4,loss=eagle,depth=1", "completed, 60 s [1 of 2]", 60.0, False)
        lines.started("c1", "loss=hass,depth=1", log_file)
        lines.tick(1, 1)
        assert screen.note.startswith("1 to go, about 0:0")
        assert screen.stages[0].detail.startswith("about 0:0")
        lines.ended("c1", "loss=hass,depth=1", "failed, 2 s [2 of 2]", 2.0, True)
        lines.tick(0, 1)
        assert not screen.stages and not screen.note
    said = [line for line in out.getvalue().splitlines() if line.strip()]
    assert said[0].startswith("✓ …") and said[0].endswith("[1 of 2]") and len(said[0]) <= 80
    assert said[1].startswith("✗ loss=hass")


def test_rate_and_remaining_time_leave_out_what_an_earlier_attempt_did(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("hass_lightning.runs.screen.time.monotonic", lambda: now[0])
    with progress_bar("features", 1000, "token") as bar:
        bar.started = bar.last_line = now[0]
        bar.update(400)  # found on disk
        now[0] += 10
        bar.update(100)
        assert bar.rate == 10.0
        assert bar.left == "0:00:50 left"
        assert bar.count == "500/1,000 tokens"


def test_a_command_leaves_warnings_logging_and_environment_as_they_were(call_command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    call_command("prepare", "cache=list")  # state that the imports of libraries set is not restored
    lightning = logging.getLogger("lightning.pytorch")
    before = (list(warnings.filters), dict(os.environ), list(lightning.handlers), lightning.propagate)
    streams = [getattr(handler, "stream", None) for handler in lightning.handlers]
    ours = logging.getLogger("hass_lightning")
    level, handlers = ours.level, list(ours.handlers)
    assert call_command("prepare", "cache=list").code == 0
    environment = {key: value for key, value in os.environ.items() if key != "HASS_LIGHTNING_ROOT"}
    expected = {key: value for key, value in before[1].items() if key != "HASS_LIGHTNING_ROOT"}
    assert (list(warnings.filters), environment, list(lightning.handlers), lightning.propagate) == (
        before[0], expected, before[2], before[3],
    )  # fmt: skip
    assert [getattr(handler, "stream", None) for handler in lightning.handlers] == streams
    assert (ours.level, ours.handlers) == (level, handlers)


def test_output_json_is_one_object_on_stdout_and_nothing_else(call_command):
    done = call_command("prepare", "cache=list", "output=json")
    assert done.code == 0
    assert len(done.out.splitlines()) == 1 and json.loads(done.out)["feature_sets"] is not None


# --- recorded sessions (slow) ----------------------------------------------------------------------------------------

WIDTHS = pytest.mark.parametrize("columns", [80, 120, None], ids=["80", "120", "without_terminal"])


@pytest.fixture
def session(tmp_path, tmp_path_factory, columns):
    """Runs commands in one folder, on a terminal of `columns` or without one; their output is recorded and checked.

    `live(text)` says whether a screen is the one to record while a command runs.
    """
    cache = tmp_path_factory.mktemp("cache")  # without features of other tests
    environment = command_environment(tmp_path, cache)
    for name in ("COLUMNS", "WANDB_SILENT"):
        environment.pop(name, None)
    place = str(columns or "without_terminal")

    def run(name, command, *words, code=0, live=None):
        start, seen = [*script(command), *words], []
        if columns:
            keep = (lambda text: seen.append(text) if not seen and live(text) else None) if live else None
            text, ended = run_in_terminal(start, columns, cwd=tmp_path, env=environment, watch=keep)
            assert not wrapped_lines(text, columns)
        else:
            done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            text, ended = f"--- stdout\n{done.stdout}--- stderr\n{done.stderr}", done.returncode
        assert ended == code, text
        assert not foreign_lines(text)
        record(f"{name}_{place}", text.replace(str(tmp_path), "FOLDER").replace(str(cache), "CACHE"))
        if columns and live:
            assert seen, "the screen to record was never shown"
            assert not wrapped_lines(seen[0], columns)
            record(f"{name}_live_{place}", seen[0])
        return text

    return run


def record(name, text):
    """Compare with the snapshot, without lines that come every 15 seconds, and without the best cell of equal ones."""
    text = re.sub(
        r"(draft=runs[^ ]*num_checked=\d+),loss=\w+", r"\1,loss=BEST", re.sub(r"( \S*×.*?) +best\b", r"\1", text)
    )
    check_snapshot(name, "\n".join(line for line in text.splitlines() if not re.match(r"\d\d:\d\d:\d\d .* left", line)))


def in_training(text):
    """A list with a bar and the numbers of training."""
    return bool(re.search(r"^• training .* left$", text, re.MULTILINE)) and "loss" in text and "best" in text


def in_a_sweep(text):
    """A cell that is done, and one with its remaining time."""
    return bool(re.search(r"^✓", text, re.MULTILINE) and re.search(r"^• .* left", text, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.timeout(3000)  # minutes on a busy machine
@WIDTHS
def test_a_run(session, columns, tmp_path):
    text = session("run", "train", "experiment=smoke", live=in_training)
    if columns:
        assert [line.split()[1] for line in text.splitlines() if line.startswith("✓")] == STAGES
    else:
        *lines, last = text.partition("--- stderr")[0].splitlines()[1:]
        assert json.loads(last)["num_prompts"] == 4
        assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
        said = [line.split("stage: ")[1] for line in lines if "stage: " in line]
        assert [name for name in said if name in STAGES] == STAGES
    assert text.count("wandb sync") == 1
    log = (tmp_path / "runs/smoke/log.txt").read_text()
    for said in ("GPU available", "wandb: Run summary", "Trainer.fit", "features take"):
        assert said in log
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    session("finished", "train", "experiment=smoke")


@pytest.mark.slow
@pytest.mark.timeout(3000)  # minutes on a busy machine
@WIDTHS
def test_a_sweep_of_four_cells(session, columns, tmp_path):
    few = ("logger=csv", "trainer.max_steps=4", "callbacks.decoding.num_prompts=2", "callbacks.decoding.num_checked=1")
    axes = ("model/loss=eagle,hass", "model.alignment.depth=1,0")
    words = ("-m", "experiment=smoke", *few, *axes, "study=four")
    text = session("sweep", "train", *words, code=1, live=in_a_sweep)  # two cells fail
    page = tmp_path / "runs/sweeps/four/report/report.html"
    assert page.stat().st_size < 1_000_000
    assert "runs/sweeps/four/report/report.html" in text
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
