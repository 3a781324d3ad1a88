"""The Triton kernels of the attention masks, called directly, against the reference."""

from __future__ import annotations

import pytest
import torch

from m2f_kernels.masks import WORD
from m2f_kernels.ops.attention_mask import reference

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
