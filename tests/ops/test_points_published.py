"""Matching cost and point loss against the functions of `transformers`, with the same points."""

import pytest
import torch
from transformers.models.mask2former import modeling_mask2former as published

import m2f_kernels
from m2f_kernels import FactoredMasks
from tests.numerics import FORWARD, GRADIENT, relative_error

F32, F64 = torch.float32, torch.float64
N, Q, C, T, K = 2, 7, 12, 5, 300


@pytest.fixture(params=["logits", "factored"])
def masks(request, generator):
    """Float32 masks as logits and as factors, N images of Q queries at 24x20."""
    embed = torch.randn(N, Q, C, generator=generator)
    features = torch.randn(N, C, 24, 20, generator=generator)
    factored = FactoredMasks(embed, features)
    return factored if request.param == "factored" else factored.logits()


def leaves(masks):
    return [x.requires_grad_() for x in (masks if isinstance(masks, FactoredMasks) else [masks])]


def double_logits(inputs):
    """The logits of float64 copies of `inputs`, and those copies."""
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    return (FactoredMasks(*inputs).logits() if len(inputs) == 2 else inputs[0]), inputs


def make_targets(generator, dtype=torch.bool):
    return [(torch.rand(T, 40 + 9 * i, 31, generator=generator) > 0.6).to(dtype) for i in range(N)]


def sample(masks, points):
    """`transformers`' way: one channel, points repeated for every mask."""
    repeated = points.expand(masks.shape[0], -1, -1) if points.dim() == 3 else points.repeat(masks.shape[0], 1, 1)
    return published.sample_point(masks[:, None].to(points.dtype), repeated, align_corners=False).squeeze(1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float16], ids=str)
def test_matching_cost(masks, generator, dtype):
    points = torch.rand(N, K, 2, generator=generator)
    targets = make_targets(generator, dtype)
    cross_entropy, dice = m2f_kernels.mask_matching_cost(masks, targets, points)
    logits, _ = double_logits(list(masks) if isinstance(masks, FactoredMasks) else [masks])
    for i in range(N):
        x, t = sample(logits[i], points[i].double()), sample(targets[i], points[i].double())
        assert cross_entropy[i].dtype == dice[i].dtype == F32
        assert relative_error(cross_entropy[i], published.pair_wise_sigmoid_cross_entropy_loss(x, t)) < FORWARD[F32]
        assert relative_error(dice[i], published.pair_wise_dice_loss(x, t)) < FORWARD[F32]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [(5.0, 5.0), (1.0, 0.0), (0.0, 1.0)], ids=["both", "cross_entropy", "dice"])
def test_point_loss(masks, generator, dtype, weights):
    """Losses and, through logits or through embeddings and features, gradients; also of each loss alone."""
    targets = make_targets(generator, dtype)
    matches = [
        (torch.tensor([5, 0, 3]), torch.tensor([1, 4, 0])),
        (torch.tensor([6, 2, 1, 4]), torch.tensor([0, 2, 3, 1])),
    ]
    points = torch.rand(7, K, 2, generator=generator)
    inputs = leaves(masks)
    cross_entropy, dice = m2f_kernels.point_mask_loss(masks, targets, points, matches=matches)
    actual = torch.autograd.grad((weights[0] * cross_entropy + weights[1] * dice).sum() / 7, inputs)

    logits, exact_inputs = double_logits(inputs)
    x = torch.cat([sample(logits[i][matches[i][0]], p.double()) for i, p in enumerate(points.split([3, 4]))])
    t = torch.cat([sample(targets[i][matches[i][1]], p.double()) for i, p in enumerate(points.split([3, 4]))])
    expected_bce = published.sigmoid_cross_entropy_loss(x, t, 7)
    expected_dice = published.dice_loss(x, t, 7)
    assert relative_error(cross_entropy.sum() / 7, expected_bce) < FORWARD[F32]
    assert relative_error(dice.sum() / 7, expected_dice) < FORWARD[F32]
    expected = torch.autograd.grad(weights[0] * expected_bce + weights[1] * expected_dice, exact_inputs)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < GRADIENT[F32]


def test_point_sample(generator):
    pixels = torch.randn(N, C, 24, 20, generator=generator)
    points = torch.rand(N, K, 2, generator=generator) * 1.4 - 0.2
    expected = published.sample_point(pixels.double(), points.double(), align_corners=False)
    assert relative_error(m2f_kernels.point_sample(pixels, points), expected) < FORWARD[F32]
