"""The Triton kernels of the attention masks, called directly, against the reference."""

from __future__ import annotations

import pytest
import torch

from m2f_kernels.masks import WORD
from m2f_kernels.ops.attention_mask import reference
from tests import numerics

LOW_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels():
    from m2f_kernels.ops.attention_mask import triton

    return triton


# ---------------------------------------------------------------- pack_attention_mask


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 100, 3000])
@pytest.mark.parametrize("dtype", [torch.bool, *LOW_AND_SINGLE])
def test_pack(kernels, device, generator, dtype, keys):
    logits = torch.randn(2, 3, keys, generator=generator).to(device)
    logits[0, 1] = -1
    mask = logits > 0 if dtype == torch.bool else logits.to(dtype)
    bits, row_any = kernels.pack_attention_mask(mask)
    expected_bits, expected_any = reference.pack_attention_mask(mask)
    assert torch.equal(bits, expected_bits)
    assert torch.equal(row_any, expected_any)
    assert not row_any[0, 1]
    assert bits.dtype == torch.int32


def test_pack_special_logits(kernels, device):
    """NaN attends, as do both zeros; nothing else may look like a sign."""
    logits = torch.tensor([torch.nan, 0.0, -0.0, torch.inf, -torch.inf, -1e-45, 1e-45]).to(device)
    bits, row_any = kernels.pack_attention_mask(logits.expand(1, 1, -1))
    attends = [True, True, True, True, False, False, True]
    assert bits.item() == sum(1 << key for key, bit in enumerate(attends) if bit)
    assert row_any.item()


def test_pack_strided(kernels, device, generator):
    wide = torch.randn(70, 5, 2, generator=generator).to(device)
    mask = wide.permute(2, 1, 0)[:, ::2, 3:]
    for given, expected in zip(
        kernels.pack_attention_mask(mask), reference.pack_attention_mask(mask.contiguous()), strict=True
    ):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("shape", [(0, 3, 40), (2, 0, 40)])
def test_pack_empty(kernels, device, shape):
    bits, row_any = kernels.pack_attention_mask(torch.zeros(shape, dtype=torch.bool, device=device))
    assert bits.shape == (*shape[:2], -(-shape[2] // WORD))
    assert row_any.shape == shape[:2]


# ---------------------------------------------------------------- predict_attention_mask


def check_bits(kernels, embed, features):
    """The kernel's bits and flags are exactly those of the float64 truth."""
    bits, row_any = kernels.predict_attention_mask(embed, features)
    expected_bits, expected_any = reference.predict_attention_mask(embed.double(), features.double())
    assert torch.equal(bits, expected_bits)
    assert torch.equal(row_any, expected_any)
    return bits, row_any


def integers(generator, *shape):
    """Small integers: their products and sums are exact in every dtype, zeros among the logits included."""
    return torch.randint(-3, 4, shape, generator=generator).float()


@pytest.mark.parametrize("dtype", LOW_AND_SINGLE)
@pytest.mark.parametrize(
    ("queries", "channels", "keys"),
    [(1, 16, 1), (7, 1, 31), (7, 3, 32), (100, 33, 33), (100, 64, 100), (130, 20, 70), (3, 256, 1000)],
)
def test_predict_exact(kernels, device, generator, dtype, queries, channels, keys):
    embed = integers(generator, 2, queries, channels).to(device, dtype)
    embed[0, 0] = 0  # every logit 0: attends everywhere
    features = integers(generator, 2, channels, keys).to(device, dtype)
    check_bits(kernels, embed, features)


@pytest.mark.parametrize("dtype", LOW_AND_SINGLE)
def test_predict_rounding(kernels, device, generator, dtype):
    """Bits differ from the truth only where the logit is within float32's rounding of 0."""
    embed = torch.randn(1, 100, 256, generator=generator).to(device, dtype)
    features = torch.randn(1, 256, 400, generator=generator).to(device, dtype)
    bits, _ = kernels.predict_attention_mask(embed, features)
    logits = embed.double() @ features.double()
    expected, _ = reference.pack_attention_mask(logits)
    shifts = torch.arange(WORD, dtype=torch.int32, device=device)
    differs = (((bits ^ expected)[..., None] >> shifts) & 1).bool().flatten(2)[..., :400]
    magnitude = embed.double().abs() @ features.double().abs()
    assert not (differs & (logits.abs() > 1e-6 * magnitude)).any()
    assert differs.float().mean() < 1e-4


def test_predict_rows_without_bits(kernels, device):
    embed = torch.tensor([[[1.0], [-1.0], [0.0]]], device=device)
    features = torch.ones(1, 1, 70, device=device)
    bits, row_any = check_bits(kernels, embed, features)
    assert row_any.tolist() == [[True, False, True]]
    assert (bits[0, 1] == 0).all()


def test_predict_nan_attends(kernels, device):
    embed = torch.tensor([[[-1.0, 0.0]]], device=device)
    features = torch.tensor([[[torch.nan, 1.0, 1.0, torch.inf], [0.0, torch.inf, 1.0, 0.0]]], device=device)
    bits, _ = check_bits(kernels, embed, features)
    assert bits.item() == 0b0011


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_strided(kernels, device, generator, dtype):
    """A level cut out of all levels, channels last, and embeddings cut out of a larger tensor."""
    embed = integers(generator, 5, 2, 40).to(device, dtype).transpose(0, 1)[:, :, ::2]
    features = integers(generator, 2, 20, 90).to(device, dtype)
    check_bits(kernels, embed, features[:, :, 17:60])
    check_bits(kernels, embed, features.transpose(1, 2).contiguous().transpose(1, 2))
    check_bits(kernels, embed, features[:1].expand(2, -1, -1))


@pytest.mark.parametrize(("n", "queries"), [(0, 3), (2, 0)])
def test_predict_empty(kernels, device, n, queries):
    bits, row_any = kernels.predict_attention_mask(
        torch.zeros(n, queries, 8, device=device), torch.zeros(n, 8, 40, device=device)
    )
    assert bits.shape == (n, queries, 2)
    assert row_any.shape == (n, queries)


def test_predict_no_channels(kernels, device):
    check_bits(kernels, torch.zeros(1, 2, 0, device=device), torch.zeros(1, 0, 40, device=device))


@pytest.mark.parametrize("dtype", LOW_AND_SINGLE)
def test_predict_with_flags(kernels, device, generator, dtype):
    """The same bits and flags, in the flags that are given; those beside them stay as they are."""
    embed = integers(generator, 2, 5, 8).to(device, dtype)
    features = integers(generator, 2, 8, 100).to(device, dtype).abs()
    embed[:, 1] = -1 - embed[:, 1].abs()
    features[:, :, :] += 1
    expected_bits, expected = check_bits(kernels, embed, features)
    assert not expected.all()
    flags = torch.zeros(3, 2, 5, dtype=torch.bool, device=device)
    assert torch.equal(kernels.predict_attention_mask_with_flags(embed, features, flags[1]), expected_bits)
    assert torch.equal(flags[1], expected)
    assert not flags[::2].any()


# ---------------------------------------------------------------- resize_mask_features


def check_resize(kernels, features, sizes):
    flat = [side for size in sizes for side in size]
    given = kernels.resize_mask_features(features, flat)
    expected = reference.resize_mask_features(features.double(), flat)
    assert given.dtype == features.dtype
    assert given.is_contiguous()
    assert numerics.relative_error(given, expected) < numerics.tolerance(
        numerics.FORWARD, features.dtype, features.dtype
    )


@pytest.mark.parametrize("dtype", LOW_AND_SINGLE)
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 2, 16, 24), [(2, 3), (4, 6), (8, 12)]),  # the decoder's: all ratios in one pass
        ((2, 3, 8, 40), [(4, 20), (2, 10), (3, 7)]),  # two of them and another
        ((1, 1, 6, 10), [(3, 5), (3, 5), (6, 10)]),  # one of them twice, and the input itself
        ((1, 2, 7, 5), [(3, 2), (1, 1), (14, 10), (9, 13), (7, 2)]),  # odd, upscaling, one side only
        ((2, 1, 1, 1), [(1, 1), (4, 3)]),
        ((1, 1, 40, 1200), [(5, 150), (20, 600), (10, 300)]),  # wider than one program
    ],
)
def test_resize(kernels, device, generator, dtype, shape, sizes):
    check_resize(kernels, torch.randn(shape, generator=generator).to(device, dtype), sizes)


