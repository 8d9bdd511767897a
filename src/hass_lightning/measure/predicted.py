"""Predicted beside measured speedup of the trees and chains of a benchmark, for its report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hass_lightning.decoding import Chain, DynamicTree
from hass_lightning.decoding.models import Decoder, DecodingModels
from hass_lightning.measure.cost_model import CostModel, Tree, time_cycles
from hass_lightning.measure.records import acceptance_length, speedup
from hass_lightning.measure.trace import BASELINE, Record

log = logging.getLogger(__name__)
TIMED_PROMPTS, TIMED_TOKENS = 3, 24


def tree_of(decoder: Decoder) -> Tree | None:
    """What the cost model knows of a decoder: (num_nodes, depth, width), or None."""
    if isinstance(decoder, DynamicTree):
        return decoder.num_nodes, decoder.depth, decoder.width
    return (decoder.depth + 1, decoder.depth, 1) if isinstance(decoder, Chain) else None


def predicted_rows(
    models: DecodingModels,
    decoders: Mapping[str, Decoder],
    prompts: Sequence[Sequence[int]],
    records: Sequence[Record],
    path: Path,
) -> list[dict[str, Any]]:
    """The speedup (without prefill) that a few timed calls and the measured τ predict, and the measured one.

    Args:
        prompts: token ids; the first three are timed. records: of the benchmark, greedy ones are used.
        path: the fitted costs, written here and read from here when the benchmark is started again.

    Returns:
        one row a (draft, decoder) with a greedy baseline; empty where nothing can be timed.
    """
    trees = {name: tree for name, decoder in decoders.items() if (tree := tree_of(decoder))}
    greedy = [record for record in records if record.temperature == 0 and record.accepted]
    baseline = [record for record in greedy if record.decoder == BASELINE]
    if not trees or not baseline:
        return []
    if path.exists():
        values = json.loads(path.read_text())
        read: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        cost = CostModel(**read)
    else:
        chosen = sorted(set(trees.values()))
        try:
            timed = time_cycles(models, prompts[:TIMED_PROMPTS], chosen, max_new_tokens=TIMED_TOKENS)
        except ValueError as error:
            log.warning("no predicted speedup: %s", error)
            return []
        cost = CostModel.fit(*timed)
        path.write_text(json.dumps(asdict(cost), indent=2) + "\n")
    rows = []
    for name, tree in trees.items():
        for draft in dict.fromkeys(record.draft for record in greedy if record.decoder == name):
            group = [record for record in greedy if (record.draft, record.decoder) == (draft, name)]
            tau, measured = acceptance_length(group), speedup(group, baseline, prefill=False)
            predicted = cost.speedup(tau, tree)
            rows.append(
                {
                    "name": f"{draft} {name}".strip(),
                    "predicted_speedup": predicted,
                    "measured_speedup": measured,
                    "relative_error": predicted / measured - 1,
                }
            )
    return rows
