"""Acceptance in a serving engine compared with acceptance measured here, position by position.

The unit of each test is a cycle that reached the position. Cycles of one question resemble each other, so counts are
divided by the design effect of our questions (Rao and Scott 1992) before Fisher's exact test of two proportions. Holm's
method adjusts the p-values over the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from hass_lightning.measure.engine_counts import EngineCounts
from hass_lightning.measure.metrics import depth_counts
from hass_lightning.measure.record import Record, group_by
from hass_lightning.measure.statistics import holm

LEVEL = 0.05
ALMOST_NOTHING = 0.25  # relative to our rate at position 1: below it, the engine does not run the trained network
SMALL = 0.05  # relative loss that rounding can explain
FASTER = 0.1  # maximum additional relative loss of a deeper position


@dataclass(frozen=True)
class Position:
    """Acceptance at one position, given that all earlier ones were accepted."""

    position: int  # from 1
    ours: float
    served: float
    joint_ours: float  # of all drafts
    joint_served: float
    p_value: float
    p_adjusted: float = 1.0

    @property
    def significant(self) -> bool:
        """Whether a difference is shown at the 5 % level, among all positions."""
        return self.p_adjusted < LEVEL


@dataclass(frozen=True)
class Cause:
    """A likely cause of a difference, the evidence for it, and what to check."""

    name: str
    evidence: str
    check: str


@dataclass(frozen=True)
class ServedComparison:
    """The comparison of our records with the counts of an engine."""

    positions: tuple[Position, ...]
    counts: EngineCounts
    our_depth: int  # drafted tokens per cycle
    our_length: float  # 1 + Σ survival of the compared positions
    served_length: float  # the same for the engine
    is_tree: bool

    @property
    def differs(self) -> bool:
        """Whether a difference is shown at any position."""
        return any(each.significant for each in self.positions)


def design_effect(passed: Sequence[int], reached: Sequence[int]) -> float:
    """Return the variance of Σ passed / Σ reached over questions, divided by that of independent cycles; at least 1."""
    ups, downs = np.asarray(passed, float), np.asarray(reached, float)
    n, total = len(downs), downs.sum()
    rate = ups.sum() / total if total else 0.0
    if n < 2 or not 0 < rate < 1:
        return 1.0
    clustered = n / (n - 1) * ((ups - rate * downs) ** 2).sum() / total**2
    return float(max(1.0, clustered / (rate * (1 - rate) / total)))


def compare_served(records: Sequence[Record], counts: EngineCounts) -> ServedComparison:
    """Compare the records of one head, decoder and sampling with an engine's counts.

    Positions that only one side drafted are not compared.

    Raises:
        ValueError: if the records have no drafts.
    """
    ours = depth_counts(records)
    if not ours:
        raise ValueError("the records have no draft tokens: choose a decoder that drafts, e.g. decoder=chain.")
    questions = [depth_counts(group) for group in group_by(records, lambda record: record.question).values()]
    reached_served = [counts.num_drafts, *counts.accepted]
    found: list[Position] = []
    joint = 1.0
    for k, ((passed, reached), served, offered) in enumerate(
        zip(ours, counts.accepted, reached_served, strict=False), start=1
    ):
        rate, served_rate = (up / down if down else 0.0 for up, down in ((passed, reached), (served, offered)))
        own = [each[k - 1] for each in questions if len(each) >= k]
        effect = design_effect([up for up, _ in own], [down for _, down in own])
        cells = [[passed, reached - passed], [served, offered - served]]
        p_value = stats.fisher_exact(np.round(np.array(cells) / effect).astype(int))[1]
        joint *= rate
        found.append(Position(k, rate, served_rate, joint, served / counts.num_drafts, float(p_value)))
    adjusted = holm([each.p_value for each in found])
    positions = tuple(
        Position(**{**vars(each), "p_adjusted": p}) for each, p in zip(found, adjusted, strict=True)
    )  # fmt: skip
    return ServedComparison(
        positions,
        counts,
        max(depth for record in records for depth in record.drafted),
        1 + sum(each.joint_ours for each in positions),
        1 + sum(each.joint_served for each in positions),
        any(nodes > depth for r in records for nodes, depth in zip(r.nodes, r.drafted, strict=True)),
    )


def likely_causes(found: ServedComparison) -> list[Cause]:
    """Return the likely causes of the differences, most certain first; empty if there are none.

    The pattern over positions suggests a cause but does not prove it.
    """
    counts = found.counts
    num_positions = len(counts.accepted)
    checks = (
        (
            not counts.consistent, "mixed counters",
            f"the engine reports a length of {counts.reported_length:.3f}, but 1 + Σ positions is {counts.length:.3f}",
            "count one model and one setting only: restart the server, or give served_before",
        ),
        (
            found.is_tree, "draft shape", "our records are of a tree, which has several draft tokens per position",
            "compare with decoder=chain if the engine drafts a chain",
        ),
        (
            num_positions != found.our_depth, "draft length",
            f"the engine drafts {num_positions} tokens, our records {found.our_depth}",
            "accepted lengths are not comparable; compare positions, or draft the same number of tokens",
        ),
        (
            0 < counts.mean_drafted < num_positions - 0.05, "shorter drafts",
            f"the engine drafted {counts.mean_drafted:.2f} tokens on average, at most {num_positions}",
            "its positions count short drafts as rejections; look for a length limit or an adaptive setting",
        ),
    )  # fmt: skip
    causes = [Cause(name, evidence, check) for applies, name, evidence, check in checks if applies]
    return [*causes, _by_pattern(found.positions)] if found.differs else causes


def _by_pattern(positions: Sequence[Position]) -> Cause:
    """Return the cause that fits the significant positions best."""
    shown = [each for each in positions if each.significant]
    ratio = {each.position: each.served / each.ours if each.ours else 1.0 for each in positions}
    first = positions[0]
    where = ", ".join(str(each.position) for each in shown)
    if all(each.served > each.ours for each in shown):
        return Cause(
            "other prompts or sampling",
            f"the engine accepts more at position {where}",
            "use the same prompts, chat template, temperature and answer length",
        )
    if first.significant and ratio[1] < ALMOST_NOTHING:
        return Cause(
            "wrong weights",
            f"position 1 is accepted in {first.served:.1%} of the drafts instead of {first.ours:.1%}",
            "export again with hass-export. Known causes: bias: true in config.json, a missing fc.bias in SGLang, a "
            "tensor that was not loaded, features of another layer, another target",
        )
    deeper = [ratio[each.position] for each in positions[1:] if each.ours]
    if deeper and min(deeper) < ratio[1] - FASTER:
        return Cause(
            "draft steps after the first",
            f"position 1 has {ratio[1]:.0%} of our rate, a deeper one {min(deeper):.0%}",
            "the head's predicted features or positions differ in the engine: rope (rope_theta, scaling, positions of "
            "draft steps), a norm before the features are fed back, features of another layer. Rates of a training log "
            "show the same pattern: accuracies on target features are not acceptance rates",
        )
    if all(1 - ratio[each.position] < SMALL for each in shown):
        return Cause(
            "precision",
            f"every difference is below {SMALL:.0%} of our rate",
            "compare dtype and quantization of target and head; in float32 the counts should be equal",
        )
    return Cause(
        "template or prompts",
        f"position {where} is lower, and deeper positions lose no more than the first",
        "compare the token ids of a prompt in both: chat template, system prompt, a second <bos>; then the sampling "
        "temperature and a quantized target",
    )
