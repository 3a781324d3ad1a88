"""Values and gradients of multi-scale deformable attention against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m2f_kernels
from m2f_kernels import _library
from tests.numerics import relative_error, rounding
from tests.ops.ms_deform_attn_cases import (
    MODES,
    assert_matches,
    grid_sample_form,
    make_case,
    truth,
    value_and_gradients,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Sizes for the two ways that the CPU kernels address value: packed panels (many samples), in place (few).
MANY = {"sizes": ((5, 7), (3, 4)), "q": 9}
FEW = {"sizes": ((20, 30), (9, 11)), "q": 3}


def test_the_compiled_kernels_are_tested():
    """Without the library every comparison below would hold the reference against itself."""
    assert _library.LIBRARIES["cpu"].loaded, _library.LIBRARIES["cpu"].problem
    assert m2f_kernels.explain("ms_deform_attn", torch.zeros(1)).backend == "cpp"


# ---------------------------------------------------------------- shapes and dtypes
@pytest.mark.parametrize("path", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(implementation, mode, dtype, path):
    assert_matches(make_case(mode, dtype=dtype, **path).to(implementation))


@pytest.mark.parametrize("d", [1, 3, 8, 16, 20, 32, 33, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_channels(implementation, d, dtype):
    """Whole vectors, odd tails, the widths that are compiled as constants; many queries and few."""
    for path in (MANY, FEW):
        assert_matches(make_case("locations", d=d, dtype=dtype, **path).to(implementation))


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
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_levels_and_points(implementation, mode, points, sizes, dtype):
    """Up to 16 levels, any number of points in each, sums that fill whole vectors and sums that do not."""
    assert_matches(make_case(mode, sizes=sizes, points=points, q=5, d=8, dtype=dtype).to(implementation))


@pytest.mark.parametrize(("n", "heads"), [(1, 1), (1, 8), (5, 3), (3, 1), (2, 16)])
@pytest.mark.parametrize("mode", MODES)
def test_batches_and_heads(implementation, mode, n, heads):
    assert_matches(make_case(mode, n=n, heads=heads, d=8).to(implementation))


@pytest.mark.parametrize(
    "sizes", [((17, 35), (16, 5), (3, 1)), ((1, 70),), ((33, 16), (1, 1)), ((20, 20), (40, 3))], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_queries_that_are_the_positions(implementation, mode, sizes):
    """The tiled walk: levels that are not square and that do not divide the tile."""
    assert_matches(make_case(mode, sizes=sizes, points=[2] * len(sizes), q=None, d=8).to(implementation))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("n", "heads", "sizes", "q"), [(1, 2, ((9, 10), (4, 5)), 700), (1, 3, ((31, 17),), None)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("mode", ["locations", "offsets4"])
def test_threads(set_threads, mode, threads, n, heads, sizes, q, dtype):
    """Heads whose queries are shared between tasks, each with its own part of the value gradient."""
    case = make_case(mode, n=n, heads=heads, sizes=sizes, points=[2] * len(sizes), q=q, d=20, dtype=dtype)
    set_threads(threads)
    assert_matches(case)
    assert_matches(case, needs=["weights"])  # no panels of the value gradient


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_in_place(set_threads, threads):
    """Few samples against many positions, but enough queries to share: in-place gradients have one writer per head."""
    set_threads(threads)
    assert_matches(make_case(sizes=((130, 130),), points=[1], q=200, n=1, heads=1, d=16))


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
    (F64, F32, F32, F32),
    (F64, BF16, F16, F32),
]


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(str(x).removeprefix("torch.") for x in d))
@pytest.mark.parametrize("mode", MODES)
def test_mixed_dtypes(implementation, mode, dtypes):
    """Dtypes mixed as autocast leaves them: each tensor keeps its dtype, and so does its gradient."""
    value, samples, weights, points = dtypes
    options = {"samples_dtype": samples, "weights_dtype": weights, "reference_dtype": points}
    for path in (MANY, FEW):
        assert_matches(make_case(mode, dtype=value, **options, **path).to(implementation))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_low_precision_is_no_worse_than_pytorch(implementation, mode, dtype):
    """At most twice the error of the grid_sample form in the same dtype, plus one rounding."""
    case = make_case(mode, sizes=((20, 31), (10, 15)), q=50, d=32, dtype=dtype)
    expected = truth(case)
    theirs = value_and_gradients(lambda *x: grid_sample_form(case, *x), case.tensors, case.grad_output)
    case = case.to(implementation)
    ours = value_and_gradients(case.call, case.tensors, case.grad_output)
    for name, x in expected.items():
        error, limit = relative_error(ours[name], x), 2 * relative_error(theirs[name], x) + rounding(dtype)
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("d", [5, 16, 64])
def test_low_precision_is_rounded_to_nearest(implementation, dtype, d):
    """Accumulated in float32 and rounded once: almost every number is the truth's own rounding, in no direction."""
    case = make_case("offsets4", q=100, d=d, dtype=dtype)
    expected = truth(case)
    case = case.to(implementation)
    for name, x in value_and_gradients(case.call, case.tensors, case.grad_output).items():
        same = (x.cpu() == expected[name].to(dtype)).double().mean().item()
        assert same > 0.98, f"{name}: {same:.3f}"


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(data):
    """Shapes nobody thought of, empty batches and no queries among them."""
    draw = data.draw
    levels = draw(st.integers(1, 5))
    case = make_case(
        draw(st.sampled_from(MODES)),
        sizes=[(draw(st.integers(1, 20)), draw(st.integers(1, 20))) for _ in range(levels)],
        points=[draw(st.integers(1, 6)) for _ in range(levels)],
        n=draw(st.integers(0, 3)),
        q=draw(st.sampled_from([None, 0, 1, 2, 65, 130])),
        heads=draw(st.integers(1, 4)),
        d=draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from([F64, F32, BF16, F16])),
    )
    assert_matches(case)


