"""The Triton kernels of the operators on points, called directly, against the reference."""

from __future__ import annotations

import pytest
import torch

from m2f_kernels.ops.points import reference
from m2f_kernels.ops.points import reference as sampling
from tests.numerics import FORWARD, GRADIENT, relative_error, tolerance

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def kernels():
    """Every operator's function by name."""
    from m2f_kernels.ops.points import triton_loss as loss
    from m2f_kernels.ops.points import triton_sampling as sample

    return {name: getattr(module, name) for module, names in (
        (sample, ("point_sample", "point_sample_backward", "uncertain_points")),
        (loss, ("mask_matching_cost", "point_mask_loss", "point_mask_loss_backward")),
    ) for name in names}  # fmt: skip


def make(generator, device, c=5, h=13, w=17, k=70, dtype=F32):
    pixels = torch.randn(2, c, h, w, generator=generator)
    pixels = pixels > 0 if dtype == torch.bool else (pixels > 0).to(dtype) if dtype == torch.uint8 else pixels.to(dtype)
    points = torch.rand(2, k, 2, generator=generator) * 1.6 - 0.3
    return pixels.to(device), points.to(device)


# ---------------------------------------------------------------- point_sample
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (13, 17)], ids=str)
def test_sample(kernels, device, generator, size, dtype, exact):
    pixels, points = make(generator, device, h=size[0], w=size[1], dtype=dtype)
    actual = kernels["point_sample"](pixels, points, exact)
    stored = sampling.sample_dtype(dtype, exact)
    assert actual.dtype == stored
    expected = sampling.point_sample(pixels.double(), points.double())
    assert relative_error(actual, expected) <= tolerance(FORWARD, stored, stored)


def test_bytes_are_masks(kernels, device, generator):
    """Of uint8 any value but 0 is foreground."""
    masks, points = make(generator, device, dtype=torch.bool)
    values = masks * torch.randint(1, 256, masks.shape, generator=generator, dtype=torch.uint8).to(device)
    assert values.max() > 1
    assert torch.equal(kernels["point_sample"](values, points, True), kernels["point_sample"](masks, points, True))
    rows, own = torch.arange(5, device=device), points.repeat(3, 1, 1)[:5]
    logits = torch.randn(5, 9, 9, generator=generator).to(device)
    losses = [kernels["point_mask_loss"](logits, rows, list(x), rows, own) for x in (masks, values)]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize(("c", "k"), [(1, 1), (9, 129), (20, 300)])
def test_sample_blocks(kernels, device, generator, c, k):
    """Strided planes and points; more than one block of channels and of points."""
    pixels, points = make(generator, device, c=c, k=k)
    expected = sampling.point_sample(pixels.double(), points.double())
    strided = torch.nn.functional.pad(pixels, (0, 0, 0, 0, 1, 1))[:, 1:-1]
    for given in (strided, pixels.transpose(2, 3).contiguous().transpose(2, 3)):
        actual = kernels["point_sample"](given, points.flip(2).contiguous().flip(2), False)
        assert relative_error(actual, expected) <= FORWARD[F32]


def test_sample_edges(kernels, device):
    pixels = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]], device=device)
    nan, inf = float("nan"), float("inf")
    points = {
        (0.25, 0.25): 1.0, (0.75, 0.75): 8.0, (0.5, 0.5): 3.75, (0.0, 0.25): 0.5, (1.0, 0.75): 4.0, (0.0, 0.0): 0.25,
        (-0.25, 0.25): 0.0, (1.25, 0.75): 0.0, (0.25, -3.0): 0.0, (nan, 0.25): 0.0, (0.25, nan): 0.0, (inf, 0.25): 0.0,
    }  # fmt: skip
    found = kernels["point_sample"](pixels, torch.tensor([list(points)], device=device), False)
    assert found[0, 0].tolist() == list(points.values())


@pytest.fixture(params=["scattered", "single", "chunks", "tiles"])
def c(request, monkeypatch):
    """Channels for each way of the backward."""
    from m2f_kernels.ops.points import triton_sampling as sample

    if request.param == "scattered":
        return 3
    monkeypatch.setattr(sample, "SORTED_CHANNELS", 9)  # the interpreter would be slow with what a GPU likes
    monkeypatch.setattr(sample, "GATHER", request.param)
    return 9


