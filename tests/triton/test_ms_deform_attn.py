"""The Triton kernels of multi-scale deformable attention behind the public operators, against the reference in float64.

The cases are those of the compiled kernels (tests/ops, tests/cuda_on_host) without float64, which Triton does not
serve; most have one image and one head, for the interpreter runs each program by itself.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import m2f_kernels
from m2f_kernels.ops.ms_deform_attn import reference
from tests.numerics import relative_error, rounding, tolerance
from tests.ops.ms_deform_attn_cases import (
    MODES,
    assert_matches,
    grid_sample_form,
    make_case,
    truth,
    value_and_gradients,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
SMALL = {"n": 1, "heads": 1, "points": (2, 1)}
OPERATORS = (
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_from_offsets",
    "ms_deform_attn_from_offsets_backward",
)


@pytest.fixture(scope="module")
def kernels():
    from m2f_kernels.ops.ms_deform_attn import triton

    return triton


@pytest.fixture(scope="module", params=[1])
def multiprocessors(request):
    """The number of multiprocessors that launches assume. With many, programs have few queries, slow to interpret."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _architecture(kernels, device, multiprocessors):
    if device.type != "cpu":
        yield
        return
    before = kernels.architecture
    kernels.architecture = lambda device: replace(before(device), multiprocessors=multiprocessors)
    yield
    kernels.architecture = before


