"""The Triton kernels of masked attention, called directly, against the reference in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from m2f_kernels import _tuning
from m2f_kernels.ops.masked_attention import configs, reference
from tests.numerics import FORWARD, GRADIENT, relative_error, tolerance
from tests.ops.masked_attention_cases import DENSITIES, NAMES, make_case, row_rule, truth

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
NON_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(scope="module")
def kernels():
    from m2f_kernels.ops.masked_attention import triton

    return triton


def forward(kernels, case):
    """Output as [N, H, Q, D], and the log-sum-exp."""
    tensors, mask = list(case.tensors.values()), case.mask
    scale = tensors[0].shape[-1] ** -0.5 if case.scale is None else case.scale
    output, logsumexp = kernels.masked_attention(*tensors, mask.bits, mask.row_any, scale)
    assert output.is_contiguous()
    assert logsumexp.dtype == F32
    return output.transpose(1, 2), logsumexp


def run(kernels, case):
    """Output and gradients by the two kernels alone, as `tests.ops.masked_attention_cases.value_and_gradients`."""
    tensors, mask = list(case.tensors.values()), case.mask
    scale = tensors[0].shape[-1] ** -0.5 if case.scale is None else case.scale
    output, logsumexp = forward(kernels, case)
    gradients = kernels.masked_attention_backward(
        case.grad_output.transpose(1, 2), *tensors, mask.bits, mask.row_any, output.transpose(1, 2), logsumexp, scale
    )
    assert all(x.is_contiguous() for x in gradients)
    return {"output": output, **dict(zip(NAMES, (x.transpose(1, 2) for x in gradients), strict=True))}


def check(kernels, case, expected=None):
    """Bounds as in `tests.ops.masked_attention_cases.assert_matches`."""
    actual, expected = run(kernels, case), expected or truth(case)
    dtype = case.tensors["query"].dtype
    for name, x in actual.items():
        assert x.dtype == dtype
        bound = tolerance(FORWARD if name == "output" else GRADIENT, dtype, dtype)
        if name in ("query", "key") and dtype in (BF16, F16):
            bound *= 2
        error = relative_error(x, expected[name])
        assert error <= bound, f"{name}: relative error {error:.3g} > {bound:.3g}"
    return actual


# ---------------------------------------------------------------- shapes, dtypes, masks


@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize("d", [16, 17, 32, 40, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_channels(kernels, device, dtype, d, density):
    check(kernels, make_case(n=1, q=19, s=100, d=d, dtype=dtype, density=density).to(device))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("s", [1, 31, 32, 33, 64, 65, 100, 1000])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_numbers_of_keys(kernels, device, dtype, s, interleaved):
    """Around the word and the tile, and not a multiple of either."""
    n, h = (1, 2) if s == 1000 else (2, 1)
    check(kernels, make_case(n=n, h=h, s=s, d=16, dtype=dtype, density=0.3, interleaved=interleaved).to(device))


@pytest.mark.parametrize("q", [1, 7, 16, 17, 64, 100, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_queries(kernels, device, dtype, q):
    """Both orientations of the products; more queries than one block."""
    for density in (0.5, 0.02):
        check(kernels, make_case(n=1, h=2, q=q, s=150, dtype=dtype, density=density).to(device))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("h", [1, 3])
def test_images_and_heads(kernels, device, n, h):
    check(kernels, make_case(n=n, h=h, d=16).to(device))


@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
def test_scale(kernels, device, scale):
    check(kernels, make_case(n=1, scale=scale).to(device))


@pytest.mark.parametrize("shape", [{"q": 0}, {"n": 0}, {"q": 0, "n": 0}], ids=str)
def test_empty(kernels, device, shape):
    case = make_case(**shape).to(device)
    result = run(kernels, case)
    assert result["output"].shape == case.tensors["query"].shape
    for name in NAMES:
        assert result[name].shape == case.tensors[name].shape
        assert not result[name].any()


def some_rows(case):
    """Rows whose keys lie in few tiles, in the last tile only, everywhere and nowhere."""
    case.attend[:, 0] = False
    case.attend[:, 1] = False
    case.attend[:, 1, -1] = True
    case.attend[:, 2] = True
    case.attend[:, 3] = False
    case.attend[:, 3, 200:203] = True
    return case


@pytest.mark.parametrize("waves", [1, 1000])
@pytest.mark.parametrize("q", [9, 70])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tiles_and_programs(kernels, device, monkeypatch, dtype, q, waves):
    """All tiles in few programs, and each tile in its own; tiles that nobody attends to are skipped."""
    case = some_rows(make_case(n=1, h=1, q=q, s=1000, d=16, dtype=dtype, density=0.0).to(device))
    case.attend[:, 4:, :40] = True  # else their rows are empty
    case.attend[:, 0] = q == 70  # with an empty row no tile is skipped
    tiles = configs.tiles_per_program
    monkeypatch.setattr(configs, "tiles_per_program", lambda t, p, _, __: tiles(t, p, 1, waves))
    check(kernels, case)


@pytest.mark.parametrize("keys_first", [0, 1])
@pytest.mark.parametrize("block_q", [16, 64])
def test_both_orientations(kernels, device, keys_first, block_q):
    """Any configuration gives the right result, not only the default's choice."""
    case = make_case(n=1, h=1, q=50, s=90, dtype=BF16).to(device)
    config = {
        "BLOCK_Q": block_q, "BLOCK_K": 32, "KEYS_FIRST": keys_first, "num_warps": 4, "num_stages": 1, "waves": 2,
    }  # fmt: skip
    with _tuning.forced(configs.FORWARD, configs.key(2, 50, 32), config):
        check(kernels, case)


