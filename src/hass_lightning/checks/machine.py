"""Checks of the machine and its packages: versions, threads, precision, attention."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement

from hass_lightning.checks.finding import Finding, error, ok, warning
from hass_lightning.runs.machine import working_dtype
from hass_lightning.target_model.model import TargetModel

PACKAGE = "hass-lightning"


def check_versions() -> Finding:
    """Check that installed packages are within the bounds tested by CI."""
    try:
        wanted = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return warning("versions", f"{PACKAGE} is not installed, only imported", "run pip install -e . in its folder.")
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
    return ok(
        "versions",
        f"torch {torch.__version__}, transformers {metadata.version('transformers')}, all within the tested bounds",
    )


def check_threads(num_processes: int, on_gpu: bool) -> Finding:
    """Check the threads of all processes against the available cores; too many threads are several times slower."""
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    message = f"{num_processes} process(es) of {threads} threads on {cores} cores"
    if not on_gpu and num_processes * threads > cores:
        cure = f"set num_threads={max(1, cores // num_processes)} (and OMP_NUM_THREADS to the same)."
        return warning("threads", message, cure)
    return ok("threads", message)


def check_precision(precision: str, target_dtype: torch.dtype, on_gpu: bool) -> Finding:
    """Check that bf16 is used only if the hardware multiplies it fast."""
    fast = working_dtype("cuda" if on_gpu else "cpu") == torch.bfloat16
    message = f"trainer.precision={precision}, target in {str(target_dtype).removeprefix('torch.')}, bf16 is " + (
        "fast here" if fast else "slow here"
    )
    if not fast and (precision.startswith("bf16") or target_dtype == torch.bfloat16):
        return warning("precision", message, "set trainer.precision=auto and target.dtype=auto.")
    if fast and on_gpu and precision.startswith("32"):
        return warning(
            "precision", message, "set trainer.precision=bf16-mixed: float32 uses a fraction of the GPU's performance."
        )
    return ok("precision", message)


def check_accelerator(accelerator: str) -> Finding:
    """Check that a GPU is used if there is one."""
    if torch.cuda.is_available() and accelerator == "cpu":
        name = torch.cuda.get_device_name()
        return warning("accelerator", f"trainer.accelerator=cpu, but there is a {name}", "set trainer=gpu.")
    return ok("accelerator", f"trainer.accelerator={accelerator}")


def check_attention(target: TargetModel) -> Finding:
    """Check that the target's attention interprets boolean tree masks correctly."""
    backend: Any = getattr(target.config, "_attn_implementation", None)
    if backend != "sdpa":
        message = f"the target's attention is {backend}, but tree masks were tested only with sdpa"
        return warning("attention", message, "set target.attn_implementation=sdpa.")
    return ok("attention", f"{backend} on {target.device}")


def check_target_device(target: TargetModel, on_gpu: bool) -> Finding:
    """Check that the target is on the GPU if the head is: it computes features, verification and LM head."""
    if on_gpu and target.device.type == "cpu":
        message = "the head is on the GPU, but its target is on the CPU"
        return error("target_device", message, "set target.device=cuda, or trainer=cpu to train on the CPU.")
    return ok("target_device", f"target on {target.device}")
