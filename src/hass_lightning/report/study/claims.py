"""Findings in words. A claim says better or worse only where its interval and its adjusted p-value say so."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hass_lightning.measure.factorial import Effect
from hass_lightning.report.study.analysis import DECODED, Study

ABOUT = {
    "seeds": "Tests: log τ = cell + seed, Student's t on the pooled residuals. They are about these training methods, "
    "on these questions.",
    "questions": "One run a cell: tests are paired over questions. They are about these heads on these questions; a "
    "verdict on methods needs several seeds.",
    "": "Nothing could be tested: there is neither a second seed nor the same five questions, decoded in all cells.",
}


@dataclass(frozen=True)
class Claim:
    """One sentence and what it rests on."""

    text: str
    evidence: str


def percent(effect: Effect) -> str:
    """`+4.1 % [1.0, 7.2]`: a ratio as a relative difference."""
    value, low, high = (100 * (end - 1) for end in (effect.ratio.value, effect.ratio.low, effect.ratio.high))
    return f"{value:+.1f} % [{low:.1f}, {high:.1f}]"


def evidence(effect: Effect) -> str:
    """Interval, p, number of units, what they can resolve."""
    found = f"{percent(effect)}, p = {effect.p_adjusted:.2g} (Holm), {effect.count} {effect.unit}"
    return f"{found} can resolve {100 * effect.detectable:.1f} %" if math.isfinite(effect.detectable) else found


def claims_of(study: Study) -> list[Claim]:
    """One claim a test, in the order: cells against the baseline, main effects, interactions."""
    name = "τ" if study.metric == DECODED else "simulated τ"
    claims = []
    for effect in study.comparisons:
        cell, _, home = effect.contrast.name.partition(" against ")
        text = {
            "better": f"{cell} has a better (higher) {name} than {home}",
            "worse": f"{cell} has a worse (lower) {name} than {home}",
        }.get(effect.verdict, f"no difference in {name} is shown between {cell} and {home}")
        claims.append(Claim(text, evidence(effect)))
    for effect in study.effects:
        direction = {"better": "raises", "worse": "lowers"}.get(effect.verdict)
        if effect.contrast.kind == "main":
            factor, _, change = effect.contrast.name.partition(": ")
            to, _, start = change.partition(" against ")
            text = (
                f"{factor} {to} instead of {start} {direction} {name}, on average over the other factors"
                if direction
                else f"no main effect of {factor} ({to} against {start}) is shown"
            )
        else:
            stronger = {"better": "add to more than", "worse": "add to less than"}.get(effect.verdict)
            text = (
                f"{effect.contrast.name}: together they {stronger} the product of their separate effects on {name}"
                if stronger
                else f"no interaction of {effect.contrast.name} is shown"
            )
        claims.append(Claim(text, evidence(effect)))
    return claims
