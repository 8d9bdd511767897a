"""The draft vocabulary: the part of the target's LM head that a draft head without its own LM head uses.

Shapes: D hidden, V vocabulary, Vd draft vocabulary (see the legend in types.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hass_lightning.target_model.linear import FrozenWeight


class DraftVocabulary:
    """The tokens that the draft head can propose: the rows of the target's LM head, all or a subset.

    The draft head's weights do not depend on it (pruning as in FR-Spec, arXiv 2502.14856).

    Args:
        weight: [V, D], the target's LM head.
        bias: [V].
        token_ids: [Vd], the target's token id of each draft index (None: the full vocabulary).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, token_ids: Tensor | None = None):
        full_size = weight.shape[0]
        if token_ids is not None:
            token_ids = token_ids.to(weight.device)
            index_of = torch.full((full_size,), -1, dtype=torch.int64, device=weight.device)
            index_of[token_ids] = torch.arange(len(token_ids), device=weight.device)
            weight = weight[token_ids].contiguous()
            bias = bias[token_ids] if bias is not None else None
            self.index_of: Tensor | None = index_of  # [V], -1 for tokens outside the draft vocabulary
        else:
            self.index_of = None
        self.weight, self.bias, self.token_ids = weight, bias, token_ids
        self._frozen: dict[torch.dtype, FrozenWeight] = {}

    def __len__(self) -> int:
        return int(self.weight.shape[0])

    def __deepcopy__(self, memo: object) -> DraftVocabulary:
        return self  # frozen: copies of a module that uses it share it

    def logits(self, features: Tensor, decoding: bool = True) -> Tensor:
        """Compute logits [..., Vd] of features [..., D], in the features' dtype.

        Args:
            features: [..., D].
            decoding: whether to use a packed copy of the weight, which is faster for few rows (linear.py). False in
                training.
        """
        dtype = features.dtype
        if decoding and dtype in self._frozen:
            return self._frozen[dtype](features)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if not decoding:
            return F.linear(features, weight, bias)
        self._frozen[dtype] = FrozenWeight(weight, bias)
        return self._frozen[dtype](features)

    def to_token_ids(self, indices: Tensor) -> Tensor:
        """Convert draft indices to the target's token ids (same shape)."""
        return indices if self.token_ids is None else self.token_ids[indices]

    def to_indices(self, token_ids: Tensor) -> Tensor:
        """Convert token ids to draft indices (same shape), -1 for tokens outside the draft vocabulary."""
        return token_ids if self.index_of is None else self.index_of[token_ids]
