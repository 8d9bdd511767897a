"""Figures of a study. Each function returns None if there is nothing to draw."""

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
from hass_lightning.report.style import (
    BASELINE_COLOR,
    BASELINE_LINE,
    COLORS,
    add_line,
    color,
    faint,
    safe,
    styled,
    whiskers,
)
from hass_lightning.report.tables import is_number

MANY = 8  # maximum number of series in a panel that can be distinguished


def interval_whiskers(intervals: Sequence[Interval]) -> dict[str, Any]:
    """Return Plotly's error bars; without an interval their length is 0."""
    spans = [(each.high - each.value, each.value - each.low) for each in intervals]
    known = [tuple(abs(length) if is_number(length) else 0.0 for length in span) for span in spans]
    return whiskers([above for above, _ in known], [below for _, below in known])


def _dot_plot(
    names: Sequence[str], values: Sequence[Interval], marker: dict[str, Any], home: float, hover: str
) -> go.Figure:
    """Draw dots with their intervals as lines; a dashed line is at `home`."""
    figure = go.Figure()
    figure.add_scatter(
        x=[each.value for each in values],
        y=[safe(name) for name in names],
        mode="markers",
        marker=marker,
        error_x=interval_whiskers(values),
        hovertemplate=f"{hover}<extra></extra>",
    )
    figure.add_vline(x=home, line=BASELINE_LINE)
    styled(figure, 120 + 34 * len(names)).update_yaxes(autorange="reversed", showgrid=False)
    return figure.update_xaxes(showgrid=True).update_layout(showlegend=False)


def cells_figure(study: Study) -> go.Figure:
    """Draw τ of every cell with its interval; a dashed line is the baseline."""
    rows = study.rows
    shades = [BASELINE_COLOR if position == study.baseline else COLORS[0] for position in range(len(rows))]
    marker, home = {"size": 10, "color": shades}, rows[study.baseline].tau.value
    figure = _dot_plot([row.label for row in rows], [row.tau for row in rows], marker, home, "%{y}: τ %{x:.3f}")
    return figure.update_xaxes(title_text="τ (tokens per forward)")


def effects_figure(study: Study) -> go.Figure | None:
    """Draw main effects and interactions in percent of τ; filled: shown, open: not shown."""
    effects = study.effects
    if not effects:
        return None
    marker = {
        "size": 11,
        "color": [COLORS[0] if effect.contrast.kind == "main" else COLORS[4] for effect in effects],
        "symbol": ["circle" if effect.verdict in ("better", "worse") else "circle-open" for effect in effects],
    }
    names = [effect.contrast.name for effect in effects]
    figure = _dot_plot(names, [effect.ratio.percent for effect in effects], marker, 0, "%{y}: %{x:+.1f} %")
    return figure.update_xaxes(title_text="change of τ (%)")


def response_figure(study: Study) -> go.Figure | None:
    """Draw τ over each numeric factor with three or more levels, one line for each setting of the other factors."""
    factors = [name for name in study.cells[0].levels if len(set(_numbers(study.cells, name).values())) >= 3]
    if not factors:
        return None
    figure = make_subplots(1, len(factors), shared_yaxes=True, horizontal_spacing=0.06)
    for column, factor in enumerate(factors, start=1):
        levels = _numbers(study.cells, factor)
        lines: dict[str, list[int]] = {}
        for position in sorted(levels, key=levels.__getitem__):
            others = {name: level for name, level in study.cells[position].levels.items() if name != factor}
            lines.setdefault(", ".join(f"{name}={show(level)}" for name, level in others.items()), []).append(position)
        for index, (name, positions) in enumerate(lines.items()):
            taus = [study.rows[position].tau for position in positions]
            figure.add_scatter(
                x=[levels[position] for position in positions],
                y=[tau.value for tau in taus],
                name=safe(name or factor),
                mode="lines+markers",
                line={"color": color(index), "width": 2},
                error_y=interval_whiskers(taus) if len(lines) <= MANY else None,
                showlegend=bool(name),
                hovertemplate=f"{safe(factor)} %{{x}}: %{{y:.3f}}<extra>{safe(name)}</extra>",
                row=1,
                col=column,
            )
        least, most = min(levels.values()), max(levels.values())
        scale = "log" if least > 0 and most / least > 20 else None
        figure.update_xaxes(title_text=safe(factor), type=scale, row=1, col=column)
    return styled(figure, 400, y="τ (tokens per forward)")


def _numbers(cells: Sequence[StudyCell], factor: str) -> dict[int, float]:
    """Return the level by position of the cell, if it is a number."""
    return {position: cell.levels[factor] for position, cell in enumerate(cells) if is_number(cell.levels[factor])}


def costs_of(rows: Sequence[Row]) -> tuple[str, list[float]] | None:
    """Return the training compute of the cells: FLOPs if logged, otherwise seconds, otherwise tokens."""
    for title, values in (
        ("training FLOPs", [row.flops.value for row in rows]),
        ("training seconds", [row.seconds.value for row in rows]),
        ("training tokens", [row.tokens.value for row in rows]),
    ):
        if all(is_number(value) and value for value in values):
            return title, values
    return None


def pareto_figure(study: Study) -> go.Figure | None:
    """Draw τ over training compute; the line connects the cells of the Pareto front."""
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
            error_y=interval_whiskers([row.tau]),
            hovertemplate=f"%{{x:.3g}}: τ %{{y:.3f}}<extra>{safe(row.label)}</extra>",
        )
    return styled(figure, 420, title, "τ (tokens per forward)").update_xaxes(rangemode="tozero")


def gap_figure(study: Study) -> go.Figure | None:
    """Draw the exposure gap by depth: left in decoding, right for the features only."""
    rows = study.rows
    if not any(row.forced for row in rows):
        return None
    titles = ["a<sub>k</sub> on target features minus decoded a<sub>k</sub>", "accuracy lost from step 1 to step k"]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.09)
    for index, row in enumerate(rows):
        pairs = list(zip(row.forced, row.rates, strict=False))
        decoded = [Interval(t - r.value, t - r.high, t - r.low) for t, r in pairs]
        lost = [Interval(row.accuracies[0] - each, math.nan, math.nan) for each in row.accuracies]
        for col, gaps in ((1, decoded), (2, lost)):
            more: dict[str, Any] = {"error_y": interval_whiskers(gaps) if len(rows) <= MANY else None, "marker": {}}
            more |= {"legendgroup": row.label, "showlegend": col == 2, "row": 1, "col": col}
            depths, values = range(1, len(gaps) + 1), [gap.value for gap in gaps]
            add_line(figure, depths, values, row.label, color(index), "depth %{x}: %{y:.1%}", **more)
    styled(figure, 400, x="depth k").update_xaxes(dtick=1)
    return figure.update_yaxes(tickformat=".0%", rangemode="tozero")
