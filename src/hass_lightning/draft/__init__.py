"""The draft head, its aligned training passes and its files."""

from hass_lightning.draft.alignment import Alignment, unroll
from hass_lightning.draft.checkpoint import SavedDraft, load_draft, save_draft
from hass_lightning.draft.eagle import EagleDraft, draft_config
from hass_lightning.draft.official import import_head

__all__ = ["Alignment", "EagleDraft", "SavedDraft", "draft_config", "import_head", "load_draft", "save_draft", "unroll"]
