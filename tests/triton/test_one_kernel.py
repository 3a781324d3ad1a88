"""The attention kernel that predicts its own mask, against the references of both operators."""

import pytest
import torch

from m2f_kernels import masks
from m2f_kernels.ops.attention_mask import reference as mask_reference
from m2f_kernels.ops.masked_attention import reference
from tests.numerics import FORWARD, relative_error, tolerance
from tests.ops.masked_attention_cases import make_case


@pytest.fixture(scope="module")
def kernel():
    from m2f_kernels.ops.masked_attention import triton_one_kernel

    return triton_one_kernel.predicted_masked_attention


def run(kernel, device, c=20, dtype=torch.float32, change=lambda case, features: None, **shape):
    """Both results and both truths. Logits keep away from zero, so that rounding decides no bit; row 0 is empty."""
    case = make_case(dtype=dtype, **shape)
    n, _, q, d = case.tensors["query"].shape
    s = case.tensors["key"].shape[2]
    g = torch.Generator().manual_seed(1)
    embed, features = torch.randn(n, q, c, generator=g), torch.randn(n, c, s, generator=g)
    features[:, 0] = 50 * (torch.rand(n, s, generator=g) < 0.5).float() - 25
    embed[:, :, 0] = 1
    embed[:, 0], embed[:, 0, 1], features[:, 1] = 0, -1, 1
    embed, features = embed.to(dtype), features.to(dtype)
    change(case, features)
    tensors = [x.to(device) for x in case.tensors.values()]
    actual = kernel(*tensors, embed.to(device), features.to(device), d**-0.5)
    packed = mask_reference.predict_attention_mask(embed.double(), features.double())
    assert not packed[1][:, 0].any()
    attend = masks.unpack(*packed, s)
    output, logsumexp = reference.masked_attention(*(x.double() for x in case.tensors.values()), attend, d**-0.5)
    return actual, (output.transpose(1, 2), logsumexp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [{"q": 7, "s": 70}, {"q": 40, "s": 33, "d": 17}, {"n": 1, "h": 3, "q": 1, "s": 130, "d": 64}, {"c": 70, "d": 16}],
    ids=str,
)
def test_equals_both_operators(kernel, device, dtype, shape):
    actual, expected = run(kernel, device, dtype=dtype, **shape)
    bound = tolerance(FORWARD, dtype, dtype)
    # The weights are rounded to the input's dtype before the second product.
    assert relative_error(actual[0], expected[0]) <= (bound if dtype == torch.float32 else 2 * bound)
    assert relative_error(actual[1], expected[1]) <= 1e-5


def test_blocked_values_contribute_nothing(kernel, device):
    """A value that is NaN, of a key that no query but the one with the empty mask attends to."""

    def spoil(case, features):
        features[:, :, 5], features[:, 0, 5], features[:, 1, 5] = 0, -25, 1
        case.tensors["value"] = case.tensors["value"].clone()
        case.tensors["value"][:, :, 5] = float("nan")

    (output, _), (expected, _) = run(kernel, device, change=spoil)
    assert output[:, 0].isnan().all()
    assert expected[:, 0].isnan().all()
    assert relative_error(output[:, 1:], expected[:, 1:]) <= 1e-5


@pytest.mark.parametrize("shape", [{"q": 0}, {"n": 0}], ids=str)
def test_empty(kernel, device, shape):
    case = make_case(**shape)
    n, h, q, d = case.tensors["query"].shape
    s = case.tensors["key"].shape[2]
    tensors = [x.to(device) for x in case.tensors.values()]
    output, logsumexp = kernel(*tensors, torch.zeros(n, q, 4, device=device), torch.zeros(n, 4, s, device=device), 1.0)
    assert output.shape == (n, q, h, d)
    assert logsumexp.shape == (n, h, q)
