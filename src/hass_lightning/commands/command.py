"""The launcher of all commands: composes the config, shows the screen, runs the command and prints its result."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from hass_lightning.commands.ending import show_ending
from hass_lightning.commands.errors import fail, refuse_missing, write_result
from hass_lightning.commands.free_text import quoted, quoted_path
from hass_lightning.commands.help import answer, print_any_text
from hass_lightning.commands.mistakes import explain
from hass_lightning.runs.config import config_folder
from hass_lightning.runs.from_config import follow_run
from hass_lightning.runs.quiet import Log, redirected, restored_state
from hass_lightning.runs.ranks import is_first_process
from hass_lightning.runs.redaction import RedactingFilter
from hass_lightning.runs.screen import Screen, print_error
from hass_lightning.runs.shown_lines import ShownLines
from hass_lightning.runs.signals import preemptible

log = logging.getLogger(__name__)
STAGES = {
    "train": ("target", "answers", "features", "training", "measuring", "report"),
    "prepare": ("target", "answers", "features"),
    "benchmark": ("target", "measuring", "report"),
}
ASKS_HYDRA = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc"}
INTERACTIVE = ("generate",)  # commands with their own display: output is not redirected
Task = Callable[[DictConfig], dict[str, Any]]


@dataclass
class Options:
    """Options of the output. They are not part of the config, so they do not change the run folder."""

    json: bool = False
    verbose: bool = False


def take_options(words: list[str], command: str = "") -> tuple[Options, list[str]]:
    """Split the arguments into options of the output and arguments for Hydra.

    Interactive commands have a config key `output`, which also remains an argument for Hydra.

    Raises:
        ValueError: if the value of an option is invalid.
    """
    options, left = Options(), []
    for word in words:
        key, _, value = word.partition("=")
        if word == "--json":
            options.json = True
        elif key == "output":
            if value not in ("json", "auto") and command not in INTERACTIVE:
                raise ValueError(f"output={value} must be json, or auto (a table on a terminal, else log lines).")
            options.json = value == "json"
            if command in INTERACTIVE:
                left.append(word)
        elif key == "verbose":
            if value.lower() not in ("true", "false"):
                raise ValueError(f"verbose={value} must be true or false.")
            options.verbose = value.lower() == "true"
        else:
            left.append(word)
    return options, left


def launch(command: str, task: Task) -> None:
    """Run `task` with the config that the command line composes.

    Args:
        command: name of its config in conf/.
        task: the function that runs the command.
    """
    print_any_text()
    if (text := answer(command, sys.argv[1:])) is not None:
        print(text)
        return
    stderr = sys.stderr
    try:
        options, words = take_options(sys.argv[1:], command)
    except ValueError as error:
        print_error(str(error), stderr)
        raise SystemExit(1) from error
    if command in INTERACTIVE:
        words = [quoted(word) for word in words]
    words = [quoted_path(word) for word in words]
    with restored_state():
        sys.argv[1:] = words
        try:
            if ASKS_HYDRA & set(words):
                compose(command, task)
                return
            with opened(command, options):
                compose_and_end(command, in_frame(command, options, task))
        except HydraException as error:
            print_error(explain(command, words, error), stderr)
            raise SystemExit(1) from error
        except Exception as error:  # raised by a sweeper or launcher
            fail(error, stderr)


def compose(command: str, task: Callable[[DictConfig], Any]) -> None:
    """Run Hydra's main, which raises errors instead of printing them."""
    wanted = os.environ.pop("HYDRA_FULL_ERROR", None)
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @functools.wraps(task)
    def run(config: DictConfig) -> Any:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if wanted is not None:
            os.environ["HYDRA_FULL_ERROR"] = wanted
        return task(config)

    hydra.main(version_base="1.3", config_path=config_folder(), config_name=command)(run)()


def compose_and_end(command: str, task: Callable[[DictConfig], Any]) -> None:
    """As `compose`, but print the table of a sweep that the sweeper ends with an error because cells failed."""
    try:
        compose(command, task)
    except HydraException as error:
        if (folder := getattr(error, "sweep_dir", None)) is None:
            raise
        from hydra_plugins.hass_lightning_launcher._ending import end_sweep

        end_sweep(folder)
        raise SystemExit(1) from error


