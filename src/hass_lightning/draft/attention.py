"""Attention of an alignment step, in the implementations selected by `model.draft.attention` (docs/method.md, HCA).

Band 0 holds the keys and values of the target features, band i those of the features predicted by step i. In step j,
position t attends to the target features up to t-(j-1) and to one key of each predicted band, under one softmax.
`eager` computes all T x T scores and is the reference implementation. `flash` and `flex` run a library kernel on the
causal part and merge the j-1 single keys by log-sum-exp, so their memory is linear in T.
Shapes: B batch, T positions, H heads, G key/value heads, d head size, J bands (see the legend in types.py).
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
    """Return `form` if it names an implementation.

    Raises:
        ValueError: if it does not.
    """
    if form not in get_args(Form):
        raise ValueError(f"model.draft.attention={form} is none of {', '.join(get_args(Form))}.")
    return form  # type: ignore[return-value]


def visible(num_rows: int, num_bands: int, band: int, device: torch.device | str = "cpu") -> Tensor:
    """Attention mask of `band` in the step with `num_bands` bands: bool [T, T] (query, key)."""
    row = torch.arange(num_rows, device=device)[:, None]
    column = torch.arange(num_rows, device=device)[None, :]
    if band == 0:
        return column <= row - (num_bands - 1)
    return column == row - (num_bands - 1 - band)


def banded_attention(queries: Tensor, bands: Sequence[Band], form: Form = "eager", leaky: bool = False) -> Tensor:
    """Attention of step `len(bands)`: causal over the target features, one diagonal per predicted band, one softmax.

    Args:
        queries: [B, H, T, d], queries of the last band.
        bands: keys and values of each band, the target features first.
        form: implementation; `auto` is flash on a CPU and eager elsewhere.
        leaky: use the softmax of the official code (docs/method.md, HCA).

    Returns:
        Attention output [B, H, T, d].

    Raises:
        ValueError: if `form` is `flash` and the device is not a CPU.
    """
    device = queries.device.type
    if form == "flash" and device != "cpu":
        raise ValueError(f"model.draft.attention=flash supports only CPUs, not {device}: use flex or auto.")
    if leaky:
        return _leaky(queries, bands)
    if queries.shape[2] < len(bands):  # no position attends to a target feature
        return _eager(queries, bands)
    if form == "flash" or (form == "auto" and device == "cpu"):
        return _Flash.apply(queries, *(tensor for band in bands for tensor in band))  # type: ignore[no-untyped-call]
    return _flex(queries, bands) if form == "flex" else _eager(queries, bands)


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """Group the query heads by their key/value head: [B, H, ...] to [B, G, H/G, ...]."""
    return x.unflatten(1, (num_groups, -1))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _eager_weights(queries: Tensor, bands: Sequence[Band]) -> Tensor:
    """Softmax weights [B, G, H/G, T, T+J-1]: over the target features, then over the single keys of bands 1 … J-1."""
    num_rows, head_dim = queries.shape[-2:]
    true_keys = bands[0][0].unsqueeze(2)
    q = _grouped(queries, true_keys.shape[1]) * head_dim**-0.5
    row = torch.arange(num_rows, device=q.device)
    # finfo.min instead of -inf: positions without a target feature (t < j-1) would give NaN in the backward pass
    lowest = torch.finfo(q.dtype).min
    unseen = ~visible(num_rows, len(bands), 0, q.device)
    scores = [(q @ true_keys.transpose(-1, -2)).masked_fill(unseen, lowest)]  # [B, G, H/G, T, T]
    for band in range(1, len(bands)):
        shift = len(bands) - 1 - band
        diagonal = (q * _shift(bands[band][0], shift).unsqueeze(2)).sum(-1).masked_fill(row < shift, lowest)
        scores.append(diagonal.unsqueeze(-1))
    return torch.cat(scores, dim=-1).softmax(-1, dtype=_wide(q.dtype)).to(q.dtype)


def _eager(queries: Tensor, bands: Sequence[Band]) -> Tensor:
    """Reference implementation."""
    num_rows = queries.shape[-2]
    weights = _eager_weights(queries, bands)
    output = weights[..., :num_rows] @ bands[0][1].unsqueeze(2)
    for band in range(1, len(bands)):
        value = _shift(bands[band][1], len(bands) - 1 - band).unsqueeze(2)
        output = output + weights[..., num_rows + band - 1, None] * value
    return output.reshape(queries.shape)


def predicted_share(queries: Tensor, bands: Sequence[Band]) -> Tensor:
    """Share of the attention on predicted features in step `len(bands)`: [B, H, T], 0 in the first step.

    Args:
        queries: [B, H, T, d], queries of the last band.
        bands: keys and values of each band, the target features first.
    """
    return _eager_weights(queries, bands)[..., queries.shape[-2] :].sum(-1).flatten(1, 2)


def _shift(x: Tensor, count: int) -> Tensor:
    """Shift `x` by `count` along the token axis (-2), filling with zeros."""
    if count == 0:
        return x
    return torch.cat([torch.zeros_like(x[..., :count, :]), x[..., :-count, :]], dim=-2)


def _leaky(queries: Tensor, bands: Sequence[Band]) -> Tensor:
    """The official softmax: the bands' masked scores are summed, masked columns count as exp(0), weights are masked.

    The official code gives a sequence of L tokens L rows, the last of them padding (its loss mask is 0); here it has
    the L-1 rows that have a target. So each softmax gets the column of that row as well: masked, with the score 0.
    """
    num_rows, head_dim = queries.shape[-2:]
    q = _grouped(queries, bands[0][0].shape[1]) * head_dim**-0.5
    masks = [visible(num_rows, len(bands), band, q.device) for band in range(len(bands))]
    pairs = list(zip(bands, masks, strict=True))
    scores = sum((q @ keys.unsqueeze(2).transpose(-1, -2)) * mask for (keys, _), mask in pairs)
    weights = F.pad(scores, (0, 1)).softmax(-1)[..., :-1]
    output: Tensor = sum((weights * mask) @ values.unsqueeze(2) for (_, values), mask in pairs)  # type: ignore[assignment]
    return output.reshape(queries.shape)


def _merged(
    causal: Tensor, causal_lse: Tensor, queries: Tensor, bands: Sequence[Band]
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the causal attention and the single keys of the predicted bands into one softmax.

    Args:
        causal: [B, H, T-(J-1), d], attention output of the last positions over the target features.
        causal_lse: [B, H, T-(J-1)], its log-sum-exp.

    Returns:
        The output [B, H, T, d], its log-sum-exp [B, H, T] and the weights of the single keys [J-1, B, H, T].
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
    """PyTorch's CPU flash attention kernel on the causal part, merged with the single keys.

    The kernel's log-sum-exp has no gradient, and none is needed: given the *merged* output and log-sum-exp, the flash
    backward computes the gradient of its keys under the full softmax (as in ring attention, arXiv 2310.01889).
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
def _flex_kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


@lru_cache(maxsize=32)
def _causal_blocks(num_rows: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, num_rows, num_rows, device=str(device))


def _flex(queries: Tensor, bands: Sequence[Band]) -> Tensor:
    """FlexAttention, whose log-sum-exp has a gradient. On a CPU it has only the forward pass."""
    from torch.nn.attention.flex_attention import AuxRequest

    last = len(bands) - 1
    keys, values = (tensor[:, :, : queries.shape[2] - last] for tensor in bands[0])
    kernel = _flex_kernel(queries.device.type != "cpu")
    blocks = _causal_blocks(keys.shape[2], queries.device)
    causal, found = kernel(
        queries[:, :, last:], keys, values, block_mask=blocks, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    return _merged(causal, found.lse, queries, bands)[0]
