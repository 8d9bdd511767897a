"""The draft head, its aligned training pass and its checkpoints."""

from hass_lightning.draft.alignment import Alignment, unroll
from hass_lightning.draft.checkpoint import SavedDraft, load_draft, save_draft
from hass_lightning.draft.eagle import EagleDraft
from hass_lightning.draft.eagle3 import Eagle3Draft
from hass_lightning.draft.head import DraftHead, draft_config
from hass_lightning.draft.import_official import import_head

__all__ = [
    "Alignment",
    "DraftHead",
    "Eagle3Draft",
    "EagleDraft",
    "SavedDraft",
    "draft_config",
    "import_head",
    "load_draft",
    "save_draft",
    "unroll",
]
