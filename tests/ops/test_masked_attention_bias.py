"""Masked attention with a bias of rows and columns: values, gradients, special values, layouts, registration."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import m2f_kernels
from tests.numerics import relative_error
from tests.ops.masked_attention_cases import (
    BIAS,
    DENSITIES,
    NAMES,
    assert_matches,
    make_case,
    sdpa,
    truth,
    value_and_gradients,
)
from tests.ops.test_masked_attention import LAYOUTS

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NON_FINITE = [float("nan"), float("inf"), -float("inf")]


def without_mask(case):
    """The same case for a call without any mask."""
    case.attend = torch.ones_like(case.attend)
    case.call = lambda *x: m2f_kernels.masked_attention(*x[:3], bias=x[3:], scale=case.scale)
    return case


# ---------------------------------------------------------------- the reference itself
@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
def test_reference_equals_scaled_dot_product_attention(density):
    """With the bias of all pairs made beforehand, in value and in every gradient."""
    case = make_case(dtype=F64, density=density, sides=(6, 9))
    other = sdpa(case)
    for name, expected in truth(case).items():
        assert relative_error(other[name], expected) < 1e-12, name


@pytest.mark.parametrize("masked", [True, False])
def test_gradcheck(masked):
    case = make_case(n=1, h=2, q=3, d=4, dtype=F64, sides=(2, 3))
    case = case if masked else without_mask(case)
    assert torch.autograd.gradcheck(case.call, [x.requires_grad_() for x in case.tensors.values()])


# ---------------------------------------------------------------- shapes, dtypes, masks
@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_dtypes(implementation, dtype, density):
    assert_matches(make_case(dtype=dtype, density=density, sides=(11, 19), q=19).to(implementation))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_without_a_mask(implementation, dtype):
    """One shape is SAM-3's: a query without a bias has zeros."""
    case = make_case(n=1, h=3, q=21, dtype=dtype, sides=(24, 25))
    for name in BIAS:
        case.tensors[name] = F.pad(case.tensors[name][:, :, 1:], (0, 0, 1, 0))
    assert_matches(without_mask(case.to(implementation)))


SIDES = [
    *((1, 1), (1, 70), (70, 1), (2, 31), (31, 2), (3, 32), (5, 33)),
    *((2, 64), (3, 65), (2, 200), (64, 3), (8, 16), (17, 15), (30, 7)),
]


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_rows_and_columns(implementation, sides):
    """Rows shorter than a vector, a word and a tile, as long as these, and longer; one row, one column."""
    for density in (0.3, 1.0):
        assert_matches(make_case(sides=sides, density=density).to(implementation))


@pytest.mark.parametrize("q", [1, 5, 6, 7, 49, 130])
def test_numbers_of_queries(implementation, q):
    assert_matches(make_case(q=q, sides=(10, 13), density=0.5).to(implementation))
    assert_matches(make_case(q=q, sides=(10, 13), density=0.02).to(implementation))


@pytest.mark.parametrize("d", [1, 17, 40, 128])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_channels(implementation, d, dtype):
    assert_matches(make_case(d=d, dtype=dtype, sides=(7, 10)).to(implementation))


@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
def test_scale(implementation, scale):
    """The bias is not multiplied by it."""
    assert_matches(make_case(scale=scale, sides=(7, 10)).to(implementation))


def test_keys_split_into_parts(implementation, set_threads):
    """Rows that lie in two parts, columns that lie in all, parts without a key for some queries."""
    set_threads(2)
    case = make_case(n=1, h=2, q=9, density=0.001, sides=(70, 72)).to(implementation)
    case.attend[:, 0] = False
    case.attend[:, 1, :4900] = False
    case.attend[:, 2] = True
    assert_matches(case)


def test_mask_of_some_pairs(implementation):
    case = make_case(q=20, sides=(7, 10)).to(implementation)
    part = case.attend[:, :4, 24:].clone()
    case.attend[:] = True
    case.attend[:, :4, 24:] = part
    case.call = lambda *x: m2f_kernels.masked_attention(*x[:3], part, bias=x[3:], first_key=24)
    assert_matches(case)


