"""Linear layers for the few rows of a decoding step, where a CPU's usual kernel is slow.

On CPUs without AVX-512, MKL multiplies 2 … 16 rows in fp32 at a fraction of the memory's speed: there `W xᵀ` instead of
`x Wᵀ` takes about half the time (benchmarks/few_rows.md). Everything that decodes goes through here.
Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FAST_WIDTHS = (2, 4, 6, 8, 16)  # numbers of columns that the kernel is fast at


def few_row_width(x: Tensor, weight: Tensor) -> int | None:
    """Columns to compute `W xᵀ` with, the rows of `x` padded to them; None where `F.linear` is the better way."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return None
    num_rows = x.numel() // max(1, x.shape[-1])
    if not 1 < num_rows <= FAST_WIDTHS[-1] or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return None
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "DEFAULT"):
        return None
    return next(width for width in FAST_WIDTHS if width >= num_rows)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b`: [..., I] and [O, I] to [..., O], as `F.linear` up to rounding."""
    width = few_row_width(x, weight)
    if width is None:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    padded = rows if rows.shape[0] == width else F.pad(rows, (0, 0, 0, width - rows.shape[0]))
    product = (weight @ padded.T)[:, : rows.shape[0]].T.contiguous()
    return (product if bias is None else product + bias).view(*x.shape[:-1], -1)


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
