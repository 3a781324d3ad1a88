"""Triton kernels of multi-scale deformable attention: see `reference.py` for what they compute.

They serve the same calls as the compiled library, except float64 values, on every GPU that Triton compiles for.

One program takes a block of queries of one head. Its lanes lie along the channels, 16 bytes of value each, and every
lane of a query computes the geometry of its samples: that costs fewer instructions than exchanging it. A corner outside
is clamped to one inside and has weight 0, so that one predicate per sample guards its four loads. Levels are
unrolled: their sizes are kernel arguments where the host knows them (no specialisation on their values), or read from
the device and checked there: a level that does not lie within value contributes nothing.

Backward the three gradients come from four dot products per sample, summed over the lanes. The value gradient is added
in float32 with atomics, in no fixed order; under `torch.use_deterministic_algorithms` as fixed-point numbers of 64
bits, whose sum does not depend on the order of its terms. Everything else is deterministic: the softmax's sum over
samples and reference points' sum over heads have kernels of their own.

Multiplications and additions that determine the pixels of a sample are fused explicitly (`tl.fma`), so that
forward, backward and interpreter agree whatever the compiler's default is.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels._triton import Architecture, architecture, launch, narrow, strides

#: Bits of a fixed-point value gradient below its largest possible term; fewer if the number of terms could overflow.
FRACTION_BITS = 40
#: The share of the attention weight in these bits: each factor is scaled by itself, within float32's range.
_WEIGHT_BITS = 20
#: Samples per query and head up to which the loop over points is unrolled.
_UNROLLED = 16
#: Arguments that change with the size of images, for which no kernel is compiled again.
_OF_IMAGES = ["sizes", "bounds", "positions", "queries", "offset_scale"]
_OF_IMAGES += [f"{tensor}_n" for tensor in ("value", "grad", "reference", "points", "weights")]
_LOG2E = tl.constexpr(math.log2(math.e))


# ---------------------------------------------------------------- geometry


def _encoded(numbers: list[int]) -> tuple[int, ...]:
    """Sizes as a kernel takes them: odd and at least 3. Triton compiles a kernel again for numbers in a tuple that are
    1, or where others are divisible by 16; it does not heed do_not_specialize there."""
    return tuple(2 * number + 3 for number in numbers)


@triton.jit
def _decoded(number):
    return ((number >> 1) - 1).to(tl.int32)


@triton.jit
def _level(shapes_ptr, starts_ptr, sizes, positions, LEVEL: tl.constexpr, ON_DEVICE: tl.constexpr):
    """Height, width and first position of a level, and its end along x, which is before its start if the level does not
    lie within value."""
    if ON_DEVICE:
        height = tl.load(shapes_ptr + 2 * LEVEL)
        width = tl.load(shapes_ptr + 2 * LEVEL + 1)
        start = tl.load(starts_ptr + LEVEL)
        fits = (height >= 1) & (width >= 1) & (start >= 0) & (start < positions)
        fits = fits & (height <= (positions - start) // tl.maximum(width, 1))
        height = tl.where(fits, height, 1).to(tl.int32)
        width = tl.where(fits, width, 1).to(tl.int32)
        start = tl.where(fits, start, 0).to(tl.int32)
        return height, width, start, tl.where(fits, width.to(tl.float32), -1.0)
    else:
        height, width = _decoded(sizes[3 * LEVEL]), _decoded(sizes[3 * LEVEL + 1])
        return height, width, _decoded(sizes[3 * LEVEL + 2]), width.to(tl.float32)


@triton.jit
def _axis(x, size, inside):
    """The two pixels around a coordinate along one axis, clamped to the level, their weights, and which exist."""
    x = tl.where(inside, x, 0.0)
    floor = tl.floor(x)
    below = floor.to(tl.int32)
    fraction = x - floor
    return tl.maximum(below, 0), tl.minimum(below + 1, size - 1), fraction, below >= 0, below + 1 < size


@triton.jit
def _pair(at, stride_d, mask, PACKED: tl.constexpr, HALF: tl.constexpr):
    """The two coordinates at each address in float32; where they are aligned, by one load of an integer."""
    if PACKED:
        both = tl.load(at, mask=mask, other=0)
        if HALF == "fp32":
            x = (both & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
            y = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        elif HALF == "bf16":
            x = (both << 16).to(tl.float32, bitcast=True)
            y = (both & -65536).to(tl.float32, bitcast=True)
        else:
            x = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            y = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = tl.load(at, mask=mask, other=0).to(tl.float32)
        y = tl.load(at + stride_d, mask=mask, other=0).to(tl.float32)
    return x, y


@triton.jit
def _softmax(at, stride_k, mask, SAMPLES: tl.constexpr, UNROLL: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The largest logit m of each query and the inverse s of its softmax's sum: exp(x - m) * s is the weight of x."""
    # Sample by sample, as they are used: a tile would be exchanged between lanes again and again.
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    if UNROLL:
        for k in tl.static_range(SAMPLES):
            largest = tl.maximum(largest, tl.load(at + k * stride_k, mask=mask, other=0.0).to(tl.float32))
        for k in tl.static_range(SAMPLES):
            x = tl.load(at + k * stride_k, mask=mask, other=0.0).to(tl.float32)
            total += tl.exp2((x - largest) * _LOG2E)
    else:
        for k in range(SAMPLES):
            largest = tl.maximum(largest, tl.load(at + k * stride_k, mask=mask, other=0.0).to(tl.float32))
        for k in range(SAMPLES):
            x = tl.load(at + k * stride_k, mask=mask, other=0.0).to(tl.float32)
            total += tl.exp2((x - largest) * _LOG2E)
    return largest, 1 / total


