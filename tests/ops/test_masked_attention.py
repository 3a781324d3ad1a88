"""Masked attention: values, gradients, special values, memory layouts, determinism."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import m2f_kernels
from m2f_kernels import _library
from m2f_kernels.ops.masked_attention import reference
from tests.numerics import relative_error
from tests.ops.masked_attention_cases import (
    DENSITIES,
    NAMES,
    assert_matches,
    make_case,
    row_rule,
    truth,
    value_and_gradients,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NON_FINITE = [float("nan"), float("inf"), -float("inf")]


def test_the_compiled_kernels_are_tested():
    """Without the library every comparison below would hold the reference against itself."""
    assert _library.LIBRARIES["cpu"].loaded, _library.LIBRARIES["cpu"].problem
    assert m2f_kernels.explain(m2f_kernels.masked_attention, torch.zeros(1)).backend == "cpp"


# ---------------------------------------------------------------- the reference itself
@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
def test_reference_equals_scaled_dot_product_attention(density):
    """Two truths that share no code agree in value and in every gradient."""
    case = make_case(dtype=F64, density=density)
    bias = row_rule(case.attend)[:, None]
    other = value_and_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias), case)
    for name, expected in truth(case).items():
        assert relative_error(other[name], expected) < 1e-12, name


def test_gradcheck():
    case = make_case(n=1, h=2, q=3, s=5, d=4, dtype=F64)
    assert torch.autograd.gradcheck(case.call, [x.requires_grad_() for x in case.tensors.values()])


def test_logsumexp():
    """The log-sum-exp saved for the backward is right."""
    case = make_case(density=0.3)
    attend, scale = row_rule(case.attend), 0.2
    mask = case.mask
    _, logsumexp = torch.ops.m2f.masked_attention(*case.tensors.values(), mask.bits, mask.row_any, scale)
    exact = [x.double() for x in case.tensors.values()]
    assert relative_error(logsumexp, reference.masked_attention(*exact, attend, scale)[1]) < 1e-6


# ---------------------------------------------------------------- shapes, dtypes, masks
@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_dtypes(implementation, dtype, density):
    assert_matches(make_case(dtype=dtype, density=density, s=200, q=19).to(implementation))


@pytest.mark.parametrize("d", [1, 3, 8, 16, 17, 32, 40, 64, 128, 200])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_channels(implementation, d, dtype):
    assert_matches(make_case(d=d, dtype=dtype).to(implementation))


@pytest.mark.parametrize("s", [1, 2, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 1000])
@pytest.mark.parametrize("interleaved", [True, False])
def test_numbers_of_keys(implementation, s, interleaved):
    """Around the word and the tile, and not a multiple of either."""
    for density in (0.3, 1.0):
        assert_matches(make_case(s=s, density=density, interleaved=interleaved).to(implementation))


@pytest.mark.parametrize("q", [1, 2, 3, 4, 5, 6, 7, 12, 13, 47, 48, 49, 97, 100, 200, 300])
def test_numbers_of_queries(implementation, q):
    """Around the group of rows and the backward's chunk."""
    assert_matches(make_case(q=q, s=150, density=0.5).to(implementation))
    assert_matches(make_case(q=q, s=150, density=0.02).to(implementation))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("h", [1, 3, 8])
def test_images_and_heads(implementation, n, h):
    assert_matches(make_case(n=n, h=h).to(implementation))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0, 3.0])
def test_scale(implementation, scale):
    assert_matches(make_case(scale=scale).to(implementation))


def test_keys_split_into_parts(implementation, set_threads):
    """Long enough for several parts, whose results are combined; some parts have no key for some queries."""
    set_threads(2)
    case = make_case(n=1, h=2, q=9, s=5000, density=0.001).to(implementation)
    case.attend[:, 0] = False
    case.attend[:, 1, :4900] = False
    case.attend[:, 2] = True
    assert_matches(case)


def blobs(q, side, radius, seed=0):
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(2, q, 1, 1, generator=g) * side
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2).flatten(1)[None]


@pytest.mark.parametrize("radius", [1, 4, 12])
def test_blobs(implementation, radius):
    """Masks as predictions give them: whole tiles are skipped, others concern few queries and half a tile."""
    case = make_case(n=1, q=60, s=48 * 48).to(implementation)
    case.attend = blobs(60, 48, radius).to(implementation)
    assert_matches(case)


