"""Every family of targets through the whole pipeline: features, training, lossless decoding, export, reload.

Small random models: the families differ in the target, never in the head, which is always a Llama layer.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_toys import make_data, make_module, make_small_trainer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding import Autoregressive, DecodingModels, DynamicTree
from hass_lightning.draft import SavedDraft, import_head, load_draft
from hass_lightning.serving import export_head
from hass_lightning.target_model import TargetModel
from hass_lightning.target_model.tiny import byte_tokenizer
from hass_lightning.types import Message

SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3_1 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def theta(value):
    return {"rope_type": "default", "rope_theta": value}


FAMILIES = {
    "LLaMA 2": LlamaConfig(**SIZES, num_key_value_heads=4, rms_norm_eps=1e-5, rope_parameters=theta(10000.0)),
    "LLaMA 3": LlamaConfig(**SIZES, num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=theta(500000.0)),
    "LLaMA 3.1": LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3_1),
    "SmolLM2": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=theta(100000.0)),
    "Mistral": MistralConfig(**SIZES, num_key_value_heads=2, head_dim=12, sliding_window=400),
    "Qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, rope_parameters=theta(1000000.0)),
    "Qwen2.5, tied": Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    "Qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, rope_parameters=theta(1000000.0)),
    "Qwen3, tied": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
}
SHARDED = ("LLaMA 3", "Qwen2", "Qwen3, tied")


def make_target(folder, config, sharded=False):
    """Write a random model to disk; every parameter is random (biases and norms of q and k start as zeros and ones)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    byte_tokenizer().save_pretrained(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == sharded
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_path(tmp_path, family):
    config = FAMILIES[family]
    target = TargetModel.load(make_target(tmp_path / "target", config, family in SHARDED), family, dtype="float32")
    if config.model_type in ("qwen2", "qwen3"):
        assert any(name.endswith(("q_proj.bias", "q_norm.weight")) for name, _ in target.model.named_parameters())
    # features are the inputs of the model's LM head
    ids = torch.tensor([[5, 9, 100, 31, 77]])
    with torch.no_grad():
        torch.testing.assert_close(target.head.logits(target.encode(ids)), target.model(ids).logits)
    data = make_data(target, tmp_path / "cache", num_validation=4)
    module = make_module(target, depth=2)
    before = {name: value.clone() for name, value in module.draft.state_dict().items()}
    make_small_trainer(data, tmp_path, max_steps=3, max_epochs=-1, limit_val_batches=0).fit(module, datamodule=data)
    draft = module.draft.cpu().eval()
    assert not [name for name, value in draft.state_dict().items() if torch.equal(value, before[name])]
    # the head: one Llama layer with the target's sizes, heads, epsilon and rope
    head = draft.config
    assert (head.model_type, head.num_hidden_layers, head.attention_bias) == ("llama", 1, False)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(head, name) == getattr(config, name)
    assert head.rope_parameters == config.rope_parameters
    # decoding is lossless, in trees and with rejected drafts
    models = DecodingModels(target, SavedDraft(draft, None, {}).for_decoding(torch.float32, "cpu"))
    prompt = encode_prompt(target.tokenizer, [Message("system", "be kind"), Message("user", "the cat sat")])
    plain = Autoregressive().generate(models, prompt, 20)
    assert DynamicTree(8, 3, 2).generate(models, prompt, 20).token_ids == plain.token_ids
    # export to each engine, and read back
    saved = SavedDraft(draft, None, {})
    for format in ("vllm", "sglang", "eagle", "hub"):
        export_head(saved, target, format, tmp_path / format)
    again = load_draft(tmp_path / "hub").draft.state_dict()
    official = import_head(str(tmp_path / "eagle"), tmp_path / "imported").draft.state_dict()
    for name, value in draft.state_dict().items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, official[name])
    written = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert written["rope_theta"] == config.rope_parameters["rope_theta"]
    assert ("factor" in (written["rope_scaling"] or {})) == (family == "LLaMA 3.1")
    assert "embed_tokens.weight" not in load_file(tmp_path / "vllm" / "model.safetensors")
