"""`hass-doctor` from its command line: the findings, the JSON, the exit code, and dependent stages."""

import json

import pytest
import torch

from hass_lightning.commands.doctor import Examination
from hass_lightning.draft import EagleDraft, save_draft

WORDS = ("experiment=smoke", "data=jsonl", "data.source.path=chats.jsonl", "data.num_validation=4", "data.batch_size=2")


def write_chats(folder, change=lambda text: text):
    lines = []
    for number in range(16):
        turns = [("user", f"What is {number} plus {number}, please?"), ("assistant", f"It is {2 * number}, of course.")]
        messages = [{"role": role, "content": change(text)} for role, text in turns]
        lines.append(json.dumps({"id": str(number), "messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines))


def findings(done):
    result = json.loads(done.out.strip().splitlines()[-1])
    return result, {(f["check"], f["status"]): f for f in result["findings"]}


def test_failed_stage_is_a_finding_whatever_it_raises():
    seen = Examination()

    def refuse():
        raise ValueError("target.path=x does not exist")

    assert seen.stage("target", refuse) is None
    assert [(f.check, f.status, f.message) for f in seen.findings] == [
        ("target", "error", "target.path=x does not exist")
    ]
    assert seen.stage("data", lambda: 1 / 0) is None
    assert (seen.findings[1].check, seen.findings[1].status) == ("data", "error")
    assert seen.findings[1].message == "ZeroDivisionError: division by zero"


@pytest.mark.slow
def test_valid_config_passes_and_a_saved_head_is_checked(call_command, tmp_path, tiny):
    write_chats(tmp_path)
    torch.manual_seed(0)
    save_draft(tmp_path / "head", EagleDraft.from_target(tiny.config), None, {})
    (tmp_path / "prompts.jsonl").write_text('{"question": "What is 3 plus 3, please?"}\n')
    done = call_command("doctor", *WORDS, "draft=head", "data.max_length=512")
    assert done.code == 0, done.err
    result, found = findings(done)
    assert result["num_errors"] == 0
    assert {"overfit", "reload", "features", "time", "head_tensors", "leakage", "versions"} <= {key[0] for key in found}
    assert "It is" in done.out  # the preview
    assert done.out.count("→") == result["num_warnings"]


@pytest.mark.slow
def test_budget_limits_the_estimate_as_it_limits_the_run(call_command, tmp_path):
    write_chats(tmp_path)
    budget = ("trainer.max_epochs=-1", "compute.tokens=200", "overfit_steps=0")
    done = call_command("doctor", *WORDS, "data.max_length=512", *budget)
    assert done.code == 0, done.out
    assert ("time", "ok") in findings(done)[1]


@pytest.mark.slow
def test_faults_end_with_an_error_code_and_fixes(call_command, tmp_path):
    write_chats(tmp_path, lambda text: f"<|im_start|>{text}<|im_end|>")
    (tmp_path / "head").mkdir()
    words = ("model.draft.fc_bias=true", "draft=head", "overfit_steps=0", "trainer.accelerator=gpu")
    done = call_command("doctor", *WORDS, *words)
    assert done.code == 1
    result, found = findings(done)
    assert result["num_errors"] >= 3
    assert found["template_in_text", "error"]["cure"]
    assert "config.json" in found["head", "error"]["message"]
    if not torch.cuda.is_available():
        assert ("trainer", "error") in found
    done = call_command("doctor", *WORDS, "data.source.path=nothing.jsonl", "overfit_steps=0")
    assert done.code == 1
    assert "nothing.jsonl" in findings(done)[1]["data", "error"]["message"]
