"""What all figures share: colours, fonts, and texts that are safe inside Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

# Okabe-Ito without its yellow: told apart by colour-blind readers, on white and on black
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6BB1", "#7F7F7F")
# alignment steps and depths are ordered, so their colours are, too
ORDERED = ("#2c6fbb", "#1a9a8a", "#6a9c2f", "#d08a1c", "#c8553d", "#a23b72", "#6c5b95", "#7f7f7f")
PHASES = {"prefill": "#8C6BB1", "draft": "#E69F00", "verify": "#0072B2", "bookkeeping": "#9a9a9a"}
BASELINE_COLOR = "#9a9a9a"
GRID = "rgba(128, 128, 128, 0.22)"
# the template's style sheet replaces the text colour by the page's own, light or dark
TEXT = "#6b7280"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def color(index: int, palette: Sequence[str] = COLORS) -> str:
    """The colour of the index-th series."""
    return palette[index % len(palette)]


def faint(hexadecimal: str, alpha: float) -> str:
    """`#0072B2` as a translucent colour."""
    red, green, blue = (int(hexadecimal[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha})"


def safe(text: object) -> str:
    """A text that Plotly shows as it is: it reads a small HTML in labels and decodes entities."""
    return escape(str(text), quote=False)


def styled(figure: go.Figure, height: int = 380) -> go.Figure:
    """The common look: transparent, thin grid, legend below the plot."""
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
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GRID,
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13}},
    }
    figure.update_xaxes(showgrid=False, showline=True, ticks="outside", tickcolor=GRID, **axis)
    figure.update_yaxes(showgrid=True, **axis)
    return figure
