"""Triton kernels of point sampling and uncertain points: see `reference.py` for what they compute.

Gradients do not depend on the order in which programs run. With many channels the points are sorted by cell once, and
each pixel gathers its terms. Otherwise terms are scattered with integer atomics, as fixed-point numbers of 64 bits,
whose sum does not depend on the order. They keep 40 bits below the largest term, more than float32 has.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels._triton import MAX_GRID, architecture, block_id, in_parts, launch, rows_and_blocks, strides
from m2f_kernels.ops.points.reference import sample_dtype

#: Bits of a fixed-point gradient below the largest single term.
FRACTION_BITS = 40
#: The number of channels from which on sorting is faster than scattering: on an H200, 12544 points of a 256 x 256 map,
#: 90 against 101 us with 64 channels, 78 against 62 with 32.
SORTED_CHANNELS = 64
_BINS = tl.constexpr(2048)
#: The kernel that selects the most uncertain points: "histogram", which GPUs have run, or "digits", which none has.
SELECTION = os.environ.get("M2F_SELECTION", "histogram")
if SELECTION not in ("histogram", "digits"):
    raise ValueError(f"M2F_SELECTION: expected 'histogram' or 'digits'; got {SELECTION!r}")
#: How a pixel gathers its gradient: point after point ("single"), which GPUs have run; many at once where they crowd
#: ("chunks"); or from rows of all channels ("tiles"). No GPU has run the last two.
GATHER = os.environ.get("M2F_GATHER", "single")
if GATHER not in ("single", "chunks", "tiles"):
    raise ValueError(f"M2F_GATHER: expected 'single', 'chunks' or 'tiles'; got {GATHER!r}")
#: A pixel with more points than `_FEW` takes many of them at once: "chunks" `_CHUNK`, "tiles" as many as it has pixels.
_FEW, _CHUNK = tl.constexpr(64), tl.constexpr(256)


def dense_planes(tensor: Tensor) -> Tensor:
    """`tensor` itself where its last two axes are dense planes, else a contiguous copy; bool as bytes."""
    height, width = tensor.shape[-2:]
    dense = (width == 1 or tensor.stride(-1) == 1) and (height == 1 or tensor.stride(-2) == width)
    tensor = tensor if dense else tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


# ---------------------------------------------------------------- geometry


@triton.jit
def axis(coordinate, size):
    """Pixel below a normalised coordinate, the fraction above it, and whether it contributes anything."""
    length = tl.cast(size, tl.float32)  # Triton makes a size of 1 a constant, which has no methods
    scaled = coordinate * length
    lost = tl.fma(coordinate, length, -scaled)  # the rounding error of the product
    x = scaled - 0.5
    contributes = (x > -1) & (x < length)  # false for NaN
    safe = tl.where(contributes, x, 0.0)
    below = tl.floor(safe)
    return below.to(tl.int32), (safe - below) + tl.where(contributes, lost, 0.0), contributes


@triton.jit
def _corners(plane_ptr, x, y, height, width, inside):
    """Address of the pixel above and left of points, the fractions beyond it, and which columns and rows exist."""
    column, fx, in_x = axis(x, width)
    row, fy, in_y = axis(y, height)
    inside = inside & in_x & in_y
    at = plane_ptr + row * width + column
    left, right = inside & (column >= 0), inside & (column + 1 < width)
    top, bottom = row >= 0, row + 1 < height
    return at, fx, fy, left, right, top, bottom


@triton.jit
def bilinear(plane_ptr, x, y, height, width, inside, id=0, MAP: tl.constexpr = False):
    """Samples of dense planes at points where `inside`; zero elsewhere. Bytes are masks: any value but 0 is 1.

    MAP: a pixel is 1 where it holds `id`, else 0.
    """
    at, fx, fy, left, right, top, bottom = _corners(plane_ptr, x, y, height, width, inside)
    a = tl.load(at, mask=left & top, other=0)
    b = tl.load(at + 1, mask=right & top, other=0)
    c = tl.load(at + width, mask=left & bottom, other=0)
    d = tl.load(at + width + 1, mask=right & bottom, other=0)
    if MAP:
        if a.dtype != tl.int64:  # in 64 bits comparing takes so many registers that some are spilled
            a, b, c, d = a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), d.to(tl.int32)
            top, bottom = top & (id == id.to(tl.int32)), bottom & (id == id.to(tl.int32))
            id = id.to(tl.int32)
        a, b = (a == id) & left & top, (b == id) & right & top
        c, d = (c == id) & left & bottom, (d == id) & right & bottom
    elif a.dtype == tl.uint8:
        a, b, c, d = a != 0, b != 0, c != 0, d != 0
    return weigh(a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32), fx, fy)


@triton.jit
def weigh(a, b, c, d, fx, fy):
    return (a * (1 - fx) + b * fx) * (1 - fy) + (c * (1 - fx) + d * fx) * fy


@triton.jit
def runs_of(runs_ptr, target, num_targets):
    """The height of columns, the address of the ends of a target's runs, and their number; see `masks.RunLengths`."""
    first = tl.load(runs_ptr + 1 + target)
    return tl.load(runs_ptr), runs_ptr + num_targets + 2 + first, tl.load(runs_ptr + 2 + target) - first


