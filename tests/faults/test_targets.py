"""Targets whose weights would be random, reshaped or ignored are refused by name; others are not."""

import json
import shutil

import pytest
import torch
from family_toys import FITTING, GROUPED, load, respell, write_target
from transformers import LlamaConfig

from hass_lightning.checks.head_fits_target import check_target_weights
from hass_lightning.data.features import feature_key
from hass_lightning.draft import EagleDraft, load_draft, save_draft
from hass_lightning.target_model.source import safetensors_copy
from hass_lightning.types import Tokens

UP = "model.layers.1.mlp.up_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
FAULTS = {
    "another prefix": (
        lambda stored: {f"language_model.{name}": tensor for name, tensor in stored.items()},
        ["lm_head.weight", "and 17 more", "under the prefix 'language_model.'", "without the prefix"],
    ),
    "no LM head": (
        lambda stored: {name: tensor for name, tensor in stored.items() if name != "lm_head.weight"},
        ["lack lm_head.weight", "base model without its LM head", "tie_word_embeddings=true"],
    ),
    "a base model": (
        lambda stored: {n.removeprefix("model."): t for n, t in stored.items() if n != "lm_head.weight"},
        ["lack lm_head.weight", "base model without its LM head"],
    ),
    "an MLP tensor missing": (
        lambda stored: {name: tensor for name, tensor in stored.items() if name != UP},
        [f"lack {UP}", "get the complete checkpoint"],
    ),
    "another shape": (
        lambda stored: stored | {UP: torch.ones(40, 32)},
        [f"{UP} (40, 32) instead of (48, 32)"],
    ),
    "a bias that the config does not name": (
        lambda stored: stored | {BIAS: torch.ones(32)},
        [f"contain {BIAS}", "would ignore"],
    ),
    "more layers than the config says": (
        lambda stored: stored | {UP.replace("layers.1", "layers.2"): torch.ones(48, 32)},
        ["contain model.layers.2.mlp.up_proj.weight"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("llama") / "model", LlamaConfig(**GROUPED))


@pytest.fixture
def copied(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


@pytest.mark.parametrize("head_only", [False, True], ids=["whole", "head_only"])
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_of_another_model_are_refused(llama, copied, fault, head_only):
    change, words = FAULTS[fault]
    whole = load(llama)
    respell(copied, change)
    with pytest.raises(ValueError, match="the weights in") as refused:
        load(copied, head_only=head_only)
    assert [word for word in words if word not in str(refused.value)] == [], refused.value
    whole.folder = copied  # hass-doctor reports the same
    finding = check_target_weights(whole)
    assert (finding.status, finding.message) == ("error", str(refused.value))


def test_an_expert_that_is_missing_is_refused(tmp_path):
    folder = write_target(tmp_path / "model", FITTING["Mixtral"]())
    respell(folder, lambda stored: {n: t for n, t in stored.items() if "layers.1" not in n or "experts.2.w1" not in n})
    with pytest.raises(ValueError, match=r"cannot be loaded into MixtralForCausalLM.*Get the complete checkpoint"):
        load(folder)


def test_tensors_without_effect_are_allowed(copied):
    extra = {
        "visual.patch.weight": torch.ones(3, 3),  # a vision tower in addition to the text model
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),  # of old checkpoints
    }
    before = load(copied).encode(torch.arange(3, 20)[None])
    respell(copied, lambda stored: stored | extra)
    assert torch.equal(load(copied).encode(torch.arange(3, 20)[None]), before)
    assert load(copied, num_layers=1).config.num_hidden_layers == 1


def test_base_model_with_tied_embedding_is_complete(tmp_path):
    folder = write_target(tmp_path / "model", LlamaConfig(**GROUPED, tie_word_embeddings=True))
    whole = load(folder)
    respell(folder, lambda stored: {name.removeprefix("model."): tensor for name, tensor in stored.items()})
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load(folder).encode(ids), whole.encode(ids))
    assert torch.equal(load(folder, head_only=True).head.lm_head, whole.head.lm_head)


@pytest.mark.parametrize("family", FITTING)
def test_complete_checkpoints_of_other_families_are_accepted(tmp_path, family):
    folder = write_target(tmp_path / "model", FITTING[family]())
    whole, ends = load(folder), load(folder, head_only=True)
    assert check_target_weights(whole).status == check_target_weights(ends).status == "ok"
    for name in ("embed_tokens", "lm_head", "lm_head_bias"):
        own, theirs = getattr(ends.head, name), getattr(whole.head, name)
        assert (own is None and theirs is None) or torch.equal(own, theirs)


def test_pickled_weights_are_checked_before_they_are_written_as_safetensors(tmp_path, llama):
    from safetensors.torch import load_file

    folder = shutil.copytree(llama, tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor for name, tensor in stored.items() if name != UP}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"lack {UP}"):
        safetensors_copy(str(folder))
    torch.save(stored, folder / "pytorch_model.bin")
    assert torch.equal(load(safetensors_copy(str(folder))).head.lm_head, stored["lm_head.weight"])


def test_missing_shard_is_named(copied):
    (copied / "model.safetensors").rename(copied / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors of its index"):
        load(copied)
    (copied / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"contains no model\.safetensors"):
        load(copied)


# --- the template in use ---------------------------------------------------------------------------------------------


def put_template_inside(folder, template):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


def test_the_fingerprint_covers_a_template_inside_the_tokenizers_config(copied, tmp_path):
    outside = load(copied)
    assert outside.fingerprint == outside.weights_fingerprint  # a separate file was covered before
    put_template_inside(copied, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    one = load(copied)
    put_template_inside(copied, "{% for m in messages %}# {{ m['content'] }}{% endfor %}")
    other = load(copied)
    assert len({outside.fingerprint, one.fingerprint, other.fingerprint}) == 3
    assert one.weights_fingerprint == other.weights_fingerprint
    # features and heads from before that change stay valid, heads of another template do not
    tokens = [Tokens("0", torch.tensor([3, 4, 5]), torch.tensor([True, True, False]))]
    assert feature_key(one, tokens, 8) == feature_key(other, tokens, 8)
    for known, fits in ((other.weights_fingerprint, True), (other.fingerprint, True), (one.fingerprint, False)):
        notes = {"target": "toy", "target_fingerprint": known}
        saved = load_draft(save_draft(tmp_path / "head", EagleDraft.from_target(other.config), None, notes))
        if fits:
            saved.check_fit("head", other)
        else:
            with pytest.raises(ValueError, match="was trained for toy"):
                saved.check_fit("head", other)


def test_of_several_named_templates_the_default_is_used(copied, tmp_path):
    from hass_lightning.data.rendering import render
    from hass_lightning.data.tokens import load_tokenizer
    from hass_lightning.types import Message

    named = [{"name": "default", "template": "D{{ messages[0]['content'] }}"}, {"name": "rag", "template": "R"}]
    put_template_inside(copied, named)
    for tokenizer in (load(copied).tokenizer, load_tokenizer(copied)):
        assert render(tokenizer, [Message("user", "x")]) == "Dx"
    named[0]["name"] = "chat"
    put_template_inside(copied, named)
    with pytest.raises(ValueError, match=r"chat templates chat, rag and none named default.*target\.chat_template"):
        load(copied)
    (tmp_path / "mine.jinja").write_text("M{{ messages[0]['content'] }}")
    chosen = load(copied, chat_template=str(tmp_path / "mine.jinja"))
    assert render(chosen.tokenizer, [Message("user", "x")]) == "Mx"
