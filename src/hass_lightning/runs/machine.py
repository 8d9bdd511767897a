"""Capabilities of this machine."""

from __future__ import annotations

import torch


def working_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return bf16 if the hardware multiplies it fast (GPU, AMX, AVX-512 BF16), else fp32 (fp16 on older GPUs)."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
