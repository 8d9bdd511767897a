"""hass_lightning: learn speculative-decoding draft heads with HASS and measure them by decoding."""

import os

# before torch is imported (its OpenMP reads it once): threads that spin beside another busy process slow both 5 times
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
