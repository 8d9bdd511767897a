"""Decoders: lossless generation with and without a draft head, on a shared decoding loop in plain PyTorch."""

from hass_lightning.decoding.decoders import Autoregressive, DraftModel, PromptLookup
from hass_lightning.decoding.head_decoders import Chain, DynamicTree, Hybrid, StaticTree
from hass_lightning.decoding.models import Decoder, DecodingModels

__all__ = [
    "Autoregressive",
    "Chain",
    "Decoder",
    "DecodingModels",
    "DraftModel",
    "DynamicTree",
    "Hybrid",
    "PromptLookup",
    "StaticTree",
]
