"""A pre-allocated key/value cache, used by the target and the draft head.

Shapes: B sequences, L layers, H key/value heads, C capacity, d head size, N new tokens (see the legend in types.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values `[B, H, C, d]` of every layer, written in place.

    A transformers causal LM accepts it as `past_key_values`. All sequences have the same length, unless `slots` gives
    the columns that each sequence writes to (ragged batches). A forward pass does not change the length: call `advance`
    or `keep` afterwards, or neither to discard what was written.
    """

    is_compileable = False

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        # one tensor, so that `keep` is one gather instead of two per layer
        shape = (2, num_layers, batch_size, num_heads, capacity, head_dim)
        self.storage = torch.zeros(shape, dtype=dtype, device=device)  # [2, L, B, H, C, d]
        self.capacity = capacity
        self.length = 0
        self.slots: Tensor | None = None  # [B, N] columns to write to, instead of length … length+N-1
        self.read_length: int | None = None  # columns returned to the attention when `slots` is set

    @property
    def keys(self) -> Tensor:
        """Keys [L, B, H, C, d]."""
        return self.storage[0]

    @property
    def values(self) -> Tensor:
        """Values [L, B, H, C, d]."""
        return self.storage[1]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write `keys` and `values` [B, H, N, d] and return all columns that the attention may read."""
        stored_keys, stored_values = self.keys[layer_idx], self.values[layer_idx]
        if self.slots is None:
            end = self.length + keys.shape[2]
            assert end <= self.capacity, f"cache of {self.capacity} tokens is full"
            stored_keys[:, :, self.length : end] = keys
            stored_values[:, :, self.length : end] = values
        else:
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
            # advanced indices on both sides of a slice move the indexed axes to the front: [B, N, H, d]
            stored_keys[rows, :, self.slots] = keys.transpose(1, 2)
            stored_values[rows, :, self.slots] = values.transpose(1, 2)
            end = self.read_length or self.capacity
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def causal_mask(self, num_tokens: int) -> Tensor | None:
        """Return the causal mask of `num_tokens` new tokens, bool [1, 1, N, keys], or None if none is needed."""
        if num_tokens == 1 or self.length == 0:
            return None
        columns = torch.arange(self.length + num_tokens, device=self.storage.device)
        return (columns <= columns[self.length :, None])[None, None]

    def advance(self, num_tokens: int) -> None:
        """Append the first `num_tokens` written columns to the sequence."""
        self.length += num_tokens

    def keep(self, indices: Tensor) -> None:
        """Append the columns at offsets `indices` [K] after `length`, in that order."""
        count = int(indices.shape[0])
        kept = self.storage.index_select(4, indices + self.length)
        self.storage[..., self.length : self.length + count, :] = kept
        self.length += count

    def select_rows(self, rows: Tensor) -> None:
        """Keep only the sequences at batch indices `rows` [K] (finished sequences leave the batch)."""
        self.storage = self.storage[:, :, rows]

    # The interface that transformers uses to build a mask (prefill and single tokens, sequences of equal length).
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first new token."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys in the attention, and their offset."""
        return self.length + query_length, 0
