"""The frozen target LLM: loading, forward pass, cache, and the embedding and LM head that the draft head uses."""

from hass_lightning.target_model.cache import KVCache
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
from hass_lightning.target_model.lm_head import TargetHead
from hass_lightning.target_model.model import TargetModel

__all__ = ["DraftVocabulary", "KVCache", "TargetHead", "TargetModel"]
