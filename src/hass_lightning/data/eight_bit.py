"""Features in 8 bits with one scale a row, and how well they keep the target's distributions.

Shapes: N rows, D hidden (types.py has the legend).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.target.head import TargetHead


def quantize(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D] to (int8 [N, D], fp32 scales [N]): a row's largest magnitude becomes 127."""
    wide = features.float()
    scales = wide.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (wide / scales[:, None]).round_().to(torch.int8), scales


def dequantize(quantized: Tensor, scales: Tensor) -> Tensor:
    """The features [N, D] in fp32, each element off by at most half a scale."""
    return quantized * scales[:, None]


@torch.no_grad()
def fidelity(
    head: TargetHead, features: Tensor, restored: Tensor, k: int = 10, max_rows: int = 512
) -> dict[str, float]:
    """What the target says at some features against what it says at their restored form.

    Returns:
        `kl` = mean KL(p || p_restored) in nats, `top_k_overlap` = mean share of the K most probable tokens in both,
        `argmax_agreement`, over the first `max_rows` rows [N, D].
    """
    device, dtype = head.lm_head.device, head.lm_head.dtype
    before, after = (head.logits(x[:max_rows].to(device, dtype)).float() for x in (features, restored))
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    top_p, top_q = before.topk(k).indices, after.topk(k).indices
    same = (top_p[:, :, None] == top_q[:, None, :]).any(-1)
    return {
        "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "top_k_overlap": float(same.float().mean()),
        "argmax_agreement": float((top_p[:, 0] == top_q[:, 0]).float().mean()),
    }
