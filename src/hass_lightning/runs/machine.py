"""Capabilities of this machine."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def working_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return bf16 if the hardware multiplies it fast (GPU, AMX, AVX-512 BF16), else fp32 (fp16 on older GPUs)."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def device_name() -> str:
    """Return the name of the GPU, or of the processor without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    """Return the model name of the processor as Linux has it, or what Python knows elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), platform.processor() or "cpu")
