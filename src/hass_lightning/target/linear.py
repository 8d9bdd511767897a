"""Linear layers for the few rows of a decoding step, where a CPU's usual kernel is slow.

On CPUs without AVX-512, MKL multiplies 2 … 64 rows in fp32 at a fraction of the memory's speed, for it re-packs the
whole weight at every call. oneDNN keeps a packed copy (as torch's inductor does when it freezes a model): 8 tokens cost
0.6 of it (benchmarks/few_rows.md), for twice the memory of the weights. One row is at the memory's speed with the
library's kernel and a weight stored inputs first. Everything that decodes goes through here, the autoregressive
baseline too.
Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

MOST_ROWS = 64
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> (its version, oneDNN's copy)


def few_rows_matter(x: Tensor, weight: Tensor) -> bool:
    """Whether the library's kernel is slow for few rows: fp32 on a CPU without AVX-512."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT") and torch.backends.mkldnn.is_available()


def takes_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the packed copy is the better way: few rows, no gradient, and a kernel that is slow for them."""
    num_rows = x.numel() // max(1, x.shape[-1])
    if not 0 < num_rows <= MOST_ROWS or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return False
    if num_rows == 1 and (weight.shape[0] <= weight.shape[1] or not weight.is_contiguous()):
        return False  # the library's kernel is at the memory's speed
    return few_rows_matter(x, weight)


def inputs_first(weight: Tensor) -> Tensor:
    """The same [O, I] stored as [I, O] if it has more outputs than inputs: one row is multiplied up to 1.5x faster."""
    wide = weight.shape[0] > weight.shape[1] and few_rows_matter(weight, weight)
    return weight.T.contiguous().T if wide else weight


def _packed_copy(weight: Tensor) -> Tensor:
    version = 0 if weight.is_inference() else weight._version
    known = _packed.get(weight)
    if known is None or known[0] != version:  # new, or written to since
        plain = weight.detach().contiguous()
        known = _packed[weight] = (version, torch.ops.mkldnn._reorder_linear_weight(plain, 8))
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
