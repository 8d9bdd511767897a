"""The heads that a benchmark measures: find them in run and sweep folders, load them, and prepare them for decoding."""

from __future__ import annotations

from pathlib import Path

from hass_lightning.decoding import DecodingModels
from hass_lightning.draft import SavedDraft, load_draft
from hass_lightning.runs.ledger import Ledger
from hass_lightning.target_model import TargetModel


def heads_of(path: str) -> list[str]:
    """Return the run folders of the finished runs of a sweep folder, or the folder itself if it is not one of a sweep.

    Raises:
        ValueError: if no run of a sweep folder has a head.
    """
    ledger = Ledger(path)
    if not ledger.path.is_file():
        return [path]
    cells = [ledger.folder_of(entry) for entry in ledger.latest().values() if entry.status == "completed"]
    found = [str(cell) for cell in cells if (cell / "draft").is_dir()]
    if not found:
        raise ValueError(f"drafts contains the sweep {path}, but none of its {len(cells)} finished runs has a head.")
    return found


def load_drafts(paths: list[str]) -> dict[str, SavedDraft]:
    """Load heads by label, which is the name of the run folder, preceded by its parent's if names are equal."""
    saved: dict[str, SavedDraft] = {}
    for path in paths:
        label = Path(path).resolve().name
        if label in saved:
            label = f"{Path(path).resolve().parent.name}/{label}"
        if label in saved:
            raise ValueError(f"drafts contains {path} twice.")
        saved[label] = load_draft(path)
    return saved


def decoding_models(
    saved: dict[str, SavedDraft], target: TargetModel, small: TargetModel | None = None
) -> dict[str, DecodingModels]:
    """Return the models for the decoders by label; without heads, a single entry that has none."""
    if not saved:
        return {"": DecodingModels(target, small=small)}
    return {label: DecodingModels.of(target, draft, small) for label, draft in saved.items()}
