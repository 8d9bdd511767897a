from __future__ import annotations

import base64
import gzip
import re
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs_version
from report_factory import Words, make_record, make_records, write_run

from hass_lightning.measure.summary import summarize
from hass_lightning.report import benchmark_report, run_report
from hass_lightning.report.html import Page, Section, arranged, render
from hass_lightning.report.provenance_text import read_config, without_paths
from hass_lightning.report.record_tables import comparison_table, conventions_table
from hass_lightning.runs.files import read_json

LOADING = {"src", "href", "data", "action", "poster", "srcset", "xlink:href"}
HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    """The elements and visible text of a page; scripts and styles are kept separately."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.scripts, self.styles, self._inside = "", [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside == "style":
            self.styles.append(data)
        else:
            self.text += data


def check_self_contained(tags: Tags) -> None:
    for tag, attributes in tags.tags:
        for name in LOADING & set(attributes):
            assert attributes[name].startswith(("data:", "#")), f"<{tag} {name}={attributes[name]}> loads something"
        assert tag not in ("iframe", "object", "embed", "img")
        assert not any(name.startswith("on") for name in attributes), f"<{tag}> has an event handler"
    assert "url(" not in "".join(tags.styles) and "@import" not in "".join(tags.styles)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    records = make_records()
    cost = [{"predicted_speedup": 1.5, "measured_speedup": 1.4, "name": HOSTILE}]
    path = benchmark_report(folder, summarize(records), records, Words(), cost, prompts={"p0": HOSTILE})
    return folder, Tags(path.read_text())


def test_run_report(tmp_path, capsys):
    run_dir = write_run(tmp_path / "run")
    records = [make_record(prompt_id=f"p{n}") for n in range(3)]
    records += [make_record("autoregressive", "", prompt_id=f"p{n}", accepted=(0,) * 10, depth=0) for n in range(3)]
    path = run_report(run_dir, summarize(records), records)
    assert path == run_dir / "report.html"
    printed = capsys.readouterr()
    assert printed.out == "" and "chain" in printed.err and "speedup" in printed.err
    tags = Tags(path.read_text())
    check_self_contained(tags)
    for expected in ("Loss by alignment step", "Simulated acceptance length", "Time by phase", "1.5 min", "3/3"):
        assert expected in tags.text
    assert "/home/someone" not in tags.text and "…/q.jsonl" in tags.text
    assert not list(run_dir.glob(".report.html*"))  # no temporary file is left


def test_plotly_is_inlined_once_and_uploads_nothing(bench):
    _, tags = bench
    check_self_contained(tags)
    assert sum("plotly.js v" in script[:400] for script in tags.scripts) == 1
    (packed,) = [script for script in tags.scripts if script.startswith("H4sI")]
    library = gzip.decompress(base64.b64decode(packed)).decode()
    assert f"plotly.js (basic - minified) v{get_plotlyjs_version()}" in library[:100]
    drawn = [script for script in tags.scripts if "Plotly.newPlot" in script and len(script) < 1_000_000]
    assert len(drawn) == 6
    for script in drawn:
        assert '"showSendToCloud": false' in script and "https://" not in script


def test_markup_in_text_is_escaped(bench):
    _, tags = bench
    assert HOSTILE in tags.text  # as a prompt: shown and not executed
    assert "<script>alert(1)</script>" in tags.text  # as a token
    assert not any(script.lstrip().startswith("alert") for script in tags.scripts)
    assert sum(tag == "script" for tag, _ in tags.tags) == len(tags.scripts)


def test_benchmark_tables_are_files(bench):
    folder, tags = bench
    assert "mt_bench speedup |" in (folder / "table.md").read_text()
    assert (folder / "table.tex").read_text().startswith("\\begin{tabular}")
    assert "mean_speedup_low" in (folder / "table.csv").read_text()
    assert "Head against head" in tags.text and "hass over eagle" in tags.text


def test_nothing_measured(tmp_path):
    for report in (run_report, benchmark_report):
        tags = Tags(report(tmp_path / "new", [], []).read_text())
        check_self_contained(tags)
        assert "Nothing was measured yet" in tags.text and "script" not in [tag for tag, _ in tags.tags]


def test_report_of_curves_only(tmp_path, capsys):
    text = run_report(write_run(tmp_path / "run"), [], []).read_text()
    assert "Accuracy by alignment step" in text and "Measured by decoding" not in text
    assert capsys.readouterr().err == ""


def test_unknown_numbers(tmp_path):
    records = [make_record(), make_record(accepted=(), prompt_id="p1")]  # no baseline, one answer without a cycle
    rows = [*summarize(records), {"draft": "", "decoder": "x", "speedup": float("nan"), "benchmark": "mt_bench"}]
    for report in (run_report, benchmark_report):
        text = Tags(report(tmp_path / "run", rows, records).read_text()).text
        assert not re.search(r"\bnan\b", text)


def test_lone_surrogates_do_not_stop_the_report(tmp_path):
    records = [make_record(prompt_id="p\ud800")]
    assert run_report(tmp_path / "run", summarize(records), records).exists()


def test_figures_of_a_page_have_distinct_ids(bench):
    _, tags = bench
    ids = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and "figure-0" in ids


def test_halves_come_in_pairs():
    def widths(*halves):
        return [section.half for section in arranged([Section("", go.Figure(), half=half) for half in halves])]

    assert widths(True, True) == [True, True]
    assert widths(True, False, True) == [False, False, False]
    assert widths(True, True, True, False) == [True, True, False, False]


def test_the_page_escapes_its_own_texts():
    page = Page(HOSTILE, HOSTILE, provenance={HOSTILE: HOSTILE}, config=HOSTILE)
    assert "<img" not in render(page)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path: /home/me/models/llama", "path: …/llama"),
        ("data.path='/tmp/a b.jsonl'", "data.path='…/a b.jsonl'"),
        ("url: https://pypi.org/simple/x", "url: https://pypi.org/simple/x"),
        ("id: HuggingFaceTB/SmolLM2-135M", "id: HuggingFaceTB/SmolLM2-135M"),
        ("[/a/b, ~/c/d]", "[…/b, …/d]"),
        ("C:\\Users\\me\\x.json", "…/x.json"),
        ("fraction: 1/2", "fraction: 1/2"),
        ("dir: ${paths.root}/data/${name}", "dir: ${paths.root}/data/${name}"),
    ],
)
def test_without_paths(text, expected):
    assert without_paths(text) == expected


def test_config_without_paths(tmp_path):
    config = read_config(write_run(tmp_path / "run"))
    assert "paths:" not in config and "someone" not in config
    assert "seed: 0" in config and "HassModule" in config and "https://example.org/a/b" in config
    assert read_config(tmp_path / "nowhere") == ""


def test_damaged_json_does_not_raise(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[1]")
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "b.json") == read_json(tmp_path / "c.json") == {}


def test_record_tables():
    records = make_records(temperatures=(0.0,))
    table = comparison_table(records)
    assert len(table.lines) == 4  # two decoders on two benchmarks
    assert comparison_table([record for record in records if record.draft != "eagle"]) is None
    assert len(conventions_table(records).lines) == 4
    assert conventions_table([record for record in records if not record.draft]) is None
