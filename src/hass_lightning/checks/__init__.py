"""The checks of `hass-doctor`: small functions that return findings with fixes."""

from hass_lightning.checks.finding import Finding

__all__ = ["Finding"]
