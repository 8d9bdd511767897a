"""Style of all figures: colors, fonts, lines, and escaping of texts for Plotly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

# Okabe-Ito without its yellow: distinguishable with color vision deficiency, on white and on black
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6BB1", "#7F7F7F")
# sequential colors, because alignment steps and depths are ordered
ORDERED = ("#2c6fbb", "#1a9a8a", "#6a9c2f", "#d08a1c", "#c8553d", "#a23b72", "#6c5b95", "#7f7f7f")
PHASES = {"prefill": "#8C6BB1", "draft": "#E69F00", "verify": "#0072B2", "bookkeeping": "#9a9a9a"}
BASELINE_COLOR = "#9a9a9a"
BASELINE_LINE = {"dash": "dash", "color": BASELINE_COLOR, "width": 1.5}
GRID = "rgba(128, 128, 128, 0.22)"
# the template's style sheet replaces the text color by the page's own, light or dark
TEXT = "#6b7280"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def color(index: int, palette: Sequence[str] = COLORS) -> str:
    """Return the color of the index-th series."""
    return palette[index % len(palette)]


def faint(hexadecimal: str, alpha: float) -> str:
    """Return a color such as `#0072B2` with transparency."""
    red, green, blue = (int(hexadecimal[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha})"


def safe(text: object) -> str:
    """Escape a text for Plotly, which interprets a subset of HTML and decodes entities in labels."""
    return escape(str(text), quote=False)


def whiskers(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Return Plotly's error bars of these lengths."""
    shape = {"type": "data", "symmetric": False, "color": TEXT, "thickness": 1.5, "width": 4}
    return shape | {"array": list(above), "arrayminus": list(below)}


def add_line(
    figure: go.Figure, x: Iterable[Any], y: Iterable[Any], name: str, shade: str, hover: str, *,
    dash: str | None = None, width: float = 2, marker: float | dict[str, Any] | None = 7, **more: Any,
) -> None:  # fmt: skip
    """Add a line, with markers if they have a size or if there is a single point; `hover` is the text at a point.

    Args:
        more: arguments of `go.Scatter`, and `row` and `col` of the panel.
    """
    values = list(y)
    figure.add_scatter(
        x=list(x),
        y=values,
        name=safe(name),
        mode="lines+markers" if marker is not None else "lines" if len(values) > 1 else "markers",
        line={"color": shade, "width": width} | ({"dash": dash} if dash else {}),
        marker={"size": marker} if isinstance(marker, int | float) else marker,
        hovertemplate=f"{hover}<extra>{safe(name)}</extra>",
        **more,
    )


def styled(figure: go.Figure, height: int = 380, x: str | None = None, y: str | None = None) -> go.Figure:
    """Apply the common style: transparent, thin grid, legend below the plot.

    Args:
        figure: the figure.
        height: height in pixels.
        x: title of the x axes.
        y: title of the first panel's y axis.
    """
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 16, "t": 44, "b": 52},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": TEXT},
        hoverlabel={"font": {"family": FONT, "size": 12}},
        legend={"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0, "title": {"font": {"size": 12}}},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#9aa5b5", "activecolor": COLORS[0]},
    )
    figure.update_annotations(font_size=13)  # titles of subplots
    title = {"standoff": 8, "font": {"size": 13}}
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True, "title": title}
    figure.update_xaxes(showgrid=False, showline=True, ticks="outside", tickcolor=GRID, **axis)
    figure.update_yaxes(showgrid=True, **axis)
    if x is not None:
        figure.update_xaxes(title_text=x)
    if y is not None:  # adjacent panels share it
        figure.update_layout(yaxis_title_text=y)
    return figure
