"""The probe step, the estimates and the overfitted conversation, with injected faults."""

import functools
import shutil
from collections import namedtuple

import lightning.pytorch as L
import pytest
import torch

from hass_lightning.checks import overfit
from hass_lightning.checks.overfit import accepted, check_overfit
from hass_lightning.checks.probe import check_disk, estimate_time, longest_batch, probe_step
from hass_lightning.draft import Alignment, EagleDraft
from hass_lightning.losses import DraftLoss, FeatureRegression, SoftCrossEntropy, TopK
from hass_lightning.training.module import HassModule
from hass_lightning.types import Conversation, DecodeResult, Message, Tokens

QUESTIONS = [Conversation(str(n), (Message("user", f"Question {n}, please."),)) for n in range(4)]


@pytest.fixture
def module(tiny):
    torch.manual_seed(0)
    loss = DraftLoss({"feature": FeatureRegression(1.0), "soft_ce": SoftCrossEntropy(0.1), "top_k": TopK(1.0)})
    draft = EagleDraft.from_target(tiny.config)
    return HassModule(draft, loss, Alignment(3), tiny.head, functools.partial(torch.optim.AdamW, lr=1e-3))


@pytest.fixture
def sequence():
    mask = torch.zeros(40, dtype=torch.bool)
    mask[20:39] = True
    return Tokens("long", torch.arange(3, 43), mask)


def trainer():
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def test_a_probe_step_measures_and_finds_no_fault(tiny, module, sequence):
    batch = longest_batch(tiny, [sequence, Tokens("short", torch.arange(9), torch.zeros(9, dtype=torch.bool))], 2)
    (learning, memory), step = probe_step(module, trainer(), batch, torch.device("cpu"))
    assert (learning.status, memory.status) == ("ok", "ok")
    assert "on 38 loss positions" in learning.message
    assert step.num_tokens == 80
    assert 0 < step.peak_bytes < step.available_bytes
    finding = estimate_time(step, num_steps=60, tokens_a_step=40.0, num_tokens=6000, speed=100.0)
    assert "about 1.0 minutes of features" in finding.message
    assert f"{step.seconds / 2:.1f} of training in 60 steps" in finding.message


def test_probe_step_names_missing_gradients_and_overflows(tiny, module, sequence, monkeypatch):
    empty = Tokens("empty", sequence.input_ids, torch.zeros(40, dtype=torch.bool))
    (finding, _), _ = probe_step(module, trainer(), longest_batch(tiny, [empty], 1), torch.device("cpu"))
    assert finding.status == "error"
    batch = longest_batch(tiny, [sequence], 1)
    batch[0].features[:] = float("inf")
    (finding, _), _ = probe_step(module, trainer(), batch, torch.device("cpu"))
    assert finding.status == "error"
    assert "not finite" in finding.message

    def too_much(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(module, "aligned_loss", too_much)
    (finding,), step = probe_step(module, trainer(), batch, torch.device("cpu"))
    assert step is None
    assert (finding.check, finding.status) == ("memory", "error")
    assert "1 sequences of 40 tokens" in finding.message


def test_size_is_compared_with_free_disk_space(tiny, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1e9))
    bytes_a_token = 64 * 4 + 9
    tokens = int(0.6e9 / bytes_a_token)
    assert [f.status for f in check_disk(tiny, tokens, 10, tmp_path, tmp_path)] == ["warning", "ok"]
    assert [f.status for f in check_disk(tiny, 2 * tokens, 10**8, tmp_path, tmp_path)] == ["error", "error"]


def test_only_cycles_within_the_answer_are_counted():
    def traced(length, *cycles):
        return DecodeResult([0] * length, list(cycles), [3] * len(cycles), [3] * len(cycles), {})

    assert accepted(traced(10, 3, 3, 1)) == (6, 6)  # 1 + 4 + 4, then one token is left
    assert accepted(traced(9, 3, 1, 0)) == (4, 6)
    assert accepted(traced(2, 1)) == (0, 0)


def test_one_conversation_is_overfitted_saved_and_accepted_again(tiny, module, tmp_path):
    module.token_ids = torch.arange(0, 259, 2)  # half of the vocabulary: the answer's tokens are added
    findings = check_overfit(tiny, module, QUESTIONS, tmp_path)
    assert [(f.check, f.status) for f in findings] == [("overfit", "ok"), ("reload", "ok")]
    kept, offered = findings[0].message.split("conversation ")[1].split(" draft tokens")[0].split(" of ")
    assert int(kept) == int(offered) > 0


def test_loss_without_effect_is_named(tiny, module, tmp_path):
    module.loss = DraftLoss({"feature": FeatureRegression(1e-30)})
    (finding,) = check_overfit(tiny, module, QUESTIONS, tmp_path, max_steps=20)
    assert (finding.check, finding.status) == ("overfit", "error")


@pytest.mark.slow
def test_a_tensor_lost_between_saving_and_reading_is_named(tiny, module, tmp_path, monkeypatch):
    def load(path):
        saved = load_draft(path)
        torch.nn.init.normal_(saved.draft.fc.weight)
        return saved

    load_draft = overfit.load_draft
    monkeypatch.setattr(overfit, "load_draft", load)
    findings = check_overfit(tiny, module, QUESTIONS, tmp_path)
    assert [(f.check, f.status) for f in findings] == [("overfit", "ok"), ("reload", "error")]


def test_head_that_the_export_checks_refuse_is_named(tiny, module, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("the exported head computes other logits than the trained one")

    monkeypatch.setattr("hass_lightning.serving.export_checks.parity", refuse)
    findings = check_overfit(tiny, module, QUESTIONS, tmp_path)
    assert [(f.check, f.status) for f in findings] == [("overfit", "ok"), ("reload", "error")]
    assert "computes other logits" in findings[1].message
