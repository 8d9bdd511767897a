"""Figures of decoding: speed and τ with intervals, accept rates by depth, time by phase, predicted against measured.

Each function returns None where there is nothing to draw.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hass_lightning.measure.records import (
    BASELINE,
    Record,
    acceptance_length,
    conditional_rates,
    matched,
    phase_seconds,
    speedup,
    survival,
    totals,
)
from hass_lightning.report.curves import Curve, by_step
from hass_lightning.report.series import colors_of, dashes_of, series_of, series_of_rows
from hass_lightning.report.style import BASELINE_COLOR, COLORS, PHASES, TEXT, color, faint, safe, styled
from hass_lightning.report.tables import Row, is_number, value_cell


def bars_figure(rows: Sequence[Row], name: str, title: str, unit: str = "") -> go.Figure | None:
    """Bars with 95 % intervals: a panel a temperature, a group a benchmark, a colour a line; dashed: plain decoding.

    Args:
        name: `speedup` or `acceptance_length`.
    """
    shown = [row for row in rows if is_number(row.get(name))]
    speculative = [row for row in shown if row.get("decoder") != BASELINE]
    if not speculative:
        return None
    benchmarks = list(dict.fromkeys(str(row.get("benchmark", "")) for row in shown))
    # one benchmark has room for the baseline's bar; elsewhere the dashed line says enough
    series = series_of_rows(shown if len(benchmarks) == 1 else speculative)
    colors = colors_of(list(series))
    panels = sorted({each.temperature for each in series})
    titles = [f"T={temperature:g}" for temperature in panels] if len(panels) > 1 else None
    figure = make_subplots(1, len(panels), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03)
    named: set[str] = set()
    for each, lines in series.items():
        cells = [value_cell(row, name) for row in lines]
        # one benchmark: the lines themselves stand on the axis
        places = [str(row.get("benchmark", "")) if len(benchmarks) > 1 else each.line for row in lines]
        spans = [(c.high - c.value, c.value - c.low) if c.has_interval else (0, 0) for c in cells]  # type: ignore[operator]
        ends = [f"[{c.low:.2f}, {c.high:.2f}]" if c.has_interval else "no interval" for c in cells]
        figure.add_bar(
            x=[safe(place) for place in places],
            y=[cell.value for cell in cells],
            name=safe(each.line),
            legendgroup=each.line,
            showlegend=each.line not in named,
            marker={"color": colors[each.line], "opacity": 0.88},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [above for above, _ in spans],
                "arrayminus": [below for _, below in spans],
                "color": TEXT,
                "thickness": 1.5,
                "width": 4,
            },
            text=[f"{cell.value:.2f}{unit}" for cell in cells],
            textposition="inside",
            insidetextanchor="start",
            textangle=0,
            customdata=list(zip(ends, [row.get("num_prompts") for row in lines], strict=True)),
            hovertemplate="%{y:.3f}" + unit + " %{customdata[0]}<br>%{customdata[1]} prompts<extra>" + safe(each.label)
            + "</extra>",
            row=1,
            col=panels.index(each.temperature) + 1,
        )  # fmt: skip
        named.add(each.line)
    figure.add_hline(y=1, line={"dash": "dash", "color": BASELINE_COLOR, "width": 1.5})
    styled(figure, 360)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text=title, col=1)
    # bars of one benchmark have a place of their own each, so that they need no room for neighbours
    figure.update_layout(barmode="group" if len(benchmarks) > 1 else "overlay", bargap=0.2 if len(named) > 2 else 0.5)
    figure.update_layout(showlegend=len(benchmarks) > 1 and len(named) > 1, uniformtext={"minsize": 10, "mode": "hide"})
    return figure


def depth_figure(records: Sequence[Record], curves: Mapping[str, Curve] | None = None) -> go.Figure | None:
    """Conditional accept rate a_k and survival s_k by depth.

    Args:
        curves: with `val/survival/step<k>`: the simulated chain of the last validation is drawn beside.
    """
    lines = {each: group for each, group in series_of(records).items() if conditional_rates(group)}
    simulated = {depth: curve[-1][1] for depth, curve in by_step(dict(curves or {}), "val/survival").items() if curve}
    if not lines and not simulated:
        return None
    titles = ["accepted at depth k, of those reached (a<sub>k</sub>)", "accepted down to depth k (s<sub>k</sub>)"]
    figure = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.05)
    colors, dashes = colors_of(list(lines)), dashes_of(list(lines))
    drawn = [
        (each.label, conditional_rates(group), survival(group), colors[each.line], dashes[each.temperature])
        for each, group in lines.items()
    ]
    if simulated:
        joint = list(simulated.values())
        rates = [now / before if before else math.nan for now, before in zip(joint, [1.0, *joint], strict=False)]
        drawn.append(("simulated chain (validation answers)", rates, joint, BASELINE_COLOR, "dot"))
    for label, rates, joint, shade, dash in drawn:
        for column, values in ((1, rates), (2, joint)):
            figure.add_scatter(
                x=list(range(1, len(values) + 1)),
                y=values,
                name=safe(label),
                legendgroup=label,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": shade, "width": 2, "dash": dash},
                marker={"size": 7},
                hovertemplate="depth %{x}: %{y:.1%}<extra>" + safe(label) + "</extra>",
                row=1,
                col=column,
            )
    styled(figure)
    figure.update_xaxes(title_text="draft depth k (tokens)", dtick=1)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(title_text="rate", col=1)
    return figure


def phase_figure(records: Sequence[Record]) -> go.Figure | None:
    """Milliseconds per new token by phase, a bar a line."""
    lines = {each: group for each, group in series_of(records).items() if totals(group).num_tokens}
    found = {each: phase_seconds(group) for each, group in lines.items()}
    if not any(sum(seconds.values()) > 0 for seconds in found.values()):
        return None
    labels = [safe(each.label) for each in lines]
    phases = list(dict.fromkeys([*PHASES, *(phase for seconds in found.values() for phase in seconds)]))
    figure = go.Figure()
    for index, phase in enumerate(phases):
        milliseconds = [1000 * found[each].get(phase, 0.0) / totals(group).num_tokens for each, group in lines.items()]
        if not any(milliseconds):
            continue
        figure.add_bar(
            y=labels,
            x=milliseconds,
            orientation="h",
            name=safe(phase),
            marker={"color": PHASES.get(phase, color(index))},
            customdata=[seconds.get(phase, 0.0) / (sum(seconds.values()) or 1) for seconds in found.values()],
            hovertemplate="%{x:.2f} ms per token, %{customdata:.1%} of the time<extra>%{fullData.name}</extra>",
        )
    height = max(300, 150 + 40 * len(labels))
    styled(figure, height)
    figure.update_xaxes(title_text="milliseconds per new token", showgrid=True)
    figure.update_yaxes(showgrid=False, ticksuffix="  ", autorange="reversed")
    figure.update_layout(barmode="stack", bargap=0.35, legend={"y": -60 / (height - 96), "traceorder": "normal"})
    return figure


def prompts_figure(records: Sequence[Record]) -> go.Figure | None:
    """Each prompt's τ against its speedup: where a head pays and where it does not."""
    lines = {each: group for each, group in series_of(records).items() if not each.is_baseline}
    baseline = _by_question([record for record in records if record.decoder == BASELINE])
    colors = colors_of(list(lines))
    temperatures = sorted({each.temperature for each in lines})
    figure = go.Figure()
    for each, group in lines.items():
        points = []
        for question, mine in _by_question(group).items():
            ours, theirs = matched(mine, baseline.get(question, []))
            point = (acceptance_length(mine), speedup(ours, theirs), " · ".join(question), totals(mine).num_tokens)
            if is_number(point[0]) and is_number(point[1]):
                points.append(point)
        if not points:
            continue
        tau, fast, names, tokens = zip(*points, strict=True)
        symbol = ("circle", "diamond", "square", "x")[temperatures.index(each.temperature) % 4]
        figure.add_scatter(
            x=tau,
            y=fast,
            name=safe(each.label),
            mode="markers",
            marker={"size": 8, "symbol": symbol, "color": colors[each.line], "opacity": 0.65},
            customdata=[(safe(name), count) for name, count in zip(names, tokens, strict=True)],
            hovertemplate="%{customdata[0]}<br>τ %{x:.2f}, %{y:.2f}×, %{customdata[1]} tokens"
            "<extra>%{fullData.name}</extra>",
        )
    if not figure.data:
        return None
    figure.add_hline(y=1, line={"dash": "dash", "color": BASELINE_COLOR, "width": 1.5})
    styled(figure, 300 if len(figure.data) == 1 else 420)
    figure.update_xaxes(title_text="τ of the question (tokens per forward)", showgrid=True)
    figure.update_yaxes(title_text="speedup (×)")
    figure.update_layout(showlegend=len(figure.data) > 1)
    return figure


