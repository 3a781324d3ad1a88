"""Point sampling in plain PyTorch, for devices without a kernel. It costs no more than the published code.

The published code is `grid_sample` at `2 * points - 1`, of targets cast to floating point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype
from m2f_kernels.masks import Targets
from m2f_kernels.ops.point_sample import reference
from m2f_kernels.ops.point_sample.masks import CHUNK_BYTES

#: A coordinate of `grid_sample` (-1 to 1 is inside) that is far enough outside even for images of one pixel.
OUTSIDE = 4.0


def keep_finite(grid: Tensor) -> Tensor:
    """`grid`, in place, with points that are not finite or far outside moved to where they contribute nothing.

    Autograd does not record this: the gradient of these points is zero already, and the others are unchanged.
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
        return masks.clamp(max=1.0).to(dtype)  # clamping to a floating-point bound also converts, in one step
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
    """As `reference.sample_targets`, from a few dense masks at a time; bitwise as from dense masks."""
    rows = torch.arange(len(targets.pixels), device=points.device)
    parts = [x for x in rows.split(targets_at_once(targets)) if len(x)]
    found = [point_sample(targets.dense(x)[None], points[None], exact=True)[0] for x in parts]
    return torch.cat(found) if found else points.new_empty(0, len(points))


def targets_at_once(targets: Targets) -> int:
    """The number of masks that are dense at a time: looking one up takes 8 bytes for each pixel."""
    return max(1, CHUNK_BYTES // (8 * targets.pixels.shape[1] * targets.pixels.shape[2]))


def uncertain_points(
    mask_logits: Tensor, rows: Tensor, seed: Tensor, first_stream: int, candidates: int, keep: int, fresh: int
) -> Tensor:
    """As `reference.uncertain_points`, the same points.

    The random numbers are the operator's own, Philox in 64-bit integers: a hundred operations, where PyTorch's
    generator would be one. PyTorch's numbers would differ from the kernels', and depend on the device and on the
    division of masks into chunks, which the operator excludes. All other steps are within the limits of a fallback.
    """
    streams = first_stream + torch.arange(rows.shape[0], device=rows.device)
    points = reference.uniform_points(seed, streams, 0, candidates + fresh)
    return most_uncertain(mask_logits, rows, points[:, :candidates], points[:, candidates:], keep)


def most_uncertain(mask_logits: Tensor, rows: Tensor, drawn: Tensor, fresh: Tensor, keep: int) -> Tensor:
    """The `keep` most uncertain of random points [M, *, 2], in their order, then the `fresh` ones: [M, K, 2]."""
    if rows.shape[0] == 0:  # grid_sample refuses no images
        return drawn.new_empty(0, keep + fresh.shape[1], 2)
    planes = mask_logits[rows].to(accumulation_dtype(mask_logits.dtype)).unsqueeze(1)
    # Random points are in [0, 1): nothing to keep out.
    logits = sample_grid(planes, torch.rsub(drawn, -1, alpha=-2)).squeeze(1)
    order = logits.abs().neg_().sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(1).values
    return torch.cat([drawn.gather(1, order[..., None].expand(-1, -1, 2)), fresh], 1)
