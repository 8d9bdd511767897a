"""Shapes of all tensors created by a function, for tests of memory."""

from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that any operation returns while it is active."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return output

    @property
    def largest(self) -> int:
        """Number of elements of the largest tensor."""
        return max(prod(shape) for shape in self.seen)
