"""The Triton kernels of masked attention, called directly, against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F

import m2f_kernels
from m2f_kernels import _triton, _tuning
from m2f_kernels.ops.masked_attention import configs
from tests.numerics import FORWARD, GRADIENT, relative_error, tolerance
from tests.ops.masked_attention_cases import NAMES, make_case, row_rule, sdpa_bound, truth

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NON_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(scope="module")
def kernels():
    from m2f_kernels.ops.masked_attention import triton

    return triton


@pytest.fixture
def forward_kernel(request, monkeypatch):
    """The lean one wants queries as rows."""
    if request.param == "lean":
        chosen = configs.forward
        monkeypatch.setattr(configs, "KERNEL", "lean")
        monkeypatch.setattr(configs, "forward", lambda *a: {**chosen(*a), "KEYS_FIRST": 0})


def kernels_and_dtypes(*general):
    """The general forward kernel in each dtype, and the lean one in half precision, which alone it serves."""
    lean = dict.fromkeys(F16 if dtype == F32 else dtype for dtype in general)
    pairs = [*(("general", dtype) for dtype in general), *(("lean", dtype) for dtype in lean)]
    return pytest.mark.parametrize(("forward_kernel", "dtype"), pairs, ids=str, indirect=["forward_kernel"])


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
    """The bounds of `tests.ops.masked_attention_cases`: float16 in the interpreter and all dtypes on a GPU keep them.

    The interpreter truncates to bfloat16 where a GPU rounds to nearest (`test_bfloat16_in_the_interpreter` holds it to
    that): there, and only there, one rounding has twice the error.
    """
    bound = tolerance(FORWARD if name == "output" else GRADIENT, dtype, dtype)
    if name in ("query", "key") and dtype != F32:
        bound *= 2
    return 2 * bound if dtype == BF16 and _triton.INTERPRETED else bound


def test_bfloat16_in_the_interpreter(kernels, device):
    """The reason for the wider bound. When this fails, the interpreter rounds, and `bounds` must lose its factor."""
    if not _triton.INTERPRETED:
        pytest.skip("kernels are compiled here: they round to nearest")
    case = make_case(n=1, h=1, q=1, s=2, d=16, density=1.0, dtype=BF16)
    for name in NAMES:
        case.tensors[name] = torch.zeros_like(case.tensors[name])
    case.tensors["value"][:, :, 0] = 2.0
    case.tensors["value"][:, :, 1] = 2.0 + 3 * 2.0**-6  # the mean has one and a half units in the last place
    found, _ = run(kernels, device, case)
    assert (found["output"] == 2.0 + 2.0**-6).all()


def assert_matches(kernels, device, case, expected=None):
    dtype = case.tensors["query"].dtype
    expected = expected or truth(case)
    found, _ = run(kernels, device, case)
    for name, x in found.items():
        assert x.dtype == dtype
        error, bound = relative_error(x, expected[name]), bounds(name, dtype)
        if error > bound and x.is_cuda:  # see tests.ops.masked_attention_cases.assert_matches
            bound = max(bound, sdpa_bound(case.to(device), name, expected))
        assert error <= bound, f"{name}: relative error {error:.3g} > {bound:.3g}"


@kernels_and_dtypes(F32, BF16, F16)
@pytest.mark.parametrize("d", [17, 32, 40, 64, 128])
def test_channels(kernels, device, dtype, d, forward_kernel):
    assert_matches(kernels, device, make_case(n=1, d=d, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_few_channels(kernels, device, dtype):
    assert_matches(kernels, device, make_case(n=1, d=16, dtype=dtype))


@pytest.mark.parametrize(
    ("change", "keys_first"),
    [
        ({}, True),
        ({"d": 48}, True),
        ({"d": 40}, False),
        ({"d": 40, "dtype": F32}, False),
        ({"d": 128, "dtype": F32}, True),
        ({"d": 136, "dtype": F32}, True),
        ({"q": 100}, False),
    ],
    ids=str,
)
def test_rows_without_vector_loads(kernels, change, keys_first):
    """Few queries in half precision have the keys in the rows, unless their rows cannot be loaded as vectors."""
    assert forward_constants(kernels, **({"dtype": BF16} | change))["KEYS_FIRST"] == keys_first


def test_a_slice_without_vector_loads(kernels):
    """The same where a view's address or one of its strides, not the head size, is odd."""
    assert not forward_constants(kernels, dtype=BF16, view=lambda x: x[..., 1:33])["KEYS_FIRST"]
    assert not forward_constants(kernels, dtype=BF16, view=lambda x: x[..., 4:36])["KEYS_FIRST"]
    assert forward_constants(kernels, dtype=BF16, view=lambda x: x[..., 16:48])["KEYS_FIRST"]


