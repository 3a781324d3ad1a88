"""Matching cost and point loss of masks in plain PyTorch, for devices without a kernel. They cost no more than the
published code, which samples logits and targets by `grid_sample`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype, without_autocast
from m2f_kernels.masks import FactoredMasks, Targets, grouped, listed
from m2f_kernels.ops._autograd import reference_gradients
from m2f_kernels.ops.point_loss import reference
from m2f_kernels.ops.point_sample.fallback import floating, grid_of, sample_grid, targets_at_once


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
