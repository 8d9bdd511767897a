"""Figures of decoding: speed and τ with intervals, acceptance by depth, time by phase, predicted and measured speedup.

Each function returns None if there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hass_lightning.measure.metrics import acceptance_length, conditional_rates, phase_seconds, speedup, survival
from hass_lightning.measure.record import BASELINE, Record, group_by, matched, totals
from hass_lightning.report.curves import Curve, by_step
from hass_lightning.report.series import colors_of, dashes_of, series_of, series_of_rows
from hass_lightning.report.style import (
    BASELINE_COLOR,
    BASELINE_LINE,
    COLORS,
    PHASES,
    add_line,
    color,
    faint,
    safe,
    styled,
    whiskers,
)
from hass_lightning.report.tables import Row, is_number, value_cell


def bars_figure(rows: Sequence[Row], name: str, title: str, unit: str = "") -> go.Figure | None:
    """Draw bars with 95 % intervals: a panel per temperature, a group per benchmark, a color per series.

    A dashed line is autoregressive decoding.

    Args:
        rows: rows of `measure.summarize`.
        name: `speedup` or `acceptance_length`.
        title: title of the y axis.
        unit: unit in the hover text.
    """
    shown = [row for row in rows if is_number(row.get(name))]
    speculative = [row for row in shown if row.get("decoder") != BASELINE]
    if not speculative:
        return None
    several = len({str(row.get("benchmark", "")) for row in shown}) > 1
    # with one benchmark there is room for the bar of the baseline; otherwise the dashed line suffices
    series = series_of_rows(speculative if several else shown)
    colors = colors_of(list(series))
    panels = sorted({each.temperature for each in series})
    titles = [f"T={temperature:g}" for temperature in panels] if len(panels) > 1 else None
    figure = make_subplots(1, len(panels), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03)
    named: set[str] = set()
    for each, lines in series.items():
        cells = [value_cell(row, name) for row in lines]
        spans = [(c.high - c.value, c.value - c.low) if c.has_interval else (0, 0) for c in cells]
        ends = [f"[{c.low:.2f}, {c.high:.2f}]" if c.has_interval else "no interval" for c in cells]
        figure.add_bar(
            # one benchmark: the series are on the axis
            x=[safe(row.get("benchmark", "") if several else each.line) for row in lines],
            y=[cell.value for cell in cells],
            name=safe(each.line),
            legendgroup=each.line,
            showlegend=each.line not in named,
            marker={"color": colors[each.line], "opacity": 0.88},
            error_y=whiskers(*zip(*spans, strict=True)),
            text=[f"{cell.value:.2f}{unit}" for cell in cells],
            textposition="inside",
            insidetextanchor="start",
            textangle=0,
            customdata=list(zip(ends, [row.get("num_prompts") for row in lines], strict=True)),
            hovertemplate=f"%{{y:.3f}}{unit} %{{customdata[0]}}<br>%{{customdata[1]}} prompts"
            f"<extra>{safe(each.label)}</extra>",
            row=1,
            col=panels.index(each.temperature) + 1,
        )
        named.add(each.line)
    figure.add_hline(y=1, line=BASELINE_LINE)
    styled(figure, 360, y=title).update_yaxes(rangemode="tozero")
    # the bars of one benchmark have separate positions, so no room is needed for neighbors
    figure.update_layout(barmode="group" if several else "overlay", bargap=0.2 if len(named) > 2 else 0.5)
    return figure.update_layout(showlegend=several and len(named) > 1, uniformtext={"minsize": 10, "mode": "hide"})


def depth_figure(records: Sequence[Record], curves: Mapping[str, Curve] | None = None) -> go.Figure | None:
    """Draw the conditional acceptance rate a_k and survival s_k by depth.

    Args:
        records: records of a benchmark.
        curves: with `val/survival/step<k>`: the simulated chain of the last validation is drawn also.
    """
    lines = {each: group for each, group in series_of(records).items() if conditional_rates(group)}
    colors, dashes = colors_of(list(lines)), dashes_of(list(lines))
    drawn = [
        (each.label, conditional_rates(group), survival(group), colors[each.line], dashes[each.temperature])
        for each, group in lines.items()
    ]
    joint = [curve[-1][1] for curve in by_step(dict(curves or {}), "val/survival").values() if curve]
    if joint:
        rates = [now / before if before else math.nan for now, before in zip(joint, [1.0, *joint], strict=False)]
        drawn.append(("simulated chain (validation answers)", rates, joint, BASELINE_COLOR, "dot"))
    if not drawn:
        return None
    titles = [
        "accepted at depth k, of those that reached it (a<sub>k</sub>)",
        "accepted down to depth k (s<sub>k</sub>)",
    ]
    figure = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.05)
    for label, rates, joint, shade, dash in drawn:
        for col, values in ((1, rates), (2, joint)):
            place: dict[str, Any] = {"legendgroup": label, "showlegend": col == 1, "row": 1, "col": col}
            depths = range(1, len(values) + 1)
            add_line(figure, depths, values, label, shade, "depth %{x}: %{y:.1%}", dash=dash, **place)
    styled(figure, x="draft depth k (tokens)", y="rate").update_xaxes(dtick=1)
    return figure.update_yaxes(tickformat=".0%", rangemode="tozero")


def phase_figure(records: Sequence[Record]) -> go.Figure | None:
    """Draw milliseconds per new token by phase, one bar per series."""
    lines = {each: group for each, group in series_of(records).items() if totals(group).num_tokens}
    found = {each: phase_seconds(group) for each, group in lines.items()}
    if not any(sum(seconds.values()) > 0 for seconds in found.values()):
        return None
    phases = list(dict.fromkeys([*PHASES, *(phase for seconds in found.values() for phase in seconds)]))
    figure = go.Figure()
    for index, phase in enumerate(phases):
        milliseconds = [1000 * found[each].get(phase, 0.0) / totals(group).num_tokens for each, group in lines.items()]
        if any(milliseconds):
            figure.add_bar(
                y=[safe(each.label) for each in lines],
                x=milliseconds,
                orientation="h",
                name=safe(phase),
                marker={"color": PHASES.get(phase, color(index))},
                customdata=[seconds.get(phase, 0.0) / (sum(seconds.values()) or 1) for seconds in found.values()],
                hovertemplate="%{x:.2f} ms per token, %{customdata:.1%} of the time<extra>%{fullData.name}</extra>",
            )
    height = max(300, 150 + 40 * len(lines))
    styled(figure, height, x="milliseconds per new token").update_xaxes(showgrid=True)
    figure.update_yaxes(showgrid=False, ticksuffix="  ", autorange="reversed")
    legend = {"y": -60 / (height - 96), "traceorder": "normal"}
    return figure.update_layout(barmode="stack", bargap=0.35, legend=legend)


def prompts_figure(records: Sequence[Record]) -> go.Figure | None:
    """Draw each prompt's τ and speedup, to show where a head helps and where it does not."""
    lines = {each: group for each, group in series_of(records).items() if not each.is_baseline}
    baseline = group_by((r for r in records if r.decoder == BASELINE), lambda r: r.question)
    colors = colors_of(list(lines))
    temperatures = sorted({each.temperature for each in lines})
    figure = go.Figure()
    for each, group in lines.items():
        points = []
        for question, mine in group_by(group, lambda r: r.question).items():
            ours, theirs = matched(mine, baseline.get(question, []))
            tau, fast = acceptance_length(mine), speedup(ours, theirs)
            if is_number(tau) and is_number(fast):
                points.append((tau, fast, (safe(" · ".join(question)), totals(mine).num_tokens)))
        if points:
            taus, speedups, about = zip(*points, strict=True)
            symbol = ("circle", "diamond", "square", "x")[temperatures.index(each.temperature) % 4]
            figure.add_scatter(
                x=taus,
                y=speedups,
                name=safe(each.label),
                mode="markers",
                marker={"size": 8, "symbol": symbol, "color": colors[each.line], "opacity": 0.65},
                customdata=about,
                hovertemplate="%{customdata[0]}<br>τ %{x:.2f}, %{y:.2f}×, %{customdata[1]} tokens"
                "<extra>%{fullData.name}</extra>",
            )
    if not figure.data:
        return None
    figure.add_hline(y=1, line=BASELINE_LINE)
    several = len(figure.data) > 1
    styled(figure, 420 if several else 300, "τ of the question (tokens per forward)", "speedup (×)")
    return figure.update_xaxes(showgrid=True).update_layout(showlegend=several)


