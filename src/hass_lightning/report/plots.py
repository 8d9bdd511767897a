"""Figures of the training curves: loss and accuracy by alignment step, simulated acceptance, speed.

Each function returns None where there is nothing to draw.
"""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hass_lightning.report.curves import Curve, by_step, loss_terms, smooth, thin
from hass_lightning.report.style import COLORS, ORDERED, color, faint, safe, styled

Curves = dict[str, Curve]
SMOOTHED_FROM = 60  # points from which a training curve is smoothed, the raw one staying as a shadow
TERM_TITLES = {
    "feature": "feature regression",
    "soft_ce": "soft cross-entropy (nats)",
    "top_k": "top-K distillation, HAD (nats)",
}


def _training_line(
    figure: go.Figure, curve: Curve, name: str, shade: str, *, group: str, shown: bool, **place: int
) -> None:
    """A training curve: smoothed where it is long, with the raw one faint behind it."""
    smoothed = thin(smooth(curve, len(curve) // 25)) if len(curve) >= SMOOTHED_FROM else curve
    curve = thin(curve)
    steps, raw = [step for step, _ in curve], [value for _, value in curve]
    if smoothed is not curve:
        line = {"color": faint(shade, 0.22), "width": 1}
        figure.add_scatter(
            x=steps, y=raw, mode="lines", line=line, hoverinfo="skip", showlegend=False, legendgroup=group, **place
        )
    figure.add_scatter(
        x=steps,
        y=[value for _, value in smoothed],
        customdata=raw,
        name=name,
        legendgroup=group,
        showlegend=shown,
        mode="lines" if len(curve) > 1 else "markers",
        line={"color": shade, "width": 2},
        hovertemplate="%{y:.4g} (raw %{customdata:.4g})<extra>" + name + "</extra>",
        **place,
    )


def _validation_line(
    figure: go.Figure, curve: Curve, name: str, shade: str, *, group: str, shown: bool, **place: int
) -> None:
    figure.add_scatter(
        x=[step for step, _ in curve],
        y=[value for _, value in curve],
        name=name,
        legendgroup=group,
        showlegend=shown,
        mode="lines+markers",
        line={"color": shade, "width": 1.5, "dash": "dot"},
        marker={"size": 7, "color": shade, "symbol": "circle-open", "line": {"width": 2}},
        hovertemplate="%{y:.4g}<extra>" + name + "</extra>",
        **place,
    )


def loss_figure(curves: Curves) -> go.Figure | None:
    """Total loss, and each term's value by alignment step; training as lines, validation as circles."""
    terms = loss_terms(curves)
    totals = {split: curves.get(f"{split}/loss", []) for split in ("train", "val")}
    if not terms and not any(totals.values()):
        return None
    titles = ["total loss (weighted)", *(TERM_TITLES.get(term, term) for term in terms)]
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    figure = make_subplots(
        rows, columns, subplot_titles=[safe(t) for t in titles], vertical_spacing=0.26 / rows, horizontal_spacing=0.1
    )
    if totals["train"]:
        _training_line(figure, totals["train"], "total, training", "#7f7f7f", group="total", shown=True, row=1, col=1)
    if totals["val"]:
        _validation_line(
            figure, totals["val"], "total, validation", "#7f7f7f", group="total-val", shown=True, row=1, col=1
        )
    named: set[str] = set()
    for position, term in enumerate(terms, start=1):
        place = {"row": position // columns + 1, "col": position % columns + 1}
        for split, draw in (("train", _training_line), ("val", _validation_line)):
            for step, curve in by_step(curves, f"{split}/{term}").items():
                name = f"step {step}" + (", validation" if split == "val" else "")
                draw(figure, curve, name, color(step - 1, ORDERED), group=name, shown=name not in named, **place)
                named.add(name)
    styled(figure, 110 + 270 * rows)
    figure.update_xaxes(title_text="optimizer step", row=rows)
    figure.update_yaxes(title_text="loss per row", col=1)
    figure.update_layout(hovermode="x unified", legend_y=-0.24 / rows)
    return figure


def accuracy_figure(curves: Curves) -> go.Figure | None:
    """Top-1 accuracy by alignment step, training and validation."""
    training, validation = by_step(curves, "train/accuracy"), by_step(curves, "val/accuracy")
    if not training and not validation:
        return None
    panels = {"training": (training, _training_line), "validation": (validation, _validation_line)}
    panels = {title: panel for title, panel in panels.items() if panel[0]}
    figure = make_subplots(1, len(panels), subplot_titles=list(panels), shared_yaxes=True, horizontal_spacing=0.05)
    named: set[int] = set()
    for column, (found, draw) in enumerate(panels.values(), start=1):
        for step, curve in found.items():
            name = f"alignment step {step}"
            draw(figure, curve, name, color(step - 1, ORDERED), group=name, shown=step not in named, row=1, col=column)
            named.add(step)
    styled(figure)
    figure.update_xaxes(title_text="optimizer step")
    figure.update_yaxes(tickformat=".0%")
    figure.update_yaxes(title_text="top-1 accuracy", col=1)
    figure.update_traces(hovertemplate="%{y:.1%}<extra>%{fullData.name}</extra>", selector={"hoverinfo": None})
    figure.update_layout(hovermode="x unified")
    return figure


def acceptance_figure(curves: Curves) -> go.Figure | None:
    """Simulated acceptance length over the steps, and the decoded one where it was measured on the way."""
    simulated, decoded = curves.get("val/acceptance_length"), curves.get("decode/acceptance_length")
    if not simulated and not decoded:
        return None
    if simulated and decoded:  # the final measurement is logged without a step
        decoded = sorted((step or simulated[-1][0], value) for step, value in decoded)
    figure = go.Figure()
    for curve, name, shade in ((simulated, "simulated chain", COLORS[0]), (decoded, "decoded", COLORS[4])):
        if curve:
            figure.add_scatter(
                x=[step for step, _ in curve],
                y=[value for _, value in curve],
                name=name,
                mode="lines+markers",
                line={"color": shade, "width": 2},
                marker={"size": 8},
                hovertemplate="step %{x}: %{y:.3f}<extra>" + name + "</extra>",
            )
    styled(figure, 300)
    figure.update_xaxes(title_text="optimizer step")
    figure.update_yaxes(title_text="τ (tokens per forward)")
    figure.update_layout(showlegend=bool(simulated and decoded))
    return figure


def training_speed_figure(curves: Curves) -> go.Figure | None:
    """Rows a second and learning rate over the steps."""
    rate = next((name for name in curves if name.startswith("lr-")), None)
    panels = [
        (curves.get("train/tokens_per_second"), "training rows/s", ".0f"),
        (curves.get(rate) if rate else None, "learning rate", ".2e"),
        (curves.get("train/gradient_norm"), "gradient norm (before clipping)", ".3g"),
    ]
    drawn = [(thin(curve), title, form) for curve, title, form in panels if curve]
    if not drawn:
        return None
    figure = make_subplots(1, len(drawn), subplot_titles=[title for _, title, _ in drawn], horizontal_spacing=0.08)
    for column, (curve, title, form) in enumerate(drawn, start=1):
        figure.add_scatter(
            x=[step for step, _ in curve],
            y=[value for _, value in curve],
            mode="lines" if len(curve) > 1 else "markers",
            line={"color": color(column - 1), "width": 1.5},
            hovertemplate="step %{x}: %{y:" + form + "}<extra>" + title + "</extra>",
            row=1,
            col=column,
        )
    styled(figure, 280)
    figure.update_xaxes(title_text="optimizer step")
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=False)
    return figure