@triton.jit
def _foreground(ends_ptr, count, run_height, row, column, steps):
    """1 for pixels (row, column) in a run of foreground, else 0; and the same for the pixels below them.

    Bisection counts the ends at or before a pixel.
    """
    pixel = column * run_height + row
    before = tl.zeros_like(pixel) + 0 * count
    for step in range(steps):
        probe = before + (1 << (steps - 1 - step))
        end = tl.load(ends_ptr + probe - 1, mask=probe <= count, other=0)
        before = tl.where((probe <= count) & (end <= pixel), probe, before)
    end = tl.load(ends_ptr + before, mask=before < count, other=0)
    below = before + ((before < count) & (end <= pixel + 1)).to(tl.int32)
    exists = (column >= 0) & (row < run_height)
    return (
        tl.where(exists & (row >= 0), before & 1, 0).to(tl.float32),
        tl.where((column >= 0) & (row + 1 < run_height), below & 1, 0).to(tl.float32),
    )


@triton.jit
def bilinear_runs(ends_ptr, count, run_height, x, y, height, width, inside, steps):
    """Samples of run lengths at points where `inside`, zero elsewhere; 2^steps is more than there are ends."""
    column, fx, in_x = axis(x, width)
    row, fy, in_y = axis(y, height)
    a, c = _foreground(ends_ptr, count, run_height, row, column, steps)
    b, d = _foreground(ends_ptr, count, run_height, row, column + 1, steps)
    return tl.where(inside & in_x & in_y, weigh(a, b, c, d, fx, fy), 0.0)


@triton.jit
def scatter(plane_ptr, x, y, height, width, gradient, inside):
    """Adds the terms of fixed-point gradients to planes of int64."""
    at, fx, fy, left, right, top, bottom = _corners(plane_ptr, x, y, height, width, inside)
    upper, lower = gradient * (1 - fy), gradient * fy
    tl.atomic_add(at, fixed(upper * (1 - fx)), mask=left & top, sem="relaxed")
    tl.atomic_add(at + 1, fixed(upper * fx), mask=right & top, sem="relaxed")
    tl.atomic_add(at + width, fixed(lower * (1 - fx)), mask=left & bottom, sem="relaxed")
    tl.atomic_add(at + width + 1, fixed(lower * fx), mask=right & bottom, sem="relaxed")


@triton.jit
def fixed(value):
    """The nearest integer. A NaN has no integer; the scale records it."""
    return tl.floor(tl.where(value == value, value, 0.0) + 0.5).to(tl.int64)


# ---------------------------------------------------------------- point_sample


