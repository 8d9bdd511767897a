"""The base class of draft heads: one decoder layer and the two methods that all other packages use.

`forward` predicts the next features from features, and `logits` the next token from features. Both the target's
features and predicted ones are valid input of `forward`; the head knows them by their width.
Shapes: B batch, T tokens, D hidden, W width of the target's features, Vd draft vocabulary (see the legend in types.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from hass_lightning.draft.attention import Form, check_form
from hass_lightning.draft.layers import DraftLayer, RotaryAngles
from hass_lightning.draft.rope import head_rope
from hass_lightning.target_model.cache import KVCache
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
from hass_lightning.target_model.llama import LlamaLayer, additive, rotary_of


def draft_config(target_config: Any, qkv_bias: bool = False, **extra: Any) -> LlamaConfig:
    """The head's config: always one Llama layer; sizes, epsilon and rope (rope.py) follow the target's config.

    Args:
        target_config: the target's config.
        qkv_bias: q, k and v have biases, as in published heads for Qwen2.
        extra: further keys of one kind of head.
    """
    heads = target_config.num_attention_heads
    extra = {"qkv_bias": True} | extra if qkv_bias else extra
    return LlamaConfig(
        vocab_size=target_config.vocab_size,
        hidden_size=target_config.hidden_size,
        intermediate_size=target_config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=getattr(target_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
        hidden_act="silu",
        rms_norm_eps=getattr(target_config, "rms_norm_eps", 1e-6),
        max_position_embeddings=target_config.max_position_embeddings,
        rope_parameters=head_rope(target_config),
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        bos_token_id=target_config.bos_token_id,
        eos_token_id=target_config.eos_token_id,
        pad_token_id=getattr(target_config, "pad_token_id", None),
        **extra,
    )


@dataclass(frozen=True)
class Products:
    """Numbers that the head's matrix products multiply per position, for the FLOPs of training.

    Args:
        hidden: D, the input of the LM head.
        queries: width of all queries.
        read: once, to bring the target's features to the hidden size.
        fuse: before the layer, at every alignment step, of inputs that need no gradient.
        projections: q, k and v.
        rest: the output projection and the MLP.
        trains_lm_head: whether the LM head is trained.
    """

    hidden: int
    queries: int
    read: int
    fuse: int
    projections: int
    rest: int
    trains_lm_head: bool


class DraftHead(nn.Module):
    """Base class of draft heads. The target's frozen embedding is not part of a head.

    A subclass sets `layer`, and implements `inputs`, `products` and whatever differs of the other methods.

    Args:
        config: see `draft_config`.
        vocab_size: size of the draft vocabulary (None: full).
        start: initialization of a new head, one of `starts` (initialize.py).
        attention: attention implementation in training (attention.py).

    Attributes:
        feature_layers: layers of the target whose inputs precede the last hidden state in its features.

    Raises:
        ValueError: if `start` or `attention` is unknown.
    """

    architecture: ClassVar[str]  # of config.json
    starts: ClassVar[tuple[str, ...]] = ("random",)
    feature_layers: tuple[int, ...] = ()

    def __init__(self, config: LlamaConfig, vocab_size: int | None, start: str, attention: Form):
        super().__init__()
        if start not in self.starts:
            raise ValueError(f"model.draft.start={start} is none of {', '.join(self.starts)}.")
        self.config = config
        self.vocab_size = vocab_size
        self.start = start
        self.attention = check_form(attention)
        self.rotary = RotaryAngles(config)
        self.joined: LlamaLayer | None = None  # the layer as decoding runs it (join_layer)

    @classmethod
    def from_saved(cls, config: LlamaConfig, notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Create a head from a saved config, its notes, and the tensors that will be loaded into it."""
        raise NotImplementedError

    def saved_notes(self) -> dict[str, Any]:
        """Return the notes that `from_saved` needs in addition to the config."""
        return {}

    @property
    def layer(self) -> DraftLayer:
        """The only decoder layer."""
        raise NotImplementedError

    @property
    def fc_bias(self) -> Tensor | None:
        """The bias of the linear map before the layer."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.layer.self_attn.q_proj.weight.dtype

    def products(self) -> Products:
        """The sizes of the matrix products, of the whole parameters (before ZeRO-3 partitions them)."""
        raise NotImplementedError

    def read(self, features: Tensor) -> Tensor:
        """Convert the target's features [B, T, W] to the head's input [B, T, D]; predicted features are unchanged."""
        return features[..., -self.config.hidden_size :]

    def inputs(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention's input [B, T, …] and the residual [B, T, D] of embeddings and features [B, T, D]."""
        raise NotImplementedError

    def output(self, features: Tensor) -> Tensor:
        """What the LM head reads of predicted features [..., D], and loss terms compare with the target's features."""
        return features

    def logits(self, features: Tensor, vocabulary: DraftVocabulary, decoding: bool = True) -> Tensor:
        """Compute draft logits [..., Vd] of predicted features [..., D].

        Args:
            features: [..., D].
            vocabulary: the kept rows of the target's LM head.
            decoding: see `DraftVocabulary.logits`.
        """
        return vocabulary.logits(features, decoding=decoding)

    def logit_parameters(self) -> list[nn.Parameter]:
        """The parameters that `logits` trains."""
        return []

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the next features with ordinary attention, as in decoding.

        Args:
            embeddings: [B, T, D], embeddings of tokens t+1.
            features: features of tokens t: the target's [B, T, W], or predicted ones [B, T, D].
            cache: earlier positions. It is written, but not advanced.
            positions: [B, T]. Default: continues after the cache.
            mask: bool [B, 1, T, keys], needed for several positions with a non-empty cache.

        Returns:
            Predicted features [B, T, D].
        """
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + embeddings.shape[1], device=embeddings.device)[None]
        u, residual = self.inputs(embeddings, self.read(features))
        cos, sin = self.rotary(positions)
        if self.joined is None or cache is None:
            return self.layer(u, residual, (cos, sin), cache, mask)
        rotary = rotary_of(cos.to(u.dtype), sin.to(u.dtype))
        group_size = self.layer.self_attn.num_heads // self.layer.self_attn.num_kv_heads
        return self.joined(u, rotary, additive(mask, group_size, u.dtype), cache, 0, residual)

    def working_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which `x` enters the head: autocast casts by itself, without a copy in fp32."""
        return x.dtype if torch.is_autocast_enabled(x.device.type) else self.dtype

    def join_layer(self) -> None:
        """Use `LlamaLayer` for decoding. The head must be frozen and stay in its dtype and on its device."""
        attention, mlp, norm = self.layer.self_attn, self.layer.mlp, self.layer.post_attention_layernorm
        if attention.q_proj.bias is not None:
            return  # a joined layer has no biases: decode with the layer as it is
        heads = {"num_heads": attention.num_heads, "num_kv_heads": attention.num_kv_heads}
        self.joined = LlamaLayer(attention, mlp, None, norm, **heads)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for `batch_size` sequences of up to `capacity` positions."""
        weight, attention = self.layer.self_attn.q_proj.weight, self.layer.self_attn
        num_heads, head_dim = attention.num_kv_heads, attention.head_dim
        return KVCache(1, batch_size, num_heads, capacity, head_dim, weight.dtype, weight.device)
