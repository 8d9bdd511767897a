"""The EAGLE-3 draft head (arXiv 2503.01840): features of several target layers, and a trained LM head.

`fc` projects the concatenated features of the target to the hidden size. The attention reads [normed embedding; normed
feature], and the residual is the feature without a norm. The LM head reads the output after a final norm; later steps
read the output itself. Position t pairs token t+1 with feature t.
Shapes: B batch, T tokens, D hidden, Vd draft vocabulary (see the legend in types.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hass_lightning.draft.attention import Form
from hass_lightning.draft.head import DraftHead, Products, draft_config
from hass_lightning.draft.layers import DraftLayer
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"  # name that serving engines read in eagle_config


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Default layers whose inputs the head reads: 2, n//2 and n-3, or the last three if there are fewer than 7."""
    return (2, num_layers // 2, num_layers - 3) if num_layers >= 7 else tuple(range(num_layers))[-3:]


class Eagle3Layer(DraftLayer):
    """`DraftLayer` with an input of size 2D and a norm for each half of it."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config, 2 * config.hidden_size)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Eagle3Draft(DraftHead):
    """An EAGLE-3 head without the embedding, which is the target's and frozen.

    Parameter names are those of the published heads.

    Args:
        config: see `from_target`, which adds `draft_vocab_size` and `eagle_config`.
        vocab_size: size of the draft vocabulary (None: full).
        start: `random`, or `target`: the LM head and the final norm start as the target's (initialize.py).
        attention: attention implementation in training (attention.py).

    Raises:
        ValueError: if `start` or `attention` is unknown, or the config names no layers.
    """

    architecture: ClassVar[str] = "LlamaForCausalLMEagle3"
    starts: ClassVar[tuple[str, ...]] = ("random", "target")

    def __init__(
        self, config: LlamaConfig, vocab_size: int | None = None, start: str = "random", attention: Form = "auto"
    ):
        super().__init__(config, vocab_size, start, attention)
        self.feature_layers = tuple(config.eagle_config[LAYER_IDS])
        hidden = config.hidden_size
        self.fc = nn.Linear(len(self.feature_layers) * hidden, hidden, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.lm_head: nn.Linear | None = None
        if config.draft_vocab_size is not None:
            self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)

    @classmethod
    def from_target(
        cls,
        target_config: Any,
        feature_layers: Sequence[int] | int | None = None,
        lm_head: Literal["own", "target"] = "own",
        vocab_size: int | None = None,
        start: str = "random",
        attention: Form = "auto",
    ) -> Eagle3Draft:
        """Create a new head for a target, given the target's config.

        Args:
            target_config: the target's config.
            feature_layers: layers of the target whose inputs the head reads, ascending. Default: `default_layers`. A
                number from 1 to 3: the last so many of these.
            lm_head: `own` trains an LM head. `target` uses the target's, frozen, after the head's final norm.
            vocab_size, start, attention: see the class.

        Raises:
            ValueError: if a value is not allowed.
        """
        num_layers = target_config.num_hidden_layers
        layers = default_layers(num_layers)
        if isinstance(feature_layers, int):
            layers = layers[-feature_layers:] if 1 <= feature_layers <= 3 else ()
        elif feature_layers is not None:
            layers = tuple(feature_layers)
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
            raise ValueError(
                f"model.draft.feature_layers={feature_layers} must be layers of the target in ascending order, from 0 "
                f"to {num_layers - 1}, such as {list(default_layers(num_layers))} (null), or how many of these: 1 to 3."
            )
        if lm_head not in ("own", "target"):
            raise ValueError(f"model.draft.lm_head={lm_head} must be own or target.")
        eagle = {"use_aux_hidden_state": True, LAYER_IDS: list(layers)}
        size = (vocab_size or target_config.vocab_size) if lm_head == "own" else None
        config = draft_config(target_config, draft_vocab_size=size, eagle_config=eagle)
        return cls(config, vocab_size, start, attention)

    @classmethod
    def from_saved(cls, config: LlamaConfig, notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See `DraftHead.from_saved`."""
        return cls(config)

    @property
    def layer(self) -> Eagle3Layer:
        """The only decoder layer."""
        return self.midlayer

    def products(self) -> Products:
        """See `DraftHead.products`."""
        own = self.lm_head is not None
        return Products(*self.layer.sizes(), self.fc.weight.numel(), 0, *self.layer.products(), trains_lm_head=own)

    def read(self, features: Tensor) -> Tensor:
        """Project the target's layers with `fc`: [B, T, (layers + 1)·D] to [B, T, D]. Ignores the last hidden state."""
        size = self.config.hidden_size
        if features.shape[-1] == size:
            return features
        return self.fc(features[..., :-size].to(self.working_dtype(features)))

    def inputs(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return `[norm(E(x_{t+1})); norm(h_t)]`, of shape [B, T, 2D], and the residual h_t [B, T, D]."""
        dtype = self.working_dtype(embeddings)
        embeddings, features = embeddings.to(dtype), features.to(dtype)
        layer = self.midlayer
        return torch.cat([layer.input_layernorm(embeddings), layer.hidden_norm(features)], dim=-1), features

    def output(self, features: Tensor) -> Tensor:
        """Apply the final norm to predicted features [..., D]."""
        normed: Tensor = self.norm(features)
        return normed

    def logits(self, features: Tensor, vocabulary: DraftVocabulary, decoding: bool = True) -> Tensor:
        """Compute draft logits [..., Vd] of predicted features [..., D], after the final norm."""
        normed = self.output(features)
        return vocabulary.logits(normed, decoding=decoding) if self.lm_head is None else self.lm_head(normed)

    def logit_parameters(self) -> list[nn.Parameter]:
        """The final norm and the LM head."""
        trained = [self.norm] if self.lm_head is None else [self.norm, self.lm_head]
        return [parameter for module in trained for parameter in module.parameters()]
