"""Tiny random targets of many families on disk, and functions that damage their files."""

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    NemotronConfig,
    Phi3Config,
    PhiConfig,
    Qwen3MoeConfig,
    StableLmConfig,
)

from hass_lightning.target_model import TargetModel
from hass_lightning.target_model.tiny import byte_tokenizer

SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def gemma3(**other):
    both = {"sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}}  # fmt: skip
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=64, layer_types=kinds, rope_parameters=both, **other)


FITTING = {
    "LLaMA": lambda: LlamaConfig(**GROUPED),
    "yarn": lambda: LlamaConfig(**GROUPED, rope_parameters=dict(YARN)),
    "yarn with a factor of its own": lambda: LlamaConfig(**GROUPED, rope_parameters=YARN | {"attention_factor": 1.0}),
    "dynamic": lambda: LlamaConfig(
        **GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
    "longrope": lambda: Phi3Config(
        **GROUPED, original_max_position_embeddings=64, rope_parameters=dict(LONGROPE)
    ),
    "GLM-4": lambda: Glm4Config(**GROUPED, head_dim=8, partial_rotary_factor=0.5),
    "Phi": lambda: PhiConfig(**GROUPED, partial_rotary_factor=0.5),
    "StableLM": lambda: StableLmConfig(**GROUPED, partial_rotary_factor=0.25),
    "Nemotron": lambda: NemotronConfig(**GROUPED, partial_rotary_factor=0.5),
    "GPT-NeoX": lambda: GPTNeoXConfig(**SIZES, rotary_pct=0.25),
    "Gemma 3": gemma3,
    "Mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(**GROUPED, **EXPERTS),
}  # fmt: skip


def write_target(folder, config):
    """Write a random model of `config` with a byte tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.rpartition(".")[0].endswith(("embed_tokens", "embed_in", "lm_head", "embed_out")):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder, **options):
    return TargetModel.load(folder, "toy", dtype="float32", **options)


def respell(folder, change):
    """Write the tensors of `folder` again as `change(tensors)` returns them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