@given(
    n=st.integers(0, 2),
    h=st.integers(1, 3),
    q=st.integers(0, 15),
    s=st.integers(1, 140),
    d=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_any_shape(n, h, q, s, d, density, interleaved, seed):
    assert_matches(make_case(n, h, q, s, d, density=density, interleaved=interleaved, seed=seed))


@pytest.mark.parametrize("shape", [{"q": 0}, {"n": 0}, {"q": 0, "n": 0}], ids=str)
def test_empty(device, shape):
    """No queries: keys and values get zero gradients. No images: everything is empty."""
    case = make_case(**shape).to(device)
    result = value_and_gradients(case.call, case)
    assert result["output"].shape == case.tensors["query"].shape
    assert not result["key"].any()
    assert not result["value"].any()


def test_mask_forms(device):
    """Packed, bool [N, Q, S] and bool [N, 1, Q, S] are the same mask."""
    case = make_case().to(device)
    packed = case.call(*case.tensors.values())
    for mask in (case.attend, case.attend[:, None]):
        assert torch.equal(m2f_kernels.masked_attention(*case.tensors.values(), mask), packed)


# ---------------------------------------------------------------- memory
def gap(x):
    """A view with holes in every axis but the last, and an odd storage offset."""
    padded = x.new_full([size + 2 for size in x.shape[:-1]] + [2 * x.shape[-1] + 3], float("nan"))
    return padded[tuple(slice(1, size + 1) for size in x.shape[:-1])][..., 3 : 3 + x.shape[-1]].copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "gaps": gap,
    "last axis strided": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0],
    "axes reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded over the batch": lambda x: x[:1].expand_as(x),
    "expanded over heads": lambda x: x[:, :1].expand_as(x),
    "expanded over positions": lambda x: x[:, :, :1].expand_as(x),
    "one number": lambda x: x.flatten()[0].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_strides(implementation, layout, dtype):
    """Every tensor in turn as a view, against its own dense copy."""
    for name in (*NAMES, "grad_output"):
        case = make_case(dtype=dtype).to(implementation)
        holder = vars(case) if name == "grad_output" else case.tensors
        holder[name] = LAYOUTS[layout](holder[name])
        actual = value_and_gradients(case.call, case)
        holder[name] = holder[name].clone(memory_format=torch.contiguous_format)
        expected = value_and_gradients(case.call, case)
        for result, x in actual.items():
            assert torch.equal(x, expected[result]), (name, result)


def test_merging_heads_copies_nothing(device):
    case = make_case().to(device)
    out = case.call(*case.tensors.values())
    assert out.shape == case.tensors["query"].shape
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_every_output_is_written(implementation, deterministic):
    """Fresh memory is NaN under deterministic algorithms: nothing may be left of it, also where nothing attends."""
    case = make_case(q=5, s=1000, density=0.001).to(implementation)
    assert_matches(case)


def test_saved_for_backward(device):
    """Beside its inputs only the output and one number per query and head."""
    case = make_case().to(device)
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
    """Values of a blocked key show neither in the output nor in any gradient."""
    case = make_case(q=9, s=150, dtype=dtype).to(implementation)
    case.attend[:, :, 40:45] = False
    case.attend[:, :, 0] = True  # no row is empty
    expected = truth(case)
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40:45] = bad
    assert_matches(case, expected)


def assert_untouched(actual, clean, rows):
    """Bit for bit on CPU. The Triton kernels add up a whole block of rows again, key by key: another rounding."""
    actual, clean = actual[:, :, rows], clean[:, :, rows]
    assert torch.equal(actual, clean) if actual.device.type == "cpu" else relative_error(actual, clean) < 1e-6


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("name", ["key", "value"])
def test_keys_attended_by_some(implementation, name, bad):
    """Rows that attend to a bad key are as in SDPA; the others have their values."""
    case = make_case(q=9, s=150).to(implementation)
    case.attend[:, :, 40] = False
    case.attend[:, :, 0] = True
    clean = value_and_gradients(case.call, case)["output"]
    case.attend[:, 3, 40] = True
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40, 1] = bad
    actual = case.call(*case.tensors.values())
    expected = F.scaled_dot_product_attention(
        *(x.cpu().double() for x in case.tensors.values()), case.attend[:, None].cpu(), scale=32**-0.5
    ).to(actual.device)
    assert torch.equal(actual.isnan()[:, :, 3], expected.isnan()[:, :, 3])
    assert torch.equal(actual.isinf()[:, :, 3], expected.isinf()[:, :, 3])
    assert_untouched(actual, clean, [i for i in range(9) if i != 3])


