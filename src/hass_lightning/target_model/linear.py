"""Linear layers with frozen weights, used for decoding, self-distillation and feature extraction.

All decoders use them, including the autoregressive baseline. `kernels.choose` decides how each weight is stored and
multiplied. Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from hass_lightning.target_model.kernels import Choice, choose, multiply_packed, pack

State = tuple[int, int]
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> (its state, its packed copy)


def _packed_copy(weight: Tensor) -> tuple[State, Tensor]:
    """Return the state of `weight` and its packed copy, which all users of the same tensor share."""
    state = _state(weight)
    known = _copies.get(weight)
    if known is None or known[0] != state:
        known = _copies[weight] = (state, pack(weight))
    return known


def _state(weight: Tensor) -> State:
    """Return a value that changes when the tensor is modified or gets new storage (`module.to`, `weight.data = …`)."""
    return (0 if weight.is_inference() else weight._version), weight.data_ptr()


class FrozenWeight:
    """A frozen weight [O, I], with a packed copy that is used where it is faster for the number of rows.

    The copy is created on first use, and again after the weight was modified.

    Args:
        weight: [O, I].
        bias: [O].
        reorder: whether `plain` may be stored inputs first, i.e. nothing else uses the memory of `weight`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, reorder: bool = False):
        if reorder and choose(weight, reorder).inputs_first:
            weight = weight.T.contiguous().T
        self.plain: Tensor | None = weight
        self.bias = bias
        self.dtype = weight.dtype
        self.choice: Choice = choose(weight, reorder)
        self._copy: tuple[State, Tensor] | None = None  # state of the weight, and oneDNN's copy of it

    @property
    def packed(self) -> Tensor:
        """OneDNN's packed copy of the current weight."""
        if self.plain is not None and (self._copy is None or self._copy[0] != _state(self.plain)):
            self._copy = _packed_copy(self.plain)
        assert self._copy is not None
        return self._copy[1]

    @property
    def extra_bytes(self) -> int:
        """Additional memory in bytes of the packed copy, if it is used."""
        return self.plain.nbytes if self.plain is not None and self.choice.packed else 0

    def takes_packed(self, x: Tensor) -> bool:
        """Whether `x` [..., I] is multiplied by the packed copy."""
        if self.plain is None:
            return True
        num_rows = x.numel() // max(1, x.shape[-1])
        if num_rows == 0 or (torch.is_grad_enabled() and (x.requires_grad or self.plain.requires_grad)):
            return False
        return self.choice.takes_packed(num_rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute `x Wᵀ + b`, [..., I] to [..., O]: equal to `F.linear` up to rounding (bitwise equal in bf16)."""
        if self.takes_packed(x):
            return multiply_packed(x, self.packed, self.bias)
        assert self.plain is not None
        return F.linear(x, self.plain, self.bias)

    def release(self) -> None:
        """Free the plain weight and keep only the packed copy. Nothing else may use the weight."""
        assert self.choice.always_packed
        self._copy, self.plain = ((0, 0), self.packed), None

    def dense(self) -> Tensor:
        """Return the plain weight [O, I], unpacked if it was released."""
        return self.plain if self.plain is not None else self.packed.to_dense()

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the packed weight from copies, because torch cannot copy it."""
        assert self.plain is not None, "a released weight cannot be copied"
        return self.__dict__ | {"_copy": None}


class FrozenLinear(nn.Linear):
    """`nn.Linear` that multiplies with `FrozenWeight`: same parameters and names, same values up to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, [..., I] to [..., O]."""
        frozen: FrozenWeight | None = self.__dict__.get("frozen")
        if frozen is None or frozen.plain is not self.weight or frozen.dtype != self.weight.dtype:
            frozen = self.__dict__["frozen"] = FrozenWeight(self.weight, self.bias)
        return frozen(input)


def freeze_linears(module: nn.Module) -> None:
    """Convert every `nn.Linear` in `module` to `FrozenLinear` in place, without copying weights."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = FrozenLinear
