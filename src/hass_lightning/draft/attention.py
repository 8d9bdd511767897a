"""The attention of an alignment step, in the forms that `model.draft.attention` chooses from (hass.md §2.2).

In step j a row t sees the true features up to t-(j-1) and one key of each predicted band, under one softmax. `eager` is
the definition with its T x T scores. `flash` and `flex` run a library kernel on the causal part and merge the j-1
single keys by log-sum-exp: their memory grows with T. Shapes: B batch, T rows, H heads, G key/value heads, d head size,
J bands (types.py has the legend).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Form = Literal["auto", "eager", "flash", "flex"]
Band = tuple[Tensor, Tensor]  # keys and values, each [B, G, T, d]


def check_form(form: str) -> Form:
    """`form` if it is one.

    Raises:
        ValueError: it is none.
    """
    if form not in get_args(Form):
        raise ValueError(f"model.draft.attention={form} is none of {', '.join(get_args(Form))}.")
    return form  # type: ignore[return-value]


def visible(num_rows: int, num_bands: int, band: int, device: torch.device | str = "cpu") -> Tensor:
    """Which columns of `band` a row sees in the step with `num_bands` bands: bool [T, T] (row, column)."""
    row = torch.arange(num_rows, device=device)[:, None]
    column = torch.arange(num_rows, device=device)[None, :]
    if band == 0:
        return column <= row - (num_bands - 1)
    return column == row - (num_bands - 1 - band)


def banded_attention(queries: Tensor, bands: Sequence[Band], form: Form = "eager", leaky: bool = False) -> Tensor:
    """Attention of step `len(bands)`: causal on the true features, one diagonal a predicted band, one softmax.

    Args:
        queries: [B, H, T, d] of the newest band. bands: keys and values, oldest (true) first.
        form: `auto` is flash on a CPU, eager elsewhere. leaky: the official code's softmax (hass.md §7.1).

    Returns:
        [B, H, T, d].

    Raises:
        ValueError: `flash` on another device than a CPU.
    """
    device = queries.device.type
    if form == "flash" and device != "cpu":
        raise ValueError(f"model.draft.attention=flash is for CPUs, and this is {device}: use flex or auto.")
    if leaky:
        return _leaky(queries, bands)
    if queries.shape[2] < len(bands):  # no row sees a true feature
        return _eager(queries, bands)
    if form == "flash" or (form == "auto" and device == "cpu"):
        return _Flash.apply(queries, *(tensor for band in bands for tensor in band))
    return _flex(queries, bands) if form == "flex" else _eager(queries, bands)


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """[B, H, ...] to [B, G, H/G, ...]: query heads beside the key/value head they share."""
    return x.unflatten(1, (num_groups, -1))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _eager(queries: Tensor, bands: Sequence[Band]) -> Tensor:
    """The definition, and the oracle of the other forms."""
    num_rows, head_dim = queries.shape[-2:]
    true_keys, true_values = (tensor.unsqueeze(2) for tensor in bands[0])
    q = _grouped(queries, true_keys.shape[1]) * head_dim**-0.5
    row = torch.arange(num_rows, device=q.device)
    # finfo.min, not -inf: a row without any true feature (t < j-1) must not turn into NaN in the backward
    lowest = torch.finfo(q.dtype).min
    unseen = ~visible(num_rows, len(bands), 0, q.device)
    scores = [(q @ true_keys.transpose(-1, -2)).masked_fill(unseen, lowest)]  # [B, G, H/G, T, T]
    values = []
    for band in range(1, len(bands)):
        shift = len(bands) - 1 - band
        diagonal = (q * _shift(bands[band][0], shift).unsqueeze(2)).sum(-1).masked_fill(row < shift, lowest)
        scores.append(diagonal.unsqueeze(-1))
        values.append(_shift(bands[band][1], shift).unsqueeze(2))
    weights = torch.cat(scores, dim=-1).softmax(-1, dtype=_wide(q.dtype)).to(q.dtype)
    output = weights[..., :num_rows] @ true_values
    for number, value in enumerate(values):
        output = output + weights[..., num_rows + number, None] * value
    return output.reshape(queries.shape)


def _shift(x: Tensor, count: int) -> Tensor:
    """Rows moved `count` down along the token axis (-2), zeros above."""
    if count == 0:
        return x
    return torch.cat([torch.zeros_like(x[..., :count, :]), x[..., :-count, :]], dim=-2)


def _leaky(queries: Tensor, bands: Sequence[Band]) -> Tensor:
    """The official softmax: the bands' masked scores are summed, masked columns count as exp(0), weights are masked."""
    num_rows, head_dim = queries.shape[-2:]
    q = _grouped(queries, bands[0][0].shape[1]) * head_dim**-0.5
    masks = [visible(num_rows, len(bands), band, q.device) for band in range(len(bands))]
    pairs = list(zip(bands, masks, strict=True))
    scores = sum((q @ keys.unsqueeze(2).transpose(-1, -2)) * mask for (keys, _), mask in pairs)
    weights = scores.softmax(-1)  # type: ignore[union-attr]
    output = sum((weights * mask) @ values.unsqueeze(2) for (_, values), mask in pairs)
    return output.reshape(queries.shape)  # type: ignore[union-attr]