def test_logsumexp(kernels, device):
    for case in (make_case(n=1, density=0.3), some_rows(make_case(n=1, s=600, d=16, density=0.1))):
        exact = [x.double() for x in case.tensors.values()]
        scale = exact[0].shape[-1] ** -0.5
        _, expected = reference.masked_attention(*exact, row_rule(case.attend), scale)
        assert relative_error(forward(kernels, case.to(device))[1], expected) < 1e-6


# ---------------------------------------------------------------- memory


def gap(x):
    """A view with holes in every axis but the last, and an odd storage offset; what is outside is NaN."""
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
def test_strides(kernels, device, layout):
    """Every tensor in turn as a view, against its own dense copy."""
    for name in (*NAMES, "grad_output"):
        case = make_case(s=40, d=17).to(device)
        holder = vars(case) if name == "grad_output" else case.tensors
        holder[name] = LAYOUTS[layout](holder[name])
        actual = run(kernels, case)
        holder[name] = holder[name].clone(memory_format=torch.contiguous_format)
        expected = run(kernels, case)
        for result, x in actual.items():
            assert torch.equal(x, expected[result]), (name, result)


@pytest.mark.parametrize("q", [5, 140])
def test_every_output_is_written(kernels, device, deterministic, q):
    """Fresh memory is NaN under deterministic algorithms: nothing may be left of it, also where nothing attends."""
    case = make_case(n=1, h=1, q=q, s=300, d=16, density=0.0).to(device)
    case.attend[:, :, 7] = True
    result = check(kernels, case)
    assert not result["key"][:, :, 100:].any()
    assert not result["value"][:, :, 100:].any()


# ---------------------------------------------------------------- special values
# 9 queries fit one block of the backward; 70 of float32 do not.


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize(("dtype", "q"), [(F32, 9), (F32, 70), (BF16, 9)], ids=str)
def test_blocked_keys_contribute_nothing(kernels, device, dtype, q, name, bad):
    """What a blocked key holds shows neither in the output nor in any gradient."""
    case = make_case(n=1, h=1, q=q, s=70, d=16, dtype=dtype).to(device)
    case.attend[:, :, 40:45] = False
    case.attend[:, :, 0] = True  # no row is empty
    expected = truth(case)
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40:45] = bad
    check(kernels, case, expected)


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("q", [9, 70])
def test_keys_attended_by_some(kernels, device, q, name, bad):
    """Rows that attend to a bad key are as in SDPA; the others, and their gradients, are untouched."""
    case = make_case(n=1, q=q, s=70, d=16).to(device)
    case.attend[:, :, 40] = False
    case.attend[:, :, 0] = True
    clean = truth(case)
    case.attend[:, 3, 40] = True
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40, 1] = bad
    actual = run(kernels, case)
    expected = F.scaled_dot_product_attention(*(x.double() for x in case.tensors.values()), case.attend[:, None])
    assert torch.equal(actual["output"].isnan()[:, :, 3], expected.isnan()[:, :, 3])
    assert torch.equal(actual["output"].isinf()[:, :, 3], expected.isinf()[:, :, 3])
    others = [i for i in range(q) if i != 3]
    assert relative_error(actual["output"][:, :, others], clean["output"][:, :, others]) < FORWARD[F32]
    assert relative_error(actual["query"][:, :, others], clean["query"][:, :, others]) < GRADIENT[F32]


