"""Injected faults between target and head: each is reported."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hass_lightning.checks import machine
from hass_lightning.checks.features import check_features
from hass_lightning.checks.head import check_head, check_head_rope
from hass_lightning.checks.head_fits_target import (
    check_fc_bias,
    check_rope,
    check_special_tokens,
    check_target_weights,
    check_vocabulary,
)
from hass_lightning.data import shards
from hass_lightning.data.features import extract_features
from hass_lightning.draft import EagleDraft, load_draft, save_draft
from hass_lightning.target_model.source import sha256_file
from hass_lightning.types import Tokens


@pytest.fixture
def head(tiny, tmp_path):
    """A folder with a head for the tiny target, and a function that damages it."""
    torch.manual_seed(0)
    notes = {"target": "tiny", "target_fingerprint": tiny.fingerprint}
    folder = save_draft(tmp_path / "head", EagleDraft.from_target(tiny.config), None, notes)

    def spoil(tensors=None, **config):
        file = folder / "model.safetensors"
        stored = load_file(file)
        for name, change in (tensors or {}).items():
            value = change(stored.pop(name, None))
            stored |= {} if value is None else {name: value}
        save_file(stored, file)
        text = json.loads((folder / "config.json").read_text())
        ours = config.pop("ours", {})
        text["hass_lightning"] |= ours
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (text | config).items() if v != "absent"}))
        return {finding.check: finding for finding in check_head(folder, tiny) if finding.status != "ok"}

    return spoil


def dropped(_):
    return None


def noise(*shape):
    return lambda _: torch.randn(*shape)


NORM = "layers.0.input_layernorm.weight"
Q = "layers.0.self_attn.q_proj.weight"
SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
FAULTS = {
    # export mismatch: engines use random tensors without an error
    "a tensor dropped": ({"tensors": {Q: dropped}}, "head_tensors", "error", [Q, "missing"]),
    "a key renamed": ({"tensors": {f"model.{Q}": noise(64, 64)}}, "head_tensors", "error", [f"model.{Q}", "unknown"]),
    "an input norm": ({"tensors": {NORM: noise(64)}}, "head_tensors", "error", [NORM, "unknown"]),
    "another shape": ({"tensors": {"fc.weight": noise(64, 64)}}, "head_tensors", "error", ["fc.weight", "(64, 128)"]),
    "a tensor of NaN": ({"tensors": {Q: lambda x: x * float("nan")}}, "head_tensors", "error", ["not finite"]),
    "a tensor of zeros": ({"tensors": {Q: torch.zeros_like}}, "head_tensors", "error", ["constant"]),
    "a random LM head": ({"tensors": {"lm_head.weight": noise(259, 64)}}, "head_frozen_copies", "error", ["lm_head"]),
    "a random embedding": (
        {"tensors": {"embed_tokens.weight": noise(259, 64)}}, "head_frozen_copies", "error", ["embed_tokens"],
    ),
    "the target's layers": ({"num_hidden_layers": 40}, "head_config", "error", ["num_hidden_layers is 40"]),
    "another vocabulary": ({"vocab_size": 128}, "head_config", "error", ["vocab_size is 128, the target's 259"]),
    "another end token": ({"eos_token_id": 1}, "head_config", "error", ["eos_token_id"]),
    "another target": ({"ours": {"target_fingerprint": "0" * 64}}, "head_origin", "warning", ["trained for tiny"]),
    # fc.bias
    "a bias of fc": ({"tensors": {"fc.bias": noise(64)}}, "head_bias", "warning", ["vLLM"]),
    "bias: true": ({"bias": True, "tensors": {"fc.bias": noise(64)}}, "head_bias", "error", ["not in the file"]),
    "a bias that is in no file": ({"bias": True}, "head_bias", "error", ["random one"]),
    # missing rope scaling and context length
    "another theta": ({"rope_parameters": None, "rope_theta": 5e5}, "head_rope", "error", ["rope_theta", "500000"]),
    "another scaling": ({"rope_parameters": SCALED}, "head_rope", "error", ["rope_type is 'linear'", "factor"]),
    "a theta in one spelling": ({"rope_theta": 5e5}, "head_rope", "error", ["500000", "rope_theta and rope_scaling"]),
    "a short rotary cache": ({"max_position_embeddings": 1024}, "head_config", "error", ["max_position_embeddings"]),
    "no positions": ({"max_position_embeddings": "absent"}, "head_config", "error", ["max_position_embeddings"]),
}  # fmt: skip


def test_correct_head_has_no_finding(head, tiny):
    same = {"embed_tokens.weight": lambda _: tiny.head.embed_tokens.bfloat16(), "fc.bias": lambda _: torch.zeros(64)}
    old_spelling = {"rope_parameters": None, "rope_theta": 10_000.0, "rope_scaling": None}
    assert head(same, **old_spelling) == {}


def test_theta_missing_in_one_spelling_is_named(tiny, tmp_path):
    other = SimpleNamespace(config=copy.deepcopy(tiny.config))
    other.config.rope_parameters["rope_theta"] = 500_000.0
    folder = save_draft(tmp_path / "head", EagleDraft.from_target(other.config), None, {})
    raw = json.loads((folder / "config.json").read_text())
    assert (raw["rope_theta"], raw["rope_scaling"]) == (500_000.0, None)
    assert check_head_rope(raw, other).status == "ok"
    del raw["rope_theta"]
    finding = check_head_rope(raw, other)
    assert finding.status == "error"
    assert "rope_theta is 10000.0 in rope_theta and rope_scaling, the target's 500000.0" in finding.message
    del raw["rope_parameters"]
    assert check_head_rope(raw | {"rope_theta": 500_000.0}, other).status == "ok"


def test_a_scaled_head_is_read_back_with_the_rope_it_was_saved_with(tiny, tmp_path):
    config = copy.deepcopy(tiny.config)
    config.rope_parameters = SCALED
    draft = EagleDraft.from_target(config)
    folder = save_draft(tmp_path / "head", draft, None, {})
    assert load_draft(folder).draft.config.rope_parameters == draft.config.rope_parameters
    assert (
        check_head_rope(json.loads((folder / "config.json").read_text()), SimpleNamespace(config=config)).status == "ok"
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_head_is_named(head, fault):
    change, check, status, words = FAULTS[fault]
    finding = head(**copy.deepcopy(change))[check]
    assert finding.status == status
    assert finding.cure
    assert [word for word in words if word not in finding.message] == [], finding.message


def test_no_head_and_a_damaged_one(tiny, head, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        check_head(tmp_path / "nowhere", tiny)
    (tmp_path / "head" / "model.safetensors").write_bytes(b"x" * 100)
    (finding,) = check_head(tmp_path / "head", tiny)
    assert "damaged" in finding.message


def test_randomly_initialized_weights_are_named(tiny, tmp_path):
    stored = load_file(tiny.folder / "model.safetensors")
    stored.pop("lm_head.weight")
    save_file(stored, tmp_path / "model.safetensors")
    partial = SimpleNamespace(model=tiny.model, folder=tmp_path, name="partial")
    assert check_target_weights(tiny).status == "ok"
    finding = check_target_weights(partial)
    assert finding.status == "error"
    assert "lm_head.weight" in finding.message
    save_file({f"language_model.{name}": tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    finding = check_target_weights(partial)
    assert finding.status == "error"
    assert "under the prefix 'language_model.'" in finding.message


def with_tokenizer(tiny, eos_ids=None, **ids):
    tokenizer = SimpleNamespace(**({f"{name}_token_id": None for name in ("bos", "eos", "pad")} | ids))
    ends = tiny.eos_token_ids if eos_ids is None else frozenset(eos_ids)
    return SimpleNamespace(head=tiny.head, tokenizer=tokenizer, eos_token_ids=ends, config=tiny.config)


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"eos_ids": []}, "error", "no end-of-sequence"),
        ({"pad_token_id": 259}, "error", "'pad': 259"),
        ({"eos_ids": [2, 300]}, "error", "end 300"),
        ({"bos_token_id": 5}, "warning", "bos is 5 for the tokenizer and 0"),
        ({"eos_token_id": 2, "bos_token_id": 0}, "ok", "eos 2"),
    ],
)
def test_special_tokens(tiny, change, status, word):
    finding = check_special_tokens(with_tokenizer(tiny, **change))
    assert finding.status == status
    assert word in finding.message


def test_vocabulary_rope_and_bias_of_a_new_head(tiny):
    draft = EagleDraft.from_target(tiny.config, vocab_size=64)
    assert check_vocabulary(tiny, draft, 0.99).status == "ok"
    assert check_vocabulary(tiny, draft, 0.5).status == "warning"
    assert check_rope(tiny, draft, 256).status == check_fc_bias(draft).status == "ok"
    other = copy.deepcopy(tiny.config)
    other.rope_parameters["rope_theta"] = 500_000.0
    other.vocab_size = 128
    wrong = EagleDraft.from_target(other, fc_bias=True)
    assert check_rope(tiny, wrong, 256).status == "error"
    assert check_vocabulary(tiny, wrong, None).status == "error"
    assert check_fc_bias(wrong).status == "warning"


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, length in enumerate((12, 30, 21)):
        mask = torch.arange(length) > length // 2
        mask[-1] = False
        made.append(Tokens(str(number), torch.randint(3, 259, (length,), generator=generator), mask))
    return made


def test_wrong_features_are_named_although_the_checksum_is_right(tiny, sequences, tmp_path):
    finding, speed = check_features(tiny, sequences, tmp_path)
    assert (finding.status, speed > 0) == ("ok", True)
    assert "fresh sample" in finding.message
    assert not any(tmp_path.iterdir())
    store = extract_features(tiny, sequences, tmp_path)
    finding, _ = check_features(tiny, sequences, tmp_path)
    assert finding.status == "ok"
    assert str(store.folder) in finding.message
    shard = store.folder / "shard-00000.safetensors"
    stored = load_file(shard)
    stored["features"][-21:] = stored["features"][-21:].roll(1, 0)  # shifted by one position, only in the last sequence
    save_file(stored, shard)
    shard.with_suffix(".json").write_text(json.dumps({"sha256": sha256_file(shard)}))

    shards.open_shard.cache_clear()
    finding, _ = check_features(tiny, sequences, tmp_path)
    assert finding.status == "error"
    assert str(store.folder) in finding.cure


def test_machine(tiny, monkeypatch):
    assert machine.check_versions().status == "ok"
    real = machine.metadata.version
    monkeypatch.setattr(machine.metadata, "version", lambda name: "2.6.3" if name == "lightning" else real(name))
    finding = machine.check_versions()
    assert finding.status == "error"
    assert "lightning 2.6.3" in finding.message
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 2)
    assert machine.check_threads(1, False).status == machine.check_threads(2, True).status == "ok"
    finding = machine.check_threads(2, False)
    assert (finding.status, "num_threads=1" in finding.cure) == ("warning", True)
    monkeypatch.setattr(machine, "working_dtype", lambda device: torch.float32)
    assert machine.check_precision("bf16-mixed", torch.float32, False).status == "warning"
    assert machine.check_precision("32-true", torch.float32, False).status == "ok"
    assert machine.check_attention(tiny).status == "ok"


def test_a_head_on_the_gpu_with_its_target_on_the_cpu_is_an_error(tiny):
    assert machine.check_target_device(tiny, on_gpu=False).status == "ok"
    finding = machine.check_target_device(tiny, on_gpu=True)
    assert (finding.check, finding.status) == ("target_device", "error")
    assert "target.device=cuda" in finding.cure