def _merged(
    causal: Tensor, causal_lse: Tensor, queries: Tensor, bands: Sequence[Band]
) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax over the causal part and the predicted bands' single keys.

    Args:
        causal: [B, H, T-(J-1), d], attention of the last rows to the true features. causal_lse: [B, H, T-(J-1)].

    Returns:
        (output [B, H, T, d], its log-sum-exp [B, H, T], the weights of the single keys [J-1, B, H, T]).
    """
    num_rows, head_dim = queries.shape[-2:]
    wide, last, groups = _wide(queries.dtype), len(bands) - 1, bands[0][0].shape[1]
    q = _grouped(queries, groups).to(wide)
    scores = [F.pad(causal_lse.to(wide), (last, 0), value=float("-inf"))]
    for band in range(1, len(bands)):
        shift = last - band
        keys = bands[band][0].unsqueeze(2)[..., : num_rows - shift, :]
        diagonal = (q[..., shift:, :] * keys).sum(-1).flatten(1, 2) * head_dim**-0.5
        scores.append(F.pad(diagonal, (shift, 0), value=float("-inf")))
    stacked = torch.stack(scores)  # [J, B, H, T]
    lse = stacked.logsumexp(0)
    weights = (stacked - lse).exp()
    output = F.pad(causal, (0, 0, last, 0)) * weights[0, ..., None]
    for band in range(1, len(bands)):
        shift = last - band
        values = bands[band][1].unsqueeze(2)[..., : num_rows - shift, :]
        seen = _grouped(weights[band], groups)[..., shift:, None] * values
        output = output + F.pad(seen.flatten(1, 2), (0, 0, shift, 0))
    return output.to(queries.dtype), lse, weights[1:]


class _Flash(torch.autograd.Function):
    """The library's CPU flash kernel on the causal part.

    Its log-sum-exp has no gradient. The backward needs none: given the *merged* output and log-sum-exp, the flash
    backward computes the gradient of its own keys under the whole softmax (as in ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, *flat: Tensor) -> Tensor:
        bands = list(zip(flat[::2], flat[1::2], strict=True))
        last = len(bands) - 1
        keys, values = (tensor[:, :, : queries.shape[2] - last] for tensor in bands[0])
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        causal, causal_lse = flash(queries[:, :, last:], keys, values, 0.0, True)
        if last == 0:
            output, lse, weights = causal, causal_lse, causal_lse.new_empty(0)
        else:
            output, lse, weights = _merged(causal, causal_lse, queries, bands)
        ctx.save_for_backward(queries, output, lse, weights, *flat)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        queries, output, lse, weights, *flat = ctx.saved_tensors
        bands = list(zip(flat[::2], flat[1::2], strict=True))
        last, (num_rows, head_dim), groups = len(bands) - 1, queries.shape[-2:], bands[0][0].shape[1]
        keys, values = (tensor[:, :, : num_rows - last] for tensor in bands[0])
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        part = (tensor[:, :, last:] for tensor in (upstream[0], queries))
        own = flash(*part, keys, values, output[:, :, last:], lse[:, :, last:], 0.0, True)
        if last == 0:
            return own
        wide = weights.dtype
        gradient = upstream[0].to(wide)
        mean = (gradient * output).sum(-1)  # [B, H, T], Σ over keys of weight · dweight
        q, g = _grouped(queries, groups).to(wide), _grouped(gradient, groups)
        to_queries = F.pad(own[0].to(wide), (0, 0, last, 0))
        by_group = _grouped(to_queries, groups)  # a view
        result = [F.pad(tensor, (0, 0, 0, last)) for tensor in own[1:]]
        for band in range(1, last + 1):
            shift = last - band
            key, value = (tensor.unsqueeze(2)[..., : num_rows - shift, :] for tensor in bands[band])
            weight, g_seen = _grouped(weights[band - 1], groups)[..., shift:], g[..., shift:, :]
            to_score = weight * ((g_seen * value).sum(-1) - _grouped(mean, groups)[..., shift:]) * head_dim**-0.5
            by_group[..., shift:, :] += to_score.unsqueeze(-1) * key
            to_key = (to_score.unsqueeze(-1) * q[..., shift:, :]).sum(2)
            to_value = (weight.unsqueeze(-1) * g_seen).sum(2)
            result += [F.pad(x, (0, 0, 0, shift)).to(queries.dtype) for x in (to_key, to_value)]
        return to_queries.to(queries.dtype), *result


@lru_cache(maxsize=1)
def _flex_kernel(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


@lru_cache(maxsize=32)
def _causal_blocks(num_rows: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, num_rows, num_rows, device=str(device))


def _flex(queries: Tensor, bands: Sequence[Band]) -> Tensor:
    """FlexAttention, whose log-sum-exp has a gradient. A CPU has its forward alone."""
    from torch.nn.attention.flex_attention import AuxRequest

    last = len(bands) - 1
    keys, values = (tensor[:, :, : queries.shape[2] - last] for tensor in bands[0])
    kernel = _flex_kernel(queries.device.type != "cpu")
    blocks = _causal_blocks(keys.shape[2], queries.device)
    causal, found = kernel(
        queries[:, :, last:], keys, values, block_mask=blocks, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    return _merged(causal, found.lse, queries, bands)[0]
