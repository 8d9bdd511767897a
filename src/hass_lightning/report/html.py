"""One self-contained HTML page: figures, table, answers and provenance in a single file that needs no network.

The page holds plotly.js once, as the part of it that draws lines and bars (plotly.js-basic-dist-min, MIT licence,
compressed by gzip -9 -n), and unpacks it when it is opened: half a megabyte instead of the package's five.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hass_lightning.report.answers import Answer
from hass_lightning.report.headline import Tile
from hass_lightning.report.tables import Table
from hass_lightning.runs.files import write_whole

TEMPLATE = "template.html.j2"
PLOTLY = Path(__file__).with_name("plotly-basic-4.1.1.min.js.gz")
SCRIPT = re.compile(r'<script( type="text/javascript")?>')  # as plotly writes it
PLOT_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    # plotly.js 4 offers to upload a figure's data to Plotly's cloud unless this is turned off
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "sendDataToCloud", "sendChartToCloud"],
}


@dataclass(frozen=True)
class Section:
    """A figure with its title and an explanation."""

    title: str
    figure: go.Figure
    note: str = ""
    half: bool = False  # half the page's width


@dataclass
class Page:
    """Contents of a report; empty parts are left out."""

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

    def add(self, title: str, figure: go.Figure | None, note: str = "", half: bool = False) -> None:
        """Append a figure if there is one."""
        if figure is not None:
            self.sections.append(Section(title, figure, note, half))


def render(page: Page) -> str:
    """Return the page as HTML. All texts are escaped, except the markup of figures."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures: list[tuple[Section, Markup]] = []
    for index, section in enumerate(arranged(page.sections)):
        # plotly escapes <, > and / in the JSON of a figure, so no text in it can end the script
        text = section.figure.to_html(
            full_html=False, include_plotlyjs=False, config=PLOT_CONFIG, div_id=f"figure-{index}", default_width="100%"
        )
        # run by the template's script when the library is unpacked
        figures.append((section, Markup(SCRIPT.sub('<script type="text/plain" class="figure">', text))))
    library = Markup(base64.b64encode(PLOTLY.read_bytes()).decode()) if figures else ""
    return environment.get_template(TEMPLATE).render(page=page, figures=figures, plotlyjs=library)


def arranged(sections: list[Section]) -> list[Section]:
    """Return the sections with halves in pairs: a half without a neighbor gets the whole width."""
    result: list[Section] = []
    for half, neighbours in groupby(sections, key=lambda section: section.half):
        result += neighbours
        if half and sum(section.half for section in result) % 2:
            result[-1] = replace(result[-1], half=False)
    return result


def write_page(page: Page, path: Path) -> Path:
    """Write the page to `path`, replacing it atomically."""
    write_whole(path, render(page), errors="replace")
    return path
