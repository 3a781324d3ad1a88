"""Triton kernels of matching cost and point loss: see `reference.py` for what they compute.

Sums over points are taken per block and then over blocks, always in the same order; the gradient of the logits is
scattered in fixed point (see `point_sample/triton.py`). Nothing here waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels._triton import dot, launch
from m2f_kernels.ops.point_sample.triton import bilinear, dense_planes, fixed_point_scale, scatter, to_float

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid_softplus(x):
    """Both from one exponential of -|x|, log(1 + e) as 2 artanh(e / (2 + e)), which is accurate for small e too."""
    e = tl.exp2(-tl.abs(x) * _LOG2E)
    inverse = 1.0 / (1.0 + e)
    sigmoid = tl.where(x < 0, e * inverse, inverse)
    s = e / (2.0 + e)
    s2 = s * s
    p = s2 * (2.0 / 15) + 2.0 / 13
    p = p * s2 + 2.0 / 11
    p = p * s2 + 2.0 / 9
    p = p * s2 + 2.0 / 7
    p = p * s2 + 2.0 / 5
    p = p * s2 + 2.0 / 3
    p = p * s2 + 2.0
    return sigmoid, p * s + tl.where(x < 0, 0.0, x)


# ---------------------------------------------------------------- matching cost


@triton.jit(do_not_specialize=["num_queries", "num_targets", "num_points", "part"])
def _cost_kernel(
    logits, labels, products, sums, logits_q, labels_t, num_queries, num_targets, num_points, part,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: both products of BLOCK_Q queries with BLOCK_T targets over one part of the points."""
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2).to(tl.int64)
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, num_points)
    x_total = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)
    sigmoid_total = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)
    softplus_sum = tl.zeros((BLOCK_Q,), tl.float32)
    sigmoid_sum = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (q < num_queries)[:, None] & (k < last)[None, :]
        x = tl.load(logits + q.to(tl.int64)[:, None] * logits_q + k[None, :], mask=inside, other=0.0)
        y = tl.load(
            labels + t.to(tl.int64)[:, None] * labels_t + k[None, :],
            mask=(t < num_targets)[:, None] & (k < last)[None, :], other=0.0,
        )  # fmt: skip
        sigmoid, softplus = sigmoid_softplus(x)
        sigmoid = tl.where(inside, sigmoid, 0.0)
        softplus_sum += tl.sum(tl.where(inside, softplus, 0.0), axis=1)
        sigmoid_sum += tl.sum(sigmoid, axis=1)
        y = tl.trans(y)
        x_total += dot(x, y)
        sigmoid_total += dot(sigmoid, y)
    to = products + (split * 2 * num_queries + q)[:, None] * num_targets + t[None, :]
    stored = (q < num_queries)[:, None] & (t < num_targets)[None, :]
    tl.store(to, x_total, mask=stored)
    tl.store(to + num_queries.to(tl.int64) * num_targets, sigmoid_total, mask=stored)
    if tl.program_id(1) == 0:
        tl.store(sums + split * 2 * num_queries + q, softplus_sum, mask=q < num_queries)
        tl.store(sums + (split * 2 + 1) * num_queries + q, sigmoid_sum, mask=q < num_queries)