def test_bad_key_attended_by_some_leaves_other_gradients(implementation):
    """The query gradient of a row that does not attend to the NaN key is finite and right."""
    case = make_case(n=1, h=1, q=9, s=150).to(implementation)
    case.attend[:, :, 40] = False
    case.attend[:, :, 0] = True
    expected = truth(case)["query"]
    case.attend[:, 3, 40] = True
    case.tensors["key"] = case.tensors["key"].clone()
    case.tensors["key"][:, :, 40] = float("nan")
    case.grad_output[:, :, 3] = 0
    actual = value_and_gradients(case.call, case)["query"]
    others = [i for i in range(9) if i != 3]
    assert relative_error(actual[:, :, others], expected[:, :, others]) < 1e-4


@pytest.mark.parametrize("bad", NON_FINITE)
def test_bad_query_stays_in_its_row(implementation, bad):
    case = make_case().to(implementation)
    clean = case.call(*case.tensors.values())
    case.tensors["query"] = case.tensors["query"].clone()
    case.tensors["query"][:, :, 2] = bad
    actual = case.call(*case.tensors.values())
    assert actual[:, :, 2].isnan().all()
    assert_untouched(actual, clean, [i for i in range(7) if i != 2])


@pytest.mark.parametrize("size", [30.0, 1e3, 1e15])
def test_large_logits(implementation, size):
    """Scores up to 1e31: no overflow; the softmax becomes a maximum."""
    case = make_case(s=300, scale=1.0).to(implementation)
    case.tensors["query"] = case.tensors["query"] * size
    case.tensors["key"] = case.tensors["key"] * size
    result = value_and_gradients(case.call, case)
    assert all(x.isfinite().all() for x in result.values())
    if size == 30.0:
        # Rounding of scores of 5000 to 5e-4 is in the weights.
        assert relative_error(result["output"], truth(case)["output"]) < 1e-3


def test_growing_scores_are_rescaled(implementation):
    """Each tile's scores exceed the former's by more than the headroom; then falling, so that later tiles vanish."""
    rising = torch.arange(640.0)
    for ramp in (rising, rising.flip(0)):
        case = make_case(n=1, h=1, q=3, s=640, d=16, density=1.0, scale=1.0)
        case.tensors["query"] = torch.ones_like(case.tensors["query"])
        case.tensors["key"] = (ramp[None, None, :, None] / 160).expand(1, 1, 640, 16).contiguous()
        assert_matches(case.to(implementation))


@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_gradients_of_nearly_uniform_attention(implementation, size):
    """Gradients of scores are then small differences of large numbers: the values share a mean that cancels."""
    case = make_case(s=4096, density=1.0)
    case.tensors["query"] = case.tensors["query"] * size
    case.tensors["key"] = case.tensors["key"] * size
    case.tensors["value"] = case.tensors["value"] + 3
    assert_matches(case.to(implementation))


def test_all_attended_scores_are_minus_infinity(implementation):
    """NaN, as in SDPA, and only in that row."""
    case = make_case(scale=1.0).to(implementation)
    case.attend[:, 1] = False
    case.attend[:, 1, 5] = True
    case.attend[:, 2:, 5] = False
    case.attend[:, 0] = True
    case.tensors["query"] = torch.ones_like(case.tensors["query"])
    case.tensors["key"] = case.tensors["key"].clone()
    case.tensors["key"][:, :, 5] = -float("inf")
    out = case.call(*case.tensors.values())
    assert out[:, :, 1].isnan().all()
    assert out[:, :, 2:].isfinite().all()
    assert out[:, :, 0].isfinite().all()


# ---------------------------------------------------------------- determinism
@pytest.mark.parametrize("shape", [{"n": 1, "h": 8, "s": 300}, {"n": 2, "h": 3, "s": 3000, "q": 20}], ids=str)
def test_the_same_bits_for_any_number_of_threads(set_threads, shape):
    case = make_case(**shape)
    set_threads(1)
    first = value_and_gradients(case.call, case)
    for threads in (1, 2, 5, 8):
        set_threads(threads)
        again = value_and_gradients(case.call, case)
        for name, x in first.items():
            assert torch.equal(x, again[name]), (threads, name)


def test_images_are_independent(implementation):
    """The result for an image does not depend, in one bit, on what else is in the batch."""
    case = make_case(n=3, s=300).to(implementation)
    whole = value_and_gradients(case.call, case)
    for i in range(3):
        alone = make_case(n=3, s=300).to(implementation)
        alone.tensors = {name: x[i : i + 1] for name, x in alone.tensors.items()}
        alone.attend, alone.grad_output = alone.attend[i : i + 1], alone.grad_output[i : i + 1]
        for name, x in value_and_gradients(alone.call, alone).items():
            assert torch.equal(x[0], whole[name][i]), name
