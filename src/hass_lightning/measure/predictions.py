"""Speedups of the decoders of a benchmark that the cost model predicts, next to the measured ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hass_lightning.decoding import Chain, Decoder, DecodingModels, DynamicTree, Hybrid
from hass_lightning.measure.cost_model import CostModel, Tree, time_cycles
from hass_lightning.measure.metrics import acceptance_length, speedup
from hass_lightning.measure.record import BASELINE, Record, group_by, select

log = logging.getLogger(__name__)
TIMED_PROMPTS, TIMED_TOKENS = 3, 24


def predicted_row(name: str, predicted: float, measured: float) -> dict[str, float | int | str]:
    """Return a table row with predicted and measured speedup (without prefill), for the report."""
    return {
        "name": name,
        "predicted_speedup": predicted,
        "measured_speedup": measured,
        "relative_error": predicted / measured - 1,
    }


def tree_of(decoder: Decoder) -> Tree | None:
    """Return (num_nodes, depth, width) of a decoder that the cost model covers, otherwise None."""
    if isinstance(decoder, DynamicTree | Hybrid):
        return decoder.num_nodes, decoder.depth, decoder.width
    return (decoder.depth + 1, decoder.depth, 1) if isinstance(decoder, Chain) else None


def drafting_share(decoder: Decoder, records: Sequence[Record]) -> float:
    """Return the fraction of cycles in which the head drafted.

    In other cycles of a hybrid, the draft is the copied branch only, whose depth is its number of nodes. A tree whose
    nodes are all on the copied branch looks the same and is counted with them (rare).
    """
    if not isinstance(decoder, Hybrid):
        return 1.0
    cycles = [nodes > depth for record in records for nodes, depth in zip(record.nodes, record.drafted, strict=True)]
    return sum(cycles) / len(cycles)


def predicted_rows(
    models: DecodingModels,
    decoders: Mapping[str, Decoder],
    prompts: Sequence[Sequence[int]],
    records: Sequence[Record],
    path: Path,
) -> list[dict[str, Any]]:
    """Return measured speedups (without prefill), and those predicted from a few timed calls and the measured τ.

    Args:
        models: the models by label.
        decoders: the decoders by label.
        prompts: token ids; the first three are timed.
        records: records of the benchmark; greedy ones are used.
        path: file of the fitted costs, written here and read when the benchmark is started again.

    Returns:
        one row per (draft, decoder) with a greedy baseline; empty if nothing can be timed.
    """
    trees = {name: tree for name, decoder in decoders.items() if (tree := tree_of(decoder))}
    greedy = [record for record in records if record.temperature == 0 and record.accepted]
    baseline = [record for record in greedy if record.decoder == BASELINE]
    if not trees or not baseline:
        return []
    if path.exists():
        read = json.loads(path.read_text())
        values: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in read.items()}
        cost = CostModel(**values)
    else:
        chosen = sorted(set(trees.values()))
        try:
            cost = CostModel.fit(*time_cycles(models, prompts[:TIMED_PROMPTS], chosen, max_new_tokens=TIMED_TOKENS))
        except ValueError as error:
            log.warning("no predicted speedup: %s", error)
            return []
        path.write_text(json.dumps(asdict(cost), indent=2) + "\n")
    rows = []
    for name, tree in trees.items():
        for draft, group in group_by(select(greedy, decoder=name), lambda record: record.draft).items():
            drafting = drafting_share(decoders[name], group)
            predicted = cost.speedup(acceptance_length(group), tree, drafting=drafting)
            rows.append(predicted_row(f"{draft} {name}".strip(), predicted, speedup(group, baseline, prefill=False)))
    return rows
