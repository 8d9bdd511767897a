"""The rotary embedding of a head is what its config says to every engine, for every rope of a target."""

import json

import pytest
import torch
from family_toys import FITTING, GROUPED, LONGROPE, YARN, load, write_target
from safetensors.torch import load_file
from transformers import LlamaConfig, Phi3Config

from hass_lightning.checks.head import check_head_rope
from hass_lightning.checks.head_fits_target import check_rope
from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding import Autoregressive, DecodingModels, DynamicTree
from hass_lightning.draft import EagleDraft, SavedDraft, draft_config, load_draft, save_draft
from hass_lightning.draft.import_official import official_draft
from hass_lightning.serving import export_head
from hass_lightning.serving.reference import rope_readings, rotary_frequencies
from hass_lightning.types import Message

PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
HEADS = {  # family: the config of the head
    "LLaMA": PLAIN,
    "yarn": YARN,
    "yarn with a factor of its own": YARN,
    "dynamic": PLAIN,
    "longrope": PLAIN | {"partial_rotary_factor": 1.0},
    "GLM-4": PLAIN | {"partial_rotary_factor": 1.0},
    "Phi": PLAIN | {"partial_rotary_factor": 1.0},
    "StableLM": PLAIN | {"partial_rotary_factor": 1.0},
    "Nemotron": PLAIN | {"partial_rotary_factor": 1.0},
    "GPT-NeoX": PLAIN | {"partial_rotary_factor": 1.0},
    "Gemma 3": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
}


def make_head(target):
    torch.manual_seed(0)
    draft = EagleDraft.from_target(target.config).eval()
    with torch.no_grad():
        for weight in (draft.fc.weight, draft.layer.mlp.down_proj.weight):
            weight.mul_(3)
        draft.layer.post_attention_layernorm.weight.normal_(1, 0.1)
    return SavedDraft(draft, None, {})


def full_angles(config, positions):
    """Return cos and sin [T, d/2] as engines compute them from each spelling of a config."""
    for rope in rope_readings(config).values():
        frequencies, scale = rotary_frequencies(rope, config["head_dim"])
        angles = positions[:, None].double() * frequencies
        yield angles.cos() * scale, angles.sin() * scale


