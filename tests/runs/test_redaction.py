"""Secrets are not written to files and logs, pickles are read with `weights_only`, and names cannot leave a folder."""

import ast
import json
import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hass_lightning.runs.names import run_name, safe_name
from hass_lightning.runs.provenance import plain, write_provenance
from hass_lightning.runs.redaction import RedactingFilter, find_secrets, redact, redacted

SOURCE = Path(__file__).parents[2] / "src"
PLANTED = "hf_" + "Ab3" * 11
HARMLESS = {
    "max_answer_tokens": "many",
    "eos_token": "</s>",
    "token_ids": "1",
    "key": "k",
    "name": "token",
    "note": "${oc.env:HF_TOKEN}",
}


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"])
def test_secrets_of_the_environment_are_redacted(monkeypatch, name):
    monkeypatch.setenv(name, "planted-value-of-no-known-shape")
    assert redact("url?k=planted-value-of-no-known-shape&b") == "url?k=***&b"
    assert redacted({"a": ["x planted-value-of-no-known-shape"]}) == {"a": ["x ***"]}


def test_known_key_formats_and_secret_names_are_redacted():
    assert redact(f"token {PLANTED}.") == "token ***."
    content = {"hub": {"token": "abc", "wandb_api_key": "def"}, **HARMLESS, "n": 3, "empty_token": ""}
    assert redacted(content) == {**content, "hub": {"token": "***", "wandb_api_key": "***"}}
    assert list(find_secrets(content)) == ["hub.token", "hub.wandb_api_key"]
    assert list(find_secrets({"a": [{"b": f"x{PLANTED}"}, f"y {PLANTED}"]})) == ["a[1]"]
    assert list(find_secrets(HARMLESS)) == []


def test_a_token_in_a_config_is_refused_before_anything_is_written(call_command, tmp_path):
    for arguments in (
        (f"path=x/{PLANTED}/y", "+hub.token=a-token-of-no-known-shape", f"+hydra.job.env_set.HF_TOKEN={PLANTED}"),
        ("-m", f"path=x/{PLANTED}"),
    ):
        done = call_command("import_head", *arguments)
        assert done.code == 1
        assert "contains a secret" in done.err
        assert PLANTED not in done.err + done.out
        assert "of-no-known-shape" not in done.err + done.out
        assert list(tmp_path.iterdir()) == []


def test_token_of_the_environment_is_not_recorded(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    monkeypatch.setattr("sys.argv", ["hass-train", f"data.source.path=https://x:{PLANTED}@host/file"])
    config = OmegaConf.create({"token": "${oc.env:HF_TOKEN}", "url": "https://u:${oc.env:HF_TOKEN}@host", "seed": 0})
    assert plain(config) == {"token": "***", "url": "https://u:***@host", "seed": 0}  # passed to W&B
    write_provenance(tmp_path, config)
    text = (tmp_path / "provenance.json").read_text()
    assert PLANTED not in text
    assert json.loads(text)["argv"][1] == "data.source.path=https://x:***@host/file"


def test_token_is_redacted_in_logs(caplog, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another-planted-value")
    caplog.handler.addFilter(RedactingFilter())
    logging.getLogger("hass_lightning.x").warning("asked %s with %s", "another-planted-value", PLANTED)
    assert caplog.messages == ["asked *** with ***"]


@pytest.mark.slow
def test_token_is_redacted_in_error_messages(call_command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-but-of-no-shape")
    done = call_command("import_head", "path=${oc.env:HF_TOKEN}")
    assert done.code == 1
    assert "error: path=*** is neither" in done.err


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd", "_.._etc_passwd"),
        (".ssh", "ssh"),
        ("a b\n/c", "a_b_c"),
        ("..", "unnamed"),
        ("x-1.5+y",) * 2,
    ],
)
def test_safe_name_removes_path_separators(name, safe):
    assert safe_name(name) == safe
    assert Path(f"folder/{safe_name(name)}").resolve().parent == Path("folder").resolve()


def test_run_name_cannot_leave_its_folder():
    assert run_name("name=..") == "unnamed"
    assert run_name("name=../../x") == "x"


CALLS = {"torch.load", "torch.save", "pickle.load", "pickle.loads", "numpy.load", "np.load", "yaml.load"}


def calls():
    """Return (file, dotted name, keywords) of all calls that could read or write a pickle or unpack an archive."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in CALLS or name.endswith((".extractall", ".extract", ".unpack_archive")):
                    yield path.name, name, {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_pickles_are_read_weights_only_and_written_nowhere_but_for_sglang():
    found = list(calls())
    assert {(file, name) for file, name, _ in found} == {
        ("import_official.py", "torch.load"),
        ("export.py", "torch.save"),
    }
    assert all(keywords["weights_only"] == "True" for _, name, keywords in found if name == "torch.load")
