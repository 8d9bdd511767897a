"""Initialization of a head: from another head, from the target's LM head, or from a least-squares fit of `fc`.

The least-squares fit is not in the paper. The official heads start from random weights and train for days. With minutes
of training, the closed-form solution is worth more than several epochs (experiments/quickstart.md).
Shapes: T tokens, D hidden (see the legend in types.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from hass_lightning.draft.checkpoint import load_draft
from hass_lightning.draft.eagle import EagleDraft
from hass_lightning.draft.eagle3 import Eagle3Draft
from hass_lightning.draft.head import DraftHead
from hass_lightning.target_model.lm_head import TargetHead
from hass_lightning.target_model.model import TargetModel

log = logging.getLogger(__name__)


def start_from(draft: DraftHead, folder: str | Path, token_ids: Tensor | None = None) -> None:
    """Load the weights of a saved head (a run folder or its draft/) into `draft`, as in the official second stage.

    Args:
        draft: the head, modified in place.
        folder: the saved head.
        token_ids: draft vocabulary of `draft`, to which an LM head of its own belongs.

    Raises:
        ValueError: if there is no head, or its shapes or the vocabulary of its LM head differ.
    """
    other = load_draft(folder)
    own, saved = draft.state_dict(), other.draft.state_dict()
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (own, saved)]
    if shapes[0] != shapes[1]:
        wrong = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        raise ValueError(
            f"init_from={folder} holds a head of other shapes ({', '.join(wrong)}): it must be a head of the same "
            "target with the same model.draft.fc_bias, vocab_size and feature_layers."
        )
    vocabularies = [ids if ids is None else ids.tolist() for ids in (token_ids, other.token_ids)]
    if draft.logit_parameters() and vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"init_from={folder} holds an LM head of another draft vocabulary: the tokens of model.draft.vocab_size "
            "are counted in the training data, so use the data of that run, or model.draft.vocab_size=null in both."
        )
    draft.load_state_dict(saved)


def initialize(
    draft: DraftHead, target: TargetModel, sequences: Iterable[dict[str, Tensor]], token_ids: Tensor | None
) -> None:
    """Initialize a new head as `model.draft.start` says.

    Args:
        draft: the head, modified in place.
        target: the target.
        sequences: the training sequences with their features, read if needed.
        token_ids: [Vd], the draft vocabulary (None: full).
    """
    if draft.start == "least_squares":
        assert isinstance(draft, EagleDraft)
        rows = least_squares_start(draft, target.head, sequences)
        log.info("fc is initialized by least squares over %d rows", rows)
    elif draft.start == "target":
        assert isinstance(draft, Eagle3Draft)
        target_start(draft, target, token_ids)
        log.info("LM head and final norm are initialized as the target's")


@torch.no_grad()
def target_start(draft: Eagle3Draft, target: TargetModel, token_ids: Tensor | None) -> None:
    """Copy the target's LM head at `token_ids` [Vd] and the weight of its final norm, if that is an RMSNorm of D."""
    if draft.lm_head is not None:
        draft.lm_head.weight.copy_(target.head.draft_vocabulary(token_ids).weight)
    norm = getattr(target.model.base_model, "norm", None)
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.shape == draft.norm.weight.shape and not weight.is_meta:
        draft.norm.weight.copy_(weight)


@torch.no_grad()
def least_squares_start(
    draft: EagleDraft,
    head: TargetHead,
    sequences: Iterable[dict[str, Tensor]],
    max_rows: int = 200_000,
    ridge: float = 1e-4,
) -> int:
    """Initialize `fc` by ridge regression of h_{t+1} on [E(x_{t+1}); h_t] over loss positions.

    `o_proj` and `down_proj` are set to 0, so the head starts as this linear map and the layer learns a correction.

    Args:
        draft: the head, modified in place.
        head: the target's embedding and LM head.
        sequences: dicts with input_ids [T], features [T, W] and loss_mask [T].
        max_rows: number of loss positions after which no more sequences are read.
        ridge: regularization strength, relative to the mean diagonal of the normal matrix.

    Returns:
        The number of loss positions used.
    """
    size, bias = draft.config.hidden_size, draft.fc.bias is not None
    width = 2 * size + bias
    normal = torch.zeros(width, width, dtype=torch.float32)
    right_side = torch.zeros(width, size, dtype=torch.float32)
    count = 0
    for sequence in sequences:
        mask = sequence["loss_mask"][:-1]
        features = head.last(sequence["features"]).float()
        embeddings = head.embed(sequence["input_ids"][1:].to(head.embed_tokens.device)).cpu().float()
        rows = torch.cat([embeddings, features[:-1]], dim=-1)[mask]
        if bias:
            rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=-1)
        normal += rows.T @ rows
        right_side += rows.T @ features[1:][mask]
        count += len(rows)
        if count >= max_rows:
            break
    strength = ridge * normal.diagonal().mean()
    solution = torch.linalg.solve(normal.double() + strength.double() * torch.eye(width), right_side.double())
    draft.fc.weight.copy_(solution[: 2 * size].T)
    if bias:
        draft.fc.bias.copy_(solution[-1])
    nn.init.zeros_(draft.layer.self_attn.o_proj.weight)
    nn.init.zeros_(draft.layer.mlp.down_proj.weight)
    return count
