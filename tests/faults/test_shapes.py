"""A model that cannot be a target, or a file that cannot be a head, is refused in one sentence when it is read."""

import json
import shutil

import pytest
import torch
from family_toys import GROUPED, SIZES, gemma3, load, write_target
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from hass_lightning.checks.head import check_head
from hass_lightning.decoding import Autoregressive, DecodingModels, DynamicTree
from hass_lightning.draft import import_head, load_draft
from hass_lightning.serving import export_head
from hass_lightning.target_model.tiny import byte_tokenizer

EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16,
}  # fmt: skip
OLD = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
UNFIT = {
    "DeepSeek-V3": (lambda: DeepseekV3Config(**GROUPED, **EXPERTS, **LATENT), "multi-head latent attention"),
    "Qwen3-Next": (
        lambda: Qwen3NextConfig(
            **GROUPED, **LINEAR, head_dim=8, layer_types=["linear_attention", "full_attention"]
        ),
        "layers of the types linear_attention",
    ),
    "Llama 4": (
        lambda: Llama4TextConfig(
            **GROUPED, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=16
        ),
        "layers of the types chunked_attention",
    ),
    "LFM2": (lambda: Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]), "layers of the types conv"),
    "Mamba": (lambda: MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2), "linear_attention"),
    "GPT-2": (lambda: GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4), "no rotary positions"),
    "OPT": (lambda: OPTConfig(**OLD, ffn_dim=48, word_embed_proj_dim=32), "no rotary positions"),
    "BLOOM": (lambda: BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4), "no rotary positions"),
    "Falcon, ALiBi": (lambda: FalconConfig(**OLD, alibi=True), "ALiBi"),
    "Falcon, new": (
        lambda: FalconConfig(**OLD, num_kv_heads=2, new_decoder_architecture=True), "no positive whole number for"
    ),
    "Gemma 2": (lambda: Gemma2Config(**GROUPED, head_dim=8), "softcapped scores"),
    "GPT-OSS": (lambda: GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2), "sinks"),
    "Granite": (lambda: GraniteConfig(**GROUPED, logits_scaling=8.0), "logits_scaling=8.0"),
    "bidirectional": (lambda: gemma3(use_bidirectional_attention=True), "its tokens see later ones"),
    "BERT": (lambda: BertConfig(**OLD, is_decoder=True), "no rotary positions"),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("llama") / "model", LlamaConfig(**GROUPED))


@pytest.mark.parametrize("family", UNFIT)
def test_unsupported_model_is_refused_with_the_reason_before_weights_are_read(tmp_path, family):
    make, words = UNFIT[family]
    config = make()
    config.architectures = None
    config.save_pretrained(tmp_path)  # no weights at all: the error comes first
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target toy \(\w+\) does not fit: .*Take a text decoder") as refused:
        load(tmp_path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_multimodal_and_encoder_models_are_refused(tmp_path):
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(text_config=gemma3().to_dict(), vision_config=tower)
    config.save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="it reads more than text"):
        load(tmp_path / "vision")
    from transformers import CLIPTextConfig

    CLIPTextConfig(**SIZES).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"is not a causal LM: transformers has none for model_type=clip_text_model"):
        load(tmp_path / "clip")


def test_model_passed_as_an_object_is_checked_also(tmp_path):
    from hass_lightning.target_model import TargetModel

    model = AutoModelForCausalLM.from_config(UNFIT["OPT"][0]())
    with pytest.raises(ValueError, match="does not fit: it has no rotary positions"):
        TargetModel(model, byte_tokenizer(), "opt", tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "contains a list instead of an object"),
        ("{", "is not valid JSON"),
        ('{"model_type": "llama", "hidden_size": "32"}', "hidden_size"),
        ('{"model_type": "nobodys"}', "nobodys"),
    ],
    ids=["a list", "broken", "a string for a size", "unknown"],
)
def test_invalid_config_is_named(llama, tmp_path, text, words):
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json") as refused:
        load(folder)
    assert words in str(refused.value)


