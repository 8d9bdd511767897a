"""The frozen target LLM: where it comes from, what it computes, what the draft head borrows from it."""

from hass_lightning.target.cache import KVCache
from hass_lightning.target.head import DraftVocabulary, TargetHead
from hass_lightning.target.model import TargetModel

__all__ = ["DraftVocabulary", "KVCache", "TargetHead", "TargetModel"]