# ---------------------------------------------------------------- gradcheck
@pytest.mark.parametrize(
    ("mode", "shared"), [(mode, False) for mode in MODES] + [("offsets2", True), ("offsets4", True)]
)
def test_gradcheck(implementation, mode, shared):
    """Analytic against numeric derivatives of every floating input; reference points per level, and for all of them."""
    case = make_case(mode, sizes=((3, 4), (2, 5)), points=(2, 1), n=1, q=3, d=3, dtype=F64, margin=0.1)
    if shared:
        case.tensors["reference_points"] = case.tensors["reference_points"][:, :, :1].clone()
    inputs = [x.requires_grad_() for x in case.to(implementation).tensors.values()]
    assert torch.autograd.gradcheck(case.call, inputs, fast_mode=False)


@pytest.mark.parametrize("mode", ["offsets2", "offsets4"])
def test_shared_reference_points(implementation, mode):
    """Reference points with L = 1 give what their repetition over levels gives; their gradient is the sum."""
    case = make_case(mode, dtype=F64)
    case.tensors["reference_points"] = case.tensors["reference_points"][:, :, :1]
    repeated = truth(case, lambda v, r, *rest: case.run_reference(v, r.expand(-1, -1, 2, -1), *rest))
    assert_matches(case.to(implementation), expected=repeated)


def test_offset_scale(implementation):
    assert_matches(make_case("offsets4", offset_scale=0.125).to(implementation))
    assert_matches(make_case("offsets4", offset_scale=-1.5).to(implementation))


@pytest.mark.parametrize("mode", MODES)
def test_the_level_axis_may_be_written_out(implementation, mode):
    """[N, Q, H, L, P, 2] and the flat form with points_per_level are one operator."""
    case = make_case(mode, points=(3, 3)).to(implementation)
    value, *points, samples, weights = case.tensors.values()
    samples, weights = samples.unflatten(3, (2, 3)), weights.unflatten(3, (2, 3))
    if mode == "locations":
        out = m2f_kernels.ms_deform_attn(value, torch.tensor(case.sizes), torch.tensor([0, 35]), samples, weights)
    else:
        call = m2f_kernels.ms_deform_attn_from_offsets
        out = call(value, case.sizes, *points, samples, weights)
        flat = call(value, case.sizes, *points, samples, weights.flatten(3), level_start_index=[0, 35])
        assert torch.equal(out, flat)
    assert torch.equal(out, case.run())


def test_levels_may_lie_in_any_order(implementation):
    """level_start_index is obeyed, not only checked."""
    case = make_case(dtype=F32)
    value, samples, weights = case.tensors.values()
    swapped = torch.cat([value[:, 35:], value[:, :35]], 1).to(implementation).requires_grad_()
    samples, weights = samples.to(implementation), weights.to(implementation)
    out = m2f_kernels.ms_deform_attn(swapped, case.sizes, [12, 0], samples, weights, points_per_level=[3, 2])
    expected = truth(case)
    assert relative_error(out, expected["output"]) < 1e-5
    (grad,) = torch.autograd.grad(out, swapped, case.grad_output.to(implementation))
    assert relative_error(torch.cat([grad[:, 12:], grad[:, :12]], 1), expected["value"]) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_each_gradient_alone(implementation, mode):
    """Frozen inputs: any subset of gradients equals the same part of all of them."""
    for path in (MANY, FEW):
        case = make_case(mode, **path).to(implementation)
        expected = truth(case)
        for name in case.tensors:
            assert_matches(case, needs=[name], expected=expected)
            assert_matches(case, needs=[x for x in case.tensors if x != name], expected=expected)


def test_no_graph_without_need(implementation):
    case = make_case().to(implementation)
    expected = truth(case)["output"]
    assert not case.run().requires_grad
    case.value.requires_grad_()
    with torch.no_grad():
        assert not case.run().requires_grad
    with torch.inference_mode():
        assert relative_error(case.run(), expected) < 1e-5