@given(
    n=st.integers(0, 2),
    h=st.integers(1, 3),
    q=st.integers(0, 15),
    height=st.integers(1, 20),
    width=st.integers(1, 70),
    d=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_any_shape(n, h, q, height, width, d, density, interleaved, seed):
    sizes = {"density": density, "interleaved": interleaved, "seed": seed, "sides": (height, width)}
    assert_matches(make_case(n, h, q, d=d, **sizes))


@pytest.mark.parametrize("shape", [{"q": 0}, {"n": 0}], ids=str)
def test_empty(device, shape):
    case = make_case(**shape, sides=(7, 10)).to(device)
    result = value_and_gradients(case.call, case)
    for name in case.tensors:
        assert result[name].shape == case.tensors[name].shape
        assert not result[name].any()


def test_a_bias_of_zeros_is_none(implementation):
    case = make_case(q=19, sides=(11, 19)).to(implementation)
    for name in BIAS:
        case.tensors[name] = torch.zeros_like(case.tensors[name])
    found = case.call(*case.tensors.values())
    expected = m2f_kernels.masked_attention(*(case.tensors[name] for name in NAMES), case.mask)
    assert relative_error(found, expected) < 1e-6


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_strides(implementation, layout, dtype):
    """Both parts in turn as a view, against its own dense copy."""
    for name in BIAS:
        case = make_case(dtype=dtype, sides=(7, 10)).to(implementation)
        case.tensors[name] = LAYOUTS[layout](case.tensors[name])
        actual = value_and_gradients(case.call, case)
        case.tensors[name] = case.tensors[name].clone(memory_format=torch.contiguous_format)
        expected = value_and_gradients(case.call, case)
        for result, x in actual.items():
            assert torch.equal(x, expected[result]), (name, result)


def test_every_output_is_written(implementation, deterministic):
    """Fresh memory is NaN under deterministic algorithms; the gradient of a row that no query attends to is zero."""
    case = make_case(q=5, density=0.001, sides=(40, 25)).to(implementation)
    assert_matches(case)


def test_the_same_bits_for_any_number_of_threads(set_threads):
    results = []
    for threads in (1, 2):
        set_threads(threads)
        case = make_case(n=1, h=3, q=60, density=0.1, sides=(50, 72))
        results.append(value_and_gradients(case.call, case))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


def test_saved_for_backward(device):
    """Beside its inputs only the output and one number per query and head."""
    case = make_case(sides=(7, 10)).to(device)
    leaves = [x.detach().requires_grad_() for x in case.tensors.values()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        case.call(*leaves)
    n, h, q, d = leaves[0].shape
    inputs = [x.numel() for x in leaves] + [case.mask.bits.numel(), case.mask.row_any.numel()]
    assert sorted(saved) == sorted([*inputs, n * h * q * d, n * h * q])


# ---------------------------------------------------------------- special values
@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_blocked_keys_contribute_nothing(implementation, name, bad, dtype):
    """Values of a blocked key show neither in the output nor in any gradient, that of the bias included."""
    case = make_case(q=9, dtype=dtype, sides=(15, 10)).to(implementation)
    case.attend[:, :, 40:45] = False
    case.attend[:, :, 0] = True  # no row is empty
    expected = truth(case)
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40:45] = bad
    assert_matches(case, expected)


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_the_bias_of_blocked_keys_contributes_nothing(implementation, bad, dtype):
    """A row and a column of which every key is blocked."""
    case = make_case(q=9, dtype=dtype, sides=(15, 10)).to(implementation)
    pixels = case.attend.unflatten(-1, (15, 10))
    pixels[:, :, 4] = False
    pixels[..., 7] = False
    case.attend[:, :, 0] = True  # no row is empty
    expected = truth(case)
    for name, place in zip(BIAS, (4, 7), strict=True):
        case.tensors[name] = case.tensors[name].clone()
        case.tensors[name][..., place] = bad
    assert_matches(case, expected)
    result = value_and_gradients(case.call, case)
    assert not result["by_row"][..., 4].any()
    assert not result["by_column"][..., 7].any()


def test_a_bias_of_minus_infinity_blocks(implementation):
    """As in a float mask of `scaled_dot_product_attention`; a query of which it blocks every key is NaN."""
    case = make_case(q=9, density=1.0, sides=(15, 10)).to(implementation)
    case.tensors["by_row"] = case.tensors["by_row"].clone()
    case.tensors["by_row"][:, :, 1:, 4:9] = -torch.inf
    assert_matches(case)
    case.tensors["by_row"][:, :, 3] = -torch.inf
    output = case.call(*case.tensors.values())
    assert output[:, :, 3].isnan().all()
    assert output[:, :, [0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BIAS)
def test_a_bad_bias_stays_with_its_query(implementation, name, bad):
    case = make_case(q=9, density=1.0, sides=(15, 10)).to(implementation)
    clean = value_and_gradients(case.call, case)
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 2, 3] = bad
    case.grad_output[:, :, 2] = 0
    actual = value_and_gradients(case.call, case)
    others = [i for i in range(9) if i != 2]
    assert actual["output"][:, :, 2].isnan().all()
    for result in ("output", "query", *BIAS):
        assert relative_error(actual[result][:, :, others], clean[result][:, :, others]) < 1e-6, result


@pytest.mark.parametrize("size", [30.0, 1e3, 1e30])
def test_large_bias(implementation, size):
    """No overflow: the softmax becomes a maximum."""
    case = make_case(q=9, sides=(15, 20)).to(implementation)
    for name in BIAS:
        case.tensors[name] = case.tensors[name] * size
    result = value_and_gradients(case.call, case)
    assert all(x.isfinite().all() for x in result.values())
    if size == 30.0:
        assert relative_error(result["output"], truth(case)["output"]) < 1e-4


# ---------------------------------------------------------------- registration
def arguments(case, grad=False):
    leaves = [x.detach().requires_grad_(grad) for x in case.tensors.values()]
    return (*leaves[:3], case.mask.bits, case.mask.row_any, *leaves[3:])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_opcheck(device, dtype, interleaved):
    case = make_case(n=2, h=2, q=3, d=16, dtype=dtype, interleaved=interleaved, sides=(5, 8)).to(device)
    torch.library.opcheck(torch.ops.m2f.masked_attention_with_bias.default, (*arguments(case, True), 0.25))
    output, logsumexp = torch.ops.m2f.masked_attention_with_bias(*arguments(case), 0.25)
    backward = (torch.randn_like(output), *arguments(case), output, logsumexp, 0.25)
    torch.library.opcheck(torch.ops.m2f.masked_attention_with_bias_backward.default, backward)


@pytest.mark.parametrize("masked", [True, False])
def test_compiles_whole(device, masked):
    """Forward and backward, sizes dynamic."""
    torch._dynamo.reset()
    compiled = torch.compile(m2f_kernels.masked_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for sides in ((7, 10), (6, 11)):
        case = make_case(sides=sides).to(device)
        case = case if masked else without_mask(case)
        mask = case.mask if masked else None
        expected = value_and_gradients(case.call, case)
        found = value_and_gradients(lambda q, k, v, *b, mask=mask: compiled(q, k, v, mask, bias=b), case)
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, msg=name)


def test_autocast(device):
    case = make_case(sides=(7, 10)).to(device)
    leaves = [x.detach().requires_grad_() for x in case.tensors.values()]
    with torch.autocast(device.type, BF16):
        output = case.call(*leaves)
    assert output.dtype == BF16
    output.float().square().sum().backward()
    assert all(x.grad.dtype == F32 and x.grad.isfinite().all() for x in leaves)
    assert relative_error(output, truth(case)["output"]) < 0.02


def test_mapped(device):
    case = make_case(n=3, sides=(7, 10)).to(device)
    expected = case.call(*case.tensors.values())
    tensors = [x.unsqueeze(1) for x in case.tensors.values()]
    mapped = torch.vmap(lambda q, k, v, m, *b: m2f_kernels.masked_attention(q, k, v, m, bias=b))
    torch.testing.assert_close(mapped(*tensors[:3], case.attend.unsqueeze(1), *tensors[3:]).squeeze(1), expected)
    gradient = torch.func.grad(lambda b: case.call(*(case.tensors[x] for x in NAMES), *b).sum())
    by_row, by_column = gradient(tuple(case.tensors[x] for x in BIAS))
    case.grad_output = torch.ones_like(case.grad_output)
    found = value_and_gradients(case.call, case)
    torch.testing.assert_close(by_row, found["by_row"])
    torch.testing.assert_close(by_column, found["by_column"])


def test_is_differentiable_once(device):
    case = make_case(sides=(7, 10)).to(device)
    leaves = [x.detach().requires_grad_() for x in case.tensors.values()]
    (first,) = torch.autograd.grad(case.call(*leaves).square().sum(), leaves[3], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


def test_meta_tensors():
    case = make_case(sides=(7, 10)).to("meta")
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    output = m2f_kernels.masked_attention(*leaves[:3], bias=leaves[3:])
    assert output.shape == leaves[0].shape
    output.sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves)


# ---------------------------------------------------------------- plain PyTorch
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_fallback(dtype, masked):
    case = make_case(dtype=dtype, sides=(7, 10), density=0.3)
    case = case if masked else without_mask(case)
    expected, theirs = truth(case), sdpa(case)
    with m2f_kernels.use_backend("fallback"):
        found = value_and_gradients(case.call, case)
    for name, x in found.items():
        assert x.dtype == dtype
        bound = 1e-5 if dtype == F32 else 2 * relative_error(theirs[name], expected[name]) + torch.finfo(dtype).eps
        assert relative_error(x, expected[name]) < bound, name


# ---------------------------------------------------------------- bad input
BY_ROW, BY_COLUMN = torch.zeros(2, 2, 3, 5), torch.zeros(2, 2, 3, 8)
BAD = {
    "one tensor": (BY_ROW, TypeError, "bias: expected a pair (by_row [N, H, Q, h], by_column [N, H, Q, w]); got"),
    "three": ((BY_ROW,) * 3, TypeError, "bias: expected a pair"),
    "numbers": ((1.0, 2.0), TypeError, "bias: by_row: expected a tensor [N, H, Q, h]; got 1.0 (float)"),
    "integers": (
        (BY_ROW, BY_COLUMN.int()),
        TypeError,
        "bias: by_column: expected float64, float32, bfloat16 or float16",
    ),
    "rank": ((BY_ROW[0], BY_COLUMN), ValueError, "bias: by_row: expected [N, H, Q, h]; got"),
    "other queries": (
        (BY_ROW, BY_COLUMN[:, :, :2]),
        ValueError,
        "bias: by_column: expected [N, H, Q, w] = [2, 2, 3, 8]; got a float32 tensor of shape [2, 2, 2, 8]",
    ),
    "other dtype": ((BY_ROW.bfloat16(), BY_COLUMN), TypeError, "bias: by_row: expected query's dtype float32; got"),
    "elsewhere": ((BY_ROW, BY_COLUMN.to("meta")), ValueError, "bias: by_column: expected it on cpu, where query is"),
    "other keys": (
        (BY_ROW, BY_COLUMN[..., :7]),
        ValueError,
        "bias: expected by_row [N, H, Q, h] and by_column [N, H, Q, w] with h * w = S = 40; got",
    ),
}


@pytest.mark.parametrize(("bias", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input(bias, error, words):
    case = make_case(n=2, h=2, q=3, s=40, d=8)
    for mask in (case.mask, None):
        with pytest.raises(error, match=re.escape(words)):
            m2f_kernels.masked_attention(*case.tensors.values(), mask, bias=bias)


def test_first_key_needs_a_mask():
    case = make_case(n=2, h=2, q=3, d=8, sides=(5, 8))
    tensors = list(case.tensors.values())
    with pytest.raises(TypeError, match="mask: expected a PackedMask or a bool tensor"):
        m2f_kernels.masked_attention(*tensors[:3], bias=tensors[3:], first_key=0)
    with pytest.raises(TypeError, match="mask: expected a PackedMask or a bool tensor"):
        m2f_kernels.masked_attention(*tensors[:3])


@pytest.mark.parametrize("change", [0, 1], ids=BIAS)
def test_direct_calls_of_the_operator(change):
    """The kernels guard memory by themselves."""
    case = make_case(n=2, h=2, q=3, d=8, sides=(5, 8))
    given = list(arguments(case))
    given[5 + change] = given[5 + change][..., :-1]
    with pytest.raises(RuntimeError, match="by_row, by_column: expected"):
        torch.ops.m2f.masked_attention_with_bias(*given, 1.0)
