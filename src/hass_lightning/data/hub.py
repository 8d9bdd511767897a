"""The rows of a Hugging Face data set: from the hub, a local folder, a `save_to_disk` folder or a Parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hass_lightning.data.skipped import one_line

NOT_REACHED = (
    "is neither a local folder nor in the cache, and the Hugging Face hub cannot be reached: download it elsewhere and "
    "set data.source.path to the folder, or use data=jsonl with a file."
)


def load_rows(path: str, split: str, revision: str | None = None, config: str | None = None) -> Any:
    """The rows of one split (a `datasets.Dataset`).

    Args:
        path: a hub id (`owner/name`), a folder, or a Parquet file. revision, config: of the hub id.

    Raises:
        ValueError: `datasets` is not installed, or the data cannot be read; the message names the key to change.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data.source.path={path} is read by the `datasets` library: pip install 'hass-lightning[data]'."
        ) from error
    from hass_lightning.target_model.hub import hub_answers

    place = Path(path).expanduser()
    offline = not place.exists() and not hub_answers()
    if offline:
        datasets.config.HF_HUB_OFFLINE = True  # what an earlier run left in the cache, without minutes of retries
    try:
        if (place / "dataset_dict.json").is_file():
            return _one_split(datasets.load_from_disk(str(place)), path, split)
        if (place / "state.json").is_file():
            return datasets.load_from_disk(str(place))
        if place.is_file():
            return _file(datasets, place)
        return datasets.load_dataset(path, config, split=split, revision=revision)
    except Exception as error:  # the library raises types of its own, and those of pyarrow and pandas
        raise ValueError(_sentence(error, path, split, offline)) from error


def _one_split(saved: Any, path: str, split: str) -> Any:
    if split not in saved:
        raise ValueError(
            f"data.source.split={split} is not in {path}, which has {', '.join(saved)}: set data.source.split to one."
        )
    return saved[split]


def _file(datasets: Any, file: Path) -> Any:
    with file.open("rb") as opened:
        if opened.read(4) != b"PAR1":
            raise ValueError(f"data.source.path={file} is not a Parquet file: read JSON lines with data=jsonl.")
    return datasets.load_dataset("parquet", data_files=str(file), split="train")


def _sentence(error: Exception, path: str, split: str, offline: bool) -> str:
    """Return the error message, with the key to change."""
    text, kind = str(error), type(error).__name__
    if text.startswith("data.source."):
        return text
    if offline and isinstance(error, OSError):
        return f"the data set {path} {NOT_REACHED}"
    reason = one_line(text, 300)
    if any(words in text for words in ("nknown split", "Bad split", "Unrecognized instruction")):
        return f"data.source.split={split} is not in {path} ({reason}): set data.source.split to one of its splits."
    if "Config name is missing" in text or "BuilderConfig" in text:
        return f"data.source.path={path} has several configs ({reason}): name one with +data.source.config=NAME."
    if isinstance(error, OSError):
        return f"data.source.path={path} cannot be read ({reason}): set data.source.path to a data set, or data=jsonl."
    cause = one_line(error.__cause__ or error.__context__ or "", 200)
    reason = f"{kind}: {reason}{f'; {cause}' * bool(cause)}"
    return (
        f"data.source.path={path} cannot be read by the `datasets` library ({reason}): all files of a split must have "
        "the same columns and types. Keep one of them, or write the rows as JSON lines and use data=jsonl."
    )
