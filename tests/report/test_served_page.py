"""`hass-report served=…`: the files, the sentence, and the choice of records."""

import json
import re

import pytest
from report_factory import make_record, make_records

from hass_lightning.report.served import choose_records, served_report


def write_records(folder, records):
    (folder / "records.jsonl").write_text("".join(record.to_json() + "\n" for record in records))
    return folder


def metrics(num_drafts, *accepted):
    lines = [f"vllm:spec_decode_num_drafts_total {num_drafts}.0"]
    lines += [f"vllm:spec_decode_num_draft_tokens_total {num_drafts * len(accepted)}.0"]
    lines += [f"vllm:spec_decode_num_accepted_tokens_total {sum(accepted)}.0"]
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    return "\n".join([*lines, *(f'{name}{{position="{k}"}} {n}.0' for k, n in enumerate(accepted))])


def test_report_of_equal_and_of_different_counts(tmp_path, capsys):
    write_records(tmp_path, [make_record(prompt_id=f"p{n}", accepted=(3, 0, 3, 1) * 20) for n in range(10)])
    served = tmp_path / "metrics.txt"
    served.write_text(metrics(800, 600, 400, 400))  # as in the records
    found = served_report(tmp_path, str(served))
    assert found["verdict"] == "no difference is shown at any position (2.750 served, 2.750 measured here)."
    assert found["causes"] == []
    served.write_text(metrics(800, 600, 150, 60))
    found = served_report(tmp_path, str(served))
    assert found["verdict"].startswith("acceptance differs at position 2, 3")
    assert [cause["name"] for cause in found["causes"]] == ["draft steps after the first"]
    page = (tmp_path / "report" / "served.html").read_text()
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=.(?:https?:)?//", page)
    assert "draft steps after the first" in page and "rope" in page
    stored = json.loads((tmp_path / "report" / "served.json").read_text())
    assert stored["positions"][0]["p_value"] == 1
    assert "given the earlier ones" in capsys.readouterr().err


def test_records_must_be_of_one_head_and_temperature():
    records = make_records()
    with pytest.raises(ValueError, match=r"head=null.*'eagle', 'hass'"):
        choose_records(records)
    with pytest.raises(ValueError, match=r"temperature=null.*0\.0, 1\.0"):
        choose_records(records, "hass")
    kept = choose_records(records, "hass", temperature=1.0)
    assert {(r.draft, r.decoder, r.temperature) for r in kept} == {("hass", "chain", 1.0)}
    with pytest.raises(ValueError, match="head=other was not measured"):
        choose_records(records, "other")
    with pytest.raises(ValueError, match="decoder=static_tree was not measured: choose one of chain, dynamic_tree"):
        choose_records(records, "hass", "static_tree")
