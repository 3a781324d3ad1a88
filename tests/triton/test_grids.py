"""Sizes beyond what one grid holds, 65535 programs along y and z, and numbers beyond what one float does.

Grids are counted on the meta device; results are computed with a lower limit."""

import pytest
import torch

from m2f_kernels import _triton
from m2f_kernels.ops.attention_mask import triton as attention_mask
from m2f_kernels.ops.masked_attention import triton as masked_attention
from m2f_kernels.ops.masked_attention import triton_bias
from m2f_kernels.ops.points import reference
from m2f_kernels.ops.points import triton_loss as point_loss
from m2f_kernels.ops.points import triton_sampling as point_sample

MODULES = (_triton, attention_mask, masked_attention, triton_bias, point_loss, point_sample)
MANY = 70_000


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(n, q=3, s=40, heads=1, d=8):
    bits, row_any = meta(n, q, (s + 31) // 32, dtype=torch.int32), meta(n, q, dtype=torch.bool)
    return meta(n, heads, q, d), meta(n, heads, s, d), meta(n, heads, s, d), bits, row_any


def attention_backward(n):
    query, key, value, bits, row_any = attention(n)
    grad = meta(n, query.shape[2], 1, 8)
    return grad, query, key, value, bits, row_any, grad, meta(n, 1, query.shape[2]), 0.5


def biased(n):
    query, *rest = attention(n)
    return query, *rest, meta(n, 1, 3, 5), meta(n, 1, 3, 8)


def biased_backward(n):
    return meta(n, 3, 1, 8), *biased(n), meta(n, 3, 1, 8), meta(n, 1, 3), 0.5


def loss(m, k, size=4):
    rows, targets = meta(m, dtype=torch.int64), [meta(m, size, size)]
    return meta(m, size, size), rows, targets, rows, meta(m, k, 2)


def loss_backward(m, k, size=4):
    rows, losses = meta(m, dtype=torch.int64), meta(m)
    return losses, losses, rows, meta(m, k, 2), meta(m, k), meta(m, k), m, size, size


CALLS = {
    "attention, batch": lambda: masked_attention.masked_attention(*attention(MANY), 0.5),
    "attention backward, batch": lambda: masked_attention.masked_attention_backward(*attention_backward(MANY)),
    "attention with a bias, batch": lambda: masked_attention.masked_attention_with_bias(*biased(MANY), 0.5),
    "attention with a bias backward, batch": lambda: masked_attention.masked_attention_with_bias_backward(
        *biased_backward(MANY)
    ),
    "pack, 70 M keys": lambda: attention_mask.pack_attention_mask(meta(1, 1, MANY * 1024)),
    "predict, batch": lambda: attention_mask.predict_attention_mask(meta(MANY, 1, 16), meta(MANY, 16, 40)),
    "predict, queries": lambda: attention_mask.predict_attention_mask(meta(1, MANY * 128, 16), meta(1, 16, 40)),
    "resize, 70 M pixels": lambda: attention_mask.resize_mask_features(meta(1, 1, 8, 9), [MANY, 1024]),
    "resize, a row of 70 M pixels": lambda: attention_mask.resize_mask_features(
        meta(1, 1, 2, MANY * 1024), [1, MANY * 512]
    ),
    "sample, batch": lambda: point_sample.point_sample(meta(MANY, 2, 4, 4), meta(MANY, 5, 2), False),
    "sample, channels": lambda: point_sample.point_sample(meta(1, MANY * 8, 4, 4), meta(1, 5, 2), False),
    "sample backward, 17 M points": lambda: point_sample.point_sample_backward(
        meta(1, 1, MANY * 256), meta(1, MANY * 256, 2), 4, 4
    ),
    "sample backward, 70 M pixels": lambda: point_sample.point_sample_backward(
        meta(1, 1, 5), meta(1, 5, 2), MANY, 1024
    ),
    "sorted backward, batch": lambda: point_sample.point_sample_backward(meta(MANY, 64, 5), meta(MANY, 5, 2), 4, 4),
    "sorted backward, channels": lambda: point_sample.point_sample_backward(
        meta(1, MANY * 8, 5), meta(1, 5, 2), 4, 4
    ),
    "uncertain points, 36 M candidates": lambda: point_sample.uncertain_points(
        meta(1, 4, 4), meta(1, dtype=torch.int64), meta(1, dtype=torch.int64), 0, MANY * 512, 1, MANY * 256
    ),
    "matching cost, targets": lambda: point_loss.mask_matching_cost(meta(1, 4), meta(MANY * 32, 4)),
    "point loss, 17 M points": lambda: point_loss.point_mask_loss(*loss(1, MANY * 256)),
    "point loss backward, 17 M points": lambda: point_loss.point_mask_loss_backward(*loss_backward(1, MANY * 256)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_grids_are_within_the_limits(name):
    with _triton.recording(_triton.ARCHITECTURES[90]) as launches:
        CALLS[name]()
    assert launches
    for launch in launches:
        assert launch.grid[0] < 2**31, launch.kernel.__name__
        assert all(0 < count <= 65535 for count in launch.grid[1:]), (launch.kernel.__name__, launch.grid)


def test_a_grid_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match=r"_pack_kernel: expected at most .* programs; got"):
        _triton.launch(attention_mask._pack_kernel, (1, 65536))


@pytest.fixture
def low_limit(monkeypatch):
    """At most two programs along y and z, so that small tensors are as large as a grid can be."""

    def lower():
        for module in MODULES:
            monkeypatch.setattr(module, "MAX_GRID", 2, raising=module is not masked_attention)

    return lower


def equal(function, low_limit):
    expected = function()
    low_limit()
    actual = function()
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_attention_of_a_large_batch(device, generator, low_limit):
    n, heads, q, s, d = 3, 1, 3, 40, 8

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    query, key, value, grad = (
        normal(n, heads, q, d),
        normal(n, heads, s, d),
        normal(n, heads, s, d),
        normal(n, q, heads, d),
    )
    bits = torch.randint(-(2**31), 2**31 - 1, (n, q, 2), generator=generator, dtype=torch.int32)
    bits[..., 1] &= 0xFF
    bits, row_any = bits.to(device), (bits != 0).any(-1).to(device)

    def run():
        output, logsumexp = masked_attention.masked_attention(query, key, value, bits, row_any, 0.3)
        found = masked_attention.masked_attention_backward(
            grad, query, key, value, bits, row_any, output, logsumexp, 0.3
        )
        return output, logsumexp, *found

    equal(run, low_limit)


def test_biased_attention_of_a_large_batch(device, generator, low_limit):
    shapes = ((3, 2, 1, 8), (3, 1, 2, 8), (3, 1, 20, 8), (3, 1, 20, 8), (3, 1, 2, 4), (3, 1, 2, 5))
    grad, query, key, value, *bias = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    bits = torch.randint(0, 2**20, (3, 2, 1), generator=generator, dtype=torch.int32).to(device)
    given = (query, key, value, bits, (bits != 0).any(-1), *bias)

    def run():
        output, logsumexp = masked_attention.masked_attention_with_bias(*given, 0.3)
        found = masked_attention.masked_attention_with_bias_backward(grad, *given, output, logsumexp, 0.3)
        return output, logsumexp, *found

    equal(run, low_limit)


def test_masks_of_large_batches_and_many_pixels(device, generator, low_limit):
    mask = torch.randn(3, 1, 3000, generator=generator).to(device)
    embed, features = torch.randn(3, 3, 16, generator=generator), torch.randn(3, 16, 40, generator=generator)
    embed, features = embed.to(device), features.to(device)
    maps = torch.randn(1, 2, 16, 24, generator=generator).to(device)

    def run():
        return (
            *attention_mask.pack_attention_mask(mask),
            *attention_mask.predict_attention_mask(embed, features),
            attention_mask.predict_attention_mask_with_flags(
                embed, features, flags := torch.zeros_like(embed[..., 0]).bool()
            ),
            flags,
            attention_mask.resize_mask_features(maps, [30, 60, 8, 12]),
        )

    equal(run, low_limit)


def test_points_of_large_batches_and_many_points(device, generator, low_limit):
    n, k = 3, 800
    maps = torch.randn(n, 18, 6, 7, generator=generator).to(device)
    points = (torch.rand(n, k, 2, generator=generator) * 1.2 - 0.1).to(device)
    grad = torch.randn(n, 1, k, generator=generator).to(device)
    wide = torch.randn(n, 64, 60, generator=generator).to(device)
    planes = torch.randn(n, 16, 16, generator=generator).to(device)
    rows, seed = torch.arange(n, device=device), torch.tensor([7], device=device)
    targets = [torch.rand(n, 9, 9, generator=generator).to(device)]
    labels = torch.rand(40, 256, generator=generator).to(device)

    def run():
        losses = point_loss.point_mask_loss(planes, rows, targets, rows, points)
        weights = torch.ones(n, device=device)
        return (
            point_sample.point_sample(maps, points[:, :100], False),
            point_sample.point_sample_backward(grad, points, 40, 60),
            point_sample.point_sample_backward(wide, points[:, :60], 2, 3),
            point_sample.uncertain_points(planes, rows, seed, 0, 1500, 100, 700),
            *losses,
            point_loss.point_mask_loss_backward(weights, weights, rows, points, *losses[2:], n, 16, 16),
            *point_loss.mask_matching_cost(planes.flatten(1), labels),
        )

    equal(run, low_limit)


# ---------------------------------------------------------------- gradients of any magnitude
@pytest.mark.parametrize("magnitude", [1e-36, 1e-30, 3e-27, 1.0, 1e30])
def test_gradients_of_any_magnitude(device, generator, magnitude):
    """Fixed-point numbers below the largest term, where its scale alone is beyond float32 too."""
    points = torch.rand(1, 50, 2, generator=generator)
    grad = torch.randn(1, 3, 50, generator=generator)
    pixels = torch.zeros(1, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(reference.point_sample(pixels, points.double()), pixels, grad.double())
    actual = point_sample.point_sample_backward((grad.double() * magnitude).float().to(device), points.to(device), 6, 7)
    torch.testing.assert_close(actual.cpu().double() / magnitude, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("magnitude", [1e-33, 1.0])
def test_point_losses_of_any_magnitude(device, generator, magnitude):
    points = torch.rand(2, 50, 2, generator=generator).to(device)
    probability, labels = (torch.rand(2, 50, generator=generator).to(device) for _ in range(2))
    rows = torch.arange(2, device=device)

    def run(weight):
        weights = torch.full((2,), weight, device=device)
        return point_loss.point_mask_loss_backward(weights, weights, rows, points, probability, labels, 2, 6, 7)

    torch.testing.assert_close(run(magnitude).double() / magnitude, run(0.25).double() * 4, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_stay_so(device, value):
    """In the plane where they are; zero stays zero in the others."""
    grad = torch.zeros(1, 2, 3)
    grad[0, 1, 1] = value
    found = point_sample.point_sample_backward(grad.to(device), torch.full((1, 3, 2), 0.5, device=device), 4, 4)
    assert (found[0, 0] == 0).all()
    assert found[0, 1].isnan().all()


@pytest.mark.parametrize("rows", [5, 2], ids=["masked", "masked and open"])
def test_float16_attention_under_loss_scaling(device, generator, rows):
    """Gradients of 2^16 times the loss: products with the values are beyond float16, the results are not."""
    n, heads, q, s, d = 1, 2, 5, 64, 32
    query, key = (torch.randn(n, heads, length, d, generator=generator) * 0.1 for length in (q, s))
    value = torch.randn(n, heads, s, d, generator=generator) * 40
    grad = torch.randn(n, q, heads, d, generator=generator) * 12000
    bits, row_any = torch.full((n, rows, 2), -1, dtype=torch.int32), torch.ones(n, rows, dtype=torch.bool)

    def run(dtype):
        x = [t.to(device, dtype) for t in (query, key, value)]
        mask = bits.to(device), row_any.to(device)
        output, logsumexp = masked_attention.masked_attention(*x, *mask, 0.01)
        return masked_attention.masked_attention_backward(grad.to(device, dtype), *x, *mask, output, logsumexp, 0.01)

    largest = (grad.transpose(1, 2) @ value.transpose(-1, -2)).abs().max() / s
    assert largest > 65504, "the case does not reach float16's limit"
    for name, x, expected in zip(("query", "key", "value"), run(torch.float16), run(torch.float32), strict=True):
        assert x.isfinite().all(), name
        error = torch.linalg.vector_norm(x.float() - expected) / torch.linalg.vector_norm(expected)
        assert error < 5e-3, (name, float(error))
