"""Export of each kind of head. No other module of the package depends on the kind of a head.

Shapes: D hidden, Vd draft vocabulary (see the legend in types.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hass_lightning.draft import DraftHead, Eagle3Draft, EagleDraft, SavedDraft
from hass_lightning.draft.eagle3 import LAYER_IDS
from hass_lightning.draft.import_official import vocabulary_tensors
from hass_lightning.serving.engines import EAGLE3_PROFILES, PROFILES, Profile
from hass_lightning.serving.layout import shapes_for, tensors_for
from hass_lightning.serving.reference import Eagle3Reference, ReferenceHead
from hass_lightning.target_model import TargetHead

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """The export of one kind of head.

    Args:
        profiles: the layouts by the value of `format=`.
        tensors: returns the tensors of the file.
        shapes: returns their expected shapes by name.
        more_config: returns keys of config.json in addition to those of a Llama layer.
        token_ids: returns the draft vocabulary [Vd] of the engine (None: all tokens).
        problems: returns errors in tensors and config that the common checks do not cover.
        reference: implementation that reads an exported folder (None: only the tensors are compared).
    """

    profiles: Mapping[str, Profile]
    tensors: Callable[[SavedDraft, TargetHead, Profile, torch.dtype], dict[str, Tensor]]
    shapes: Callable[[SavedDraft, Profile], Shapes]
    more_config: Callable[[SavedDraft], dict[str, Any]]
    token_ids: Callable[[SavedDraft], Tensor | None]
    problems: Callable[[SavedDraft, dict[str, Tensor], dict[str, Any]], list[str]]
    reference: Callable[[Path], ReferenceHead] | None


def layout_of(draft: DraftHead) -> Layout:
    """Return the layout of a head: EAGLE, EAGLE-3, or only `hub` for any other kind."""
    if isinstance(draft, EagleDraft):
        return EAGLE
    return EAGLE3 if isinstance(draft, Eagle3Draft) else _other(draft)


def _own_tensors(saved: SavedDraft, head: TargetHead, profile: Profile, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().cpu().to(dtype).contiguous() for name, value in saved.draft.state_dict().items()}


def _own_shapes(saved: SavedDraft, profile: Profile) -> Shapes:
    return {name: tuple(value.shape) for name, value in saved.draft.state_dict().items()}


def _eagle3_tensors(saved: SavedDraft, head: TargetHead, profile: Profile, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of the head and, for engines, `d2t` and `t2d`.

    Raises:
        ValueError: if the head uses the target's LM head, which engines do not support after a final norm of the head.
    """
    assert isinstance(saved.draft, Eagle3Draft)
    tensors = _own_tensors(saved, head, profile, dtype)
    if profile.notes:
        return tensors
    if saved.draft.lm_head is None:
        raise ValueError(
            f"format={profile.name} cannot serve this head: it has no LM head of its own. Train with "
            "model.draft.lm_head=own, or use format=hub."
        )
    return tensors | vocabulary_tensors(saved.token_ids, head.vocab_size)


def _eagle3_shapes(saved: SavedDraft, profile: Profile) -> Shapes:
    config = saved.draft.config
    maps = {} if profile.notes else {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return _own_shapes(saved, profile) | maps


def _eagle3_config(saved: SavedDraft) -> dict[str, Any]:
    """Return the config keys of EAGLE-3. Layer ids: vLLM and SGLang read `eagle_config`, llama.cpp the top level."""
    layers = list(saved.draft.feature_layers)
    return {
        "draft_vocab_size": saved.draft.config.draft_vocab_size,
        "target_hidden_size": saved.draft.config.hidden_size,
        "norm_before_residual": False,
        "eagle_config": {"use_aux_hidden_state": True, LAYER_IDS: layers},
        LAYER_IDS: layers,
    }


def _eagle3_problems(saved: SavedDraft, tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    problems = [
        f"config.json has {name}={config.get(name)!r} instead of {value!r}"
        for name, value in _eagle3_config(saved).items()
        if name not in config or config[name] != value
    ]
    expected = vocabulary_tensors(saved.token_ids, saved.draft.config.vocab_size)
    for name in expected.keys() & tensors.keys():
        if tensors[name].dtype != expected[name].dtype or not torch.equal(tensors[name], expected[name]):
            problems.append(f"{name} does not match the draft vocabulary of the head")
    return problems


def _none(saved: SavedDraft) -> None:
    return None


def _no_problems(saved: SavedDraft, tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    return []


EAGLE = Layout(
    PROFILES,
    tensors_for,
    lambda saved, profile: shapes_for(saved.draft.config, profile, saved.draft.fc_bias is not None),
    lambda saved: {},
    _none,  # engines draft from the target's LM head, or have their own token map
    _no_problems,
    ReferenceHead,
)
EAGLE3 = Layout(
    EAGLE3_PROFILES,
    _eagle3_tensors,
    _eagle3_shapes,
    _eagle3_config,
    lambda saved: saved.token_ids,
    _eagle3_problems,
    Eagle3Reference,
)


def _other(draft: DraftHead) -> Layout:
    """Return a layout with unchanged tensors and config, which only hass_lightning reads."""

    def config(saved: SavedDraft) -> dict[str, Any]:
        return {key: value for key, value in saved.draft.config.to_dict().items() if key != "architectures"}

    profile = replace(PROFILES["hub"], architecture=draft.architecture)
    return Layout(
        {"hub": profile}, _own_tensors, _own_shapes, config, lambda saved: saved.token_ids, _no_problems, None
    )
