"""Export of a head: tensors, config, model card and manifest. The folder appears only after the export checks pass."""

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
from hass_lightning.draft import SavedDraft, draft_config
from hass_lightning.draft.checkpoint import save_token_ids, tensor_hash
from hass_lightning.serving.card import RunFacts, model_card
from hass_lightning.serving.engines import Profile, find_profile
from hass_lightning.serving.export_checks import check_export
from hass_lightning.serving.kinds import layout_of
from hass_lightning.serving.layout import config_for
from hass_lightning.target_model import TargetModel
from hass_lightning.target_model.read import resolve_dtype
from hass_lightning.target_model.source import sha256_file

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
    """Write a head to `output_dir` and check it; a failed export leaves no files.

    Args:
        saved: the head.
        target: the target it was trained for.
        format: name of a profile.
        output_dir: a new or empty folder.
        dtype: dtype of the file (None: that of the saved head).
        facts: run information for the model card and manifest.
        base_model: the target's hub id (None: its folder).

    Returns:
        The manifest.

    Raises:
        ValueError: if `output_dir` is not empty, the engine cannot serve this head, or an export check fails; the
            tensors and keys concerned are named.
    """
    layout = layout_of(saved.draft)
    profile, output_dir = find_profile(format, layout.profiles), Path(output_dir).expanduser()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output_dir={output_dir} is not empty: use a new folder, or remove that one.")
    chosen = resolve_dtype(dtype or saved.notes.get("dtype") or saved.draft.dtype)
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
        scratch.chmod(0o755)  # mkdtemp and safetensors create private files, but an engine may run as another user
        (scratch / "model.safetensors").chmod(0o644)
        os.replace(scratch, output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def warn(saved: SavedDraft, target: TargetModel, profile: Profile) -> None:
    """Log properties that are not errors, but may be unexpected."""
    borrowed = layout_of(saved.draft).token_ids(saved) is None
    if saved.token_ids is not None and borrowed and profile.token_map is None and not profile.notes:
        log.warning(
            "%s has no place for a draft vocabulary of %d tokens: it drafts from the full LM head with the same "
            "weights (same acceptance, slower draft pass)",
            profile.name,
            len(saved.token_ids),
        )
    own, wanted = saved.draft.config.rope_parameters, draft_config(target.config).rope_parameters
    if own != wanted:
        log.warning("the head's rope %s is not what a new head for the target has (%s): exported as it was trained",
                    own, wanted)  # fmt: skip


def write_files(folder: Path, saved: SavedDraft, target: TargetModel, profile: Profile, dtype: torch.dtype) -> None:
    """Write model.safetensors, config.json and, for a pruned vocabulary, its token map if the layout has one."""
    layout = layout_of(saved.draft)
    tensors = layout.tensors(saved, target.head, profile, dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_for(saved, target.config, profile, dtype, saved.draft.fc_bias is not None)
    config |= layout.more_config(saved)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    if saved.token_ids is not None and profile.notes:
        save_token_ids(folder, saved.token_ids)
    if saved.token_ids is not None and profile.token_map:
        # a pickled list of integers, because SGLang's load_token_map reads nothing else
        torch.save(saved.token_ids.tolist(), folder / profile.token_map)


def make_manifest(
    folder: Path,
    saved: SavedDraft,
    target: TargetModel,
    profile: Profile,
    facts: RunFacts,
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Return the manifest: provenance and hashes of the files."""
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
    """Upload a checked export to the hub and return the address of its page.

    The token comes from HF_TOKEN or `hf auth login`.

    Raises:
        ValueError: if the hub refuses the upload or cannot be reached.
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
