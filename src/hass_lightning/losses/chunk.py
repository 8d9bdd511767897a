"""Loss positions of one chunk and alignment step, with the gradient over the vocabulary accumulated in place.

Autograd would allocate one or two [R, Vd] tensors for each use of the logits and add them up, which takes as
long on a CPU as the matrix products. Here the quantities that terms use most (log Σ exp z, Σ p z, z at some indices)
are separate leaf tensors. Their gradients are a few numbers per position, and all of them are written into one tensor.
Shapes: R loss positions, K indices, D hidden, Vd draft vocabulary (see the legend in types.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.losses.reductions import Passes
from hass_lightning.losses.terms import Rows, TargetRows


class Chunk(Rows):
    """`Rows` whose draft features, draft logits and their reductions are leaf tensors.

    Args:
        draft_features: [R, D], in fp32 or fp64.
        logits: [R, Vd], in the dtype of the matrix product.
        target: the target's values for the same rows.
        step: alignment step, starting at 1.
        passes: computes the reductions of the logits and their gradient.
        with_gradient: whether `gradients` will be called.
    """

    def __init__(
        self,
        draft_features: Tensor,
        logits: Tensor,
        target: TargetRows,
        step: int,
        passes: Passes,
        with_gradient: bool = True,
    ):
        self.with_gradient = with_gradient
        self.draft_features = self._leaf(draft_features.detach())
        self.target, self.step, self.passes = target, step, passes
        self._logits = logits.detach()
        self._wide: Tensor | None = None
        self._lse: Tensor | None = None
        self._log_probs: Tensor | None = None
        self._expected: Tensor | None = None
        self._picked: list[tuple[Tensor, Tensor]] = []  # indices and logits, each [R, K]

    def _leaf(self, value: Tensor) -> Tensor:
        return value.requires_grad_(self.with_gradient)

    @property
    def draft_logits(self) -> Tensor:  # type: ignore[override]
        """Draft logits z [R, Vd] in the dtype of the features; created on first use."""
        if self._wide is None:
            self._wide = self._leaf(self._logits.to(self.draft_features.dtype).detach())
        return self._wide

    @property
    def log_normalizer(self) -> Tensor:
        """Log-normalizer log Σ_v exp z_v [R]."""
        if self._lse is None:
            self._lse = self._leaf(self.passes.log_normalizer())
        return self._lse

    @property
    def expected_logit(self) -> Tensor:
        """Expected logit Σ_v p_v z_v [R] under the target's distribution."""
        if self._expected is None:
            self._expected = self._leaf(self.passes.expected_logit())
        return self._expected

    def logits_at(self, indices: Tensor) -> Tensor:
        """Logits z [R, K] at the draft vocabulary indices [R, K]."""
        picked = self._leaf(self._logits.gather(-1, indices).to(self.draft_features.dtype))
        self._picked.append((indices, picked))
        return picked

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `loss` with respect to the features [R, D] and the logits [R, Vd]. May be called only once."""
        summaries = [leaf for leaf in (self._wide, self._lse, self._expected) if leaf is not None]
        leaves = [self.draft_features, *summaries, *(picked for _, picked in self._picked)]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        of = {id(leaf): gradient for leaf, gradient in zip(leaves, found, strict=True) if gradient is not None}
        total = self.passes.gradient(of.get(id(self._lse)), of.get(id(self._expected)))
        for indices, picked in self._picked:
            if id(picked) in of:
                total.scatter_add_(-1, indices, of[id(picked)].to(total.dtype))
        if id(self._wide) in of:
            total += of[id(self._wide)]
        return of.get(id(self.draft_features), torch.zeros_like(self.draft_features)), total
