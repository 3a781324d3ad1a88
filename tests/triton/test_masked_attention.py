"""The Triton kernels of masked attention, called directly, against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F

import m2f_kernels
from tests.numerics import FORWARD, GRADIENT, relative_error, tolerance
from tests.ops.masked_attention_cases import NAMES, make_case, row_rule, truth

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NON_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(scope="module")
def kernels():
    from m2f_kernels.ops.masked_attention import triton

    return triton


def run(kernels, device, case):
    """Output and gradients in the layout of the public operator, and the log-sum-exp."""
    tensors = [x.to(device) for x in case.tensors.values()]
    mask = m2f_kernels.pack_attention_mask(case.attend)
    bits, row_any = mask.bits.to(device), mask.row_any.to(device)
    scale = tensors[0].shape[-1] ** -0.5 if case.scale is None else case.scale
    output, logsumexp = kernels.masked_attention(*tensors, bits, row_any, scale)
    grad = case.grad_output.to(device).transpose(1, 2)
    gradients = kernels.masked_attention_backward(grad, *tensors, bits, row_any, output, logsumexp, scale)
    found = {"output": output.transpose(1, 2), **dict(zip(NAMES, (g.transpose(1, 2) for g in gradients), strict=True))}
    return found, logsumexp


def bounds(name, dtype):
    """In low precision weights and score gradients are rounded before the second product, as in every fused
    attention, and gradients start from the rounded output: a few roundings more than one."""
    bound = tolerance(FORWARD if name == "output" else GRADIENT, dtype, dtype)
    return bound if dtype == F32 else 3 * bound


def assert_matches(kernels, device, case, expected=None):
    dtype = case.tensors["query"].dtype
    expected = expected or truth(case)
    found, _ = run(kernels, device, case)
    for name, x in found.items():
        assert x.dtype == dtype
        error, bound = relative_error(x, expected[name]), bounds(name, dtype)
        assert error <= bound, f"{name}: relative error {error:.3g} > {bound:.3g}"


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("d", [16, 17, 32, 40, 64, 128])
def test_channels(kernels, device, dtype, d):
    assert_matches(kernels, device, make_case(n=1, d=d, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("q", [1, 20, 100, 130])
def test_numbers_of_queries(kernels, device, dtype, q):
    """Keys first, queries first, and more than one block of queries."""
    assert_matches(kernels, device, make_case(n=1, h=1, q=q, s=150, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("s", [1, 31, 32, 33, 64, 100, 1000])
def test_numbers_of_keys(kernels, device, dtype, s):
    """Around the word and the tile, and enough for several splits."""
    assert_matches(kernels, device, make_case(n=1, h=1, s=s, dtype=dtype))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.7, 1.0])
@pytest.mark.parametrize("interleaved", [True, False])
def test_masks_and_layouts(kernels, device, density, interleaved):
    """All blocked, whole tiles skipped, most, all open; heads cut out of [N, *, H*D] and [N, H, *, D]."""
    assert_matches(kernels, device, make_case(n=2, h=3, q=9, s=300, density=density, interleaved=interleaved))


def test_rows_with_few_keys(kernels, device):
    """Splits in which some queries have no key at all."""
    case = make_case(n=1, h=1, q=5, s=2000, density=0.5)
    case.attend[:, 0] = False
    case.attend[:, 1, :1990] = False
    case.attend[:, 2, 10:] = False
    assert_matches(kernels, device, case)


def test_logsumexp(kernels, device):
    case = make_case(n=1, s=300, density=0.1)
    q, k, _ = (x.double() for x in case.tensors.values())
    scores = (q @ k.transpose(-1, -2) * 32**-0.5).masked_fill(~row_rule(case.attend)[:, None], -torch.inf)
    assert relative_error(run(kernels, device, case)[1], scores.logsumexp(-1)) < 1e-6


@pytest.mark.parametrize("shape", [{"q": 0}, {"n": 0}], ids=str)
def test_empty(kernels, device, shape):
    case = make_case(**shape)
    found, logsumexp = run(kernels, device, case)
    assert found["output"].shape == case.tensors["query"].shape
    assert logsumexp.shape == case.tensors["query"].shape[:3]
    assert not found["key"].any()
    assert not found["value"].any()


def test_strided(kernels, device):
    """Views with gaps and a gradient of stride 0, as out.sum().backward() sends."""
    case = make_case(n=1)
    for name in NAMES:
        case.tensors[name] = torch.stack([case.tensors[name]] * 2, -2)[..., 1, :]
    case.grad_output = case.grad_output[..., :1, :1].expand_as(case.grad_output)
    assert_matches(kernels, device, case)


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_blocked_keys_contribute_nothing(kernels, device, name, bad, dtype):
    """What a blocked key holds shows neither in the output nor in any gradient."""
    case = make_case(n=1, h=1, q=9, s=150, dtype=dtype)
    case.attend[:, :, 40:45] = False
    case.attend[:, :, 0] = True
    expected = truth(case)
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40:45] = bad
    assert_matches(kernels, device, case, expected)


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("name", ["key", "value"])
def test_keys_attended_by_some(kernels, device, name, bad):
    """Rows that attend to a bad key are as in SDPA; the others' outputs and query gradients are untouched."""
    case = make_case(n=1, h=1, q=9, s=150)
    case.attend[:, :, 40] = False
    case.attend[:, :, 0] = True
    clean = truth(case)
    case.attend[:, 3, 40] = True
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40, 1] = bad
    found, _ = run(kernels, device, case)
    expected = F.scaled_dot_product_attention(
        *(x.double() for x in case.tensors.values()), case.attend[:, None], scale=32**-0.5
    )
    assert torch.equal(found["output"].cpu().isnan()[:, :, 3], expected.isnan()[:, :, 3])
    assert torch.equal(found["output"].cpu().isinf()[:, :, 3], expected.isinf()[:, :, 3])
    others = [i for i in range(9) if i != 3]
    assert relative_error(found["output"][:, :, others], clean["output"][:, :, others]) < 1e-5
    assert relative_error(found["query"][:, :, others], clean["query"][:, :, others]) < 1e-4


@pytest.mark.parametrize("size", [30.0, 1e15])
def test_large_logits(kernels, device, size):
    """Scores up to 1e31: no overflow, forward and backward."""
    case = make_case(n=1, h=1, s=200, scale=1.0)
    for name in ("query", "key"):
        case.tensors[name] = case.tensors[name] * size
    found, _ = run(kernels, device, case)
    assert all(x.isfinite().all() for x in found.values())
    if size == 30.0:
        # Rounding of scores of 5000 to 5e-4 is in the weights.
        assert relative_error(found["output"], truth(case)["output"]) < 1e-3


def test_deterministic(kernels, device):
    case = make_case(n=1, s=1000, dtype=BF16)
    first, _ = run(kernels, device, case)
    again, _ = run(kernels, device, case)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name
