"""Heads out: engines' layouts, written and checked before they are left behind. (Heads in: draft/official.py.)"""

from hass_lightning.serving.card import RunFacts
from hass_lightning.serving.package import export_head
from hass_lightning.serving.profiles import PROFILES, Profile

__all__ = ["PROFILES", "Profile", "RunFacts", "export_head"]
