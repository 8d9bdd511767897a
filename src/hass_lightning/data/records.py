"""The records of a JSON lines file or a JSON array, gzip or not, with the place of each.

The content decides, not the name: arrays called .jsonl, JSON lines called .json and gzip files without .gz are read.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
OTHER_FORMATS = {
    b"PAR1": "a Parquet file: read it with data=sharegpt data.source.path={path}",
    b"ARROW1": "an Arrow file: read the folder of its data set with data=sharegpt data.source.path=FOLDER",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it (zstd -d)",
    b"BZh": "compressed with bzip2: unpack it (bunzip2)",
    b"\xfd7zXZ": "compressed with xz: unpack it (unxz)",
    b"SQLite": "an SQLite database: export its rows as JSON lines",
    b"\xff\xfe": "UTF-16 text, not UTF-8 (line 1): convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text, not UTF-8 (line 1): convert it with iconv -f UTF-16 -t UTF-8",
}


def read_json_lines(path: str | Path) -> Iterator[Any]:
    """The records of a file, without their places; see `read_records`."""
    return (record for _, record in read_records(path))


def read_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file: `line 7` of JSON lines, `item 7` of an array. A line that is not JSON gives None.

    Raises:
        ValueError: the file does not exist, is not UTF-8 (naming the line), or is in another format.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(
            f"data.source.path={path} is a folder, but data=jsonl reads one file: name a file in it, or read a data "
            "set folder with data=sharegpt."
        )
    if not path.is_file():
        raise ValueError(f"the data file {path} does not exist: set data.source.path (or benchmark.path) to a file.")
    try:
        with _open(path) as file:
            yield from _records(_lines(path, file), path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"the data file {path} cannot be read ({error}): it may be cut off or damaged. Copy it again."
        ) from error


def _open(path: Path) -> IO[bytes]:
    opened = path.open("rb")
    file: Any = gzip.GzipFile(fileobj=opened) if opened.peek(2).startswith(GZIP) else opened
    head = file.peek(8)
    for mark, what in OTHER_FORMATS.items():
        if head.startswith(mark):
            opened.close()
            raise ValueError(f"the data file {path} is {what.format(path=path)}.")
    return file  # type: ignore[no-any-return]


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank."""
    for number, raw in enumerate(file, start=1):
        line = raw.removeprefix(BOM)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the data file {path} is not UTF-8: line {number} has the byte {line[error.start]:#04x} at column "
                f"{error.start + 1}. Convert it, for example with iconv -f ISO-8859-1 -t UTF-8."
            ) from error
        if text.strip():
            yield number, text


def _records(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[tuple[str, Any]]:
    first = next(lines, None)
    if first is None:
        return
    value, begins = _parse(first[1]), first[1].lstrip()[0]
    if begins == "[" or (begins == "{" and value is None):  # a JSON document of one line or several
        rest = list(lines)
        text = "".join(line for _, line in [first, *rest])
        whole = _parse(text)
        if isinstance(whole, list):
            yield from ((f"item {number}", item) for number, item in enumerate(whole, start=1))
            return
        if isinstance(whole, dict):
            yield f"line {first[0]}", whole
            return
        if value is None and begins == "[":
            raise ValueError(f"the data file {path} begins as a JSON array and is not one: {_problem(text)}.")
        lines = iter(rest)
    for number, line in chain([first], lines):
        yield f"line {number}", _parse(line)


def _parse(text: str) -> Any:
    """The JSON value of a text; None if it is not JSON (numbers with thousands of digits and endless nesting too)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _problem(text: str) -> str:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f"{error.msg} at line {error.lineno}, column {error.colno}; it may be cut off"
    except (ValueError, RecursionError) as error:
        return str(error)
    return "it holds another value"
