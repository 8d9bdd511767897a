"""Errors of commands: messages for errors that the user can fix, and the exit of a failed command."""

from __future__ import annotations

import json
import logging
import os
import traceback
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from hass_lightning.commands.conf_text import comment_of
from hass_lightning.runs.files import write_whole
from hass_lightning.runs.ledger import RESULT_FILE_VARIABLE
from hass_lightning.runs.ranks import is_first_process
from hass_lightning.runs.redaction import redact
from hass_lightning.runs.screen import print_error

log = logging.getLogger(__name__)


def write_result(**values: Any) -> None:
    """Write the result file of the sweep launcher, if it started this process.

    Only the first rank writes results. Errors are written by any rank, and the first one is kept because the errors of
    other ranks follow from it.
    """
    path = os.environ.get(RESULT_FILE_VARIABLE)
    if not path or (Path(path).exists() if "error" in values else not is_first_process()):
        return
    write_whole(path, json.dumps(values, default=str))


def user_error(error: BaseException) -> str | None:
    """Return the message of an error that the user can fix; None for an internal error."""
    place, built = "", isinstance(error, InstantiationException)
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = str(error).rpartition("full_key: ")[2].strip() if "full_key: " in str(error) else ""
        place, error = place or key, error.__cause__
    if isinstance(error, ValueError | OSError):
        return str(error)
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return missing(error.full_key)
    if isinstance(error, OmegaConfBaseException):
        return f"{str(error).splitlines()[0]} ({error.full_key})"
    if built:
        return " ".join(str(error).split()) + (f" (config key {place})" if place else "")
    return None


def missing(*keys: str) -> str:
    """Return the error message for mandatory keys without a value, with their comments in conf/."""
    meanings = keys
    if HydraConfig.initialized():
        app = HydraConfig.get()
        chosen = tuple((str(group), str(value)) for group, value in app.runtime.choices.items() if value)
        comments = [comment_of(str(app.job.config_name), key, chosen) for key in keys]
        meanings = tuple(f"{key} ({text})" if text else key for key, text in zip(keys, comments, strict=True))
    example = " ".join(f"{key}=…" for key in keys)
    return f"{'; '.join(meanings)}: no value is set and there is no default. Add {example} to the command."


def refuse_missing(config: DictConfig) -> None:
    """Check that mandatory keys have values, before anything is loaded.

    Raises:
        ValueError: naming each missing key and its description.
    """
    if keys := [str(key) for key in config if OmegaConf.is_missing(config, str(key))]:
        raise ValueError(missing(*keys))


def fail(error: Exception, stderr: TextIO) -> NoReturn:
    """Print the message of a user error, or the traceback of another error, and exit with code 1.

    Raises:
        SystemExit: always.
    """
    sentence = user_error(error)
    sentence = None if sentence is None else redact(sentence)
    write_result(error=sentence or redact(repr(error)))
    log.debug("trace", exc_info=error)
    if sentence is None or os.environ.get("HASS_LIGHTNING_TRACE"):
        print(redact("".join(traceback.format_exception(error))), file=stderr, flush=True)
    if sentence is not None:
        print_error(sentence, stderr)
    raise SystemExit(1) from error
