"""Point sampling and uncertain points against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m2f_kernels
from m2f_kernels import FactoredMasks, _library
from m2f_kernels.ops.points import masks as mask_rows
from m2f_kernels.ops.points import reference
from tests.numerics import FORWARD, GRADIENT, relative_error, rounding, tolerance

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
PIXELS = [F64, F32, BF16, F16, torch.bool, torch.uint8]


def make(generator, n=2, c=5, h=13, w=17, k=70, dtype=F32, spread=0.3):
    """Pixels, and points of which some lie outside."""
    pixels = torch.randn(n, c, h, w, generator=generator)
    pixels = (pixels > 0).to(dtype) if not dtype.is_floating_point else pixels.to(dtype)
    points = torch.rand(n, k, 2, generator=generator) * (1 + 2 * spread) - spread
    return pixels, points


def check(pixels, points):
    """Samples and, for floating pixels, their gradient."""
    exact = pixels.detach().double().requires_grad_()
    expected = reference.point_sample(exact, points.double())
    if pixels.dtype.is_floating_point:
        pixels = pixels.detach().requires_grad_()
    actual = m2f_kernels.point_sample(pixels, points)
    stored = reference.sample_dtype(pixels.dtype, False)
    assert actual.dtype == stored
    assert relative_error(actual, expected) <= tolerance(FORWARD, stored, stored)
    if pixels.dtype.is_floating_point and expected.numel():
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(stored)
        (grad,) = torch.autograd.grad(actual, pixels, upstream.to(actual.device))
        (truth,) = torch.autograd.grad(expected, exact, upstream.to(actual.device).double())
        assert grad.dtype == pixels.dtype
        assert relative_error(grad, truth) <= tolerance(GRADIENT, stored, stored)


def test_the_compiled_kernels_are_tested():
    assert _library.LIBRARIES["cpu"].loaded, _library.LIBRARIES["cpu"].problem
    for op in ("point_sample", "uncertain_points", "mask_matching_cost", "point_mask_loss"):
        assert m2f_kernels.explain(op, torch.zeros(1)).backend == "cpp"


# ---------------------------------------------------------------- point_sample
@pytest.mark.parametrize("dtype", PIXELS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (1, 2), (13, 17)], ids=str)
@pytest.mark.parametrize("k", [1, 15, 16, 17, 70])
def test_sizes(implementation, generator, dtype, size, k):
    """Planes smaller than a vector, single rows and columns; whole vectors of points and not."""
    pixels, points = make(generator, h=size[0], w=size[1], k=k, dtype=dtype)
    check(pixels.to(implementation), points.to(implementation))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("n", "c", "k"), [(1, 1, 50000), (3, 40, 100), (1, 7, 9000)])
def test_threads(set_threads, generator, threads, n, c, k):
    """Shared by channels, and the points of one channel by parts; the same bits whatever the number of threads."""
    pixels, points = make(generator, n=n, c=c, k=k)
    alone = m2f_kernels.point_sample(pixels, points)
    set_threads(threads)
    check(pixels, points)
    assert torch.equal(m2f_kernels.point_sample(pixels, points), alone)


def test_edges(implementation):
    """Pixel centres, borders, beyond them, and coordinates that are no numbers; exact in float32."""
    pixels = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]], device=implementation)
    nan, inf = float("nan"), float("inf")
    points = {
        (0.25, 0.25): 1.0, (0.75, 0.75): 8.0, (0.5, 0.5): 3.75, (0.0, 0.25): 0.5, (1.0, 0.75): 4.0, (0.0, 0.0): 0.25,
        (-0.25, 0.25): 0.0, (1.25, 0.75): 0.0, (0.25, -3.0): 0.0, (nan, 0.25): 0.0, (0.25, nan): 0.0, (inf, 0.25): 0.0,
        (0.25, -inf): 0.0, (1e30, 0.25): 0.0,
    }  # fmt: skip
    at = torch.tensor([list(points)], device=implementation)
    assert m2f_kernels.point_sample(pixels, at)[0, 0].tolist() == list(points.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_pixels_reach_their_samples_only(implementation, generator, value):
    pixels, points = make(generator, n=1, c=1, k=400)
    pixels[0, 0, 4, 0] = value
    pixels[0, 0, 12, 16] = value  # read by clamped neighbours, if by anything
    actual = m2f_kernels.point_sample(pixels.to(implementation), points.to(implementation)).cpu()
    expected = reference.point_sample(pixels, points)
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert torch.equal(actual.isnan(), expected.isnan())
    assert not expected.isfinite().all()


LAYOUTS = {
    "gaps": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 2))[:, 1:-2],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows strided": lambda x: torch.nn.functional.pad(x, (0, 3))[..., :-3],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, torch.bool], ids=str)
def test_strides(implementation, generator, layout, dtype):
    pixels, points = make(generator, dtype=dtype)
    pixels, points = LAYOUTS[layout](pixels).to(implementation), points.to(implementation)
    check(pixels, points.flip(1).contiguous().flip(1))


def test_large_planes_keep_their_coordinates(implementation, generator):
    """In float32 a coordinate near 20000 is off by a thousandth of a pixel unless its rounded-off part is kept."""
    pixels, points = make(generator, n=1, c=1, h=1, w=20000, k=2000, spread=0)
    check(pixels.to(implementation), points.to(implementation))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=str)
def test_empty(implementation, shape):
    n, c, k = shape
    pixels = torch.zeros(n, c, 5, 6, device=implementation, requires_grad=True)
    out = m2f_kernels.point_sample(pixels, torch.zeros(n, k, 2, device=implementation))
    assert out.shape == shape
    out.sum().backward()
    assert pixels.grad.shape == pixels.shape


def test_every_element_is_written(implementation, generator, deterministic):
    pixels, points = make(generator)
    check(pixels.to(implementation), points.to(implementation))


def test_factored(implementation, generator):
    """Features are sampled and multiplied; gradients of both factors."""
    embed = torch.randn(2, 9, 5, generator=generator)
    features, points = make(generator)
    inputs = [x.to(implementation).requires_grad_() for x in (embed, features)]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    actual = m2f_kernels.point_sample(FactoredMasks(*inputs), points.to(implementation))
    expected = reference.point_sample(FactoredMasks(*exact).logits(), points.double())
    assert relative_error(actual, expected) < FORWARD[F32]
    for a, b in zip(
        torch.autograd.grad(actual.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), exact),
        strict=True,
    ):
        assert relative_error(a, b) < GRADIENT[F32]


def test_gradcheck(generator):
    pixels, points = make(generator, n=1, c=2, h=4, w=3, k=9, dtype=F64)
    assert torch.autograd.gradcheck(lambda x: m2f_kernels.point_sample(x, points), pixels.requires_grad_())


def test_second_derivative_is_refused(implementation, generator):
    pixels, points = (x.to(implementation) for x in make(generator))
    pixels.requires_grad_()
    upstream = torch.ones(2, 5, 70, device=implementation, requires_grad=True)
    (grad,) = torch.autograd.grad(m2f_kernels.point_sample(pixels, points), pixels, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = {"n": draw(st.integers(0, 3)), "c": draw(st.integers(0, 20)), "h": draw(st.integers(1, 20))}
    shape |= {"w": draw(st.integers(1, 20)), "k": draw(st.integers(1, 40)), "dtype": draw(st.sampled_from(PIXELS))}
    check(*make(generator, **shape))


# ---------------------------------------------------------------- uncertain_points
def test_philox_known_answers():
    """The published test vectors of Philox4x32-10 (Random123, kat_vectors), where the upper words are our zeros too."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = reference.philox((zero, zero, zero, zero), zero)
    assert [f"{int(x):08x}" for x in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = torch.full((1,), 0xFFFFFFFF)
    words = reference.philox((ones, ones, ones, ones), torch.tensor([-1]))
    assert [f"{int(x):08x}" for x in words] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


@pytest.mark.parametrize(
    ("k", "oversample", "ratio"),
    [(1, 3.0, 0.75), (7, 3.0, 0.75), (100, 3.0, 0.75), (50, 1.0, 1.0), (33, 2.5, 0.0), (64, 4.0, 1.0)],
)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_uncertain_points(implementation, generator, k, oversample, ratio, dtype):
    """Exactly the reference's points where logits are distinct enough that rounding cannot exchange their ranks."""
    logits = torch.randn(6, 11, 9, generator=generator).to(dtype)
    rows, seed = torch.tensor([5, 0, 3, 3]), torch.tensor([-(2**62) + 12345])
    candidates, keep = int(oversample * k), int(ratio * k)
    arguments = (rows, seed, 7, candidates, keep, k - keep)
    moved = [x.to(implementation) if torch.is_tensor(x) else x for x in (logits, *arguments)]
    actual = torch.ops.m2f.uncertain_points(*moved).cpu()
    expected = reference.uncertain_points(logits.double(), *arguments)
    assert actual.shape == (4, k, 2)
    assert actual.dtype == F32
    if ratio in (0.0, 1.0) or k < 10:
        assert torch.equal(actual, expected)
    same = (actual[:, None] == expected[:, :, None]).all(-1).any(-1).float().mean()
    assert same > 0.99
    # The least certain point kept is no more certain, up to rounding, than in the truth.
    found, best = (
        reference.point_sample(logits[rows, None].double(), p.double())[:, 0].abs()[:, :keep].sum(1)
        for p in (actual, expected)
    )
    assert torch.all(found <= best * (1 + 1e-6))


def test_ties_and_nan(implementation):
    """Of equals the first; NaN before everything, as torch.topk has it."""
    seed, rows = torch.tensor([3], device=implementation), torch.arange(2, device=implementation)
    logits = torch.stack([torch.full((8, 8), 2.0), torch.full((8, 8), 5.0)]).to(implementation)
    points = torch.ops.m2f.uncertain_points(logits, rows, seed, 0, 200, 50, 0).cpu()
    everything = reference.uniform_points(seed.cpu(), torch.arange(2), 0, 200)
    inside = ((everything * 8 - 0.5) >= 0).all(-1) & ((everything * 8 - 0.5) <= 7).all(-1)
    assert points.shape == (2, 50, 2)
    assert not torch.equal(points, everything[:, :50])  # samples at the border are smaller, and kept first
    assert inside.any()
    logits[:, :, 4:] = float("nan")
    points = torch.ops.m2f.uncertain_points(logits, rows, seed, 0, 200, 50, 0).cpu()
    expected = reference.uncertain_points(logits.cpu(), rows.cpu(), seed.cpu(), 0, 200, 50, 0)
    assert torch.equal(points, expected)
    assert (points[..., 0] > 3.5 / 8).all()


def test_points_do_not_depend_on_chunks_or_threads(set_threads, generator, monkeypatch):
    masks = FactoredMasks(torch.randn(2, 9, 4, generator=generator), torch.randn(2, 4, 20, 24, generator=generator))
    queries = [torch.tensor([8, 1, 1, 4]), torch.tensor([0])]

    def draw():
        seeded = torch.Generator().manual_seed(5)
        return m2f_kernels.uncertain_points(masks, 60, queries=queries, generator=seeded)

    whole = draw()
    assert whole.shape == (5, 60, 2)
    set_threads(3)
    assert torch.equal(draw(), whole)
    monkeypatch.setattr(mask_rows, "CHUNK_BYTES", 20 * 24 * 4 * 2)
    assert torch.equal(draw(), whole)
    seeded = torch.Generator().manual_seed(5)
    of_logits = m2f_kernels.uncertain_points(masks.logits(), 60, queries=queries, generator=seeded)
    assert (of_logits == whole).float().mean() > 0.99


def test_points_are_uniform_and_fresh(generator):
    """Mean and variance of fresh points; different masks and calls get different ones."""
    points = m2f_kernels.uncertain_points(torch.zeros(3, 4, 4), 20000, 1.0, 0.0, generator=generator)
    assert torch.allclose(points.mean(1), torch.tensor(0.5), atol=0.01)
    assert torch.allclose(points.var(1), torch.tensor(1 / 12), atol=0.003)
    assert not torch.equal(points[0], points[1])
    assert ((points >= 0) & (points < 1)).all()
    assert not torch.equal(points, m2f_kernels.uncertain_points(torch.zeros(3, 4, 4), 20000, 1.0, 0.0))


def test_low_precision_samples_are_rounded_once(implementation, generator):
    pixels, points = make(generator, dtype=BF16)
    expected = reference.point_sample(pixels.double(), points.double()).to(BF16)
    actual = m2f_kernels.point_sample(pixels.to(implementation), points.to(implementation)).cpu()
    assert (actual == expected).float().mean() > 0.99
    assert relative_error(actual, expected) < rounding(BF16)
