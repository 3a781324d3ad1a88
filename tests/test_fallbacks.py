"""Plain PyTorch where no kernel serves: the reference's results, and no more work than the published form."""

import pytest
import torch

import m2f_kernels
from benchmarks import fallbacks
from tests.numerics import relative_error
from tests.ops.ms_deform_attn_cases import MODES, make_case, truth, value_and_gradients

ROWS = fallbacks.rows()


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.op}, {row.case}" for row in ROWS])
def test_no_more_work_than_the_published_form(row):
    theirs, ours = fallbacks.count(row.published, row.inputs), fallbacks.count(row.fallback, row.inputs)
    assert theirs.operations > 5
    assert ours.operations <= fallbacks.OPERATIONS * theirs.operations, (ours.names, theirs.names)
    assert ours.written <= fallbacks.BYTES * theirs.written
    assert ours.saved <= fallbacks.BYTES * theirs.saved


def test_the_counter_counts():
    """Against numbers known beforehand: two operations forward, two backward, and the exponential is saved."""
    x = fallbacks.meta(100, 100)
    found = fallbacks.count(lambda x: (x.exp() * 2).view(-1), (x,))
    assert found.names[:2] == ["aten::exp", "aten::mul"]
    assert (found.written, found.saved) == (4 * 40_000, 40_000)
    assert found.operations == 4
    assert fallbacks.count(lambda x: x.detach().exp_(), (x,)).written == 40_000
    assert "| ms_deform_attn | 3 levels, 21504 queries |" in fallbacks.table()


# ---------------------------------------------------------------- deformable attention
SIZES = ((5, 7), (3, 4), (1, 1))


def run(case, backend="fallback"):
    with m2f_kernels.use_backend(backend):
        return value_and_gradients(case.call, case.tensors, case.grad_output)


@pytest.mark.parametrize("points", [[3, 3, 3], [3, 2, 4]])
@pytest.mark.parametrize("mode", MODES)
def test_deformable_attention(mode, points):
    case = make_case(mode, sizes=SIZES, points=points)
    found = run(case)
    for name, expected in truth(case).items():
        assert relative_error(found[name], expected) < 1e-5, name


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_contributes_nothing(mode):
    """In coordinates, offsets, reference points and boxes, forward and backward."""
    case = make_case(mode, sizes=SIZES, points=[3, 2, 4])
    values = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38)
    _, *inputs, _ = case.tensors.values()
    for tensor in inputs:
        flat = tensor.view(-1)
        for i, x in enumerate(values):
            flat[7 * i + 3] = x
    found, expected = run(case), run(case, "reference")
    for name, x in expected.items():
        assert x.isfinite().all(), name
        assert relative_error(found[name], x) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_locations_stay_float32(mode, dtype):
    """Values in 16 bits: at the far end of a level of 512 a location in 16 bits would be a pixel off."""
    case = make_case(mode, sizes=((4, 512),), points=[4], n=1)
    case.tensors["value"] = case.tensors["value"].to(dtype)
    found, expected = run(case), truth(case)
    rounding = relative_error(expected["output"].to(dtype).double(), expected["output"])
    assert found["output"].dtype == dtype
    assert relative_error(found["output"].double(), expected["output"]) < 1.1 * rounding + 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_compiled(mode):
    """Plain PyTorch is traced into, forward and backward, in one graph; what autograd does not record stays so."""
    case = make_case(mode, sizes=SIZES[:2], points=[2, 2], n=1, q=3)
    torch._dynamo.reset()
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    with m2f_kernels.use_backend("fallback"):
        found = value_and_gradients(compiled, case.tensors, case.grad_output)
    for name, expected in run(case).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_levels_elsewhere():
    """Levels that do not follow each other in value."""
    case = make_case("locations", sizes=SIZES[:2], points=[2, 3])
    order = torch.cat([case.value[:, 35:], case.value[:, :35]], 1)
    call = m2f_kernels.ms_deform_attn
    locations, weights = list(case.tensors.values())[1:]
    with m2f_kernels.use_backend("fallback"):
        found = call(order, case.sizes, [12, 0], locations, weights, points_per_level=case.points)
    torch.testing.assert_close(found, run(case)["output"])


@pytest.mark.parametrize("empty", [{"n": 0}, {"q": 0}])
def test_nothing_to_do(empty):
    case = make_case("offsets2", sizes=SIZES, points=[1, 1, 1], **empty)
    assert run(case)["output"].shape == case.grad_output.shape
