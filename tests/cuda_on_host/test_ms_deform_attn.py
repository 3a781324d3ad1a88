"""The CUDA kernels of multi-scale deformable attention, run on the host, against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from m2f_kernels.ops.ms_deform_attn import reference

Sizes = Sequence[tuple[int, int]]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("locations", "offsets, 2-d", "offsets, 4-d")


@dataclass
class Case:
    """Inputs of one operator call, and how to run it."""

    sizes: Sizes
    points: list[int]
    value: Tensor
    samples: Tensor  # locations or offsets
    weights: Tensor  # weights or logits
    reference: Tensor | None
    grad_output: Tensor
    offset_scale: float = 0.5
    starts: list[int] | None = None
    on_device: bool = False
    architecture: int = 90
    multiprocessors: int = 132
    reversed: bool = False
    needs: tuple[str, ...] = ("value", "reference", "samples")
    lean: bool = False  # the forward by the lean kernel where it serves the call
    gathered: bool = False  # the value gradient by the gathering kernel where it serves the call

    @property
    def levels(self) -> list[int]:
        starts, total = [], 0
        for h, w in self.sizes:
            starts.append(total)
            total += h * w
        starts = self.starts or starts
        return [n for (h, w), start in zip(self.sizes, starts, strict=True) for n in (h, w, start)]

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"value": self.value, "samples": self.samples, "weights": self.weights, "reference": self.reference}
        return {name: x for name, x in named.items() if x is not None}


@dataclass
class Results:
    output: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)
    lean: bool = False  # the lean kernel served the forward
    reduced: int = 0  # bytes that were added to memory


def make_case(
    mode: str = "locations",
    sizes: Sizes = ((5, 7), (3, 4)),
    points: Sequence[int] = (3, 2),
    n: int = 2,
    q: int | None = 7,
    heads: int = 2,
    d: int = 16,
    dtype: str = "float32",
    sampling_dtype: str | Sequence[str] | None = None,
    spread: float = 2.0,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random inputs, a good part of them outside the levels, none near a pixel centre, where gradients jump.

    q None means that the queries are the positions of the levels.
    """
    generator = torch.Generator().manual_seed(seed)
    dtypes = [sampling_dtype or dtype] * 3 if not isinstance(sampling_dtype, (list, tuple)) else list(sampling_dtype)
    samples_dtype, weights_dtype, reference_dtype = (DTYPES[name] for name in dtypes)
    s = sum(h * w for h, w in sizes)
    q = s if q is None else q
    k = sum(points)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    size = torch.tensor(
        [(w, h) for (h, w), p in zip(sizes, points, strict=True) for _ in range(p)], dtype=torch.float64
    )
    value = normal(n, s, heads, d).to(DTYPES[dtype])
    grad_output = normal(n, q, heads * d).to(DTYPES[dtype])
    reference_points = None
    if mode == "locations":
        samples = uniform(n, q, heads, k, 2) * 1.4 - 0.2
        step = 1 / size
    else:
        reference_points = uniform(n, q, len(sizes), 2 if "2-d" in mode else 4).to(reference_dtype)
        samples = normal(n, q, heads, k, 2) * spread
        step = torch.ones(())
    samples = samples.to(samples_dtype)
    for _ in range(10):
        location = samples.double()
        if reference_points is not None:
            levels = [x for h, w in sizes for x in (h, w, 0)]
            location = reference.locations_from_offsets(
                levels, reference_points.double(), samples.double(), points, 0.5
            )
        pixel = location * size - 0.5
        near = (pixel - pixel.round()).abs() < 2e-3
        samples = torch.where(near, samples.double() + 0.37 * step, samples.double()).to(samples_dtype)
    weights = normal(n, q, heads, k) if reference_points is not None else uniform(n, q, heads, k)
    return Case(
        sizes, list(points), value, samples, weights.to(weights_dtype), reference_points, grad_output, **options
    )


