"""Point sampling in plain PyTorch for where no kernel serves: no more work than the published form.

That form is `grid_sample` at `2 * points - 1`, of targets cast to floating point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype
from m2f_kernels.masks import Targets
from m2f_kernels.ops.point_sample import reference
from m2f_kernels.ops.point_sample.masks import CHUNK_BYTES

#: In the coordinates of `grid_sample`, from -1 to 1 inside: far enough outside for images of one pixel too.
OUTSIDE = 4.0


def keep_finite(grid: Tensor) -> Tensor:
    """`grid` with what is not finite or far outside moved to where it contributes nothing, in place.

    Not recorded by autograd: the gradient there is zero already, and elsewhere nothing changes.
    """
    with torch.no_grad():
        grid.clamp_(-OUTSIDE, OUTSIDE).nan_to_num_(OUTSIDE)
    return grid


def grid_of(points: Tensor) -> Tensor:
    """Points [..., 2] in the coordinates of `grid_sample`, all finite."""
    return keep_finite(torch.rsub(points, -1, alpha=-2))  # 2 x - 1 in one step


def floating(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """bool, uint8 (any value but 0 counts as 1) or floating point masks in a floating dtype."""
    if masks.dtype == torch.uint8:
        return masks.clamp(max=1.0).to(dtype)  # a bound of floating point makes the result that, in one step
    return masks.to(dtype)


def sample_grid(images: Tensor, grid: Tensor) -> Tensor:
    """Floating images [N, C, h, w] at [N, K, 2] of `grid_of`: [N, C, K]."""
    return F.grid_sample(images, grid.unsqueeze(2), align_corners=False).squeeze(3)


def point_sample(input: Tensor, points: Tensor, exact: bool = False) -> Tensor:
    """As `reference.point_sample`."""
    if input.numel() == 0 or points.numel() == 0:  # grid_sample refuses no channels, no images
        return reference.point_sample(input, points, exact)
    dtype = torch.float64 if torch.float64 in (input.dtype, points.dtype) else torch.float32
    samples = sample_grid(floating(input, dtype), grid_of(points.to(dtype)))
    return samples if exact else samples.to(reference.sample_dtype(input.dtype, exact))


def sample_targets(targets: Targets, points: Tensor) -> Tensor:
    """As `reference.sample_targets`, from a few dense masks at a time: the bits that dense masks give."""
    rows = torch.arange(len(targets.pixels), device=points.device)
    parts = [x for x in rows.split(targets_at_once(targets)) if len(x)]
    found = [point_sample(targets.dense(x)[None], points[None], exact=True)[0] for x in parts]
    return torch.cat(found) if found else points.new_empty(0, len(points))


def targets_at_once(targets: Targets) -> int:
    """How many of them are dense at a time: looking them up takes 8 bytes for each pixel."""
    return max(1, CHUNK_BYTES // (8 * targets.pixels.shape[1] * targets.pixels.shape[2]))


def uncertain_points(
    mask_logits: Tensor, rows: Tensor, seed: Tensor, first_stream: int, candidates: int, keep: int, fresh: int
) -> Tensor:
    """As `reference.uncertain_points`, the same points.

    The random numbers are the operator's own, Philox in 64-bit integers: a hundred operations, where PyTorch's
    generator would be one. Its numbers would be others than those of the kernels, and would depend on the device and on
    how masks are divided into chunks, which the operator rules out. All else is within the limits of a fallback.
    """
    streams = first_stream + torch.arange(rows.shape[0], device=rows.device)
    points = reference.uniform_points(seed, streams, 0, candidates + fresh)
    return most_uncertain(mask_logits, rows, points[:, :candidates], points[:, candidates:], keep)


def most_uncertain(mask_logits: Tensor, rows: Tensor, drawn: Tensor, fresh: Tensor, keep: int) -> Tensor:
    """Of random points [M, *, 2] the `keep` most uncertain, in their order, and then `fresh` ones: [M, K, 2]."""
    if rows.shape[0] == 0:  # grid_sample refuses no images
        return drawn.new_empty(0, keep + fresh.shape[1], 2)
    planes = mask_logits[rows].to(accumulation_dtype(mask_logits.dtype)).unsqueeze(1)
    # Random points are in [0, 1): nothing to keep out.
    logits = sample_grid(planes, torch.rsub(drawn, -1, alpha=-2)).squeeze(1)
    order = logits.abs().neg_().sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(1).values
    return torch.cat([drawn.gather(1, order[..., None].expand(-1, -1, 2)), fresh], 1)
