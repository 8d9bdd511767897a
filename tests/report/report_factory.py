"""Small synthetic runs and records for the tests of the report."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from hass_lightning.measure.metrics import Record


class Words:
    """A tokenizer of eight words; tokens 6 and 7 are the two halves of one character."""

    pieces = (" the", " a", "<script>alert(1)</script>", "\n", " of", ".")

    def decode(self, ids: list[int]) -> str:
        text = ""
        for position, token in enumerate(ids):
            if token == 6:
                text += "" if ids[position + 1 : position + 2] == [7] else "\ufffd"
            elif token == 7:
                text += "é" if position and ids[position - 1] == 6 else "\ufffd"
            else:
                text += self.pieces[token % 6]
        return text


def make_record(
    decoder: str = "chain",
    draft: str = "hass",
    benchmark: str = "mt_bench",
    prompt_id: str = "p0",
    accepted: tuple[int, ...] = (2, 0, 3, 1),
    depth: int = 3,
    nodes: int | None = None,
    temperature: float = 0.0,
    cycle_seconds: float = 0.02,
) -> Record:
    """Return an answer with tokens 0, 1, 2 … modulo 8; rejected tokens of a chain are token 5."""
    record = Record(benchmark, prompt_id, 0, draft, decoder, temperature=temperature, target="tiny/float32")
    record.max_new_tokens = 64
    record.rule = "deterministic" if temperature else "greedy"
    nodes = depth if nodes is None else nodes
    ids = [0]
    for count in accepted:
        path = [(len(ids) + i) % 8 for i in range(count)]
        record.proposals.append(path + [5] * (nodes - count))
        ids += [*path, (len(ids) + count) % 8]
    record.token_ids, record.num_tokens = ids, len(ids)
    record.accepted, record.drafted = list(accepted), [depth] * len(accepted)
    record.nodes = [nodes] * len(accepted)
    spent = cycle_seconds * len(accepted)
    record.seconds = {"prefill": 0.01, "draft": 0.2 * spent, "verify": 0.7 * spent, "bookkeeping": 0.1 * spent}
    if decoder != "autoregressive" and not temperature:
        record.identical = record.fp32_identical = True
    return record


def make_records(
    drafts: tuple[str, ...] = ("eagle", "hass"),
    benchmarks: tuple[str, ...] = ("mt_bench", "gsm8k"),
    temperatures: tuple[float, ...] = (0.0, 1.0),
    num_prompts: int = 4,
) -> list[Record]:
    """Return records of a benchmark in random order, as they are written."""
    rng, records = random.Random(0), []
    for benchmark in benchmarks:
        for number in range(num_prompts):
            for temperature in temperatures:
                place = {"benchmark": benchmark, "prompt_id": f"p{number}", "temperature": temperature}
                records.append(make_record("autoregressive", "", accepted=(0,) * 12, depth=0, nodes=0, **place))
                for draft in drafts:
                    counts = tuple(rng.randint(0, 3) for _ in range(6))
                    records.append(make_record("chain", draft, accepted=counts, **place))
                    records.append(make_record("dynamic_tree", draft, accepted=counts[::-1], nodes=7, **place))
    rng.shuffle(records)
    return records


def write_run(folder: Path, num_steps: int = 100, depth: int = 3) -> Path:
    """Write a run folder: curves, provenance, config."""
    rows = []
    for step in range(num_steps):
        row: dict[str, object] = {"step": step, "epoch": 0, "train/loss": 5 - step / num_steps, "lr-AdamW": 1e-3}
        for number in range(1, depth + 1):
            row |= {f"train/{term}/step{number}": 1.0 + number - step / 200 for term in ("feature", "top_k")}
            row[f"train/accuracy/step{number}"] = 0.6 - 0.1 * number
        rows.append(row)
        if step % 25 == 24:
            values = {f"val/survival/step{k}": 0.6**k for k in range(1, 6)}
            values |= {f"val/accuracy/step{k}": 0.6 for k in range(1, 6)}
            rows.append({"step": step, "epoch": 0, "val/loss": 4.0, "val/acceptance_length": 2.1, **values})
    names = list(dict.fromkeys(name for row in rows for name in row))
    (folder / "csv").mkdir(parents=True)
    with (folder / "csv" / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(
        "target:\n  path: /home/someone/models/llama\n  url: https://example.org/a/b\nseed: 0\n"
        "paths:\n  run_dir: /home/someone/runs/x\nmodel:\n  _target_: hass_lightning.training.module.HassModule\n"
    )
    (folder / "provenance.json").write_text(
        json.dumps({"argv": ["hass-train", "data.path=/home/someone/q.jsonl"], "versions": {"torch": "2.9", "w": None}})
    )
    (folder / "train_seconds.json").write_text('{"train_seconds": 90}')
    return folder
