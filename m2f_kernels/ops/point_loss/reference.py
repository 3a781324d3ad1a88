"""Matching cost and point loss of masks in plain PyTorch: the definition that tests compare every kernel with.

Masked-attention Mask Transformer (Cheng et al., 2022), section 3.3: binary cross-entropy and dice over sampled points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype
from m2f_kernels.masks import Targets, grouped
from m2f_kernels.ops.point_sample import reference


def mask_matching_cost(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Matching costs of queries and targets, both sampled at the same K points.

    Args:
        logits: x, [Q, K].
        labels: t, [T, K].

    Returns:
        `(sum_k softplus(x) - x t^T) / K`, which is the mean binary cross-entropy, and
        `1 - (2 sigmoid(x) t^T + 1) / (sum_k sigmoid(x) + sum_k t + 1)`; both [Q, T] in the accumulation dtype.
    """
    dtype = accumulation_dtype(logits.dtype)
    x, t = logits.to(dtype), labels.to(dtype)
    cross_entropy = (F.softplus(x).sum(1, keepdim=True) - x @ t.T) / x.shape[1]
    probability = x.sigmoid()
    total = probability.sum(1, keepdim=True) + t.sum(1)
    return cross_entropy, 1 - (2 * probability @ t.T + 1) / (total + 1)


def sampled_targets(targets: Sequence[Tensor], target_rows: Tensor, points: Tensor) -> Tensor:
    """Targets at each mask's own points, [M, K]. `target_rows` [M] counts over all targets of all images.

    `targets` are :func:`m2f_kernels.masks.listed`.
    """
    samples = points.new_zeros(points.shape[:2])  # points are in the dtype of the arithmetic
    first = 0
    for masks, marks in grouped(targets):
        here = (target_rows >= first) & (target_rows < first + masks.shape[0])
        chosen = target_rows[here] - first
        if marks is not None:
            own = points[here].flatten(0, 1)
            rows = chosen.repeat_interleave(points.shape[1])[None]
            found = reference.sample_targets(Targets(masks, marks), own, rows).view(-1, points.shape[1])
        else:
            found = reference.point_sample(masks[chosen, None], points[here], exact=True)[:, 0]
        samples = samples.index_put((here,), found.to(samples.dtype))
        first += masks.shape[0]
    return samples


def point_losses(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice loss of each mask, from logits and labels [M, K] at its points."""
    cross_entropy = (F.softplus(x) - x * t).mean(1)
    probability = x.sigmoid()
    dice = 1 - (2 * (probability * t).sum(1) + 1) / (probability.sum(1) + t.sum(1) + 1)
    return cross_entropy, dice


def point_mask_loss(
    mask_logits: Tensor, rows: Tensor, targets: Sequence[Tensor], target_rows: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of M pairs of a predicted and a target mask at points [M, K, 2].

    Args:
        mask_logits: [P, h, w]; `rows` [M] says which of them.
        targets: for each image [T_i, H_i, W_i], floating point, bool or uint8, or a map of ids or run lengths as
            :func:`m2f_kernels.masks.listed` gives them; `target_rows` [M] counts over all.

    Returns:
        binary cross-entropy [M], dice [M], probability (sigmoid of the sampled logits) [M, K] and sampled targets
        [M, K], in the accumulation dtype.
    """
    dtype = accumulation_dtype(mask_logits.dtype)
    points = points.to(dtype)
    x = reference.point_sample(mask_logits[rows, None], points, exact=True)[:, 0]
    t = sampled_targets(targets, target_rows, points)
    return *point_losses(x, t), x.sigmoid(), t


def gradient_of_samples(grad_cross_entropy: Tensor, grad_dice: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Gradient of the sampled logits, from probability s and label t; all [M, K]."""
    overlap = 2 * (s * t).sum(1, keepdim=True) + 1
    total = s.sum(1, keepdim=True) + t.sum(1, keepdim=True) + 1
    gradient = grad_cross_entropy[:, None] * (s - t) / s.shape[1]
    return gradient + grad_dice[:, None] * s * (1 - s) * (overlap / total - 2 * t) / total


def point_mask_loss_backward(
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
    """Gradient [P, h, w] of the mask logits, from what :func:`point_mask_loss` returned."""
    gradient = gradient_of_samples(grad_cross_entropy, grad_dice, probability, labels)
    with torch.enable_grad():
        pixels = labels.new_zeros(rows.shape[0], 1, height, width).requires_grad_()
        sampled = reference.point_sample(pixels, points)[:, 0]
        (grad_pixels,) = torch.autograd.grad(sampled, pixels, gradient)
    return labels.new_zeros(planes, height, width).index_add(0, rows, grad_pixels[:, 0])
