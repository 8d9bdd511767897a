"""Rules for single keys of a run: conf/train.yaml (`RUN`) and conf/trainer/default.yaml (`TRAINER`).

A rule is a function that accepts the valid values of a key, and a text that says how to fix an invalid one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from hass_lightning.training.rendezvous import seconds_of

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "32", "16", "bf16", 32, 16)
MAX_DEVICES = 1024  # on one machine
DURATION = r"\d+:\d{1,2}:\d{1,2}:\d{1,2}"
Rule = tuple[Callable[[Any], bool], str]


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole_from(least: int, *others: Any) -> Rule:
    named = "".join(f", or {'null' if other is None else other}" for other in others)
    return (lambda value: (value in others and not isinstance(value, bool)) or _whole(value, least),
            f"use an integer of at least {least}{named}")  # fmt: skip


def _positive(*others: Any) -> Rule:
    named = "".join(f", or {'null' if other is None else other}" for other in others)
    return (lambda value: (value in others and not isinstance(value, bool)) or (_number(value) and value > 0),
            f"use a number above 0{named}")  # fmt: skip


def _one_of(*names: Any) -> Rule:
    listed = ", ".join("null" if name is None else str(name) for name in names)
    return (lambda value: value in names and not isinstance(value, bool), f"it must be one of {listed}")


def _share(zero: bool) -> Rule:
    def accepts(value: Any) -> bool:
        if value is None or _whole(value, 0 if zero else 1):
            return True
        return isinstance(value, float) and (0 <= value <= 1 if zero else 0 < value <= 1)

    least = "0 (none)" if zero else "1"
    return accepts, f"use a number of batches of at least {least} (2), or a fraction of them up to 1.0 (0.5)"


def _is_duration(value: Any) -> bool:
    units = {"weeks", "days", "hours", "minutes", "seconds"}
    if isinstance(value, dict):
        return bool(value) and set(value) <= units and all(_number(each) and each >= 0 for each in value.values())
    return value is None or (isinstance(value, str) and re.fullmatch(DURATION, value) is not None)


def _is_count(value: Any) -> bool:
    return str(value).isdigit() and 1 <= int(str(value)) <= MAX_DEVICES


def _is_name(value: Any) -> bool:
    return value is None or (isinstance(value, str | int | float) and not isinstance(value, bool) and value != "")


YES_OR_NO: Rule = (lambda value: isinstance(value, bool), "it must be true or false")
TEXT: Rule = (lambda value: isinstance(value, str) and value != "", "give a name")
PATH: Rule = (lambda value: value is None or (isinstance(value, str) and value != ""), "use a path, or null")
NAME: Rule = (_is_name, "use a name, a number, or null")
SHARE: Rule = (lambda value: _number(value) and 0 < value <= 1, "use a fraction above 0 and at most 1")
TRAINER: dict[str, Rule] = {
    "default_root_dir": PATH,
    "accelerator": _one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "devices": (lambda value: _is_count(value) or (isinstance(value, list) and value != []),
                f"it must be a number of processes (at most {MAX_DEVICES}), or a list of GPUs such as [0,1]"),
    "num_nodes": _whole_from(1),
    "rendezvous_timeout": (lambda value: value is not None and seconds_of(value) > 0,
                           "give seconds above 0 (300), DD:HH:MM:SS (00:00:05:00), or {minutes: 5}"),
    "strategy": (lambda value: isinstance(value, str | dict), "see trainer=ddp and trainer=deepspeed_zero2"),
    "precision": _one_of(*PRECISIONS),
    "max_epochs": _positive(None, -1),
    "max_steps": _whole_from(1, None, -1),
    "max_time": (_is_duration, "use DD:HH:MM:SS (00:12:00:00 is half a day), {hours: 12}, or null"),
    "accumulate_grad_batches": _whole_from(1),
    "gradient_clip_val": (lambda value: value is None or (_number(value) and value >= 0),
                          "use a number of at least 0, or null"),
    "gradient_clip_algorithm": _one_of("norm", "value", None),
    "val_check_interval": (
        lambda value: value is None or _whole(value, 1) or (isinstance(value, float) and _number(value) and value > 0),
        "use a fraction of epochs (0.25, 1.5) or a number of batches (500); durations are not supported, and "
        "trainer.limit_val_batches=0 turns validation off",
    ),
    "check_val_every_n_epoch": _whole_from(1, None),
    "num_sanity_val_steps": _whole_from(0, -1),
    "limit_train_batches": _share(zero=False),
    "limit_val_batches": _share(zero=True),
    "log_every_n_steps": _whole_from(1),
    "enable_progress_bar": YES_OR_NO,
    "enable_model_summary": YES_OR_NO,
    "deterministic": (lambda value: isinstance(value, bool) or value == "warn", "it must be true, false or warn"),
    "detect_anomaly": YES_OR_NO,
}  # fmt: skip
RUN: dict[str, Rule] = {
    "job": TEXT,
    "name": NAME,
    "study": NAME,
    "seed": (lambda value: _whole(value, 0) and value < 2**32, "use an integer from 0 to 4294967295"),
    "num_threads": _whole_from(1, None),
    "ckpt_path": PATH,
    "init_from": PATH,
    "compute.tokens": _positive(None),
    "compute.flops": _positive(None),
    "compute.match_depth": _whole_from(1, None),
    "compute.seconds": (lambda value: value is None or (_number(value) and value >= 0),
                        "use a number of seconds of at least 0, or null"),
    "plan": YES_OR_NO,
    "status": YES_OR_NO,
    "estimate.num_tokens": _positive(None),
    "estimate.num_conversations": _positive(None),
    "estimate.rows_fraction": SHARE,
    "estimate.device": TEXT,
    "estimate.utilisation": SHARE,
    "fresh": YES_OR_NO,
    "optimized_metric": TEXT,
}  # fmt: skip