def _by_question(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.question].append(record)
    return dict(groups)


def cost_figure(cost_rows: Sequence[Mapping]) -> go.Figure | None:
    """Predicted against measured speedup; the band is 15 % around equality."""
    points = [
        (row["predicted_speedup"], row["measured_speedup"], str(row.get("name") or row.get("decoder") or ""))
        for row in cost_rows
        if is_number(row.get("predicted_speedup")) and is_number(row.get("measured_speedup"))
    ]
    if not points:
        return None
    low = 0.9 * min(min(point[:2]) for point in points)
    high = 1.1 * max(max(point[:2]) for point in points)
    figure = go.Figure()
    figure.add_scatter(
        x=[low, high, high, low], y=[0.85 * low, 0.85 * high, 1.15 * high, 1.15 * low], fill="toself", mode="lines",
        line={"width": 0}, fillcolor=faint(BASELINE_COLOR, 0.18), name="within 15 %", hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", name="equal", hoverinfo="skip",
        line={"dash": "dash", "color": BASELINE_COLOR, "width": 1.5},
    )  # fmt: skip
    figure.add_scatter(
        x=[point[0] for point in points],
        y=[point[1] for point in points],
        text=[safe(point[2]) for point in points],
        mode="markers",
        name="configuration",
        marker={"size": 10, "color": COLORS[0], "opacity": 0.8},
        hovertemplate="%{text}<br>predicted %{x:.2f}×, measured %{y:.2f}×<extra></extra>",
    )
    styled(figure)
    figure.update_xaxes(title_text="predicted speedup (×)", showgrid=True)
    figure.update_yaxes(title_text="measured speedup (×)")
    return figure