@pytest.mark.parametrize("family", HEADS)
def test_engines_compute_the_angles_of_training(tmp_path, family):
    target = load(write_target(tmp_path / "target", FITTING[family]()))
    saved = make_head(target)
    assert saved.draft.config.rope_parameters == HEADS[family]
    prompt = encode_prompt(target.tokenizer, [Message("user", "the cat sat")])
    models = DecodingModels(target, saved.for_decoding(torch.float32, "cpu"))
    plain = Autoregressive().generate(models, prompt, 20).token_ids
    assert DynamicTree(8, 3, 2).generate(models, prompt, 20).token_ids == plain
    assert check_rope(target, saved.draft, 256).status == "ok"
    positions = torch.tensor([0, 1, 50, 400])
    ours = [each[0, :, : each.shape[-1] // 2].double() for each in saved.draft.rotary(positions[None])]
    for format in ("vllm", "sglang", "hub"):
        folder = tmp_path / format
        export_head(saved, target, format, folder)  # including the export checks
        config = json.loads((folder / "config.json").read_text())
        assert config.get("partial_rotary_factor", 1.0) == 1.0
        readings = list(full_angles(config, positions))
        assert len(readings) == 2  # the spelling of transformers 5, and the earlier one
        for theirs in readings:
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        assert check_head_rope(config, target).status == "ok"
    again = load_draft(tmp_path / "hub").draft
    assert again.config.rope_parameters == HEADS[family]


def rope_of(config, **change):
    """Return a config with `change` in both spellings of its rope."""
    rope = config["rope_parameters"] | change
    scaling = None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    root = {key: change[key] for key in ("partial_rotary_factor", "rope_theta") if key in change}
    return config | {"rope_parameters": rope, "rope_scaling": scaling} | root


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partial_rotary_factor": 0.5}, "rope_parameters give other rotary angles"),
        ({"rope_type": "linear", "factor": 2.0}, "rope_theta and rope_scaling give other rotary angles"),
        ({"rope_theta": 5e5}, "give other rotary angles"),
        (LONGROPE, "engines compute rope_type=longrope differently"),
    ],
    ids=["partial", "linear", "theta", "longrope"],
)
def test_export_checks_refuse_a_config_with_other_angles(tmp_path, tiny, monkeypatch, change, words):
    from hass_lightning.serving import export

    write = export.write_files

    def spoiled(folder, *args):
        write(folder, *args)
        file = folder / "config.json"
        file.write_text(json.dumps(rope_of(json.loads(file.read_text()), **change)))

    monkeypatch.setattr(export, "write_files", spoiled)
    with pytest.raises(ValueError, match=words):
        export_head(make_head(tiny), tiny, "vllm", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_partial_rotary_factor_at_top_level_is_read(tiny, tmp_path):
    """SGLang reads it there."""
    folder = save_draft(tmp_path / "head", EagleDraft.from_target(tiny.config), None, {})
    raw = json.loads((folder / "config.json").read_text())
    assert check_head_rope(raw, tiny).status == "ok"
    finding = check_head_rope(raw | {"partial_rotary_factor": 0.5}, tiny)
    assert finding.status == "error"
    assert "partial_rotary_factor is 0.5 in rope_theta and rope_scaling" in finding.message


def test_old_heads_use_the_angles_of_their_training(tmp_path):
    """Their config has the target's partial factor, but they rotate everything; settings by layer were not read."""
    target = load(write_target(tmp_path / "target", FITTING["GLM-4"]()))
    new = make_head(target).draft
    folder = save_draft(tmp_path / "head", new, None, {})
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(rope_of(raw, partial_rotary_factor=0.5)))
    old = load_draft(folder)
    positions = torch.arange(40)[None]
    assert all(torch.equal(a, b) for a, b in zip(old.draft.rotary(positions), new.rotary(positions), strict=True))
    export_head(old, target, "vllm", tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["partial_rotary_factor"] == 1.0
    by_layer = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": PLAIN}
    file.write_text(json.dumps(raw | {"rope_parameters": PLAIN | by_layer}))
    assert load_draft(folder).draft.config.rope_parameters == PLAIN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, but heads rotate all dimensions"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic, which engines interpret"),
    ],
)
def test_published_head_with_unsupported_rope_is_refused(tiny, tmp_path, change, words):
    folder = save_draft(tmp_path / "head", EagleDraft.from_target(tiny.config), None, {})
    config = draft_config(tiny.config).to_dict() | {"rope_theta": 1e4}
    tensors = load_file(folder / "model.safetensors")
    assert official_draft("there", dict(config), tensors).config.rope_parameters == PLAIN
    with pytest.raises(ValueError, match=words):
        official_draft("there", config | change, tensors)


@pytest.mark.parametrize("length", [20, 52, 58, 63])
def test_longrope_ends_where_its_angles_would_change(tmp_path, length):
    """Beyond original_max_position_embeddings all angles depend on the last position of a forward, tree or not."""
    config = Phi3Config(**GROUPED, original_max_position_embeddings=64, rope_parameters=dict(LONGROPE))
    target = load(write_target(tmp_path / "target", config))
    assert (target.max_length, config.max_position_embeddings) == (64, 512)
    models = DecodingModels(target, make_head(target).for_decoding(torch.float32, "cpu"))
    torch.manual_seed(length)
    prompt = torch.randint(3, 259, (length,)).tolist()
    plain = Autoregressive().generate(models, prompt, 40).token_ids
    assert DynamicTree(16, 4, 4).generate(models, prompt, 40).token_ids == plain
    with pytest.raises(ValueError, match="takes 64"):
        Autoregressive().generate(models, [3] * 70, 4)


def test_sliding_window_of_zero_means_none(tmp_path):
    target = load(write_target(tmp_path / "target", LlamaConfig(**GROUPED)))
    target.config.sliding_window = 0  # as in Qwen2-MoE without a sliding window
    assert target.max_length == 512
