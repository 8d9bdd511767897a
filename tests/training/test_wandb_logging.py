"""A sweep on the tiny target, offline: its .wandb files are read back, and its report is made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = (
    "experiment=smoke", "model.alignment.depth=1,3", "study=depths", "trainer.max_epochs=1", "data.num_validation=6",
    "trainer.log_every_n_steps=2", "callbacks.decoding.num_prompts=5", "callbacks.decoding.num_checked=1",
    "callbacks.decoding.max_new_tokens=12",
)  # fmt: skip
CURVES = {"train/loss", "train/top_k/step1", "val/acceptance_length", "val/survival/step5", "decode/accept_rate/depth1"}


def logged(folder: Path) -> dict[str, list[dict]]:
    """Return the records of a run's .wandb file by type, read with the official reader."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, list[dict]] = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record.get(record["type"], record))
    return found


def check_run(folder: Path, depth: int) -> None:
    """Check group, name, tags, config, axes, curves, tables and artifacts of one cell."""
    records = logged(folder)
    (run,) = records["run"]
    assert (run["run_group"], run["job_type"]) == ("depths", "train")
    assert run["display_name"].startswith("smoke ") and f"depth={depth}" in run["display_name"]
    assert run["tags"] == ["tiny", "loss hass", f"depth {depth}"]
    assert run["config"]["update"]["model"]["alignment"]["depth"] == depth
    metrics = {metric.get("name"): metric for metric in records["metric"]}
    assert {"trainer/global_step", "compute/tokens", "compute/flops", "compute/seconds"} <= set(metrics)
    assert metrics["val/acceptance_length"]["summary"] == {"max": True}
    curves = {key for row in records["history"] for key in row["item"]}
    assert curves >= CURVES, CURVES - curves
    assert any(key.startswith("decode/prompts") for key in curves)
    assert any(key.startswith("decode/accept_rate_by_depth") for key in curves)
    assert "final/acceptance_length" in {key for row in records["summary"] for key in row.get("update", {})}
    files = {
        artifact["type"]: {each["path"] for each in artifact["manifest"]["contents"]}
        for artifact in records["artifact"]
    }
    assert files["model"] == {"config.json", "model.safetensors"} and files["dataset"] == {"features.json"}
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/decode/prompts_*.table.json")
    content = json.loads(table.read_text())
    marked = content["columns"].index("drafted_and_accepted")
    assert len(content["data"]) == 2 * 5  # five prompts, two decoders
    assert any("⟨" in row[marked] or "⟦" in row[marked] for row in content["data"])


@pytest.mark.slow
def test_what_a_sweep_logs_offline_is_read_back_and_reported(run_command, call_command, tmp_path):
    done = run_command("train", "-m", *SWEEP)
    assert done.code == 0, done.err[-3000:]
    folder = tmp_path / "runs" / "sweeps" / "depths"
    done = call_command("report", f"runs={folder}", "wandb=workspace")
    assert done.code == 0, done.err
    result = json.loads(done.out.strip().splitlines()[-1])
    assert [cell["cell"] for cell in result["cells"]] == ["depth=1", "depth=3"]
    assert (result["metric"], result["unit"]) == ("acceptance_length", "questions")
    assert Path(result["files"]["html"]).is_file() and Path(result["files"]["workspace"]).is_file()
    cells = {}
    for path in folder.glob("*/metrics.json"):
        overrides = (path.parent / ".hydra" / "overrides.yaml").read_text()
        cells[3 if "depth=3" in overrides else 1] = path.parent
    for depth, cell in cells.items():
        check_run(cell, depth)
        manifest = json.loads((cell / "features.json").read_text())
        assert json.loads((cell / "provenance.json").read_text())["features"]["train"] == manifest["train"]["key"]
    done = call_command("report", f"why=['{cells[1]}','{cells[3]}']")
    assert "differ in model.alignment.depth (1 → 3); code: " in done.out and "data: the same features" in done.out
