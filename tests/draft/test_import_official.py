"""Import of published EAGLE-1/2 and HASS checkpoints: strict names and shapes, lossless decoding, round trip."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hass_lightning.decoding import Autoregressive, DecodingModels, DynamicTree
from hass_lightning.draft import import_head, load_draft
from hass_lightning.draft.import_official import official_draft
from hass_lightning.serving import export_head

# The official configs: hidden, intermediate, heads, key/value heads, epsilon, positions, vocabulary, theta and bias
# (None: absent), and the number of trainable parameters given in the EAGLE README
OFFICIAL = {
    "LLaMA2-7B": (4096, 11008, 32, 32, 1e-6, 4096, 32000, None, None, 0.236e9),
    "LLaMA2-13B": (5120, 13824, 40, 40, 1e-5, 4096, 32000, None, None, 0.370e9),
    "LLaMA3-8B": (4096, 14336, 32, 8, 1e-5, 2048, 128256, 500000, False, 0.252e9),
    "LLaMA3-70B": (8192, 28672, 64, 8, 1e-5, 2048, 128256, 500000, False, 0.990e9),
}


def official_config(hidden, inner, heads, groups, eps, positions, vocab, theta, bias):
    config = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": inner,
        "max_position_embeddings": positions, "model_type": "llama", "num_attention_heads": heads,
        "num_key_value_heads": groups, "num_hidden_layers": 1, "pad_token_id": 0, "pretraining_tp": 1,
        "rms_norm_eps": eps, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.28.1", "use_cache": True, "vocab_size": vocab,
    }  # fmt: skip
    optional = {"rope_theta": theta, "bias": bias}
    return config | {key: value for key, value in optional.items() if value is not None}


def official_tensors(config, fc_bias, dtype=torch.float16, device="cpu"):
    """Return random tensors with the names and shapes of docs/method.md, The head."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "embed_tokens.weight": (config["vocab_size"], hidden),
        "fc.weight": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj.weight": (hidden, hidden),
        "layers.0.self_attn.k_proj.weight": (keys, hidden),
        "layers.0.self_attn.v_proj.weight": (keys, hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, hidden),
        "layers.0.mlp.gate_proj.weight": (inner, hidden),
        "layers.0.mlp.up_proj.weight": (inner, hidden),
        "layers.0.mlp.down_proj.weight": (hidden, inner),
        "layers.0.post_attention_layernorm.weight": (hidden,),
    }
    if fc_bias:
        shapes["fc.bias"] = (hidden,)
    generator = torch.Generator(device).manual_seed(0) if device == "cpu" else None
    return {name: torch.randn(shape, generator=generator, device=device).mul(0.2).to(dtype)
            for name, shape in shapes.items()}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("fc_bias", [False, True])
def test_shapes_match_the_published_heads(name, fc_bias):
    *sizes, bias, count = OFFICIAL[name]
    config = official_config(*sizes, bias)
    with torch.device("meta"):
        draft = official_draft(name, config, official_tensors(config, fc_bias, device="meta"))
    assert sum(p.numel() for p in draft.parameters()) == pytest.approx(count, rel=5e-3)
    assert draft.config.rope_parameters["rope_theta"] == (sizes[-1] or 10000)
    assert draft.config.num_key_value_heads == sizes[3]
    assert {p.dtype for p in draft.parameters()} == {torch.float16}


