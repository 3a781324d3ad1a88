"""Tensors beyond 2^31 elements (forward) and beyond 2^31 bytes (gradients): what lies at their end is read and written.

Everything else in them is zero, and the truth is the same operator on the end alone. Up to 9 GiB each."""

import pytest
import torch

import m2f_kernels

pytestmark = pytest.mark.slow
BF16 = torch.bfloat16
#: Three planes of this side have more than 2^31 pixels; the last begins before them and ends after.
SIDE = 26800
#: Three of this side have more than 2^31 bytes in float32.
GRADIENT_SIDE = 13500


def planes(side, dtype, count=3):
    """Zeros but for the last rows of the last plane, and points in those rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.zeros(1, count, side, side, dtype=dtype)
    assert x.numel() * 4 > 2**31
    end = torch.randn(16, side, generator=g)
    x[0, -1, -16:] = (end > 0) if not dtype.is_floating_point else end.to(dtype)
    # A pixel's tenths: float32 coordinates place them there at this size to a few hundredths.
    points = torch.rand(1, 50, 2, generator=g, dtype=torch.float64)
    points[..., 1] = 1 - (points[..., 1] * 12 + 2) / side
    return x, points.float()


def at_the_end(points, side, rows=16):
    """The same points in an image of the last rows alone; in float64, as the subtraction cancels."""
    x, y = points.double().unbind(-1)
    return torch.stack([x, (y * side - (side - rows)) / rows], -1)


def close(actual, expected, bound=2e-2):
    assert float(expected.double().norm()) > 0
    assert float((actual.double() - expected.double()).norm() / expected.double().norm()) < bound


@pytest.mark.parametrize("dtype", [torch.uint8, BF16], ids=str)
def test_point_sample(dtype):
    x, points = planes(SIDE, dtype)
    assert x.numel() > 2**31
    end = x[:, -1:, -16:].double()
    expected = m2f_kernels.point_sample(end, at_the_end(points, SIDE))
    actual = m2f_kernels.point_sample(x, points)
    close(actual[:, -1:], expected)
    assert bool((actual[:, :-1] == 0).all())


def test_point_sample_gradient():
    x, points = planes(GRADIENT_SIDE, BF16)
    (grad,) = torch.autograd.grad(m2f_kernels.point_sample(x.requires_grad_(), points).sum(), x)
    end = x[:, -1:, -16:].detach().double().requires_grad_()
    sampled = m2f_kernels.point_sample(end, at_the_end(points, GRADIENT_SIDE)).sum()
    (expected,) = torch.autograd.grad(sampled, end)
    close(grad[:, -1:, -16:], expected)
    assert bool((grad[:, :, :-16] == 0).all())


def test_uncertain_points():
    """Everywhere else the masks are zero, which is most uncertain: only the number of the points is told."""
    x, _ = planes(SIDE, BF16)
    x.fill_(1)
    x[0, -1, SIDE // 2 :] = 0.5
    points = m2f_kernels.uncertain_points(x, 100, queries=[torch.tensor([2])], importance_sample_ratio=1.0)
    assert bool((points[..., 1] >= 0.5).all())


def test_mask_matching_cost_and_loss():
    x, points = planes(SIDE, BF16)
    target = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    target[0, -16:] = x[0, -1, -16:] > 0
    end, end_target = x[:, -1:, -16:].double(), target[:, -16:]
    end_points = at_the_end(points, SIDE)
    costs = m2f_kernels.mask_matching_cost(x, [target], points)
    for actual, expected in zip(costs, m2f_kernels.mask_matching_cost(end, [end_target], end_points), strict=True):
        close(actual[0][-1:], expected[0])
    matches = [(torch.tensor([2]), torch.tensor([0]))]
    losses = m2f_kernels.point_mask_loss(x, [target], points, matches=matches)
    found = m2f_kernels.point_mask_loss(end, [end_target], end_points)
    for actual, expected in zip(losses, found, strict=True):
        close(actual, expected)


def test_point_mask_loss_gradient():
    x, points = planes(GRADIENT_SIDE, BF16)
    target = torch.zeros(1, GRADIENT_SIDE, GRADIENT_SIDE, dtype=torch.bool)
    matches = [(torch.tensor([2]), torch.tensor([0]))]
    cross_entropy, dice = m2f_kernels.point_mask_loss(x.requires_grad_(), [target], points, matches=matches)
    (grad,) = torch.autograd.grad((cross_entropy + dice).sum(), x)
    end = x[:, -1:, -16:].detach().double().requires_grad_()
    cross_entropy, dice = m2f_kernels.point_mask_loss(end, [target[:, -16:]], at_the_end(points, GRADIENT_SIDE))
    (expected,) = torch.autograd.grad((cross_entropy + dice).sum(), end)
    close(grad[:, -1:, -16:], expected)
    assert bool((grad[:, :, :-16] == 0).all())


def test_pack_attention_mask():
    s = 2**30 + 77
    mask = torch.zeros(1, 2, s, dtype=torch.bool)
    mask[0, 1, -100:] = torch.rand(100) > 0.5
    packed = m2f_kernels.pack_attention_mask(mask)
    words = torch.stack([(packed.bits[0, 1, -4:] >> i) & 1 for i in range(32)], -1).flatten()
    assert torch.equal(words[: s % 32 + 96].bool()[-100:], mask[0, 1, -100:])
    assert packed.row_any.tolist() == [[False, True]]
    assert int(packed.bits[0, :, :-4].abs().max()) == 0


def test_predict_attention_mask():
    c, s = 64, 2**25 + 64
    g = torch.Generator().manual_seed(0)
    features = torch.full((1, c, s), -1, dtype=BF16)
    assert features.numel() > 2**31
    features[..., -64:] = torch.randn(1, c, 64, generator=g).to(BF16)
    embed = torch.rand(1, 2, c, generator=g).to(BF16)
    packed = m2f_kernels.predict_attention_mask(embed, features)
    end = m2f_kernels.predict_attention_mask(embed, features[..., -64:])
    assert torch.equal(packed.bits[..., -2:], end.bits)
    assert not bool(packed.bits[..., :-2].any())


def test_resize_mask_features():
    side = 2**12
    features = torch.zeros(1, 130, side, side, dtype=BF16)
    assert features.numel() > 2**31
    features[0, -1] = torch.randn(side, side).to(BF16)
    (level,) = m2f_kernels.resize_mask_features(features, [(64, 64)])
    (end,) = m2f_kernels.resize_mask_features(features[:, -1:], [(64, 64)])
    assert torch.equal(level[:, -1:], end)
    assert not bool(level[:, :-1].any())


@pytest.mark.parametrize("backward", [False, True])
def test_masked_attention(backward):
    heads, d, end = 8, 32, 128
    s = (2**22 if backward else 2**23) + end
    g = torch.Generator().manual_seed(0)
    key = torch.zeros(1, heads, s, d, dtype=BF16)  # of values too
    assert key.numel() * (2 if backward else 1) > 2**31
    key[:, :, -end:] = torch.randn(1, heads, end, d, generator=g).to(BF16)
    query = torch.randn(1, heads, 2, d, generator=g).to(BF16)
    mask = torch.zeros(1, 2, s, dtype=torch.bool)
    mask[..., -end:] = torch.rand(1, 2, end, generator=g) > 0.5
    if not backward:
        expected = m2f_kernels.masked_attention(query, key[:, :, -end:], key[:, :, -end:], mask[..., -end:])
        assert torch.equal(m2f_kernels.masked_attention(query, key, key, mask), expected)
        return
    key.requires_grad_()
    (grad,) = torch.autograd.grad(m2f_kernels.masked_attention(query, key.detach(), key, mask).sum(), key)
    tail = key[:, :, -end:].detach().requires_grad_()
    out = m2f_kernels.masked_attention(query, tail.detach(), tail, mask[..., -end:])
    (expected,) = torch.autograd.grad(out.sum(), tail)
    assert torch.equal(grad[:, :, -end:], expected)
    assert not bool(grad[:, :, :-end].any())


def test_ms_deform_attn():
    """A value of more than 2^31 elements; a second level lies at its end."""
    side, heads, d = 2900, 8, 32
    g = torch.Generator().manual_seed(0)
    value = torch.zeros(1, side * side + 30, heads, d, dtype=BF16)
    assert value.numel() > 2**31
    value[:, -30:] = torch.randn(1, 30, heads, d, generator=g).to(BF16)
    locations = torch.rand(1, 20, heads, 2, 4, 2, generator=g)
    weights = torch.rand(1, 20, heads, 2, 4, generator=g)
    out = m2f_kernels.ms_deform_attn(value, [(side, side), (5, 6)], None, locations, weights)
    small = m2f_kernels.ms_deform_attn(value[:, -30:], [(5, 6)], None, locations[:, :, :, 1:], weights[:, :, :, 1:])
    assert torch.equal(out, small)


def test_ms_deform_attn_gradient():
    """A gradient of more than 2^31 bytes."""
    side, heads, d = 1470, 8, 32
    g = torch.Generator().manual_seed(0)
    value = torch.zeros(1, side * side + 30, heads, d).requires_grad_()
    assert value.numel() * 4 > 2**31
    locations = torch.rand(1, 20, heads, 2, 4, 2, generator=g)
    weights = torch.rand(1, 20, heads, 2, 4, generator=g)
    weights[:, :, :, 0] = 0
    out = m2f_kernels.ms_deform_attn(value, [(side, side), (5, 6)], None, locations, weights)
    (grad,) = torch.autograd.grad(out.sum(), value)
    small = value[:, -30:].detach().requires_grad_()
    out = m2f_kernels.ms_deform_attn(small, [(5, 6)], None, locations[:, :, :, 1:], weights[:, :, :, 1:])
    (expected,) = torch.autograd.grad(out.sum(), small)
    assert torch.allclose(grad[:, -30:], expected, rtol=1e-5)
    assert not bool(grad[:, :-30].any())
