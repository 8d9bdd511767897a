"""`hass-import`: convert a published EAGLE-1/2 or HASS head for hass-benchmark, hass-train and hass-export.

    hass-import path=HArmonizedSS/HASS-LLaMA3-Instruct-8B
    hass-import path=FOLDER output_dir=heads/mine

The module is not named `import` because that is a keyword.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hass_lightning import draft
from hass_lightning.commands.command import command
from hass_lightning.runs.names import safe_name


@command("import")
def main(config: DictConfig) -> dict[str, Any]:
    """Read, check and write the head, and print its folder."""
    name = safe_name(Path(config.path).expanduser().resolve().name)
    output_dir = Path(config.output_dir or Path(config.paths.runs_dir) / "imported" / name)
    saved = draft.import_head(config.path, output_dir, config.revision, config.feature_layers)
    return {
        "draft": str(output_dir),
        "num_parameters": sum(parameter.numel() for parameter in saved.draft.parameters()),
        "fc_bias": saved.draft.fc_bias is not None,
        "dtype": saved.notes["dtype"],
        "hidden_size": saved.draft.config.hidden_size,
        "vocab_size": saved.draft.config.vocab_size,
    }


if __name__ == "__main__":
    main()
