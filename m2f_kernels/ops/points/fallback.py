"""Point sampling, matching cost and point loss in plain PyTorch, for devices without a kernel. They cost no more than
the published code.

The published code is `grid_sample` at `2 * points - 1`, of targets cast to floating point.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype, without_autocast
from m2f_kernels.masks import FactoredMasks, Targets, grouped, listed
from m2f_kernels.ops._autograd import reference_gradients
from m2f_kernels.ops.points import reference
from m2f_kernels.ops.points.masks import CHUNK_BYTES

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


# ---------------------------------------------------------------- matching cost and point loss


def mask_matching_cost(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.mask_matching_cost`."""
    dtype = accumulation_dtype(logits.dtype)
    x, t = logits.to(dtype), labels.to(dtype)
    k = x.shape[1]
    cross_entropy = torch.addmm(F.softplus(x).sum(1, keepdim=True), x, t.T, alpha=-1) / k
    probability = x.sigmoid()
    total = probability.sum(1, keepdim=True) + t.sum(1)
    # 1 - (2 p t^T + 1) / (total + 1), with one step less.
    dice = (total - 2 * (probability @ t.T)) / (total + 1)
    return cross_entropy, dice


def matched_planes(masks: FactoredMasks, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The logits [M, h, w] of the masks that have a target."""
    embed, features = masks
    dtype = accumulation_dtype(embed.dtype)
    with without_autocast(embed.device):
        chosen = embed.flatten(0, 1)[rows].to(dtype).split(list(counts))
        images = features.flatten(2).to(dtype)
        products = [torch.mm(x, image) for x, image in zip(chosen, images.unbind(), strict=True)]
    planes = products[0] if len(products) == 1 else torch.cat(products)
    return planes.unflatten(1, features.shape[2:])


def _labels(targets: Sequence[Targets], target_rows: Tensor, counts: Sequence[int], grid: Tensor) -> Tensor:
    """Targets at each mask's own points, [M, K]; M masks in order of images, `counts` of each."""
    firsts = itertools.accumulate((len(x.pixels) for x in targets), initial=0)
    rows = [x - first if first else x for x, first in zip(target_rows.split(list(counts)), firsts, strict=False)]
    if all(x.marks is None for x in targets):
        chosen = [x.pixels[own] for x, own in zip(targets, rows, strict=True)]
        if len({(x.dtype, x.shape[1:]) for x in chosen}) == 1:
            masks = torch.cat(chosen) if len(chosen) > 1 else chosen[0]
            return sample_grid(floating(masks, grid.dtype).unsqueeze(1), grid).squeeze(1)
    parts = zip(targets, rows, grid.split(list(counts)), strict=True)
    return torch.cat([x for image, own, at in parts for x in _labels_of_image(image, own, at)])


def _labels_of_image(targets: Targets, rows: Tensor, grid: Tensor) -> Iterator[Tensor]:
    """The same for one image; masks of maps and run lengths are decoded a few at a time."""
    step = max(1, len(rows))
    if targets.marks is not None:
        step = targets_at_once(targets)
    for own, at in zip(rows.split(step), grid.split(step), strict=True):
        if len(own):
            yield sample_grid(floating(targets.dense(own), grid.dtype).unsqueeze(1), at).squeeze(1)


def point_mask_loss(
    mask_logits: Tensor,
    rows: Tensor | None,
    targets: Sequence[Targets],
    target_rows: Tensor,
    points: Tensor,
    counts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The two losses [M] of `reference.point_mask_loss`.

    `counts` are the numbers of masks of each image, their sum M. Without `rows` the planes are these masks, in order.
    """
    if points.shape[0] == 0:  # grid_sample refuses no images
        rows = target_rows if rows is None else rows
        return reference.point_mask_loss(mask_logits, rows, listed(targets), target_rows, points)[:2]
    dtype = accumulation_dtype(mask_logits.dtype)
    grid = grid_of(points.to(dtype))
    planes = mask_logits if rows is None else mask_logits[rows]
    x = sample_grid(planes.to(dtype).unsqueeze(1), grid).squeeze(1)
    return _losses(x, _labels(targets, target_rows, counts, grid))[:2]


def _losses(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy [M], dice [M] and probability [M, K] of logits and labels [M, K]."""
    cross_entropy = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1)
    s = x.sigmoid()
    return cross_entropy, 1 - (2 * (s * t).sum(1) + 1) / (s.sum(1) + t.sum(1) + 1), s


# ---------------------------------------------------------------- the registered operators, called directly


def loss_operator(
    mask_logits: Tensor, rows: Tensor, targets: Sequence[Tensor], target_rows: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.point_mask_loss`, with masks of images in any order."""
    if points.shape[0] == 0:  # grid_sample refuses no images
        return reference.point_mask_loss(mask_logits, rows, targets, target_rows, points)
    dtype = accumulation_dtype(mask_logits.dtype)
    grid = grid_of(points.to(dtype))
    x = sample_grid(mask_logits[rows].to(dtype).unsqueeze(1), grid).squeeze(1)
    t = torch.zeros_like(x)
    first = 0
    for image in grouped(targets):
        here = (target_rows >= first) & (target_rows < first + len(image.pixels))
        t[here] = torch.cat([t[:0], *_labels_of_image(image, target_rows[here] - first, grid[here])])
        first += len(image.pixels)
    return *_losses(x, t), t


def loss_operator_backward(
    grad_cross_entropy: Tensor,
    grad_dice: Tensor,
    rows: Tensor,
    points: Tensor,
    probability: Tensor,
    labels: Tensor,
    planes: int,
    height: int,
    width: int,
) -> Tensor:
    """As `reference.point_mask_loss_backward`."""
    gradient = reference.gradient_of_samples(grad_cross_entropy, grad_dice, probability, labels)
    pixels = labels.new_zeros(len(rows), 1, height, width)
    if pixels.numel():  # grid_sample refuses no images
        grid = grid_of(points.to(labels.dtype))
        (pixels,) = reference_gradients(lambda x: sample_grid(x, grid), gradient.unsqueeze(1), [pixels], [True])
    return labels.new_zeros(planes, height, width).index_add_(0, rows, pixels[:, 0])
