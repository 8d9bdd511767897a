"""hass_lightning: learn speculative-decoding draft heads with HASS and measure them by decoding."""

__version__ = "0.1.0"
