"""Triton kernels of matching cost and point loss: see `reference.py` for what they compute.

Sums over points are taken per block and then over blocks, always in the same order; the gradient of the logits is
scattered in fixed point (see `point_sample/triton.py`). Nothing here synchronises.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels import _tuning
from m2f_kernels._dtypes import without_autocast
from m2f_kernels._triton import MAX_GRID, architecture, block_id, dot, in_parts, launch, rows_and_blocks, strides
from m2f_kernels.constants import ConstantCache
from m2f_kernels.masks import Targets, grouped
from m2f_kernels.ops.points.masks import CHUNK_BYTES, chunk_bounds, in_accumulation_dtype, mask_bytes, product_chunks
from m2f_kernels.ops.points.triton_bookkeeping import (
    criterion_losses,
    criterion_losses_backward,
    matching_costs,
    rows_backward,
)
from m2f_kernels.ops.points.triton_sampling import (
    FRACTION_BITS,
    bilinear,
    bilinear_runs,
    bisections,
    dense_planes,
    fixed_point_scale,
    launch_fresh,
    launch_kept,
    runs_of,
    scale_up,
    scatter,
    to_float,
)

__all__ = [  # the operators that this module serves
    "criterion_losses",
    "criterion_losses_backward",
    "factored_point_mask_loss",
    "factored_point_mask_loss_backward",
    "mask_matching_cost",
    "matching_costs",
    "point_mask_loss",
    "point_mask_loss_backward",
]

#: Points of one program of the loss.
_POINTS = 256
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid_softplus(x):
    """Sigmoid and softplus of x from one e = exp(-|x|). log(1 + e) = 2 artanh(e / (2 + e)) is accurate for small e."""
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
    logits_ptr, labels_ptr, products_ptr, sums_ptr, label_sums_ptr, logits_q, labels_t, num_queries, num_targets,
    num_points, part, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
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
        x = tl.load(logits_ptr + q.to(tl.int64)[:, None] * logits_q + k[None, :], mask=inside, other=0.0)
        y = tl.load(
            labels_ptr + t.to(tl.int64)[:, None] * labels_t + k[None, :],
            mask=(t < num_targets)[:, None] & (k < last)[None, :], other=0.0,
        )  # fmt: skip
        sigmoid, softplus = sigmoid_softplus(x)
        sigmoid = tl.where(inside, sigmoid, 0.0)
        softplus_sum += tl.sum(tl.where(inside, softplus, 0.0), axis=1)
        sigmoid_sum += tl.sum(sigmoid, axis=1)
        y = tl.trans(y)
        x_total += dot(x, y)
        sigmoid_total += dot(sigmoid, y)
    to = products_ptr + (split * 2 * num_queries + q)[:, None] * num_targets + t[None, :]
    stored = (q < num_queries)[:, None] & (t < num_targets)[None, :]
    tl.store(to, x_total, mask=stored)
    tl.store(to + num_queries.to(tl.int64) * num_targets, sigmoid_total, mask=stored)
    if tl.program_id(1) == 0:
        tl.store(sums_ptr + split * 2 * num_queries + q, softplus_sum, mask=q < num_queries)
        tl.store(sums_ptr + (split * 2 + 1) * num_queries + q, sigmoid_sum, mask=q < num_queries)
    if tl.program_id(0) == 0:
        # A separate loop, whose loads hit the cache: in the loop above these sums made registers spill.
        label_sum = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(first, last, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            y = tl.load(
                labels_ptr + t.to(tl.int64)[:, None] * labels_t + k[None, :],
                mask=(t < num_targets)[:, None] & (k < last)[None, :], other=0.0,
            )  # fmt: skip
            label_sum += tl.sum(y, axis=1)
        tl.store(label_sums_ptr + split * num_targets + t, label_sum, mask=t < num_targets)


@triton.jit(do_not_specialize=["num_queries", "num_targets", "num_points", "parts"])
def _cost_of_parts_kernel(
    products_ptr, sums_ptr, label_sums_ptr, cross_entropy_ptr, dice_ptr, num_queries, num_targets, num_points, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: both costs of BLOCK pairs of a query and a target, summed over the parts."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pairs = num_queries.to(tl.int64) * num_targets
    inside = pair < pairs
    q, t = pair // num_targets, pair % num_targets
    x_product = tl.zeros((BLOCK,), tl.float32)
    sigmoid_product = tl.zeros((BLOCK,), tl.float32)
    softplus_sum = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        x_product += tl.load(products_ptr + 2 * part * pairs + pair, mask=inside, other=0.0)
        sigmoid_product += tl.load(products_ptr + (2 * part + 1) * pairs + pair, mask=inside, other=0.0)
        softplus_sum += tl.load(sums_ptr + 2 * part * num_queries + q, mask=inside, other=0.0)
        total += tl.load(sums_ptr + (2 * part + 1) * num_queries + q, mask=inside, other=0.0)
        total += tl.load(label_sums_ptr + part * num_targets + t, mask=inside, other=0.0)
    tl.store(cross_entropy_ptr + pair, (softplus_sum - x_product) / num_points, mask=inside)
    tl.store(dice_ptr + pair, 1 - (2 * sigmoid_product + 1) / (total + 1), mask=inside)


def mask_matching_cost(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`m2f::mask_matching_cost`: logits [Q, K], labels [T, K], float32."""
    q, k = logits.shape
    t = labels.shape[0]
    if t > 16 * MAX_GRID:
        cross_entropy, dice = in_parts(mask_matching_cost, 16 * MAX_GRID, (-1, 0), logits, labels, joined=1)
        return cross_entropy, dice
    if q * t == 0:
        return logits.new_empty(q, t), logits.new_empty(q, t)
    logits, labels = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (logits, labels))
    block_q, block_t, block_k = 32, min(max(triton.next_power_of_2(t), 16), 32), 32
    # Enough parts to fill the device with a few hundred programs.
    programs = triton.cdiv(q, block_q) * triton.cdiv(t, block_t)
    parts = max(1, min(triton.cdiv(k, 512), triton.cdiv(512, programs)))
    part = triton.cdiv(triton.cdiv(k, parts), block_k) * block_k
    parts = triton.cdiv(k, part)
    warps = 8 if architecture(logits.device).gfx.startswith("gfx11") else 4  # there 4 have too few registers
    products, sums = logits.new_empty(parts, 2, q, t), logits.new_empty(parts, 2, q)
    label_sums = logits.new_empty(parts, t)
    launch(
        _cost_kernel, (triton.cdiv(q, block_q), triton.cdiv(t, block_t), parts), logits_ptr=logits, labels_ptr=labels,
        products_ptr=products, sums_ptr=sums, label_sums_ptr=label_sums, **strides("logits", logits, "q"),
        **strides("labels", labels, "t"), num_queries=q, num_targets=t, num_points=k, part=part,
        BLOCK_Q=block_q, BLOCK_T=block_t, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    cross_entropy, dice = logits.new_empty(q, t), logits.new_empty(q, t)
    launch(
        _cost_of_parts_kernel, (triton.cdiv(q * t, 256),), products_ptr=products, sums_ptr=sums,
        label_sums_ptr=label_sums, cross_entropy_ptr=cross_entropy, dice_ptr=dice, num_queries=q, num_targets=t,
        num_points=k, parts=parts, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return cross_entropy, dice


# ---------------------------------------------------------------- point loss


@triton.jit(do_not_specialize=["first_target", "last_target", "num_points", "steps"])
def _loss_kernel(
    logits_ptr, stride, rows_ptr, targets_ptr, target_stride, marks_ptr, target_rows_ptr, points_ptr, probability_ptr,
    labels_ptr, sums_ptr, first_target, last_target, num_points, height, width, target_height, target_width, steps,
    BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK points of one mask, if its target belongs to this image: a mask, or by KIND of a map of ids
    (1), or run lengths (2)."""
    m = tl.program_id(0).to(tl.int64)
    target = tl.load(target_rows_ptr + m)
    if (target >= first_target) & (target < last_target):
        k = block_id() * BLOCK + tl.arange(0, BLOCK)
        inside = k < num_points
        at = m * num_points + k
        x = tl.load(points_ptr + 2 * at, mask=inside, other=0.0)
        y = tl.load(points_ptr + 2 * at + 1, mask=inside, other=0.0)
        logit = bilinear(logits_ptr + tl.load(rows_ptr + m) * stride, x, y, height, width, inside)
        number = target - first_target
        plane = targets_ptr + number * target_stride
        if KIND == 2:
            run_height, ends, count = runs_of(marks_ptr, number, last_target - first_target)
            label = bilinear_runs(ends, count, run_height, x, y, target_height, target_width, inside, steps)
        elif KIND == 1:
            id = tl.load(marks_ptr + number)
            label = bilinear(targets_ptr, x, y, target_height, target_width, inside, id, True)
        else:
            label = bilinear(plane, x, y, target_height, target_width, inside)
        sigmoid, softplus = sigmoid_softplus(logit)
        tl.store(probability_ptr + at, sigmoid, mask=inside)
        tl.store(labels_ptr + at, label, mask=inside)
        to = sums_ptr + (m * tl.num_programs(1) * tl.num_programs(2) + block_id()) * 4
        tl.store(to, tl.sum(tl.where(inside, softplus - logit * label, 0.0), axis=0))
        sigmoid = tl.where(inside, sigmoid, 0.0)
        tl.store(to + 1, tl.sum(sigmoid, axis=0))
        tl.store(to + 2, tl.sum(label, axis=0))
        tl.store(to + 3, tl.sum(sigmoid * label, axis=0))


@triton.jit(do_not_specialize=["num_points", "blocks"])
def _loss_of_blocks_kernel(sums_ptr, cross_entropy_ptr, dice_ptr, num_points, blocks, BLOCK: tl.constexpr):
    """One program: both losses of one mask, from the sums over its blocks of points."""
    m = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK, 4), tl.float32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)[:, None]
        at = sums_ptr + (m * blocks + block) * 4 + tl.arange(0, 4)[None, :]
        total += tl.load(at, mask=block < blocks, other=0.0)
    total = tl.sum(total, axis=0)
    which = tl.arange(0, 4)
    both = tl.sum(tl.where(which == 3, total, 0.0), axis=0)
    others = tl.sum(tl.where((which == 1) | (which == 2), total, 0.0), axis=0)
    tl.store(cross_entropy_ptr + m, tl.sum(tl.where(which == 0, total, 0.0), axis=0) / num_points)
    tl.store(dice_ptr + m, 1 - (2 * both + 1) / (others + 1))


def _loss_of_blocks(sums: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Both losses [M] from sums [M, blocks, 4]."""
    m, blocks, _ = sums.shape
    cross_entropy, dice = sums.new_empty(m), sums.new_empty(m)
    if m:
        launch(
            _loss_of_blocks_kernel, (m,), sums_ptr=sums, cross_entropy_ptr=cross_entropy, dice_ptr=dice,
            num_points=points, blocks=blocks, BLOCK=64, num_warps=1,
        )  # fmt: skip
    return cross_entropy, dice


def point_mask_loss(
    mask_logits: Tensor, rows: Tensor, targets: list[Tensor], target_rows: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`m2f::point_mask_loss`: one launch per image, for the masks whose targets are that image's."""
    m, k = points.shape[:2]
    points = points.contiguous()
    probability, labels = (torch.empty(m, k, dtype=torch.float32, device=points.device) for _ in range(2))
    sums = torch.empty(m, _blocks(k), 4, dtype=torch.float32, device=points.device)
    first = 0
    for image in grouped(targets):
        _launch_loss(mask_logits, rows, image, first, target_rows, points, probability, labels, sums)
        first += image.pixels.shape[0]
    return *_loss_of_blocks(sums, k), probability, labels


def _blocks(points: int) -> int:
    """The number of programs that share a mask's points."""
    _, along_y, along_z = rows_and_blocks(1, triton.cdiv(points, _POINTS))
    return along_y * along_z


def _launch_loss(
    mask_logits: Tensor, rows: Tensor, targets: Targets, first: int, target_rows: Tensor, points: Tensor,
    probability: Tensor, labels: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    """Launches the loss of the masks in `rows` whose targets are those of one image, numbered from `first`."""
    (m, k), (pixels, marks) = points.shape[:2], targets
    count, height, width = pixels.shape
    if m and count:
        kind, steps = 0, 0
        if marks is None:
            pixels = marks = dense_planes(pixels)
        elif marks.dtype == torch.int32:
            kind, steps, pixels = 2, bisections(marks), marks
        else:
            kind = 1
        logits = dense_planes(mask_logits)
        launch(
            _loss_kernel, rows_and_blocks(m, triton.cdiv(k, _POINTS)), logits_ptr=logits, stride=logits.stride(0),
            rows_ptr=rows, targets_ptr=pixels, target_stride=pixels.stride(0), marks_ptr=marks,
            target_rows_ptr=target_rows, points_ptr=points, probability_ptr=probability, labels_ptr=labels,
            sums_ptr=sums, first_target=first, last_target=first + count, num_points=k, height=logits.shape[1],
            width=logits.shape[2], target_height=height, target_width=width, steps=steps, BLOCK=_POINTS, KIND=kind,
            num_warps=8 if kind == 2 else 4,  # 4 spill with Triton 3.6
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_points"])
def _sums_kernel(
    probability_ptr, labels_ptr, grad_cross_entropy_ptr, grad_dice_ptr, both_ptr, total_ptr, largest_ptr, num_points,
    SCALED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the sums that the gradient of one mask needs, and a bound on its terms or (SCALED) their scale."""
    m = tl.program_id(0).to(tl.int64)
    both_sum = tl.zeros((BLOCK,), tl.float32)
    total_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_points, BLOCK):
        k = start + tl.arange(0, BLOCK)
        s = tl.load(probability_ptr + m * num_points + k, mask=k < num_points, other=0.0)
        t = tl.load(labels_ptr + m * num_points + k, mask=k < num_points, other=0.0)
        both_sum += s * t
        total_sum += s + t
    sum = tl.sum(total_sum, axis=0)
    tl.store(both_ptr + m, tl.sum(both_sum, axis=0))
    tl.store(total_ptr + m, sum)
    # No term is larger: |s - t| <= 1, s (1 - s) <= 1/4, and |N / D - 2 t| <= 2.
    bound = tl.abs(tl.load(grad_cross_entropy_ptr + m)) / num_points
    bound += tl.abs(tl.load(grad_dice_ptr + m)) / (2 * (sum + 1))
    if SCALED:  # as `fixed_point_scale` has it
        first = tl.minimum(2.0**BITS / bound, 2.0**100)
        second = tl.where(bound - bound == 0, tl.minimum(2.0**BITS / first / bound, 2.0**100), float("nan"))
        tl.store(largest_ptr + 2 * m, first)
        tl.store(largest_ptr + 2 * m + 1, second)
    else:
        tl.store(largest_ptr + m, bound)


@triton.jit(do_not_specialize=["num_points"])
def _loss_backward_kernel(
    grad_cross_entropy_ptr, grad_dice_ptr, rows_ptr, points_ptr, probability_ptr, labels_ptr, both_ptr, total_ptr,
    scale_ptr, sums_ptr, num_points, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK points of one mask. Gradients as in `csrc/point_loss/cpu_kernel.cpp`."""
    m = tl.program_id(0).to(tl.int64)
    k = block_id() * BLOCK + tl.arange(0, BLOCK)
    inside = k < num_points
    at = m * num_points + k
    s = tl.load(probability_ptr + at, mask=inside, other=0.0)
    t = tl.load(labels_ptr + at, mask=inside, other=0.0)
    x = tl.load(points_ptr + 2 * at, mask=inside, other=0.0)
    y = tl.load(points_ptr + 2 * at + 1, mask=inside, other=0.0)
    denominator = tl.load(total_ptr + m) + 1
    ratio = (2 * tl.load(both_ptr + m) + 1) / denominator
    gradient = (s - t) * (tl.load(grad_cross_entropy_ptr + m) / num_points)
    gradient += s * (1 - s) * (ratio - 2 * t) * (tl.load(grad_dice_ptr + m) / denominator)
    row = tl.load(rows_ptr + m)
    plane = sums_ptr + row * height * width
    scatter(plane, x, y, height, width, scale_up(gradient, scale_ptr + 2 * row), inside)


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
    scale = torch.ones(planes, 2, dtype=torch.float32, device=points.device)
    sums = torch.zeros(planes, height, width, dtype=torch.int64, device=points.device)
    if rows.shape[0]:
        points, probability, labels = points.contiguous(), probability.contiguous(), labels.contiguous()
        # A gradient of stride 0 is what sum() sends.
        grads = grad_cross_entropy.contiguous(), grad_dice.contiguous()
        both, total, largest = _sums(*grads, probability, labels, scaled=False)
        largest = torch.zeros(planes, device=points.device).scatter_reduce(0, rows, largest, "amax")
        scale = fixed_point_scale(largest)
        _launch_backward(*grads, rows, points, probability, labels, both, total, scale, sums)
    return to_float(sums, scale, torch.float32)


def _sums(
    grad_cross_entropy: Tensor, grad_dice: Tensor, probability: Tensor, labels: Tensor, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    m, k = probability.shape
    both, total = (torch.empty(m, dtype=torch.float32, device=labels.device) for _ in range(2))
    largest = torch.empty((m, 2) if scaled else (m,), dtype=torch.float32, device=labels.device)
    launch(
        _sums_kernel, (m,), probability_ptr=probability, labels_ptr=labels, grad_cross_entropy_ptr=grad_cross_entropy,
        grad_dice_ptr=grad_dice, both_ptr=both, total_ptr=total, largest_ptr=largest, num_points=k,
        SCALED=scaled, BITS=FRACTION_BITS, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return both, total, largest


def _launch_backward(
    grad_cross_entropy: Tensor, grad_dice: Tensor, rows: Tensor, points: Tensor, probability: Tensor, labels: Tensor,
    both: Tensor, total: Tensor, scale: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    m, k = points.shape[:2]
    launch(
        _loss_backward_kernel, rows_and_blocks(m, triton.cdiv(k, _POINTS)),
        grad_cross_entropy_ptr=grad_cross_entropy, grad_dice_ptr=grad_dice, rows_ptr=rows, points_ptr=points,
        probability_ptr=probability, labels_ptr=labels, both_ptr=both, total_ptr=total, scale_ptr=scale,
        sums_ptr=sums, num_points=k, height=sums.shape[1], width=sums.shape[2], BLOCK=_POINTS, num_warps=4,
    )  # fmt: skip


# ---------------------------------------------------------------- factored masks
# As `factored.py` on other devices, but with the common work of all chunks done once.


_NUMBERS = ConstantCache(4)


def _numbers(count: int, like: Tensor) -> Tensor:
    """At least the numbers from 0 to `count` - 1, in the dtype of `like`; never to be written."""
    whole = triton.next_power_of_2(max(count, 1024))
    return _NUMBERS.get(lambda: torch.arange(whole, dtype=like.dtype, device=like.device), whole, like)


@torch.no_grad()
def factored_point_mask_loss(
    mask_embed: Tensor,
    mask_features: Tensor,
    rows: Tensor,
    counts: list[int],
    targets: list[Tensor],
    target_rows: Tensor,
    points: Tensor | None,
    seed: Tensor | None,
    candidates: int,
    keep: int,
    fresh: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`m2f::factored_point_mask_loss`; targets of a mask are those of its image."""
    k = keep + fresh if points is None else points.shape[1]
    m = rows.shape[0]
    drawn = torch.empty((m, k, 2) if points is None else (0,), dtype=torch.float32, device=rows.device)
    at = drawn if points is None else points.contiguous()
    probability, labels = (torch.empty(m, k, dtype=torch.float32, device=rows.device) for _ in range(2))
    sums = torch.empty(m, _blocks(k), 4, dtype=torch.float32, device=rows.device)
    images = grouped(targets)
    firsts = [0, *itertools.accumulate(x.pixels.shape[0] for x in images)]
    if points is None and m:
        launch_fresh(seed, drawn, 0, candidates, keep, fresh)
    # A chunk is planes and keys; together they may take what the gradient of the features takes in the backward pass.
    n, c, h, w = mask_features.shape
    bound = max(CHUNK_BYTES, 4 * n * c * h * w)
    needed = 4 * (h * w + (candidates if points is None else 0))
    largest = max((last - first for _, first, last in chunk_bounds(counts, needed, bound)), default=0)
    own = _numbers(largest, rows)
    keys = torch.empty(largest if points is None else 0, candidates, dtype=torch.int32, device=rows.device)
    for chunk in product_chunks(mask_embed, mask_features, rows, counts, needed, bound):
        here, number = chunk.slice, own[: chunk.embed.shape[0]]
        if points is None:
            launch_kept(chunk.logits, number, seed, keys, drawn[here], chunk.first, candidates, keep)
        outs = at[here], probability[here], labels[here], sums[here]
        image = chunk.image
        _launch_loss(chunk.logits, number, images[image], firsts[image], target_rows[here], *outs)
    return *_loss_of_blocks(sums, k), drawn, probability, labels


@torch.no_grad()
def factored_point_mask_loss_backward(
    grad_cross_entropy: Tensor,
    grad_dice: Tensor,
    mask_embed: Tensor,
    mask_features: Tensor,
    rows: Tensor,
    counts: list[int],
    points: Tensor,
    probability: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """`m2f::factored_point_mask_loss_backward`."""
    n, q, c = mask_embed.shape
    h, w = mask_features.shape[2:]
    m, device = rows.shape[0], rows.device
    grad_embed = torch.empty_like(mask_embed, memory_format=torch.contiguous_format)
    grad_features = mask_features.new_empty(n, c, h * w)
    if m == 0:
        return grad_embed.zero_(), grad_features.zero_().view(n, c, h, w)
    embed = mask_embed.flatten(0, 1)[rows].float()
    points, probability, labels = points.contiguous(), probability.contiguous(), labels.contiguous()
    # A gradient of stride 0 is what sum() sends.
    grads = grad_cross_entropy.contiguous(), grad_dice.contiguous()
    both, total, scale = _sums(*grads, probability, labels, scaled=True)
    bounds = list(chunk_bounds(counts, mask_bytes(mask_features, points.shape[1], torch.float32)))
    own = _numbers(max(n * q, m), rows)
    grad_rows = embed.new_empty(m, c)
    largest = max(last - first for _, first, last in bounds)
    buffer = torch.zeros(largest, h, w, dtype=torch.int64, device=device)
    with without_autocast(device):
        for image, (start, end) in enumerate(itertools.pairwise([0, *itertools.accumulate(counts)])):
            if start == end:
                grad_features[image].zero_()
                if _tuning.CRITERION != "fused":
                    grad_embed[image].zero_()
                continue
            features = in_accumulation_dtype(mask_features[image])
            gathered = grad_features[image] if grad_features.dtype == torch.float32 else embed.new_empty(c, h * w)
            for _, first, last in (chunk for chunk in bounds if chunk[0] == image):
                here = slice(first, last)
                planes = buffer[: last - first]
                _launch_backward(
                    grads[0][here], grads[1][here], own[: last - first], points[here], probability[here], labels[here],
                    both[here], total[here], scale[here], planes,
                )  # fmt: skip
                gradient = to_float(planes, scale[here], torch.float32, clear=True).flatten(1)
                torch.mm(gradient, features.T, out=grad_rows[here])
                if first == start:
                    torch.mm(embed[here].T, gradient, out=gathered)
                else:
                    gathered.addmm_(embed[here].T, gradient)
            if grad_features.dtype != torch.float32:
                grad_features[image] = gathered
            if _tuning.CRITERION == "fused":
                continue
            # A query may have several targets. A product with zeros and ones adds its rows, in the same order always.
            chosen = (rows[start:end] == own[image * q : image * q + q, None]).float()
            if grad_embed.dtype == torch.float32:
                torch.mm(chosen, grad_rows[start:end], out=grad_embed[image])
            else:
                grad_embed[image] = chosen @ grad_rows[start:end]
    if _tuning.CRITERION == "fused":
        rows_backward(grad_rows, rows, grad_embed.flatten(0, 1))
    return grad_embed, grad_features.view(n, c, h, w)
