"""The machine and what is installed on it: versions, threads, precision, attention."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement

from hass_lightning.checks.finding import Finding, error, ok, warning
from hass_lightning.target.model import TargetModel, working_dtype

PACKAGE = "hass-lightning"


def check_versions() -> Finding:
    """Installed packages lie within the bounds that CI ran."""
    try:
        wanted = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return warning("versions", f"{PACKAGE} is not installed, only imported", "pip install -e . in its folder.")
    outside = []
    for requirement in wanted:
        if requirement.marker is not None:  # an extra
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = "none"
        if installed == "none" or not requirement.specifier.contains(installed, prereleases=True):
            outside.append(f"{requirement.name} {installed} (wanted {requirement.specifier})")
    if outside:
        return error("versions", f"outside the tested bounds: {', '.join(outside)}", f"pip install -U {PACKAGE}")
    return ok("versions", f"torch {torch.__version__}, transformers {metadata.version('transformers')}, all in bounds")


def check_threads(num_processes: int, on_gpu: bool) -> Finding:
    """Threads of all processes against the cores this process may use: too many are several times slower."""
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    message = f"{num_processes} process(es) of {threads} threads on {cores} cores"
    if not on_gpu and num_processes * threads > cores:
        cure = f"set num_threads={max(1, cores // num_processes)} (and OMP_NUM_THREADS to the same)."
        return warning("threads", message, cure)
    return ok("threads", message)


def check_precision(precision: str, target_dtype: torch.dtype, on_gpu: bool) -> Finding:
    """bf16 is asked for only where the hardware multiplies it fast."""
    fast = working_dtype("cuda" if on_gpu else "cpu") == torch.bfloat16
    message = f"trainer.precision={precision}, target in {str(target_dtype).removeprefix('torch.')}, bf16 is " + (
        "fast here" if fast else "slow here"
    )
    if not fast and (precision.startswith("bf16") or target_dtype == torch.bfloat16):
        return warning("precision", message, "set trainer.precision=auto and target.dtype=auto.")
    if fast and on_gpu and precision.startswith("32"):
        return warning("precision", message, "set trainer.precision=bf16-mixed: float32 wastes most of a GPU.")
    return ok("precision", message)


def check_accelerator(accelerator: str) -> Finding:
    """A GPU that is there is used."""
    if torch.cuda.is_available() and accelerator == "cpu":
        name = torch.cuda.get_device_name()
        return warning("accelerator", f"trainer.accelerator=cpu, and there is a {name}", "set trainer=gpu.")
    return ok("accelerator", f"trainer.accelerator={accelerator}")


def check_attention(target: TargetModel) -> Finding:
    """The target's attention reads boolean tree masks rightly."""
    backend: Any = getattr(target.config, "_attn_implementation", None)
    if backend != "sdpa":
        message = f"the target's attention is {backend}: tree masks were checked with sdpa alone"
        return warning("attention", message, "set target.attn_implementation=sdpa.")
    return ok("attention", f"{backend} on {target.device}")


def check_target_device(target: TargetModel, on_gpu: bool) -> Finding:
    """A head that trains on a GPU has its target there, too: features, verification and LM head are its work."""
    if on_gpu and target.device.type == "cpu":
        message = "the head trains on a GPU, its target computes on the CPU"
        return error("target_device", message, "set target.device=cuda, or trainer=cpu to train on the CPU as well.")
    return ok("target_device", f"target on {target.device}")
