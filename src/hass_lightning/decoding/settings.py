"""Checks of decoder settings that several decoders share."""

from __future__ import annotations

from hass_lightning.decoding.tree import num_candidates


def at_least(key: str, value: int, least: int, meaning: str) -> None:
    """Refuse a setting below `least`; `meaning` says what it counts."""
    if value < least:
        raise ValueError(f"decoding.{key}={value} must be at least {least} ({meaning}).")


def check_tree(num_nodes: int, depth: int, width: int) -> None:
    """Refuse the settings of a dynamic tree that cannot be searched."""
    at_least("num_nodes", num_nodes, 2, "the root and one draft token")
    at_least("depth", depth, 1, "levels below the root")
    at_least("width", width, 1, "nodes expanded per level")
    candidates = num_candidates(depth, width)
    if num_nodes - 1 > candidates:
        raise ValueError(
            f"decoding.num_nodes={num_nodes} exceeds the root and the {candidates} candidates of depth {depth} and "
            f"width {width}: lower it to {candidates + 1}, or raise depth or width."
        )
