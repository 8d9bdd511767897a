"""On-policy alignment steps: the head reads the tokens that it drafts, and learns the target's features for them.

In step j, the row at position t belongs to the chain that starts at its root, position t-(j-1) (losses/counted.py).
Off-policy, the chain reads the tokens of the text. Here it reads the head's most probable tokens of the steps before,
as a chain does in decoding, even after one that the target would reject. From there on the stored features are those of
another text. The target therefore reads the text, and then the tokens of the chains in one forward with a tree mask.

Shapes: B batch, T tokens, N tokens of branches, W features (see the legend in types.py). Rows are positions 0 … T-2:
the row at t reads token t+1 and predicts the feature of t+1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hass_lightning.draft import unroll
from hass_lightning.draft.alignment import needed_rows
from hass_lightning.losses import LossOutput, compute_together
from hass_lightning.target_model.model import TargetModel

if TYPE_CHECKING:
    from hass_lightning.training.module import HassModule, PreparedBatch

BRANCH_TOKENS = 1024  # of one forward; the mask has this many rows


class OwnTokens:
    """Collects the tokens of all chains of a batch, step by step, and returns their labels.

    Args:
        module: head, draft vocabulary and alignment.
        prepared: the batch. Chains start at its loss positions; those that start before read the text.

    Attributes:
        read: for each step so far, the tokens [B, T-1] that its rows read.
    """

    def __init__(self, module: HassModule, prepared: PreparedBatch):
        self.module, self.prepared = module, prepared
        self.read = [prepared.batch.input_ids[:, 1:]]
        self.changed = [torch.zeros_like(prepared.mask)]  # of each step: whether the chain has left the text

    @torch.no_grad()
    def next_embeddings(self, estimate: Tensor) -> Tensor:
        """Choose the tokens of the next step from the features [B, T-1, D] of this one; return their embeddings."""
        module, mask, given = self.module, self.prepared.mask, self.read[0]
        # rows of chains that start at a loss position; the successor of a row is at the next position
        rows = _later(mask, len(self.read) - 1) & needed_rows(mask, module.alignment.depth)
        rows[:, -1] = False
        indices = module.draft.logits(estimate[rows], module.vocabulary, decoding=False).argmax(-1)
        tokens = given.clone()
        tokens[_later(rows, 1)] = module.vocabulary.to_token_ids(indices)
        self.read.append(tokens)
        self.changed.append(_later(self.changed[-1], 1) | (tokens != given))
        return module.head.embed(tokens)

    def labels(self, target: TargetModel) -> list[tuple[Tensor, Tensor]]:
        """Return the target's last hidden states [B, T-1, D] and draft indices of its argmax [B, T-1] for each step."""
        batch, vocabulary = self.prepared.batch, self.module.vocabulary
        features = self.module.head.last(batch.features)[:, 1:]
        wanted = vocabulary.to_indices(batch.target_ids[:, 1:].clamp(min=0))
        labels = [(features, wanted), *((features.clone(), wanted.clone()) for _ in self.read[1:])]
        for number in range(len(features)):
            self._label_branches(target, number, labels)
        return labels

    @torch.no_grad()
    def _label_branches(self, target: TargetModel, number: int, labels: list[tuple[Tensor, Tensor]]) -> None:
        """Replace the labels of the chains of one sequence that have left the text."""
        batch, depth = self.prepared.batch, len(self.read)
        length = int(batch.lengths[number])
        leave = torch.stack([changed[number] & self.prepared.mask[number] for changed in self.changed])  # [J, T-1]
        steps, rows = leave.nonzero(as_tuple=True)
        roots = (rows - steps).unique()
        if not len(roots):
            return
        text = batch.input_ids[number : number + 1, :length].to(target.device)
        cache = target.new_cache(1, length + BRANCH_TOKENS + depth)
        target.forward(text, cache)
        cache.advance(length)
        for part in roots.split(max(1, BRANCH_TOKENS // (depth - 1))):
            # a branch: the tokens that steps 2 … J of one chain read, row by row
            root = part.repeat_interleave(depth - 1)
            step = torch.arange(1, depth, device=part.device).repeat(len(part))
            inside = root + step < length - 1
            root, step = root[inside], step[inside]
            tokens = torch.stack(self.read)[step, number, root + step]
            hidden = target.forward(
                tokens[None].to(target.device), cache, (root + step + 1)[None].to(target.device),
                _branch_mask(root, step, length)[None, None].to(target.device),
            )[0]  # fmt: skip
            best = target.head.logits(hidden).argmax(-1).to(root.device)
            last = target.head.last(hidden)
            for later in range(1, depth):
                chosen = step == later
                states, indices = labels[later]
                states[number, root[chosen] + later] = last[chosen.to(last.device)].to(states)
                indices[number, root[chosen] + later] = self.module.vocabulary.to_indices(best[chosen])


def _branch_mask(root: Tensor, step: Tensor, length: int) -> Tensor:
    """Mask [N, length + N]: a token sees the text up to the one that its root reads, and its branch up to itself."""
    text = torch.arange(length, device=root.device) <= root[:, None] + 1
    branch = (root[:, None] == root) & (step[:, None] >= step)
    return torch.cat([text, branch], dim=1)


def _later(rows: Tensor, number: int) -> Tensor:
    """Return [B, T] moved to later positions: position t has the value of t - number, or False before the start."""
    moved = torch.zeros_like(rows)
    moved[:, number:] = rows[:, : rows.shape[1] - number]
    return moved


def own_token_loss(
    module: HassModule, target: TargetModel, prepared: PreparedBatch, normalizer: Tensor | float
) -> LossOutput:
    """Compute the loss of one batch whose later alignment steps read the head's own tokens.

    Args:
        module: head, loss and alignment.
        target: the target with its layers.
        prepared: the batch.
        normalizer: divisor of the sums.

    Returns:
        As in off-policy steps. Positions whose label is outside the draft vocabulary do not count in that step.
    """
    mask, own = prepared.mask, OwnTokens(module, prepared)
    inputs = (prepared.embeddings, prepared.inputs, module.alignment, mask)
    steps = list(unroll(module.draft, *inputs, next_embeddings=own.next_embeddings))
    hits, parts = torch.zeros(len(steps), len(prepared.wanted), dtype=torch.bool, device=mask.device), []
    for number, (estimate, (features, wanted)) in enumerate(zip(steps, own.labels(target), strict=True)):
        rows = mask & (wanted >= 0)
        weights = module.alignment.weights[number : number + 1]
        loss = module.loss_pass([estimate[rows]], features[rows], wanted[rows], normalizer, weights,
                                first_step=number + 1)  # fmt: skip
        parts += compute_together([loss])
        hits[number, rows[mask]] = parts[-1].hits[0]
    values = {name: value for part in parts for name, value in part.values.items()}
    return LossOutput(torch.stack([part.total for part in parts]).sum(), values, hits)
