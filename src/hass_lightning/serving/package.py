"""A head in an engine's layout: tensors, config, model card, manifest. The folder appears when the gate has passed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hass_lightning import __version__
from hass_lightning.draft import SavedDraft
from hass_lightning.draft.checkpoint import save_token_ids, tensor_hash
from hass_lightning.serving.card import RunFacts, model_card
from hass_lightning.serving.gate import check_export
from hass_lightning.serving.layout import config_for, tensors_for
from hass_lightning.serving.profiles import Profile, find_profile
from hass_lightning.target import TargetModel
from hass_lightning.target.model import resolve_dtype
from hass_lightning.target.source import sha256_file

log = logging.getLogger(__name__)


def export_head(
    saved: SavedDraft,
    target: TargetModel,
    format: str,
    output_dir: str | Path,
    dtype: str | None = None,
    facts: RunFacts = RunFacts(),  # noqa: B008 (frozen)
    base_model: str | None = None,
) -> dict[str, Any]:
    """Write the head to `output_dir` (which must not hold anything) and check it; a refused export leaves nothing.

    Args:
        format: a profile's name. dtype: of the file (None: that of the saved head). facts: for the card and manifest.
        base_model: the target's hub id, where it is not its folder.

    Returns:
        the manifest.

    Raises:
        ValueError: the engine cannot serve this head, or the gate refuses what was written; tensors and keys are named.
    """
    profile, output_dir = find_profile(format), Path(output_dir).expanduser()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output_dir={output_dir} holds something: give a new folder, or remove that one.")
    chosen = resolve_dtype(dtype or saved.notes.get("dtype") or saved.draft.fc.weight.dtype)
    warn(saved, target, profile)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=output_dir.parent, prefix=f".{output_dir.name}-"))
    try:
        write_files(scratch, saved, target, profile, chosen)
        measured = check_export(scratch, saved, target, profile, chosen, facts.start.get("tensors"))
        card = model_card(saved, target, base_model or str(target.folder), profile, facts, output_dir.name)
        (scratch / "README.md").write_text(card)
        manifest = make_manifest(scratch, saved, target, profile, facts, measured)
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2, default=str) + "\n")
        scratch.chmod(0o755)  # mkdtemp makes a private folder, safetensors a private file; an engine is another user
        (scratch / "model.safetensors").chmod(0o644)
        os.replace(scratch, output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def warn(saved: SavedDraft, target: TargetModel, profile: Profile) -> None:
    """What is no error, but will surprise."""
    if saved.token_ids is not None and profile.token_map is None and not profile.notes:
        log.warning(
            "%s has no place for a draft vocabulary of %d tokens: it drafts from the full LM head, with the same "
            "weights (no acceptance is lost, the draft pass is slower)",
            profile.name,
            len(saved.token_ids),
        )
    own, wanted = saved.draft.config.rope_parameters, target.config.rope_parameters
    if own != wanted:
        log.warning("the head's rope %s is not the target's %s: exported as it was trained", own, wanted)


def write_files(folder: Path, saved: SavedDraft, target: TargetModel, profile: Profile, dtype: torch.dtype) -> None:
    """model.safetensors, config.json and, where there is a pruned vocabulary and a place for it, its token map."""
    tensors = tensors_for(saved, target.head, profile, dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_for(saved, target.config, profile, dtype, saved.draft.fc.bias is not None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    if saved.token_ids is not None and profile.notes:
        save_token_ids(folder, saved.token_ids)
    if saved.token_ids is not None and profile.token_map:
        # a pickled list of integers, the one file that is no safetensors: SGLang's load_token_map reads nothing else
        torch.save(saved.token_ids.tolist(), folder / profile.token_map)


def make_manifest(
    folder: Path,
    saved: SavedDraft,
    target: TargetModel,
    profile: Profile,
    facts: RunFacts,
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Where the files come from and their hashes."""
    state = saved.draft.state_dict()
    return {
        "format": profile.name,
        "checked_with": profile.checked_with,
        "hass_lightning": __version__,
        "target": {"name": target.name, "fingerprint": target.fingerprint},
        "head": saved.notes,
        "trained_by": {name: facts.provenance.get(name) for name in ("git_commit", "git_dirty", "config_hash", "seed")},
        "features": facts.start.get("features"),
        "gate": measured | {"compared_with_initial_values": bool(facts.start.get("tensors"))},
        "tensors": {name: tensor_hash(value) for name, value in state.items()},
        "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
    }


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload a checked export to the hub (its token comes from HF_TOKEN or the hub's own login); the page's address.

    Raises:
        ValueError: the hub refused or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload a draft head")
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"the upload to {repository} failed ({type(error).__name__}): set HF_TOKEN to a write token, or upload "
            f"{folder} by hand (hf upload {repository} {folder})."
        ) from error
    return f"https://huggingface.co/{repository}"
