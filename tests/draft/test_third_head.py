"""A third kind of head is one file and one YAML: nothing outside draft/, serving/ and conf/ knows kinds of heads."""

import json
import re
from pathlib import Path

import pytest
import torch
from third_head import SumDraft

import hass_lightning
from hass_lightning.draft import load_draft
from hass_lightning.serving import export_head

YAML = "_target_: third_head.SumDraft.from_target\n_partial_: true\nlayers: [1]\nvocab_size: null\n"
SOURCE = Path(hass_lightning.__file__).parent
KINDS = re.compile(r"EagleDraft|Eagle3|SumDraft|midlayer|isinstance\([\w.]*draft|\.draft\.fc\b|\bdraft\.fc\b")


def test_a_third_head_trains_decodes_losslessly_and_is_exported(call_command, tiny, tmp_path):
    (tmp_path / "own" / "model" / "draft").mkdir(parents=True)
    (tmp_path / "own" / "model" / "draft" / "sum.yaml").write_text(YAML)
    options = [
        "experiment=smoke",
        f"hydra.searchpath=[file://{tmp_path}/own]",
        "model/draft=sum",
        "trainer.max_steps=3",
    ]
    done = call_command("train", *options, "name=third", "logger=csv", "callbacks.decoding.max_new_tokens=12")
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert (result["num_checked"], result["num_identical"]) == (2, 2)
    saved = load_draft(result["run_dir"])
    assert type(saved.draft) is SumDraft and saved.draft.feature_layers == (1,)
    export_head(saved, tiny, "hub", tmp_path / "hub")
    again = load_draft(tmp_path / "hub")
    assert all(torch.equal(again.draft.state_dict()[name], value) for name, value in saved.draft.state_dict().items())
    with pytest.raises(ValueError, match="format=vllm is none of hub"):
        export_head(saved, tiny, "vllm", tmp_path / "vllm")


def test_the_class_of_a_head_is_not_imported_from_anywhere(call_command, tiny, tmp_path):
    from hass_lightning.draft import save_draft

    save_draft(tmp_path, SumDraft.from_target(tiny.config), None, {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hass_lightning"]["head"] == "third_head.SumDraft"
    for name in ("antigravity.fly", "os.system", "hass_lightning.draft.nothing.Draft", "json.JSONDecoder"):
        config["hass_lightning"]["head"] = name
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="contains a head of the unknown class"):
            load_draft(tmp_path)


def test_no_other_package_tells_kinds_of_heads_apart():
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE)
        if place.parts[0] in ("draft", "serving") or place == Path("__init__.py"):
            continue
        found = KINDS.search(path.read_text())
        assert found is None, f"{place}: {found and found.group()}"