@pytest.mark.parametrize("bad", NON_FINITE)
def test_bad_query_stays_in_its_row(kernels, device, bad):
    case = make_case(n=1, s=40).to(device)
    clean, _ = forward(kernels, case)
    case.tensors["query"] = case.tensors["query"].clone()
    case.tensors["query"][:, :, 2] = bad
    actual, _ = forward(kernels, case)
    others = [i for i in range(7) if i != 2]
    assert actual[:, :, 2].isnan().all()
    assert relative_error(actual[:, :, others], clean[:, :, others]) < FORWARD[F32]


@pytest.mark.parametrize("q", [7, 130])
@pytest.mark.parametrize("size", [30.0, 1e3, 1e15])
def test_large_logits(kernels, device, q, size):
    """Scores up to 1e31: no overflow in either direction; the softmax becomes a maximum."""
    case = make_case(n=1, h=1, q=q, s=150, scale=1.0).to(device)
    case.tensors["query"] = case.tensors["query"] * size
    case.tensors["key"] = case.tensors["key"] * size
    result = run(kernels, case)
    assert all(x.isfinite().all() for x in result.values())
    # No weight is above 1, however the scores were rounded: no column of dV is larger than the gradients allow.
    assert (result["value"].abs() <= case.grad_output.abs().sum(2, keepdim=True)).all()
    if size == 30.0:
        # Rounding of scores of 5000 to 5e-4 is in the weights.
        assert relative_error(result["output"], truth(case)["output"]) < 1e-3


def test_growing_scores_are_rescaled(kernels, device):
    """Scores rise or fall from tile to tile by more than float32's range of exp."""
    rising = torch.arange(320.0)
    for ramp in (rising, rising.flip(0)):
        case = make_case(n=1, h=1, q=3, s=320, d=16, density=1.0, scale=1.0)
        case.tensors["query"] = torch.ones_like(case.tensors["query"])
        case.tensors["key"] = (ramp[None, None, :, None] / 16).expand(1, 1, 320, 16).contiguous()
        check(kernels, case.to(device))


@pytest.mark.parametrize("s", [70, 700])
def test_all_attended_scores_are_minus_infinity(kernels, device, s):
    """NaN, as in SDPA, and only in that row; also where the keys are split over programs."""
    case = make_case(n=1, h=1, s=s, d=16, scale=1.0).to(device)
    case.attend[:, 1] = False
    case.attend[:, 1, 5] = True
    case.attend[:, 2:, 5] = False
    case.attend[:, 0] = True
    case.tensors["query"] = torch.ones_like(case.tensors["query"])
    case.tensors["key"] = case.tensors["key"].clone()
    case.tensors["key"][:, :, 5] = -float("inf")
    out, _ = forward(kernels, case)
    assert out[:, :, 1].isnan().all()
    assert out[:, :, 2:].isfinite().all()
    assert out[:, :, 0].isfinite().all()


# ---------------------------------------------------------------- determinism


@pytest.mark.parametrize("q", [9, 70])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_same_bits_again(kernels, device, dtype, q):
    case = make_case(n=1, q=q, s=300, d=16, dtype=dtype).to(device)
    first = run(kernels, case)
    again = run(kernels, case)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


def test_tiles_per_program():
    """The nearest power of two on a logarithmic scale, at least 1, at most MAX_TILES and what there is."""
    arguments = SimpleNamespace(programs=8, multiprocessors=132, waves=2)
    counts = [configs.tiles_per_program(tiles, **vars(arguments)) for tiles in (1, 32, 33, 64, 256, 10**6)]
    assert counts == [1, 1, 1, 2, 8, configs.MAX_TILES]
