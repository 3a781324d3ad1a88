"""Attention masks in plain PyTorch, for devices without a kernel. It costs no more than the published code.

The published code resizes the full-resolution logits of each layer, takes their sigmoid, repeats it for every head and
compares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype
from m2f_kernels.masks import WORD

#: Eight bytes of 0 or 1 in an int64, the first the lowest, times this have the eight as bits in their highest byte:
#: byte i moves by 56 - 7 i, and no two products of a byte and a term meet. The other one is what eight ones give.
_GATHER = sum(1 << 56 - 7 * i for i in range(8))
_ALL_ONES = 0x0101010101010101 * _GATHER % 2**64 - 2**64


def resize_mask_features(mask_features: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """As `reference.resize_mask_features`, but as separate levels [N, C, h, w]: joining them would copy them."""
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    if mask_features.numel() == 0:
        return [mask_features.new_empty(*mask_features.shape[:2], h, w) for h, w in pairs]
    features = mask_features.to(accumulation_dtype(mask_features.dtype))
    resized = (F.interpolate(features, size=pair, mode="bilinear", align_corners=False) for pair in pairs)
    return [level.to(mask_features.dtype) for level in resized]


def predict_attention_mask(mask_embed: Tensor, level_features: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.predict_attention_mask`."""
    dtype = accumulation_dtype(mask_embed.dtype)
    return pack_attention_mask(mask_embed.to(dtype) @ level_features.to(dtype))


def pack_attention_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.pack_attention_mask`."""
    bits = _words(mask, False) if mask.dtype == torch.bool else _words(mask < 0, True)
    return bits, bits.any(-1)


def _words(flags: Tensor, inverted: bool) -> Tensor:
    """int32 [N, Q, ceil(S/32)], the bits of bool [N, Q, S] or of its inverse, zero beyond S."""
    n, q, s = flags.shape
    words = (s + WORD - 1) // WORD
    if s % WORD or not flags.is_contiguous() or flags.storage_offset() % 8:
        flags = F.pad(flags, (0, words * WORD - s), value=inverted)
    eights = flags.contiguous().view(torch.int64)
    found = torch.rsub(eights, _ALL_ONES, alpha=_GATHER) if inverted else eights * _GATHER
    # The highest byte of each, which comes last in memory.
    return found.view(torch.uint8).view(n, q, 4 * words, 8)[..., 7].contiguous().view(torch.int32)
