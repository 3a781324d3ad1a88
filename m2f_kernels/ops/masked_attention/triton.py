"""Triton kernels of masked attention: see `reference.py` for what they compute and `docs/triton.md` for how."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels._triton import MAX_GRID, VERSION, architecture, contiguous_last, dot, in_parts, launch, strides
from m2f_kernels.masks import WORD
from m2f_kernels.ops.masked_attention import configs

_WORD = tl.constexpr(WORD)
_LN2 = tl.constexpr(math.log(2))


# ---------------------------------------------------------------- the mask
# AXIS is the axis of the keys in a tile: 1 in [queries, keys], 0 in [keys, queries].


@triton.jit
def _load_words(
    bits_ptr, rows, exists, empty, first_word, num_words, num_keys, WORDS: tl.constexpr, AXIS: tl.constexpr
):
    """Mask words of some queries with the row rule applied; zero beyond the last key and the last query."""
    words = first_word + tl.arange(0, WORDS)
    at = bits_ptr + tl.expand_dims(rows, AXIS) * num_words + tl.expand_dims(words, 1 - AXIS)
    stored = tl.load(at, mask=tl.expand_dims(exists, AXIS) & (tl.expand_dims(words, 1 - AXIS) < num_words), other=0)
    left = tl.minimum(tl.maximum(num_keys - words * _WORD, 0), _WORD)
    every = tl.where(left == _WORD, -1, (1 << tl.minimum(left, _WORD - 1)) - 1)
    return tl.where(tl.expand_dims(empty, AXIS), tl.expand_dims(every, 1 - AXIS), stored)


@triton.jit
def _expand(words, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, AXIS: tl.constexpr):
    """One bool per query and key."""
    bit = tl.arange(0, _WORD)
    if AXIS == 1:
        attend = tl.reshape((words[:, :, None] >> bit[None, None, :]) & 1, (BLOCK_Q, BLOCK_K))
    else:
        attend = tl.reshape((words[:, None, :] >> bit[None, :, None]) & 1, (BLOCK_K, BLOCK_Q))
    return attend != 0


@triton.jit
def _active_tiles(
    bits_ptr, rows, exists, empty, first_key, num_words, num_keys, TILES: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The tiles of keys, of TILES, that any query attends to: a scalar with one bit for each, and their number.

    Known before the loop over tiles, so that the loop has no branch and its loads can be issued ahead.
    """
    WORDS: tl.constexpr = BLOCK_K // _WORD
    words = _load_words(bits_ptr, rows, exists, empty, first_key // _WORD, num_words, num_keys, TILES * WORDS, 1)
    some = tl.max((words != 0).to(tl.int32), axis=0)
    tiles = tl.max(tl.reshape(some, (TILES, WORDS)), axis=1)
    return tl.sum(tiles << tl.arange(0, TILES), axis=0), tl.sum(tiles, axis=0)


@triton.jit
def _lowest_bit(active):
    """Index of the lowest set bit: the exponent of that power of two."""
    return ((active & -active).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _load_rows(start_ptr, first, stride, num_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `first` and following of a matrix with D columns, as [BLOCK, BLOCK_D], zero outside."""
    rows = tl.arange(0, BLOCK)
    channels = tl.arange(0, BLOCK_D)
    at = start_ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    inside = first + rows[:, None] < num_rows
    if D != BLOCK_D:
        inside = inside & (channels[None, :] < D)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _load_row(start_ptr, row, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row, as float32 [1, BLOCK_D]."""
    channels = tl.arange(0, BLOCK_D)
    return tl.load(start_ptr + tl.cast(row, tl.int64) * stride + channels, mask=channels < D, other=0.0).to(tl.float32)[
        None, :
    ]


@triton.jit
def _any_non_finite(x):
    """True if a matrix has a NaN or an infinity."""
    return tl.max(tl.max(((tl.abs(x) < float("inf")) == 0).to(tl.int32), axis=1), axis=0) != 0


# ---------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["num_queries", "num_keys", "query_blocks"])
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr, output_ptr, logsumexp_ptr, sums_ptr, statistics_ptr,
    query_n, query_h, query_q, key_n, key_h, key_s, value_n, value_h, value_s,
    num_queries, num_keys, num_words, query_blocks, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
    KEYS_FIRST: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one head against TILES tiles of BLOCK_K keys, with online softmax.

    DIRECT: there is one program for all keys, and it writes the output. Otherwise it writes the unnormalised output,
    the maximum and the sum of its keys, which `_combine_kernel` puts together.
    """
    split = tl.program_id(0) // query_blocks
    first_query = (tl.program_id(0) % query_blocks) * BLOCK_Q
    h = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    first_key = split * (TILES * BLOCK_K)
    queries = first_query + tl.arange(0, BLOCK_Q)
    exists = queries < num_queries
    # From here on offsets within this image: 32 bits, which take half the registers.
    bits_ptr += n * num_queries * num_words
    empty = tl.load(row_any_ptr + n * num_queries + queries, mask=exists, other=1).to(tl.int32) == 0
    active, count = _active_tiles(bits_ptr, queries, exists, empty, first_key, num_words, num_keys, TILES, BLOCK_K)

    key_ptr += n * key_n + h.to(tl.int64) * key_h
    value_ptr += n * value_n + h.to(tl.int64) * value_h
    query_ptr += n * query_n + h.to(tl.int64) * query_h
    q = _load_rows(query_ptr, first_query, query_q, num_queries, D, BLOCK_Q, BLOCK_D)
    AXIS: tl.constexpr = 0 if KEYS_FIRST else 1
    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    if KEYS_FIRST:
        acc = tl.zeros((BLOCK_D, BLOCK_Q), tl.float32)
    else:
        acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for _ in range(count):
        first = first_key + _lowest_bit(active) * BLOCK_K
        active = active & (active - 1)
        words = _load_words(
            bits_ptr, queries, exists, empty, first // _WORD, num_words, num_keys, BLOCK_K // _WORD, AXIS
        )  # fmt: skip
        k = _load_rows(key_ptr, first, key_s, num_keys, D, BLOCK_K, BLOCK_D)
        v = _load_rows(value_ptr, first, value_s, num_keys, D, BLOCK_K, BLOCK_D)
        if KEYS_FIRST:
            scores = dot(k, tl.trans(q))
        else:
            scores = dot(q, tl.trans(k))
        scores = tl.where(_expand(words, BLOCK_Q, BLOCK_K, AXIS), scores * scale_log2, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=AXIS))
        # Before the first key: any finite maximum keeps exp2 from NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - tl.expand_dims(shift, AXIS))
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weights, axis=AXIS)
        acc = acc * tl.expand_dims(decay, AXIS)
        if KEYS_FIRST:
            acc += dot(tl.trans(v), weights.to(v.dtype))
        else:
            acc += dot(weights.to(v.dtype), v)
        maximum = new_maximum
    if KEYS_FIRST:
        acc = tl.trans(acc)
    if _any_non_finite(acc):
        # A value that is not finite spoils its whole column, also for queries that do not attend to it.
        maximum, total, acc = _forward_one_by_one(
            query_ptr, key_ptr, value_ptr, bits_ptr, queries, exists, empty, query_q, key_s, value_s, first_query,
            num_queries, first_key, tl.minimum(first_key + TILES * BLOCK_K, num_keys), num_words, scale_log2,
            D, BLOCK_D, BLOCK_Q,
        )  # fmt: skip

    _store_forward(
        output_ptr, logsumexp_ptr, sums_ptr, statistics_ptr, maximum, total, acc, split, query_blocks, n, queries,
        exists, num_queries, count, D, BLOCK_D, DIRECT,
    )  # fmt: skip


@triton.jit
def _store_forward(
    output_ptr, logsumexp_ptr, sums_ptr, statistics_ptr, maximum, total, acc, split, query_blocks, n, queries, exists,
    num_queries, count, D: tl.constexpr, BLOCK_D: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Store what a program of the forward found in `count` tiles of keys: the result, or its part of it."""
    h = tl.program_id(1)
    heads = tl.num_programs(1)
    channels = tl.arange(0, BLOCK_D)
    stored = exists[:, None] & (channels[None, :] < D)
    if DIRECT:
        at = output_ptr + ((n * num_queries + queries) * heads + h)[:, None] * D + channels[None, :]
        tl.store(at, (acc / total[:, None]).to(output_ptr.dtype.element_ty), mask=stored)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        tl.store(logsumexp_ptr + (n * heads + h) * num_queries + queries, (shift + tl.log2(total)) * _LN2, mask=exists)
    else:
        images = tl.num_programs(2)
        # [splits, N, H, Q]; the two statistics one after the other.
        row = ((split * images + n) * heads + h) * num_queries + queries
        everything = (tl.num_programs(0) // query_blocks).to(tl.int64) * images * heads * num_queries
        tl.store(statistics_ptr + row, maximum, mask=exists)
        tl.store(statistics_ptr + everything + row, total, mask=exists)
        if count > 0:
            tl.store(sums_ptr + row[:, None] * D + channels[None, :], acc, mask=stored)


@triton.jit
def _add_key(scores, attend, v, maximum, total, acc):
    """A step of online softmax with one key: its score for each query, in base 2, and its value."""
    new_maximum = tl.maximum(maximum, scores)
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - shift)
    decay = tl.exp2(maximum - shift)
    total = total * decay + weights
    acc = acc * decay[:, None] + tl.where(attend[:, None], weights[:, None] * v, 0.0)
    return new_maximum, total, acc


@triton.jit
def _forward_one_by_one(
    query_ptr, key_ptr, value_ptr, bits_ptr, rows, exists, empty, query_q, key_s, value_s, first_query, num_queries,
    first_key, end, num_words, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """The same sums computed key by key: only products with keys that are attended to are added.

    Queries are read again for each key, so that this rare path takes no registers from the frequent one.
    """
    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for j in range(first_key, end):
        word = tl.load(bits_ptr + rows * num_words + (j >> 5), mask=exists, other=0)
        attend = (((word >> (j & 31)) & 1) != 0) | empty
        k = _load_row(key_ptr, j, key_s, D, BLOCK_D)
        v = _load_row(value_ptr, j, value_s, D, BLOCK_D)
        q = _load_rows(query_ptr, first_query, query_q, num_queries, D, BLOCK_Q, BLOCK_D).to(tl.float32)
        scores = tl.where(attend, tl.sum(q * k, axis=1) * scale_log2, float("-inf"))
        maximum, total, acc = _add_key(scores, attend, v, maximum, total, acc)
    return maximum, total, acc


@triton.jit(do_not_specialize=["num_queries", "num_splits"])
def _combine_kernel(
    sums_ptr, statistics_ptr, output_ptr, logsumexp_ptr, num_queries, num_splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program combines the splits of one query of one head, CHUNK of them at a time."""
    q = tl.program_id(0)
    h = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    row = (n * heads + h) * num_queries + q
    all_rows = tl.num_programs(2).to(tl.int64) * heads * num_queries
    channels = tl.arange(0, BLOCK_D)
    top = float("-inf")
    for first in range(0, num_splits, CHUNK):
        splits = first + tl.arange(0, CHUNK)
        maxima = tl.load(statistics_ptr + splits * all_rows + row, mask=splits < num_splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(maxima, axis=0))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, num_splits, CHUNK):
        splits = first + tl.arange(0, CHUNK)
        at = splits * all_rows + row
        exists = splits < num_splits
        maxima = tl.load(statistics_ptr + at, mask=exists, other=float("-inf"))
        totals = tl.load(statistics_ptr + num_splits * all_rows + at, mask=exists, other=0.0)
        weights = tl.exp2(maxima - top)
        # A split without a key of this query has written nothing.
        read = (totals != 0)[:, None] & (channels[None, :] < D)
        parts = tl.load(sums_ptr + at[:, None] * D + channels[None, :], mask=read, other=0.0)
        total += tl.sum(weights * totals, axis=0)
        acc += tl.sum(weights[:, None] * parts, axis=0)
    to = output_ptr + ((n * num_queries + q) * heads + h) * D + channels
    tl.store(to, (acc / total).to(output_ptr.dtype.element_ty), mask=channels < D)
    tl.store(logsumexp_ptr + row, (top + tl.log2(total)) * _LN2)


def _loads_vectors(*tensors: Tensor) -> bool:
    """True if Triton can take every row to begin at a multiple of 16 bytes. It looks at addresses and at strides, which
    have to be multiples of 16, those of axes with one element too."""
    address = (x.storage_offset() * x.element_size() if x.is_meta else x.data_ptr() for x in tensors)
    return all(a % 16 == 0 for a in address) and all(s % 16 == 0 for x in tensors for s in x.stride()[:3])


def _inputs(query: Tensor, key: Tensor, value: Tensor, bits: Tensor, row_any: Tensor) -> dict[str, Any]:
    """The arguments that forward and backward kernels take, by name: inputs, their strides and sizes."""
    return {
        "query_ptr": query, "key_ptr": key, "value_ptr": value, "bits_ptr": bits, "row_any_ptr": row_any,
        **strides("query", query, "nhq"), **strides("key", key, "nhs"), **strides("value", value, "nhs"),
        "num_queries": query.shape[2], "num_keys": key.shape[2], "num_words": bits.shape[2],
    }  # fmt: skip


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, bits: Tensor, row_any: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`m2f::masked_attention`: the output [N, Q, H, D] and the log-sum-exp [N, H, Q] in float32."""
    n, heads, q, d = query.shape
    s = key.shape[2]
    if n > MAX_GRID:
        output, logsumexp = in_parts(
            lambda q_, k, v, b, r: masked_attention(q_, k, v, b, r, scale),
            MAX_GRID,
            (0,) * 5,
            query,
            key,
            value,
            bits,
            row_any,
        )
        return output, logsumexp
    output = query.new_empty(n, q, heads, d)
    logsumexp = query.new_empty(n, heads, q, dtype=torch.float32)
    if output.numel() == 0:
        return output, logsumexp
    if (masked := bits.shape[1]) < q:
        from m2f_kernels.ops.masked_attention import triton_open  # which imports this module

        if masked:
            first = masked_attention(query[:, :, :masked], key, value, bits, row_any, scale)
            output[:, :masked], logsumexp[:, :, :masked] = first
        triton_open.forward(query, key, value, output, logsumexp, masked, scale)
        return output, logsumexp
    query, key, value = contiguous_last(query), contiguous_last(key), contiguous_last(value)
    bits, row_any = bits.contiguous(), row_any.contiguous()
    device = architecture(query.device)
    config = configs.forward(device, VERSION, query.element_size(), q, d)
    block_q, block_k = config["BLOCK_Q"], config["BLOCK_K"]
    query_blocks, tiles = triton.cdiv(q, block_q), triton.cdiv(s, block_k)
    owned = configs.tiles_per_program(tiles, query_blocks * heads * n, device.multiprocessors, config["waves"])
    splits = triton.cdiv(tiles, owned)
    direct = splits == 1
    block_d = configs.padded(d)
    # Code of Triton 3.6's assembler (ptxas 12.8) for half-precision keys in the rows that cannot be loaded as vectors
    # gave wrong numbers on an H100: see docs/triton.md. Queries in the rows were right.
    keys_first = bool(config["KEYS_FIRST"]) and (query.element_size() == 4 or _loads_vectors(query, key, value))
    sums = statistics = output
    if not direct:
        sums = query.new_empty(splits, n, heads, q, d, dtype=torch.float32)
        statistics = query.new_empty(2, splits, n, heads, q, dtype=torch.float32)
    kernel, options = _forward_kernel, {"KEYS_FIRST": keys_first}
    # With 16 channels and 128 queries it spills on sm_80 with Triton 3.6.
    if configs.KERNEL == "lean" and query.element_size() == 2 and block_d >= 32 and scale > 0 and not keys_first:
        from m2f_kernels.ops.masked_attention.triton_lean import _forward_lean_kernel  # which imports this module

        kernel, options = _forward_lean_kernel, {}
    launch(
        kernel, (splits * query_blocks, heads, n), **_inputs(query, key, value, bits, row_any),
        output_ptr=output, logsumexp_ptr=logsumexp, sums_ptr=sums, statistics_ptr=statistics,
        query_blocks=query_blocks, scale_log2=scale * math.log2(math.e),
        D=d, BLOCK_D=block_d, BLOCK_Q=block_q, BLOCK_K=block_k, TILES=owned, DIRECT=direct, **options,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    if not direct:
        chunk = min(triton.next_power_of_2(splits), max(2048 // block_d, 1))
        launch(
            _combine_kernel, (q, heads, n), sums_ptr=sums, statistics_ptr=statistics, output_ptr=output,
            logsumexp_ptr=logsumexp, num_queries=q, num_splits=splits, D=d, BLOCK_D=block_d, CHUNK=chunk, num_warps=4,
        )  # fmt: skip
    return output, logsumexp


# ---------------------------------------------------------------- backward


@triton.jit
def _load_query_block(
    query_ptr, grad_ptr, output_ptr, logsumexp_ptr, first_query, query_q, grad_q, num_queries, heads,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The inputs of the backward for a block of queries of one head: q, the output's gradient, the log-sum-exp of the
    scores (base 2) and delta = rowsum(gradient * output)."""
    queries = first_query + tl.arange(0, BLOCK_Q)
    q = _load_rows(query_ptr, first_query, query_q, num_queries, D, BLOCK_Q, BLOCK_D)
    g = _load_rows(grad_ptr, first_query, grad_q, num_queries, D, BLOCK_Q, BLOCK_D)
    o = _load_rows(output_ptr, first_query, heads * D, num_queries, D, BLOCK_Q, BLOCK_D)
    lse2 = tl.load(logsumexp_ptr + queries, mask=queries < num_queries, other=0.0) / _LN2
    return q, g, lse2, tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)


@triton.jit
def _backward_tile(
    q, g, lse2, delta, k, v, words, scale_log2, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The gradients between one tile of keys and one block of queries, without the factor of the scores."""
    attend = _expand(words, BLOCK_Q, BLOCK_K, 0)
    # [keys, queries]. The score of a blocked pair is replaced, not multiplied by 0, since it may not be finite. Its
    # weight is then 0, so the bits are not needed below.
    exponent = dot(k, tl.trans(q)) * scale_log2 - lse2[None, :]
    # No weight exceeds 1; with scores so large that their rounding errors do, one would overflow. A NaN stays.
    weights = tl.where(attend, tl.exp2(tl.where(exponent > 0, 0.0, exponent)), 0.0)
    dv = dot(weights.to(g.dtype), g)
    ds = tl.where(weights != 0, weights * (dot(v, tl.trans(g)) - delta[None, :]), 0.0)
    if q.dtype == tl.float16:
        # The gradient of a scaled loss fits float16, its products with the values need not.
        largest = tl.max(tl.max(tl.abs(ds), axis=1), axis=0)
        shrink = tl.where((largest > 32768.0) & (largest < float("inf")), largest / 32768.0, 1.0)
        low = (ds / shrink).to(q.dtype)
        return dot(low, q) * shrink, dv, dot(tl.trans(low), k) * shrink
    low = ds.to(q.dtype)
    return dot(low, q), dv, dot(tl.trans(low), k)


@triton.jit
def _store_rows(
    start_ptr, first, stride, num_rows, x, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The counterpart of `_load_rows`."""
    rows = tl.arange(0, BLOCK)
    channels = tl.arange(0, BLOCK_D)
    at = start_ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    tl.store(at, x.to(start_ptr.dtype.element_ty), mask=(first + rows[:, None] < num_rows) & (channels[None, :] < D))


@triton.jit
def _query_gradient_one_by_one(
    parts_ptr, query_ptr, grad_ptr, output_ptr, logsumexp_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr, query_q,
    grad_q, key_s, value_s, first_query, end_query, num_queries, heads, first_key, end_key, num_words,
    scale, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ of some queries computed key by key: only products with keys that are attended to are added.

    It takes a few queries at a time and reads everything again for each key, so that this rare path takes no registers
    from the frequent one.
    """
    BLOCK: tl.constexpr = 16
    for first in range(first_query, tl.minimum(end_query, num_queries), BLOCK):
        queries = first + tl.arange(0, BLOCK)
        exists = queries < num_queries
        empty = tl.load(row_any_ptr + queries, mask=exists, other=1).to(tl.int32) == 0
        dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for j in range(first_key, end_key):
            word = tl.load(bits_ptr + queries * num_words + (j >> 5), mask=exists, other=0)
            attend = (((word >> (j & 31)) & 1) != 0) | empty
            k = _load_row(key_ptr, j, key_s, D, BLOCK_D)
            v = _load_row(value_ptr, j, value_s, D, BLOCK_D)
            q, g, lse2, delta = _load_query_block(
                query_ptr, grad_ptr, output_ptr, logsumexp_ptr, first, query_q, grad_q, num_queries, heads, D, BLOCK,
                BLOCK_D,
            )  # fmt: skip
            exponent = tl.sum(q.to(tl.float32) * k, axis=1) * scale_log2 - lse2
            weights = tl.exp2(tl.where(exponent > 0, 0.0, exponent))
            ds = weights * (tl.sum(g.to(tl.float32) * v, axis=1) - delta)
            dq += tl.where(attend[:, None], ds[:, None] * k, 0.0)
        _store_rows(parts_ptr, first, D, num_queries, dq * scale, D, BLOCK, BLOCK_D)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _backward_kernel(
    query_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr, grad_ptr, output_ptr, logsumexp_ptr, dkey_ptr, dvalue_ptr,
    parts_ptr,
    query_n, query_h, query_q, key_n, key_h, key_s, value_n, value_h, value_s, grad_n, grad_h, grad_q,
    num_queries, num_keys, num_words, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns TILES tiles of BLOCK_K keys of one head: it writes their dK and dV, and its part of dQ.

    ONE_BLOCK: all queries fit one block and are loaded once. Otherwise TILES is 1, and the program goes through the
    blocks of queries.
    """
    split = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    n = tl.program_id(2).to(tl.int64)
    first_key = split * (TILES * BLOCK_K)
    end = tl.minimum(first_key + TILES * BLOCK_K, num_keys)
    WORDS: tl.constexpr = BLOCK_K // _WORD
    key_ptr += n * key_n + h * key_h
    value_ptr += n * value_n + h * value_h
    query_ptr += n * query_n + h * query_h
    grad_ptr += n * grad_n + h * grad_h
    # dK, dV [N, S, H, D]; output [N, Q, H, D]; parts [splits, N, H, Q, D].
    dkey_ptr += (n * num_keys * heads + h) * D
    dvalue_ptr += (n * num_keys * heads + h) * D
    output_ptr += (n * num_queries * heads + h) * D
    logsumexp_ptr += (n * heads + h) * num_queries
    bits_ptr += n * num_queries * num_words
    row_any_ptr += n * num_queries
    parts_ptr += (((split * tl.num_programs(2) + n) * heads + h) * num_queries) * D

    if ONE_BLOCK:
        queries = tl.arange(0, BLOCK_Q)
        exists = queries < num_queries
        empty = tl.load(row_any_ptr + queries, mask=exists, other=1).to(tl.int32) == 0
        active, count = _active_tiles(bits_ptr, queries, exists, empty, first_key, num_words, num_keys, TILES, BLOCK_K)
        # Their gradient is zero; those beyond the last key store nothing.
        for tile in range(TILES):
            if ((active >> tile) & 1) == 0:
                first = first_key + tile * BLOCK_K
                nothing = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
                _store_rows(dkey_ptr, first, heads * D, num_keys, nothing, D, BLOCK_K, BLOCK_D)
                _store_rows(dvalue_ptr, first, heads * D, num_keys, nothing, D, BLOCK_K, BLOCK_D)
        q, g, lse2, delta = _load_query_block(
            query_ptr, grad_ptr, output_ptr, logsumexp_ptr, 0, query_q, grad_q, num_queries, heads, D, BLOCK_Q, BLOCK_D
        )  # fmt: skip
        dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        for _ in range(count):
            first = first_key + _lowest_bit(active) * BLOCK_K
            active = active & (active - 1)
            words = _load_words(bits_ptr, queries, exists, empty, first // _WORD, num_words, num_keys, WORDS, 0)
            k = _load_rows(key_ptr, first, key_s, num_keys, D, BLOCK_K, BLOCK_D)
            v = _load_rows(value_ptr, first, value_s, num_keys, D, BLOCK_K, BLOCK_D)
            dk, dv, more = _backward_tile(q, g, lse2, delta, k, v, words, scale_log2, BLOCK_Q, BLOCK_K)
            dq += more
            _store_rows(dkey_ptr, first, heads * D, num_keys, dk * scale, D, BLOCK_K, BLOCK_D)
            _store_rows(dvalue_ptr, first, heads * D, num_keys, dv, D, BLOCK_K, BLOCK_D)
        if _any_non_finite(dq):
            _query_gradient_one_by_one(
                parts_ptr, query_ptr, grad_ptr, output_ptr, logsumexp_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr,
                query_q, grad_q, key_s, value_s, 0, BLOCK_Q, num_queries, heads, first_key, end, num_words,
                scale, scale_log2, D, BLOCK_D,
            )  # fmt: skip
        else:
            _store_rows(parts_ptr, 0, D, num_queries, dq * scale, D, BLOCK_Q, BLOCK_D)
    else:
        k = _load_rows(key_ptr, first_key, key_s, num_keys, D, BLOCK_K, BLOCK_D)
        v = _load_rows(value_ptr, first_key, value_s, num_keys, D, BLOCK_K, BLOCK_D)
        all_dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        all_dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for first_query in range(0, num_queries, BLOCK_Q):
            queries = first_query + tl.arange(0, BLOCK_Q)
            exists = queries < num_queries
            empty = tl.load(row_any_ptr + queries, mask=exists, other=1).to(tl.int32) == 0
            words = _load_words(bits_ptr, queries, exists, empty, first_key // _WORD, num_words, num_keys, WORDS, 0)
            dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
            if tl.max(tl.max((words != 0).to(tl.int32), axis=1), axis=0) != 0:
                q, g, lse2, delta = _load_query_block(
                    query_ptr, grad_ptr, output_ptr, logsumexp_ptr, first_query, query_q, grad_q, num_queries, heads,
                    D, BLOCK_Q, BLOCK_D,
                )  # fmt: skip
                dk, dv, dq = _backward_tile(q, g, lse2, delta, k, v, words, scale_log2, BLOCK_Q, BLOCK_K)
                all_dk += dk
                all_dv += dv
            if _any_non_finite(dq):
                _query_gradient_one_by_one(
                    parts_ptr, query_ptr, grad_ptr, output_ptr, logsumexp_ptr, key_ptr, value_ptr, bits_ptr,
                    row_any_ptr, query_q, grad_q, key_s, value_s, first_query, first_query + BLOCK_Q, num_queries,
                    heads, first_key, end, num_words, scale, scale_log2, D, BLOCK_D,
                )  # fmt: skip
            else:
                _store_rows(parts_ptr, first_query, D, num_queries, dq * scale, D, BLOCK_Q, BLOCK_D)
        _store_rows(dkey_ptr, first_key, heads * D, num_keys, all_dk * scale, D, BLOCK_K, BLOCK_D)
        _store_rows(dvalue_ptr, first_key, heads * D, num_keys, all_dv, D, BLOCK_K, BLOCK_D)


@triton.jit(do_not_specialize=["num_queries", "num_splits"])
def _sum_kernel(
    parts_ptr, dquery_ptr, num_queries, num_splits, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """One program sums the parts of dQ of one query of one head, always in the same order."""
    q = tl.program_id(0)
    h = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    row = (n * heads + h) * num_queries + q
    all_rows = tl.num_programs(2).to(tl.int64) * heads * num_queries
    channels = tl.arange(0, BLOCK_D)
    dq = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, num_splits, CHUNK):
        splits = first + tl.arange(0, CHUNK)
        at = parts_ptr + (splits * all_rows + row)[:, None] * D + channels[None, :]
        dq += tl.sum(tl.load(at, mask=(splits < num_splits)[:, None] & (channels[None, :] < D), other=0.0), axis=0)
    to = dquery_ptr + ((n * num_queries + q) * heads + h) * D + channels
    tl.store(to, dq.to(dquery_ptr.dtype.element_ty), mask=channels < D)


def masked_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: Tensor,
    row_any: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`m2f::masked_attention_backward`: the gradients of query, key, value, as [N, Q, H, D] and [N, S, H, D]."""
    n, heads, q, d = query.shape
    s = key.shape[2]
    if n > MAX_GRID:
        given = (grad_output, query, key, value, bits, row_any, output, logsumexp)
        dquery, dkey, dvalue = in_parts(
            lambda g, q_, k, v, b, r, o, x: masked_attention_backward(g, q_, k, v, b, r, o, x, scale),
            MAX_GRID,
            (0,) * len(given),
            *given,
        )
        return dquery, dkey, dvalue
    dquery = query.new_empty(n, q, heads, d)
    if dquery.numel() == 0:
        return dquery, key.new_zeros(n, s, heads, d), value.new_zeros(n, s, heads, d)
    if (masked := bits.shape[1]) < q:
        from m2f_kernels.ops.masked_attention import triton_open  # which imports this module

        if masked:
            dquery[:, :masked], dkey, dvalue = masked_attention_backward(
                grad_output[:, :masked], query[:, :, :masked], key, value, bits, row_any,
                output[:, :masked], logsumexp[:, :, :masked], scale,
            )  # fmt: skip
        else:
            dkey, dvalue = key.new_empty(n, s, heads, d), value.new_empty(n, s, heads, d)
        triton_open.backward(
            grad_output, query, key, value, output, logsumexp, dquery, dkey, dvalue, masked, scale
        )  # fmt: skip
        return dquery, dkey, dvalue
    dkey, dvalue = key.new_empty(n, s, heads, d), value.new_empty(n, s, heads, d)
    query, key, value, grad = (contiguous_last(x) for x in (query, key, value, grad_output))
    bits, row_any, output, logsumexp = (x.contiguous() for x in (bits, row_any, output, logsumexp))
    device = architecture(query.device)
    config = configs.backward(device, VERSION, query.element_size(), q, d)
    block_q, block_k = config["BLOCK_Q"], config["BLOCK_K"]
    tiles = triton.cdiv(s, block_k)
    one_block = q <= block_q
    owned = 1
    if one_block:
        owned = configs.tiles_per_program(tiles, heads * n, device.multiprocessors, config["waves"])
    splits = triton.cdiv(tiles, owned)
    block_d = configs.padded(d)
    parts = query.new_empty(splits, n, heads, q, d, dtype=torch.float32)
    launch(
        _backward_kernel, (splits, heads, n), **_inputs(query, key, value, bits, row_any),
        grad_ptr=grad, output_ptr=output, logsumexp_ptr=logsumexp, dkey_ptr=dkey, dvalue_ptr=dvalue, parts_ptr=parts,
        **strides("grad", grad, "nqh"), scale=float(scale), scale_log2=scale * math.log2(math.e),
        D=d, BLOCK_D=block_d, BLOCK_Q=block_q, BLOCK_K=block_k, TILES=owned, ONE_BLOCK=one_block,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    chunk = min(triton.next_power_of_2(splits), max(2048 // block_d, 1))
    launch(
        _sum_kernel, (q, heads, n), parts_ptr=parts, dquery_ptr=dquery, num_queries=q, num_splits=splits,
        D=d, BLOCK_D=block_d, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return dquery, dkey, dvalue


# ---------------------------------------------------------------- with a bias


def masked_attention_with_bias(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`m2f::masked_attention_with_bias`; see `triton_bias.py`."""
    from m2f_kernels.ops.masked_attention import triton_bias  # which imports this module

    return triton_bias.masked_attention_with_bias(*arguments)


def masked_attention_with_bias_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """`m2f::masked_attention_with_bias_backward`; see `triton_bias.py`."""
    from m2f_kernels.ops.masked_attention import triton_bias

    return triton_bias.masked_attention_with_bias_backward(*arguments)
