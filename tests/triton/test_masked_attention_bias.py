"""The Triton kernels of masked attention with a bias of rows and columns, against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F

from m2f_kernels import _triton, masks
from m2f_kernels.ops.masked_attention import configs
from tests.numerics import relative_error
from tests.ops.masked_attention_cases import BIAS, NAMES, joined, make_case, row_rule, sdpa_bound, truth
from tests.triton.test_masked_attention import bounds

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def kernels():
    from m2f_kernels.ops.masked_attention import triton

    return triton


def run(kernels, device, case, masked=None):
    """Output and gradients in the layout of the public operator, and the log-sum-exp; the first `masked` queries have a
    mask."""
    tensors = [x.to(device) for x in case.tensors.values()]
    bits, row_any = (x.to(device) for x in masks.pack(case.attend[:, :masked]))
    scale = tensors[0].shape[-1] ** -0.5 if case.scale is None else case.scale
    given = (*tensors[:3], bits, row_any, *tensors[3:])
    output, logsumexp = kernels.masked_attention_with_bias(*given, scale)
    grad = case.grad_output.to(device).transpose(1, 2)
    gradients = kernels.masked_attention_with_bias_backward(grad, *given, output, logsumexp, scale)
    heads = (g.transpose(1, 2) for g in gradients[:3])
    found = dict(zip((*NAMES, *BIAS), (*heads, *gradients[3:]), strict=True))
    return {"output": output.transpose(1, 2), **found}, logsumexp


def assert_matches(kernels, device, case, expected=None, masked=None):
    dtype = case.tensors["query"].dtype
    expected = joined(expected or truth(case))
    found, logsumexp = run(kernels, device, case, masked)
    for name, x in joined(found).items():
        assert x.dtype == dtype
        error, bound = relative_error(x, expected[name]), bounds("query" if name == "bias" else name, dtype)
        if error > bound and x.is_cuda:
            bound = max(bound, sdpa_bound(case.to(device), name, expected))
        assert error <= bound, f"{name}: relative error {error:.3g} > {bound:.3g}"
    return found, logsumexp


def open_case(**sizes):
    return make_case(density=1.0, **sizes)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("d", [16, 17, 32, 128])
def test_channels(kernels, device, dtype, d):
    assert_matches(kernels, device, make_case(n=1, h=2, q=20, d=d, dtype=dtype, sides=(4, 20)))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_wide_rows_of_gfx11_are_multiplied_in_float32(kernels, device, monkeypatch, dtype):
    def forward(device, version, element_size, num_queries, d, width, forward=configs.biased_forward):
        config = forward(_triton.ARCHITECTURES["gfx1100"], version, element_size, num_queries, d, width)
        assert config["IN_FLOAT"] == 1
        return config

    monkeypatch.setattr(configs, "biased_forward", forward)
    assert_matches(kernels, device, make_case(n=1, h=2, q=20, d=80, dtype=dtype, sides=(4, 20)))


@pytest.mark.parametrize("masked", [0, None])
@pytest.mark.parametrize("sides", [(1, 1), (1, 70), (40, 1), (5, 31), (3, 32), (3, 33), (2, 72), (2, 130)], ids=str)
def test_rows_and_columns(kernels, device, sides, masked):
    """Tiles of keys as wide as a row, and several for each row; without a mask and with one."""
    n = 2 if sides == (5, 31) else 1
    case = make_case(n=n, h=1, q=9, d=16, density=0.4 if masked is None else 1.0, sides=sides)
    assert_matches(kernels, device, case, masked=masked)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("q", [1, 33, 130])
def test_numbers_of_queries(kernels, device, q, dtype):
    assert_matches(kernels, device, make_case(n=1, h=1, q=q, d=16, dtype=dtype, sides=(3, 35)))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.7])
@pytest.mark.parametrize("interleaved", [True, False])
def test_masks_and_layouts(kernels, device, density, interleaved):
    assert_matches(
        kernels, device, make_case(n=2, h=2, q=9, d=16, density=density, interleaved=interleaved, sides=(5, 40))
    )


def test_mask_of_the_first_queries(kernels, device):
    case = make_case(n=2, h=1, q=20, d=16, sides=(5, 21))
    case.attend[:, 7:] = True
    assert_matches(kernels, device, case, masked=7)


def test_splits(kernels, device, monkeypatch):
    """Many rows and columns for each program, and one for each: the same results."""
    case = make_case(n=1, h=1, q=20, d=16, sides=(8, 70))
    expected = truth(case)
    from m2f_kernels.ops.masked_attention import triton_bias

    for rows in (1, 3, 8):
        monkeypatch.setattr(triton_bias, "_rows_per_program", lambda *_, rows=rows, **__: rows)
        _, logsumexp = assert_matches(kernels, device, case, expected)
        q, k, _, by_row, by_column = (x.double() for x in case.tensors.values())
        scores = q @ k.transpose(-1, -2) * 16**-0.5 + (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(-2)
        scores = scores.masked_fill(~row_rule(case.attend)[:, None], -torch.inf)
        assert relative_error(logsumexp, scores.logsumexp(-1)) < 1e-6


def test_strides(kernels, device):
    """Everything with gaps or with stride 0."""
    case = make_case(n=1, h=2, q=20, d=16, interleaved=False, sides=(3, 35))
    for name in (*NAMES, *BIAS):
        case.tensors[name] = torch.stack([case.tensors[name]] * 2, -2)[..., 1, :]
    case.tensors["by_row"] = case.tensors["by_row"][:, :1].expand(-1, 2, -1, -1)
    case.tensors["by_column"] = case.tensors["by_column"][..., :1].expand(-1, -1, -1, 35)
    case.grad_output = case.grad_output[..., :1, :1].expand_as(case.grad_output)
    assert_matches(kernels, device, case)


def test_the_same_bits_each_time(kernels, device):
    case = make_case(n=1, h=1, q=40, d=16, sides=(9, 40))
    first, second = (run(kernels, device, case)[0] for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_empty(kernels, device):
    case = make_case(n=1, h=2, q=0, d=16, sides=(3, 7))
    found, _ = run(kernels, device, case)
    for name in (*NAMES, *BIAS):
        assert found[name].shape == case.tensors[name].shape
        assert not found[name].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["key", "value"])
def test_blocked_keys_contribute_nothing(kernels, device, name, bad):
    case = make_case(n=1, h=1, q=9, d=16, sides=(4, 40))
    case.attend[:, :, 40:45] = False
    case.attend[:, :, 0] = True  # no row is empty
    expected = truth(case)
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40:45] = bad
    assert_matches(kernels, device, case, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_bias_of_blocked_keys_contributes_nothing(kernels, device, bad):
    case = make_case(n=1, h=1, q=9, d=16, sides=(6, 40))
    pixels = case.attend.unflatten(-1, (6, 40))
    pixels[:, :, 4] = False
    pixels[..., 7] = False
    case.attend[:, :, 0] = True  # no row is empty
    expected = truth(case)
    for name, place in zip(BIAS, (4, 7), strict=True):
        case.tensors[name] = case.tensors[name].clone()
        case.tensors[name][..., place] = bad
    found, _ = assert_matches(kernels, device, case, expected)
    assert not found["by_row"][..., 4].any()
    assert not found["by_column"][..., 7].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["key", "value"])
def test_keys_attended_by_some(kernels, device, name, bad):
    """Rows that attend to a bad key are as in SDPA; the others have their values and gradients."""
    case = make_case(n=1, h=1, q=9, d=16, sides=(4, 40))
    case.attend[:, :, 40] = False
    case.attend[:, :, 0] = True
    clean = truth(case)
    case.attend[:, 3, 40] = True
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40, 1] = bad
    found, _ = run(kernels, device, case)
    q, k, v, by_row, by_column = (x.double() for x in case.tensors.values())
    scores = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(-2)
    scores = scores.masked_fill(~case.attend[:, None], -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, scores)
    output = found["output"].cpu()
    assert torch.equal(output[:, :, 3].isnan(), expected[:, :, 3].isnan())
    assert torch.equal(output[:, :, 3].isinf(), expected[:, :, 3].isinf())
    others = [i for i in range(9) if i != 3]
    assert relative_error(output[:, :, others], clean["output"][:, :, others]) < 1e-6
    for result in ("query", *BIAS):
        assert relative_error(found[result][:, :, others], clean[result][:, :, others]) < 1e-4, result


def test_large_gradients_in_half_precision(kernels, device):
    """Of a scaled loss: products of gradients and values beyond float16."""
    case = make_case(n=1, h=1, q=20, d=16, dtype=F16, sides=(3, 35))
    case.grad_output = case.grad_output * 2**13
    case.tensors["value"] = case.tensors["value"] * 16
    found, _ = run(kernels, device, case)
    expected = truth(case)
    for name in ("query", "key"):
        fits = expected[name].abs().max() < 6e4
        assert not fits or relative_error(found[name], expected[name]) < bounds(name, F16), name


@pytest.mark.parametrize("width", [1, 31, 32, 40, 64, 72, 96, 128, 200])
def test_tiles_fit_the_rows(width):
    """No row takes tiles of twice its keys, but where it has fewer than one tile."""
    config = configs.biased_forward(_triton.ARCHITECTURES[90], (3, 6), 2, 200, 32, width)
    tile = config["BLOCK_K"]
    assert -(-width // tile) * tile < max(2 * width, 33)


def test_memory(kernels):
    """Of the backward at SAM-3's size: no tensor has half as many elements as there are pairs."""
    q, side, heads, d = 201, 72, 8, 32
    query, key = (torch.empty(1, rows, heads, d, dtype=BF16, device="meta").transpose(1, 2) for rows in (q, side**2))
    bits, row_any = (torch.empty(*shape, dtype=torch.int32, device="meta") for shape in ((1, 0, 162), (1, 0)))
    by_row = torch.empty(1, q, side, heads, dtype=BF16, device="meta").permute(0, 3, 1, 2)
    given = (query, key, key, bits, row_any.bool(), by_row, by_row)
    output, logsumexp = query.transpose(1, 2), torch.empty(1, heads, q, device="meta")
    with _triton.recording(_triton.ARCHITECTURES[90]) as launches:
        kernels.masked_attention_with_bias(*given, 1.0)
        kernels.masked_attention_with_bias_backward(output, *given, output, logsumexp, 1.0)
    sizes = [v.numel() for launch in launches for v in launch.arguments.values() if isinstance(v, torch.Tensor)]
    assert len(launches) == 5
    assert max(sizes) < heads * q * side**2 / 2