def cost_figure(cost_rows: Sequence[Mapping[str, Any]]) -> go.Figure | None:
    """Draw predicted and measured speedup; the band is 15 % around equality."""
    points = [
        (row["predicted_speedup"], row["measured_speedup"], safe(row.get("name") or row.get("decoder") or ""))
        for row in cost_rows
        if is_number(row.get("predicted_speedup")) and is_number(row.get("measured_speedup"))
    ]
    if not points:
        return None
    predicted, measured, names = zip(*points, strict=True)
    low, high = 0.9 * min(*predicted, *measured), 1.1 * max(*predicted, *measured)
    figure = go.Figure()
    figure.add_scatter(
        x=[low, high, high, low], y=[0.85 * low, 0.85 * high, 1.15 * high, 1.15 * low], fill="toself", mode="lines",
        line={"width": 0}, fillcolor=faint(BASELINE_COLOR, 0.18), name="within 15 %", hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(x=[low, high], y=[low, high], mode="lines", name="equal", hoverinfo="skip", line=BASELINE_LINE)
    figure.add_scatter(
        x=predicted,
        y=measured,
        text=names,
        mode="markers",
        name="configuration",
        marker={"size": 10, "color": COLORS[0], "opacity": 0.8},
        hovertemplate="%{text}<br>predicted %{x:.2f}×, measured %{y:.2f}×<extra></extra>",
    )
    return styled(figure, x="predicted speedup (×)", y="measured speedup (×)").update_xaxes(showgrid=True)
