"""Hooks of mkdocs: pages outside docs/ join the site, and docs/config.md shows the files of conf/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PLACE = "<!-- conf -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that lie outside docs/, under the addresses that links between them use."""
    outside = [path for folder in ("experiments", "benchmarks") for path in sorted((ROOT / folder).iterdir())]
    cards = sorted((ROOT / "src" / "hass_lightning").rglob("README.md"))  # of the corpus and the heads in the package
    for path in (*outside, *cards):
        if path.suffix in (".md", ".png", ".html"):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the place of the files in a page, if it has one."""
    return markdown.replace(PLACE, files()) if PLACE in markdown else markdown


def files() -> str:
    """A section for the files of the commands and one for each group, a heading and a code block for each file."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(CONF.rglob("*.yaml")):
        groups.setdefault(path.parent.relative_to(CONF).as_posix(), []).append(path)
    commands = groups.pop(".")
    sections = [("Commands", commands), *groups.items()]
    return "\n".join(section(title, paths) for title, paths in sections if title != "local")


def section(title: str, paths: list[Path]) -> str:
    """The files of one folder."""
    lines = [f"## {title}", ""]
    for path in paths:
        name = path.relative_to(CONF).with_suffix("").as_posix()
        lines += [f"### {name}", "", f"```yaml\n{path.read_text(encoding='utf-8').strip()}\n```", ""]
    return "\n".join(lines)