@pytest.mark.parametrize("forward_kernel", ["lean"], indirect=True)
@pytest.mark.usefixtures("forward_kernel")
def test_the_lean_kernel_serves_rows_of_queries_and_positive_scales(kernels, monkeypatch):
    def launched(scale, keys_first, dtype=BF16):
        monkeypatch.setattr(configs, "forward", lambda *a: {**chosen(*a), "KEYS_FIRST": keys_first})
        with _triton.recording(_triton.ARCHITECTURES[90]) as launches:
            kernels.masked_attention(*(x.to(dtype) for x in heads), *mask, scale)
        return launches[0].kernel.__name__

    chosen = configs.forward
    q, k = (torch.empty(1, 2, rows, 32, dtype=BF16, device="meta") for rows in (100, 70))
    flags = torch.empty(1, 100, dtype=torch.bool, device="meta")
    heads, mask = (q, k, k), (torch.empty(1, 100, 3, dtype=torch.int32, device="meta"), flags)
    assert launched(0.5, 0) == launched(0.5, 0, F16) == "_forward_lean_kernel"
    assert launched(-0.5, 0) == launched(0.0, 0) == launched(0.5, 1) == launched(0.5, 0, F32) == "_forward_kernel"


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(kernels, device, scale):
    assert_matches(kernels, device, make_case(n=1, h=2, q=5, s=70, d=16, scale=scale))


def forward_constants(kernels, d=32, q=7, dtype=F32, view=lambda x: x[..., : x.shape[-1] - 32]):
    """The arguments of the forward kernel's launch; `view` cuts the heads' channels out of 32 more."""
    query, key, value = (torch.empty(2, rows, 4, d + 32, dtype=dtype, device="meta") for rows in (q, 70, 70))
    heads = (view(x).transpose(1, 2) for x in (query, key, value))
    bits = torch.empty(2, q, 3, dtype=torch.int32, device="meta")
    row_any = torch.empty(2, q, dtype=torch.bool, device="meta")
    with _triton.recording(_triton.ARCHITECTURES[90]) as launches:
        kernels.masked_attention(*heads, bits, row_any, 1.0)
    return launches[0].arguments


@kernels_and_dtypes(F32, BF16)
@pytest.mark.parametrize("q", [1, 20, 100, 130])
def test_numbers_of_queries(kernels, device, dtype, q, forward_kernel):
    """Keys first, queries first, and more than one block of queries."""
    assert_matches(kernels, device, make_case(n=1, h=1, q=q, s=150, dtype=dtype))


@kernels_and_dtypes(F32, BF16)
@pytest.mark.parametrize("s", [1, 31, 32, 33, 64, 100, 1000])
def test_numbers_of_keys(kernels, device, dtype, s, forward_kernel):
    """Around the word and the tile, and enough for several splits."""
    assert_matches(kernels, device, make_case(n=1, h=1, s=s, dtype=dtype))


@kernels_and_dtypes(F32)
@pytest.mark.parametrize(
    ("density", "interleaved"), [(0.0, True), (0.02, False), (0.02, True), (0.7, False), (1.0, True)]
)
def test_masks_and_layouts(kernels, device, dtype, density, interleaved, forward_kernel):
    """All blocked, whole tiles skipped, most, all open; heads cut out of [N, *, H*D] and [N, H, *, D]."""
    assert_matches(
        kernels, device, make_case(n=2, h=3, q=9, s=200, dtype=dtype, density=density, interleaved=interleaved)
    )


@kernels_and_dtypes(F32)
def test_rows_with_few_keys(kernels, device, dtype, forward_kernel):
    """Splits in which some queries have no key at all."""
    case = make_case(n=1, h=1, q=5, s=2000, dtype=dtype, density=0.5)
    case.attend[:, 0] = False
    case.attend[:, 1, :1990] = False
    case.attend[:, 2, 10:] = False
    assert_matches(kernels, device, case)


@kernels_and_dtypes(F32)
def test_logsumexp(kernels, device, dtype, forward_kernel):
    case = make_case(n=1, s=300, dtype=dtype, density=0.1)
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


