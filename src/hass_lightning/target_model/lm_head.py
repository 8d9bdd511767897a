"""The target's frozen embedding and LM head, which the draft head uses.

Shapes: D hidden, V vocabulary, W features, Vd draft vocabulary (see the legend in types.py).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
from hass_lightning.target_model.linear import FrozenWeight


class TargetHead:
    """The target's frozen `embed_tokens` and `lm_head`, as plain tensors instead of a module, so none is trained."""

    def __init__(self, embed_tokens: Tensor, lm_head: Tensor, lm_head_bias: Tensor | None = None):
        self.embed_tokens = embed_tokens.detach()  # [V, D]
        self.lm_head = lm_head.detach()  # [V, D]
        self.lm_head_bias = None if lm_head_bias is None else lm_head_bias.detach()

    @cached_property
    def output(self) -> FrozenWeight:
        """The LM head with the packed weights that decoding uses."""
        return FrozenWeight(self.lm_head, self.lm_head_bias)

    def __deepcopy__(self, memo: object) -> TargetHead:
        return self  # frozen: copies of a module that uses it share it

    @property
    def vocab_size(self) -> int:
        """Number of rows of the LM head."""
        return int(self.lm_head.shape[0])

    @property
    def hidden_size(self) -> int:
        """Size of the features."""
        return int(self.lm_head.shape[1])

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up the embeddings [..., D] of token ids [...]."""
        return F.embedding(input_ids, self.embed_tokens)

    def logits(self, features: Tensor) -> Tensor:
        """Compute the target's logits [..., V] of features [..., W], which end with the last hidden state."""
        self.output.bias = self.lm_head_bias  # which may have been replaced since
        return self.output(self.last(features))

    def last(self, features: Tensor) -> Tensor:
        """Return the last hidden state [..., D], after the final norm, of features [..., W]."""
        return features[..., -self.hidden_size :]

    def draft_vocabulary(self, token_ids: Tensor | None = None) -> DraftVocabulary:
        """Return the draft vocabulary of `token_ids` [Vd] (None: the full vocabulary)."""
        return DraftVocabulary(self.lm_head, self.lm_head_bias, token_ids)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TargetHead:
        """Return a copy on another device or in another dtype."""
        tied = self.embed_tokens.data_ptr() == self.lm_head.data_ptr()
        lm_head = self.lm_head.to(device=device, dtype=dtype)
        embed = lm_head if tied else self.embed_tokens.to(device=device, dtype=dtype)
        bias = None if self.lm_head_bias is None else self.lm_head_bias.to(device=device, dtype=dtype)
        return TargetHead(embed, lm_head, bias)