def expect(case: Case) -> Results:
    """The reference in float64. Coordinates that are not finite are moved far outside, which is what they mean."""
    leaves = {name: x.detach().double() for name, x in case.tensors.items()}
    for name in ("samples", "reference"):
        if name in leaves:
            leaves[name] = torch.where(leaves[name].isfinite(), leaves[name], 1e6)
    leaves = {name: x.contiguous().requires_grad_() for name, x in leaves.items()}
    if case.reference is None:
        output = reference.ms_deform_attn(
            leaves["value"], case.levels, leaves["samples"], leaves["weights"], case.points
        )
    else:
        output = reference.ms_deform_attn_from_offsets(
            leaves["value"],
            case.levels,
            leaves["reference"],
            leaves["samples"],
            leaves["weights"],
            case.points,
            case.offset_scale,
        )
    gradients = torch.autograd.grad(output, list(leaves.values()), case.grad_output.double())
    return Results(output.detach(), dict(zip(leaves, gradients, strict=True)))


def to_array(x: Tensor) -> tuple[np.ndarray, str]:
    """The same memory as a NumPy array, with the name of its dtype; 16-bit floats as uint16."""
    name = str(x.dtype).removeprefix("torch.")
    return (x.detach().view(torch.uint16) if x.element_size() == 2 else x.detach()).numpy(), name


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def run(kernels: ModuleType, case: Case, forward: bool = True) -> Results:
    """The kernels' output, unless it is not wanted, and gradients; every result buffer starts as NaN."""
    problem = kernels.Problem(
        to_array(case.value),
        case.levels,
        case.on_device,
        case.points,
        to_array(case.samples),
        to_array(case.weights),
        None if case.reference is None else to_array(case.reference),
        case.offset_scale,
        case.architecture,
        case.multiprocessors,
        case.reversed,
    )
    dtype = case.value.dtype
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    n, q, heads = case.weights.shape[:3]
    output = poisoned((n, q, heads * case.value.shape[3]), dtype)
    lean = problem.forward(to_array(output)[0], case.lean) if forward else False
    results = Results(output, lean=lean)
    if case.needs == ("output",):
        return results

    def buffer(name: str, tensor: Tensor | None) -> Tensor | None:
        if name not in case.needs or tensor is None:
            return None
        return poisoned(tensor.shape, tensor.dtype)

    grads = {"value": buffer("value", case.value), "samples": buffer("samples", case.samples)}
    grads["weights"] = buffer("samples", case.weights)
    grads["reference"] = buffer("reference", case.reference)
    value_sum = None if grads["value"] is None else torch.zeros(case.value.shape, dtype=accumulator)
    parts = None
    if grads["reference"] is not None:
        parts = poisoned((n, q, heads, *grads["reference"].shape[2:]), accumulator)
    if value_sum is not None and accumulator == dtype:
        grads["value"] = value_sum

    def array(x: Tensor | None) -> np.ndarray | None:
        return None if x is None else to_array(x)[0]

    results.reduced = problem.backward(
        to_array(case.grad_output),
        array(value_sum),
        None if accumulator == dtype else array(grads["value"]),
        array(grads["samples"]),
        array(grads["weights"]),
        array(parts),
        None if grads["reference"] is None else to_array(grads["reference"]),
        case.gathered,
    )
    results.gradients = {name: x for name, x in grads.items() if x is not None}
    return results


def relative_error(x: Tensor, expected: Tensor) -> float:
    norm = torch.linalg.vector_norm(expected).item()
    error = torch.linalg.vector_norm(x.double() - expected).item()
    return error / norm if norm else error


def check_close(name: str, x: Tensor, expected: Tensor, accumulated_in_double: bool, gradient: bool) -> None:
    """At 64 and 32 bits a fixed limit; at 16 the error of rounding the exact result, and 5 % on top of that limit."""
    assert x.shape == expected.shape
    limit = 1e-12 if accumulated_in_double else (1e-4 if gradient else 1e-5)
    rounding = relative_error(expected.to(x.dtype), expected)
    error = relative_error(x, expected)
    assert error <= limit + 1.05 * rounding, f"{name}: relative error {error:.2e}, rounding alone {rounding:.2e}"