def test_many_channels_are_sorted(kernels, device, monkeypatch):
    from m2f_kernels.ops.points import triton_sampling as sample

    taken = []
    monkeypatch.setattr(sample, "_backward_sorted", lambda grad, *_: taken.append(grad.shape[1]))
    for channels in (sample.SORTED_CHANNELS - 1, sample.SORTED_CHANNELS):
        kernels["point_sample_backward"](
            torch.ones(1, channels, 3, device=device), torch.rand(1, 3, 2, device=device), 2, 2
        )
    assert taken == [sample.SORTED_CHANNELS]


@pytest.mark.parametrize(
    ("dtype", "magnitude"), [*((x, m) for x in (F32, BF16) for m in (1e-20, 1.0, 1e20)), (F16, 1.0), (F16, 0.01)]
)
def test_sample_backward(kernels, device, generator, dtype, magnitude, c):
    """Fixed point has no range to speak of: the scale follows each plane's largest gradient."""
    _, points = make(generator, device, k=300)
    upstream = (torch.randn(2, c, 300, generator=generator) * magnitude).to(device, dtype)
    upstream[0, 1] = 0
    pixels = torch.zeros(2, c, 13, 17, dtype=torch.float64, device=device, requires_grad=True)
    sampled = sampling.point_sample(pixels, points.double())
    (expected,) = torch.autograd.grad(sampled, pixels, upstream.double())
    actual = kernels["point_sample_backward"](upstream, points, 13, 17)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= tolerance(GRADIENT, dtype, dtype)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 200)], ids=str)
def test_sample_backward_of_crowded_points(kernels, device, generator, size, c):
    """Strided points, many of them on the same spot, on edges and nowhere; the same result for the same call."""
    points = torch.rand(2, 300, 2, generator=generator).mul(1.6).sub(0.3)
    points[:, :90] = points[:, 90:91]
    points[1, 100:110] = torch.tensor([0.0, 1.0])
    points[0, 100] = float("nan")
    points = points.flip(2).contiguous().flip(2).to(device)
    upstream = torch.randn(2, c, 300, generator=generator).to(device)
    pixels = torch.zeros(2, c, *size, dtype=torch.float64, device=device, requires_grad=True)
    sampled = sampling.point_sample(pixels, points.double())
    (expected,) = torch.autograd.grad(sampled, pixels, upstream.double())
    actual = kernels["point_sample_backward"](upstream, points, *size)
    assert relative_error(actual, expected) <= GRADIENT[F32]
    assert torch.equal(actual, kernels["point_sample_backward"](upstream, points, *size))


def test_non_finite_gradients_stay_visible(kernels, device, generator, c):
    _, points = make(generator, device)
    points[:, 5] = 0.4  # inside
    upstream = torch.ones(2, c, 70, device=device)
    upstream[1, 2, 5] = float("nan")
    upstream[0, 0, 5] = float("inf")
    actual = kernels["point_sample_backward"](upstream, points, 13, 17)
    finite = actual.isfinite().flatten(2).all(2)
    assert finite[:, :3].tolist() == [[False, True, True], [True, True, False]]
    assert finite[:, 3:].all()


@pytest.mark.parametrize("gather", ["chunks", "tiles"])
def test_non_finite_gradients_of_a_crowd_reach_its_pixels_only(kernels, device, gather, monkeypatch):
    monkeypatch.setattr("m2f_kernels.ops.points.triton_sampling.GATHER", gather)
    points = torch.full((1, 200, 2), 0.52, device=device)
    points[:, 199] = 0.1
    upstream = torch.ones(1, 64, 200, device=device)
    upstream[0, 3, 70] = float("inf")
    finite = kernels["point_sample_backward"](upstream, points, 8, 8).isfinite()[0]
    assert finite.flatten(1).sum(1).tolist() == [64 - 4 * (i == 3) for i in range(64)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("channels", [64, 65, 300])
def test_sample_backward_from_rows_of_channels(kernels, device, generator, channels, dtype, monkeypatch):
    """Channels that fill their blocks and that do not, in one block and more; more than one block of points."""
    monkeypatch.setattr("m2f_kernels.ops.points.triton_sampling.GATHER", "tiles")
    _, points = make(generator, device)
    upstream = torch.randn(2, channels, 70, generator=generator).to(device, dtype)
    pixels = torch.zeros(2, channels, 5, 37, dtype=torch.float64, device=device, requires_grad=True)
    sampled = sampling.point_sample(pixels, points.double())
    (expected,) = torch.autograd.grad(sampled, pixels, upstream.double())
    actual = kernels["point_sample_backward"](upstream, points, 5, 37)
    assert relative_error(actual, expected) <= tolerance(GRADIENT, dtype, dtype)


# ---------------------------------------------------------------- uncertain_points
@pytest.fixture(params=["histogram", "digits"])
def selection(request, monkeypatch):
    """Each of the two kernels that select points."""
    monkeypatch.setattr("m2f_kernels.ops.points.triton_sampling.SELECTION", request.param)
    return request.param


@pytest.mark.parametrize(
    ("candidates", "keep", "fresh"), [(3, 1, 1), (300, 75, 25), (2500, 700, 3), (90, 90, 0), (64, 0, 300)]
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_uncertain_points(kernels, device, generator, selection, candidates, keep, fresh, dtype):
    logits = torch.randn(4, 11, 9, generator=generator).to(device, dtype)
    rows = torch.tensor([3, 0, 0], device=device)
    seed = torch.tensor([-(2**61) + 99], device=device)
    actual = kernels["uncertain_points"](logits, rows, seed, 5, candidates, keep, fresh)
    expected = sampling.uncertain_points(logits.double(), rows, seed, 5, candidates, keep, fresh)
    assert torch.equal(actual[:, keep:], expected[:, keep:])
    same = (actual[:, None, :keep] == expected[:, :keep, None]).all(-1).any(-1).float()
    assert keep == 0 or same.mean() > 0.99


@pytest.mark.parametrize(("candidates", "keep"), [(1, 1), (5000, 4999), (20000, 7), (58000, 30000)])
def test_selections_agree(kernels, device, generator, monkeypatch, candidates, keep):
    """Bit for bit, of logits between 1e-30 and 1e30 and many that are equal, over more tiles than a field holds."""
    logits = torch.randn(3, 40, 50, generator=generator)
    logits[1] = 10 ** (30 * logits[1].clamp(-1, 1))
    logits[2] = logits[2].round()
    rows, seed = torch.arange(3, device=device), torch.tensor([7], device=device)
    found = []
    for name in ("histogram", "digits"):
        monkeypatch.setattr("m2f_kernels.ops.points.triton_sampling.SELECTION", name)
        found.append(kernels["uncertain_points"](logits.to(device), rows, seed, 0, candidates, keep, 0))
    assert torch.equal(*found)


def test_ties_and_nan(kernels, device, selection):
    """Of equals the first; NaN before everything."""
    logits = torch.full((2, 8, 8), 2.0, device=device)
    logits[1, :, 4:] = float("nan")
    rows, seed = torch.arange(2, device=device), torch.tensor([3], device=device)
    actual = kernels["uncertain_points"](logits, rows, seed, 0, 3000, 1500, 0)
    expected = sampling.uncertain_points(logits, rows, seed, 0, 3000, 1500, 0)
    # Samples inside are 2 but for rounding, which decides among them.
    near = (actual[0][:, None] == expected[0]).all(-1).any(-1).float().mean()
    assert near > 0.5
    assert torch.equal(actual[1], expected[1])


# ---------------------------------------------------------------- matching cost
@pytest.mark.parametrize(
    ("q", "t", "k"), [(1, 1, 1), (7, 5, 100), (100, 30, 1500), (33, 70, 600), (3, 0, 9), (0, 3, 9)]
)
def test_cost(kernels, device, generator, q, t, k):
    logits = (torch.randn(q, k, generator=generator) * 5).to(device)
    labels = torch.rand(t, k, generator=generator).to(device)
    expected = reference.mask_matching_cost(logits.double(), labels.double())
    for a, b in zip(kernels["mask_matching_cost"](logits, labels), expected, strict=True):
        assert relative_error(a, b) < FORWARD[F32]


# ---------------------------------------------------------------- point loss
@pytest.mark.parametrize("labels", [torch.bool, torch.uint8, F32, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("k", [1, 90, 600])
def test_loss(kernels, device, generator, dtype, labels, k):
    """Two images with targets of two sizes, one without any; a plane used twice and planes not used."""
    logits = torch.randn(6, 12, 10, generator=generator).to(device, dtype)
    targets = [
        (torch.rand(t, h, 14, generator=generator) > 0.4).to(device, labels) for t, h in ((3, 21), (0, 5), (2, 12))
    ]
    rows = torch.tensor([5, 0, 3, 3], device=device)
    target_rows = torch.tensor([2, 0, 4, 3], device=device)
    points = (torch.rand(4, k, 2, generator=generator) * 1.2 - 0.1).to(device)
    actual = kernels["point_mask_loss"](logits, rows, targets, target_rows, points)
    exact = logits.double().requires_grad_()
    expected = reference.point_mask_loss(exact, rows, [t.double() for t in targets], target_rows, points.double())
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == F32
        assert relative_error(a, b) < FORWARD[F32]
    upstream = torch.randn(2, 4, generator=generator).to(device)
    (truth,) = torch.autograd.grad(expected[:2], exact, tuple(upstream.double()))
    found = kernels["point_mask_loss_backward"](*upstream, rows, points, *actual[2:], 6, 12, 10)
    assert relative_error(found, truth) < GRADIENT[F32]
    again = kernels["point_mask_loss_backward"](*upstream, rows, points, *actual[2:], 6, 12, 10)
    assert torch.equal(found, again)


def test_no_masks(kernels, device):
    rows = torch.zeros(0, dtype=torch.int64, device=device)
    logits, points = torch.zeros(3, 4, 4, device=device), torch.zeros(0, 5, 2, device=device)
    found = kernels["point_mask_loss"](logits, rows, [torch.zeros(0, 4, 4, device=device)], rows, points)
    assert [list(x.shape) for x in found] == [[0], [0], [0, 5], [0, 5]]
    grad = kernels["point_mask_loss_backward"](*found[:2], rows, points, *found[2:], 3, 4, 4)
    assert torch.count_nonzero(grad) == 0
    assert kernels["uncertain_points"](logits, rows, rows, 0, 6, 3, 2).shape == (0, 5, 2)


# ---------------------------------------------------------------- factored masks
@pytest.mark.parametrize(("given", "how"), [(True, "separate"), (False, "separate"), (False, "fused")])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_factored_loss(kernels, device, generator, monkeypatch, dtype, given, how):
    """As the loop over chunks that serves other devices: several chunks, an image without masks, a query twice."""
    from m2f_kernels import _tuning
    from m2f_kernels.ops.points import factored, masks
    from m2f_kernels.ops.points import triton_loss as loss

    monkeypatch.setattr(_tuning, "CRITERION", how)

    embed = torch.randn(3, 5, 4, generator=generator).to(device, dtype)
    features = torch.randn(3, 4, 12, 10, generator=generator).to(device, dtype)
    rows, counts = torch.tensor([1, 4, 4, 0, 2, 13], device=device), [5, 0, 1]
    targets = [(torch.rand(t, 21, 14, generator=generator) > 0.4).to(device) for t in (3, 1, 2)]
    target_rows = torch.tensor([2, 0, 1, 2, 1, 5], device=device)
    points = torch.rand(6, 40, 2, generator=generator).to(device) if given else None
    seed = None if given else torch.tensor([7], device=device)
    arguments = (
        embed,
        features,
        rows,
        counts,
        targets,
        target_rows,
        points,
        seed,
        *((0, 0, 0) if given else (90, 30, 10)),
    )
    expected = factored.forward(*arguments)
    bounded = masks.chunk_bounds
    chunks = []

    def small(counts, needed, *_):
        chunks.append(list(bounded(counts, needed, 2 * needed)))
        return chunks[-1]

    monkeypatch.setattr(masks, "chunk_bounds", small)
    monkeypatch.setattr(loss, "chunk_bounds", small)
    actual = loss.factored_point_mask_loss(*arguments)
    assert [len(x) for x in chunks] == [4, 4]
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.numel() == 0 or relative_error(a, b.double()) < FORWARD[F32]
    upstream = torch.randn(2, 6, generator=generator).to(device)
    saved = points if given else actual[2], *actual[3:]
    found = loss.factored_point_mask_loss_backward(*upstream, embed, features, rows, counts, *saved)
    truth = factored.backward(*upstream, embed, features, rows, counts, *saved)
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b.double()) < tolerance(GRADIENT, dtype, dtype)
    assert torch.count_nonzero(found[0][1]) == torch.count_nonzero(found[1][1]) == 0
    again = loss.factored_point_mask_loss_backward(*upstream, embed, features, rows, counts, *saved)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