def test_a_tokenizer_that_cannot_be_read_is_named(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read .*copy tokenizer\.json"):
        load(folder)


# An EAGLE head for Qwen2 as published, with biases of q, k and v under its own names.


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return load(write_target(tmp_path_factory.mktemp("qwen2") / "model", Qwen2Config(**GROUPED)))


@pytest.fixture
def published(qwen2, tmp_path):
    """the biases have an effect in training and in decoding"""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "fc.weight": (32, 64), "fc.bias": (32,), "embed_tokens.weight": (259, 32),
        "layers.0.self_attn.q_proj.weight": (32, 32), "layers.0.self_attn.q_proj.bias": (32,),
        "layers.0.self_attn.k_proj.weight": (16, 32), "layers.0.self_attn.k_proj.bias": (16,),
        "layers.0.self_attn.v_proj.weight": (16, 32), "layers.0.self_attn.v_proj.bias": (16,),
        "layers.0.self_attn.o_proj.weight": (32, 32), "layers.0.mlp.gate_proj.weight": (48, 32),
        "layers.0.mlp.up_proj.weight": (48, 32), "layers.0.mlp.down_proj.weight": (32, 48),
        "layers.0.post_attention_layernorm.weight": (32,),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    tensors["embed_tokens.weight"] = qwen2.head.embed_tokens.clone()
    tensors["fc.bias"].zero_()
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    config = GROUPED | {"model_type": "qwen2", "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config | {"qkv_bias": True, "hidden_act": "silu"}))
    return folder, tensors


@pytest.mark.parametrize("format", ["vllm", "sglang", "eagle", "hub"])
def test_a_head_with_biases_of_q_k_and_v_is_read_decoded_and_exported(qwen2, published, tmp_path, format):
    folder, tensors = published
    saved = import_head(str(folder), tmp_path / "run")
    state = load_draft(tmp_path / "run").draft.state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in state)
    assert set(tensors) - set(state) == {"embed_tokens.weight"}
    # export, including the export checks and their second implementation
    draft = saved.for_decoding(torch.float32, "cpu")
    models = DecodingModels(qwen2, draft)
    prompt = list(range(5, 25))
    plain = Autoregressive().generate(models, prompt, 24).token_ids
    assert DynamicTree(8, 3, 2).generate(models, prompt, 24).token_ids == plain
    features = torch.randn(1, 6, 32)
    with torch.no_grad():
        before = draft(features, features)
        torch.testing.assert_close(saved.draft.float()(features, features), before)
        draft.layer.self_attn.v_proj.bias += 1
        assert not torch.allclose(draft(features, features), before)
    # it has one key for all four projections
    export_head(saved, qwen2, format, tmp_path / format)
    written = load_file(tmp_path / format / "model.safetensors")
    config = json.loads((tmp_path / format / "config.json").read_text())
    assert all(torch.equal(written[name], tensors[name]) for name in state if name in written)
    assert {f"layers.0.self_attn.{name}_proj.bias" for name in "qkv"} <= set(written)
    if format == "sglang":  # `bias` is that of fc there: only for the EAGLE code
        assert (config["attention_bias"], "qkv_bias" in config) == (True, False)
        assert not written["layers.0.self_attn.o_proj.bias"].any()
    else:
        assert (config["attention_bias"], config["qkv_bias"]) == (False, True)
    found = {f.check: f.message for f in check_head(tmp_path / format, qwen2) if f.status == "error"}
    assert set(found) == ({"head_bias"} if format == "eagle" else set())  # `bias` there is fc's: for that code alone
    if format in ("eagle", "hub"):
        back = import_head(str(tmp_path / format), tmp_path / "back").draft.state_dict()
        assert all(torch.equal(back[name], state[name]) for name in state)


def test_biases_that_the_config_does_not_name_are_an_error(qwen2, published, tmp_path):
    import_head(str(published[0]), tmp_path / "run")
    file = tmp_path / "run" / "draft" / "config.json"
    assert {f.check: f.status for f in check_head(file.parent, qwen2)}["head_bias"] == "ok"
    raw = json.loads(file.read_text())
    del raw["qkv_bias"]
    file.write_text(json.dumps(raw))
    found = {finding.check: finding for finding in check_head(file.parent, qwen2)}["head_bias"]
    assert (found.status, "engines ignore them" in found.message) == ("error", True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "contains a list instead of an object"),
        ("{", "is not valid JSON"),
        ('{"hidden_size": "32"}', "hidden_size='32'"),
        ("{}", "hidden_size=None"),
    ],
)
def test_invalid_head_config_is_named(published, text, words):
    folder, _ = published
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json") as refused:
        import_head(str(folder), folder.parent / "run")
    assert words in str(refused.value)