@kernels_and_dtypes(F32)
def test_strided(kernels, device, dtype, forward_kernel):
    """Views with gaps and a gradient of stride 0, as out.sum().backward() sends."""
    case = make_case(n=1, dtype=dtype)
    for name in NAMES:
        case.tensors[name] = torch.stack([case.tensors[name]] * 2, -2)[..., 1, :]
    case.grad_output = case.grad_output[..., :1, :1].expand_as(case.grad_output)
    assert_matches(kernels, device, case)


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("name", ["key", "value"])
@kernels_and_dtypes(F32, BF16)
def test_blocked_keys_contribute_nothing(kernels, device, name, bad, dtype, forward_kernel):
    """Values of a blocked key show neither in the output nor in any gradient."""
    case = make_case(n=1, h=1, q=9, s=150, dtype=dtype)
    case.attend[:, :, 40:45] = False
    case.attend[:, :, 0] = True
    expected = truth(case)
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40:45] = bad
    assert_matches(kernels, device, case, expected)


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("name", ["key", "value"])
@kernels_and_dtypes(F32)
def test_keys_attended_by_some(kernels, device, name, bad, dtype, forward_kernel):
    """Rows that attend to a bad key are as in SDPA; the others' outputs and query gradients are untouched."""
    case = make_case(n=1, h=1, q=9, s=150, dtype=dtype)
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
    for name in ("output", "query"):
        assert relative_error(found[name][:, :, others], clean[name][:, :, others]) < bounds(name, dtype)


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


@kernels_and_dtypes(BF16)
def test_deterministic(kernels, device, dtype, forward_kernel):
    case = make_case(n=1, s=1000, dtype=dtype)
    first, _ = run(kernels, device, case)
    again, _ = run(kernels, device, case)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


# ---------------------------------------------------------------- which program has which tiles


def on_one_multiprocessor(monkeypatch, waves):
    """Programs take up to 16 tiles with few waves, and one each with many."""
    tiles = configs.tiles_per_program
    monkeypatch.setattr(configs, "tiles_per_program", lambda count, programs, *_: tiles(count, programs, 1, waves))


def some_rows(q, s, empty_row, dtype=F32):
    """Every query has the same 40 keys, but: none at all, the last one only, a few in the middle."""
    case = make_case(n=1, h=1, q=q, s=s, dtype=dtype, density=0.0)
    case.attend[:, :, :40] = True
    case.attend[:, 1:4] = False
    case.attend[:, 1, -1] = True
    case.attend[:, 2, 200:203] = True
    case.attend[:, 3, 5] = not empty_row
    return case


@pytest.mark.parametrize("waves", [1, 1000])
@pytest.mark.parametrize("empty_row", [True, False])
@pytest.mark.parametrize("q", [9, 20])
@kernels_and_dtypes(F32, BF16)
def test_tiles_and_programs(kernels, device, monkeypatch, dtype, q, empty_row, waves, forward_kernel):
    """Up to 16 tiles in one program, and one tile in each. Without an empty row most tiles are skipped."""
    on_one_multiprocessor(monkeypatch, waves)
    assert_matches(kernels, device, some_rows(q, 550, empty_row, dtype))


@pytest.mark.parametrize("keys_first", [0, 1])
@pytest.mark.parametrize("block_q", [16, 64])
def test_both_orientations(kernels, device, keys_first, block_q):
    """Whatever the tuner may choose is right: either operand as rows, one block of queries and several."""
    shape = {"BLOCK_Q": block_q, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1, "waves": 2}
    key = configs.key(2, 50, 32)
    forward = _tuning.forced(configs.FORWARD, key, {**shape, "KEYS_FIRST": keys_first})
    with forward, _tuning.forced(configs.BACKWARD, key, shape):
        assert_matches(kernels, device, make_case(n=1, h=1, q=50, s=90, dtype=BF16))


@pytest.mark.parametrize("q", [5, 20])
@kernels_and_dtypes(F32)
def test_every_output_is_written(kernels, device, deterministic, q, dtype, forward_kernel):
    """Fresh memory is NaN under deterministic algorithms: nothing may be left of it, also where nothing attends."""
    case = make_case(n=1, h=1, q=q, s=300, dtype=dtype, density=0.0)
    case.attend[:, :, 7] = True
    assert_matches(kernels, device, case)
    found, _ = run(kernels, device, case)
    assert not found["key"][:, :, 8:].any()
    assert not found["value"][:, :, 8:].any()


# ---------------------------------------------------------------- memory


def gap(x):
    """A view with holes in every axis but the last, and an odd storage offset; NaN lies around it."""
    padded = x.new_full([size + 2 for size in x.shape[:-1]] + [2 * x.shape[-1] + 3], float("nan"))
    return padded[tuple(slice(1, size + 1) for size in x.shape[:-1])][..., 3 : 3 + x.shape[-1]].copy_(x)


LAYOUTS = {
    "gaps": gap,
    "last axis strided": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0],
    "axes reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded over the batch": lambda x: x[:1].expand_as(x),
    "expanded over positions": lambda x: x[:, :, :1].expand_as(x),
    "one number": lambda x: x.flatten()[0].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@kernels_and_dtypes(F32)
