"""`hass-generate`: a chat with a target and its draft head, which shows what each forward of the target brought.

hass-generate                                            # SmolLM2 with the head of this package
hass-generate draft=runs/quickstart prompt='Why is the sky blue?'      # one answer
hass-generate draft=runs/quickstart compare=true         # next to autoregressive decoding
hass-generate decoding=chain temperature=0.7 record=chat.svg
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.status import Status

from hass_lightning.commands.command import command
from hass_lightning.runs.quiet import Log, redirected


@contextlib.contextmanager
def loading(console: Console, name: str) -> Iterator[None]:
    """Show what is loaded (imports, a download the first time), and hide the output of libraries."""
    hidden = Log()
    gc.disable()  # garbage collection is a sixth of the CPU time of the imports
    try:
        with console.status(f"loading {name}") as status, redirected(hidden), followed(status):
            yield
    finally:
        gc.enable()
    hidden.release()


@contextlib.contextmanager
def followed(status: Status) -> Iterator[None]:
    """Show the messages of `target_model.source`, for example about a download."""
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: status.update(record.getMessage())  # type: ignore[method-assign]
    source = logging.getLogger("hass_lightning.target_model.source")
    level = source.level
    source.addHandler(handler)
    source.setLevel(logging.INFO)
    try:
        yield
    finally:
        source.removeHandler(handler)
        source.setLevel(level)


@command("generate")
def main(config: DictConfig) -> dict[str, Any]:
    """Answer one question or hold a chat; nothing is written but `record`."""
    if config.output not in ("text", "json") or (config.output == "json" and config.prompt is None):
        raise ValueError(f"output={config.output} is neither text nor json, or json without a prompt: set prompt='…'.")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before transformers is imported
    console = Console(highlight=False, file=sys.stderr if config.output == "json" else sys.stdout)
    with loading(console, config.target.name):
        import torch

        from hass_lightning.generation.colors import save_svg
        from hass_lightning.generation.from_config import build
        from hass_lightning.generation.terminal import ChatSettings, Session, reader, run_chat
        from hass_lightning.target_model.kernels import keep_disturbed
        from hass_lightning.types import Sampling

        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        sampling = Sampling(float(config.temperature), float(config.top_p), config.top_k)
        settings = ChatSettings(
            config.system, sampling, config.seed, config.max_new_tokens, config.compare, config.baseline_tokens
        )
        keep_disturbed()
        session = Session(build(config), settings, console)
    result: dict[str, Any] = {"_silent": True}
    if config.prompt is None:
        session.greet()
        run_chat(session, reader(console))
    else:
        session.explain()
        answer = session.ask(str(config.prompt))
        if answer is None:
            result["_exit_code"] = 130  # stopped by Ctrl-C
        elif config.output == "json":
            result = {"answer": answer.text, "num_tokens": len(answer.result.token_ids),
                      "acceptance_length": answer.tokens_per_forward,
                      "tokens_per_second": answer.tokens_per_second}  # fmt: skip
    if config.record:
        words = [word for word in sys.argv[1:] if not word.startswith("record=")]
        save_svg(config.record, session.shown, " ".join(["hass-generate", *words]))
    return result


if __name__ == "__main__":
    main()