def mask_matching_cost(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`m2f::mask_matching_cost`: logits [Q, K], labels [T, K], float32."""
    q, k = logits.shape
    t = labels.shape[0]
    if q * t == 0:
        return logits.new_empty(q, t), logits.new_empty(q, t)
    logits, labels = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (logits, labels))
    block_q, block_t, block_k = 32, min(max(triton.next_power_of_2(t), 16), 32), 32
    # Enough parts to fill the device with a few hundred programs.
    programs = triton.cdiv(q, block_q) * triton.cdiv(t, block_t)
    parts = max(1, min(triton.cdiv(k, 512), triton.cdiv(512, programs)))
    part = triton.cdiv(triton.cdiv(k, parts), block_k) * block_k
    parts = triton.cdiv(k, part)
    products, sums = logits.new_empty(parts, 2, q, t), logits.new_empty(parts, 2, q)
    launch(
        _cost_kernel, (triton.cdiv(q, block_q), triton.cdiv(t, block_t), parts), logits, labels, products, sums,
        logits.stride(0), labels.stride(0), q, t, k, part,
        BLOCK_Q=block_q, BLOCK_T=block_t, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    x_product, sigmoid_product = products.sum(0).unbind()
    softplus_sum, sigmoid_sum = sums.sum(0)[:, :, None].unbind()
    total = sigmoid_sum + labels.sum(1)
    return (softplus_sum - x_product) / k, 1 - (2 * sigmoid_product + 1) / (total + 1)


# ---------------------------------------------------------------- point loss


@triton.jit(do_not_specialize=["first_target", "last_target", "num_points"])
def _loss_kernel(
    logits, stride, rows, targets, target_stride, target_rows, points, probability, labels, sums,
    first_target, last_target, num_points, height, width, target_height, target_width, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK points of one mask, if its target belongs to this image."""
    m = tl.program_id(0).to(tl.int64)
    target = tl.load(target_rows + m)
    if (target >= first_target) & (target < last_target):
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = k < num_points
        at = m * num_points + k
        x = tl.load(points + 2 * at, mask=inside, other=0.0)
        y = tl.load(points + 2 * at + 1, mask=inside, other=0.0)
        logit = bilinear(logits + tl.load(rows + m) * stride, x, y, height, width, inside)
        label = bilinear(targets + (target - first_target) * target_stride, x, y, target_height, target_width, inside)
        sigmoid, softplus = sigmoid_softplus(logit)
        tl.store(probability + at, sigmoid, mask=inside)
        tl.store(labels + at, label, mask=inside)
        to = sums + (m * tl.num_programs(1) + tl.program_id(1)) * 4
        tl.store(to, tl.sum(tl.where(inside, softplus - logit * label, 0.0), axis=0))
        sigmoid = tl.where(inside, sigmoid, 0.0)
        tl.store(to + 1, tl.sum(sigmoid, axis=0))
        tl.store(to + 2, tl.sum(label, axis=0))
        tl.store(to + 3, tl.sum(sigmoid * label, axis=0))


def point_mask_loss(
    mask_logits: Tensor, rows: Tensor, targets: list[Tensor], target_rows: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`m2f::point_mask_loss`: one launch per image, which serves the masks whose target is that image's."""
    m, k = points.shape[:2]
    points = points.contiguous()
    probability, labels = (torch.empty(m, k, dtype=torch.float32, device=points.device) for _ in range(2))
    blocks = triton.cdiv(k, 256)
    sums = torch.empty(m, blocks, 4, dtype=torch.float32, device=points.device)
    logits = dense_planes(mask_logits)
    first = 0
    for masks in targets:
        count = masks.shape[0]
        if m and count:
            dense = dense_planes(masks)
            launch(
                _loss_kernel, (m, blocks), logits, logits.stride(0), rows, dense, dense.stride(0), target_rows, points,
                probability, labels, sums, first, first + count, k, *logits.shape[1:], *dense.shape[1:],
                BLOCK=256, num_warps=4,
            )  # fmt: skip
        first += count
    cross_entropy, probability_sum, label_sum, both = sums.sum(1).unbind(1)
    dice = 1 - (2 * both + 1) / (probability_sum + label_sum + 1)
    return cross_entropy / k, dice, probability, labels


@triton.jit(do_not_specialize=["num_points"])
def _sums_kernel(probability, labels, both, total, num_points, BLOCK: tl.constexpr):
    """One program: the sums of one mask that its gradient needs."""
    m = tl.program_id(0).to(tl.int64)
    both_sum = tl.zeros((BLOCK,), tl.float32)
    total_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_points, BLOCK):
        k = start + tl.arange(0, BLOCK)
        s = tl.load(probability + m * num_points + k, mask=k < num_points, other=0.0)
        t = tl.load(labels + m * num_points + k, mask=k < num_points, other=0.0)
        both_sum += s * t
        total_sum += s + t
    tl.store(both + m, tl.sum(both_sum, axis=0))
    tl.store(total + m, tl.sum(total_sum, axis=0))


@triton.jit(do_not_specialize=["num_points"])
def _loss_backward_kernel(
    grad_cross_entropy, grad_dice, rows, points, probability, labels, both, total, scale, sums, num_points, height,
    width, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK points of one mask. Gradients as in `csrc/point_loss/cpu_kernel.cpp`."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < num_points
    at = m * num_points + k
    s = tl.load(probability + at, mask=inside, other=0.0)
    t = tl.load(labels + at, mask=inside, other=0.0)
    x = tl.load(points + 2 * at, mask=inside, other=0.0)
    y = tl.load(points + 2 * at + 1, mask=inside, other=0.0)
    denominator = tl.load(total + m) + 1
    ratio = (2 * tl.load(both + m) + 1) / denominator
    gradient = (s - t) * (tl.load(grad_cross_entropy + m) / num_points)
    gradient += s * (1 - s) * (ratio - 2 * t) * (tl.load(grad_dice + m) / denominator)
    row = tl.load(rows + m)
    plane = sums + row * height * width
    scatter(plane, x, y, height, width, gradient * tl.load(scale + row), inside)


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
    """`m2f::point_mask_loss_backward`: the gradient [P, h, w] of the logits."""
    m, k = points.shape[:2]
    sums = torch.zeros(planes, height, width, dtype=torch.int64, device=points.device)
    scale = torch.ones(planes, dtype=torch.float32, device=points.device)
    if m:
        points, probability, labels = points.contiguous(), probability.contiguous(), labels.contiguous()
        # A gradient of stride 0 is what sum() sends.
        grad_cross_entropy, grad_dice = grad_cross_entropy.contiguous(), grad_dice.contiguous()
        both, total = (torch.empty(m, dtype=torch.float32, device=points.device) for _ in range(2))
        launch(_sums_kernel, (m,), probability, labels, both, total, k, BLOCK=1024, num_warps=4)
        # No term is larger: |s - t| <= 1, s (1 - s) <= 1/4, and |N / D - 2 t| <= 2.
        largest = grad_cross_entropy.abs() / k + grad_dice.abs() / (2 * (total + 1))
        largest = torch.zeros(planes, device=points.device).scatter_reduce(0, rows, largest, "amax")
        scale = fixed_point_scale(largest)
        launch(
            _loss_backward_kernel, (m, triton.cdiv(k, 256)), grad_cross_entropy, grad_dice, rows, points, probability,
            labels, both, total, scale, sums, k, height, width, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return to_float(sums, scale, torch.float32)