@triton.jit(do_not_specialize=["num_channels", "num_points"])
def _sample_kernel(
    pixels_ptr, points_ptr, out_ptr, stride_n, stride_c, points_n, points_k, points_d, num_channels, num_points,
    height, width, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K points in BLOCK_C channels of one image."""
    n = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = points_ptr + n * points_n + k.to(tl.int64) * points_k
    x = tl.load(at, mask=k < num_points, other=0.0)
    y = tl.load(at + points_d, mask=k < num_points, other=0.0)
    planes = pixels_ptr + n * stride_n + c.to(tl.int64) * stride_c
    inside = (c < num_channels)[:, None] & (k < num_points)[None, :]
    value = bilinear(planes[:, None], x[None, :], y[None, :], height, width, inside)
    to = out_ptr + (n * num_channels + c.to(tl.int64))[:, None] * num_points + k[None, :]
    tl.store(to, value.to(out_ptr.dtype.element_ty), mask=inside)


def point_sample(input: Tensor, points: Tensor, exact: bool) -> Tensor:
    """`m2f::point_sample`: input [N, C, h, w], points [N, K, 2]."""
    n, c, height, width = input.shape
    k = points.shape[1]
    if n > MAX_GRID:
        return in_parts(lambda x, p: (point_sample(x, p, exact),), MAX_GRID, (0, 0), input, points)[0]
    if c > 8 * MAX_GRID:
        return in_parts(lambda x, p: (point_sample(x, p, exact),), 8 * MAX_GRID, (1, -1), input, points, joined=1)[0]
    out = input.new_empty(n, c, k, dtype=sample_dtype(input.dtype, exact))
    if out.numel() == 0:
        return out
    pixels = dense_planes(input)
    block_c = min(triton.next_power_of_2(c), 8)
    launch(
        _sample_kernel, (triton.cdiv(k, 128), triton.cdiv(c, block_c), n), pixels_ptr=pixels, points_ptr=points,
        out_ptr=out, **strides("stride", pixels, "nc"), **strides("points", points, "nkd"), num_channels=c,
        num_points=k, height=height, width=width, BLOCK_C=block_c, BLOCK_K=128, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_targets", "num_points", "steps"])
def _sample_targets_kernel(
    pixels_ptr, marks_ptr, points_ptr, out_ptr, points_k, points_d, num_targets, num_points, height, width, steps,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K points of BLOCK_T targets, of a map of ids or (RUNS) of run lengths."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    at = points_ptr + k.to(tl.int64) * points_k
    x = tl.load(at, mask=k < num_points, other=0.0)[None, :]
    y = tl.load(at + points_d, mask=k < num_points, other=0.0)[None, :]
    inside = (t < num_targets) & (k < num_points)[None, :]
    if RUNS:
        run_height, ends, count = runs_of(marks_ptr, tl.minimum(t, num_targets - 1), num_targets)
        value = bilinear_runs(ends, count, run_height, x, y, height, width, inside, steps)
    else:
        id = tl.load(marks_ptr + t, mask=t < num_targets, other=0)
        value = bilinear(pixels_ptr, x, y, height, width, inside, id, True)
    tl.store(out_ptr + t.to(tl.int64) * num_points + k[None, :], value, mask=inside)


def bisections(marks: Tensor) -> int:
    """The number of bisection steps that suffices for any target's runs."""
    return len(marks).bit_length()


def sample_targets(pixels: Tensor, marks: Tensor, points: Tensor) -> Tensor:
    """`m2f::sample_targets`: pixels [T, H, W], points [K, 2]."""
    (t, height, width), k = pixels.shape, points.shape[0]
    out = torch.empty(t, k, dtype=torch.float32, device=points.device)
    if out.numel() == 0:
        return out
    runs = marks.dtype == torch.int32
    block_t = min(triton.next_power_of_2(t), 8)
    launch(
        _sample_targets_kernel, (triton.cdiv(k, 128), triton.cdiv(t, block_t)),
        pixels_ptr=marks if runs else pixels[0], marks_ptr=marks, points_ptr=points, out_ptr=out,
        **strides("points", points, "kd"), num_targets=t, num_points=k, height=height, width=width,
        steps=bisections(marks) if runs else 0, BLOCK_T=block_t, BLOCK_K=128, RUNS=runs, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_channels", "num_points"])
def _sample_backward_kernel(
    grad_ptr, scale_ptr, points_ptr, sums_ptr, points_n, points_k, points_d, num_channels, num_points, height, width,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K points in one channel of one image."""
    plane = tl.program_id(0).to(tl.int64)
    k = block_id() * BLOCK_K + tl.arange(0, BLOCK_K)
    at = points_ptr + plane // num_channels * points_n + k.to(tl.int64) * points_k
    x = tl.load(at, mask=k < num_points, other=0.0)
    y = tl.load(at + points_d, mask=k < num_points, other=0.0)
    g = tl.load(grad_ptr + plane * num_points + k, mask=k < num_points, other=0.0).to(tl.float32)
    target = sums_ptr + plane * height * width
    scatter(target, x, y, height, width, scale_up(g, scale_ptr + 2 * plane), k < num_points)


@triton.jit(do_not_specialize=["num_pixels"])
def _float_kernel(sums_ptr, scale_ptr, out_ptr, num_pixels, CLEAR: tl.constexpr, BLOCK: tl.constexpr):
    """Fixed-point planes back to floating point; a plane whose scale is NaN becomes NaN."""
    plane = tl.program_id(0).to(tl.int64)
    i = block_id() * BLOCK + tl.arange(0, BLOCK)
    at = plane * num_pixels + i
    value = tl.load(sums_ptr + at, mask=i < num_pixels, other=0).to(tl.float32)
    value = value / tl.load(scale_ptr + 2 * plane) / tl.load(scale_ptr + 2 * plane + 1)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=i < num_pixels)
    if CLEAR:
        tl.store(sums_ptr + at, tl.zeros((BLOCK,), tl.int64), mask=i < num_pixels)


def fixed_point_scale(largest: Tensor) -> Tensor:
    """The factors that turn terms, of which `largest` [P] is the largest, into fixed-point numbers.

    float32 [P, 2], two factors, since one alone is beyond float32 for terms below 3e-27. NaN in the second where a
    term is not finite.
    """
    first = (2.0**FRACTION_BITS / largest).clamp(max=2.0**100)
    return torch.stack([first, (2.0**FRACTION_BITS / first / largest).clamp(max=2.0**100)], 1)


@triton.jit
def scale_up(gradient, scale_ptr):
    """`gradient` times both factors that `scale_ptr` points at."""
    return gradient * tl.load(scale_ptr) * tl.load(scale_ptr + 1)


def to_float(sums: Tensor, scale: Tensor, dtype: torch.dtype, clear: bool = False) -> Tensor:
    """Planes [P, h, w] of fixed-point numbers divided by their scale [P, 2]; `clear` leaves zeros in `sums`."""
    planes, height, width = sums.shape
    out = torch.empty_like(sums, dtype=dtype)
    if out.numel():
        grid = rows_and_blocks(planes, triton.cdiv(height * width, 1024))
        launch(
            _float_kernel, grid, sums_ptr=sums, scale_ptr=scale, out_ptr=out, num_pixels=height * width, CLEAR=clear,
            BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _located(at, points_d, taken, height, width):
    """The cells of points and their fractions beyond the cells' first pixel, in x and in y.

    A cell is what lies between four pixels: there are `height` + 1 rows of `width` + 1, and one more for points that
    contribute nothing.
    """
    column, fx, in_x = axis(tl.load(at, mask=taken, other=0.0), width)
    row, fy, in_y = axis(tl.load(at + points_d, mask=taken, other=0.0), height)
    return tl.where(in_x & in_y, (row + 1) * (width + 1) + column + 1, (height + 1) * (width + 1)), fx, fy


@triton.jit(do_not_specialize=["num_points"])
def _cell_kernel(
    points_ptr, cells_ptr, points_n, points_k, points_d, num_points, height, width, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One program: BLOCK_K points of one image."""
    n = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    at = points_ptr + n * points_n + k.to(tl.int64) * points_k
    cell, _, _ = _located(at, points_d, k < num_points, height, width)
    tl.store(cells_ptr + n * num_points + k, cell, mask=k < num_points)


@triton.jit
def _weight(coordinate, size, pixel):
    """The weight of a pixel in samples at a coordinate. Computed anew, not from the cell that another kernel chose:
    that one may have rounded differently next to a pixel's centre."""
    below, fraction, _ = axis(coordinate, size)
    return tl.where(below == pixel, 1 - fraction, tl.where(below + 1 == pixel, fraction, 0.0))


@triton.jit
def _gather_terms(
    grad_ptr, points_ptr, order_ptr, i, taken, n, c, row, column, points_n, points_k, points_d, num_channels,
    num_points, height, width,
):  # fmt: skip
    """The terms [C, P] of points `i` in the order from `order_ptr` on for pixels; zero where they are not `taken`."""
    k = tl.load(order_ptr + i, mask=taken, other=0)
    at = points_ptr + n * points_n + k * points_k
    weight = _weight(tl.load(at, mask=taken, other=0.0), width, column)
    weight *= _weight(tl.load(at + points_d, mask=taken, other=0.0), height, row)
    from_ = grad_ptr + (n * num_channels + c)[:, None] * num_points + k[None, :]
    g = tl.load(from_, mask=(c < num_channels)[:, None] & taken[None, :], other=0.0).to(tl.float32)
    return tl.where(taken[None, :], g * weight[None, :], 0.0)


@triton.jit
def _gather_pixel(
    total, grad_ptr, points_ptr, order_ptr, n, c, row, column, start, length, points_n, points_k, points_d,
    num_channels, num_points, height, width,
):  # fmt: skip
    """The terms [C] of `length` sorted points from `start` for one pixel, `_CHUNK` points at once."""
    part = tl.zeros((total.shape[0], _CHUNK), tl.float32)
    for first in range(0, length, _CHUNK):
        i = first + tl.arange(0, _CHUNK)
        taken = i < length
        part += _gather_terms(
            grad_ptr, points_ptr, order_ptr + n * num_points + start, i, taken, n, c, row, column, points_n, points_k,
            points_d, num_channels, num_points, height, width,
        )  # fmt: skip
    return tl.sum(part, axis=1)


@triton.jit
def _gather_rows(
    total, grad_ptr, points_ptr, order_ptr, first_ptr, n, c, row, column, points_n, points_k, points_d, num_channels,
    num_points, height, width, inside, BELOW: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds to `total` [C, P] the terms of the two cells above (BELOW: below) each pixel."""
    cell = (row + BELOW) * (width + 1) + column
    first_ptr += n * ((height + 1) * (width + 1) + 1)
    start = tl.load(first_ptr + cell, mask=inside, other=0)
    count = tl.load(first_ptr + cell + 2, mask=inside, other=0) - start
    if CHUNKS:
        crowded = tl.where(count > _FEW, count, 0)
        if tl.max(crowded, axis=0) > 0:
            for j in range(BLOCK_P):
                here = tl.arange(0, BLOCK_P) == j
                length = tl.sum(tl.where(here, crowded, 0), axis=0)
                if length > 0:
                    pixel_sum = _gather_pixel(
                        total, grad_ptr, points_ptr, order_ptr, n, c, tl.sum(tl.where(here, row, 0), axis=0),
                        tl.sum(tl.where(here, column, 0), axis=0), tl.sum(tl.where(here, start, 0), axis=0), length,
                        points_n, points_k, points_d, num_channels, num_points, height, width,
                    )  # fmt: skip
                    # Not as a product with zero: the sum may not be finite.
                    total += tl.where(here[None, :], pixel_sum[:, None], 0.0)
        count -= crowded
    for i in range(tl.max(count, axis=0)):
        taken = i < count
        total += _gather_terms(
            grad_ptr, points_ptr, order_ptr + n * num_points + start, i, taken, n, c, row, column, points_n, points_k,
            points_d, num_channels, num_points, height, width,
        )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["num_channels", "num_points"])
def _gather_backward_kernel(
    grad_ptr, points_ptr, order_ptr, first_ptr, out_ptr, points_n, points_k, points_d, num_channels, num_points,
    height, width, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels in BLOCK_C channels of one image."""
    n = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    row, column, inside = p // width, p % width, p < height * width
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for below in tl.static_range(2):
        total = _gather_rows(
            total, grad_ptr, points_ptr, order_ptr, first_ptr, n, c, row, column, points_n, points_k, points_d,
            num_channels, num_points, height, width, inside, below, CHUNKS, BLOCK_P,
        )  # fmt: skip
    to = out_ptr + ((n * num_channels + c) * height * width)[:, None] + p[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=(c < num_channels)[:, None] & inside[None, :])


def _sorted(cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The points of each image by their cell [N, K], and where each cell begins among them [N, count + 1]."""
    # Stable: equals keep their order, and so does the sum of their terms.
    sorted_cells, order = cells.sort(dim=1, stable=True)
    bounds = torch.arange(count + 1, dtype=torch.int32, device=cells.device)
    return order, torch.searchsorted(sorted_cells, bounds.expand(len(cells), -1).contiguous(), out_int32=True)


def _backward_sorted(grad: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    """grad [N, C, K] contiguous, points [N, K, 2]."""
    n, c, k = grad.shape
    if n > MAX_GRID:
        return in_parts(lambda g, p: (_backward_sorted(g, p, height, width),), MAX_GRID, (0, 0), grad, points)[0]
    if c > 8 * MAX_GRID:
        parts = in_parts(
            lambda g, p: (_backward_sorted(g.contiguous(), p, height, width),), 8 * MAX_GRID, (1, -1), grad, points,
            joined=1,
        )  # fmt: skip
        return parts[0]
    if GATHER == "tiles" and k < 2**29:  # its offsets of weights have 32 bits
        return _backward_tiles(grad, points, height, width)
    cells = torch.empty(n, k, dtype=torch.int32, device=grad.device)
    launch(
        _cell_kernel, (triton.cdiv(k, 256), n), points_ptr=points, cells_ptr=cells, **strides("points", points, "nkd"),
        num_points=k, height=height, width=width, BLOCK_K=256, num_warps=4,
    )  # fmt: skip
    order, first = _sorted(cells, (height + 1) * (width + 1))
    out = torch.empty(n, c, height, width, dtype=grad.dtype, device=grad.device)
    launch(
        _gather_backward_kernel, (triton.cdiv(height * width, 64), triton.cdiv(c, 8), n), grad_ptr=grad,
        points_ptr=points, order_ptr=order, first_ptr=first, out_ptr=out, **strides("points", points, "nkd"),
        num_channels=c, num_points=k, height=height, width=width, BLOCK_C=8, BLOCK_P=64,
        CHUNKS=GATHER == "chunks", num_warps=4 if GATHER == "chunks" else 2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_channels", "num_points"])
def _rows_kernel(
    grad_ptr, points_ptr, rows_ptr, weights_ptr, cells_ptr, points_n, points_k, points_d, num_channels, num_points,
    height, width, ROW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK_K points of one image in BLOCK_C channels, transposed.

    The first channels' programs also write each point's cell and the weights of the four pixels around it.
    """
    n = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, point = k < num_points, n * num_points + k
    from_ = grad_ptr + ((n * num_channels + c) * num_points)[:, None] + k[None, :]
    g = tl.load(from_, mask=(c < num_channels)[:, None] & inside[None, :], other=0.0)
    tl.store(rows_ptr + (point * ROW)[:, None] + c[None, :], tl.trans(g), mask=inside[:, None])
    if tl.program_id(1) == 0:
        at = points_ptr + n * points_n + k.to(tl.int64) * points_k
        cell, fx, fy = _located(at, points_d, inside, height, width)
        tl.store(cells_ptr + point, cell, mask=inside)
        corner = tl.arange(0, 4)[None, :]
        weight = tl.where(corner % 2 == 1, fx[:, None], 1 - fx[:, None])
        weight *= tl.where(corner >= 2, fy[:, None], 1 - fy[:, None])
        tl.store(weights_ptr + (point * 4)[:, None] + corner, weight, mask=inside[:, None])


@triton.jit
def _slots(first_ptr, width, inside):
    """The points of pixels, in slots: those of the two cells above a pixel, then those of the two below it.

    Which sorted point slot 0 is, in the cells above and as if it were in those below; in which slots the second, third
    and fourth cell begin; the number of slots.
    """
    above = tl.load(first_ptr, mask=inside, other=0)
    second = tl.load(first_ptr + 1, mask=inside, other=0) - above
    third = tl.load(first_ptr + 2, mask=inside, other=0) - above
    first_ptr += width + 1
    below = tl.load(first_ptr, mask=inside, other=0) - third
    fourth = tl.load(first_ptr + 1, mask=inside, other=0) - below
    return above, below, second, third, fourth, tl.load(first_ptr + 2, mask=inside, other=0) - below


@triton.jit
def _row_terms(rows_ptr, weights_ptr, order_ptr, slot, taken, above, below, second, third, fourth, ROW: tl.constexpr):
    """The terms [B, S, C] of the points in slots; zero where they are not `taken`."""
    k = tl.load(order_ptr + (slot + tl.where(slot < third, above, below)), mask=taken, other=0).to(tl.int32)
    corner = 3 - (slot >= second).to(tl.int32) - (slot >= third).to(tl.int32) - (slot >= fourth).to(tl.int32)
    weight = tl.load(weights_ptr + (4 * k + corner), mask=taken, other=0.0)
    g = tl.load(rows_ptr + (k.to(tl.int64) * ROW)[None, :, None], mask=taken[None, :, None], other=0.0)
    return g.to(tl.float32) * weight[None, :, None]


@triton.jit
def _add_crowd(total, rows_ptr, weights_ptr, order_ptr, first_ptr, width, inside, pixel, ROW: tl.constexpr):
    """`total` [B, P, C] with the terms of one of its pixels, P points at once, if that has more than `_FEW`."""
    above, below, second, third, fourth, count = _slots(first_ptr, width, inside)
    if count > _FEW:
        pixels = tl.arange(0, total.shape[1])
        part = tl.zeros_like(total)
        for start in range(0, count, total.shape[1]):
            slot = start + pixels
            part += _row_terms(
                rows_ptr, weights_ptr, order_ptr, slot, slot < count, above, below, second, third, fourth, ROW
            )
        # Not as a product with zero: the sum may not be finite.
        total += tl.where((pixels == pixel)[None, :, None], tl.sum(part, axis=1)[:, None, :], 0.0)
    return total


@triton.jit(do_not_specialize=["num_channels", "num_points"])
def _gather_rows_kernel(
    rows_ptr, weights_ptr, order_ptr, first_ptr, out_ptr, num_channels, num_points, height, width, ROW: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of one row in BLOCKS * BLOCK_C channels of one image."""
    n = tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(width, BLOCK_P)
    row, begin = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_P
    pixels, left = tl.arange(0, BLOCK_P), width - begin
    # Blocks of channels lie in a thread's registers, so that it uses a weight more often.
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    c = block[:, None, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    rows_ptr += n * num_points * ROW + c
    weights_ptr += n * num_points * 4
    order_ptr += n * num_points
    first_ptr += n * ((height + 1) * (width + 1) + 1) + row * (width + 1) + begin
    above, below, second, third, fourth, count = _slots(first_ptr + pixels, width, pixels < left)
    crowded = tl.max(count, axis=0) > _FEW
    count = tl.where(count > _FEW, 0, count)
    total = tl.zeros((BLOCKS, BLOCK_P, BLOCK_C), tl.float32)
    for slot in range(tl.max(count, axis=0)):
        total += _row_terms(
            rows_ptr, weights_ptr, order_ptr, slot, slot < count, above, below, second, third, fourth, ROW
        )
    if crowded:
        for j in range(BLOCK_P):
            total = _add_crowd(total, rows_ptr, weights_ptr, order_ptr, first_ptr + j, width, j < left, j, ROW)
    c = tl.trans(c, (0, 2, 1))
    to = out_ptr + n * num_channels * height * width + (row * width + begin)
    to += c.to(tl.int64) * (height * width) + pixels[None, None, :]
    total = tl.trans(total, (0, 2, 1)).to(out_ptr.dtype.element_ty)
    tl.store(to, total, mask=(c < num_channels) & (pixels < left)[None, None, :])


def _backward_tiles(grad: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    """As `_backward_sorted`, from gradients transposed to rows of all channels: a pixel loads whole rows."""
    n, c, k = grad.shape
    block_c, blocks = min(triton.next_power_of_2(c), 128), 2 if c > 128 else 1
    programs_c = triton.cdiv(c, blocks * block_c)
    row = programs_c * blocks * block_c
    rows = torch.empty(n, k, row, dtype=grad.dtype, device=grad.device)
    weights = torch.empty(n, k, 4, dtype=torch.float32, device=grad.device)
    cells = torch.empty(n, k, dtype=torch.int32, device=grad.device)
    narrow = min(block_c, 64)
    launch(
        _rows_kernel, (triton.cdiv(k, 64), row // narrow, n), grad_ptr=grad, points_ptr=points, rows_ptr=rows,
        weights_ptr=weights, cells_ptr=cells, **strides("points", points, "nkd"), num_channels=c, num_points=k,
        height=height, width=width, ROW=row, BLOCK_C=narrow, BLOCK_K=64, num_warps=4,
    )  # fmt: skip
    order, first = _sorted(cells, (height + 1) * (width + 1))
    out = torch.empty(n, c, height, width, dtype=grad.dtype, device=grad.device)
    # A sector of 32 bytes: the fewer pixels, the fewer wait for the one with most points. On sm_75 8 pixels spill.
    block_p = 16 if grad.element_size() == 2 or architecture(grad.device).capability == 75 else 8
    launch(
        _gather_rows_kernel, (triton.cdiv(width, block_p) * height, programs_c, n), rows_ptr=rows, weights_ptr=weights,
        order_ptr=order, first_ptr=first, out_ptr=out, num_channels=c, num_points=k, height=height, width=width,
        ROW=row, BLOCKS=blocks, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=4,
    )  # fmt: skip
    return out


def point_sample_backward(grad_output: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    """`m2f::point_sample_backward`: grad_output [N, C, K], points [N, K, 2]."""
    n, c, k = grad_output.shape
    if c >= SORTED_CHANNELS and grad_output.numel() and height * width:
        return _backward_sorted(grad_output.contiguous(), points, height, width)
    grad = grad_output.contiguous().view(n * c, k)
    sums = torch.zeros(n * c, height, width, dtype=torch.int64, device=grad.device)
    scale = grad.new_ones(n * c, 2, dtype=torch.float32)
    if grad.numel():
        scale = fixed_point_scale(grad.float().abs().amax(1))
        launch(
            _sample_backward_kernel, rows_and_blocks(n * c, triton.cdiv(k, 256)), grad_ptr=grad, scale_ptr=scale,
            points_ptr=points, sums_ptr=sums, **strides("points", points, "nkd"), num_channels=c, num_points=k,
            height=height, width=width, BLOCK_K=256, num_warps=4,
        )  # fmt: skip
    return to_float(sums, scale, grad.dtype).view(n, c, height, width)


# ---------------------------------------------------------------- uncertain_points


@triton.jit
def uniform_point(seed, stream, k):
    """Point k of a stream: see `reference.uniform_points`."""
    zero = k * 0
    w0, w1, w2, w3 = tl.philox(seed, k // 2, zero + stream, zero, zero)
    odd = (k % 2) == 1
    x = (tl.where(odd, w2, w0).to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 5.9604644775390625e-08
    y = (tl.where(odd, w3, w1).to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 5.9604644775390625e-08
    return x, y


@triton.jit(do_not_specialize=["first_stream", "candidates"])
def _candidates_kernel(
    logits_ptr, stride, rows_ptr, seed_ptr, keys_ptr, first_stream, candidates, height, width, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: the keys of BLOCK candidates of one mask, which have the order of |logit|; 0 for NaN."""
    m = tl.program_id(0)
    k = block_id() * BLOCK + tl.arange(0, BLOCK)
    x, y = uniform_point(tl.load(seed_ptr), first_stream + m, k)
    plane = logits_ptr + tl.load(rows_ptr + m) * stride
    value = bilinear(plane, x, y, height, width, k < candidates)
    key = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) + 1
    key = tl.where(value == value, key, 0)
    tl.store(keys_ptr + m.to(tl.int64) * candidates + k, key, mask=k < candidates)


@triton.jit
def _narrow(
    keys_ptr, count, prefix, wanted, ABOVE: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The next BITS bits of the key of rank `wanted` among those that begin with `prefix`, and its rank among those."""
    bins = tl.zeros((_BINS,), tl.int32)
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + k, mask=k < count, other=0)
        found = (k < count) & ((key >> ABOVE) == prefix)
        # Other keys are counted in the last bin, which 10 bits never reach, and in which 11 bits have no key.
        bins += tl.histogram(tl.where(found, (key >> SHIFT) & ((1 << BITS) - 1), _BINS - 1), _BINS)
    below = tl.cumsum(bins, 0)
    bin = tl.sum((below < wanted).to(tl.int32), axis=0)
    before = tl.sum(tl.where(tl.arange(0, _BINS) < bin, bins, 0), axis=0)
    return (prefix << BITS) | bin, wanted - before


@triton.jit
def _narrow_by_digit(
    keys_ptr, count, prefix, wanted, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """As `_narrow`, of at most 3 bits, without a histogram.

    A thread counts its keys in eight fields of 4 bits, which hold as many tiles as there are between two sums; a sum is
    of two fields of 16 bits at once.
    """
    TILES: tl.constexpr = min(15, 65535 // BLOCK)
    digits = tl.arange(0, 8)
    counts = tl.zeros((8,), tl.int32)
    for first in range(0, count, TILES * BLOCK):
        fields = tl.zeros((BLOCK,), tl.int32)
        for start in range(first, tl.minimum(first + TILES * BLOCK, count), BLOCK):
            k = start + tl.arange(0, BLOCK)
            key = tl.load(keys_ptr + k, mask=k < count, other=-1)  # begins with no prefix
            field = 1 << (((key >> SHIFT) & ((1 << BITS) - 1)) * 4)
            fields += tl.where((key >> (SHIFT + BITS)) == prefix, field, 0)
        for digit in tl.static_range(4):
            both = tl.sum((fields >> (4 * digit)) & 0x000F000F, axis=0)
            counts += tl.where(digits == digit, both & 0xFFFF, 0)
            counts += tl.where(digits == digit + 4, (both >> 16) & 0xFFFF, 0)
    below = tl.cumsum(counts, 0)
    found = tl.sum((below < wanted).to(tl.int32), axis=0)
    before = tl.sum(tl.where(digits < found, counts, 0), axis=0)
    return (prefix << BITS) | found, wanted - before


@triton.jit
def _write_kept(keys_ptr, seed_ptr, out_ptr, stream, candidates, threshold, equal, BLOCK: tl.constexpr):
    """The points of the keys below `threshold`, and of the first `equal` that equal it, in order."""
    kept = 0
    ties = 0
    for start in range(0, candidates, BLOCK):
        k = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + k, mask=k < candidates, other=0x7FFFFFFF)
        tie = (key == threshold).to(tl.int32)
        tie_rank = ties + tl.cumsum(tie, 0)
        chosen = ((key < threshold) | ((tie == 1) & (tie_rank <= equal))).to(tl.int32)
        position = kept + tl.cumsum(chosen, 0) - 1
        x, y = uniform_point(tl.load(seed_ptr), stream, k)
        tl.store(out_ptr + 2 * position, x, mask=chosen == 1)
        tl.store(out_ptr + 2 * position + 1, y, mask=chosen == 1)
        kept += tl.sum(chosen, axis=0)
        ties += tl.sum(tie, axis=0)


@triton.jit(do_not_specialize=["first_stream", "candidates", "keep"])
def _keep_kernel(keys_ptr, seed_ptr, points_ptr, first_stream, candidates, keep, total, BLOCK: tl.constexpr):
    """One program: the `keep` smallest keys of one mask, by radix selection, and their points in order."""
    m = tl.program_id(0)
    keys_ptr += m.to(tl.int64) * candidates
    prefix, wanted = _narrow(keys_ptr, candidates, 0, keep, 31, 20, 11, BLOCK)
    prefix, wanted = _narrow(keys_ptr, candidates, prefix, wanted, 20, 10, 10, BLOCK)
    threshold, equal = _narrow(keys_ptr, candidates, prefix, wanted, 10, 0, 10, BLOCK)
    out = points_ptr + m.to(tl.int64) * total * 2
    _write_kept(keys_ptr, seed_ptr, out, first_stream + m, candidates, threshold, equal, BLOCK)


@triton.jit(do_not_specialize=["first_stream", "candidates", "keep"])
def _keep_by_digits_kernel(keys_ptr, seed_ptr, points_ptr, first_stream, candidates, keep, total, BLOCK: tl.constexpr):
    """The same by eleven digits of three bits (the last of one)."""
    m = tl.program_id(0)
    keys_ptr += m.to(tl.int64) * candidates
    prefix, wanted = _narrow_by_digit(keys_ptr, candidates, 0, keep, 28, 3, BLOCK)
    for i in tl.static_range(9):
        prefix, wanted = _narrow_by_digit(keys_ptr, candidates, prefix, wanted, 25 - 3 * i, 3, BLOCK)
    threshold, equal = _narrow_by_digit(keys_ptr, candidates, prefix, wanted, 0, 1, BLOCK)
    out = points_ptr + m.to(tl.int64) * total * 2
    _write_kept(keys_ptr, seed_ptr, out, first_stream + m, candidates, threshold, equal, BLOCK)


@triton.jit(do_not_specialize=["first_stream", "candidates", "keep"])
def _fresh_kernel(seed_ptr, points_ptr, first_stream, candidates, keep, fresh, BLOCK: tl.constexpr):
    """One program: BLOCK of a mask's uniform points."""
    m = tl.program_id(0)
    k = block_id() * BLOCK + tl.arange(0, BLOCK)
    x, y = uniform_point(tl.load(seed_ptr), first_stream + m, candidates + k)
    out = points_ptr + (m.to(tl.int64) * (keep + fresh) + keep + k) * 2
    tl.store(out, x, mask=k < fresh)
    tl.store(out + 1, y, mask=k < fresh)


def uncertain_points(
    mask_logits: Tensor, rows: Tensor, seed: Tensor, first_stream: int, candidates: int, keep: int, fresh: int
) -> Tensor:
    """`m2f::uncertain_points`: mask_logits [P, h, w], rows [M], seed [1]."""
    m = rows.shape[0]
    points = torch.empty(m, keep + fresh, 2, dtype=torch.float32, device=rows.device)
    if m == 0:
        return points
    keys = torch.empty(m if keep else 0, candidates, dtype=torch.int32, device=rows.device)
    launch_kept(mask_logits, rows, seed, keys, points, first_stream, candidates, keep)
    launch_fresh(seed, points, first_stream, candidates, keep, fresh)
    return points


def launch_kept(
    mask_logits: Tensor, rows: Tensor, seed: Tensor | None, keys: Tensor, points: Tensor, first_stream: int,
    candidates: int, keep: int,
) -> None:  # fmt: skip
    """Write the uncertain points of the planes `rows` [m] to the beginning of `points` [m, K, 2]; `keys` is memory for
    at least m candidates' keys."""
    (m, total), (height, width) = points.shape[:2], mask_logits.shape[1:]
    if not keep:
        return
    logits = dense_planes(mask_logits)
    launch(
        _candidates_kernel, rows_and_blocks(m, triton.cdiv(candidates, 512)), logits_ptr=logits,
        stride=logits.stride(0), rows_ptr=rows, seed_ptr=seed, keys_ptr=keys, first_stream=first_stream,
        candidates=candidates, height=height, width=width, BLOCK=512, num_warps=4,
    )  # fmt: skip
    # The cost of a histogram is its 2048 bins, so blocks are few and large. With 16 warps the largest spills with
    # Triton 3.6 and 3.7.
    by_digits = SELECTION == "digits"
    largest = 8192 if by_digits and architecture(rows.device).capability in (90, 100) else 4096  # elsewhere that spills
    block = min(max(triton.next_power_of_2(candidates), 1024), largest)
    launch(
        _keep_by_digits_kernel if by_digits else _keep_kernel, (m,), keys_ptr=keys, seed_ptr=seed, points_ptr=points,
        first_stream=first_stream, candidates=candidates, keep=keep, total=total, BLOCK=block,
        num_warps=16 if block == 8192 else 8,
    )  # fmt: skip


def launch_fresh(
    seed: Tensor | None, points: Tensor, first_stream: int, candidates: int, keep: int, fresh: int
) -> None:
    """Write the uniform points to the end of `points` [m, keep + fresh, 2]."""
    if fresh:
        launch(
            _fresh_kernel, rows_and_blocks(points.shape[0], triton.cdiv(fresh, 256)), seed_ptr=seed,
            points_ptr=points, first_stream=first_stream, candidates=candidates, keep=keep, fresh=fresh,
            BLOCK=256, num_warps=4,
        )  # fmt: skip
