"""Export of draft heads in the layouts of serving engines, with checks. For imports, see draft/import_official.py."""

from hass_lightning.serving.card import RunFacts
from hass_lightning.serving.engines import PROFILES, Profile
from hass_lightning.serving.export import export_head

__all__ = ["PROFILES", "Profile", "RunFacts", "export_head"]