@dataclass
class Frame:
    """Log file and screen of the command in this process."""

    log_file: Log
    screen: Screen


_frame: Frame | None = None


@contextlib.contextmanager
def opened(command: str, options: Options) -> Iterator[Frame]:
    """Show the screen of a command while the block runs, and redirect the output of libraries to its log file."""
    global _frame  # noqa: PLW0603
    stdout, stderr = sys.stdout, sys.stderr
    interactive = command in INTERACTIVE
    a_list = not interactive and not options.verbose and os.environ.get("TERM") != "dumb"
    drawn = a_list and stderr.isatty() and is_first_process()
    lines = stderr if options.json else stdout
    table = stdout.isatty() and not options.json
    stages = () if {"-m", "--multirun"} & set(sys.argv) else STAGES.get(command, ())
    screen = Screen(stages, stderr if drawn else None, stdout, stderr, lines, table)
    log_file = Log(also=stderr if options.verbose else None)
    beside_a_list = stderr.isatty() and not is_first_process()  # the first process draws it
    warnings_alone = drawn or beside_a_list or interactive
    shown_lines = ShownLines(screen, logging.WARNING if warnings_alone else logging.INFO)
    before, _frame = _frame, Frame(log_file, screen)
    try:
        quiet = contextlib.nullcontext() if interactive else redirected(log_file)
        with screen.shown(), shown_lines.attached(), quiet:
            yield _frame
    finally:
        _frame = before
        log_file.release()


def in_frame(command: str, options: Options, task: Task) -> Callable[[DictConfig], float | None]:
    """Return a function that runs the task, prints its result and returns the metric that a sweep optimizes.

    Launchers such as Hydra's joblib launcher may call it in another process, which then opens its own frame.
    """

    @functools.wraps(task)
    def run(config: DictConfig) -> float | None:
        with contextlib.ExitStack() as stack:
            frame = _frame or stack.enter_context(opened(command, options))
            return run_in(frame, command, task, config)

    return run


def run_in(frame: Frame, command: str, task: Task, config: DictConfig) -> float | None:
    """Call the task and print its result: as a table on a terminal, otherwise as one line of JSON."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for handler in logging.getLogger().handlers:
        handler.addFilter(RedactingFilter())
    if (path := log_path()) is not None:
        frame.log_file.attach(path)
    try:
        with preemptible():
            refuse_missing(config)
            written: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
            result = task(follow_run(config, written))
    except Exception as error:
        frame.screen.stop()
        fail(error, frame.screen.stderr)
    metric: float | None = result.pop("_metric", None)
    exit_code = result.pop("_exit_code", 0)
    write_result(metric=metric, result={key: value for key, value in result.items() if key != "_silent"})
    frame.screen.stop()
    if not result.pop("_silent", False):
        if frame.screen.ends_with_table:
            show_ending(command, result, frame.screen.places, frame.screen.stdout)
        else:
            print(json.dumps(result, default=str), file=frame.screen.stdout, flush=True)
    if exit_code:
        raise SystemExit(exit_code)
    return metric


def log_path() -> Path | None:
    """Return the log file in the run folder (rank 1: `log.rank1.txt`); None for `hass-report`, which has no folder."""
    settings = HydraConfig.get()
    rank = os.environ.get("LOCAL_RANK") or "0"
    if settings.output_subdir is None and rank == "0":  # Lightning also sets it to null for other ranks
        return None
    return Path(settings.runtime.output_dir) / ("log.txt" if rank == "0" else f"log.rank{rank}.txt")


def command(config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Decorator that turns `function(config) -> result` into a command.

    A ValueError is a user error: its message is printed, and the exit code is 1. For other exceptions the traceback is
    printed (with HASS_LIGHTNING_TRACE=1, also for ValueError). Keys of the result that are not printed: `_metric` is
    the metric that a sweep optimizes, `_silent` prints nothing, `_exit_code` sets the exit code of the process.
    """

    def decorate(function: Task) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            launch(config_name, function)

        main.task = function  # type: ignore[attr-defined]
        return main

    return decorate
