"""The operators written in PyTorch's own operators, for formats without custom operators, such as ONNX.

`exported.run_decompositions(decompositions())` replaces each node of this package by the same mathematics in standard
operators. The references are not used as they are: they read values (`nonzero`) and shift bits, and sample by index
arithmetic where `grid_sample` does the same in one node. Docstrings name the differences, at inputs that are not
finite; tests compare every decomposition with its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import m2f_kernels  # noqa: F401 - defines the operators
from m2f_kernels._dtypes import accumulation_dtype
from m2f_kernels.masks import WORD
from m2f_kernels.ops.attention_mask import reference as attention_mask
from m2f_kernels.ops.points.reference import sample_dtype

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions of the operators that inference runs, for `torch.export.ExportedProgram.run_decompositions`.

    Returns:
        a new dictionary: operator -> function. Those of training (losses, matching, random points, gradients) are not
        in it and stay what they are.
    """
    return {
        torch.ops.m2f.ms_deform_attn.default: ms_deform_attn,
        torch.ops.m2f.ms_deform_attn_from_offsets.default: ms_deform_attn_from_offsets,
        torch.ops.m2f.resize_mask_features.default: resize_mask_features,
        torch.ops.m2f.predict_attention_mask.default: predict_attention_mask,
        torch.ops.m2f.pack_attention_mask.default: pack_attention_mask,
        torch.ops.m2f.masked_attention.default: masked_attention,
        torch.ops.m2f.masked_attention_with_bias.default: masked_attention_with_bias,
        torch.ops.m2f.point_sample.default: point_sample,
    }


# ---------------------------------------------------------------- sampling


def _sampling_grid(locations: Tensor) -> Tensor:
    """Locations in [0, 1] as `grid_sample` counts them, in [-1, 1].

    NaN and coordinates far outside are moved to just outside, where they contribute zero: runtimes disagree about the
    pixel of a NaN or an infinite coordinate.
    """
    return 2 * torch.where(locations.isnan(), -1, locations).clamp(-1, 2) - 1


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def ms_deform_attn(
    value: Tensor,
    levels: Sequence[int],
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    points_per_level: Sequence[int],
) -> Tensor:
    """One `grid_sample` per level; where the sizes are tensors, four `gather` of all levels at once.

    Unlike the operator's, a sample outside its level contributes NaN where its weight is not finite.
    """
    dtype = accumulation_dtype(value.dtype)
    v, x, w = value.to(dtype), locations.to(dtype), weights.to(dtype).transpose(1, 2)  # w [N, H, Q, K]
    if levels:
        samples = _sample_levels(v, levels, x, points_per_level)
    else:
        assert spatial_shapes is not None
        assert level_start_index is not None
        samples = _gather_levels(v, spatial_shapes, level_start_index, x, points_per_level)
    out = sum((s * part.unsqueeze(2)).sum(-1) for s, part in zip(samples, _parts(w, samples), strict=True))
    assert isinstance(out, Tensor)  # [N, H, D, Q]
    return out.permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def _parts(weights: Tensor, samples: Sequence[Tensor]) -> Iterator[Tensor]:
    first = 0
    for points in (s.shape[-1] for s in samples):
        yield weights[..., first : first + points]
        first += points


def _sample_levels(
    value: Tensor, levels: Sequence[int], locations: Tensor, points_per_level: Sequence[int]
) -> list[Tensor]:
    """Per level [N, H, D, Q, P]."""
    n, _, heads, d = value.shape
    grid = _sampling_grid(locations).transpose(1, 2).flatten(0, 1)  # [N*H, Q, K, 2]
    samples, first = [], 0
    for i, points in enumerate(points_per_level):
        h, w, start = levels[3 * i : 3 * i + 3]
        image = value.narrow(1, start, h * w).permute(0, 2, 3, 1).reshape(n * heads, d, h, w)
        samples.append(_sample(image, grid[:, :, first : first + points]).unflatten(0, (n, heads)))
        first += points
    return samples


def _gather_levels(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, locations: Tensor, points_per_level: Sequence[int]
) -> list[Tensor]:
    """The same where the sizes of the levels are data, by index arithmetic."""
    d = value.shape[3]
    rows = value.permute(0, 2, 3, 1)  # [N, H, D, S]
    samples, first = [], 0
    for i, points in enumerate(points_per_level):
        height, width, start = spatial_shapes[i, 0], spatial_shapes[i, 1], level_start_index[i]
        x, y = locations[:, :, :, first : first + points].transpose(1, 2).unbind(-1)  # [N, H, Q, P]
        first += points
        x, y = x * width - 0.5, y * height - 0.5
        # Comparisons with NaN are false.
        contributes = (x > -1) & (x < width) & (y > -1) & (y < height)
        x, y = torch.where(contributes, x, 0), torch.where(contributes, y, 0)
        x0, y0 = x.floor(), y.floor()
        fx, fy = x - x0, y - y0
        total = torch.zeros((), dtype=value.dtype, device=value.device)
        for dy in (0, 1):
            for dx in (0, 1):
                cx, cy = x0.long() + dx, y0.long() + dy
                inside = contributes & (cx >= 0) & (cx < width) & (cy >= 0) & (cy < height)
                pixel = torch.where(inside, start + cy * width + cx, 0).flatten(2)  # [N, H, Q*P]
                corner = rows.gather(3, pixel.unsqueeze(2).expand(-1, -1, d, -1)).unflatten(3, x.shape[2:])
                weight = (fx if dx else 1 - fx) * (fy if dy else 1 - fy)
                total = total + torch.where(inside, weight, 0).unsqueeze(2) * corner
        samples.append(total)
    return samples


