"""What `hass-doctor` looks at before the GPU hours: small functions that return findings with cures."""

from hass_lightning.checks.finding import Finding

__all__ = ["Finding"]
