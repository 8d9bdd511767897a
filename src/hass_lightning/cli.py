"""What all commands share: where the configs are, how errors look, the JSON line at the end."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hass_lightning.files import write_whole
from hass_lightning.ledger import REQUEUE_EXIT_CODE, RESULT_FILE_VARIABLE
from hass_lightning.names import safe_name
from hass_lightning.redaction import RedactingFilter, redact

log = logging.getLogger(__name__)


def config_folder() -> str:
    """`conf/` inside the installed package (a wheel), else at the root of the checkout (an editable install)."""
    packaged = Path(__file__).parent / "conf"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the configs are missing: neither {packaged} nor {folder} exists; reinstall the package"
        )
    return str(folder)


def split_overrides(overrides: str) -> list[str]:
    """The parts of an override_dirname: at its commas, but not at those inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in overrides:
        if character in "\"'" and quote in ("", character):
            quote = "" if quote else character
        depth += 0 if quote else (character in "[{(") - (character in "]})")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def run_name(overrides: str) -> str:
    """A run folder's name from its overrides, the same for the same command: `<experiment>-<hash>`."""
    parts = split_overrides(overrides)
    chosen = dict(part.lstrip("+").split("=", 1) for part in parts if "=" in part)
    stem = safe_name(Path(chosen.get("name") or chosen.get("experiment") or "quickstart").name)
    rest = ",".join(sorted(part for part in parts if not part.startswith(("name=", "fresh=", "plan=", "estimate."))))
    if rest in ("", f"experiment={stem}"):
        return stem
    return f"{stem}-{hashlib.sha256(rest.encode()).hexdigest()[:8]}"


NO_LABEL = (
    "experiment",
    "name",
    "study",
    "budget",
    "hparams_search",
    "fresh",
    "logger",
    "paths",
    "trainer",
    "callbacks",
)


def run_label(name: str, overrides: str) -> str:
    """A readable name: `smoke loss=hass depth=3 seed=0` from its overrides, their keys cut to the last part."""
    words = []
    for part in split_overrides(overrides):
        key, _, value = part.partition("=")
        if key.split(".")[0] not in NO_LABEL:
            words.append(f"{re.split('[./@]', key)[-1]}={value}" if value else key)
    return " ".join([name, *words])[:120]


def by_machine(fast: Any, slow: Any) -> Any:
    """`fast` on a machine that multiplies bf16 fast (a GPU, AMX, AVX-512 BF16), else `slow`: for sizes alone."""
    import torch

    from hass_lightning.target.model import working_dtype

    dtype = working_dtype("cuda" if torch.cuda.is_available() else "cpu")
    return slow if dtype == torch.float32 else fast


OmegaConf.register_new_resolver("hass.run_name", run_name, replace=True)
OmegaConf.register_new_resolver("hass.run_label", run_label, replace=True)
OmegaConf.register_new_resolver("hass.by_machine", by_machine, replace=True)


def is_first_process() -> bool:
    """Whether this is the first process of a run, before any process group exists: by Lightning, torchrun or srun."""
    return not any(int(os.environ.get(rank) or 0) for rank in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def write_result(**values: Any) -> None:
    """Hand a result to the sweep launcher that started this process, if one did.

    The first rank alone does, but for an error: the first one counts, since what the others die of follows from it.
    """
    path = os.environ.get(RESULT_FILE_VARIABLE)
    if not path or (Path(path).exists() if "error" in values else not is_first_process()):
        return
    write_whole(path, json.dumps(values, default=str))


def user_error(error: BaseException) -> str | None:
    """The sentence for an error that the user can cure, None for one of ours."""
    place, built = "", isinstance(error, InstantiationException)
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = str(error).rpartition("full_key: ")[2].strip() if "full_key: " in str(error) else ""
        place, error = place or key, error.__cause__
    if isinstance(error, ValueError | OSError):
        return str(error)
    if isinstance(error, OmegaConfBaseException):
        return f"{str(error).splitlines()[0]} ({error.full_key})"
    if built:
        return " ".join(str(error).split()) + (f" (config key {place})" if place else "")
    return None


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """SIGTERM ends a command with the exit code that asks to be started again: every stage goes on where it stopped.

    While training, LastCheckpoint takes the signal over and saves first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(REQUEUE_EXIT_CODE))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def command(config_name: str) -> Callable[[Callable[[DictConfig], dict[str, Any]]], Callable[[], None]]:
    """Turn `function(config) -> result` into a command: Hydra in front, one line of JSON behind.

    A ValueError is the user's: it is printed as one sentence, and the exit code is 1. Everything else keeps its trace
    (HASS_LIGHTNING_TRACE=1: that, too). Keys of the result that are not printed: `_metric` is what a sweep optimises,
    `_silent` prints nothing, `_exit_code` ends the process with it.
    """

    def decorate(function: Callable[[DictConfig], dict[str, Any]]) -> Callable[[], None]:
        @functools.wraps(function)
        def run(config: DictConfig) -> float | None:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            for handler in logging.getLogger().handlers:
                handler.addFilter(RedactingFilter())
            try:
                with preemptible():
                    result = function(config)
            except Exception as error:
                sentence = user_error(error)
                sentence = None if sentence is None else redact(sentence)
                write_result(error=sentence or redact(repr(error)))
                if sentence is None or os.environ.get("HASS_LIGHTNING_TRACE"):
                    raise
                log.debug("trace", exc_info=True)
                print(f"error: {sentence}", file=sys.stderr, flush=True)
                raise SystemExit(1) from error
            metric, exit_code = result.pop("_metric", None), result.pop("_exit_code", 0)
            write_result(metric=metric, result={key: value for key, value in result.items() if key != "_silent"})
            if not result.pop("_silent", False):
                print(json.dumps(result, default=str), flush=True)
            if exit_code:
                raise SystemExit(exit_code)
            return metric

        return hydra.main(version_base="1.3", config_path=config_folder(), config_name=config_name)(run)

    return decorate
