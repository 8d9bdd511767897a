"""`hass-export`: write a head in the layout of a serving engine, and check it (docs/serving.md).

    hass-export draft=runs/quickstart format=vllm output_dir=served/vllm
    hass-export draft=runs/quickstart format=hub output_dir=card upload=owner/name      # uploads only with `upload`

If a check fails, no files are kept, and the error names the tensor or the key.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hass_lightning.commands.command import command
from hass_lightning.draft import load_draft
from hass_lightning.serving import RunFacts, export_head
from hass_lightning.serving.engines import find_profile
from hass_lightning.serving.export import upload
from hass_lightning.serving.kinds import layout_of
from hass_lightning.target_model.model import TargetModel

log = logging.getLogger(__name__)
SETTINGS = ("model", "data", "trainer", "seed")  # parts of the config shown in the model card


@command("export")
def main(config: DictConfig) -> dict[str, Any]:
    """Write and check the export; the manifest is in its folder."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    profile = find_profile(config.format)  # raises an error for an unknown format before the target is loaded
    output_dir, saved = Path(config.output_dir), load_draft(config.draft)
    target: TargetModel = instantiate(config.target)
    saved.check_fit(str(config.draft), target)
    profile = find_profile(config.format, layout_of(saved.draft).profiles)
    path = config.target.path
    manifest = export_head(
        saved,
        target,
        profile.name,
        output_dir,
        dtype=config.dtype,
        facts=run_facts(Path(config.draft)),
        base_model=path if isinstance(path, str) else target.name,
    )
    result = {
        "output_dir": str(output_dir),
        "format": profile.name,
        "files": sorted(manifest["files"]),
        **manifest["gate"],
    }
    if config.upload:
        result["url"] = upload(output_dir, config.upload, config.private)
    log.info("serve with: %s", profile.command(output_dir, target.folder, saved.token_ids is not None))
    return result


def run_facts(draft: Path) -> RunFacts:
    """Return what the run folder of a head records; empty without a run folder."""
    run_dir = draft if (draft / "draft").is_dir() else draft.parent
    composed, settings = run_dir / ".hydra" / "config.yaml", ""
    if composed.exists():
        node = OmegaConf.load(composed)
        assert isinstance(node, DictConfig)
        settings = OmegaConf.to_yaml(OmegaConf.masked_copy(node, [name for name in SETTINGS if name in node]))
    return RunFacts.read(run_dir, settings)


if __name__ == "__main__":
    main()
