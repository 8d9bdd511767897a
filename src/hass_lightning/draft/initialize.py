"""How a head may start: from another head, or with `fc` as the best linear map and the rest of the layer silent.

The latter is not in the paper. The official heads start from random weights and are trained for days; with minutes, a
closed-form start is worth more than several epochs (experiments/quickstart.md). Shapes: T tokens, D hidden (types.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from hass_lightning.draft.checkpoint import load_draft
from hass_lightning.draft.eagle import EagleDraft
from hass_lightning.target.head import TargetHead


def start_from(draft: EagleDraft, folder: str | Path) -> None:
    """Give `draft` the weights of a saved head (a run folder or its draft/), as the official second stage does.

    Raises:
        ValueError: no head there, or one of other shapes.
    """
    own, saved = draft.state_dict(), load_draft(folder).draft.state_dict()
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (own, saved)]
    if shapes[0] != shapes[1]:
        wrong = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        raise ValueError(
            f"init_from={folder} holds a head of other shapes ({', '.join(wrong)}): it must be one of the same target, "
            "with the same model.draft.fc_bias."
        )
    draft.load_state_dict(saved)


@torch.no_grad()
def least_squares_start(
    draft: EagleDraft,
    head: TargetHead,
    sequences: Iterable[dict[str, Tensor]],
    max_rows: int = 200_000,
    ridge: float = 1e-4,
) -> int:
    """Set `fc` to the ridge regression of h_{t+1} on [E(x_{t+1}); h_t] over marked rows, `o_proj`, `down_proj` to 0.

    The head then begins as that linear map, and the layer learns what it lacks.

    Args:
        sequences: input_ids [T], features [T, D], loss_mask [T] each. max_rows: rows that are used.
        ridge: relative to the mean of the normal matrix's diagonal.

    Returns:
        the number of rows it was fitted on.
    """
    size, bias = draft.config.hidden_size, draft.fc.bias is not None
    width = 2 * size + bias
    normal = torch.zeros(width, width, dtype=torch.float32)
    right = torch.zeros(width, size, dtype=torch.float32)
    count = 0
    for sequence in sequences:
        mask = sequence["loss_mask"][:-1]
        features = sequence["features"].float()
        embeddings = head.embed(sequence["input_ids"][1:].to(head.embed_tokens.device)).cpu().float()
        rows = torch.cat([embeddings, features[:-1]], dim=-1)[mask]
        if bias:
            rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=-1)
        normal += rows.T @ rows
        right += rows.T @ features[1:][mask]
        count += len(rows)
        if count >= max_rows:
            break
    strength = ridge * normal.diagonal().mean()
    solution = torch.linalg.solve(normal.double() + strength.double() * torch.eye(width), right.double())
    draft.fc.weight.copy_(solution[: 2 * size].T)
    if bias:
        draft.fc.bias.copy_(solution[-1])
    nn.init.zeros_(draft.layer.self_attn.o_proj.weight)
    nn.init.zeros_(draft.layer.mlp.down_proj.weight)
    return count
