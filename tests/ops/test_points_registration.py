"""The operators on points as citizens of PyTorch: opcheck, fake kernels, compile, export."""

import pytest
import torch

import m2f_kernels
from m2f_kernels import FactoredMasks

OPS = torch.ops.m2f
BOOL = torch.bool


def arguments(generator, dtype=torch.float32):
    """Schema arguments of every operator, by name."""
    pixels = torch.randn(2, 3, 9, 7, generator=generator).to(dtype)
    points = torch.rand(2, 20, 2, generator=generator)
    logits = torch.randn(5, 9, 7, generator=generator).to(dtype)
    rows, target_rows, seed = torch.tensor([4, 0, 4]), torch.tensor([1, 2, 0]), torch.tensor([9])
    targets = [torch.rand(2, 12, 10, generator=generator) > 0.5, torch.rand(1, 5, 6, generator=generator)]
    # A map of ids, and run lengths.
    mapped = torch.randint(0, 3, (12, 10), generator=generator).expand(2, -1, -1), torch.tensor([2, 0])
    runs = m2f_kernels.RunLengths.from_masks(torch.rand(1, 5, 6, generator=generator) > 0.5).runs
    own = torch.rand(3, 20, 2, generator=generator)
    saved = (torch.rand(3, 20, generator=generator), torch.rand(3, 20, generator=generator))
    grads = (torch.rand(3, generator=generator), torch.rand(3, generator=generator))
    embed, features = torch.randn(2, 4, 3, generator=generator).to(dtype), pixels
    classes, labels, weights = torch.randn(2, 6, 4, generator=generator), torch.tensor([[3] * 6] * 2), torch.ones(4)
    factored = (embed, features, torch.tensor([3, 1, 4]), [2, 1], targets, target_rows)
    return {
        "point_sample": [pixels, points, False],
        "sample_targets": [*mapped, points[0]],
        "point_sample_backward": [torch.randn(2, 3, 20, generator=generator).to(dtype), points, 9, 7],
        "uncertain_points": [logits, rows, seed, 3, 60, 15, 5],
        "mask_matching_cost": [saved[0], saved[1]],
        "point_mask_loss": [logits, rows, targets, target_rows, own],
        "point_mask_loss, marked": [logits, rows, [*mapped, torch.zeros(1, 5, 6).bool(), runs], target_rows, own],
        "point_mask_loss_backward": [*grads, rows, own, *saved, 5, 9, 7],
        "factored_point_mask_loss": [*factored, own, None, 0, 0, 0],
        "factored_point_mask_loss_backward": [*grads, *factored[:4], own, *saved],
        "matching_costs": [classes[:, None], [rows], [saved[0][:2, :3]] * 6, [saved[1][:2, :3]] * 6, 2.0, 5.0, 5.0],
        "criterion_losses": [classes, labels, weights, *grads, torch.tensor([1, 0, 1])],
        "criterion_losses_backward": [*[weights[:2]] * 3, classes, labels, weights, weights[:2], torch.tensor([1, 0])],
    }


NAMES = list(arguments(torch.Generator()))


