"""Names of sweeps and cells; the ledger under damage and with several writers."""

import os
import re
import subprocess
import sys

import pytest

from hass_lightning.ledger import Entry, Ledger, cell_name, short_hash, sweep_name


def entry(cell, status="completed", **values):
    return Entry(cell, status, ["a=1"], "hash", "folder", **values)


def test_names_need_no_quoting_and_do_not_depend_on_the_order():
    name = cell_name("train", ["a=1", "b=[x, y]"])
    assert re.fullmatch("[a-p]{12}", name)
    assert name == cell_name("train", ["b=[x, y]", "a=1"])
    assert name != cell_name("train", ["b=[x, y]", "a=2"]) != cell_name("prepare", ["b=[x, y]", "a=2"])
    assert short_hash(["ab", "c"]) != short_hash(["a", "bc"])


def test_a_sweep_is_named_by_its_study_or_by_what_it_runs():
    assert sweep_name("depth & top k", "train", ["a=1,2"]) == "depth-top-k"
    name = sweep_name(None, "train", ["a=1,2"], ["hydra.mode=MULTIRUN", "hydra/launcher=subprocess"])
    how = ["hydra.launcher.n_jobs=4", "hydra.sweeper.n_trials=9", "hydra.verbose=true", "hydra.sweep.dir=x"]
    assert sweep_name(None, "train", ["a=1,2"], how) == name
    assert sweep_name(None, "train", ["a=1,2"], ["hydra/sweeper=optuna"]) != name
    assert sweep_name(None, "train", ["a=1,3"]) != name


def test_the_last_entry_of_a_cell_holds(tmp_path):
    ledger = Ledger(tmp_path / "new")
    assert ledger.latest() == {}
    for status in ("running", "failed", "running"):
        ledger.append(entry("x", status))
    done = ledger.append(entry("x", metric=2.5, seconds=1.0, result={"n": 1}))
    ledger.append(entry("y", "running"))
    assert ledger.latest() == {"x": done, "y": ledger.entries()[-1]}


def test_damaged_lines_cost_only_themselves(tmp_path, caplog):
    ledger = Ledger(tmp_path)
    ledger.append(entry("x"))
    with open(ledger.path, "a") as file:
        file.write('{"cell": "y", "sta')  # a kill while writing
    ledger.append(entry("z"))
    with open(ledger.path, "a") as file:
        file.write('\n[1, 2]\n{"cell": "incomplete"}\n\x00\n')
    ledger.append(entry("w"))
    assert list(ledger.latest()) == ["x", "z", "w"]
    assert "line 2 is damaged" in caplog.text


def test_a_later_version_may_add_fields(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append(entry("x"))
    ledger.path.write_text(ledger.path.read_text().replace("{", '{"new": 1, ', 1))
    assert ledger.latest()["x"].status == "completed"


def test_a_cell_is_held_until_every_holder_is_gone(tmp_path):
    ledger = Ledger(tmp_path)
    held = ledger.lock("x")
    assert held is not None and ledger.lock("x") is None
    other = ledger.lock("y")
    assert other is not None
    os.close(other)
    wait = "import sys; sys.stdin.read()"
    heir = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE, pass_fds=[held])
    os.close(held)
    assert ledger.lock("x") is None  # its process still has it
    heir.communicate(b"")
    again = ledger.lock("x")
    assert again is not None
    os.close(again)


@pytest.mark.parametrize("writers", [4])
def test_writers_do_not_mix_their_lines(tmp_path, writers):
    code = (
        "import sys; from hass_lightning.ledger import Entry, Ledger\n"
        "for i in range(20): Ledger(sys.argv[1]).append(Entry(f'{sys.argv[2]}-{i}', 'completed', ['x' * 5000], '', ''))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(number)]) for number in range(writers)]
    assert [process.wait() for process in running] == [0] * writers
    assert len(Ledger(tmp_path).latest()) == 20 * writers
