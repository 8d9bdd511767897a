"""A real training step on the longest sequence, and the resources that the whole run will take.

Shapes: B batch, T tokens, D hidden (see the legend in types.py).
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hass_lightning.checks.finding import Finding, error, ok, warning
from hass_lightning.data.batches import collate
from hass_lightning.data.features import bytes_per_token
from hass_lightning.target_model.model import TargetModel
from hass_lightning.target_model.source import cache_root
from hass_lightning.training.module import HassModule
from hass_lightning.types import Tokens

LOWER = "reduce data.batch_size or data.max_length, or set model.alignment.checkpoint=true."


@dataclass(frozen=True)
class ProbeStep:
    """Measurements of one step: seconds, tokens (padding included), peak and available bytes of memory."""

    seconds: float
    num_tokens: int
    peak_bytes: float
    available_bytes: float


def longest_batch(target: TargetModel, tokens: Sequence[Tokens], batch_size: int) -> Any:
    """Return a batch, as from the loader, of `batch_size` copies of the longest sequence."""
    longest = max(tokens, key=len)
    features = target.encode(longest.input_ids[None])[0]
    target_ids = target.head.logits(features).argmax(-1)
    row: dict[str, Any] = {
        "input_ids": longest.input_ids,
        "loss_mask": longest.loss_mask,
        "features": features.cpu(),
        "target_ids": target_ids.cpu(),
        "id": longest.id,
    }
    row["inputs"] = row["features"]
    return collate([row] * batch_size)


def probe_step(
    module: HassModule, trainer: Any, batch: Any, device: torch.device
) -> tuple[list[Finding], ProbeStep | None]:
    """Run forward, backward and optimizer step of the configured model, in the trainer's precision.

    Returns:
        findings about loss, gradients and memory, and the measurements (None: out of memory).
    """
    module.trainer = trainer
    try:
        module.to(device)
        module.setup("fit")
        features = batch[0].to(device)  # copies of one sequence, without noise
        optimizer = module.make_optimizer([p for p in module.draft.parameters() if p.requires_grad])
        started = time.perf_counter()
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(trainer.precision)
        with torch.autocast(device.type, mixed, enabled=mixed is not None):
            output = module.aligned_loss(features)
            output.total.backward()
        gradients = {name: p.grad for name, p in module.draft.named_parameters() if p.requires_grad}
        optimizer.step()
        loss = float(output.total.detach())  # also synchronizes with a GPU
        seconds = time.perf_counter() - started
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as failure:
        if isinstance(failure, RuntimeError) and "memory" not in str(failure):
            cure = "HASS_LIGHTNING_TRACE=1 hass-train prints the traceback; check custom loss terms and heads."
            return [error("probe_step", f"the step fails: {failure}", cure)], None
        shape = tuple(batch[0].input_ids.shape)
        message = f"a batch of {shape[0]} sequences of {shape[1]} tokens does not fit into memory"
        return [error("memory", message, LOWER)], None
    num_rows = int(features.loss_mask.sum())
    step = ProbeStep(seconds, features.input_ids.numel(), *_memory(device))
    return [_learning(loss, gradients, num_rows), _room(step)], step


def _learning(loss: float, gradients: dict[str, torch.Tensor | None], num_rows: int) -> Finding:
    silent = [name for name, gradient in gradients.items() if gradient is None or not bool(gradient.any())]
    broken = [name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()]
    message = f"loss {loss:.3f} on {num_rows} loss positions"
    if not math.isfinite(loss) or broken:
        return error("probe_step", f"{message}, gradients not finite in {broken}", "set trainer.precision=32-true.")
    if silent or not num_rows:
        cure = "check the loss mask and the weights of model.loss.terms."
        return error("probe_step", f"{message}: no gradient reaches {silent[:3] or 'the head'}", cure)
    return ok("probe_step", f"{message}, finite gradients in all {len(gradients)} tensors")


def _memory(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return peak, total


def _room(step: ProbeStep) -> Finding:
    share = step.peak_bytes / step.available_bytes
    message = f"a process peaks at {step.peak_bytes / 1e9:.1f} GB of {step.available_bytes / 1e9:.1f} GB"
    return warning("memory", message, LOWER) if share > 0.85 else ok("memory", message)


def check_disk(
    target: TargetModel, num_tokens: int, num_parameters: int, cache_dir: str | Path | None, run_dir: Path
) -> list[Finding]:
    """Check the size of features and checkpoints against the free disk space of their folders."""
    wanted = {
        "features": (Path(cache_dir or cache_root()), num_tokens * bytes_per_token(target)),
        # weights and two moments, in the last and the best checkpoint; the head itself
        "checkpoints": (run_dir, 7 * 4 * num_parameters),
    }
    findings = []
    for name, (folder, num_bytes) in wanted.items():
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        message = f"{name} take {num_bytes / 1e9:.2f} GB in {folder}, but {free / 1e9:.1f} GB are free"
        cure = "set HASS_LIGHTNING_CACHE (features) or HASS_LIGHTNING_ROOT (runs) to a larger disk, or use less data."
        if num_bytes > 0.5 * free:
            findings.append((error if num_bytes > free else warning)("disk", message, cure))
        else:
            findings.append(ok("disk", message))
    return findings


def estimate_time(step: ProbeStep, num_steps: int, tokens_a_step: float, num_tokens: int, speed: float) -> Finding:
    """Estimate the hours of features and of training on this machine, from the probe step and the timed target.

    Args:
        step: the measured step.
        num_steps: number of steps.
        tokens_a_step: mean number of tokens per step, without padding.
        num_tokens: number of tokens to extract.
        speed: the target's tokens per second.
    """
    features = num_tokens / speed
    training = num_steps * step.seconds * tokens_a_step / step.num_tokens
    message = (
        f"about {features / 60:.1f} minutes of features (less if cached) and {training / 60:.1f} of training in "
        f"{num_steps} steps on this machine, plus decoding"
    )
    return ok("time", message)
