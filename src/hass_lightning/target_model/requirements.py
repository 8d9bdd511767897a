"""Requirements of a target, checked from its config and modules before its weights are read.

Decoding removes the keys and values of rejected draft tokens from the cache, tree masks replace the causal mask, and
the head uses the input of the LM head. Models with another state, or that modify their logits, are not supported.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
LAYER_TYPES = {"full_attention", "sliding_attention"}
CURE = "Take a text decoder with rotary positions and ordinary attention (docs/limits.md names families that fit)."


def target_rope(config: Any) -> dict[str, Any]:
    """Return the rope of the layers with full attention (sliding layers of Gemma 3 differ); {} without rope."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = {key: value for key, value in rope.items() if isinstance(value, Mapping)}
    if "rope_theta" in rope or not nested:
        return {key: value for key, value in rope.items() if key not in nested}
    return dict(nested.get("full_attention") or next(iter(nested.values())))


def check_fits(model: Any, name: str) -> None:
    """Check that feature extraction, drafting and tree verification support a model, which may be on the meta device.

    Raises:
        ValueError: if they do not; the message has the first reason found.
    """
    config = model.config
    for requirement in (_is_text, _can_rewind, _has_rope, _has_sizes, _plain_attention, _whole_cache, _plain_ends):
        if (reason := requirement(model, config)) is not None:
            raise ValueError(f"target {name} ({config.model_type}) does not fit: {reason}. {CURE}")


def _is_text(model: Any, config: Any) -> str | None:
    if config.get_text_config() is not config:
        return "it reads more than text (its config has a text_config of its own)"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    return None


def _can_rewind(model: Any, config: Any) -> str | None:
    """The state must be one key and one value per token, layer and head, so that rejected tokens can be removed."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if kinds:
        return f"it has layers of the types {', '.join(kinds)}, whose state or mask tree verification cannot handle"
    if getattr(type(model), "_is_stateful", False):
        return "it keeps a recurrent state, which cannot be rewound when a draft is rejected"
    if getattr(config, "kv_lora_rank", None):
        return "it caches compressed keys and values (multi-head latent attention, kv_lora_rank)"
    if getattr(config, "num_kv_shared_layers", None):
        return "some of its layers read the keys and values of others (num_kv_shared_layers)"
    return None


def _has_rope(model: Any, config: Any) -> str | None:
    if getattr(config, "alibi", False):
        return "its attention has ALiBi biases instead of rotary positions (alibi=true)"
    if target_rope(config).get("rope_theta") is None:
        return "it has no rotary positions (no rope_theta: learned positions, or none)"
    return None


def _has_sizes(model: Any, config: Any) -> str | None:
    found = {key: getattr(config, key, None) for key in SIZES}
    wrong = {key: value for key, value in found.items() if type(value) is not int or value < 1}
    return f"its config gives no positive whole number for {', '.join(wrong)}" if wrong else None


def _plain_attention(model: Any, config: Any) -> str | None:
    if not getattr(type(model), "_supports_sdpa", True) or getattr(config, "attn_logit_softcapping", None):
        return "its attention is not scaled_dot_product_attention's (softcapped scores, sinks), the only one checked"
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", None) is False:
        return "its tokens see later ones"
    return None


def _whole_cache(model: Any, config: Any) -> str | None:
    """Its base model takes our cache, mask and positions, and each layer's keys have the sizes of `new_cache`."""
    base = model.base_model
    wanted = {"past_key_values", "position_ids", "attention_mask"} - set(inspect.signature(base.forward).parameters)
    if base is model or wanted:
        return f"its base model takes no {', '.join(sorted(wanted)) or 'tokens by itself'}"
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, module in base.named_modules():
        rows = getattr(module, "out_features", None)
        if name.endswith((".k_proj", ".v_proj")) and rows not in (None, heads * size):
            return f"{name} makes {rows} numbers a token instead of {heads} heads of {size}"
    return None


def _plain_ends(model: Any, config: Any) -> str | None:
    """`lm_head(features)` are its logits, and one embedding has the width of the features."""
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    if lm_head is None or embedding is None:
        return "it has no LM head or no embedding of its own"
    if embedding.weight.shape[1] != config.hidden_size:
        return f"its embedding is {embedding.weight.shape[1]} wide, its features {config.hidden_size}"
    for key, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
        if (value := getattr(config, key, neutral)) not in (None, neutral):
            return f"it changes its logits after the LM head ({key}={value}), so that sampling would not be its own"
    return None
