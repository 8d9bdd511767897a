"""hass_lightning: train speculative-decoding draft heads with HASS and measure them by decoding.

The names below are imported on first use: `import hass_lightning` loads neither torch nor Lightning.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from hass_lightning.runs.old_names import OldNames

if TYPE_CHECKING:
    from hass_lightning.data.datamodule import FeatureDataModule
    from hass_lightning.decoding import DecodingModels, DynamicTree
    from hass_lightning.draft import Alignment, EagleDraft, load_draft
    from hass_lightning.generation import load, speculative
    from hass_lightning.losses import DraftLoss
    from hass_lightning.measure import run_benchmark
    from hass_lightning.target_model import TargetModel
    from hass_lightning.training.module import HassModule

# Set before torch is imported, because its OpenMP reads these variables once. If threads spin for milliseconds while
# another process is busy, both are 5 times slower. If they sleep immediately, they are woken hundreds of times per
# token. Therefore they spin for some microseconds.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

__version__ = "0.1.0"
# in the order of the data flow
_PLACES = {
    "TargetModel": "target_model",
    "FeatureDataModule": "data.datamodule",
    "EagleDraft": "draft",
    "Alignment": "draft",
    "load_draft": "draft",
    "DraftLoss": "losses",
    "HassModule": "training.module",
    "DecodingModels": "decoding",
    "DynamicTree": "decoding",
    "run_benchmark": "measure",
    "load": "generation",
    "speculative": "generation",
}
__all__ = [
    "Alignment", "DecodingModels", "DraftLoss", "DynamicTree", "EagleDraft", "FeatureDataModule", "HassModule",
    "TargetModel", "load", "load_draft", "run_benchmark", "speculative",
]  # fmt: skip

if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
    # first, because the other finders would also find the files of target_model under an old name
    sys.meta_path.insert(0, OldNames())


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