def write(folder, target, fc_bias, pickled, bias=None, change=None):
    """Write a checkpoint folder in the official format for `target`."""
    c = target.config
    config = official_config(
        c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps,
        c.max_position_embeddings, c.vocab_size, 10000, bias,
    )  # fmt: skip
    tensors = official_tensors(config, fc_bias)
    tensors["embed_tokens.weight"] = target.head.embed_tokens.half()
    if change:
        change(tensors, config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("pickled", [True, False], ids=["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("fc_bias", [True, False], ids=["bias", "no bias"])
def test_import_decode_and_export_round_trip(tiny, tmp_path, fc_bias, pickled):
    tensors = write(tmp_path / "HASS", tiny, fc_bias, pickled)
    import_head(str(tmp_path / "HASS"), tmp_path / "mine")
    saved = load_draft(tmp_path / "mine")
    assert (saved.draft.fc.bias is not None, saved.notes["dtype"]) == (fc_bias, "float16")
    models = DecodingModels(tiny, saved.for_decoding(torch.float32, "cpu"))
    prompt = tiny.tokenizer("a question")["input_ids"]
    plain = Autoregressive().generate(models, prompt, 12)
    assert DynamicTree(8, 3, 2).generate(models, prompt, 12).token_ids == plain.token_ids
    export_head(saved, tiny, "eagle", tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert set(again) == set(tensors)
    assert all(again[name].dtype == value.dtype and torch.equal(again[name], value) for name, value in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bias"] is fc_bias


def test_tensors_override_bias_and_layer_count_of_the_config(tiny, tmp_path, caplog):
    write(tmp_path / "head", tiny, True, False, bias=False, change=lambda t, c: c.update(num_hidden_layers=32))
    saved = import_head(str(tmp_path / "head"), tmp_path / "mine")
    assert saved.draft.fc.bias is not None
    assert "config.json has bias=False" in caplog.text
    assert "num_hidden_layers=32" in caplog.text
    assert load_draft(tmp_path / "mine").draft.config.num_hidden_layers == 1


FAULTS = {
    "a missing key": (lambda t, c: t.pop("layers.0.mlp.down_proj.weight"), r"missing \['layers\.0\.mlp\.down_proj"),
    "an unexpected key": (lambda t, c: t.update({"norm.weight": torch.ones(64)}), r"unexpected \['norm\.weight'\]"),
    "an LM head of its own": (lambda t, c: t.update({"lm_head.weight": torch.ones(2, 2)}), r"'lm_head\.weight'"),
    "a prefix": (lambda t, c: t.update({"model.fc.weight": t.pop("fc.weight")}), r"missing \['fc\.w.*'model\.fc\.w"),
    "another shape": (lambda t, c: c.update(vocab_size=300), r"embed_tokens\.weight \(259, 64\) instead of \(300"),
    "two dtypes": (lambda t, c: t.update({"fc.weight": t["fc.weight"].float()}), "mixes the dtypes"),
    "EAGLE-3": (lambda t, c: t.update({"midlayer.hidden_norm.weight": torch.ones(64)}), "is an EAGLE-3 head"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), FAULTS.values(), ids=FAULTS)
def test_invalid_checkpoints_are_refused(tiny, tmp_path, change, words):
    write(tmp_path / "head", tiny, False, False, change=change)
    with pytest.raises(ValueError, match=words):
        import_head(str(tmp_path / "head"), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(Bomb(), protocol=2), "refused.*run code"),
        (b"half a file", "refused.*damaged"),
        (None, "neither model"),
    ],
    ids=["code", "damaged", "missing"],
)
def test_pickle_with_code_is_refused_and_not_executed(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text("{}")
    if content is not None:
        (tmp_path / "head" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        import_head("head", tmp_path / "mine")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_hass_export_accepts_a_folder_of_hass_import(call_command, tiny, tmp_path):
    tensors = write(tmp_path / "..HASS LLaMA", tiny, True, True)
    done = call_command("import_head", f"path='{tmp_path}/..HASS LLaMA'")
    assert done.code == 0, done.err
    result = json.loads(done.out.strip().splitlines()[-1])
    assert Path(result["draft"]).resolve() == tmp_path / "runs" / "imported" / "HASS_LLaMA"
    assert result["fc_bias"] is True
    done = call_command("export", "target=tiny", f"draft={result['draft']}", "format=sglang", "output_dir=out")
    assert done.code == 0, done.err
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["fc.bias"], tensors["fc.bias"])