def operator(name):
    return getattr(OPS, name.split(",")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(generator, name, dtype):
    given = arguments(generator, dtype)[name]
    torch.library.opcheck(operator(name).default, given)
    if "backward" not in name and name not in (
        *("uncertain_points", "mask_matching_cost", "sample_targets", "matching_costs"),
    ):
        count = 2 if "factored" in name else 1
        leaves = [x.requires_grad_() for x in given[:count]]
        torch.library.opcheck(operator(name).default, [*leaves, *given[count:]])


def test_opcheck_with_a_seed(generator):
    given = arguments(generator)["factored_point_mask_loss"]
    torch.library.opcheck(OPS.factored_point_mask_loss.default, [*given[:6], None, torch.tensor([5]), 60, 15, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fake_kernels_agree_with_real_ones(generator, name, dtype):
    given = arguments(generator, dtype)[name]
    real = operator(name)(*given)
    with torch._subclasses.FakeTensorMode() as mode:

        def fake(x):
            return [fake(y) for y in x] if isinstance(x, list) else mode.from_tensor(x) if torch.is_tensor(x) else x

        found = operator(name)(*map(fake, given))
    for a, b in zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (real, found)), strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def call(embed, features, points, own, targets):
    masks = FactoredMasks(embed, features)
    samples = m2f_kernels.point_sample(masks, points)
    cost = m2f_kernels.mask_matching_cost(masks, targets, points)
    cross_entropy, dice = m2f_kernels.point_mask_loss(masks, targets, own)
    planes = m2f_kernels.point_mask_loss(masks.logits(), targets, own)
    return samples.sum() + cross_entropy.sum() + dice.sum() + planes[0].sum(), cost


def inputs(generator, q=4, k=20):
    embed = torch.randn(2, q, 3, generator=generator, requires_grad=True)
    features = torch.randn(2, 3, 9, 7, generator=generator, requires_grad=True)
    targets = torch.rand(2, q, 12, 10, generator=generator) > 0.5
    points = torch.rand(2, k, 2, generator=generator)
    return embed, features, points, torch.rand(2 * q, k, 2, generator=generator), targets


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(generator, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for q, k in ((4, 20), (6, 33)):
        given = inputs(generator, q, k)
        (expected, cost), (actual, other) = call(*given), compiled(*given)
        assert torch.allclose(actual, expected)
        assert all(torch.allclose(a, b) for a, b in zip(cost, other, strict=True))
        for a, b in zip(torch.autograd.grad(actual, given[:2]), torch.autograd.grad(expected, given[:2]), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_export(generator):
    class Module(torch.nn.Module):
        def forward(self, *given):
            return call(*given)

    given = [x.detach() for x in inputs(generator)]
    program = torch.export.export(Module(), tuple(given))
    assert torch.allclose(program.module()(*given)[0], call(*given)[0])


def test_reference_backend(generator):
    given = inputs(generator)
    expected, _ = call(*given)
    with m2f_kernels.use_backend("reference"):
        actual, _ = call(*given)
        assert m2f_kernels.explain("point_mask_loss", given[0]).backend == "reference"
    assert torch.allclose(actual, expected)


def test_uncertain_points_compile(generator):
    torch._dynamo.reset()
    logits = torch.randn(3, 9, 7, generator=generator)
    compiled = torch.compile(lambda x: m2f_kernels.uncertain_points(x, 30), fullgraph=True, backend="aot_eager")
    assert compiled(logits).shape == (3, 30, 2)


def _points_and_losses():
    """The operators that a training step calls, with and without queries, by name: a function and its arguments."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size):
        return torch.rand(*size, generator=generator)

    logits, factors = rand(2, 3, 6, 5) - 0.5, (rand(2, 3, 4) - 0.5, rand(2, 4, 6, 5) - 0.5)
    targets, points = (rand(3, 9, 8) > 0.5, rand(2, 9, 8) > 0.5), rand(3, 7, 2)
    indices = torch.tensor([0, 2]), torch.tensor([2, 1]), torch.tensor([1]), torch.tensor([0])

    def loss(masks, t0, t1, points, a, b, c, d):
        return m2f_kernels.point_mask_loss(masks, [t0, t1], points, matches=[(a, b), (c, d)])

    def draw(masks, *queries):
        return m2f_kernels.uncertain_points(masks, 7, queries=list(queries) or None)

    def factored(function):
        return lambda embed, features, *rest: function(m2f_kernels.FactoredMasks(embed, features), *rest)

    return {
        "loss": (loss, (logits, *targets, points, *indices)),
        "loss of factors": (factored(loss), (*factors, *targets, points, *indices)),
        "points": (draw, (logits,)),
        "points of some": (draw, (logits, indices[0], indices[2])),
        "points of factors": (factored(draw), factors),
    }


@pytest.mark.parametrize("name", list(_points_and_losses()))
def test_public_functions_compile_and_export(name):
    function, arguments = _points_and_losses()[name]

    class Module(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    torch.manual_seed(3)
    expected = function(*arguments)
    torch._dynamo.reset()
    for run in (
        torch.compile(function, fullgraph=True, backend="aot_eager"),
        torch.export.export(Module(), arguments).module(),
    ):
        torch.manual_seed(3)
        torch.testing.assert_close(run(*arguments), expected)
