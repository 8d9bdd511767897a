"""Decoders: lossless generation with and without a draft head, on one engine. Plain PyTorch, no Trainer."""

from hass_lightning.decoding.decoders import Autoregressive, Chain, DraftModel, DynamicTree, PromptLookup, StaticTree
from hass_lightning.decoding.models import Decoder, DecodingModels

__all__ = [
    "Autoregressive",
    "Chain",
    "Decoder",
    "DecodingModels",
    "DraftModel",
    "DynamicTree",
    "PromptLookup",
    "StaticTree",
]
