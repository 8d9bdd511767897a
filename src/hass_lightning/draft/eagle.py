"""The EAGLE draft head that HASS trains: `fc` on [embedding; feature] and one Llama layer.

The target's frozen embedding and LM head are not part of it. Position t pairs token t+1 with feature t.
Shapes: B batch, T tokens, D hidden (see the legend in types.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from hass_lightning.draft.attention import Form
from hass_lightning.draft.head import DraftHead, Products, draft_config
from hass_lightning.draft.layers import DraftLayer


class EagleDraft(DraftHead):
    """An EAGLE-1/2/HASS head without embedding and LM head, which are the target's and frozen.

    Parameter names and shapes are those of the published heads (docs/method.md, The head), whatever the training.
    Predicted features are in the space after the target's final norm: the target's LM head applies directly.

    Args:
        config: see `draft_config`.
        fc_bias: whether `fc` has a bias.
        vocab_size: size of the draft vocabulary (None: full). No weight depends on it.
        start: `random`, or `least_squares` (initialize.py).
        attention: attention implementation in training (attention.py).

    Raises:
        ValueError: if `start` or `attention` is unknown.
    """

    architecture: ClassVar[str] = "LlamaForCausalLMEagle"
    starts: ClassVar[tuple[str, ...]] = ("random", "least_squares")

    def __init__(
        self,
        config: LlamaConfig,
        fc_bias: bool = False,
        vocab_size: int | None = None,
        start: str = "random",
        attention: Form = "auto",
    ):
        super().__init__(config, vocab_size, start, attention)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList([DraftLayer(config)])

    @classmethod
    def from_target(
        cls,
        target_config: Any,
        fc_bias: bool = False,
        vocab_size: int | None = None,
        start: str = "random",
        attention: Form = "auto",
    ) -> EagleDraft:
        """Create a new head for a target, given the target's config."""
        return cls(draft_config(target_config), fc_bias, vocab_size, start, attention)

    @classmethod
    def from_saved(cls, config: LlamaConfig, notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See `DraftHead.from_saved`."""
        return cls(config, fc_bias=notes.get("fc_bias", "fc.bias" in tensors))

    def saved_notes(self) -> dict[str, Any]:
        """See `DraftHead.saved_notes`."""
        return {"fc_bias": self.fc.bias is not None}

    @property
    def layer(self) -> DraftLayer:
        """The only decoder layer."""
        return self.layers[0]  # type: ignore[return-value]

    @property
    def fc_bias(self) -> Tensor | None:
        """The bias of `fc`."""
        return self.fc.bias

    def products(self) -> Products:
        """See `DraftHead.products`."""
        return Products(*self.layer.sizes(), 0, self.fc.weight.numel(), *self.layer.products(), trains_lm_head=False)

    def fuse(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Return `u = fc([E(x_{t+1}); h_t])` [B, T, D] of embeddings [B, T, D] and features [B, T, D]."""
        dtype = self.working_dtype(embeddings)
        return self.fc(torch.cat([embeddings.to(dtype), features.to(dtype)], dim=-1))

    def inputs(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return `u` twice: the attention reads it, and it is the residual."""
        u = self.fuse(embeddings, features)
        return u, u
