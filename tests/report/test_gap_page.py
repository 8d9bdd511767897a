"""`hass-report gap=…`: the bars add up, and the files name what is not explained."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from report_factory import make_records

from hass_lightning.measure.gap import explain_gap, measurements_of
from hass_lightning.measure.metrics import acceptance_length
from hass_lightning.report.gap import gap_figure, gap_report

CHOSEN = {"head": "hass", "temperature": 0.0, "prompts": "mt_bench"}


@pytest.fixture
def folder(tmp_path):
    records = make_records(num_prompts=6)
    (tmp_path / "records.jsonl").write_text("".join(record.to_json() + "\n" for record in records))
    return tmp_path


def published(folder, **changes):
    """Return a reference: the chain on GSM8K with 0.5 more, in half precision."""
    records = [r for r in make_records(num_prompts=6) if (r.draft, r.decoder, r.temperature) == ("hass", "chain", 0)]
    length = acceptance_length([r for r in records if r.benchmark == "gsm8k"]) + 0.5
    reference = {"acceptance_length": length, "tree": "chain", "prompts": "gsm8k", "precision": "float16"} | changes
    path = folder / "published.yaml"
    path.write_text(yaml.safe_dump(reference))
    return str(path)


def test_report(folder, capsys):
    found = gap_report(published(folder), str(folder), **CHOSEN)
    assert [step["factor"] for step in found["steps"]] == ["tree", "prompts"]
    assert found["remainder"]["value"] == pytest.approx(0.5)
    assert found["not_evaluated"] == ["precision"] and "target.dtype" in found["how_to_evaluate"]["precision"]
    page = (folder / "report" / "gap.html").read_text()
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=.(?:https?:)?//", page)
    assert "target.dtype" in page and "not explained" in page
    assert json.loads((folder / "report" / "gap.json").read_text())["convention"] == "tau_micro"
    printed = capsys.readouterr().err
    assert "not explained (precision)" in printed and "Not stated" in printed


def test_bars_add_up():
    found = measurements_of(make_records(("hass",), num_prompts=6))
    start = next(each for each in found if each.conditions["tree"]["decoder"] == "dynamic_tree")
    reference = {"acceptance_length": 3.0, "convention": "hass_eagle", "tree": "chain", "temperature": 1.0}
    gap = explain_gap(reference, start, [each for each in found if each is not start])
    (bars,) = gap_figure(gap).data
    assert bars.base[0] == bars.base[-1] == 0 and bars.y[-1] == 3.0
    for before, base in enumerate(bars.base[1:-1]):
        assert base == pytest.approx(bars.base[before] + bars.y[before])
    assert bars.base[-2] + bars.y[-2] == pytest.approx(3.0)
    assert len(bars.y) == len(gap.steps) + 3 == len(bars.hovertext)


def test_other_folders_give_template_and_rows(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    records = [replace(r, accepted=[3] * len(r.accepted)) for r in make_records(num_prompts=6)]
    (other / "records.jsonl").write_text("".join(record.to_json() + "\n" for record in records))
    mine = [
        {"records": str(folder), "template": "own", "training_rows": 100},
        {"records": str(other), "template": "vicuna", "training_rows": 100},
    ]
    reference = {"acceptance_length": 4.0, "template": "vicuna", "training_rows": 100}
    found = gap_report(reference, mine, **CHOSEN)
    assert [step["factor"] for step in found["steps"]] == ["template"]
    assert found["remainder"]["value"] == pytest.approx(0)


def test_errors(folder):
    reference = {"acceptance_length": 3.0}
    with pytest.raises(ValueError, match="prompts=None must be one of the measured ones: gsm8k, mt_bench"):
        gap_report(reference, str(folder), head="hass", temperature=0.0)
    with pytest.raises(ValueError, match=r"gap\.reference=none\.yaml cannot be read"):
        gap_report("none.yaml", str(folder), **CHOSEN)
    with pytest.raises(ValueError, match=r"gap\.mine has the key rows"):
        gap_report(reference, [{"records": str(folder), "rows": 3}], **CHOSEN)
    with pytest.raises(ValueError, match=r"gap\.mine must be a run folder"):
        gap_report(reference, [], **CHOSEN)