@pytest.mark.parametrize("flags", [(0, 4), (9, 100), (3, 7000)], ids=str)
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((2, 3, 16, 24), [2, 3, 8, 12]), ((1, 1, 8, 2000), [1, 250]), ((2, 3, 16, 24), [5, 5]), ((1, 0, 8, 8), [4, 4])],
    ids=["ratios", "two programs a row", "another size", "no channels"],
)
def test_resize_with_flags(kernels, device, generator, monkeypatch, shape, sizes, flags):
    """Whatever the memory held, all flags are False; the levels are the same."""
    made, around = kernels.empty_flags, torch.ones(50_000, dtype=torch.bool, device=device)

    def poisoned(*given):
        size, stride = (x := made(*given)).shape, x.stride()
        return around[16:].as_strided(size, stride)

    monkeypatch.setattr(kernels, "empty_flags", poisoned)
    features = torch.randn(shape, generator=generator).to(device)
    levels, found = kernels.resize_mask_features_with_flags(features, sizes, *flags)
    assert torch.equal(levels, kernels.resize_mask_features(features, sizes))
    assert found.shape == (flags[0], shape[0], flags[1])
    assert all(x.is_contiguous() and x.storage_offset() % 16 == 0 for x in found)
    assert not found.any()
    assert around[:16].all()
    last = (
        16 + sum((n - 1) * step for n, step in zip(found.shape, found.stride(), strict=True)) if found.numel() else 15
    )
    assert around[last + 1 :].all()


@pytest.mark.parametrize("sizes", [[(4, 4), (2, 2), (1, 1)], [(3, 5)]])
def test_resize_strided(kernels, device, generator, sizes):
    wide = torch.randn(2, 16, 8, 3, generator=generator).to(device)
    check_resize(kernels, wide.permute(0, 3, 2, 1)[..., ::2], sizes)  # channels last
    check_resize(kernels, wide.permute(3, 0, 2, 1)[..., :8], sizes)
    check_resize(kernels, torch.randn(8, 8, generator=generator).to(device).expand(2, 3, 8, 8), sizes)


def test_resize_large_level_keeps_its_coordinates(kernels, device, generator):
    """In float32 a coordinate near 20000 is off by a thousandth of a pixel."""
    check_resize(kernels, torch.randn(1, 1, 1, 20000, generator=generator).to(device), [(1, 701)])


def test_resize_ratio_reads_nothing_but_the_centre(kernels, device):
    """NaN outside the four centre pixels does not reach the mean."""
    features = torch.full((1, 1, 8, 8), torch.nan, device=device)
    features[..., 3:5, 3:5] = torch.arange(4.0).view(2, 2)
    assert kernels.resize_mask_features(features, [1, 1]).item() == 1.5


@pytest.mark.parametrize("shape", [(0, 2, 8, 8), (2, 0, 8, 8)])
def test_resize_empty(kernels, device, shape):
    assert kernels.resize_mask_features(torch.zeros(shape, device=device), [4, 4]).shape == (*shape[:2], 16)
