"""One self-contained HTML page: figures, table, answers and provenance in a single file that needs no network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hass_lightning.files import write_whole
from hass_lightning.report.answers import Answer
from hass_lightning.report.headline import Tile
from hass_lightning.report.tables import Table

TEMPLATE = "template.html.j2"
PLOT_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    # plotly.js 4 offers to upload a figure's data to Plotly's cloud unless it is told not to
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "sendDataToCloud", "sendChartToCloud"],
}


@dataclass(frozen=True)
class Section:
    """A figure with its title and a sentence on how to read it."""

    title: str
    figure: go.Figure
    note: str = ""
    half: bool = False  # half the page's width


@dataclass
class Page:
    """What a report shows; whatever is empty is left out."""

    title: str
    subtitle: str = ""
    tiles: list[Tile] = field(default_factory=list)
    tiles_note: str = ""
    tables: list[tuple[str, Table]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    appendix: list[tuple[str, Table]] = field(default_factory=list)  # folded
    provenance: dict[str, str] = field(default_factory=dict)
    config: str = ""


def render(page: Page) -> str:
    """The page as HTML. All texts are escaped; only the figures' own markup is taken as it is."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures: list[tuple[Section, Markup]] = []
    for index, section in enumerate(arranged(page.sections)):
        # plotly escapes <, > and / in the figure's JSON, so that no text of a figure can end the script
        text = section.figure.to_html(
            full_html=False, include_plotlyjs=False, config=PLOT_CONFIG, div_id=f"figure-{index}", default_width="100%"
        )
        figures.append((section, Markup(text)))
    library = Markup(get_plotlyjs()) if figures else ""
    return environment.get_template(TEMPLATE).render(page=page, figures=figures, plotlyjs=library)


def arranged(sections: list[Section]) -> list[Section]:
    """Sections whose halves come in pairs: a half without a neighbour takes the whole width."""
    result: list[Section] = []
    open_half = False
    for section in sections:
        if open_half and not section.half:
            result[-1] = replace(result[-1], half=False)
        open_half = section.half and not open_half
        result.append(section)
    if open_half:
        result[-1] = replace(result[-1], half=False)
    return result


def write_page(page: Page, path: Path) -> Path:
    """Render into `path`, replacing it only when the page is whole."""
    write_whole(path, render(page), errors="replace")
    return path


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested provenance as name and text; what is None is left out."""
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        elif value is not None:
            found[name] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found
