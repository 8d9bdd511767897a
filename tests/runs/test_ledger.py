"""Names of sweeps and cells; the ledger with damaged lines and with several writers."""

import re
import subprocess
import sys

import pytest

from hass_lightning.runs.ledger import Entry, Ledger, cell_id, short_hash, sweep_name


def entry(cell, status="completed", **values):
    return Entry(cell, status, ["a=1"], "hash", "folder", **values)


def test_ids_need_no_quoting_and_do_not_depend_on_the_order():
    name = cell_id("train", ["a=1", "b=[x, y]"])
    assert re.fullmatch("[a-p]{12}", name)
    assert name == cell_id("train", ["b=[x, y]", "a=1"])
    assert name != cell_id("train", ["b=[x, y]", "a=2"]) != cell_id("prepare", ["b=[x, y]", "a=2"])
    assert short_hash(["ab", "c"]) != short_hash(["a", "bc"])


def test_sweep_name_is_its_study_or_a_hash_of_its_overrides():
    assert sweep_name("depth & top k", "train", ["a=1,2"]) == "depth-top-k"
    name = sweep_name(None, "train", ["a=1,2"], ["hydra.mode=MULTIRUN", "hydra/launcher=subprocess"])
    how = ["hydra.launcher.n_jobs=4", "hydra.sweeper.n_trials=9", "hydra.verbose=true", "hydra.sweep.dir=x"]
    assert sweep_name(None, "train", ["a=1,2"], how) == name
    assert sweep_name(None, "train", ["a=1,2"], ["hydra/sweeper=optuna"]) != name
    assert sweep_name(None, "train", ["a=1,3"]) != name


def test_a_cell_writes_where_it_wrote_before(tmp_path):
    ledger = Ledger(tmp_path / "moved")
    ledger.append(Entry("abcdefghijkl", "failed", ["a=1"], "h", "/elsewhere/sweep/abcdefghijkl"))  # an old sweep
    ledger.append(Entry("x", "failed", ["a=2"], "h", "/elsewhere/sweep/a=2"))
    wanted = ledger.folder / "a=2"
    assert ledger.new_folder("abcdefghijkl", wanted, {}) == ledger.folder / "abcdefghijkl"
    assert ledger.new_folder("x", wanted, {}) == wanted
    assert ledger.new_folder("y", wanted, {}) == ledger.folder / "a=2-y"  # another key whose last part is `a`
    assert ledger.new_folder("z", ledger.folder / "b", {"y": ledger.folder / "b"}) == ledger.folder / "b-z"
    assert [ledger.folder_of(each).name for each in ledger.latest().values()] == ["abcdefghijkl", "a=2"]


def test_the_last_entry_of_a_cell_holds(tmp_path):
    ledger = Ledger(tmp_path / "new")
    assert ledger.latest() == {}
    for status in ("running", "failed", "running"):
        ledger.append(entry("x", status))
    done = ledger.append(entry("x", metric=2.5, seconds=1.0, result={"n": 1}))
    ledger.append(entry("y", "running"))
    assert ledger.latest() == {"x": done, "y": ledger.entries()[-1]}


def test_damaged_lines_are_skipped(tmp_path, caplog):
    ledger = Ledger(tmp_path)
    ledger.append(entry("x"))
    with open(ledger.path, "a") as file:
        file.write('{"cell": "y", "sta')  # killed while writing
    ledger.append(entry("z"))
    with open(ledger.path, "a") as file:
        file.write('\n[1, 2]\n{"cell": "incomplete"}\n\x00\n')
    ledger.append(entry("w"))
    assert list(ledger.latest()) == ["x", "z", "w"]
    assert "line 2 is damaged" in caplog.text


def test_unknown_fields_are_ignored(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append(entry("x"))
    ledger.path.write_text(ledger.path.read_text().replace("{", '{"new": 1, ', 1))
    assert ledger.latest()["x"].status == "completed"


def test_lock_is_held_until_every_process_with_it_ends(tmp_path):
    ledger = Ledger(tmp_path)
    held = ledger.lock("x")
    assert held is not None and ledger.lock("x") is None
    other = ledger.lock("y")
    assert other is not None
    other.release()
    wait = "import sys; sys.stdin.read()"
    heir = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE, pass_fds=held.descriptors)
    held.release()
    assert ledger.lock("x") is None  # its process still holds it
    heir.communicate(b"")
    again = ledger.lock("x")
    assert again is not None
    again.release()


@pytest.mark.parametrize("writers", [4])
def test_concurrent_writers_do_not_mix_lines(tmp_path, writers):
    code = (
        "import sys; from hass_lightning.runs.ledger import Entry, Ledger\n"
        "for i in range(20): Ledger(sys.argv[1]).append(Entry(f'{sys.argv[2]}-{i}', 'completed', ['x' * 5000], '', ''))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(number)]) for number in range(writers)]
    assert [process.wait() for process in running] == [0] * writers
    assert len(Ledger(tmp_path).latest()) == 20 * writers