@pytest.fixture(scope="module", autouse=True)
def served(kernels, device):
    """Puts the Triton kernels behind the operators on this device; how many calls each served."""
    calls = dict.fromkeys(OPERATORS, 0)

    def counting(name):
        def call(*args):
            calls[name] += 1
            return getattr(kernels, name)(*args)

        return call

    library = torch.library.Library("m2f", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced is the purpose
        for name in OPERATORS:
            library.impl(name, counting(name), device.type.upper())
    yield calls
    library._destroy()


@pytest.fixture(autouse=True)
def _kernels_ran(served):
    """No test here may pass on anything but these kernels."""
    before = sum(served.values())
    yield
    assert sum(served.values()) > before


# ---------------------------------------------------------------- shapes and dtypes
@pytest.mark.parametrize("sizes", [((5, 7), (3, 4)), ((20, 30), (9, 11))], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(device, mode, dtype, sizes):
    assert_matches(make_case(mode, sizes=sizes, n=1, points=(2, 1), dtype=dtype).to(device))


@pytest.mark.parametrize("d", [1, 3, 8, 16, 20, 32, 33, 64, 96, 128, 256, 300])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_channels(device, d, dtype):
    """Whole vectors, odd tails, and more channels than a program takes at once."""
    assert_matches(make_case("locations", d=d, dtype=dtype, q=5, n=1, heads=1, points=(1, 1)).to(device))


@pytest.mark.parametrize(
    ("points", "sizes"),
    [
        ([1], [(6, 5)]),
        ([4, 4, 4, 4], [(8, 8), (4, 4), (2, 2), (1, 1)]),
        ([1, 5, 2], [(3, 9), (1, 7), (6, 1)]),
        ([3, 6, 3], [(12, 10), (6, 5), (3, 3)]),
        ([7, 16, 1, 9], [(4, 4), (3, 2), (5, 6), (1, 2)]),
        ([17], [(7, 3)]),
        ([1] * 16, [(i + 1, 17 - i) for i in range(16)]),
        ([2, 1, 3, 1] * 4, [(i % 5 + 1, i % 3 + 2) for i in range(16)]),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x[0], int) else None,
)
@pytest.mark.parametrize("mode", MODES)
def test_levels_and_points(device, mode, points, sizes):
    """Up to 16 levels, any number of points in each; loops that are unrolled and loops that are not."""
    assert_matches(make_case(mode, sizes=sizes, points=points, n=1, heads=1, q=5, d=8).to(device))


@pytest.mark.parametrize(("n", "heads"), [(1, 1), (1, 8), (5, 3), (3, 1), (2, 5)])
@pytest.mark.parametrize("mode", MODES)
def test_batches_and_heads(device, mode, n, heads):
    assert_matches(make_case(mode, sizes=((5, 7),), points=(1,), n=n, heads=heads, d=8).to(device))


@pytest.mark.parametrize("multiprocessors", [1, 132], indirect=True)
@pytest.mark.parametrize("q", [None, 1, 63, 64, 65])
@pytest.mark.parametrize("mode", MODES)
def test_queries(device, multiprocessors, mode, q):
    """One, whole blocks, the last block partly filled; all the positions, as in an encoder."""
    assert_matches(make_case(mode, sizes=((17, 5), (3, 1)), points=(1, 1), n=1, q=q, heads=1).to(device))


MIXED = [
    # value, sampling tensor, weights, reference points
    (BF16, F32, F32, F32),
    (BF16, BF16, F32, F32),
    (BF16, F32, BF16, F32),
    (BF16, BF16, BF16, F32),
    (F16, F16, F32, F32),
    (F16, F32, F16, F16),
    (F32, BF16, BF16, F32),
    (F32, F16, F32, BF16),
    (F32, F64, F64, F64),
    (F16, F64, F64, BF16),
]


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(str(x).removeprefix("torch.") for x in d))
@pytest.mark.parametrize("mode", MODES)
def test_mixed_dtypes(device, mode, dtypes):
    """Dtypes mixed as autocast leaves them: each tensor keeps its dtype, and so does its gradient."""
    value, samples, weights, points = dtypes
    options = {"samples_dtype": samples, "weights_dtype": weights, "reference_dtype": points}
    assert_matches(make_case(mode, dtype=value, **options, **SMALL).to(device))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_low_precision_is_no_worse_than_pytorch(device, mode, dtype):
    """At most twice the error of the grid_sample form in the same dtype, plus one rounding."""
    case = make_case(mode, sizes=((20, 31), (10, 15)), q=50, d=32, dtype=dtype, n=1, heads=1)
    expected = truth(case)
    theirs = value_and_gradients(lambda *x: grid_sample_form(case, *x), case.tensors, case.grad_output)
    case = case.to(device)
    ours = value_and_gradients(case.call, case.tensors, case.grad_output)
    for name, x in expected.items():
        error, limit = relative_error(ours[name], x), 2 * relative_error(theirs[name], x) + rounding(dtype)
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("d", [5, 16, 64])
def test_low_precision_is_rounded_to_nearest(device, dtype, d):
    """Accumulated in float32 and rounded once: almost every number is the truth's own rounding, in no direction."""
    case = make_case("offsets4", q=50, d=d, dtype=dtype, **SMALL)
    expected = truth(case)
    case = case.to(device)
    for name, x in value_and_gradients(case.call, case.tensors, case.grad_output).items():
        same = (x.cpu() == expected[name].to(dtype)).double().mean().item()
        assert same > 0.98, f"{name}: {same:.3f}"


@pytest.mark.parametrize("mode", ["offsets2", "offsets4"])
def test_shared_reference_points(device, mode):
    """Reference points with L = 1 give what their repetition over levels gives; their gradient is the sum."""
    case = make_case(mode, **SMALL)
    case.tensors["reference_points"] = case.tensors["reference_points"][:, :, :1]
    repeated = truth(case, lambda v, r, *rest: case.run_reference(v, r.expand(-1, -1, 2, -1), *rest))
    assert_matches(case.to(device), expected=repeated)


@pytest.mark.parametrize("scale", [0.125, -1.5])
def test_offset_scale(device, scale):
    assert_matches(make_case("offsets4", offset_scale=scale, **SMALL).to(device))


@pytest.mark.parametrize("mode", MODES)
def test_each_gradient_alone(device, mode):
    """Frozen inputs: any subset of gradients equals the same part of all of them."""
    case = make_case(mode, **SMALL).to(device)
    expected = truth(case)
    for name in case.tensors:
        assert_matches(case, needs=[name], expected=expected)
        assert_matches(case, needs=[x for x in case.tensors if x != name], expected=expected)


@pytest.mark.parametrize(("n", "q"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_empty(device, mode, n, q):
    case = make_case(mode, n=n, q=q).to(device)
    found = value_and_gradients(case.call, case.tensors, case.grad_output)
    assert all(x.count_nonzero() == 0 for x in found.values())


# ---------------------------------------------------------------- levels
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("starts", [(12, 0), (0, 35)])
def test_levels_may_lie_in_any_order(kernels, device, starts, on_device):
    """level_start_index is obeyed; sizes on the device give what sizes on the host give."""
    case = make_case(**SMALL)
    value, samples, weights = case.tensors.values()
    expected = truth(case)
    if starts[0]:
        value = torch.cat([value[:, 35:], value[:, :35]], 1)
    levels = [n for (h, w), start in zip(case.sizes, starts, strict=True) for n in (h, w, start)]
    described = (levels, None, None)
    if on_device:
        described = ([], torch.tensor(case.sizes, device=device), torch.tensor(starts, device=device))
    value, samples, weights = (x.to(device) for x in (value, samples, weights))
    out = torch.ops.m2f.ms_deform_attn(value, *described, samples, weights, case.points)
    assert relative_error(out, expected["output"]) < 1e-5
    found = torch.ops.m2f.ms_deform_attn_backward(
        case.grad_output.to(device), value, *described, samples, weights, case.points, True, True
    )
    grad = torch.cat([found[0][:, 12:], found[0][:, :12]], 1) if starts[0] else found[0]
    for x, name in ((grad, "value"), (found[1], "samples"), (found[2], "weights")):
        assert relative_error(x, expected[name]) < 1e-4


@pytest.mark.parametrize(
    "levels",
    [
        [(5, 0, 0), (3, 4, 35)],
        [(-5, 7, 0), (3, 4, 35)],
        [(5, -7, 0), (3, 4, 35)],
        [(3, 4, 35), (5, 7, 13)],
        [(5, 7, -1), (3, 4, 35)],
        [(2**40, 2**40, 35), (3, 4, 35)],
        [(5, 7, 2**62), (3, 4, 35)],
        [(48, 1, 0), (3, 4, 35)],
        [(1, 48, 0), (3, 4, 35)],
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_malformed_levels_on_the_device_contribute_nothing(device, mode, levels):
    """Nothing can be raised without waiting for the device: such a level is as good as not there. The interpreter's
    loads are real: an address outside of value would be read."""
    case = make_case(mode, sizes=((5, 7), (3, 4)), points=(1, 1), n=1, heads=1)
    bad = [not (h > 0 and w > 0 and s >= 0 and s + h * w <= 47) for h, w, s in levels]
    assert sum(bad) == 1
    tensors = {name: x.to(device) for name, x in case.tensors.items()}
    value, *rest = tensors.values()
    shapes = torch.tensor([level[:2] for level in levels], device=device)
    starts = torch.tensor([level[2] for level in levels], device=device)
    name = "ms_deform_attn" if mode == "locations" else "ms_deform_attn_from_offsets"
    options = (case.points,) if mode == "locations" else (case.points, 0.5)
    needs = (True, True) if mode == "locations" else (True, True, True)
    out = getattr(torch.ops.m2f, name)(value, [], shapes, starts, *rest, *options)
    found = getattr(torch.ops.m2f, f"{name}_backward")(
        case.grad_output.to(device), value, [], shapes, starts, *rest, *options, *needs
    )

    # The same with the level's samples far outside of one that is in order.
    flat = [n for level, lost in zip(levels, bad, strict=True) for n in ((1, 1, 0) if lost else level)]

    def far_away(value, *rest):
        lost = bad.index(True)
        if mode == "locations":
            away = torch.zeros_like(rest[0])
            away[:, :, :, lost] = 1e4
            return reference.ms_deform_attn(value, flat, rest[0] + away, rest[1], case.points)
        away = torch.zeros_like(rest[0])
        away[:, :, lost, :2] = 1e4
        return reference.ms_deform_attn_from_offsets(value, flat, rest[0] + away, *rest[1:], case.points, 0.5)

    expected = truth(case, far_away)
    for x, (name, wanted) in zip((out, *found), expected.items(), strict=True):
        assert relative_error(x, wanted) < 1e-4, name


# ---------------------------------------------------------------- memory
def _spaced(x, gap, offset):
    """`x` as a view with gaps that are NaN."""
    shape = [n + 1 for n in x.shape]
    shape[-1] = x.shape[-1] + gap
    view = torch.full(shape, NAN, dtype=x.dtype)[tuple(slice(0, n) for n in x.shape[:-1])]
    view = view[..., offset : offset + x.shape[-1]]
    return view.copy_(x)


@pytest.mark.parametrize(("gap", "offset"), [(3, 0), (8, 1), (8, 8), (None, None)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_strided_inputs(device, mode, dtype, gap, offset):
    """Strides that forbid pairs and vectors, addresses that do, neither; permuted axes."""
    case = make_case(mode, dtype=dtype, n=2, points=(2, 1))
    expected = truth(case)

    def moved(x):
        return x.transpose(0, 2).contiguous().transpose(0, 2) if gap is None else _spaced(x, gap, offset)

    tensors = {name: moved(x.to(device)) for name, x in case.tensors.items()}
    case = replace(case, tensors=tensors, grad_output=moved(case.grad_output.to(device)))
    assert_matches(case, expected=expected)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_expanded_and_transposed_inputs(device, mode, last):
    """Zero strides; last axes without unit stride."""
    case = make_case(mode, sizes=[(4, 6), (4, 6)], points=[2, 2], n=2)
    if last:
        tensors = {k: x.transpose(-1, -2).contiguous().transpose(-1, -2) for k, x in case.tensors.items()}
        grad = case.grad_output.transpose(-1, -2).contiguous().transpose(-1, -2)
    else:
        tensors = {k: x[:1].expand(2, *x.shape[1:]) for k, x in case.tensors.items()}
        grad = case.grad_output[:, :1].expand(-1, case.grad_output.shape[1], -1)
    case = replace(case, tensors=tensors, grad_output=grad)
    expected = truth(case)
    leaves = {k: x.detach().to(device) for k, x in tensors.items()}
    assert_matches(replace(case, tensors=leaves, grad_output=grad.to(device)), expected=expected)


@pytest.mark.parametrize("d", [4, 3])
def test_offsets_beyond_32_bits(kernels, device, d, tmp_path: Path):
    """Images, and rows of an image, that lie gigabytes apart, in a sparse file."""
    if device.type != "cpu":
        pytest.skip("a sparse file is memory of the host")
    case = make_case(sizes=[(2, 2)], points=[2], n=2, q=3, heads=1, d=d)
    image, row = 2**32 + 64, 3 * 2**28  # in elements; the third row starts beyond 2^32 bytes
    size = image + 3 * row + d
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * size)
    memory = torch.from_file(str(path), shared=True, size=size, dtype=F32)
    value = memory.as_strided(case.value.shape, (image, row, d, 1))
    value.copy_(case.value)
    call = kernels._Call(value, case.levels, None, None, None, *list(case.tensors.values())[1:], case.points, 0.0, 4)
    assert call.constants["WIDE"]
    expected = truth(case)
    samples, weights = list(case.tensors.values())[1:]
    out = torch.ops.m2f.ms_deform_attn(value, case.levels, None, None, samples, weights, case.points)
    assert relative_error(out, expected["output"]) < 1e-5
    found = torch.ops.m2f.ms_deform_attn_backward(
        case.grad_output, value, case.levels, None, None, samples, weights, case.points, False, True
    )
    assert relative_error(found[1], expected["samples"]) < 1e-4
    assert relative_error(found[2], expected["weights"]) < 1e-4


# ---------------------------------------------------------------- coordinates
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_non_finite_coordinates(device, mode, dtype):
    """They contribute nothing, to no gradient, and neither does their weight; a non-finite weight stays with them."""
    case = make_case(mode, dtype=dtype, n=2, points=(2, 1))
    for i, x in enumerate((NAN, INF, -INF)):
        case.tensors["samples"][0, i, 0, :, i % 2] = x
        case.tensors["samples"][1, i, 1, 2] = x
        if mode == "locations":
            case.tensors["weights"][1, i, 1, 2] = (INF, NAN, -INF)[i]
        else:
            points = case.tensors["reference_points"]
            points[1, 4 + i % 2, i % 2, i % points.shape[-1]] = x
    found = value_and_gradients(case.to(device).call, case.to(device).tensors, case.grad_output.to(device))
    # Far outside is what they mean.
    tensors = {
        name: x if name in ("value", "weights") else torch.where(x.isfinite(), x, 3e4)
        for name, x in case.tensors.items()
    }
    if mode == "locations":
        tensors["weights"] = torch.where(tensors["weights"].isfinite(), tensors["weights"], 0)
    expected = truth(replace(case, tensors=tensors))
    for name, x in found.items():
        limit = tolerance({F32: 1e-4}, dtype, x.dtype)
        assert relative_error(x, expected[name]) <= limit, name


def test_far_coordinates(device):
    """Too large for an integer, and just inside and outside of (-1, size)."""
    case = make_case(sizes=[(4, 8)], points=[6], n=1, q=2, heads=1)
    case.tensors["samples"][0, 0, 0, :, 0] = (torch.tensor([-1.0, -0.999, -0.5, 7.25, 7.999, 8.0]) + 0.5) / 8
    case.tensors["samples"][0, 1, 0, :, 0] = torch.tensor([1e30, -1e30, 3e9, -3e9, 1e9, -1e9])
    assert_matches(case.to(device))


@pytest.mark.parametrize("mode", MODES)
def test_values_outside_a_sample_stay_outside(device, mode):
    """NaN and infinite values reach only the samples which have them for a corner, whatever the weights."""
    case = make_case(mode, sizes=[(4, 4), (4, 4)], points=[1, 1], n=1)
    case.value[:, 16:] = NAN
    case.value[:, 0] = INF
    # First level, right of its column 0, at and beyond its other edges; second level, far outside.
    if mode == "locations":
        case.tensors["samples"][:, :, :, 0, 0].clamp_(0.4, 1.1)
        case.tensors["samples"][:, :, :, 1] = 7.0
        case.tensors["weights"][:, ::2, :, 1] = INF
        case.tensors["weights"][:, 1::2, :, 1] = NAN
    else:
        case.tensors["reference_points"][..., 0, :2] = 0.6
        case.tensors["reference_points"][..., 1, :2] = 7.0
        case.tensors["reference_points"][..., 2:] = 0.1
        case.tensors["samples"].clamp_(-0.5, 0.5)
    found = value_and_gradients(case.to(device).call, case.to(device).tensors, case.grad_output.to(device))
    tensors = {name: torch.where(x.isfinite(), x, 0) for name, x in case.tensors.items()}
    for name, x in truth(replace(case, tensors=tensors)).items():
        assert relative_error(found[name], x) < 1e-4, name


def test_an_absent_corner_is_not_read(device):
    """Beyond the last column the clamped corner is the sample's own; its neighbours' NaN must not come in."""
    value = torch.full((1, 9, 1, 4), NAN)
    value[0, 8] = 1.0  # the last pixel of 3 x 3
    samples = torch.tensor([2.9, 2.5]).add(0.5).div(3).view(1, 1, 1, 1, 2).expand(1, 3, 1, 1, 2)
    out = m2f_kernels.ms_deform_attn(
        value.to(device),
        [(3, 3)],
        None,
        samples.to(device),
        torch.ones(1, 3, 1, 1, device=device),
        points_per_level=[1],
    )
    torch.testing.assert_close(out.cpu(), torch.full((1, 3, 4), 0.1 * 0.5), rtol=1e-5, atol=0)


def test_extreme_logits(device):
    case = make_case("offsets2", sizes=[(4, 4)], points=[3], n=2)
    case.tensors["weights"][0] *= 1e3
    case.tensors["weights"][1, :, :, 0] = -INF
    assert_matches(case.to(device))
    case.tensors["weights"][0, 0, 0, 1] = NAN
    output = case.to(device).run().cpu()
    assert output[0, 0, :16].isnan().any()
    assert output[0, 0, 16:].isfinite().all()
    assert output[0, 1:].isfinite().all()


def test_very_many_points(device):
    """No limit but memory's: loops, and more logits than one block of the softmax's gradient."""
    assert_matches(make_case("offsets4", sizes=((3, 4), (2, 2)), points=[60, 100], n=1, q=2, heads=1, d=4).to(device))


# ---------------------------------------------------------------- reproducible gradients
@pytest.fixture
def fixed_point(device):
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("d", [3, 16, 48])
@pytest.mark.parametrize("mode", MODES)
def test_reproducible(device, fixed_point, mode, d, dtype):
    """Fixed-point sums are as exact as floating-point ones. Fresh tensors are NaN in this mode."""
    assert_matches(make_case(mode, n=2 if d == 3 else 1, heads=1, points=(1, 1), q=5, d=d, dtype=dtype).to(device))


@pytest.mark.parametrize("magnitudes", list(product((1e-37, 1.0, 1e30), (1e-7, 1.0))), ids=str)
def test_reproducible_at_any_magnitude(device, fixed_point, magnitudes):
    """Each factor is scaled by itself: no products overflow, none are flushed to zero."""
    case = make_case(**{**SMALL, "heads": 2})
    grad = case.grad_output * magnitudes[0]
    grad[..., 16:] *= 1e-1  # each head has a scale of its own
    case.tensors["weights"] *= magnitudes[1]
    expected = truth(replace(case, grad_output=grad.double()))["value"]
    value, samples, weights = (x.to(device) for x in case.tensors.values())
    (found, _, _) = torch.ops.m2f.ms_deform_attn_backward(
        grad.to(device), value, case.levels, None, None, samples, weights, case.points, True, False
    )
    # Numbers below 2^-126 are rounded to few bits when they are stored.
    limit = 1e-4 if magnitudes[0] * magnitudes[1] > 1e-36 else relative_error(expected.float(), expected) + 1e-3
    assert relative_error(found, expected) < limit


def test_the_order_of_terms_does_not_matter(device, fixed_point):
    """Queries in reverse: the very same bits, where the plain sum differs."""
    case = make_case(sizes=((2, 2),), points=(2,), n=1, q=150, heads=1, d=8).to(device)
    value, samples, weights = case.tensors.values()

    def gradient(*tensors):
        arguments = (value, case.levels, None, None, *tensors[1:], case.points, True, False)
        return torch.ops.m2f.ms_deform_attn_backward(tensors[0], *arguments)[0]

    given = (case.grad_output, samples, weights)
    flipped = tuple(x.flip(1) for x in given)
    assert torch.equal(gradient(*given), gradient(*flipped))
    torch.use_deterministic_algorithms(False)
    assert not torch.equal(gradient(*given), gradient(*flipped))


def test_non_finite_gradients_stay_visible(device, fixed_point):
    """In the head that they concern, and nowhere else; where nothing is sampled they concern nothing."""
    case = make_case(**{**SMALL, "heads": 2})
    case.tensors["samples"][0, 3, 0, 0] = 0.5
    case.tensors["samples"][0, 4] = 7.0
    case.grad_output[0, 3, 2] = NAN
    case.grad_output[0, 4, 20] = INF
    case.tensors["weights"][0, 4, 1] = NAN
    found = value_and_gradients(case.to(device).call, case.to(device).tensors, case.grad_output.to(device), ["value"])
    assert found["value"][:, :, 0].isnan().any()
    tensors = {name: x.nan_to_num() for name, x in case.tensors.items()}
    expected = truth(replace(case, tensors=tensors, grad_output=case.grad_output.nan_to_num(0, 0, 0)))["value"]
    assert relative_error(found["value"][:, :, 1], expected[:, :, 1]) < 1e-4
