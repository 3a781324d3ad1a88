"""The kernel that gathers the value gradient of deformable attention, run on the host, against the reference."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import inputs
from benchmarks.tools import time_model
from tests.cuda_on_host.test_ms_deform_attn import (
    MODES,
    Case,
    Results,
    Sizes,
    check,
    check_close,
    expect,
    make_case,
    poisoned,
    run,
)

LEVELS: Sizes = ((9, 16), (8, 8), (3, 5))


def gathered_case(mode: str = "locations", sizes: Sizes = LEVELS, **options: Any) -> Case:
    """An encoder's call that the kernel serves, unless `options` say otherwise."""
    options = {"points": [4] * len(sizes), "n": 1, "q": None, "d": 32, "gathered": True, **options}
    return make_case(mode, sizes, needs=("value",), **options)


def check_value(kernels: ModuleType, case: Case, served: bool = True) -> Results:
    """The value gradient alone, and with the others, which the general kernel computes."""
    found = check(kernels, case)
    everything = check(kernels, replace(case, needs=("value", "reference", "samples")))
    general = run(kernels, replace(case, gathered=False), forward=False)
    assert found.reduced == everything.reduced
    assert (found.reduced != general.reduced) == served
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(kernels: ModuleType, dtype: str, architecture: int, mode: str) -> None:
    check_value(kernels, gathered_case(mode, dtype=dtype, architecture=architecture, n=2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampling", ["float32", ("bfloat16", "float16", "float32")])
def test_mixed_dtypes(kernels: ModuleType, sampling: str | tuple[str, ...], mode: str) -> None:
    check_value(kernels, gathered_case(mode, dtype="bfloat16", sampling_dtype=sampling))


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("d", [4, 20, 84])
def test_channels(kernels: ModuleType, d: int, architecture: int) -> None:
    check_value(kernels, gathered_case("offsets, 2-d", d=d, heads=1, architecture=architecture))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("sizes", "points"),
    [
        ([(16, 16)], [1]),
        ([(16, 16)], [9]),
        ([(12, 9), (9, 14)], [3, 7]),
        ([(3, 4)] * 16, [1, 2] * 8),
        ([(17, 9), (40, 3)], [4, 4]),
        ([(1, 70), (33, 1), (1, 1)], [4, 4, 4]),
    ],
)
def test_levels_and_points(kernels: ModuleType, sizes: Sizes, points: list[int], mode: str) -> None:
    check_value(kernels, gathered_case(mode, sizes, points=points, heads=1))


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("on_device", [False, True], ids=["host sizes", "device sizes"])
def test_encoder_walk(kernels: ModuleType, on_device: bool, multiprocessors: int) -> None:
    """Sizes on the host or the device; the order of threads goes with them."""
    case = gathered_case("offsets, 4-d", n=2, d=8, heads=3, on_device=on_device, multiprocessors=multiprocessors)
    check_value(kernels, replace(case, reversed=on_device))


@pytest.mark.parametrize("starts", [[12, 0], [0, 10], [3, 30]])
def test_levels_elsewhere(kernels: ModuleType, starts: list[int]) -> None:
    """Queries are walked as they come where the levels do not follow each other."""
    check(kernels, gathered_case(sizes=[(5, 7), (3, 4)], starts=starts))


def test_memory(kernels: ModuleType) -> None:
    """Strided sampling tensors and gradients, of which the gaps are NaN."""
    case = gathered_case("offsets, 2-d", n=2, heads=2)
    for name, x in case.tensors.items():
        if name != "value":
            check(kernels, replace(case, **{name: x.transpose(0, 1).contiguous().transpose(0, 1)}))
    wide = torch.cat([case.grad_output, poisoned(case.grad_output.shape, case.grad_output.dtype)], 2)
    check(kernels, replace(case, grad_output=wide[:, :, :64]))


@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
def test_spreads(kernels: ModuleType, spread: float) -> None:
    """Windows that hold all samples, and that do not: 1024 pixels fit."""
    sizes = [(48, 60), (24, 30)]
    results = check(kernels, gathered_case("offsets, 2-d", sizes, heads=1, spread=spread, points=[2, 4]))
    assert results.reduced


def test_one_far_sample(kernels: ModuleType) -> None:
    """The window stays with the others: their rows are still added once."""
    case = local_case(side=64)
    near = run(kernels, case, forward=False).reduced
    case.samples[0, 0, 0, 0] = 0.999
    assert run(kernels, case, forward=False).reduced < 1.01 * near
    small = local_case(side=40)
    small.samples[0, 0, 0] = 0.999
    check_value(kernels, small)


def test_coordinates(kernels: ModuleType) -> None:
    """Not finite, beyond an integer, and on both sides of (-1, size): nothing but what the samples hit."""
    case = gathered_case(sizes=[(8, 8), (3, 5)], points=[8, 1], sampling_dtype="float32")
    pixels = torch.tensor([-1.0, -0.999, -0.5, 7.25, 7.999, 8.0, float("nan"), 3.0])
    case.samples[0, 0, 0, :8, 0] = (pixels + 0.5) / 8
    case.samples[0, 1, 0, :8, 1] = (pixels + 0.5) / 8
    case.samples[0, 2, 0, :8, 0] = torch.tensor([1e30, -1e30, 3e9, -3e9, 1e9, -1e9, float("inf"), -float("inf")])
    assert check_value(kernels, case).gradients["value"].isfinite().all()
    case.samples[:] = float("nan")
    assert not run(kernels, case).gradients["value"].any()


def test_what_is_not_finite_stays_where_it_is(kernels: ModuleType) -> None:
    """A gradient or a weight that is not finite reaches the rows that its samples touch."""
    case = gathered_case(sizes=[(16, 16)], points=[1], heads=1)
    case.samples[:] = 0.1
    case.samples[:, 200:] = 0.9
    clean = run(kernels, case).gradients["value"]
    case.grad_output[0, 5] = float("nan")
    case.weights[0, 6] = float("inf")
    found = run(kernels, case).gradients["value"]
    touched = clean.abs().sum(-1) > 0
    assert found[touched][:4].isfinite().logical_not().any(-1).all()
    assert torch.equal(found[:, 128:], clean[:, 128:])


@pytest.mark.parametrize("mode", MODES)
def test_a_malformed_level_on_the_device_contributes_nothing(kernels: ModuleType, mode: str) -> None:
    case = gathered_case(mode, sizes=[(5, 7), (3, 4)])
    samples = case.samples.clone()
    samples[:, :, :, 4:] = 1e6
    expected = expect(replace(case, samples=samples)).gradients["value"]
    found = run(kernels, replace(case, sizes=[(5, 7), (3, 4)], starts=[0, 36], on_device=True))
    check_close("value", found.gradients["value"], expected, False, True)


@pytest.mark.parametrize(
    "options",
    [{"d": 88}, {"d": 6}, {"dtype": "float64"}, {"q": 7}],
    ids=["too wide", "no vectors", "float64", "decoder"],
)
def test_other_calls_take_the_general_kernel(kernels: ModuleType, options: dict[str, Any]) -> None:
    check_value(kernels, gathered_case(**options), served=False)


# ---------------------------------------------------------------- the work


def local_case(where: str = "local", side: int = 128, **options: Any) -> Case:
    """The benchmark's samples of an encoder: three levels, of side / 4, side / 2 and side pixels."""
    sizes = [(side // 4,) * 2, (side // 2,) * 2, (side,) * 2]
    case = gathered_case(sizes=sizes, heads=1, dtype="float32", **options)
    queries = case.samples.shape[1]
    locations = (
        inputs.local_locations(sizes, 1, 1, 4) if where == "local" else inputs.random_locations(sizes, 1, queries, 1, 4)
    )
    return replace(case, samples=locations.flatten(3, 4).contiguous())


@pytest.mark.parametrize(("where", "side"), [("local", 128), ("random", 64)])
def test_rows_added_per_tile(kernels: ModuleType, where: str, side: int) -> None:
    """Rows added to memory per tile of 8 x 8 queries and head: near samples of the benchmark's case at 1024 x 1024
    pixels, and samples anywhere at 512 x 512. The general kernel adds each corner."""
    case = local_case(where, side)
    tiles = case.samples.shape[1] / 64
    corners = time_model.touched(case.samples[0].unflatten(2, (3, 4)), case.sizes).corners / tiles
    rows = run(kernels, case, forward=False).reduced / (4 * 32) / tiles
    print(f"\n{where} samples: {rows:.0f} rows added per tile and head, {corners:.0f} by the general kernel")
    if where == "local":
        assert rows <= 450
    else:
        general = run(kernels, replace(case, gathered=False), forward=False).reduced / (4 * 32) / tiles
        assert general == pytest.approx(corners)
    assert rows <= corners


def test_the_benchmarks_samples(kernels: ModuleType) -> None:
    check_value(kernels, local_case(side=32))
