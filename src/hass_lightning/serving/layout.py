"""Tensors and config.json of an EAGLE head in the layout of a serving engine.

Shapes: D hidden, I intermediate, V vocabulary, H heads, G key/value heads, d head size (see the legend in types.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hass_lightning.draft import SavedDraft
from hass_lightning.draft.head_config import OURS, class_note, rope_fields
from hass_lightning.serving.engines import Profile
from hass_lightning.target_model import TargetHead


def tensors_for(saved: SavedDraft, head: TargetHead, profile: Profile, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of the file in `dtype`, by their published names.

    Raises:
        ValueError: if `fc` has a non-zero bias, which the engine does not support.
    """
    tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in saved.draft.state_dict().items()}
    bias = tensors.get("fc.bias")
    if profile.fc_bias == "refused" and bias is not None:
        largest = float(bias.float().abs().max())
        if largest > 0:
            raise ValueError(
                f"format={profile.name} cannot serve this head: its fc has a bias (max |fc.bias| = {largest:.3g}) and "
                "the engine supports none. Train with model.draft.fc_bias=false, or use format=sglang or eagle."
            )
        del tensors["fc.bias"]
    if profile.fc_bias == "always" and bias is None:
        tensors["fc.bias"] = torch.zeros(tensors["fc.weight"].shape[0], dtype=dtype)
    if profile.o_bias and "layers.0.self_attn.q_proj.bias" in tensors:
        weight = tensors["layers.0.self_attn.o_proj.weight"]
        tensors["layers.0.self_attn.o_proj.bias"] = torch.zeros(weight.shape[0], dtype=dtype)
    if profile.embeddings:
        tensors["embed_tokens.weight"] = head.embed_tokens.cpu().to(dtype).contiguous()
    return tensors


def shapes_for(config: Any, profile: Profile, fc_bias: bool) -> dict[str, tuple[int, ...]]:
    """Return the expected shape of each tensor of the file. `fc_bias`: whether the head has a bias in `fc`."""
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj.weight": (queries, hidden),
        "layers.0.self_attn.k_proj.weight": (keys, hidden),
        "layers.0.self_attn.v_proj.weight": (keys, hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, queries),
        "layers.0.mlp.gate_proj.weight": (inner, hidden),
        "layers.0.mlp.up_proj.weight": (inner, hidden),
        "layers.0.mlp.down_proj.weight": (hidden, inner),
        "layers.0.post_attention_layernorm.weight": (hidden,),
    }
    if profile.fc_bias == "always" or (profile.fc_bias == "as_trained" and fc_bias):
        shapes["fc.bias"] = (hidden,)
    if getattr(config, "qkv_bias", False):
        sizes = {"q": queries, "k": keys, "v": keys} | ({"o": hidden} if profile.o_bias else {})
        shapes |= {f"layers.0.self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
    if profile.embeddings:
        shapes["embed_tokens.weight"] = (config.vocab_size, hidden)
    return shapes


def bias_fields(head: Any, profile: Profile) -> dict[str, bool]:
    """The keys by which an engine knows that q, k and v have biases, and o has none (or zeros)."""
    biased = bool(getattr(head, "qkv_bias", False))
    return {"attention_bias": biased and profile.o_bias} | ({"qkv_bias": True} if biased and not profile.o_bias else {})


def config_for(
    saved: SavedDraft, target_config: Any, profile: Profile, dtype: torch.dtype, fc_bias: bool
) -> dict[str, Any]:
    """Return config.json: a Llama config with one layer.

    The rope settings are those the head was trained with. `max_position_embeddings` is that of the target, because
    engines use it as the size of their rotary cache.
    """
    head = saved.draft.config
    name = str(dtype).removeprefix("torch.")
    config = {
        "architectures": [profile.architecture],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": head.hidden_size,
        "intermediate_size": head.intermediate_size,
        "num_attention_heads": head.num_attention_heads,
        "num_key_value_heads": head.num_key_value_heads,
        "head_dim": head.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": head.rms_norm_eps,
        "vocab_size": head.vocab_size,
        "max_position_embeddings": target_config.max_position_embeddings,
        **rope_fields(head),
        "tie_word_embeddings": False,
        **bias_fields(head, profile),
        "mlp_bias": False,
        "bos_token_id": target_config.bos_token_id,
        "eos_token_id": target_config.eos_token_id,
        "pad_token_id": getattr(target_config, "pad_token_id", None),
        "torch_dtype": name,
        "dtype": name,
    }
    if profile.bias_key:
        config["bias"] = fc_bias
    if profile.notes:
        config[OURS] = saved.notes | saved.draft.saved_notes() | class_note(saved.draft) | {"dtype": name}
    return config
