"""Matching cost and point loss against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m2f_kernels
from m2f_kernels import FactoredMasks
from m2f_kernels.ops.points import masks as mask_rows
from m2f_kernels.ops.points import reference, uncertain_point_mask_loss
from m2f_kernels.ops.points import reference as sampling
from tests.numerics import FORWARD, GRADIENT, relative_error, rounding
from tests.watching import Largest

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LABELS = [torch.bool, torch.uint8, F32, F16, BF16, F64]


@pytest.fixture
def small_chunks(monkeypatch):
    """Factored masks in many chunks."""
    monkeypatch.setattr(mask_rows, "CHUNK_BYTES", 4 * 1000)


@pytest.mark.parametrize("forced", ["auto", "reference"])
@pytest.mark.parametrize("factored", [False, True])
def test_bytes_are_masks(implementation, generator, forced, factored):
    """Of uint8 any value but 0 is foreground, in every operator that takes targets: the bits of the bool masks."""
    masks = FactoredMasks(torch.randn(2, 3, 6, generator=generator), torch.randn(2, 6, 7, 9, generator=generator))
    masks = FactoredMasks(*(x.to(implementation) for x in masks)) if factored else masks.logits().to(implementation)
    targets = (torch.rand(2, 3, 21, 14, generator=generator) > 0.5).to(implementation)
    values = torch.randint(1, 256, targets.shape, generator=generator, dtype=torch.uint8).to(implementation)
    values[0], values[1, 0] = 255, 1
    points = torch.rand(2, 60, 2, generator=generator).to(implementation)
    own = torch.rand(6, 60, 2, generator=generator).to(implementation)
    with m2f_kernels.use_backend(forced):
        results = []
        for given in (targets, targets * values):
            seed = torch.Generator(implementation).manual_seed(3)
            results.append(
                [
                    m2f_kernels.point_sample(given, points),
                    *m2f_kernels.mask_matching_cost(masks, given, points),
                    *m2f_kernels.point_mask_loss(masks, given, own),
                    *uncertain_point_mask_loss(masks, given, num_points=60, generator=seed),
                ]
            )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------- matching cost
@pytest.mark.parametrize("k", [1, 15, 16, 100, 1024, 2500])
@pytest.mark.parametrize(("q", "t"), [(1, 1), (3, 5), (8, 4), (17, 30), (100, 0), (0, 3), (13, 2)])
@pytest.mark.parametrize("scale", [0.1, 5.0, 60.0])
def test_cost_of_samples(implementation, generator, q, t, k, scale):
    """Odd numbers of queries, targets and points; logits that saturate."""
    logits = torch.randn(q, k, generator=generator) * scale
    labels = torch.rand(t, k, generator=generator)
    expected = reference.mask_matching_cost(logits.double(), labels.double())
    actual = torch.ops.m2f.mask_matching_cost(logits.to(implementation), labels.to(implementation))
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < FORWARD[F32]


def test_cost_of_confident_masks(implementation):
    """Softplus far below 1 keeps its relative accuracy: a mask that is right has a cost, not zero."""
    x = torch.linspace(-80, 80, 161)
    expected, _ = reference.mask_matching_cost(x[:, None].double(), (x[:, None] > 0).double()[:1])
    actual, _ = torch.ops.m2f.mask_matching_cost(x[:, None].to(implementation), torch.zeros(1, 1).to(implementation))
    assert torch.allclose(actual.cpu().double(), expected, rtol=FORWARD[F32], atol=1e-37)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("factored", [False, True])
def test_cost(implementation, generator, dtype, factored):
    """Targets of two sizes and counts; one image without any."""
    embed = torch.randn(3, 7, 6, generator=generator).to(dtype)
    features = torch.randn(3, 6, 12, 10, generator=generator).to(dtype)
    masks = FactoredMasks(embed, features)
    exact = FactoredMasks(embed.double(), features.double()).logits()
    if not factored:
        exact = exact.to(dtype).double()
    targets = [torch.rand(t, h, 9, generator=generator) > 0.5 for t, h in ((4, 20), (0, 8), (2, 31))]
    points = torch.rand(3, 200, 2, generator=generator)
    given = FactoredMasks(*(x.to(implementation) for x in masks)) if factored else exact.to(dtype).to(implementation)
    cross_entropy, dice = m2f_kernels.mask_matching_cost(
        given, [t.to(implementation) for t in targets], points.to(implementation)
    )
    for i, target in enumerate(targets):
        x = sampling.point_sample(exact[i : i + 1], points[i : i + 1].double())[0]
        t = sampling.point_sample(target[None].double(), points[i : i + 1].double())[0]
        for a, b in zip((cross_entropy[i], dice[i]), reference.mask_matching_cost(x, t), strict=True):
            assert a.dtype == (F64 if dtype == F64 else F32)
            assert relative_error(a, b) < FORWARD[F32]


def test_cost_of_a_batch_of_equal_targets(implementation, generator):
    logits = torch.randn(2, 5, 8, 8, generator=generator).to(implementation)
    targets = (torch.rand(2, 3, 16, 16, generator=generator) > 0.5).to(implementation)
    points = torch.rand(2, 50, 2, generator=generator).to(implementation)
    stacked = m2f_kernels.mask_matching_cost(logits, targets, points)
    listed = m2f_kernels.mask_matching_cost(logits, list(targets), points)
    for a, b in zip(stacked, listed, strict=True):
        assert a.shape == (2, 5, 3)
        assert torch.equal(a, torch.stack(b))
    assert m2f_kernels.mask_matching_cost(logits[:0], targets[:0], points[:0])[0].shape == (0, 5, 3)


# ---------------------------------------------------------------- point loss
class Case:
    """Matched masks of two images, targets of two sizes, one query and one target used twice."""

    def __init__(self, generator, dtype=F32, labels=torch.bool, factored=True, k=90, scale=1.0, size=(12, 10)):
        embed = torch.randn(2, 6, 8, generator=generator) * scale
        features = torch.randn(2, 8, *size, generator=generator)
        self.factors = [embed.to(dtype), features.to(dtype)]
        self.inputs = self.factors if factored else [FactoredMasks(*self.factors).logits()]
        self.targets = [(torch.rand(t, h, 14, generator=generator) > 0.4).to(labels) for t, h in ((3, 21), (4, 12))]
        self.matches = [
            (torch.tensor([5, 0, 3]), torch.tensor([2, 0, 1])),
            (torch.tensor([1, 4, 1, 2]), torch.tensor([3, 3, 0, 1])),
        ]
        self.points = torch.rand(7, k, 2, generator=generator) * 1.2 - 0.1
        self.weights = torch.rand(2, 7, generator=generator)

    def run(self, device="cpu"):
        """Both losses, and the gradients of the inputs for random weights of the losses."""
        inputs = [x.detach().to(device).requires_grad_() for x in self.inputs]
        masks = FactoredMasks(*inputs) if len(inputs) == 2 else inputs[0]
        cross_entropy, dice = m2f_kernels.point_mask_loss(
            masks, [t.to(device) for t in self.targets], self.points.to(device), matches=self.matches
        )
        weights = self.weights.to(device)
        return cross_entropy, dice, *torch.autograd.grad((weights[0] * cross_entropy + weights[1] * dice).sum(), inputs)

    def truth(self):
        inputs = [x.detach().double().requires_grad_() for x in self.inputs]
        logits = (FactoredMasks(*inputs).logits() if len(inputs) == 2 else inputs[0]).flatten(0, 1)
        rows = torch.cat([queries + 6 * i for i, (queries, _) in enumerate(self.matches)])
        target_rows = torch.cat([chosen + 3 * i for i, (_, chosen) in enumerate(self.matches)])
        targets = [t.double() for t in self.targets]
        cross_entropy, dice, *_ = reference.point_mask_loss(logits, rows, targets, target_rows, self.points.double())
        weights = self.weights.double()
        return cross_entropy, dice, *torch.autograd.grad((weights[0] * cross_entropy + weights[1] * dice).sum(), inputs)

    def check(self, device="cpu"):
        for i, (a, b) in enumerate(zip(self.run(device), self.truth(), strict=True)):
            if i < 2:
                assert a.shape == (7,)
                assert relative_error(a, b) < FORWARD[F32], i
            else:
                stored = a.dtype if rounding(a.dtype) > rounding(F32) else F32
                assert a.dtype == self.inputs[0].dtype
                assert relative_error(a, b) < GRADIENT[F32] + (rounding(stored) if stored != F32 else 0), i


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("labels", LABELS, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_loss(implementation, generator, dtype, labels, factored):
    Case(generator, dtype, labels, factored).check(implementation)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("k", [1, 15, 16, 17, 1024, 3000])
@pytest.mark.parametrize("scale", [0.05, 10.0])
def test_numbers_of_points(implementation, generator, k, scale, factored):
    Case(generator, k=k, factored=factored, scale=scale).check(implementation)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_chunks_change_no_bit(set_threads, generator, threads, monkeypatch):
    """But those of the features' gradient, which is a sum over chunks."""
    case = Case(generator)
    *alone, features = case.run()
    set_threads(threads)
    monkeypatch.setattr(mask_rows, "CHUNK_BYTES", 12 * 10 * 4)
    *divided, other = case.run()
    # A matrix product of one row may be summed in another order than one of several.
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(divided, alone, strict=True))
    assert relative_error(other, features) < 1e-6
    again = case.run()
    assert all(torch.equal(a, b) for a, b in zip(again, (*divided, other), strict=True))
    case.check()


