"""Triton kernels of the attention masks: see `reference.py` for what they compute and `docs/triton.md` for how."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels._triton import launch
from m2f_kernels.masks import WORD

_WORD = tl.constexpr(WORD)


def _empty_mask(like: Tensor, n: int, q: int, s: int) -> tuple[Tensor, Tensor]:
    """Space for the bits, and row flags that are False until a kernel stores True."""
    bits = torch.empty(n, q, (s + WORD - 1) // WORD, dtype=torch.int32, device=like.device)
    return bits, torch.zeros(n, q, dtype=torch.bool, device=like.device)


# ---------------------------------------------------------------- pack_attention_mask


@triton.jit
def _pack_kernel(
    mask, bits, row_any, stride_n, stride_q, stride_s, num_queries, num_keys, num_words,
    IS_BOOL: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program packs WORDS words of one row."""
    row = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    keys = words[:, None] * _WORD + tl.arange(0, _WORD)[None, :]
    start = mask + (row // num_queries) * stride_n + (row % num_queries) * stride_q
    value = tl.load(start + keys.to(tl.int64) * stride_s, mask=keys < num_keys, other=0)
    if IS_BOOL:
        attend = value != 0
    else:
        # A logit of NaN attends, as it does where the published rule compares its sigmoid.
        attend = (value.to(tl.float32) < 0) == 0
    attend = attend & (keys < num_keys)
    packed = tl.sum(attend.to(tl.int32) << tl.arange(0, _WORD)[None, :], axis=1)
    tl.store(bits + row * num_words + words, packed, mask=words < num_words)
    if tl.max((packed != 0).to(tl.int32), axis=0) != 0:
        tl.store(row_any + row, True)


def pack_attention_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`m2f::pack_attention_mask`: mask [N, Q, S], bool or logits, of any strides."""
    n, q, s = mask.shape
    bits, row_any = _empty_mask(mask, n, q, s)
    if bits.numel() == 0:
        return bits, row_any
    words = bits.shape[2]
    block = min(triton.next_power_of_2(words), 32)
    launch(
        _pack_kernel, (n * q, triton.cdiv(words, block)), mask, bits, row_any, *mask.stride(), q, s, words,
        IS_BOOL=mask.dtype == torch.bool, WORDS=block, num_warps=4,
    )  # fmt: skip
    return bits, row_any
