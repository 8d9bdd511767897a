"""The rows of one chunk and step, with the gradient over the vocabulary put together in place.

Autograd would make one or two [rows, vocabulary] tensors a use of the logits, and add them up: on a CPU that takes as
long as the matrix products. Here what terms use most (log Σ exp z, Σ p z, z at some indices) are leaves of their own:
their gradients are a few numbers a row, and all of them are written into one tensor.
Shapes: R rows, Vd draft vocabulary (types.py has the legend).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hass_lightning.losses.terms import Rows


@dataclass
class Chunk(Rows):
    """`Rows` whose `draft_features` and `draft_logits` are leaves."""

    scratch: Tensor = field(kw_only=True)  # [R, Vd], holds exp(z - max z), then the gradient
    _sum: Tensor | None = None  # [R], of the scratch
    _expected: Tensor | None = None
    _picked: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # indices and logits, each [R, K]

    @property
    def log_normalizer(self) -> Tensor:
        """log Σ_v exp z_v [R]. (`torch.logsumexp` takes 20 times as long on a CPU.)"""
        if self._lse is None:
            logits = self.draft_logits.detach()
            highest = logits.amax(-1, keepdim=True)
            self._sum = torch.sub(logits, highest, out=self.scratch).exp_().sum(-1)
            self._lse = self._leaf(self._sum.log() + highest.squeeze(-1))
        return self._lse

    @property
    def expected_logit(self) -> Tensor:
        """Σ_v p_v z_v [R], under the target's distribution."""
        if self._expected is None:
            logits = self.draft_logits.detach()
            dots = torch.bmm(self.target.probs.unsqueeze(1), logits.unsqueeze(2))  # no [R, Vd] product
            self._expected = self._leaf(dots.flatten())
        return self._expected

    def logits_at(self, indices: Tensor) -> Tensor:
        """z at the draft indices [R, K]: [R, K]."""
        picked = self._leaf(self.draft_logits.detach().gather(-1, indices))
        self._picked.append((indices, picked))
        return picked

    def _leaf(self, value: Tensor) -> Tensor:
        return value.requires_grad_(self.draft_logits.requires_grad)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Of `loss`, a sum of terms, with respect to the features [R, D] and the logits [R, Vd]; once."""
        summaries = [leaf for leaf in (self._lse, self._expected) if leaf is not None]
        leaves = [self.draft_features, self.draft_logits, *summaries, *(picked for _, picked in self._picked)]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        of = {id(leaf): gradient for leaf, gradient in zip(leaves, found, strict=True) if gradient is not None}
        if id(self._lse) in of and self._sum is not None:
            total = self.scratch.mul_((of[id(self._lse)] / self._sum).unsqueeze(-1))
        else:
            total = self.scratch.zero_()
        if id(self._expected) in of:
            total.addcmul_(self.target.probs, of[id(self._expected)].unsqueeze(-1))
        for indices, picked in self._picked:
            if id(picked) in of:
                total.scatter_add_(-1, indices, of[id(picked)])
        if id(self.draft_logits) in of:
            total += of[id(self.draft_logits)]
        return of.get(id(self.draft_features), torch.zeros_like(self.draft_features)), total
