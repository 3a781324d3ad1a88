"""The lean forward kernel of deformable attention, run on the host, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.cuda_on_host.test_ms_deform_attn import (
    MODES,
    Case,
    Results,
    Sizes,
    check_close,
    expect,
    make_case,
    poisoned,
    run,
)

FOURS: Sizes = ((5, 7), (3, 4), (2, 3))


def lean_case(mode: str = "locations", sizes: Sizes = FOURS, **options: Any) -> Case:
    """A forward that the lean kernel serves, unless `options` say otherwise."""
    options = {"points": [4] * len(sizes), "d": 32, "lean": True, "needs": ("output",), **options}
    return make_case(mode, sizes, **options)


def check(kernels: ModuleType, case: Case, served: bool = True) -> Results:
    results = run(kernels, case)
    assert results.lean == served
    check_close("output", results.output, expect(case).output, case.value.dtype == torch.float64, False)
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("value", "sampling"),
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("bfloat16", ("bfloat16", "bfloat16", "float32")),  # as autocast makes them: float32 reference points
    ],
)
def test_dtypes(kernels: ModuleType, value: str, sampling: str, mode: str) -> None:
    check(kernels, lean_case(mode, dtype=value, sampling_dtype=sampling))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("sizes", "points"),
    [([(6, 6)], [4]), ([(4, 9), (9, 4)], [8, 4]), ([(2, 3)] * 16, [4] * 16), ([(1, 1), (1, 9), (9, 1)], [4, 12, 4])],
)
def test_levels_and_points(kernels: ModuleType, sizes: Sizes, points: list[int], mode: str) -> None:
    check(kernels, lean_case(mode, sizes, points=points, dtype="bfloat16", reversed=len(sizes) == 2))


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize(
    "sizes", [[(9, 16), (8, 8), (3, 5)], [(16, 24)], [(1, 70), (33, 1)], [(1, 1)], [(17, 9), (40, 3)]]
)
def test_encoder_walk(kernels: ModuleType, sizes: Sizes, multiprocessors: int) -> None:
    """Queries that are the positions of the levels are walked in tiles; each is visited, or NaN is left."""
    case = lean_case("offsets, 2-d", sizes, n=2, q=None, heads=3, dtype="bfloat16", multiprocessors=multiprocessors)
    check(kernels, replace(case, reversed=multiprocessors == 1))


@pytest.mark.parametrize("starts", [[12, 0], [0, 10], [3, 30]])
def test_encoder_size_with_levels_elsewhere(kernels: ModuleType, starts: list[int]) -> None:
    check(kernels, lean_case(sizes=[(5, 7), (3, 4)], q=None, starts=starts, multiprocessors=1))


@pytest.mark.parametrize("q", [1, 15, 64, 65, 130])
def test_numbers_of_queries(kernels: ModuleType, q: int) -> None:
    check(kernels, lean_case("offsets, 4-d", q=q, n=1, multiprocessors=1 if q > 64 else 132))


def test_memory(kernels: ModuleType) -> None:
    """Strided values and sampling tensors, of which the gaps are NaN; images that share inputs."""
    for mode in MODES:
        case = lean_case(mode, dtype="bfloat16")
        check(
            kernels,
            replace(case, value=torch.cat([case.value, poisoned(case.value.shape, case.value.dtype)], 2)[:, :, :2]),
        )
        check(kernels, replace(case, value=case.value.transpose(1, 2).contiguous().transpose(1, 2)))
        for name, x in case.tensors.items():
            check(kernels, replace(case, **{name: x.transpose(0, 1).contiguous().transpose(0, 1)}))
            check(kernels, replace(case, **{name: x[:1].expand(2, *x.shape[1:])}))


def test_coordinates(kernels: ModuleType) -> None:
    """Not finite, beyond an integer, and on both sides of (-1, size): nothing but what the samples hit."""
    case = lean_case(sizes=[(4, 8)], points=[8], sampling_dtype="float32", dtype="bfloat16")
    pixels = torch.tensor([-1.0, -0.999, -0.5, 7.25, 7.999, 8.0, float("nan"), 0.3])
    case.samples[0, 0, 0, :, 0] = (pixels + 0.5) / 8
    case.samples[0, 1, 0, :, 1] = (pixels * 0.5 + 0.25) / 4
    case.samples[0, 2, 0, :, 0] = torch.tensor([1e30, -1e30, 3e9, -3e9, 1e9, -1e9, float("inf"), -float("inf")])
    assert check(kernels, case).output.isfinite().all()
    for mode in MODES[1:]:
        case = lean_case(mode)
        assert case.reference is not None
        case.samples[0, 0, 0, 3] = float("nan")
        case.reference[1, 2, 1] = float("inf")
        assert check(kernels, case).output.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_values_outside_a_sample_stay_outside(kernels: ModuleType, mode: str) -> None:
    """NaN and infinite values reach only the samples which have them for a corner, whatever the weights."""
    case = lean_case(mode, sizes=[(4, 4), (4, 4)])
    case.value[:, 16:] = float("nan")
    case.value[:, 0] = float("inf")
    # First level, right of its column 0 and over its right edge; second level, far outside.
    if case.reference is None:
        case.samples[..., :4, :] = case.samples[..., :4, :].clamp(0.4, 1.1)
        case.samples[..., 4:, :] = 7.0
        case.weights[..., 5] = float("inf")
        case.weights[..., 6] = float("nan")
    else:
        case.reference[..., 0, :2] = 0.6
        case.reference[..., 1, :2] = 7.0
        case.reference[..., 2:] = 0.1
        case.samples.clamp_(-0.5, 0.5)
    clean = replace(case, value=torch.where(case.value.isfinite(), case.value, 0))
    clean.weights = torch.where(case.weights.isfinite(), case.weights, 0)
    check_close("output", run(kernels, case).output, expect(clean).output, False, False)


def test_extreme_logits(kernels: ModuleType) -> None:
    case = lean_case("offsets, 2-d", sizes=[(4, 4)])
    case.weights[0] *= 1e3
    case.weights[1, :, :, 0] = -float("inf")
    check(kernels, case)
    case.weights[0, 0, 0, 1] = float("nan")
    output = run(kernels, case).output
    assert output[0, 0, :32].isnan().all()
    assert output[0, 0, 32:].isfinite().all()
    assert output[0, 1:].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"d": 16},
        {"dtype": "float64"},
        {"points": [4, 3, 4]},
        {"on_device": True},
        {"sampling_dtype": ("float32", "float16", "float32")},
        {"sizes": [(2, 2)] * 2, "points": [64, 4]},
    ],
)
def test_other_calls_take_the_general_kernel(kernels: ModuleType, options: dict[str, Any]) -> None:
    check(kernels, lean_case(**options), served=False)


def test_layouts_that_take_the_general_kernel(kernels: ModuleType) -> None:
    case = lean_case(dtype="bfloat16")
    shifted = poisoned((*case.value.shape[:3], 40), case.value.dtype)[..., 3:35]
    check(kernels, replace(case, value=shifted.copy_(case.value)), served=False)
    check(kernels, replace(case, weights=case.weights[..., :1].expand(*case.weights.shape)), served=False)
    spread = torch.stack([case.samples, case.samples], -1).flatten(-2)[..., ::3]
    check(kernels, replace(case, samples=spread.contiguous().transpose(0, 1).contiguous().transpose(0, 1)))
    check(kernels, replace(case, lean=False), served=False)
