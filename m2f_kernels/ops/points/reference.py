"""Point sampling, matching cost and point loss in plain PyTorch: the definition that tests compare every kernel with.

PointRend (Kirillov et al., 2020), sections 3.1 and 4.1.1; Mask2Former (Cheng et al., 2022), section 3.3. Random points
come from the counter-based generator Philox (Salmon et al., 2011), so that a point depends on the seed, the mask's
number and its own number only: not on the device, the number of threads, or how masks are divided into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype
from m2f_kernels.masks import Targets, grouped


def sample_dtype(dtype: torch.dtype, exact: bool) -> torch.dtype:
    """The dtype of samples: that of a floating input, float32 for bool and uint8; with `exact` at least float32."""
    return accumulation_dtype(dtype) if exact or not dtype.is_floating_point else dtype


def point_sample(input: Tensor, points: Tensor, exact: bool = False) -> Tensor:
    """Bilinear samples at `points * (w, h) - 0.5`; pixels outside are zero, and so is a sample at a NaN coordinate.

    Only the four corners of each point are read, so that a bool input is never cast as a whole. A uint8 input is a
    mask, too: any value but 0 counts as 1.

    Args:
        input: [N, C, h, w], floating point, bool or uint8.
        points: [N, K, 2], (x, y) in [0, 1].
        exact: leave samples in the dtype of the arithmetic, which float64 points make float64.

    Returns:
        [N, C, K].
    """
    height, width = input.shape[2:]
    dtype = torch.promote_types(accumulation_dtype(input.dtype), points.dtype)
    pixels = input.flatten(2)

    def corner(row: Tensor, column: Tensor) -> Tensor:
        found = pixels.gather(2, (row * width + column)[:, None].expand(-1, pixels.shape[1], -1))
        return found if found.is_floating_point() else found != 0

    total = _bilinear(corner, points, height, width, dtype)
    return total if exact else total.to(sample_dtype(input.dtype, exact))


def sample_targets(targets: Targets, points: Tensor, rows: Tensor | None = None) -> Tensor:
    """Bilinear samples of an image's targets, in any of their forms, by the rules of :func:`point_sample`.

    Args:
        targets: T of them.
        points: [K, 2], (x, y) in [0, 1].
        rows: [C, K], the index of the target at each point; None for all targets at every point.

    Returns:
        [C, K], C = T for None, in float32 or the points' dtype.
    """
    masks, marks = targets
    count, height, width = masks.shape
    chosen = torch.arange(count, device=masks.device)[:, None] if rows is None else rows
    dtype = torch.promote_types(torch.float32 if marks is not None else accumulation_dtype(masks.dtype), points.dtype)
    return _bilinear(lambda row, column: targets.at(chosen, row, column)[None], points[None], height, width, dtype)[0]


def _bilinear(
    corner: Callable[[Tensor, Tensor], Tensor], points: Tensor, height: int, width: int, dtype: torch.dtype
) -> Tensor:
    """[N, C, K] at points [N, K, 2]; `corner` gives pixels [N, C, K] at rows and columns [N, K]."""
    location = points.to(dtype)
    x = location[..., 0] * width - 0.5
    y = location[..., 1] * height - 0.5
    # Comparisons with NaN are false, so a NaN coordinate contributes nothing.
    contributes = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = torch.where(contributes, x, 0), torch.where(contributes, y, 0)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    total = torch.zeros((), dtype=dtype, device=points.device)
    for dy in (0, 1):
        for dx in (0, 1):
            cx, cy = x0.long() + dx, y0.long() + dy
            inside = contributes & (cx >= 0) & (cx < width) & (cy >= 0) & (cy < height)
            pixels = corner(cy.clamp(0, height - 1), cx.clamp(0, width - 1)).to(dtype)
            weight = (fx if dx else 1 - fx) * (fy if dy else 1 - fy)
            total = total + torch.where(inside[:, None], weight[:, None] * pixels, 0)
    return total


# ---------------------------------------------------------------- random points

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32-10: four words of 32 random bits for each counter of four words; all int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # the wrapped product has the right bits
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def uniform_points(seed: Tensor, streams: Tensor, first: int, count: int) -> Tensor:
    """Points `first` to `first + count` of each stream, float32 [M, count, 2], uniform in [0, 1).

    Points 2j and 2j + 1 of stream m are the four words of counter (j, m, 0, 0), each as its upper 24 bits times 2^-24.
    """
    j = torch.arange(first // 2, (first + count + 1) // 2, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = torch.stack(philox((j, streams[:, None], zero, zero), seed), -1)  # [M, J, 4]
    pairs = ((words >> 8).float() * 2.0**-24).unflatten(-1, (2, 2)).flatten(1, 2)
    return pairs[:, first % 2 : first % 2 + count]


def uncertain_points(
    mask_logits: Tensor, rows: Tensor, seed: Tensor, first_stream: int, candidates: int, keep: int, fresh: int
) -> Tensor:
    """Of `candidates` uniform points the `keep` with smallest |logit|, in their order, then `fresh` uniform ones.

    Of equally uncertain points the first are kept; a NaN counts as most uncertain, as in `torch.topk`.

    Args:
        mask_logits: [P, h, w].
        rows: int64 [M], which of them; the m-th draws from stream `first_stream + m`.
        seed: int64 [1].

    Returns:
        float32 [M, keep + fresh, 2].
    """
    streams = first_stream + torch.arange(rows.shape[0], device=rows.device)
    points = uniform_points(seed, streams, 0, candidates)
    logits = point_sample(mask_logits[rows, None], points, exact=True)[:, 0]
    order = (-logits.abs()).sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(1).values
    kept = points.gather(1, order[..., None].expand(-1, -1, 2))
    return torch.cat([kept, uniform_points(seed, streams, candidates, fresh)], 1)


# ---------------------------------------------------------------- matching cost and point loss


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
            found = sample_targets(Targets(masks, marks), own, rows).view(-1, points.shape[1])
        else:
            found = point_sample(masks[chosen, None], points[here], exact=True)[:, 0]
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
    x = point_sample(mask_logits[rows, None], points, exact=True)[:, 0]
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
        sampled = point_sample(pixels, points)[:, 0]
        (grad_pixels,) = torch.autograd.grad(sampled, pixels, gradient)
    return labels.new_zeros(planes, height, width).index_add(0, rows, grad_pixels[:, 0])
