"""Figures of a study. Each function returns None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hass_lightning.measure.statistics import Interval
from hass_lightning.report.study.analysis import Row, Study
from hass_lightning.report.study.cells import StudyCell, show
from hass_lightning.report.study.tables import front
from hass_lightning.report.style import BASELINE_COLOR, COLORS, TEXT, color, faint, safe, styled
from hass_lightning.report.tables import is_number

MANY = 8  # lines of one panel: beyond, single lines cannot be told apart


def whiskers(intervals: Sequence[Interval]) -> dict[str, Any]:
    """Plotly's error bars; without an interval their length is 0."""

    def length(end: float, value: float) -> float:
        return abs(end - value) if is_number(end) else 0.0

    return {
        "type": "data",
        "symmetric": False,
        "array": [length(each.high, each.value) for each in intervals],
        "arrayminus": [length(each.low, each.value) for each in intervals],
        "color": TEXT,
        "thickness": 1.5,
        "width": 4,
    }


def cells_figure(study: Study) -> go.Figure:
    """τ of every cell with its interval; dashed: the baseline."""
    figure = go.Figure()
    rows = study.rows
    shades = [BASELINE_COLOR if position == study.baseline else COLORS[0] for position in range(len(rows))]
    figure.add_scatter(
        x=[row.tau.value for row in rows],
        y=[safe(row.label) for row in rows],
        mode="markers",
        marker={"size": 10, "color": shades},
        error_x=whiskers([row.tau for row in rows]),
        hovertemplate="%{y}: τ %{x:.3f}<extra></extra>",
    )
    figure.add_vline(x=rows[study.baseline].tau.value, line={"dash": "dash", "color": BASELINE_COLOR, "width": 1.5})
    styled(figure, 120 + 34 * len(rows))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text="τ (tokens per forward)", showgrid=True)
    return figure.update_layout(showlegend=False)


def effects_figure(study: Study) -> go.Figure | None:
    """Main effects and interactions in percent of τ; filled: shown, open: not shown."""
    effects = study.effects
    if not effects:
        return None
    figure = go.Figure()
    percents = [Interval(*(100 * (end - 1) for end in (e.ratio.value, e.ratio.low, e.ratio.high))) for e in effects]
    shown = [effect.verdict in ("better", "worse") for effect in effects]
    figure.add_scatter(
        x=[each.value for each in percents],
        y=[safe(effect.contrast.name) for effect in effects],
        mode="markers",
        marker={
            "size": 11,
            "color": [COLORS[0] if effect.contrast.kind == "main" else COLORS[4] for effect in effects],
            "symbol": ["circle" if each else "circle-open" for each in shown],
        },
        error_x=whiskers(percents),
        hovertemplate="%{y}: %{x:+.1f} %<extra></extra>",
    )
    figure.add_vline(x=0, line={"dash": "dash", "color": BASELINE_COLOR, "width": 1.5})
    styled(figure, 120 + 34 * len(effects))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text="change of τ (%)", showgrid=True)
    return figure.update_layout(showlegend=False)


def response_figure(study: Study) -> go.Figure | None:
    """τ against each numeric factor of three or more levels, a line for each setting of the other factors."""
    factors = [name for name in study.cells[0].levels if len(set(_numbers(study.cells, name).values())) >= 3]
    if not factors:
        return None
    figure = make_subplots(1, len(factors), shared_yaxes=True, horizontal_spacing=0.06)
    for column, factor in enumerate(factors, start=1):
        levels = _numbers(study.cells, factor)
        lines: dict[str, list[int]] = {}
        for position in levels:
            others = {name: level for name, level in study.cells[position].levels.items() if name != factor}
            lines.setdefault(", ".join(f"{name}={show(level)}" for name, level in others.items()), []).append(position)
        for index, (name, positions) in enumerate(lines.items()):
            positions.sort(key=levels.__getitem__)
            taus = [study.rows[position].tau for position in positions]
            figure.add_scatter(
                x=[levels[position] for position in positions],
                y=[tau.value for tau in taus],
                name=safe(name or factor),
                mode="lines+markers",
                line={"color": color(index), "width": 2},
                error_y=whiskers(taus) if len(lines) <= MANY else None,
                showlegend=bool(name),
                hovertemplate=f"{safe(factor)} %{{x}}: %{{y:.3f}}<extra>{safe(name)}</extra>",
                row=1,
                col=column,
            )
        spread = [value for value in levels.values() if value > 0]
        figure.update_xaxes(title_text=safe(factor), row=1, col=column)
        if min(levels.values()) > 0 and max(spread) / min(spread) > 20:
            figure.update_xaxes(type="log", row=1, col=column)
    styled(figure, 400)
    figure.update_yaxes(title_text="τ (tokens per forward)", col=1)
    return figure


