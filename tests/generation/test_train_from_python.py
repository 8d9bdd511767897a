"""The script of docs/tasks/python.md trains a head, and the five lines of the README use it."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import hass_lightning
from hass_lightning.draft import EagleDraft, load_draft
from hass_lightning.types import Message, Sampling

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "train_from_python.py"


def test_the_page_shows_the_script():
    assert SCRIPT.read_text() in (ROOT / "docs" / "tasks" / "python.md").read_text()
    code = [line for line in SCRIPT.read_text().splitlines() if line and not line.startswith(('"""', "import", "from"))]
    assert len(code) <= 20


def test_the_script_trains_a_head_that_decodes(tiny, tmp_path, monkeypatch):
    chats = [[("user", f"What is {n} plus {n}?"), ("assistant", f"It is {2 * n}, of course.")] for n in range(24)]
    records = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tiny.folder), "chats.jsonl", "head"])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        module = runpy.run_path(str(SCRIPT))
    assert re.search(r"simulated acceptance length: [\d.]+\n", out.getvalue())
    assert module["trainer"].global_step == 3 * 4
    (batch, _) = next(iter(module["data"].val_dataloader()))
    losses = []
    for draft in (load_draft("head").draft, EagleDraft.from_target(tiny.config)):
        made = hass_lightning.HassModule(
            draft, module["loss"], hass_lightning.Alignment(3), tiny.head, torch.optim.AdamW
        )
        losses.append(float(made.aligned_loss(batch).total))
    assert losses[0] < 0.9 * losses[1]
    model = hass_lightning.load("head", "target=tiny")
    assert model.generate("What is 3 plus 3?", 16).text


def test_the_five_lines(run_dir, tiny):
    model = hass_lightning.load(run_dir)
    assert model.models.target.name == "tiny" and model.decoder.num_nodes == 12
    answer = model.generate("Why is the sky blue?", max_new_tokens=24)
    assert 1 <= answer.tokens_per_forward <= 3 and answer.tokens_per_second > 0
    plain = hass_lightning.load(run_dir, "decoding=autoregressive").generate("Why is the sky blue?", 24)
    assert (answer.text, answer.result.token_ids) == (plain.text, plain.result.token_ids)


def test_streamed_text_is_the_whole_text(chat):
    chunks = list(chat.stream([Message("user", "Why?")], 40, Sampling(1.0), seed=3))
    answer = chat.generate("Why?", 40, Sampling(1.0), seed=3)
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert sum(chunk.num_tokens for chunk in chunks) == len(answer.result.token_ids) == 40
    assert chat.generate("Why?", 40, Sampling(1.0), seed=4).text != answer.text


@pytest.mark.slow
def test_the_five_lines_on_smollm2():
    model = hass_lightning.load()
    answer = model.generate("Why is the sky blue?", max_new_tokens=48)
    plain = hass_lightning.load("packaged", "decoding=autoregressive", "target.dtype=float32")
    assert "sky" in answer.text and answer.tokens_per_forward > 1.5
    if model.models.target.dtype == torch.float32:
        assert plain.generate("Why is the sky blue?", 48).text == answer.text
