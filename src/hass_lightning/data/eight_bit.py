"""Features in 8 bits with one scale per hidden state, and how well they preserve the target's distributions.

Shapes: N rows, D hidden, P layers of a feature, W = P · D (types.py has the legend).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.target_model.lm_head import TargetHead


def quantize(features: Tensor, num_layers: int = 1) -> tuple[Tensor, Tensor]:
    """Features [N, W] to (int8 [N, W], fp32 scales [N, P], or [N] with one layer).

    The largest magnitude of each hidden state becomes 127, because they differ in size before and after the final norm.
    """
    wide = features.float().unflatten(-1, (num_layers, -1))
    scales = wide.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    quantized = (wide / scales[..., None]).round_().to(torch.int8).flatten(1)
    return quantized, scales.squeeze(1) if num_layers == 1 else scales


def dequantize(quantized: Tensor, scales: Tensor) -> Tensor:
    """The features [N, W] in fp32, each element off by at most half a scale."""
    by_layer = scales.reshape(len(scales), -1)
    restored: Tensor = quantized.unflatten(-1, (by_layer.shape[1], -1)) * by_layer[..., None]
    return restored.flatten(1)


@torch.no_grad()
def fidelity(
    head: TargetHead, features: Tensor, restored: Tensor, k: int = 10, max_rows: int = 512
) -> dict[str, float]:
    """Compare the target's distributions at some features and at their dequantized form.

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
