"""The Triton kernels of masked attention where only the first queries have a mask, against the reference in float64."""

import pytest
import torch

from m2f_kernels import _triton, masks
from tests.numerics import relative_error
from tests.ops.masked_attention_cases import NAMES, make_case, row_rule, sdpa_bound, truth
from tests.triton.test_masked_attention import bounds

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def kernels():
    from m2f_kernels.ops.masked_attention import triton

    return triton


def part(masked, **sizes):
    case = make_case(**sizes)
    case.attend[:, masked:] = True
    return case


def run(kernels, device, case, masked):
    tensors = [x.to(device) for x in case.tensors.values()]
    bits, row_any = (x.to(device) for x in masks.pack(case.attend[:, :masked]))
    scale = tensors[0].shape[-1] ** -0.5
    output, logsumexp = kernels.masked_attention(*tensors, bits, row_any, scale)
    grad = case.grad_output.to(device).transpose(1, 2)
    gradients = kernels.masked_attention_backward(grad, *tensors, bits, row_any, output, logsumexp, scale)
    found = {"output": output.transpose(1, 2), **dict(zip(NAMES, (g.transpose(1, 2) for g in gradients), strict=True))}
    return found, logsumexp


def assert_matches(kernels, device, case, masked):
    dtype = case.tensors["query"].dtype
    expected = truth(case)
    found, logsumexp = run(kernels, device, case, masked)
    for name, x in found.items():
        assert x.dtype == dtype
        error, bound = relative_error(x, expected[name]), bounds(name, dtype)
        if error > bound and x.is_cuda:
            bound = max(bound, sdpa_bound(case.to(device), name, expected))
        assert error <= bound, f"{name}: relative error {error:.3g} > {bound:.3g}"
    if dtype == F32:
        q, k, _ = (x.double() for x in case.tensors.values())
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(
            ~row_rule(case.attend)[:, None], -torch.inf
        )
        assert relative_error(logsumexp, scores.logsumexp(-1)) < 1e-6


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("d", [16, 40])
def test_channels(kernels, device, dtype, d):
    """Several blocks of queries and tiles of keys, the last of each with a few."""
    assert_matches(kernels, device, part(9, n=1, h=1, q=150, s=80, d=d, dtype=dtype), 9)


@pytest.mark.parametrize(("masked", "q", "s"), [(0, 40, 50), (39, 40, 50), (1, 33, 32), (5, 6, 1)])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_sizes(kernels, device, masked, q, s, dtype):
    assert_matches(kernels, device, part(masked, n=2, h=1, q=q, s=s, d=16, density=0.3, dtype=dtype), masked)


def test_layouts(kernels, device):
    """Heads as [N, H, *, D], views with gaps, a gradient of stride 0."""
    case = part(3, n=1, h=2, q=40, s=40, d=16, interleaved=False)
    for name in NAMES:
        case.tensors[name] = torch.stack([case.tensors[name]] * 2, -2)[..., 1, :]
    case.grad_output = case.grad_output[..., :1, :1].expand_as(case.grad_output)
    assert_matches(kernels, device, case, 3)


def test_the_same_bits_each_time(kernels, device):
    case = part(9, n=1, h=1, q=100, s=100, d=16)
    first, second = (run(kernels, device, case, 9)[0] for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_keys_that_are_not_finite(kernels, device):
    """They show in the queries without a mask, and in no masked query that they are blocked for."""
    case = part(9, n=1, h=1, q=50, s=100, d=16)
    case.attend[:, :9, 40] = False
    case.attend[:, :9, 0] = True
    clean = truth(case)
    case.tensors["value"] = case.tensors["value"].clone()
    case.tensors["value"][:, :, 40] = torch.nan
    output = run(kernels, device, case, 9)[0]["output"]
    assert relative_error(output[:, :, :9], clean["output"][:, :, :9]) < 1e-5
    assert output[:, :, 9:].isnan().all()


def test_memory_does_not_grow_with_pairs(kernels):
    """No tensor of the backward at 1280 x 1280 has as many elements as there are pairs of tokens, for even one head."""
    tokens, heads, d, masked = 6605, 16, 64, 200
    x = torch.empty(1, tokens, heads, d, dtype=BF16, device="meta").transpose(1, 2)
    bits = torch.empty(1, masked, (tokens + 31) // 32, dtype=torch.int32, device="meta")
    row_any = torch.empty(1, masked, dtype=torch.bool, device="meta")
    output, logsumexp = x.transpose(1, 2), torch.empty(1, heads, tokens, device="meta")
    with _triton.recording(_triton.ARCHITECTURES[90]) as launches:
        kernels.masked_attention(x, x, x, bits, row_any, 1.0)
        kernels.masked_attention_backward(output, x, x, x, bits, row_any, output, logsumexp, 1.0)
    sizes = [v.numel() for launch in launches for v in launch.arguments.values() if isinstance(v, torch.Tensor)]
    assert len(launches) >= 6
    assert max(sizes) < tokens**2