@triton.jit
def _program(queries, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Image, block of queries and head of this program; heads vary fastest, as they share lines of value."""
    program = tl.program_id(0)
    rest = program // HEADS
    blocks = (queries + BLOCK_Q - 1) // BLOCK_Q
    # In 64 bits first: their products with strides do not fit 32.
    return (rest // blocks).to(tl.int64), (rest % blocks).to(tl.int64), (program % HEADS).to(tl.int64)


@triton.jit
def _weight(at, mask, largest, scale, FROM_OFFSETS: tl.constexpr):
    """The attention weight of one sample of each query."""
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if FROM_OFFSETS:
        x = tl.exp2((x - largest) * _LOG2E) * scale
    return x


@triton.jit
def _steps(at, stride_d, mask, width, height, offset_scale, COUNT: tl.constexpr, COORDINATES: tl.constexpr):
    """Pixel coordinates as a linear function of the points tensor: x = point * step + origin, for x and y."""
    if COORDINATES == 0:
        return width, -0.5, height, -0.5
    else:
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(at + stride_d, mask=mask, other=0.0).to(tl.float32)
        x = tl.fma(x, width, -0.5)
        y = tl.fma(y, height, -0.5)
        if COORDINATES == 2:
            return 1.0, x, 1.0, y
        else:
            scale = offset_scale / COUNT
            step_x = tl.load(at + 2 * stride_d, mask=mask, other=0.0).to(tl.float32) * (width * scale)
            step_y = tl.load(at + 3 * stride_d, mask=mask, other=0.0).to(tl.float32) * (height * scale)
            return step_x, x, step_y, y


# ---------------------------------------------------------------- forward


@triton.jit
def _add_sample(
    total, at_point, points_d, step_x, origin_x, step_y, origin_y, at_weight, largest, scale, rows, row_stride, width,
    height, end, mask, channel_mask, FROM_OFFSETS: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """`total` [Q, D] plus one sample of each query; `rows` are the addresses of the level's first position [1, D]."""
    x, y = _pair(at_point, points_d, mask, PACKED, HALF)
    weight = _weight(at_weight, mask, largest, scale, FROM_OFFSETS)
    x = tl.fma(x, step_x, origin_x)
    y = tl.fma(y, step_y, origin_y)
    # Comparisons with NaN are false: a coordinate that is not finite contributes nothing, whatever its weight.
    inside = mask & (x > -1.0) & (x < end) & (y > -1.0) & (y < height.to(tl.float32))
    x0, x1, fx, has_left, has_right = _axis(x, width, inside)
    y0, y1, fy, has_top, has_bottom = _axis(y, height, inside)
    weight = tl.where(inside, weight, 0.0)
    left, right = tl.where(has_left, 1 - fx, 0.0), tl.where(has_right, fx, 0.0)
    top, bottom = tl.where(has_top, weight - weight * fy, 0.0), tl.where(has_bottom, weight * fy, 0.0)
    if WIDE:
        x0, x1, y0, y1 = x0.to(tl.int64), x1.to(tl.int64), y0.to(tl.int64), y1.to(tl.int64)
    x0, x1 = x0 * row_stride, x1 * row_stride
    y0, y1 = y0 * (width * row_stride), y1 * (width * row_stride)
    wanted = inside[:, None] & channel_mask
    a = tl.load(rows + (y0 + x0)[:, None], mask=wanted, other=0.0)
    b = tl.load(rows + (y0 + x1)[:, None], mask=wanted, other=0.0)
    c = tl.load(rows + (y1 + x0)[:, None], mask=wanted, other=0.0)
    d = tl.load(rows + (y1 + x1)[:, None], mask=wanted, other=0.0)
    total = tl.fma(a.to(tl.float32), (top * left)[:, None], total)
    total = tl.fma(b.to(tl.float32), (top * right)[:, None], total)
    total = tl.fma(c.to(tl.float32), (bottom * left)[:, None], total)
    return tl.fma(d.to(tl.float32), (bottom * right)[:, None], total)


@triton.jit
def _add_level(
    total, at_points, points_k, points_d, step_x, origin_x, step_y, origin_y, at_weights, weights_k, largest, scale,
    rows, row_stride, width, height, end, mask, channel_mask, begin, stop, FIRST: tl.constexpr, COUNT: tl.constexpr,
    UNROLL: tl.constexpr, FROM_OFFSETS: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`total` [Q, D] plus a level's samples: COUNT from FIRST on, which are those from `begin` to `stop`."""
    if UNROLL:
        for p in tl.static_range(COUNT):
            k = FIRST + p
            total = _add_sample(
                total, at_points + k * points_k, points_d, step_x, origin_x, step_y, origin_y,
                at_weights + k * weights_k, largest, scale, rows, row_stride, width, height, end, mask, channel_mask,
                FROM_OFFSETS, PACKED, HALF, WIDE,
            )  # fmt: skip
    else:
        for k in range(begin, stop):
            total = _add_sample(
                total, at_points + k * points_k, points_d, step_x, origin_x, step_y, origin_y,
                at_weights + k * weights_k, largest, scale, rows, row_stride, width, height, end, mask, channel_mask,
                FROM_OFFSETS, PACKED, HALF, WIDE,
            )  # fmt: skip
    return total


@triton.jit(do_not_specialize=_OF_IMAGES)
def _forward_kernel(
    value_ptr, shapes_ptr, starts_ptr, reference_ptr, points_ptr, weights_ptr, out_ptr, sizes, bounds, value_n,
    value_s, value_h,
    reference_n, reference_q, reference_l, reference_d, points_n, points_q, points_h, points_k, points_d,
    weights_n, weights_q, weights_h, weights_k, positions, queries, offset_scale,
    POINTS: tl.constexpr, FIRST: tl.constexpr, COORDINATES: tl.constexpr, ON_DEVICE: tl.constexpr,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr,
    WIDE: tl.constexpr, UNROLL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of BLOCK_Q queries of one head. Strides of value are in units of ALIGN."""
    n, block, head = _program(queries, HEADS, BLOCK_Q)
    q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = q < queries
    channel_mask = (channel < CHANNELS)[None, :]
    row_stride = tl.cast(value_s, tl.int64 if WIDE else tl.int32) * ALIGN
    rows = value_ptr + n * value_n * ALIGN + head * value_h * ALIGN + channel[None, :]
    at_points = points_ptr + n * points_n + head * points_h + q * points_q
    at_weights = weights_ptr + n * weights_n + head * weights_h + q * weights_q
    at_reference = at_points
    largest, scale = 0.0, 1.0
    if COORDINATES > 0:
        at_reference = reference_ptr + n * reference_n + q * reference_q
        largest, scale = _softmax(at_weights, weights_k, mask, FIRST[len(POINTS)], UNROLL, BLOCK_Q)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for level in tl.static_range(len(POINTS)):
        height, width, start, end = _level(shapes_ptr, starts_ptr, sizes, positions, level, ON_DEVICE)
        level_rows = rows + start.to(tl.int64) * row_stride
        step_x, origin_x, step_y, origin_y = _steps(
            at_reference + level * reference_l, reference_d, mask, width.to(tl.float32), height.to(tl.float32),
            offset_scale, POINTS[level], COORDINATES,
        )  # fmt: skip
        total = _add_level(
            total, at_points, points_k, points_d, step_x, origin_x, step_y, origin_y, at_weights, weights_k, largest,
            scale, level_rows, row_stride, width, height, end, mask, channel_mask, bounds[level], bounds[level + 1],
            FIRST[level], POINTS[level], UNROLL, COORDINATES > 0, PACKED, HALF, WIDE,
        )  # fmt: skip
    to = out_ptr + ((n * queries + q) * HEADS + head)[:, None] * CHANNELS + channel[None, :]
    tl.store(to, narrow(total, out_ptr.dtype.element_ty), mask=mask[:, None] & channel_mask)


# ---------------------------------------------------------------- backward


@triton.jit
def _add_gradient(at, weight, grad, present, bad, FIXED: tl.constexpr):
    """Adds `weight` times `grad` [Q, D] where a corner lies inside; with FIXED as integers. `bad` marks terms that are
    not finite."""
    term = weight[:, None] * grad
    if FIXED:
        finite = tl.abs(term) < float("inf")
        bad = bad | (present & ~finite).to(tl.int32)
        term = tl.floor(tl.where(finite, term, 0.0) + 0.5).to(tl.int64)
    tl.atomic_add(at, term, mask=present, sem="relaxed")
    return bad


@triton.jit
def _backward_sample(
    grad_points_ptr, grad_weights_ptr, grad_value_ptr, k, at_point, points_d, step_x, origin_x, step_y, origin_y,
    at_weight,
    largest, scale, grad, grad_rows, rows, row_stride, width, height, end, mask, value_scale, weight_scale,
    sum_x, sum_y, sum_width, sum_height, bad,
    FROM_OFFSETS: tl.constexpr, NEEDS_VALUE: tl.constexpr, NEEDS_SAMPLING: tl.constexpr, NEEDS_REFERENCE: tl.constexpr,
    FIXED: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of one sample of each query; returns the sums that reference points need, and `bad`."""
    point_x, point_y = _pair(at_point, points_d, mask, PACKED, HALF)
    weight = _weight(at_weight, mask, largest, scale, FROM_OFFSETS)
    x = tl.fma(point_x, step_x, origin_x)
    y = tl.fma(point_y, step_y, origin_y)
    wide, high = width.to(tl.float32), height.to(tl.float32)
    inside = mask & (x > -1.0) & (x < end) & (y > -1.0) & (y < high)
    x0, x1, fx, has_left, has_right = _axis(x, width, inside)
    y0, y1, fy, has_top, has_bottom = _axis(y, height, inside)
    has_left, has_right = has_left & inside, has_right & inside
    weight = tl.where(inside, weight, 0.0)
    if WIDE:
        x0, x1, y0, y1 = x0.to(tl.int64), x1.to(tl.int64), y0.to(tl.int64), y1.to(tl.int64)
    a, b, c, d = y0 * width + x0, y0 * width + x1, y1 * width + x0, y1 * width + x1
    has_a, has_b = (has_top & has_left)[:, None], (has_top & has_right)[:, None]
    has_c, has_d = (has_bottom & has_left)[:, None], (has_bottom & has_right)[:, None]
    dot_a = tl.zeros((BLOCK_Q,), tl.float32)
    dot_b, dot_c, dot_d = dot_a, dot_a, dot_a
    upper, lower = weight - weight * fy, weight * fy
    if FIXED:
        upper, lower = upper * weight_scale, lower * weight_scale
    # Here, since a constexpr in the unrolled loop would be assigned twice.
    row: tl.constexpr = HEADS * CHANNELS
    for first in tl.static_range(0, CHANNELS, BLOCK_D):
        channel = first + tl.arange(0, BLOCK_D)[None, :]
        exists = channel < CHANNELS
        if CHANNELS > BLOCK_D:
            grad = tl.load(grad_rows + channel, mask=mask[:, None] & exists, other=0.0).to(tl.float32)
        if NEEDS_SAMPLING or NEEDS_REFERENCE:
            at = rows + channel
            corner = tl.load(at + (a * row_stride)[:, None], mask=has_a & exists, other=0.0).to(tl.float32)
            dot_a += tl.sum(corner * grad, axis=1)
            corner = tl.load(at + (b * row_stride)[:, None], mask=has_b & exists, other=0.0).to(tl.float32)
            dot_b += tl.sum(corner * grad, axis=1)
            corner = tl.load(at + (c * row_stride)[:, None], mask=has_c & exists, other=0.0).to(tl.float32)
            dot_c += tl.sum(corner * grad, axis=1)
            corner = tl.load(at + (d * row_stride)[:, None], mask=has_d & exists, other=0.0).to(tl.float32)
            dot_d += tl.sum(corner * grad, axis=1)
        if NEEDS_VALUE:
            to = grad_value_ptr + channel
            left, right = 1 - fx, fx
            terms = grad * value_scale if FIXED else grad
            bad = _add_gradient(to + (a * row)[:, None], upper * left, terms, has_a & exists, bad, FIXED)
            bad = _add_gradient(to + (b * row)[:, None], upper * right, terms, has_b & exists, bad, FIXED)
            bad = _add_gradient(to + (c * row)[:, None], lower * left, terms, has_c & exists, bad, FIXED)
            bad = _add_gradient(to + (d * row)[:, None], lower * right, terms, has_d & exists, bad, FIXED)
    if NEEDS_SAMPLING or NEEDS_REFERENCE:
        above, below = dot_a + fx * (dot_b - dot_a), dot_c + fx * (dot_d - dot_c)
        left_x, right_x = dot_b - dot_a, dot_d - dot_c
        grad_x = weight * (left_x + fy * (right_x - left_x))
        grad_y = weight * (below - above)
        if NEEDS_SAMPLING:
            # Outside, factors may not be finite, and must not be multiplied by zero.
            to_x = tl.where(inside, grad_x * step_x, 0.0)
            to_y = tl.where(inside, grad_y * step_y, 0.0)
            tl.store(grad_points_ptr + 2 * k, narrow(to_x, grad_points_ptr.dtype.element_ty), mask=mask)
            tl.store(grad_points_ptr + 2 * k + 1, narrow(to_y, grad_points_ptr.dtype.element_ty), mask=mask)
            to_weight = tl.where(inside, above + fy * (below - above), 0.0)
            tl.store(grad_weights_ptr + k, narrow(to_weight, grad_weights_ptr.dtype.element_ty), mask=mask)
        if NEEDS_REFERENCE:
            grad_x, grad_y = tl.where(inside, grad_x * wide, 0.0), tl.where(inside, grad_y * high, 0.0)
            sum_x += grad_x
            sum_y += grad_y
            sum_width += tl.where(inside, grad_x * point_x, 0.0)
            sum_height += tl.where(inside, grad_y * point_y, 0.0)
    return sum_x, sum_y, sum_width, sum_height, bad


@triton.jit(do_not_specialize=_OF_IMAGES)
def _backward_kernel(
    value_ptr, shapes_ptr, starts_ptr, reference_ptr, points_ptr, weights_ptr, grad_output_ptr, grad_value_ptr,
    grad_points_ptr, grad_weights_ptr,
    grad_reference_ptr, value_scales_ptr, weight_scales_ptr, not_numbers_ptr, sizes, bounds, value_n, value_s, value_h,
    reference_n, reference_q, reference_l, reference_d, points_n, points_q, points_h, points_k, points_d,
    weights_n, weights_q, weights_h, weights_k, positions, queries, offset_scale, grad_n, grad_q,
    POINTS: tl.constexpr, FIRST: tl.constexpr, COORDINATES: tl.constexpr, ON_DEVICE: tl.constexpr,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr,
    WIDE: tl.constexpr, UNROLL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
    NEEDS_VALUE: tl.constexpr, NEEDS_SAMPLING: tl.constexpr, NEEDS_REFERENCE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK_Q queries of one head. Strides of value and grad_output in units of ALIGN.

    grad_weights is with respect to the attention weights, after the softmax where there is one."""
    n, block, head = _program(queries, HEADS, BLOCK_Q)
    q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask = q < queries
    row_stride = tl.cast(value_s, tl.int64 if WIDE else tl.int32) * ALIGN
    rows = value_ptr + n * value_n * ALIGN + head * value_h * ALIGN
    grad_rows = (grad_output_ptr + n * grad_n * ALIGN + head * CHANNELS) + (q * grad_q * ALIGN)[:, None]
    grad_value_ptr += n * positions * (HEADS * CHANNELS) + head * CHANNELS
    at_points = points_ptr + n * points_n + head * points_h + q * points_q
    at_weights = weights_ptr + n * weights_n + head * weights_h + q * weights_q
    group = (n * queries + q) * HEADS + head
    grad_points_ptr += group * (2 * FIRST[len(POINTS)])
    grad_weights_ptr += group * FIRST[len(POINTS)]
    at_reference = at_points
    largest, scale = 0.0, 1.0
    if COORDINATES > 0:
        at_reference = reference_ptr + n * reference_n + q * reference_q
        largest, scale = _softmax(at_weights, weights_k, mask, FIRST[len(POINTS)], UNROLL, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)[None, :]
    grad = tl.load(grad_rows + channel, mask=mask[:, None] & (channel < CHANNELS), other=0.0).to(tl.float32)
    value_scale, weight_scale = 1.0, 1.0
    bad = tl.zeros((BLOCK_Q, BLOCK_D), tl.int32)
    if FIXED:
        value_scale = tl.load(value_scales_ptr + n * HEADS + head)
        weight_scale = tl.load(weight_scales_ptr + n * HEADS + head)
    for level in tl.static_range(len(POINTS)):
        height, width, start, end = _level(shapes_ptr, starts_ptr, sizes, positions, level, ON_DEVICE)
        level_rows = rows + start.to(tl.int64) * row_stride
        level_grad = grad_value_ptr + start.to(tl.int64) * (HEADS * CHANNELS)
        step_x, origin_x, step_y, origin_y = _steps(
            at_reference + level * reference_l, reference_d, mask, width.to(tl.float32), height.to(tl.float32),
            offset_scale, POINTS[level], COORDINATES,
        )  # fmt: skip
        sum_x = tl.zeros((BLOCK_Q,), tl.float32)
        sum_y, sum_width, sum_height = sum_x, sum_x, sum_x
        begin, stop = bounds[level], bounds[level + 1]
        if UNROLL:
            begin, stop = FIRST[level], FIRST[level + 1]
        for k in range(begin, stop):
            sum_x, sum_y, sum_width, sum_height, bad = _backward_sample(
                grad_points_ptr, grad_weights_ptr, level_grad, k, at_points + k * points_k, points_d, step_x, origin_x,
                step_y, origin_y, at_weights + k * weights_k, largest, scale, grad, grad_rows, level_rows, row_stride,
                width, height, end, mask, value_scale, weight_scale, sum_x, sum_y, sum_width, sum_height, bad,
                COORDINATES > 0, NEEDS_VALUE, NEEDS_SAMPLING, NEEDS_REFERENCE, FIXED, PACKED, HALF, WIDE, HEADS,
                CHANNELS, BLOCK_Q, BLOCK_D,
            )  # fmt: skip
        if NEEDS_REFERENCE:
            to = grad_reference_ptr + (group * len(POINTS) + level) * COORDINATES
            tl.store(to, sum_x, mask=mask)
            tl.store(to + 1, sum_y, mask=mask)
            if COORDINATES == 4:
                tl.store(to + 2, sum_width * (offset_scale / POINTS[level]), mask=mask)
                tl.store(to + 3, sum_height * (offset_scale / POINTS[level]), mask=mask)
    if FIXED:
        at = not_numbers_ptr + n * HEADS + head + tl.zeros((BLOCK_Q, BLOCK_D), tl.int32)
        tl.store(at, tl.full((BLOCK_Q, BLOCK_D), 1, tl.int32), mask=bad != 0)


@triton.jit(do_not_specialize=["queries"])
def _softmax_backward_kernel(
    logits_ptr, grad_weights_ptr, out_ptr, stride_n, stride_q, stride_h, stride_k, queries, HEADS: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows of one image, of SAMPLES gradients each, from the weights' to the logits'."""
    blocks = (queries * HEADS + BLOCK_R - 1) // BLOCK_R
    n = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (row < queries * HEADS)[:, None]
    row = tl.minimum(row, queries * HEADS - 1)
    at = (logits_ptr + n * stride_n + (row // HEADS) * stride_q + (row % HEADS) * stride_h)[:, None]
    row = ((n * queries * HEADS + row) * SAMPLES)[:, None]
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    for first in range(0, SAMPLES, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(at + k * stride_k, mask=k < SAMPLES, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, tl.max(x, axis=1))
    total = tl.zeros((BLOCK_R,), tl.float32)
    mean = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, SAMPLES, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(at + k * stride_k, mask=k < SAMPLES, other=0.0).to(tl.float32)
        x = tl.where(k < SAMPLES, tl.exp2((x - largest[:, None]) * _LOG2E), 0.0)
        total += tl.sum(x, axis=1)
        mean += tl.sum(x * tl.load(grad_weights_ptr + row + k, mask=k < SAMPLES, other=0.0), axis=1)
    mean /= total
    for first in range(0, SAMPLES, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(at + k * stride_k, mask=k < SAMPLES, other=0.0).to(tl.float32)
        x = tl.exp2((x - largest[:, None]) * _LOG2E) / total[:, None]
        grad = x * (tl.load(grad_weights_ptr + row + k, mask=k < SAMPLES, other=0.0) - mean[:, None])
        tl.store(out_ptr + row + k, narrow(grad, out_ptr.dtype.element_ty), mask=inside & (k < SAMPLES))


@triton.jit(do_not_specialize=["positions", "count"])
def _from_fixed_kernel(
    sums_ptr, inverse_scales_ptr, not_numbers_ptr, out_ptr, positions, count, HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK fixed-point numbers back to floating point; NaN for heads with terms that were not finite."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = i // (positions * HEADS * CHANNELS) * HEADS + i // CHANNELS % HEADS
    scale = tl.load(inverse_scales_ptr + group, mask=i < count, other=0.0)
    x = (tl.load(sums_ptr + i, mask=i < count, other=0).to(tl.float64) * scale).to(tl.float32)
    x = tl.where(tl.load(not_numbers_ptr + group, mask=i < count, other=0) != 0, float("nan"), x)
    tl.store(out_ptr + i, narrow(x, out_ptr.dtype.element_ty), mask=i < count)


# ---------------------------------------------------------------- launch


def _power_of_two(*numbers: int, limit: int = 16) -> int:
    """The largest power of two up to `limit` that divides them all."""
    common = math.gcd(limit, *numbers)
    return common & -common


def _strides(tensor: Tensor, axes: int) -> list[int]:
    """The strides of the leading axes; 0 for an axis with one element, so that it does not limit the alignment."""
    return [tensor.stride(i) if tensor.shape[i] > 1 else 0 for i in range(axes)]


_REFERENCE = ("reference_n", "reference_q", "reference_l", "reference_d")


class _Call:
    """The arguments of one call of an operator, as the kernels take them.

    Args:
        points, weights: sampling locations and attention weights; with `reference` sampling offsets and logits.
        per_lane: elements of value that a lane should hold, if alignment lets it.
    """

    def __init__(
        self, value: Tensor, levels: list[int], shapes: Tensor | None, starts: Tensor | None,
        reference: Tensor | None, points: Tensor, weights: Tensor, points_per_level: list[int], offset_scale: float,
        per_lane: int, grad_output: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.batch, self.positions, self.heads, self.channels = value.shape
        self.queries = points.shape[1]
        if max(self.positions, self.queries) >= 2**31:
            raise ValueError(f"value: expected fewer than 2^31 positions and queries; got {list(value.shape)}")
        if self.channels > 1 and value.stride(3) != 1:
            value = value.contiguous()
        self.value, self.weights = value, weights
        value_strides = _strides(value, 3)
        grad_strides = []
        if grad_output is not None:
            if grad_output.shape[2] > 1 and grad_output.stride(2) != 1:
                grad_output = grad_output.contiguous()
            grad_strides = _strides(grad_output, 2)
        self.grad_output = grad_output
        self.align = _power_of_two(self.channels, *value_strides, *grad_strides)
        self.points, half = _pack(points)
        packed = half is not None
        arch = architecture(value.device)
        self.block_d = min(triton.next_power_of_2(self.channels), per_lane * arch.warp_size)
        lanes = self.block_d // math.gcd(per_lane, self.align, self.block_d)
        self.chunks = triton.cdiv(self.channels, self.block_d)
        warps = 4
        # Elsewhere the assembler spills a few registers.
        if arch.capability // 10 == 10 and self.channels >= 64:
            warps = 2 if grad_output is None and self.chunks == 1 and lanes == arch.warp_size else 8
        elif arch.capability == 90 and grad_output is not None and self.chunks > 1:
            warps = 8
        self.num_warps, self.block_q = _block(arch, warps, lanes, self.batch * self.heads, self.queries)
        self.blocks = self.batch * triton.cdiv(self.queries, self.block_q) * self.heads
        first = tuple(itertools.accumulate(points_per_level, initial=0))
        reach = max(
            (self.positions - 1) * value_strides[1] + self.channels, self.positions * self.heads * self.channels
        )
        aligned = [stride // self.align for stride in (*value_strides, *grad_strides)]
        self.arguments: dict[str, Any] = {
            "value_ptr": value, "shapes_ptr": shapes, "starts_ptr": starts, "reference_ptr": reference,
            "points_ptr": self.points, "weights_ptr": weights,
            # Bounds as numbers too: with constants alone AMD's compiler unrolls loops and holds all corners at once.
            "sizes": _encoded(levels or [0]), "bounds": first,
            **dict(zip(("value_n", "value_s", "value_h", "grad_n", "grad_q"), aligned, strict=False)),
            **(dict.fromkeys(_REFERENCE, 0) if reference is None else strides("reference", reference, "nqld")),
            **strides("points", self.points, "nqhk"), "points_d": 0 if packed else self.points.stride(4),
            **strides("weights", weights, "nqhk"),
            "positions": self.positions, "queries": self.queries, "offset_scale": offset_scale,
        }  # fmt: skip
        self.constants: dict[str, Any] = {
            "POINTS": tuple(points_per_level),
            "FIRST": first,
            "COORDINATES": 0 if reference is None else reference.shape[3],
            "ON_DEVICE": not levels,
            "HEADS": self.heads,
            "CHANNELS": self.channels,
            "ALIGN": self.align,
            "PACKED": packed,
            "HALF": half,
            "WIDE": reach >= 2**31,
            "UNROLL": first[-1] <= _UNROLLED and not arch.gfx,
            "BLOCK_Q": self.block_q,
            "BLOCK_D": self.block_d,
        }

    @property
    def empty(self) -> bool:
        return self.batch == 0 or self.queries == 0 or self.positions == 0


_PACKED = {
    torch.float32: (torch.int64, "fp32"),
    torch.bfloat16: (torch.int32, "bf16"),
    torch.float16: (torch.int32, "fp16"),
}


def _pack(points: Tensor) -> tuple[Tensor, str | None]:
    """Points [..., 2] as integers [...] of two coordinates each, and the name of their dtype. Unchanged points and None
    if pairs of coordinates are not aligned to their size."""
    if points.dtype not in _PACKED:
        return points, None
    integer, name = _PACKED[points.dtype]
    even = all(
        stride % 2 == 0 for stride, size in zip(points.stride()[:-1], points.shape[:-1], strict=True) if size > 1
    )
    if points.stride(-1) != 1 or not even or points.storage_offset() % 2 or points.data_ptr() % integer.itemsize:
        return points, None
    return points.as_strided(points.shape, [s - s % 2 for s in points.stride()[:-1]] + [1]).view(integer)[..., 0], name


def _block(arch: Architecture, warps: int, lanes: int, groups: int, queries: int) -> tuple[int, int]:
    """Warps, at most `warps`, and queries of a program. Few queries, as in a decoder: smaller programs reach more
    multiprocessors."""
    for num_warps in (n for n in (8, 4, 2, 1) if n <= warps):
        block = max(1, num_warps * arch.warp_size // lanes)
        if groups * triton.cdiv(queries, block) >= 4 * arch.multiprocessors:
            break
    return num_warps, block


def _forward(
    value: Tensor, levels: list[int], shapes: Tensor | None, starts: Tensor | None, reference: Tensor | None,
    points: Tensor, weights: Tensor, points_per_level: list[int], offset_scale: float,
) -> Tensor:  # fmt: skip
    call = _Call(
        value, levels, shapes, starts, reference, points, weights, points_per_level, offset_scale,
        per_lane=16 // value.element_size(),
    )  # fmt: skip
    shape = (call.batch, call.queries, call.heads * call.channels)
    if call.empty:
        return value.new_zeros(shape)
    out = value.new_empty(shape)
    launch(
        _forward_kernel, (call.blocks, call.chunks), **call.arguments, out_ptr=out, **call.constants,
        num_warps=call.num_warps,
    )  # fmt: skip
    return out


def ms_deform_attn(
    value: Tensor, levels: list[int], spatial_shapes: Tensor | None, level_start_index: Tensor | None,
    sampling_locations: Tensor, attention_weights: Tensor, points_per_level: list[int],
) -> Tensor:  # fmt: skip
    """`m2f::ms_deform_attn`."""
    return _forward(
        value, levels, spatial_shapes, level_start_index, None, sampling_locations, attention_weights,
        points_per_level, 0.0,
    )  # fmt: skip


def ms_deform_attn_from_offsets(
    value: Tensor, levels: list[int], spatial_shapes: Tensor | None, level_start_index: Tensor | None,
    reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, points_per_level: list[int],
    offset_scale: float,
) -> Tensor:  # fmt: skip
    """`m2f::ms_deform_attn_from_offsets`."""
    return _forward(
        value, levels, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits,
        points_per_level, offset_scale,
    )  # fmt: skip


# ---------------------------------------------------------------- backward


def _scale(tensor: Tensor, axes: tuple[int, ...], bits: int) -> Tensor:
    """Powers of two that bring the largest finite number over `axes` close to, and not beyond, 2^bits."""
    largest = tensor.nan_to_num(0.0, 0.0, 0.0).abs().amax(axes).float()
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), (bits - exponent).clamp(max=127))


def _backward(
    grad_output: Tensor, value: Tensor, levels: list[int], shapes: Tensor | None, starts: Tensor | None,
    reference: Tensor | None, points: Tensor, weights: Tensor, points_per_level: list[int], offset_scale: float,
    needs_value: bool, needs_reference: bool, needs_sampling: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of value, reference points, points and weights; an empty tensor for each that is not needed."""
    device = value.device
    fixed = needs_value and torch.are_deterministic_algorithms_enabled()
    # 4 channels a lane whatever the dtype, where one reduction adds 16 bytes of the float32 sums; reductions of single
    # numbers want consecutive lanes on consecutive channels.
    wide_reductions = architecture(device).capability >= 90 and not fixed
    call = _Call(
        value, levels, shapes, starts, reference, points, weights, points_per_level, offset_scale,
        per_lane=4 if wide_reductions or not needs_value else 1, grad_output=grad_output,
    )  # fmt: skip
    grad_value, grad_reference, grad_points, grad_weights = (
        like.new_empty(like.shape if needed else 0)
        for like, needed in (
            (value, needs_value), (value if reference is None else reference, needs_reference),
            (points, needs_sampling), (weights, needs_sampling),
        )
    )  # fmt: skip
    if call.empty or not (needs_value or needs_reference or needs_sampling):
        for x in (grad_value, grad_reference, grad_points, grad_weights):
            x.zero_()
        return grad_value, grad_reference, grad_points, grad_weights

    n, q, heads = call.batch, call.queries, call.heads
    samples = sum(points_per_level)
    nothing = value.new_empty(0, dtype=torch.float32)
    # Sums and their terms are float32 or integers; the result is in value's dtype.
    sums = (
        torch.zeros(value.shape, dtype=torch.int64 if fixed else torch.float32, device=device)
        if needs_value
        else nothing
    )
    scales: tuple[Tensor, ...] = (nothing, nothing, nothing)
    if fixed:
        bits = min(FRACTION_BITS, 62 - math.ceil(math.log2(q * samples)))
        of_value = _scale(grad_output.unflatten(2, (heads, call.channels)), (1, 3), bits - _WEIGHT_BITS)
        of_weights = (
            _scale(weights, (1, 3), _WEIGHT_BITS) if reference is None
            else torch.full_like(of_value, 2.0**_WEIGHT_BITS)
        )  # fmt: skip
        scales = (of_value, of_weights, torch.zeros(n, heads, dtype=torch.int32, device=device))
    # Levels and channels are not both unrolled: registers would spill.
    constants = {**call.constants, "UNROLL": call.constants["UNROLL"] and call.chunks == 1}
    # Gradients with respect to softmaxed weights, in float32; in place where they are wanted in float32.
    softmax = reference is not None and needs_sampling
    of_weights = grad_weights
    if softmax and weights.dtype != torch.float32:
        of_weights = torch.empty(weights.shape, dtype=torch.float32, device=device)
    parts = (
        torch.empty((n, q, heads, *reference.shape[2:]), dtype=torch.float32, device=device)
        if reference is not None and needs_reference else nothing
    )  # fmt: skip
    launch(
        _backward_kernel, (call.blocks,), **call.arguments, grad_output_ptr=call.grad_output, grad_value_ptr=sums,
        grad_points_ptr=grad_points, grad_weights_ptr=of_weights, grad_reference_ptr=parts,
        value_scales_ptr=scales[0], weight_scales_ptr=scales[1], not_numbers_ptr=scales[2], **constants,
        NEEDS_VALUE=needs_value, NEEDS_SAMPLING=needs_sampling, NEEDS_REFERENCE=needs_reference, FIXED=fixed,
        num_warps=call.num_warps,
    )  # fmt: skip
    if softmax:
        block_k = min(triton.next_power_of_2(samples), 128)
        block_r = 1024 // block_k
        launch(
            _softmax_backward_kernel, (n * triton.cdiv(q * heads, block_r),),
            logits_ptr=weights, grad_weights_ptr=of_weights, out_ptr=grad_weights,
            **strides("stride", weights, "nqhk"), queries=q,
            HEADS=heads, SAMPLES=samples, BLOCK_R=block_r, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    if needs_reference:
        grad_reference = parts.sum(2).to(grad_reference.dtype)
    if fixed:
        inverse = 1 / (scales[0].double() * scales[1].double())
        count = sums.numel()
        launch(
            _from_fixed_kernel, (triton.cdiv(count, 1024),), sums_ptr=sums, inverse_scales_ptr=inverse,
            not_numbers_ptr=scales[2], out_ptr=grad_value, positions=call.positions, count=count,
            HEADS=heads, CHANNELS=call.channels, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    elif needs_value:
        grad_value = sums.to(value.dtype)
    return grad_value, grad_reference, grad_points, grad_weights


def ms_deform_attn_backward(
    grad_output: Tensor, value: Tensor, levels: list[int], spatial_shapes: Tensor | None,
    level_start_index: Tensor | None, sampling_locations: Tensor, attention_weights: Tensor,
    points_per_level: list[int], needs_value: bool, needs_sampling: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`m2f::ms_deform_attn_backward`; the value gradient is reproducible under torch.use_deterministic_algorithms."""
    grad_value, _, grad_locations, grad_weights = _backward(
        grad_output, value, levels, spatial_shapes, level_start_index, None, sampling_locations, attention_weights,
        points_per_level, 0.0, needs_value, False, needs_sampling,
    )  # fmt: skip
    return grad_value, grad_locations, grad_weights


def ms_deform_attn_from_offsets_backward(
    grad_output: Tensor, value: Tensor, levels: list[int], spatial_shapes: Tensor | None,
    level_start_index: Tensor | None, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor,
    points_per_level: list[int], offset_scale: float, needs_value: bool, needs_reference: bool, needs_sampling: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`m2f::ms_deform_attn_from_offsets_backward`; reproducible as `ms_deform_attn_backward` is."""
    return _backward(
        grad_output, value, levels, spatial_shapes, level_start_index, reference_points, sampling_offsets,
        attention_logits, points_per_level, offset_scale, needs_value, needs_reference, needs_sampling,
    )  # fmt: skip
