"""Synthetic sweeps: a ledger, and run folders with config, curves, metrics and records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from hass_lightning.measure.record import Record
from hass_lightning.runs.ledger import Entry, Ledger, cell_id

DEPTH = 3


def config_of(loss: str, depth: int, seed: int, **more) -> dict:
    """Return the relevant part of a config as in `.hydra/config.yaml`."""
    terms = {"soft_ce": {"_target_": "hass_lightning.losses.SoftCrossEntropy", "weight": 0.1}}
    if loss == "hass":
        terms["top_k"] = {"_target_": "hass_lightning.losses.TopK", "weight": 1.0, "k": 10}
    model = {"alignment": {"depth": depth}, "loss": {"terms": terms}, **more}
    return {"seed": seed, "name": "x", "paths": {"run_dir": "/home/someone"}, "model": model, "logger": {"a": loss}}


def write_records(folder: Path, rng, rate: float, num_questions: int, draft: str = "draft") -> None:
    """Write chains of `DEPTH` whose tokens are accepted with `rate` (shifted by question), and their baseline."""
    lines = []
    for number in range(num_questions):
        ease = float(np.clip(rate + 0.08 * np.sin(number), 0.05, 0.95))
        accepted = [int(n) for n in np.minimum(rng.geometric(1 - ease, 14) - 1, DEPTH)]
        tokens = 1 + sum(accepted) + len(accepted)
        ours = Record("validation", f"q{number}", 0, draft, "dynamic_tree", num_tokens=tokens)
        ours.accepted, ours.drafted, ours.nodes = accepted, [DEPTH] * 14, [8] * 14
        ours.seconds = {"prefill": 0.01, "verify": 0.03 * 14}
        base = Record("validation", f"q{number}", 0, "", "autoregressive", num_tokens=tokens)
        base.accepted, base.drafted, base.nodes = [0] * (tokens - 1), [0] * (tokens - 1), [0] * (tokens - 1)
        base.seconds = {"prefill": 0.01, "verify": 0.02 * (tokens - 1)}
        lines += [base.to_json(), ours.to_json()]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")


def write_cell(folder: Path, config: dict, overrides: list[str], tau: float | None = None, **lineage) -> Path:
    """Write a finished run folder."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    metrics = {"simulated_acceptance_length": 1.9, "train_seconds": 100.0 * config["model"]["alignment"]["depth"]}
    (folder / "metrics.json").write_text(json.dumps(metrics | ({"acceptance_length": tau} if tau else {})))
    provenance = {
        "git_commit": "a" * 40,
        "git_dirty": False,
        "versions": {"torch": "2.13"},
        "features": {"train": "f1"},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance | lineage))
    (folder / "csv").mkdir()
    columns = {"step": 9, "val/loss": 1.5, "compute/tokens": 5000.0, "compute/flops": 2e12, "compute/seconds": 90.0}
    columns |= {f"val/accuracy/step{step}": 0.6 - 0.04 * step for step in range(1, DEPTH + 1)}
    text = ",".join(columns) + "\n" + ",".join(map(str, columns.values())) + "\n"
    (folder / "csv" / "metrics.csv").write_text(text)
    return folder


def write_sweep(folder: Path, rates: dict[tuple[str, int], float], seeds=(0,), num_questions=40, rng_seed=0) -> Path:
    """Write a sweep of loss × depth × seeds with a ledger; `rates` are the acceptance rates of the cells."""
    rng, ledger = np.random.default_rng(rng_seed), Ledger(folder)
    for (loss, depth), rate in rates.items():
        for seed in seeds:
            overrides = [f"model/loss={loss}", f"model.alignment.depth={depth}", f"seed={seed}"]
            name = cell_id("train", overrides)
            cell = write_cell(folder / name, config_of(loss, depth, seed), overrides)
            write_records(cell, rng, rate, num_questions)
            ledger.append(Entry(name, "completed", overrides, "hash", f"/gone/{name}", metric=2.0, seconds=60.0))
    return folder
