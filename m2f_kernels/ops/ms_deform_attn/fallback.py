"""Deformable attention in plain PyTorch, for devices without a kernel. It costs no more than the published code.

The published code is Deformable DETR's `ms_deform_attn_core_pytorch` and its copies: `grid_sample` for each level, a
product with the weights, a sum. This one follows the rules of `reference.py` (coordinates that are not finite
contribute nothing), has locations in float32 whatever the inputs, and uses PyTorch's autograd, which saves the same
tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype
from m2f_kernels.ops.ms_deform_attn import reference
from m2f_kernels.ops.points.fallback import grid_of, keep_finite


def _images(value: Tensor, levels: Sequence[int]) -> Sequence[Tensor]:
    """Each level's part of the last axis."""
    sizes = [h * w for h, w in zip(levels[::3], levels[1::3], strict=True)]
    starts = list(levels[2::3])
    if starts == list(itertools.accumulate(sizes, initial=0))[:-1]:
        # The gradients of one split are joined once; those of slices would each be as large as value.
        return value.split(sizes, -1)
    return [value[..., start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _attend(value: Tensor, levels: Sequence[int], grid: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """value [N, S, H, D], grid [N, Q, H, K, 2] in `grid_sample`'s coordinates, weights [N, Q, H, K] -> [N, Q, H*D]."""
    n, _, heads, d = value.shape
    q = weights.shape[1]
    sampled = []
    images = _images(value.permute(0, 2, 3, 1), levels)
    for level, level_grid in enumerate(grid.transpose(1, 2).split(list(counts), 3)):
        h, w, _ = levels[3 * level : 3 * level + 3]
        image = images[level].reshape(n * heads, d, h, w)
        # Autograd of flatten would copy the gradient once more than that of reshape.
        level_grid = level_grid.reshape(n * heads, q, counts[level], 2)
        sampled.append(F.grid_sample(image, level_grid, align_corners=False))
    samples = sampled[0] if len(sampled) == 1 else torch.cat(sampled, -1)  # [N*H, D, Q, K]
    weights = weights.transpose(1, 2).reshape(n * heads, 1, q, -1)
    return (samples * weights).sum(-1).view(n, heads * d, q).transpose(1, 2).contiguous()


def ms_deform_attn(
    value: Tensor,
    levels: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
) -> Tensor:
    """As `reference.ms_deform_attn`."""
    if value.numel() == 0 or attention_weights.numel() == 0:  # grid_sample refuses no channels, no images
        return reference.ms_deform_attn(value, levels, sampling_locations, attention_weights, points_per_level)
    dtype = accumulation_dtype(value.dtype)
    grid = grid_of(sampling_locations.to(dtype))
    out = _attend(value.to(dtype), levels, grid, attention_weights.to(dtype), points_per_level)
    return out.to(value.dtype)


def ms_deform_attn_from_offsets(
    value: Tensor,
    levels: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    points_per_level: Sequence[int],
    offset_scale: float,
) -> Tensor:
    """As `reference.ms_deform_attn_from_offsets`."""
    if value.numel() == 0 or attention_logits.numel() == 0:
        return reference.ms_deform_attn_from_offsets(
            value, levels, reference_points, sampling_offsets, attention_logits, points_per_level, offset_scale
        )
    dtype = accumulation_dtype(value.dtype)
    points, offsets = reference_points.to(dtype), sampling_offsets.to(dtype)
    count = len(points_per_level)
    centre = torch.rsub(points[..., :2], -1, alpha=-2)
    if points.shape[-1] == 2:
        sides = [2 / side for level in range(count) for side in (levels[3 * level + 1], levels[3 * level])]
        step = offsets.new_tensor(sides).view(count, 2)
    else:
        # In the box's gradient an infinite offset times zero would be NaN. So products use finite numbers, and the
        # others are put back outside of autograd, as infinity times zero, which is NaN.
        centre = torch.add(centre, points[..., 2:].detach(), alpha=0)
        shares = offsets.new_tensor([2 * offset_scale / p for p in points_per_level]).view(count, 1)
        step = points[..., 2:] * shares  # [N, Q, L, 2]
        offsets = offsets.clone()
        with torch.no_grad():
            for x in (offsets, step):
                x.nan_to_num_(nan=0, posinf=0, neginf=0)
    if len(set(points_per_level)) == 1:
        shape = (*offsets.shape[:3], count, points_per_level[0], 2)
        centre, step = centre[:, :, None, :, None], step[..., None, :]
        step = step if points.shape[-1] == 2 else step[:, :, None]
        grid = torch.addcmul(centre, offsets.view(shape), step).flatten(3, 4)
    else:
        numbers = offsets.new_tensor(points_per_level, dtype=torch.int64)
        total = sum(points_per_level)
        centre = centre.repeat_interleave(numbers, 2, output_size=total)[:, :, None]
        step = step.repeat_interleave(numbers, -2, output_size=total)
        grid = torch.addcmul(centre, offsets, step if points.shape[-1] == 2 else step[:, :, None])
    if points.shape[-1] == 4:
        with torch.no_grad():
            grid.add_(sampling_offsets, alpha=0)
    weights = attention_logits.to(dtype).softmax(-1)
    out = _attend(value.to(dtype), levels, keep_finite(grid), weights, points_per_level)
    return out.to(value.dtype)
