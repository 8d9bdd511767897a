"""Rotary settings of a head, in a form that all serving engines interpret in the same way.

The rotary angles of a head need not be those of the target, but they must be those of its config.json. Engines agree on
four kinds of rope in which all dimensions are rotated. Other kinds differ between engines, or depend on the length of
the request (longrope, dynamic).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hass_lightning.target_model.requirements import target_rope

# parameters of each kind, in addition to `rope_theta`
KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
}


def head_rope(target_config: Any) -> dict[str, Any]:
    """Return `rope_parameters` of a new head for a target.

    - The kind is that of the target if it is in `KEYS`, without keys that some engines ignore (attention_factor,
      mscale). For other kinds (longrope, dynamic, proportional), it is plain rope with the target's theta.
    - All dimensions are rotated: `partial_rotary_factor` is 1.0 if the target has this key.
    - If the target has a rope per layer type (Gemma 3), that of the full attention is used.
    """
    rope = target_rope(target_config)
    kind = rope.get("rope_type", "default")
    known = {key: rope[key] for key in KEYS.get(kind, ()) if rope.get(key) is not None}
    if kind == "yarn" and "factor" not in known:  # transformers computes it as the ratio of the lengths
        known["factor"] = target_config.max_position_embeddings / rope["original_max_position_embeddings"]
    own = {"rope_type": kind if kind in KEYS else "default", "rope_theta": rope["rope_theta"], **known}
    return own | ({"partial_rotary_factor": 1.0} if "partial_rotary_factor" in rope else {})


def as_rotated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a saved head with the rope of its training, which earlier versions did not always write.

    They rotated all dimensions for any `partial_rotary_factor`, and ignored Gemma 3's settings per layer type.
    """
    config = dict(raw)
    rope = {key: value for key, value in (raw.get("rope_parameters") or {}).items() if not isinstance(value, Mapping)}
    if rope and rope.get("partial_rotary_factor", 1.0) != 1.0:
        rope["partial_rotary_factor"] = 1.0
    if rope:
        config["rope_parameters"] = rope
        for key in ("rope_theta", "rope_scaling", "partial_rotary_factor"):  # LlamaConfig would mix both spellings
            config.pop(key, None)
    return config


def check_readable(where: str, config: Mapping[str, Any]) -> None:
    """Check that the rope of a published head is supported here and by the official code.

    Raises:
        ValueError: if it is not; the message names the key and its value.
    """
    for rope in (config, config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in KEYS:
            raise ValueError(
                f"{where} has rope_type={kind}, which engines interpret differently: only heads with "
                f"{', '.join(KEYS)} are supported. Train a head for this target with hass-train."
            )
        if (part := rope.get("partial_rotary_factor") or 1.0) != 1.0:
            raise ValueError(
                f"{where} has partial_rotary_factor={part}, but heads rotate all dimensions, as in the official code. "
                "Set it to 1.0 if the head was trained with that code; otherwise train a head with hass-train."
            )
