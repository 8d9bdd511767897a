"""Location of the configs. Loads nothing, so that help needs no Hydra."""

from __future__ import annotations

from pathlib import Path


def config_folder() -> str:
    """Return the folder of the configs: `conf/` in the installed package, or in the checkout of an editable install."""
    packaged = Path(__file__).parents[1] / "conf"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[3] / "conf"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the configs are missing: neither {packaged} nor {folder} exists; reinstall the package"
        )
    return str(folder)
