"""The errors of hass-doctor are correct, and a check that fails does not prevent the others."""

import json

import pytest
from family_toys import FITTING, load, write_target

from hass_lightning.checks import head as head_checks
from hass_lightning.checks.finding import error, ok, run_check
from hass_lightning.checks.head import check_head
from hass_lightning.checks.head_fits_target import check_rope, check_special_tokens, check_target_weights
from hass_lightning.checks.machine import check_attention
from hass_lightning.commands import doctor
from hass_lightning.draft import EagleDraft, save_draft


@pytest.mark.parametrize("family", FITTING)
def test_a_sound_target_of_any_family_has_no_error(tmp_path, family):
    target = load(write_target(tmp_path / "target", FITTING[family]()))
    draft = EagleDraft.from_target(target.config)
    folder = save_draft(tmp_path / "head", draft, None, {"target_fingerprint": target.fingerprint, "target": "toy"})
    findings = [
        *(each for check in (check_target_weights, check_special_tokens, check_attention)
          for each in run_check(check, target)),
        *run_check(check_rope, target, draft, 256),
        *check_head(folder, target),
    ]  # fmt: skip
    assert [(f.check, f.message) for f in findings if f.status != "ok"] == []
    assert len(findings) >= 10


def test_failed_check_is_a_finding_in_one_line():
    def check_refusing():
        raise ValueError("target.path=x does not exist")

    def check_broken():
        raise RuntimeError("shapes\ndo not match")

    def check_several():
        return [ok("a", "x"), error("b", "y")]

    (refused,) = run_check(check_refusing)
    assert (refused.check, refused.status, refused.message) == ("refusing", "error", "target.path=x does not exist")
    (broken,) = run_check(check_broken)  # the failure of the check is not a fault of the run
    assert (broken.check, broken.status) == ("broken", "warning")
    assert broken.message == "the check itself failed: RuntimeError: shapes do not match"
    assert [f.check for f in run_check(check_several)] == ["a", "b"]


def test_the_other_checks_of_a_head_still_run(tiny, tmp_path, monkeypatch):
    folder = save_draft(tmp_path / "head", EagleDraft.from_target(tiny.config), None, {})
    whole = [finding.check for finding in check_head(folder, tiny)]

    def check_head_rope(raw, target):
        raise KeyError("rope_theta")

    monkeypatch.setattr(head_checks, "check_head_rope", check_head_rope)
    found = check_head(folder, tiny)
    assert [finding.check for finding in found] == whole
    assert {f.check: f.message for f in found if f.status != "ok"} == {
        "head_rope": "the check itself failed: KeyError: 'rope_theta'"
    }


def test_the_other_checks_of_a_target_still_run(tiny, monkeypatch):
    def check_target_weights(target):
        raise RuntimeError("size of tensor a (8) must match")

    monkeypatch.setattr(doctor, "check_target_weights", check_target_weights)
    found = {f.check: f.status for f in doctor.examine_target(tiny, on_gpu=False)}
    assert found == {"target_weights": "warning", "special_tokens": "ok", "attention": "ok", "target_device": "ok"}


def test_head_config_that_is_not_an_object_is_a_one_sentence_error(tiny, tmp_path):
    folder = save_draft(tmp_path / "head", EagleDraft.from_target(tiny.config), None, {})
    (folder / "config.json").write_text(json.dumps(["no"]))
    with pytest.raises(ValueError, match="contains a list instead of an object"):
        check_head(folder, tiny)
