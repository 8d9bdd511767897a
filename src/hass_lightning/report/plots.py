"""Figures of the training curves: loss and accuracy by alignment step, simulated acceptance, speed.

Each function returns None if there is nothing to draw.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hass_lightning.report.curves import Curve, by_step, loss_terms, smooth, thin
from hass_lightning.report.style import COLORS, ORDERED, add_line, color, faint, safe, styled

Curves = dict[str, Curve]
SMOOTHED_FROM = 60  # minimum number of points for smoothing; the raw curve is then drawn faintly behind
TERM_TITLES = {
    "feature": "feature regression",
    "soft_ce": "soft cross-entropy (nats)",
    "top_k": "top-K distillation, HAD (nats)",
}


def _points(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def _training_line(figure: go.Figure, curve: Curve, name: str, shade: str, **place: Any) -> None:
    """Draw a training curve: smoothed if it is long, with the raw curve faintly behind it."""
    smoothed = thin(smooth(curve, len(curve) // 25)) if len(curve) >= SMOOTHED_FROM else curve
    curve = thin(curve)
    steps, raw = _points(curve)
    if smoothed is not curve:
        behind = {"hoverinfo": "skip", "line": {"color": faint(shade, 0.22), "width": 1}}
        figure.add_scatter(x=steps, y=raw, mode="lines", **behind, **place | {"showlegend": False})
    hover = "%{y:.4g} (raw %{customdata:.4g})"
    add_line(figure, *_points(smoothed), name, shade, hover, customdata=raw, marker=None, **place)


def _validation_line(figure: go.Figure, curve: Curve, name: str, shade: str, **place: Any) -> None:
    marker = {"size": 7, "color": shade, "symbol": "circle-open", "line": {"width": 2}}
    add_line(figure, *_points(curve), name, shade, "%{y:.4g}", dash="dot", width=1.5, marker=marker, **place)


DRAW = {"train": _training_line, "val": _validation_line}


def loss_figure(curves: Curves) -> go.Figure | None:
    """Draw the total loss and the value of each term by alignment step; training as lines, validation as circles."""
    terms = loss_terms(curves)
    totals = {split: curve for split in DRAW if (curve := curves.get(f"{split}/loss"))}
    if not terms and not totals:
        return None
    titles = ["total loss (weighted)", *(safe(TERM_TITLES.get(term, term)) for term in terms)]
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.26 / rows, horizontal_spacing=0.1)
    for split, curve in totals.items():
        name = {"train": "total, training", "val": "total, validation"}[split]
        DRAW[split](figure, curve, name, "#7f7f7f", legendgroup=name, showlegend=True, row=1, col=1)
    named: set[str] = set()
    for position, term in enumerate(terms, start=1):
        place = {"row": position // columns + 1, "col": position % columns + 1}
        for split, draw in DRAW.items():
            for step, curve in by_step(curves, f"{split}/{term}").items():
                name = f"step {step}" + (", validation" if split == "val" else "")
                legend = {"legendgroup": name, "showlegend": name not in named}
                draw(figure, curve, name, color(step - 1, ORDERED), **legend, **place)
                named.add(name)
    styled(figure, 110 + 270 * rows).update_xaxes(title_text="optimizer step", row=rows)
    figure.update_yaxes(title_text="loss per loss position", col=1)
    return figure.update_layout(hovermode="x unified", legend_y=-0.24 / rows)


def accuracy_figure(curves: Curves) -> go.Figure | None:
    """Draw top-1 accuracy by alignment step, for training and validation."""
    titles = {"train": "training", "val": "validation"}
    panels = {split: found for split in DRAW if (found := by_step(curves, f"{split}/accuracy"))}
    if not panels:
        return None
    names = [titles[split] for split in panels]
    figure = make_subplots(1, len(panels), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.05)
    named: set[str] = set()
    for column, (split, found) in enumerate(panels.items(), start=1):
        for step, curve in found.items():
            name = f"alignment step {step}"
            legend = {"legendgroup": name, "showlegend": name not in named}
            DRAW[split](figure, curve, name, color(step - 1, ORDERED), **legend, row=1, col=column)
            named.add(name)
    styled(figure, x="optimizer step", y="top-1 accuracy").update_yaxes(tickformat=".0%")
    figure.update_traces(hovertemplate="%{y:.1%}<extra>%{fullData.name}</extra>", selector={"hoverinfo": None})
    return figure.update_layout(hovermode="x unified")


def acceptance_figure(curves: Curves) -> go.Figure | None:
    """Draw the simulated acceptance length over the steps, and the decoded one if it was measured during training."""
    simulated, decoded = curves.get("val/acceptance_length"), curves.get("decode/acceptance_length")
    if not simulated and not decoded:
        return None
    if simulated and decoded:  # the final measurement is logged without a step
        decoded = sorted((step or simulated[-1][0], value) for step, value in decoded)
    figure = go.Figure()
    for curve, name, shade in ((simulated, "simulated chain", COLORS[0]), (decoded, "decoded", COLORS[4])):
        if curve:
            add_line(figure, *_points(curve), name, shade, "step %{x}: %{y:.3f}", marker=8)
    styled(figure, 300, "optimizer step", "τ (tokens per forward)")
    return figure.update_layout(showlegend=bool(simulated and decoded))


def training_speed_figure(curves: Curves) -> go.Figure | None:
    """Draw loss positions per second and the learning rate over the steps."""
    rate = next((name for name in curves if name.startswith("lr-")), "")
    panels = [
        (curves.get("train/tokens_per_second"), "training loss positions/s", ".0f"),
        (curves.get(rate), "learning rate", ".2e"),
        (curves.get("train/gradient_norm"), "gradient norm (before clipping)", ".3g"),
    ]
    drawn = [(thin(curve), title, form) for curve, title, form in panels if curve]
    if not drawn:
        return None
    figure = make_subplots(1, len(drawn), subplot_titles=[title for _, title, _ in drawn], horizontal_spacing=0.08)
    for index, (curve, title, form) in enumerate(drawn):
        hover = f"step %{{x}}: %{{y:{form}}}"
        add_line(figure, *_points(curve), title, color(index), hover, width=1.5, marker=None, row=1, col=index + 1)
    return styled(figure, 280, "optimizer step").update_yaxes(rangemode="tozero").update_layout(showlegend=False)
