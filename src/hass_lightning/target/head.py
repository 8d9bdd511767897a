"""The frozen ends of the target that the draft head borrows: token embedding and LM head.

Shapes: D hidden, V vocabulary, Vd draft vocabulary, R rows (types.py has the legend).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hass_lightning.target.linear import linear


class DraftVocabulary:
    """The rows of the target's LM head that the draft head proposes from: all of them, or the kept ones.

    `token_ids[i]` is the target's id of draft index i (None: the full vocabulary, index = id). The draft head's weights
    do not depend on it (FR-Spec, arXiv 2502.14856, prunes the same way).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, token_ids: Tensor | None = None):
        full_size = weight.shape[0]
        if token_ids is not None:
            token_ids = token_ids.to(weight.device)
            index_of = torch.full((full_size,), -1, dtype=torch.int64, device=weight.device)
            index_of[token_ids] = torch.arange(len(token_ids), device=weight.device)
            weight = weight[token_ids].contiguous()
            bias = bias[token_ids] if bias is not None else None
            self.index_of: Tensor | None = index_of  # [V], -1 = not kept
        else:
            self.index_of = None
        self.weight, self.bias, self.token_ids = weight, bias, token_ids

    def __len__(self) -> int:
        return int(self.weight.shape[0])

    def logits(self, features: Tensor, decoding: bool = True) -> Tensor:
        """Features [..., D] to logits [..., Vd] in the features' dtype.

        Args:
            decoding: few rows at a time are worth a second, packed copy of the weight (linear.py); training's are not.
        """
        weight = self.weight.to(features.dtype)
        bias = None if self.bias is None else self.bias.to(features.dtype)
        return linear(features, weight, bias) if decoding else F.linear(features, weight, bias)

    def to_token_ids(self, indices: Tensor) -> Tensor:
        """Draft indices to the target's token ids (same shape)."""
        return indices if self.token_ids is None else self.token_ids[indices]

    def to_indices(self, token_ids: Tensor) -> Tensor:
        """Token ids to draft indices, -1 where the token was dropped (same shape)."""
        return token_ids if self.index_of is None else self.index_of[token_ids]


class TargetHead:
    """Frozen `embed_tokens` and `lm_head` of the target, in plain tensors: never a module, never trained."""

    def __init__(self, embed_tokens: Tensor, lm_head: Tensor, lm_head_bias: Tensor | None = None):
        self.embed_tokens = embed_tokens.detach()  # [V, D]
        self.lm_head = lm_head.detach()  # [V, D]
        self.lm_head_bias = None if lm_head_bias is None else lm_head_bias.detach()

    @property
    def vocab_size(self) -> int:
        """Number of rows of the LM head."""
        return int(self.lm_head.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return int(self.lm_head.shape[1])

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [...] to embeddings [..., D]."""
        return F.embedding(input_ids, self.embed_tokens)

    def logits(self, features: Tensor) -> Tensor:
        """Features [..., D] (after the final norm) to the target's logits [..., V]."""
        return linear(features, self.lm_head, self.lm_head_bias)

    def draft_vocabulary(self, token_ids: Tensor | None = None) -> DraftVocabulary:
        """The LM head's rows `token_ids` (None: all) for the draft head to propose from."""
        return DraftVocabulary(self.lm_head, self.lm_head_bias, token_ids)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TargetHead:
        """A copy on another device or in another dtype."""
        tied = self.embed_tokens.data_ptr() == self.lm_head.data_ptr()
        lm_head = self.lm_head.to(device=device, dtype=dtype)
        embed = lm_head if tied else self.embed_tokens.to(device=device, dtype=dtype)
        bias = None if self.lm_head_bias is None else self.lm_head_bias.to(device=device, dtype=dtype)
        return TargetHead(embed, lm_head, bias)