def ms_deform_attn_from_offsets(
    value: Tensor,
    levels: Sequence[int],
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    points_per_level: Sequence[int],
    offset_scale: float,
) -> Tensor:
    """The softmax and the locations in front of :func:`ms_deform_attn`."""
    dtype = accumulation_dtype(value.dtype)
    refs, offsets = reference_points.to(dtype), offsets.to(dtype)
    per_level, first = [], 0
    for i, points in enumerate(points_per_level):
        ref = refs[:, :, i, None, None]  # [N, Q, 1, 1, 2 or 4]
        offset = offsets[:, :, :, first : first + points]
        first += points
        if refs.shape[-1] == 4:
            per_level.append(ref[..., :2] + offset / points * ref[..., 2:] * offset_scale)
            continue
        if levels:
            h, w = levels[3 * i], levels[3 * i + 1]
            per_level.append(ref + torch.stack([offset[..., 0] / w, offset[..., 1] / h], -1))
        else:
            assert spatial_shapes is not None
            per_level.append(ref + offset / spatial_shapes[i].flip(0).to(dtype))
    locations = torch.cat(per_level, 3)
    weights = logits.to(dtype).softmax(-1)
    return ms_deform_attn(value, levels, spatial_shapes, level_start_index, locations, weights, points_per_level)


def point_sample(input: Tensor, points: Tensor, exact: bool) -> Tensor:
    """One `grid_sample`; bool and uint8 inputs, which are masks, are cast whole."""
    dtype = torch.promote_types(accumulation_dtype(input.dtype), points.dtype)
    if input.dtype == torch.uint8:
        input = input != 0
    samples = _sample(input.to(dtype), _sampling_grid(points.to(dtype)).unsqueeze(1)).squeeze(2)
    return samples if exact else samples.to(sample_dtype(input.dtype, exact))


# ---------------------------------------------------------------- masks
# Packed by multiplication and unpacked by remainders: ONNX shifts unsigned integers only.


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(WORD, device=device)


def _pack(attend: Tensor) -> tuple[Tensor, Tensor]:
    n, q, s = attend.shape
    words = (s + WORD - 1) // WORD
    padded = F.pad(attend.long(), (0, words * WORD - s)).view(n, q, words, WORD)
    bits = (padded * _powers(attend.device)).sum(-1)
    return torch.where(bits >= 2**31, bits - 2**32, bits).int(), attend.any(-1)


def _unpack(bits: Tensor, row_any: Tensor, num_keys: int) -> Tensor:
    powers = _powers(bits.device)
    # A remainder has the sign of its divisor, so this holds for negative words too.
    attend = bits.long().unsqueeze(-1) % (2 * powers) >= powers
    return attend.flatten(-2)[..., :num_keys] | ~row_any.unsqueeze(-1)


def resize_mask_features(mask_features: Tensor, sizes: Sequence[int]) -> Tensor:
    return attention_mask.resize_mask_features(mask_features, sizes)


def predict_attention_mask(mask_embed: Tensor, level_features: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(mask_embed.dtype)
    return _pack(attention_mask.attends(mask_embed.to(dtype) @ level_features.to(dtype)))


def pack_attention_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    return _pack(mask if mask.dtype == torch.bool else attention_mask.attends(mask))


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, bits: Tensor, row_any: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax over the scores of the attended keys.

    Unlike the operator's, a blocked key or value that is not finite makes the output NaN.
    """
    return _attention(query, key, value, bits, row_any, scale, None)


def masked_attention_with_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: Tensor,
    row_any: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same with a bias of rows and columns of keys."""
    dtype = accumulation_dtype(query.dtype)
    bias = (by_row.to(dtype).unsqueeze(-1) + by_column.to(dtype).unsqueeze(-2)).flatten(-2)
    return _attention(query, key, value, bits, row_any, scale, bias)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bits: Tensor, row_any: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    scores = (query.to(dtype) * scale) @ key.to(dtype).transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    rows, queries = bits.shape[1], query.shape[2]
    if rows > 0:  # else no query has a mask
        attend = _unpack(bits, row_any, key.shape[2])
        if rows != queries:  # the others attend everywhere
            attend = torch.cat(
                [attend, attend.new_ones(1, 1, 1).expand(len(attend), queries - rows, attend.shape[2])], 1
            )
        scores = torch.where(attend.unsqueeze(1), scores, -torch.inf)
    output = scores.softmax(-1) @ value.to(dtype)
    return output.transpose(1, 2).to(query.dtype).contiguous(), scores.logsumexp(-1)