def test_masks_without_an_image_axis(generator):
    """[M, h, w] against [M, H, W], as in PointRend."""
    logits = torch.randn(5, 9, 7, generator=generator, requires_grad=True)
    targets = torch.rand(5, 18, 14, generator=generator) > 0.5
    points = torch.rand(5, 40, 2, generator=generator)
    cross_entropy, dice = m2f_kernels.point_mask_loss(logits, targets, points)
    expected = m2f_kernels.point_mask_loss(logits[None], [targets], points)
    assert torch.equal(cross_entropy, expected[0])
    assert torch.equal(dice, expected[1])


def test_strided_masks_and_targets(generator):
    case = Case(generator, factored=False)
    expected = case.run()
    case.inputs = [case.inputs[0].transpose(0, 1).contiguous().transpose(0, 1)]
    case.targets = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in case.targets]
    case.points = case.points.flip(2).contiguous().flip(2)
    for a, b in zip(case.run(), expected, strict=True):
        assert torch.equal(a, b)


def test_every_element_is_written(generator, deterministic):
    for factored in (False, True):
        Case(generator, factored=factored).check()


@pytest.mark.parametrize("factored", [False, True])
def test_nothing_matched(generator, factored):
    """No masks at all: losses are empty, and gradients zero rather than missing."""
    case = Case(generator, factored=factored)
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    masks = FactoredMasks(*inputs) if factored else inputs[0]
    empty = (torch.zeros(0, dtype=torch.int64),) * 2
    cross_entropy, dice = m2f_kernels.point_mask_loss(masks, case.targets, case.points[:0], matches=[empty, empty])
    assert cross_entropy.shape == dice.shape == (0,)
    for grad in torch.autograd.grad(cross_entropy.sum() + dice.sum(), inputs):
        assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("factored", [False, True])
