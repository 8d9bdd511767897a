"""Linear layers for the few rows of a decoding step, where a CPU's usual kernel is slow.

On CPUs without AVX-512, MKL multiplies 2 … 64 rows in fp32 at a fraction of the memory's speed, for it re-packs the
whole weight at every call. oneDNN keeps a packed copy (as torch's inductor does when it freezes a model): a forward of 8
tokens costs 1.4 forwards of one instead of 2.4 (benchmarks/few_rows.md), for twice the memory of the weights. Everything
that decodes goes through here, the autoregressive baseline too.
Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

MOST_ROWS = 64
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> (its version, oneDNN's copy)


def takes_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the packed copy is the better way: fp32 on a CPU without AVX-512, few rows, no gradient."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    num_rows = x.numel() // max(1, x.shape[-1])
    if not 0 < num_rows <= MOST_ROWS or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return False
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT") and torch.backends.mkldnn.is_available()


def _packed_copy(weight: Tensor) -> Tensor:
    version = 0 if weight.is_inference() else weight._version
    known = _packed.get(weight)
    if known is None or known[0] != version:  # new, or written to since
        known = _packed[weight] = (version, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8))
    return known[1]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b`: [..., I] and [O, I] to [..., O], as `F.linear` up to rounding."""
    if not takes_few_rows(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, _packed_copy(weight), bias, "none", [], "")


class FewRowLinear(nn.Linear):
    """`nn.Linear` by `linear` above: the same parameters, names and (up to rounding) values."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return linear(input, self.weight, self.bias)


def use_few_row_linears(module: nn.Module) -> None:
    """Turn every plain `nn.Linear` inside `module` into a `FewRowLinear`, in place (no weight is copied)."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = FewRowLinear