def test_layouts(kernels, device, layout, dtype, forward_kernel):
    """Every tensor in turn as a view, against its own dense copy."""
    for name in (*NAMES, "grad_output"):
        case = make_case(h=1, q=5, s=33, d=17, dtype=dtype).to(device)
        holder = vars(case) if name == "grad_output" else case.tensors
        holder[name] = LAYOUTS[layout](holder[name])
        actual, _ = run(kernels, device, case)
        holder[name] = holder[name].clone(memory_format=torch.contiguous_format)
        expected, _ = run(kernels, device, case)
        for result, x in actual.items():
            assert torch.equal(x, expected[result]), (name, result)


# ---------------------------------------------------------------- special values with several blocks of queries


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("name", ["key", "value"])
def test_bad_keys_with_several_blocks_of_queries(kernels, device, name, bad):
    """20 queries of float32 take two blocks in the backward; row 3 alone attends to the bad key."""
    case = make_case(n=1, h=1, q=20, s=45, d=16)
    case.attend[:, :, 40] = False
    case.attend[:, :, 0] = True
    clean = truth(case)
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40, 1] = bad
    assert_matches(kernels, device, case, clean)
    case.attend[:, 3, 40] = True
    found, _ = run(kernels, device, case)
    others = [i for i in range(20) if i != 3]
    assert not found["output"][:, :, 3].isfinite().all() or bad == -torch.inf
    for name in ("output", "query"):
        assert relative_error(found[name][:, :, others], clean[name][:, :, others]) < bounds(name, F32)


@pytest.mark.parametrize("bad", NON_FINITE)
@kernels_and_dtypes(F32)
def test_bad_query_stays_in_its_row(kernels, device, bad, dtype, forward_kernel):
    case = make_case(n=1, s=40, dtype=dtype)
    expected = truth(case)["output"]
    case.tensors["query"] = case.tensors["query"].clone()
    case.tensors["query"][:, :, 2] = bad
    found, _ = run(kernels, device, case)
    others = [i for i in range(7) if i != 2]
    assert found["output"][:, :, 2].isnan().all()
    assert relative_error(found["output"][:, :, others], expected[:, :, others]) < bounds("output", dtype)


@pytest.mark.parametrize("q", [7, 40])
def test_weights_never_exceed_one(kernels, device, q):
    """With scores of 1e31 a score and the saved log-sum-exp differ by more than exp can take."""
    case = make_case(n=1, h=1, q=q, s=150, scale=1.0)
    for name in ("query", "key"):
        case.tensors[name] = case.tensors[name] * 1e15
    found, _ = run(kernels, device, case)
    assert all(x.isfinite().all() for x in found.values())
    largest = case.grad_output.abs().sum(2, keepdim=True)
    assert (found["value"].cpu().abs() <= 1.0001 * largest).all()


@pytest.mark.parametrize("waves", [1, 1000])
@kernels_and_dtypes(F32)
def test_growing_scores_are_rescaled(kernels, device, monkeypatch, dtype, waves, forward_kernel):
    """Scores rise from -64 to 64, or fall, tile by tile and program by program: altogether by more than exp can take.
    Each is small enough for its rounding to stay inside the bound; in half precision that of a query's gradient does
    not."""
    on_one_multiprocessor(monkeypatch, waves)
    d, rising = 16 if dtype == F32 else 32, torch.arange(-160.0, 160.0)
    for ramp in (rising, rising.flip(0)):
        case = make_case(n=1, h=1, q=3, s=320, d=d, dtype=dtype, density=1.0, scale=16 / d)
        case.tensors["query"] = torch.ones_like(case.tensors["query"])
        case.tensors["key"] = (ramp[None, None, :, None] / 40).to(dtype).expand(1, 1, 320, d).contiguous()
        if dtype == F32:
            assert_matches(kernels, device, case)
        else:
            found = run(kernels, device, case)[0]["output"]
            assert relative_error(found, truth(case)["output"]) <= bounds("output", dtype)


@pytest.mark.parametrize("s", [70, 400])
@kernels_and_dtypes(F32)
def test_all_attended_scores_are_minus_infinity(kernels, device, s, dtype, forward_kernel):
    """NaN, as in SDPA, and only in that row; also where the keys are split over programs."""
    case = make_case(n=1, h=1, s=s, dtype=dtype, scale=1.0)
    case.attend[:, 1] = False
    case.attend[:, 1, 5] = True
    case.attend[:, 2:, 5] = False
    case.attend[:, 0] = True
    case.tensors["query"] = torch.ones_like(case.tensors["query"])
    case.tensors["key"] = case.tensors["key"].clone()
    case.tensors["key"][:, :, 5] = -float("inf")
    output = run(kernels, device, case)[0]["output"]
    assert output[:, :, 1].isnan().all()
    assert output[:, :, 2:].isfinite().all()
    assert output[:, :, 0].isfinite().all()
