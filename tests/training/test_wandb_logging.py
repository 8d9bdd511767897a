"""A sweep on the tiny target, offline: its .wandb files are read back, and its report is made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = (
    "experiment=smoke", "model.alignment.depth=1,3", "study=depths", "trainer.max_epochs=1", "data.num_validation=6",
    "trainer.log_every_n_steps=2", "callbacks.decoding.num_prompts=3", "callbacks.decoding.num_checked=1",
)  # fmt: skip


def records_of(folder: Path) -> list[dict]:
    """Every record of a run's .wandb file, as the official reader gives them."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_what_a_sweep_logs_offline_is_read_back_and_reported(run_command, call_command, tmp_path):
    done = run_command("train", "-m", *SWEEP)
    assert done.code == 0, done.err[-3000:]
    folder = tmp_path / "runs" / "sweeps" / "depths"
    cells = sorted(path.parent for path in folder.glob("*/metrics.json"))
    assert len(cells) == 2
    names = set()
    for cell in cells:
        text = "\n".join(map(json.dumps, records_of(cell)))
        (run,) = (record for record in records_of(cell) if record["type"] == "run")
        names.add(json.dumps(run))
        for part in ("depths", "train", "loss hass", "depth ", "tiny"):
            assert part in json.dumps(run), (part, run)
        for part in (
            "train/loss", "val/acceptance_length", "val/survival/step1", "decode/accept_rate/depth1", "decode/prompts",
            "decode/accept_rate_by_depth", "final/acceptance_length", "alignment", "draft-", "features-",
            "features.json",             "model.safetensors", "table-file",
        ):  # fmt: skip
            assert part in text, part
        (table,) = cell.glob("wandb/offline-run-*/files/media/table/decode/prompts_*.table.json")
        content = json.loads(table.read_text())
        assert "drafted_and_accepted" in content["columns"] and len(content["data"]) == 6
        manifest = json.loads((cell / "features.json").read_text())
        assert json.loads((cell / "provenance.json").read_text())["features"]["train"] == manifest["train"]["key"]
    assert len(names) == 2 and "depth=1" in "".join(names) and "depth=3" in "".join(names)
    done = call_command("report_command", f"runs={folder}", "wandb=workspace")
    assert done.code == 0, done.err
    result = json.loads(done.out.strip().splitlines()[-1])
    assert [cell["cell"] for cell in result["cells"]] == ["depth=1", "depth=3"]
    assert (result["metric"], result["unit"]) == ("acceptance_length", "questions")
    assert Path(result["files"]["html"]).is_file() and Path(result["files"]["workspace"]).is_file()
    done = call_command("report_command", f"why=[{cells[0]},{cells[1]}]")
    assert "differ in model.alignment.depth" in done.out and "data: the same features" in done.out
