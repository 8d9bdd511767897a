"""hass_lightning: learn speculative-decoding draft heads with HASS and measure them by decoding."""

import os

# Before torch is imported (its OpenMP reads them once). Threads that spin for milliseconds beside another busy process
# slow both 5 times; threads that sleep at once are woken hundreds of times a token: they spin for some microseconds.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

__version__ = "0.1.0"
