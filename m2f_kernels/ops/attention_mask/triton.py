"""Triton kernels of the attention masks: see `reference.py` for what they compute and `docs/triton.md` for how."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels._triton import (
    MAX_GRID,
    architecture,
    block_id,
    contiguous_last,
    dot,
    in_parts,
    launch,
    rows_and_blocks,
    strides,
)
from m2f_kernels.masks import WORD, empty_flags
from m2f_kernels.ops.attention_mask import configs

_WORD = tl.constexpr(WORD)


# ---------------------------------------------------------------- pack_attention_mask


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_words"])
def _pack_kernel(
    mask_ptr, bits_ptr, row_any_ptr, stride_n, stride_q, stride_s, num_queries, num_keys, num_words,
    IS_BOOL: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program packs WORDS words of one row."""
    row = tl.program_id(0).to(tl.int64)
    words = block_id() * WORDS + tl.arange(0, WORDS)
    keys = words[:, None] * _WORD + tl.arange(0, _WORD)[None, :]
    start = mask_ptr + (row // num_queries) * stride_n + (row % num_queries) * stride_q
    value = tl.load(start + keys.to(tl.int64) * stride_s, mask=keys < num_keys, other=0)
    if IS_BOOL:
        attend = value != 0
    else:
        # A NaN logit attends, as in the published code, which compares its sigmoid.
        attend = (value.to(tl.float32) < 0) == 0
    attend = attend & (keys < num_keys)
    packed = tl.sum(attend.to(tl.int32) << tl.arange(0, _WORD)[None, :], axis=1)
    tl.store(bits_ptr + row * num_words + words, packed, mask=words < num_words)
    if tl.max((packed != 0).to(tl.int32), axis=0) != 0:
        tl.store(row_any_ptr + row, True)


def pack_attention_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`m2f::pack_attention_mask`: mask [N, Q, S], bool or logits, of any strides."""
    n, q, s = mask.shape
    bits = torch.empty(n, q, (s + WORD - 1) // WORD, dtype=torch.int32, device=mask.device)
    row_any = torch.zeros(n, q, dtype=torch.bool, device=mask.device)  # False until a program stores True
    if bits.numel() == 0:
        return bits, row_any
    words = bits.shape[2]
    block = min(triton.next_power_of_2(words), 32)
    grid = rows_and_blocks(n * q, triton.cdiv(words, block))
    launch(
        _pack_kernel, grid, mask_ptr=mask, bits_ptr=bits, row_any_ptr=row_any, **strides("stride", mask, "nqs"),
        num_queries=q, num_keys=s, num_words=words, IS_BOOL=mask.dtype == torch.bool, WORDS=block, num_warps=4,
    )  # fmt: skip
    return bits, row_any


# ---------------------------------------------------------------- predict_attention_mask


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_words"])
def _predict_kernel(
    embed_ptr, features_ptr, bits_ptr, row_any_ptr, embed_n, embed_q, embed_c, features_n, features_c, features_s,
    num_queries, num_keys, num_words, C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the bits of BLOCK_S keys for BLOCK_Q queries of one image. Keys are the rows of the product."""
    n = tl.program_id(2).to(tl.int64)
    keys = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    queries = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, BLOCK_C)
    embed_at = embed_ptr + n * embed_n + queries.to(tl.int64)[:, None] * embed_q + channels[None, :] * embed_c
    features_at = features_ptr + n * features_n + channels.to(tl.int64)[:, None] * features_c
    features_at += keys.to(tl.int64)[None, :] * features_s
    logits = tl.zeros((BLOCK_S, BLOCK_Q), tl.float32)
    for start in range(0, C, BLOCK_C):
        if C % BLOCK_C == 0:
            e = tl.load(embed_at, mask=queries[:, None] < num_queries, other=0.0)
            f = tl.load(features_at, mask=keys[None, :] < num_keys, other=0.0)
        else:
            inside = start + channels < C
            e = tl.load(embed_at, mask=(queries[:, None] < num_queries) & inside[None, :], other=0.0)
            f = tl.load(features_at, mask=(keys[None, :] < num_keys) & inside[:, None], other=0.0)
        logits += dot(tl.trans(f), tl.trans(e))
        embed_at += BLOCK_C * embed_c
        features_at += tl.cast(BLOCK_C, tl.int64) * features_c
    # Not `logits >= 0`: a logit of NaN attends.
    attend = ((logits < 0) == 0) & (keys[:, None] < num_keys)
    shifted = attend.to(tl.int32) << (tl.arange(0, BLOCK_S) % _WORD)[:, None]
    packed = tl.sum(tl.reshape(shifted, (BLOCK_S // _WORD, _WORD, BLOCK_Q)), axis=1)
    words = tl.program_id(0) * (BLOCK_S // _WORD) + tl.arange(0, BLOCK_S // _WORD)
    rows = n * num_queries + queries
    stored = (words[:, None] < num_words) & (queries[None, :] < num_queries)
    tl.store(bits_ptr + rows[None, :] * num_words + words[:, None], packed, mask=stored)
    some = tl.max((packed != 0).to(tl.int32), axis=0) != 0
    # Every program that stores here stores True: no atomics.
    tl.store(row_any_ptr + rows, some, mask=some & (queries < num_queries))


def predict_attention_mask(mask_embed: Tensor, level_features: Tensor) -> tuple[Tensor, Tensor]:
    """`m2f::predict_attention_mask`: mask_embed [N, Q, C], level_features [N, C, S], both of any strides."""
    row_any = torch.zeros(mask_embed.shape[:2], dtype=torch.bool, device=mask_embed.device)
    return predict_attention_mask_with_flags(mask_embed, level_features, row_any), row_any


def predict_attention_mask_with_flags(mask_embed: Tensor, level_features: Tensor, row_any: Tensor) -> Tensor:
    """`m2f::predict_attention_mask_with_flags`: the bits. row_any [N, Q], contiguous and False, becomes the flags."""
    n, q, c = mask_embed.shape
    s = level_features.shape[2]
    bits = torch.empty(n, q, (s + WORD - 1) // WORD, dtype=torch.int32, device=mask_embed.device)
    if bits.numel() == 0:
        return bits
    config = configs.predict(architecture(mask_embed.device), mask_embed.element_size(), q, s)
    limit = MAX_GRID * config["BLOCK_Q"]
    if n > MAX_GRID or q > limit:
        most, axes = (MAX_GRID, (0, 0)) if n > MAX_GRID else (limit, (1, -1))
        bits, found = in_parts(predict_attention_mask, most, axes, mask_embed, level_features, joined=axes[0])
        row_any.copy_(found)
        return bits
    launch(
        _predict_kernel, (triton.cdiv(s, config["BLOCK_S"]), triton.cdiv(q, config["BLOCK_Q"]), n),
        embed_ptr=mask_embed, features_ptr=level_features, bits_ptr=bits, row_any_ptr=row_any,
        **strides("embed", mask_embed, "nqc"), **strides("features", level_features, "ncs"),
        num_queries=q, num_keys=s, num_words=bits.shape[2], C=c, **config,
    )  # fmt: skip
    return bits


# ---------------------------------------------------------------- resize_mask_features


@triton.jit(do_not_specialize=["num_flags", "start_2", "start_4", "start_8"])
def _shrink_kernel(
    features_ptr, out_ptr, flags_ptr, stride_n, stride_c, stride_h, num_channels, groups, width, total, num_flags,
    start_2, start_4, start_8, GROUP: tl.constexpr, BLOCK_W: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """One program reads GROUP rows of one channel and writes the rows of every level that depend on them.

    With FLAGS, the programs also set `num_flags` flags to False, FLAGS at a time.

    GROUP is the largest ratio. A level that is absent starts at -1. At an even integer ratio both bilinear weights are
    1/2: the mean of the four centre pixels.
    """
    plane = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    start = features_ptr + (plane // num_channels) * stride_n + (plane % num_channels) * stride_c
    start += (group * GROUP).to(tl.int64) * stride_h
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    if FLAGS:
        if tl.program_id(1) == 0:
            step = tl.num_programs(0).to(tl.int64) * FLAGS
            for first in range(tl.program_id(0).to(tl.int64) * FLAGS, num_flags, step):
                at = first + tl.arange(0, FLAGS)
                tl.store(flags_ptr + at, tl.zeros((FLAGS,), tl.int1), mask=at < num_flags)
    out_ptr += plane * total
    if start_2 >= 0:
        _shrink(start, out_ptr + start_2, stride_h, columns, group, width, 2, GROUP, BLOCK_W)
    if GROUP >= 4:
        if start_4 >= 0:
            _shrink(start, out_ptr + start_4, stride_h, columns, group, width, 4, GROUP, BLOCK_W)
    if GROUP >= 8:
        if start_8 >= 0:
            _shrink(start, out_ptr + start_8, stride_h, columns, group, width, 8, GROUP, BLOCK_W)


@triton.jit
def _shrink(
    start_ptr, out_ptr, stride_h, columns, group, width, RATIO: tl.constexpr, GROUP: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """The rows that one level has of a group; each reads its two centre rows whole, in order."""
    inside = columns < width
    column = tl.arange(0, BLOCK_W) % RATIO
    centre = (column == RATIO // 2 - 1) | (column == RATIO // 2)
    to = tl.program_id(1) * (BLOCK_W // RATIO) + tl.arange(0, BLOCK_W // RATIO)
    for i in tl.static_range(GROUP // RATIO):
        upper = start_ptr + (i * RATIO + RATIO // 2 - 1) * stride_h + columns
        sums = tl.load(upper, mask=inside, other=0.0).to(tl.float32)
        sums += tl.load(upper + stride_h, mask=inside, other=0.0).to(tl.float32)
        means = tl.sum(tl.reshape(tl.where(centre, sums, 0.0), (BLOCK_W // RATIO, RATIO)), axis=1) * 0.25
        row = out_ptr + (group * (GROUP // RATIO) + i) * (width // RATIO)
        tl.store(row + to, means.to(out_ptr.dtype.element_ty), mask=to < width // RATIO)


@triton.jit
def _interpolate_kernel(
    features_ptr, out_ptr, stride_n, stride_c, stride_h, stride_w, num_channels, height, width, h, w, start, total,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK pixels of one channel of one level: bilinear, any size."""
    plane = tl.program_id(0).to(tl.int64)
    pixels = block_id() * BLOCK + tl.arange(0, BLOCK)
    y, dy, below = _coordinate(pixels // w, height, h, WIDE)
    x, dx, right = _coordinate(pixels % w, width, w, WIDE)
    inside = pixels < h * w
    at = features_ptr + (plane // num_channels) * stride_n + (plane % num_channels) * stride_c
    at = at + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    below = below.to(tl.int64) * stride_h
    right = right.to(tl.int64) * stride_w
    top_left = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    top_right = tl.load(at + right, mask=inside, other=0.0).to(tl.float32)
    bottom_left = tl.load(at + below, mask=inside, other=0.0).to(tl.float32)
    bottom_right = tl.load(at + below + right, mask=inside, other=0.0).to(tl.float32)
    top = (1 - dx) * top_left + dx * top_right
    bottom = (1 - dx) * bottom_left + dx * bottom_right
    value = (1 - dy) * top + dy * bottom
    tl.store(out_ptr + plane * total + start + pixels, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _coordinate(i, size, new_size, WIDE: tl.constexpr):
    """Pixel below the source coordinate of pixel `i`, the fraction above it, and the step to the next pixel.

    (i + 1/2) * size / new_size - 1/2 in integers: no rounding, however large the level.
    """
    if WIDE:
        i = i.to(tl.int64)
    numerator = tl.maximum((2 * i + 1) * size - new_size, 0)
    pixel = numerator // (2 * new_size)
    fraction = (numerator - pixel * (2 * new_size)).to(tl.float32) / (2 * new_size)
    return pixel, fraction, tl.where(pixel + 1 < size, 1, 0)


def resize_mask_features(mask_features: Tensor, sizes: list[int]) -> Tensor:
    """`m2f::resize_mask_features`: [N, C, H, W] of any strides; the levels at ratios 2, 4, 8 in one pass."""
    return _resize(mask_features, sizes, None)


def resize_mask_features_with_flags(
    mask_features: Tensor, sizes: list[int], num_masks: int, num_queries: int
) -> tuple[Tensor, Tensor]:
    """`m2f::resize_mask_features_with_flags`: the same, and [num_masks, N, num_queries] flags that are False."""
    flags = empty_flags(mask_features, num_masks, mask_features.shape[0], num_queries)
    return _resize(mask_features, sizes, flags), flags


def _resize(mask_features: Tensor, sizes: list[int], flags: Tensor | None) -> Tensor:
    """The resized levels. `flags` are set to False."""
    n, c, height, width = mask_features.shape
    levels, total = [], 0
    for h, w in zip(sizes[::2], sizes[1::2], strict=True):
        levels.append((h, w, total))
        total += h * w
    out = mask_features.new_empty(n, c, total)
    if out.numel() == 0:
        if flags is not None:
            flags.zero_()
        return out
    # Rows are read whole: a copy of another layout costs less than reading it column by column at every level.
    features = contiguous_last(mask_features)
    shrunk: dict[int, int] = {}
    for h, w, start in levels:
        ratio = height // h
        whole = ratio in (2, 4, 8) and (h * ratio, w * ratio) == (height, width) and width <= MAX_GRID * 1024
        if whole and ratio not in shrunk:
            shrunk[ratio] = start
        else:
            block = min(triton.next_power_of_2(h * w), 512)
            grid = rows_and_blocks(n * c, triton.cdiv(h * w, block))
            launch(
                _interpolate_kernel, grid, features_ptr=features, out_ptr=out, **strides("stride", features, "nchw"),
                num_channels=c, height=height, width=width, h=h, w=w, start=start, total=total,
                WIDE=2 * max(h * height, w * width) >= 2**31, BLOCK=block, num_warps=4,
            )  # fmt: skip
    if flags is not None and not shrunk:
        flags.zero_()
    if shrunk:
        # The last mask's flags end where the memory does.
        num_flags = 0
        if flags is not None and flags.numel():
            num_flags = (flags.shape[0] - 1) * flags.stride(0) + flags[0].numel()
        group = max(shrunk)
        block = min(max(triton.next_power_of_2(width), group), 1024)
        # 16 bytes per thread and row.
        warps = min(max(block * features.element_size() // 512, 1), 4)
        launch(
            _shrink_kernel, (n * c * (height // group), triton.cdiv(width, block)),
            features_ptr=features, out_ptr=out, flags_ptr=out if flags is None else flags,
            **strides("stride", features, "nch"), num_channels=c, groups=height // group, width=width, total=total,
            num_flags=num_flags, **{f"start_{ratio}": shrunk.get(ratio, -1) for ratio in (2, 4, 8)},
            GROUP=group, BLOCK_W=block, FLAGS=0 if flags is None else 256, num_warps=warps,
        )  # fmt: skip
    return out
