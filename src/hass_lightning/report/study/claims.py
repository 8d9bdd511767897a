"""Findings as sentences. A claim says better or worse only if its interval and its adjusted p-value agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hass_lightning.measure.factorial import NOTHING_SHOWN, Effect
from hass_lightning.report.study.analysis import DECODED, Study
from hass_lightning.runs.names import counted

ABOUT = {
    "seeds": "Tests: log τ = cell + seed, Student's t on the pooled residuals. They hold for these training methods "
    "on these questions.",
    "questions": "One run per cell: tests are paired over questions. They hold for these heads on these questions; a "
    "verdict on methods needs several seeds.",
    "": "Nothing could be tested: this needs a second seed, or at least five questions decoded in all cells.",
}


TEXTS = {
    ("cell", "better"): "{a} has a better (higher) {tau} than {b}",
    ("cell", "worse"): "{a} has a worse (lower) {tau} than {b}",
    ("cell", NOTHING_SHOWN): "no difference in {tau} is shown between {a} and {b}",
    ("main", "better"): "{factor} {to} instead of {b} raises {tau}, on average over the other factors",
    ("main", "worse"): "{factor} {to} instead of {b} lowers {tau}, on average over the other factors",
    ("main", NOTHING_SHOWN): "no main effect of {factor} ({to} against {b}) is shown",
    ("interaction", "better"): "{a}: together they add to more than the product of their separate effects on {tau}",
    ("interaction", "worse"): "{a}: together they add to less than the product of their separate effects on {tau}",
    ("interaction", NOTHING_SHOWN): "no interaction of {a} is shown",
}


@dataclass(frozen=True)
class Claim:
    """A sentence with its evidence."""

    text: str
    evidence: str


def evidence(effect: Effect) -> str:
    """Return `+4.1 % [1.0, 7.2]`, p, number of units, and the resolvable difference."""
    percent = effect.ratio.percent
    found = f"{percent.value:+.1f} % [{percent.low:.1f}, {percent.high:.1f}], p = {effect.p_adjusted:.2g} (Holm)"
    found += ", " + counted(effect.count, effect.unit.removesuffix("s"))
    return f"{found} can resolve {100 * effect.detectable:.1f} %" if math.isfinite(effect.detectable) else found


def claims_of(study: Study) -> list[Claim]:
    """Return one claim per test, in the order: cells against the baseline, main effects, interactions."""
    tau = "τ" if study.metric == DECODED else "simulated τ"
    claims = []
    for effect in (*study.comparisons, *study.effects):
        a, _, b = effect.contrast.name.partition(" against ")
        factor, _, to = a.partition(": ")
        text = TEXTS[effect.contrast.kind, effect.verdict].format(a=a, b=b, factor=factor, to=to, tau=tau)
        claims.append(Claim(text, evidence(effect)))
    return claims
