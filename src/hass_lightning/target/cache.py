"""A pre-allocated key/value cache with one length a row, used by the target and the draft head alike.

Shapes: B rows, L layers, H key/value heads, C capacity, d head size, N new tokens (types.py has the legend).
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values `[B, H, C, d]` of every layer, written in place.

    A causal LM of transformers takes it as `past_key_values`. All rows share one length unless `slots` says where each
    row writes (ragged batches). Nothing advances by itself: the caller runs a forward and then calls `advance`,
    `keep` or nothing (which forgets what was written).
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
        # one tensor, so that keeping an accepted path is one gather, not two a layer
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
        """Write `keys`, `values` [B, H, N, d] and return all columns the attention may read."""
        stored_keys, stored_values = self.keys[layer_idx], self.values[layer_idx]
        if self.slots is None:
            end = self.length + keys.shape[2]
            assert end <= self.capacity, f"cache of {self.capacity} tokens is full"
            stored_keys[:, :, self.length : end] = keys
            stored_values[:, :, self.length : end] = values
        else:
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
            # advanced indices around a slice put the indexed axes first: [B, N, H, d]
            stored_keys[rows, :, self.slots] = keys.transpose(1, 2)
            stored_values[rows, :, self.slots] = values.transpose(1, 2)
            end = self.read_length or self.capacity
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def causal_mask(self, num_tokens: int) -> Tensor | None:
        """What `num_tokens` new tokens in a row see, bool [1, 1, N, keys]; None where no mask is needed."""
        if num_tokens == 1 or self.length == 0:
            return None
        columns = torch.arange(self.length + num_tokens, device=self.storage.device)
        return (columns <= columns[self.length :, None])[None, None]

    def advance(self, num_tokens: int) -> None:
        """Count the last `num_tokens` written columns as part of the sequence."""
        self.length += num_tokens

    def keep(self, indices: Tensor) -> None:
        """Keep, of the columns written after `length`, those at the offsets `indices` [K], in that order."""
        count = int(indices.shape[0])
        kept = self.storage.index_select(4, indices + self.length)
        self.storage[..., self.length : self.length + count, :] = kept
        self.length += count

    def write_rows(self, rows: Tensor, other: KVCache, length: int) -> None:
        """Copy the first `length` columns of all rows of `other` into `rows` (new sequences take free slots)."""
        self.storage[:, :, rows, :, :length] = other.storage[..., :length, :]

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows `rows` [K] alone (finished sequences leave the batch)."""
        self.storage = self.storage[:, :, rows]

    # What transformers asks of a cache when it builds a mask by itself (prefill and single tokens, uniform rows).
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first new token."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys, offset) the attention will see."""
        return self.length + query_length, 0
