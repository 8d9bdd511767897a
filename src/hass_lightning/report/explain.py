"""The page that shows where τ comes from (`hass-benchmark … explain=true`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hass_lightning.measure.explain import Drift, Explanation
from hass_lightning.measure.statistics import Interval
from hass_lightning.report.headline import Tile
from hass_lightning.report.html import Page, write_page
from hass_lightning.report.style import BASELINE_LINE, add_line, color, safe, styled, whiskers
from hass_lightning.report.tables import Column, Row, Table, is_number
from hass_lightning.runs.files import write_json

TITLES = {
    "position": ("τ by position in the answer", "tokens of the answer so far"),
    "context": ("τ by context length", "tokens of prompt and answer so far"),
    "category": ("τ by category", ""),
    "repetition": ("τ by repetition", ""),
    "entropy": ("τ by the target's entropy", "entropy of the next token, nats"),
}
NOTES = {
    "repetition": "Do the last three tokens occur earlier in the text? “Repeated and continued”: the next token is "
    "also the one that followed then.",
    "entropy": "Entropy of the target's distribution of the first token that the draft has to predict, temperature 1.",
}
NOTE = "Whiskers: 95 % intervals over questions. The hover text gives the number of cycles."
DRIFT_NOTE = (
    "Drafts from every position of the answers, as far as their tokens are right. Left: length of the predicted "
    "feature over that of the target's; 1 is no drift. Middle: cosine of the two. Right: share of the attention on "
    "predicted features, mean over heads."
)
RELIABILITY_NOTE = (
    "Draft tokens whose predecessors in the draft are right, by the head's probability of them. Below the dashed line "
    "the head is overconfident."
)


def explain_report(output_dir: Path, explanations: Sequence[Explanation]) -> Path:
    """Write `explain.html` and `explain.json`, and return the path of the page."""
    page = Page("Where τ comes from", ", ".join(dict.fromkeys(each.label for each in explanations)))
    first = explanations[0]
    overall = first.calibration[0] if first.calibration else None
    page.tiles = [Tile("acceptance τ", *_value(first.acceptance_length))]
    if overall is not None:
        page.tiles.append(Tile("calibration error", f"{overall.error:.3f}", "expected, ten bins"))
        page.tiles.append(Tile("AUROC", *_value(overall.auroc), "does confidence tell accepted from rejected tokens?"))
    page.tiles_note = first.label if len(explanations) > 1 else ""
    for name, (title, axis) in TITLES.items():
        note = f"{NOTES[name]} {NOTE}" if name in NOTES else NOTE
        page.add(title, factor_figure(explanations, name, axis), note, half=name != "category")
    heads = list({(each.draft, each.temperature): each for each in explanations}.values())
    page.add("Drift by draft depth", drift_figure(heads), DRIFT_NOTE)
    page.add("Calibration of the draft's confidence", reliability_figure(heads), RELIABILITY_NOTE)
    page.appendix = [("Groups of cycles", factor_table(explanations)), ("Depth by depth", depth_table(heads))]
    write_json(output_dir / "explain.json", [asdict(each) for each in explanations])
    return write_page(page, output_dir / "explain.html")


def _value(interval: Interval) -> tuple[str, str]:
    return f"{interval.value:.2f}", f"[{interval.low:.2f}, {interval.high:.2f}]" if is_number(interval.low) else ""


def _whiskers(intervals: Sequence[Interval]) -> dict[str, Any]:
    known = [each if is_number(each.low) else Interval(each.value, each.value, each.value) for each in intervals]
    return whiskers([each.high - each.value for each in known], [each.value - each.low for each in known])


def _name(head: Explanation) -> str:
    """The name of a head without its decoder."""
    return head.draft + (f" · T={head.temperature:g}" if head.temperature else "")


def factor_figure(explanations: Sequence[Explanation], name: str, axis: str = "") -> go.Figure | None:
    """Draw τ by group, one color per head and decoder; None if no group differs from all cycles."""
    labels = list(dict.fromkeys(group.label for each in explanations for group in each.factors[name]))
    if len(labels) < 2:
        return None
    figure = go.Figure()
    for number, each in enumerate(explanations):
        groups = each.factors[name]
        figure.add_bar(
            x=[safe(group.label) for group in groups],
            y=[group.acceptance_length.value for group in groups],
            name=safe(each.label),
            marker={"color": color(number), "opacity": 0.88},
            error_y=_whiskers([group.acceptance_length for group in groups]),
            text=[f"{group.acceptance_length.value:.2f}" for group in groups],
            textposition="inside",
            insidetextanchor="start",
            textangle=0,
            customdata=[(group.num_cycles, group.num_questions) for group in groups],
            hovertemplate="τ %{y:.3f}<br>%{customdata[0]} cycles, %{customdata[1]} questions"
            f"<extra>{safe(each.label)}</extra>",
        )
    figure.update_layout(barmode="group", showlegend=len(explanations) > 1)
    values = [safe(label) for label in labels]
    lines = ["<br>".join(wrap(value, 16)) for value in values]
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=values, tickvals=values, ticktext=lines, tickangle=0
    )
    return styled(figure, x=axis or None, y="τ (tokens per forward)")


def drift_figure(heads: Sequence[Explanation]) -> go.Figure | None:
    """Draw norm, cosine and attention share by draft depth, one color per head."""
    if not any(head.drift for head in heads):
        return None
    titles = ["norm of the features", "cosine with the target's", "attention on own features"]
    figure = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.08)
    for number, head in enumerate(heads):
        depths = [each.depth for each in head.drift]
        for column, values in enumerate((_norm, _cosine, _own), start=1):
            intervals = [values(each) for each in head.drift]
            add_line(
                figure, depths, [each.value for each in intervals], _name(head), color(number), "%{y:.3f}",
                error_y=_whiskers(intervals), showlegend=column == 1 and len(heads) > 1, row=1, col=column,
            )  # fmt: skip
    figure.add_hline(1, line=BASELINE_LINE, row=1, col=1)
    figure.update_xaxes(dtick=1, title_text="draft depth")
    return styled(figure)


def _norm(drift: Drift) -> Interval:
    return drift.norm


def _cosine(drift: Drift) -> Interval:
    return Interval(drift.cosine, float("nan"), float("nan"))


def _own(drift: Drift) -> Interval:
    return drift.own


def reliability_figure(heads: Sequence[Explanation]) -> go.Figure | None:
    """Draw the fraction of accepted tokens over the confidence of the draft, and the diagonal."""
    if not any(head.reliability for head in heads):
        return None
    figure = go.Figure()
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=BASELINE_LINE, hoverinfo="skip", showlegend=False)
    for number, head in enumerate(heads):
        overall = head.calibration[0]
        name = f"{_name(head)}: ECE {overall.error:.3f}, AUROC {overall.auroc.value:.2f}"
        add_line(
            figure,
            [each.confidence for each in head.reliability],
            [each.accuracy.value for each in head.reliability],
            name,
            color(number),
            "confidence %{x:.2f}: %{y:.2f} accepted (%{customdata} tokens)",
            error_y=_whiskers([each.accuracy for each in head.reliability]),
            customdata=[each.num_tokens for each in head.reliability],
        )
    figure.update_layout(showlegend=True)
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(range=[0, 1.02])
    return styled(figure, x="confidence: the head's probability of its token", y="fraction accepted")


def factor_table(explanations: Sequence[Explanation]) -> Table:
    """Return τ, cycles and questions of every group."""
    rows: list[Row] = [
        {"head": each.label, "factor": name, "group": group.label, "tau": group.acceptance_length,
         "cycles": group.num_cycles, "questions": group.num_questions}
        for each in explanations for name, groups in each.factors.items() for group in groups
    ]  # fmt: skip
    columns = [
        *(Column(name, name, numeric=False) for name in ("head", "factor", "group")),
        Column("τ", "tau", interval=True),
        *(Column(name, name, digits=0) for name in ("cycles", "questions")),
    ]
    return Table.of(columns, rows)


def depth_table(heads: Sequence[Explanation]) -> Table:
    """Return drift and calibration of each draft depth, and calibration over all depths."""
    rows: list[Row] = []
    for head in heads:
        drifts = {each.depth: each for each in head.drift}
        for each in head.calibration:
            row = {"head": _name(head), "depth": each.depth or "all", "tokens": each.num_tokens, "error": each.error,
                   "accuracy": each.accuracy, "auroc": each.auroc}  # fmt: skip
            drift = drifts.get(each.depth)
            rows.append(row | ({"norm": drift.norm, "cosine": drift.cosine, "own": drift.own} if drift else {}))
    columns = [
        *(Column(name, name, numeric=False) for name in ("head", "depth")),
        Column("tokens", "tokens", digits=0),
        Column("accepted", "accuracy"),
        Column("ECE", "error", digits=3),
        Column("AUROC", "auroc", interval=True),
        Column("norm", "norm", interval=True),
        Column("cosine", "cosine"),
        Column("attention on own features", "own", interval=True),
    ]
    return Table.of(columns, rows)