def _numbers(cells: Sequence[StudyCell], factor: str) -> dict[int, float]:
    """Position of the cell to its level, where that is a number."""
    return {position: cell.levels[factor] for position, cell in enumerate(cells) if is_number(cell.levels[factor])}


def costs_of(rows: Sequence[Row]) -> tuple[str, list[float]] | None:
    """What training a cell cost: FLOPs where they were logged, else seconds, else tokens."""
    for title, values in (
        ("training FLOPs", [row.flops.value for row in rows]),
        ("training seconds", [row.seconds.value for row in rows]),
        ("training tokens", [row.tokens.value for row in rows]),
    ):
        if all(is_number(value) and value for value in values):
            return title, values
    return None


def pareto_figure(study: Study) -> go.Figure | None:
    """τ against the cost of training; the line joins the cells that no other one beats in both."""
    costs = costs_of(study.rows)
    if costs is None or len(study.rows) < 2:
        return None
    title, values = costs
    best = front(study.rows, values)
    figure = go.Figure()
    figure.add_scatter(
        x=[values[position] for position in best],
        y=[study.rows[position].tau.value for position in best],
        mode="lines",
        line={"color": faint(COLORS[2], 0.6), "width": 2, "shape": "hv"},
        hoverinfo="skip",
        name="front",
    )
    for position, row in enumerate(study.rows):
        figure.add_scatter(
            x=[values[position]],
            y=[row.tau.value],
            mode="markers",
            name=safe(row.label),
            marker={"size": 10, "color": color(position), "symbol": "circle" if position in best else "circle-open"},
            error_y=whiskers([row.tau]),
            hovertemplate="%{x:.3g}: τ %{y:.3f}<extra>" + safe(row.label) + "</extra>",
        )
    styled(figure, 420)
    figure.update_xaxes(title_text=title, rangemode="tozero")
    figure.update_yaxes(title_text="τ (tokens per forward)")
    return figure


def gap_figure(study: Study) -> go.Figure | None:
    """The exposure gap by depth: left on decoding, right on the features alone."""
    rows = study.rows
    if not any(row.forced for row in rows):
        return None
    titles = ["a<sub>k</sub> on true features minus decoded a<sub>k</sub>", "accuracy lost from step 1 to step k"]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.09)
    for index, row in enumerate(rows):
        pairs = list(zip(row.forced, row.rates, strict=False))
        decoded = [Interval(t - r.value, t - r.high, t - r.low) for t, r in pairs]
        lost = [Interval(row.accuracies[0] - each, math.nan, math.nan) for each in row.accuracies]
        for column, gaps in ((1, decoded), (2, lost)):
            figure.add_scatter(
                x=list(range(1, len(gaps) + 1)),
                y=[gap.value for gap in gaps],
                name=safe(row.label),
                legendgroup=row.label,
                showlegend=column == 2,
                mode="lines+markers",
                line={"color": color(index), "width": 2},
                error_y=whiskers(gaps) if len(rows) <= MANY else None,
                hovertemplate="depth %{x}: %{y:.1%}<extra>" + safe(row.label) + "</extra>",
                row=1,
                col=column,
            )
    styled(figure, 400)
    figure.update_xaxes(title_text="depth k", dtick=1)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure
