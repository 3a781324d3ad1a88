"""Resizing mask features, predicting and packing attention masks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import m2f_kernels
from m2f_kernels import _library, masks
from m2f_kernels.ops.attention_mask import reference
from tests.numerics import relative_error, rounding

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
OPS = ("resize_mask_features", "predict_attention_mask", "pack_attention_mask")


def test_the_compiled_kernels_are_tested():
    assert _library.LIBRARIES["cpu"].loaded, _library.LIBRARIES["cpu"].problem
    for op in OPS:
        assert m2f_kernels.explain(op, torch.zeros(1)).backend == "cpp"


# ---------------------------------------------------------------- the packed form
@pytest.mark.parametrize("s", [1, 31, 32, 33, 64, 100])
def test_packed_form(s):
    """Bit by bit, against the documented layout."""
    g = torch.Generator().manual_seed(s)
    attend = torch.rand(2, 3, s, generator=g) < 0.5
    attend[0, 1] = False
    bits, row_any = masks.pack(attend)
    assert bits.shape == (2, 3, (s + 31) // 32)
    assert bits.dtype == torch.int32
    for n, q in ((0, 0), (0, 1), (1, 2)):
        for key in range(s):
            assert (int(bits[n, q, key // 32]) >> (key % 32) & 1) == attend[n, q, key]
        for key in range(s, bits.shape[2] * 32):
            assert not int(bits[n, q, key // 32]) >> (key % 32) & 1
    assert torch.equal(row_any, attend.any(-1))
    assert torch.equal(masks.unpack(bits, row_any, s), attend | ~attend.any(-1, keepdim=True))


def test_packed_mask_is_a_pytree():
    packed = m2f_kernels.pack_attention_mask(torch.rand(1, 2, 40) < 0.5)
    leaves, spec = torch.utils._pytree.tree_flatten(packed)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, m2f_kernels.PackedMask)
    assert torch.equal(again.to_bool(), packed.to_bool())


# ---------------------------------------------------------------- packing
@pytest.mark.parametrize("s", [1, 7, 31, 32, 33, 95, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.bool, F64, F32, BF16, F16], ids=str)
def test_pack(implementation, dtype, s):
    g = torch.Generator().manual_seed(0)
    mask = torch.randn(2, 5, s, generator=g)
    mask = (mask < 0 if dtype == torch.bool else mask.to(dtype)).to(implementation)
    mask[0, 0] = False if dtype == torch.bool else -1
    packed = m2f_kernels.pack_attention_mask(mask)
    bits, row_any = reference.pack_attention_mask(mask.cpu())
    assert torch.equal(packed.bits.cpu(), bits)
    assert torch.equal(packed.row_any.cpu(), row_any)
    assert packed.num_keys == s


def test_pack_follows_the_published_rule(implementation):
    """Blocked exactly where sigmoid(x) < 0.5; a NaN is not."""
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-30, -1e-3, 3.0, -200.0]
    logits = torch.tensor(values, device=implementation).expand(1, 1, -1)
    expected = ~(logits.double().sigmoid() < 0.5)
    assert torch.equal(m2f_kernels.pack_attention_mask(logits).to_bool(), expected)


def test_pack_of_images_and_views(implementation):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 6, 5, 14, generator=g).to(implementation) < 0.5
    flat = m2f_kernels.pack_attention_mask(mask.flatten(2))
    assert torch.equal(m2f_kernels.pack_attention_mask(mask).bits, flat.bits)
    strided = mask.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(m2f_kernels.pack_attention_mask(strided).bits, flat.bits)
    expanded = mask[:, :1].expand(-1, 6, -1, -1)
    assert torch.equal(m2f_kernels.pack_attention_mask(expanded).to_bool()[:, 4], flat.to_bool()[:, 0])


def test_any_byte_but_zero_is_true(implementation):
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).to(implementation)
    packed = m2f_kernels.pack_attention_mask(bytes_.view(torch.bool))
    assert packed.to_bool().sum() == 255


# ---------------------------------------------------------------- resizing
SIZES = {
    "ratios 8 4 2": ((16, 24), [(2, 3), (4, 6), (8, 12)]),
    "wide": ((80, 144), [(10, 18), (40, 72), (20, 36)]),
    "odd": ((33, 41), [(5, 6), (9, 11), (17, 21)]),
    "one ratio per axis": ((16, 16), [(8, 4), (16, 2), (2, 16)]),
    "same size": ((7, 9), [(7, 9)]),
    "upscaling": ((3, 5), [(7, 9), (30, 50)]),
    "one pixel": ((1, 1), [(1, 1), (3, 2)]),
    "to one pixel": ((13, 8), [(1, 1)]),
    "other ratios": ((48, 48), [(16, 16), (3, 3), (24, 24)]),
}


def truth_of_resize(features, sizes):
    exact = features.detach().cpu().double()
    return [F.interpolate(exact, size=size, mode="bilinear", align_corners=False) for size in sizes]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_resize(implementation, name, dtype):
    (h, w), sizes = SIZES[name]
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, h, w, generator=g).to(implementation, dtype)
    levels = m2f_kernels.resize_mask_features(features, sizes)
    for level, exact in zip(levels, truth_of_resize(features, sizes), strict=True):
        assert level.dtype == dtype
        assert level.shape == exact.shape
        assert relative_error(level, exact) <= (1e-12 if dtype == F64 else 1e-6 + rounding(dtype))


@given(
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_resize_any_size(h, w, sizes):
    features = torch.randn(1, 2, h, w, generator=torch.Generator().manual_seed(h * w))
    for level, exact in zip(
        m2f_kernels.resize_mask_features(features, sizes), truth_of_resize(features, sizes), strict=True
    ):
        assert relative_error(level, exact) <= 1e-6


def test_resize_of_views(implementation):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, 16, 16, generator=g).to(implementation)
    sizes = [(8, 8), (5, 5)]
    expected = m2f_kernels.resize_mask_features(features, sizes)
    for view in (
        features.contiguous(memory_format=torch.channels_last),
        torch.stack([features, features], -1)[..., 1],
        torch.cat([features, features], 2)[:, :, 16:],
    ):
        for a, b in zip(m2f_kernels.resize_mask_features(view, sizes), expected, strict=True):
            assert torch.equal(a, b)


def test_resize_has_no_gradient(device):
    features = torch.randn(1, 2, 8, 8, device=device, requires_grad=True)
    assert not m2f_kernels.resize_mask_features(features, [(4, 4)])[0].requires_grad


def test_resize_keeps_bad_pixels_apart(implementation):
    """A NaN reaches the pixels made from it and no others."""
    features = torch.zeros(1, 1, 16, 16, device=implementation)
    features[..., 3, 3] = float("nan")
    for level in m2f_kernels.resize_mask_features(features, [(8, 8), (4, 4), (2, 2)]):
        assert level.isnan().sum() <= 1
    assert m2f_kernels.resize_mask_features(features, [(2, 2)])[0].isnan().sum() == 1


# ---------------------------------------------------------------- prediction
def predicted(embed, features):
    """Logits in float64 and the bool mask of the operator before the row rule."""
    packed = m2f_kernels.predict_attention_mask(embed, features)
    raw = packed._replace(row_any=torch.ones_like(packed.row_any)).to_bool().cpu()
    logits = torch.einsum("nqc,ncs->nqs", embed.cpu().double(), features.flatten(2).cpu().double())
    assert torch.equal(packed.row_any.cpu(), raw.any(-1))
    assert packed.bits.shape == (*embed.shape[:2], (logits.shape[2] + 31) // 32)
    return logits, raw


def assert_right(embed, features):
    """Every bit is right but where the logit is within rounding of the threshold."""
    logits, raw = predicted(embed, features)
    wrong = raw != ~(logits < 0)
    magnitude = torch.einsum("nqc,ncs->nqs", embed.cpu().double().abs(), features.flatten(2).cpu().double().abs())
    assert (logits[wrong].abs() <= magnitude[wrong] * 2**-20).all()
    return int(wrong.sum()), logits.numel()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("c", [1, 7, 16, 64, 256])
def test_predict(implementation, dtype, c):
    g = torch.Generator().manual_seed(c)
    embed = torch.randn(2, 13, c, generator=g).to(implementation, dtype)
    features = torch.randn(2, c, 9, 15, generator=g).to(implementation, dtype)
    assert_right(embed, features)


@pytest.mark.parametrize("s", [1, 2, 31, 32, 33, 127, 128, 129, 300])
@pytest.mark.parametrize("q", [1, 5, 6, 7, 11, 12, 13, 100])
def test_predict_sizes(implementation, q, s):
    g = torch.Generator().manual_seed(q * s)
    embed = torch.randn(1, q, 20, generator=g).to(implementation)
    assert_right(embed, torch.randn(1, 20, s, generator=g).to(implementation))


def test_predict_rarely_differs(implementation):
    """At most one bit in a million in float32, with 256 channels."""
    g = torch.Generator().manual_seed(0)
    wrong, total = assert_right(
        torch.randn(1, 100, 256, generator=g).to(implementation),
        torch.randn(1, 256, 15000, generator=g).to(implementation),
    )
    assert wrong <= 1e-6 * total


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_whole_way_equals_the_published_one(implementation, dtype):
    """Resize and predict against full-resolution logits, resized, through a sigmoid, in float64."""
    g = torch.Generator().manual_seed(0)
    embed = torch.randn(2, 50, 64, generator=g).to(dtype)
    features = F.avg_pool2d(torch.randn(2, 64, 68, 100, generator=g), 5, 1)[..., :64, :96].to(dtype)
    sizes = [(8, 12), (16, 24), (32, 48)]
    levels = m2f_kernels.resize_mask_features(features.to(implementation), sizes)
    wrong = total = 0
    for level, size in zip(levels, sizes, strict=True):
        logits = torch.einsum("nqc,nchw->nqhw", embed.double(), features.double())
        resized = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        blocked = (resized.sigmoid() < 0.5).flatten(2)
        blocked = blocked & ~blocked.all(-1, keepdim=True)
        actual = m2f_kernels.predict_attention_mask(embed.to(implementation), level).to_bool().cpu()
        wrong += int((actual == blocked).sum())
        total += actual.numel()
    assert wrong <= (1e-5 if dtype == F32 else 1e-3) * total


def test_predict_of_views(implementation):
    g = torch.Generator().manual_seed(0)
    embed, features = torch.randn(2, 9, 16, generator=g), torch.randn(2, 16, 7, 20, generator=g)
    embed, features = embed.to(implementation), features.to(implementation)
    expected = m2f_kernels.predict_attention_mask(embed, features)
    views = [
        (embed.transpose(1, 2).contiguous().transpose(1, 2), features),
        (embed, features.contiguous(memory_format=torch.channels_last)),
        (embed, torch.cat([features, features], 2)[:, :, 7:]),
        (torch.stack([embed, embed], -1)[..., 0], features.flatten(2)),
    ]
    for e, f in views:
        packed = m2f_kernels.predict_attention_mask(e, f)
        assert torch.equal(packed.bits, expected.bits)
        assert torch.equal(packed.row_any, expected.row_any)


def test_nan_and_infinite_logits(implementation):
    """A NaN logit attends, +inf attends, -inf does not."""
    embed = torch.ones(1, 1, 2, device=implementation)
    nan, inf = float("nan"), float("inf")
    features = torch.tensor([[nan, inf, -inf, inf, -1.0, 1.0], [0, 0, 0, -inf, 0, 0]], device=implementation)[None]
    expected = torch.tensor([[[True, True, False, True, False, True]]], device=implementation)
    assert torch.equal(m2f_kernels.predict_attention_mask(embed, features).to_bool(), expected)


def test_row_rule(implementation):
    """A query without a bit attends everywhere, and says so; bits beyond S stay 0."""
    embed = torch.tensor([[[1.0], [-1.0]]], device=implementation)
    packed = m2f_kernels.predict_attention_mask(embed, torch.full((1, 1, 40), 2.0, device=implementation))
    assert packed.row_any.tolist() == [[True, False]]
    assert packed.bits.tolist() == [[[-1, 255], [0, 0]]]
    assert packed.to_bool().all()


def test_flags_for_all_masks_at_once(implementation):
    """Levels, bits and flags are those of the functions that take no flags."""
    g = torch.Generator().manual_seed(0)
    embeds, features = torch.randn(4, 2, 9, 16, generator=g), torch.randn(2, 16, 16, 24, generator=g)
    embeds, features = embeds.to(implementation), features.to(implementation)
    embeds[:, :, 3] = 0  # attends everywhere, but in one mask nowhere
    embeds[1, :, 3, 0] = -1
    features[:, 0] = features[:, 0].abs() + 1
    sizes = [(4, 6), (8, 12)]
    levels, flags = m2f_kernels.attention_mask_levels(features, sizes, 4, 9)
    assert flags.shape == (4, 2, 9)
    assert not flags.any()
    for i, embed in enumerate(embeds):
        level = m2f_kernels.resize_mask_features(features, sizes)[i % 2]
        assert torch.equal(levels[i % 2], level)
        expected = m2f_kernels.predict_attention_mask(embed, level)
        packed = m2f_kernels.predict_attention_mask(embed, levels[i % 2], flags[i])
        assert torch.equal(packed.bits, expected.bits)
        assert torch.equal(packed.row_any, expected.row_any)
        assert packed.row_any[:, 3].all() == (i != 1)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(implementation, shape):
    n, q = shape
    embed, features = torch.zeros(n, q, 4, device=implementation), torch.zeros(n, 4, 33, device=implementation)
    for packed in (
        m2f_kernels.predict_attention_mask(embed, features),
        m2f_kernels.pack_attention_mask(torch.zeros(n, q, 33, dtype=torch.bool, device=implementation)),
    ):
        assert packed.bits.shape == (n, q, 2)
        assert packed.row_any.shape == (n, q)
    assert m2f_kernels.resize_mask_features(torch.zeros(n, q, 4, 4, device=implementation), [(2, 2)])[0].shape == (
        n, q, 2, 2,
    )  # fmt: skip


def test_every_word_is_written(implementation, deterministic):
    """Fresh integers are poisoned under deterministic algorithms."""
    g = torch.Generator().manual_seed(0)
    embed = torch.randn(1, 30, 8, generator=g).to(implementation)
    assert_right(embed, torch.randn(1, 8, 777, generator=g).to(implementation))


@pytest.mark.parametrize("threads", [2, 5])
def test_the_same_bits_for_any_number_of_threads(set_threads, threads):
    g = torch.Generator().manual_seed(0)
    embed, features = torch.randn(2, 30, 32, generator=g), torch.randn(2, 32, 48, 48, generator=g)
    results = []
    for count in (1, threads):
        set_threads(count)
        levels = m2f_kernels.resize_mask_features(features, [(24, 24), (11, 13)])
        results.append([m2f_kernels.predict_attention_mask(embed, level) for level in levels])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.bits, b.bits)
        assert torch.equal(a.row_any, b.row_any)