def test_gradcheck(generator, factored):
    case = Case(generator, dtype=F64, factored=factored, k=6, size=(4, 3))

    def call(*inputs):
        masks = FactoredMasks(*inputs) if factored else inputs[0]
        return m2f_kernels.point_mask_loss(masks, case.targets, case.points.double(), matches=case.matches)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in case.inputs])


def test_second_derivative_is_refused(generator):
    case = Case(generator)
    inputs = [x.requires_grad_() for x in case.inputs]
    cross_entropy, _ = m2f_kernels.point_mask_loss(
        FactoredMasks(*inputs), case.targets, case.points, matches=case.matches
    )
    (grad,) = torch.autograd.grad(cross_entropy.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_autocast_changes_nothing(generator):
    case = Case(generator)
    expected = case.run()
    with torch.autocast("cpu", BF16):
        for a, b in zip(case.run(), expected, strict=True):
            assert a.dtype == F32
            assert torch.equal(a, b)


def test_full_logits_never_exist(generator, small_chunks):
    """No tensor as large as all matched masks is made, forward or backward."""
    embed = torch.randn(1, 40, 4, generator=generator, requires_grad=True)
    features = torch.randn(1, 4, 16, 16, generator=generator, requires_grad=True)
    targets = torch.rand(1, 40, 16, 16, generator=generator) > 0.5
    points = torch.rand(40, 20, 2, generator=generator)
    with Largest() as seen:
        cross_entropy, dice = m2f_kernels.point_mask_loss(FactoredMasks(embed, features), targets, points)
        (cross_entropy + dice).sum().backward()
    assert 0 < seen.bytes < 40 * 16 * 16 * 4 / 2


def test_uncertain_loss_is_the_loss_at_uncertain_points(generator, small_chunks):
    """One pass over the chunks gives what the two operators give one after the other."""
    case = Case(generator)
    masks = FactoredMasks(*case.factors)
    queries = [q for q, _ in case.matches]
    seeded = torch.Generator().manual_seed(3)
    points = m2f_kernels.uncertain_points(masks, 40, queries=queries, generator=seeded)
    expected = m2f_kernels.point_mask_loss(masks, case.targets, points, matches=case.matches)
    for form in (masks, masks.logits()):
        seeded.manual_seed(3)
        actual = uncertain_point_mask_loss(form, case.targets, case.matches, 40, generator=seeded)
        for a, b in zip(actual, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    q, h, w, k = (draw(st.integers(1, n)) for n in (9, 20, 20, 40))
    embed = torch.randn(1, q, 3, generator=generator, dtype=F64)
    features = torch.randn(1, 3, h, w, generator=generator, dtype=F64)
    targets = torch.rand(q, draw(st.integers(1, 30)), draw(st.integers(1, 30)), generator=generator) > 0.5
    points = torch.rand(q, k, 2, generator=generator)
    expected = m2f_kernels.point_mask_loss(FactoredMasks(embed, features), [targets], points)
    for masks in (FactoredMasks(embed.float(), features.float()), FactoredMasks(embed, features).logits().float()):
        for a, b in zip(m2f_kernels.point_mask_loss(masks, [targets], points), expected, strict=True):
            assert relative_error(a, b) < FORWARD[F32]