def check(kernels: ModuleType, case: Case) -> Results:
    results, expected = run(kernels, case), expect(case)
    double = case.value.dtype == torch.float64
    check_close("output", results.output, expected.output, double, False)
    for name, gradient in results.gradients.items():
        check_close(f"gradient of {name}", gradient, expected.gradients[name], double, True)
    assert set(results.gradients) == {
        name for name in case.tensors if name in case.needs or (name == "weights" and "samples" in case.needs)
    }
    return results


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d", [1, 3, 8, 16, 20, 32, 33, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels(kernels: ModuleType, dtype: str, d: int, mode: str) -> None:
    check(kernels, make_case(mode, dtype=dtype, d=d, n=1 if d > 64 else 2, q=5, seed=d))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d", [8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scalar_reductions(kernels: ModuleType, dtype: str, d: int, mode: str) -> None:
    """Architectures without 16-byte reductions."""
    check(kernels, make_case(mode, dtype=dtype, d=d, architecture=80))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d", [8, 24])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_order_of_threads(kernels: ModuleType, dtype: str, d: int, mode: str) -> None:
    """Threads run from the last to the first find the barriers that the other order does not need."""
    check(kernels, make_case(mode, dtype=dtype, d=d, reversed=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("sizes", "points"),
    [
        ([(6, 6)], [1]),
        ([(6, 6)], [9]),
        ([(4, 9), (9, 4)], [1, 7]),
        ([(4, 4), (3, 3), (2, 2)], [4, 4, 4]),
        ([(4, 4), (3, 3), (2, 2)], [3, 6, 3]),
        ([(2, 3)] * 16, [1, 2] * 8),
        ([(1, 1)], [4]),
        ([(1, 1), (1, 9), (9, 1)], [2, 2, 2]),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_levels_and_points(kernels: ModuleType, sizes: Sizes, points: list[int], dtype: str, mode: str) -> None:
    check(kernels, make_case(mode, sizes, points, dtype=dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("value", "sampling"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("bfloat16", ("bfloat16", "float32", "float32")),
        ("float32", ("bfloat16", "float16", "float64")),
        ("float64", ("float32", "bfloat16", "float16")),
        ("float16", ("float64", "float64", "bfloat16")),
    ],
)
def test_mixed_dtypes(kernels: ModuleType, value: str, sampling: str | tuple[str, ...], mode: str) -> None:
    check(kernels, make_case(mode, dtype=value, sampling_dtype=sampling))


def test_low_precision_beats_the_eager_form(kernels: ModuleType) -> None:
    """Held against grid_sample in the low precision itself, as models call it."""
    case = make_case("offsets, 2-d", sizes=[(16, 24), (8, 12)], points=[4, 4], q=40, d=32, dtype="bfloat16")
    assert case.reference is not None
    locations = reference.locations_from_offsets(case.levels, case.reference, case.samples, case.points, 0.5)
    weights = case.weights.softmax(-1)
    total: Tensor | float = 0.0
    first = 0
    for i, (h, w) in enumerate(case.sizes):
        start, points = case.levels[3 * i + 2], slice(first, first + case.points[i])
        image = case.value[:, start : start + h * w].permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (h, w))
        grid = (2 * locations[:, :, :, points] - 1).transpose(1, 2).flatten(0, 1)
        sampled = torch.nn.functional.grid_sample(image, grid, align_corners=False)
        total = total + (sampled * weights[:, :, :, points].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        first += case.points[i]
    assert isinstance(total, Tensor)
    eager = total.unflatten(0, case.value.shape[::2][:2]).permute(0, 3, 1, 2).flatten(2)
    expected = expect(case).output
    error = relative_error(run(kernels, case).output, expected)
    assert error <= 2 * relative_error(eager, expected) + torch.finfo(torch.bfloat16).eps / 4
    assert error < 0.5 * relative_error(eager, expected)


# ---------------------------------------------------------------- walking the queries


@pytest.mark.parametrize("on_device", [False, True], ids=["host sizes", "device sizes"])
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize(
    ("sizes", "d", "dtype"),
    [
        ([(13, 17), (7, 9)], 8, "float32"),  # 2 lanes per head: 128 queries in a block's turn
        ([(13, 17), (7, 9)], 8, "bfloat16"),  # 1 lane: 256
        ([(9, 16), (8, 8), (3, 5)], 32, "bfloat16"),  # 4 lanes: 64
        ([(9, 16), (8, 8), (3, 5)], 32, "float32"),  # 8 lanes: 32, two turns for a tile
        ([(1, 70), (33, 1)], 16, "float16"),  # tiles mostly hanging over
        ([(1, 1)], 16, "float32"),
    ],
)
def test_encoder_walk(
    kernels: ModuleType, sizes: Sizes, d: int, dtype: str, multiprocessors: int, on_device: bool
) -> None:
    """Queries that are the positions of the levels are walked in tiles; each must be visited exactly once."""
    # The order of threads goes with the sizes' place, to spare a parameter: the level table is built either way.
    options = {"on_device": on_device, "multiprocessors": multiprocessors, "reversed": on_device}
    mode = "offsets, 2-d" if on_device else "locations"
    check(kernels, make_case(mode, sizes, [2] * len(sizes), n=1, q=None, d=d, dtype=dtype, **options))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("starts", [[12, 0], [0, 10], [3, 30]])
def test_encoder_size_with_levels_elsewhere(kernels: ModuleType, starts: list[int], on_device: bool) -> None:
    """As many queries as positions, but the levels do not follow each other: tiles by level would miss some."""
    case = make_case(sizes=[(5, 7), (3, 4)], q=None, on_device=on_device, starts=starts)
    check(kernels, case)


@pytest.mark.parametrize("q", [1, 2, 31, 64, 65])
def test_numbers_of_queries(kernels: ModuleType, q: int) -> None:
    check(kernels, make_case("offsets, 2-d", q=q, n=1, d=32, dtype="bfloat16"))
    check(kernels, make_case("offsets, 2-d", q=q, n=3, heads=1, d=4, multiprocessors=1))


def test_empty(kernels: ModuleType) -> None:
    for n, q in ((0, 3), (2, 0)):
        run(kernels, make_case(n=n, q=q))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strided_inputs(kernels: ModuleType, dtype: str, mode: str) -> None:
    """Views with gaps, of which the gaps are NaN; permuted axes; pairs and vectors that are not aligned."""
    case = make_case(mode, dtype=dtype)

    def spaced(x: Tensor, gap: int, offset: int) -> Tensor:
        shape = [n + 1 for n in x.shape]
        shape[-1] = x.shape[-1] + gap
        view = poisoned(shape, x.dtype)[tuple(slice(0, n) for n in x.shape[:-1])]
        view = view[..., offset : offset + x.shape[-1]]
        return view.copy_(x)

    # Strides that forbid pairs and vectors, addresses that do, and neither.
    for gap, offset in ((3, 0), (8, 1), (8, 8)):
        moved = {name: spaced(x, gap, offset) for name, x in case.tensors.items()}
        check(kernels, replace(case, **moved, grad_output=spaced(case.grad_output, gap, offset)))

    def permuted(x: Tensor) -> Tensor:
        return x.transpose(0, 2).contiguous().transpose(0, 2)

    check(kernels, replace(case, **{name: permuted(x) for name, x in case.tensors.items()}))
    # Aligned and strided: still 16 bytes at a time.
    packed = torch.cat([case.value, poisoned(case.value.shape, case.value.dtype)], 2)[:, :, : case.value.shape[2]]
    check(kernels, replace(case, value=packed))


@pytest.mark.parametrize("mode", MODES)
def test_expanded_inputs(kernels: ModuleType, mode: str) -> None:
    case = make_case(mode, sizes=[(4, 6), (4, 6)], points=[2, 2], n=2)
    # Shared between images; the kernel returns a gradient for every element, which autograd sums.
    for name in case.tensors:
        shared = case.tensors[name][:1].expand(2, *case.tensors[name].shape[1:])
        check(kernels, replace(case, **{name: shared}))
    if case.reference is not None:
        shared = case.reference[:, :, :1].expand(-1, -1, 2, -1)
        check(kernels, replace(case, reference=shared))
    check(kernels, replace(case, grad_output=case.grad_output[:, :1].expand(-1, case.grad_output.shape[1], -1)))
    check(kernels, replace(case, weights=case.weights[..., :1].expand(-1, -1, -1, 4)))


@pytest.mark.parametrize("d", [4, 3])
def test_offsets_beyond_32_bits(kernels: ModuleType, d: int, tmp_path: Path) -> None:
    """Images, and rows of an image, that lie gigabytes apart, in a sparse file."""
    case = make_case(sizes=[(2, 2)], points=[3], n=2, q=3, heads=1, d=d, needs=("samples",))
    image, row = 2**32 + 64, 3 * 2**28  # in elements; the third row starts beyond 2^32 bytes
    size = image + 3 * row + d
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * size)
    memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32)
    value = memory.as_strided(case.value.shape, (image, row, d, 1))
    value.copy_(case.value)
    check(kernels, replace(case, value=value))


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "needs", [(), ("value",), ("samples",), ("reference",), ("value", "reference"), ("samples", "reference")]
)
def test_unwanted_gradients(kernels: ModuleType, needs: tuple[str, ...], dtype: str, architecture: int) -> None:
    for mode in MODES:
        check(kernels, make_case(mode, dtype=dtype, architecture=architecture, q=3, needs=needs))


# ---------------------------------------------------------------- coordinates


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_non_finite_coordinates(kernels: ModuleType, dtype: str, mode: str) -> None:
    case = make_case(mode, dtype=dtype)
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")]).to(case.samples.dtype)
    for i, x in enumerate(bad):
        case.samples[0, i, 0, :, i % 2] = x
        case.samples[1, i, 1, 2] = x
        if case.reference is not None:
            case.reference[1, 4 + i % 2, i % 2, i % case.reference.shape[-1]] = x
    results = check(kernels, case)
    assert results.output.isfinite().all()
    assert all(x.isfinite().all() for x in results.gradients.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_far_coordinates(kernels: ModuleType, dtype: str) -> None:
    """Too large for an integer, and just inside and outside of (-1, size)."""
    case = make_case(sizes=[(4, 8)], points=[6], dtype=dtype, sampling_dtype="float32")
    pixels = [-1.0, -0.999, -0.5, 7.25, 7.999, 8.0]
    case.samples[0, 0, 0, :, 0] = (torch.tensor(pixels) + 0.5) / 8
    case.samples[0, 1, 0, :, 0] = torch.tensor([1e30, -1e30, 3e9, -3e9, 1e9, -1e9])
    check(kernels, case)


@pytest.mark.parametrize("mode", MODES)
def test_values_outside_a_sample_stay_outside(kernels: ModuleType, mode: str) -> None:
    """NaN and infinite values reach only the samples which have them for a corner, whatever the weights."""
    case = make_case(mode, sizes=[(4, 4), (4, 4)], points=[2, 2])
    case.value[:, 16:] = float("nan")
    case.value[:, 0] = float("inf")
    # First level, right of its column 0; second level, far outside, with weights that are not finite either.
    if case.reference is None:
        case.samples[..., :2, :] = case.samples[..., :2, :].clamp(0.4, 1.1)
        case.samples[..., 2:, :] = 7.0
        case.weights[..., 2] = float("inf")
        case.weights[..., 3] = float("nan")
    else:
        case.reference[..., 0, :2] = 0.6
        case.reference[..., 1, :2] = 7.0
        case.reference[..., 2:] = 0.1
        case.samples.clamp_(-0.5, 0.5)
    results = run(kernels, case)
    clean = replace(case, value=torch.where(case.value.isfinite(), case.value, 0))
    clean.weights = torch.where(case.weights.isfinite(), case.weights, 0)
    expected = expect(clean)
    check_close("output", results.output, expected.output, False, False)
    for name in results.gradients:
        check_close(name, results.gradients[name], expected.gradients[name], False, True)


def test_extreme_logits(kernels: ModuleType) -> None:
    case = make_case("offsets, 2-d", sizes=[(4, 4)], points=[4])
    case.weights[0] *= 1e3
    case.weights[1, :, :, 0] = -float("inf")
    check(kernels, case)
    case.weights[0, 0, 0, 1] = float("nan")
    output = run(kernels, case).output
    assert output[0, 0, :16].isnan().any()
    assert output[0, 0, 16:].isfinite().all()
    assert output[0, 1:].isfinite().all()


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("d", [1, 32])
def test_very_many_points(kernels: ModuleType, d: int) -> None:
    """The gradient kernel keeps a query's samples in shared memory: fewer queries per block then."""
    check(kernels, make_case("offsets, 4-d", points=[200, 300], n=1, q=2, heads=1, d=d, multiprocessors=1))


def test_too_many_points_are_refused(kernels: ModuleType) -> None:
    case = make_case("offsets, 2-d", sizes=[(2, 2)], points=[20_000], n=1, q=1, heads=1, d=8)
    with pytest.raises(RuntimeError, match="attention_logits: too many samples"):
        run(kernels, case)


@pytest.mark.parametrize("mode", ["locations", "offsets, 2-d", "offsets, 4-d"])
@pytest.mark.parametrize(
    ("malformed", "levels"),
    [
        (0, [(5, 0, 0), (3, 4, 35)]),
        (0, [(-5, 7, 0), (3, 4, 35)]),
        (1, [(5, 7, 0), (3, 4, 36)]),
        (0, [(5, 7, -1), (3, 4, 35)]),
        (1, [(5, 7, 0), (2**40, 2**40, 35)]),
        (1, [(5, 7, 0), (3, 4, 2**62)]),
    ],
)
def test_a_malformed_level_on_the_device_contributes_nothing(
    kernels: ModuleType, mode: str, malformed: int, levels: list[tuple[int, int, int]]
) -> None:
    """Forward and backward, as if all its samples were far outside; the other levels are what they were. Queries are
    also the positions of the levels, which kernels take tile by tile."""
    for q in (7, None):
        case = make_case(mode, sizes=[(5, 7), (3, 4)], q=q)
        first = sum(case.points[:malformed])
        samples = case.samples.clone()
        samples[:, :, :, first : first + case.points[malformed]] = 1e6
        expected = expect(replace(case, samples=samples))
        sizes, starts = [(h, w) for h, w, _ in levels], [s for _, _, s in levels]
        results = run(kernels, replace(case, sizes=sizes, starts=starts, on_device=True))
        assert relative_error(results.output, expected.output) < 1e-5
        for name, gradient in expected.gradients.items():
            assert relative_error(results.gradients[name], gradient) < 1e-4, name


# ---------------------------------------------------------------- the shim


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "no thread can go on"),
        (1, "while thread"),
        (2, "a load of 4 bytes outside every buffer, by thread 16"),
        (3, "past the end of shared memory"),
        (4, "misaligned"),
        (5, "no thread can go on"),
    ],
)
def test_the_shim_finds_mistakes(kernels: ModuleType, kind: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels.run_broken_kernel(kind, np.zeros(16, np.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_shim_rounds_like_pytorch(kernels: ModuleType, dtype: torch.dtype) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x * 10.0 ** torch.arange(-9, 7).repeat_interleave(1250), torch.arange(-70, 70) * 2.0**-26])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, float("inf"), float("-inf"), 3e38])])
    rounded = torch.from_numpy(kernels.round_trip(x.numpy(), dtype == torch.float16))
    assert torch.equal(rounded, x.to(dtype).float())
    assert np.isnan(kernels.round_trip(np.float32("nan"), dtype == torch.float16))
