"""Triton kernels for masked attention with a bias of rows and columns of keys.

A tile is a run of BLOCK_K keys within one row of keys. Its bias is then one number for each query, of the row, and one
for each query and column; and a program that walks through the rows keeps the latter in registers: nothing is looked up
for each pair. Three kernels: forward; gradients of keys and values; gradients of queries and bias. All of them write
what no other program writes, and parts are added up in a fixed order.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels._triton import MAX_GRID, VERSION, architecture, contiguous_last, dot, in_parts, launch, strides
from m2f_kernels.masks import WORD
from m2f_kernels.ops.masked_attention import configs
from m2f_kernels.ops.masked_attention.triton import (
    _add_key,
    _any_non_finite,
    _combine_kernel,
    _expand,
    _load_query_block,
    _load_row,
    _load_rows,
    _store_rows,
    _sum_kernel,
)
from m2f_kernels.ops.masked_attention.triton_open import _add_keys, _gradient_dot, _place

_WORD = tl.constexpr(WORD)
_LOG2E = tl.constexpr(math.log2(math.e))


# ---------------------------------------------------------------- pieces
# AXIS is the axis of the keys in a tile: 1 in [queries, keys], 0 in [keys, queries].


@triton.jit
def _attends(
    bits_ptr, row_any_ptr, queries, masked, exists, first, in_row, num_words,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, AXIS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One bool per query and key, of the keys from `first` on, which need not begin a word. Queries from `masked` on
    have no bits, and like those with an empty mask they attend everywhere."""
    attend = tl.expand_dims(exists, AXIS) & tl.expand_dims(in_row, 1 - AXIS)
    if MASKED:
        words = first // _WORD + tl.arange(0, BLOCK_K // _WORD)
        shift = (first % _WORD).to(tl.uint32)
        stored = tl.expand_dims(queries < masked, AXIS)
        at = bits_ptr + tl.expand_dims(queries, AXIS) * num_words + tl.expand_dims(words, 1 - AXIS)
        low = tl.load(at, mask=stored & (tl.expand_dims(words, 1 - AXIS) < num_words), other=0)
        high = tl.load(at + 1, mask=stored & (tl.expand_dims(words, 1 - AXIS) + 1 < num_words), other=0)
        low = low.to(tl.uint32, bitcast=True) >> shift
        high = (high.to(tl.uint32, bitcast=True) << 1) << (31 - shift)
        empty = tl.load(row_any_ptr + queries, mask=queries < masked, other=0).to(tl.int32) == 0
        attend = attend & (_expand(low | high, BLOCK_Q, BLOCK_K, AXIS) | tl.expand_dims(empty, AXIS))
    return attend


@triton.jit
def _one_key(
    key_ptr, value_ptr, bits_ptr, row_any_ptr, key_s, value_s, queries, masked, exists, place, num_words,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One bool per query, true where it attends to one key; the key and its value."""
    attend = exists
    if MASKED:
        word = tl.load(bits_ptr + queries * num_words + place // _WORD, mask=queries < masked, other=0)
        empty = tl.load(row_any_ptr + queries, mask=queries < masked, other=0).to(tl.int32) == 0
        attend = attend & ((((word >> (place % _WORD)) & 1) != 0) | empty)
    return attend, _load_row(key_ptr, place, key_s, D, BLOCK_D), _load_row(value_ptr, place, value_s, D, BLOCK_D)


@triton.jit
def _bias_of(start_ptr, stride_q, queries, exists, place, stride):
    """The bias of one row or column of keys, one number for each query, in base 2."""
    return tl.load(start_ptr + queries * stride_q + place * stride, mask=exists, other=0.0).to(tl.float32) * _LOG2E


@triton.jit
def _bias_of_columns(by_column_ptr, column_q, column_k, queries, exists, columns, width, AXIS: tl.constexpr):
    """The bias of several columns of keys, for each query and column, in base 2."""
    at = by_column_ptr + tl.expand_dims(queries, AXIS) * column_q + tl.expand_dims(columns, 1 - AXIS) * column_k
    inside = tl.expand_dims(exists, AXIS) & (tl.expand_dims(columns, 1 - AXIS) < width)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32) * _LOG2E


# ---------------------------------------------------------------- forward


@triton.jit(
    do_not_specialize=[
        "num_queries", "height", "width", "masked", "num_words", "query_blocks", "column_blocks", "rows", "splits",
    ]
)  # fmt: skip
def _biased_forward_kernel(
    query_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr, by_row_ptr, by_column_ptr, sums_ptr, statistics_ptr,
    query_n, query_h, query_q, key_n, key_h, key_s, value_n, value_h, value_s,
    row_n, row_h, row_q, row_k, column_n, column_h, column_q, column_k,
    num_queries, height, width, masked, num_words, query_blocks, column_blocks, rows, splits, heads, images, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
    IN_FLOAT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one head against BLOCK_K columns of `rows` rows of keys, with online softmax.

    It writes the unnormalised output, the maximum and the sum of its keys, for `_combine_kernel`.
    """
    block, h, n = _place(query_blocks * splits, heads)
    first_query = (block % query_blocks) * BLOCK_Q
    split = block // query_blocks
    first_column = (split % column_blocks) * BLOCK_K
    first_row = (split // column_blocks) * rows
    end_row = tl.minimum(first_row + rows, height)
    queries = first_query + tl.arange(0, BLOCK_Q)
    exists = queries < num_queries
    columns = first_column + tl.arange(0, BLOCK_K)
    # From here on offsets within this head: 32 bits, which take half the registers.
    bits_ptr += n * masked * num_words
    row_any_ptr += n * masked
    by_row_ptr += n * row_n + h * row_h
    by_column_ptr += n * column_n + h * column_h
    key_ptr += n * key_n + h * key_h
    value_ptr += n * value_n + h * value_h
    query_ptr += n * query_n + h * query_h
    q = _load_rows(query_ptr, first_query, query_q, num_queries, D, BLOCK_Q, BLOCK_D)
    if IN_FLOAT:
        q = q.to(tl.float32)
    of_columns = _bias_of_columns(by_column_ptr, column_q, column_k, queries, exists, columns, width, 1)
    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for row in range(first_row, end_row):
        first = row * width + first_column
        end = (row + 1) * width
        k = _load_rows(key_ptr, first, key_s, end, D, BLOCK_K, BLOCK_D)
        v = _load_rows(value_ptr, first, value_s, end, D, BLOCK_K, BLOCK_D)
        if IN_FLOAT:
            k, v = k.to(tl.float32), v.to(tl.float32)
        of_row = _bias_of(by_row_ptr, row_q, queries, exists, row, row_k)
        attend = _attends(
            bits_ptr, row_any_ptr, queries, masked, exists, first, columns < width, num_words, BLOCK_Q, BLOCK_K, 1,
            MASKED
        )  # fmt: skip
        scores = dot(q, tl.trans(k)) * scale_log2 + (of_row[:, None] + of_columns)
        scores = tl.where(attend, scores, float("-inf"))
        maximum, total, acc = _add_keys(scores, v, maximum, total, acc)
    if _any_non_finite(acc):
        # A value that is not finite spoils its whole column, also for queries that do not attend to it.
        maximum, total, acc = _biased_forward_one_by_one(
            query_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr, by_row_ptr, by_column_ptr, query_q, key_s, value_s,
            row_q, row_k, column_q,
            column_k, queries, exists, first_query, num_queries, first_row, end_row, first_column, width, masked,
            num_words, scale_log2, D, BLOCK_D, BLOCK_Q, BLOCK_K, MASKED,
        )  # fmt: skip
    # [splits, N, H, Q]; the two statistics one after the other.
    at = ((split * images + n) * heads + h) * num_queries + queries
    everything = tl.cast(splits, tl.int64) * images * heads * num_queries
    tl.store(statistics_ptr + at, maximum, mask=exists)
    tl.store(statistics_ptr + everything + at, total, mask=exists)
    channels = tl.arange(0, BLOCK_D)
    tl.store(sums_ptr + at[:, None] * D + channels[None, :], acc, mask=exists[:, None] & (channels[None, :] < D))


@triton.jit
def _biased_forward_one_by_one(
    query_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr, by_row_ptr, by_column_ptr, query_q, key_s, value_s, row_q,
    row_k, column_q, column_k,
    queries, exists, first_query, num_queries, first_row, end_row, first_column, width, masked, num_words, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The same sums computed key by key: only products with keys that are attended to are added.

    Everything is read again for each key, so that this rare path takes no registers from the frequent one.
    """
    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for row in range(first_row, end_row):
        for column in range(first_column, tl.minimum(first_column + BLOCK_K, width)):
            attend, k, v = _one_key(
                key_ptr, value_ptr, bits_ptr, row_any_ptr, key_s, value_s, queries, masked, exists,
                row * width + column, num_words, D, BLOCK_D, MASKED,
            )  # fmt: skip
            q = _load_rows(query_ptr, first_query, query_q, num_queries, D, BLOCK_Q, BLOCK_D).to(tl.float32)
            bias = _bias_of(by_row_ptr, row_q, queries, exists, row, row_k)
            bias += _bias_of(by_column_ptr, column_q, queries, exists, column, column_k)
            scores = tl.where(attend, tl.sum(q * k, axis=1) * scale_log2 + bias, float("-inf"))
            maximum, total, acc = _add_key(scores, attend, v, maximum, total, acc)
    return maximum, total, acc


# ---------------------------------------------------------------- backward


@triton.jit
def _pair_gradients(products, of_values, bias, lse2, delta, attend, scale_log2, AXIS: tl.constexpr):
    """Weights of a tile and the gradients of its scores, from the products of queries and keys and those of gradients
    and values. Pairs that are blocked get exactly 0."""
    exponent = products * scale_log2 + bias - tl.expand_dims(lse2, AXIS)
    # No weight exceeds 1; with scores so large that their rounding errors do, one would overflow. A NaN stays.
    weights = tl.where(attend, tl.exp2(tl.where(exponent > 0, 0.0, exponent)), 0.0)
    return weights, tl.where(weights != 0, weights * (of_values - tl.expand_dims(delta, AXIS)), 0.0)


@triton.jit(do_not_specialize=["num_queries", "height", "width", "masked", "num_words", "column_blocks"])
def _biased_keys_kernel(
    query_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr, by_row_ptr, by_column_ptr, grad_ptr, output_ptr,
    logsumexp_ptr, dkey_ptr, dvalue_ptr,
    query_n, query_h, query_q, key_n, key_h, key_s, value_n, value_h, value_s, grad_n, grad_h, grad_q,
    row_n, row_h, row_q, row_k, column_n, column_h, column_q, column_k,
    num_queries, height, width, masked, num_words, column_blocks, heads, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_K keys in one row of keys of one head."""
    block, h, n = _place(column_blocks * height, heads)
    row = block // column_blocks
    first_column = (block % column_blocks) * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    first = row * width + first_column
    end = (row + 1) * width
    bits_ptr += n * masked * num_words
    row_any_ptr += n * masked
    by_row_ptr += n * row_n + h * row_h
    by_column_ptr += n * column_n + h * column_h
    query_ptr += n * query_n + h * query_h
    grad_ptr += n * grad_n + h * grad_h
    # dK, dV [N, S, H, D]; output [N, Q, H, D].
    output_ptr += (n * num_queries * heads + h) * D
    logsumexp_ptr += (n * heads + h) * num_queries
    dkey_ptr += (n * height * width * heads + h) * D
    dvalue_ptr += (n * height * width * heads + h) * D
    k = _load_rows(key_ptr + n * key_n + h * key_h, first, key_s, end, D, BLOCK_K, BLOCK_D)
    v = _load_rows(value_ptr + n * value_n + h * value_h, first, value_s, end, D, BLOCK_K, BLOCK_D)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first_query in range(0, num_queries, BLOCK_Q):
        queries = first_query + tl.arange(0, BLOCK_Q)
        exists = queries < num_queries
        q, g, lse2, delta = _load_query_block(
            query_ptr, grad_ptr, output_ptr, logsumexp_ptr, first_query, query_q, grad_q, num_queries, heads, D,
            BLOCK_Q, BLOCK_D
        )  # fmt: skip
        bias = _bias_of(by_row_ptr, row_q, queries, exists, row, row_k)[None, :]
        bias += _bias_of_columns(by_column_ptr, column_q, column_k, queries, exists, columns, width, 0)
        attend = _attends(
            bits_ptr, row_any_ptr, queries, masked, exists, first, columns < width, num_words, BLOCK_Q, BLOCK_K, 0,
            MASKED
        )  # fmt: skip
        weights, ds = _pair_gradients(
            dot(k, tl.trans(q)), dot(v, tl.trans(g)), bias, lse2, delta, attend, scale_log2, 0
        )  # fmt: skip
        dv += dot(weights.to(g.dtype), g)
        dk += _gradient_dot(ds, q)
    _store_rows(dkey_ptr, first, heads * D, end, dk * scale, D, BLOCK_K, BLOCK_D)
    _store_rows(dvalue_ptr, first, heads * D, end, dv, D, BLOCK_K, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "num_queries", "height", "width", "masked", "num_words", "query_blocks", "column_blocks", "rows", "splits",
    ]
)  # fmt: skip
def _biased_queries_kernel(
    query_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr, by_row_ptr, by_column_ptr, grad_ptr, output_ptr,
    logsumexp_ptr, dquery_ptr, drow_ptr, dcolumn_ptr,
    query_n, query_h, query_q, key_n, key_h, key_s, value_n, value_h, value_s, grad_n, grad_h, grad_q,
    row_n, row_h, row_q, row_k, column_n, column_h, column_q, column_k,
    num_queries, height, width, masked, num_words, query_blocks, column_blocks, rows, splits, heads, images,
    scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program: what BLOCK_K columns of `rows` rows of keys add to dQ and to the gradients of the bias, of BLOCK_Q
    queries of one head.

    Parts, in float32: dquery [splits, N, H, Q, D], drow [blocks of columns, N, H, Q, h], dcolumn [blocks of rows,
    N, H, Q, w].
    """
    block, h, n = _place(query_blocks * splits, heads)
    first_query = (block % query_blocks) * BLOCK_Q
    split = block // query_blocks
    column_block = split % column_blocks
    row_block = split // column_blocks
    first_column = column_block * BLOCK_K
    first_row = row_block * rows
    end_row = tl.minimum(first_row + rows, height)
    queries = first_query + tl.arange(0, BLOCK_Q)
    exists = queries < num_queries
    columns = first_column + tl.arange(0, BLOCK_K)
    bits_ptr += n * masked * num_words
    row_any_ptr += n * masked
    by_row_ptr += n * row_n + h * row_h
    by_column_ptr += n * column_n + h * column_h
    key_ptr += n * key_n + h * key_h
    value_ptr += n * value_n + h * value_h
    query_ptr += n * query_n + h * query_h
    grad_ptr += n * grad_n + h * grad_h
    output_ptr += (n * num_queries * heads + h) * D
    logsumexp_ptr += (n * heads + h) * num_queries
    dquery_ptr += ((split * images + n) * heads + h) * num_queries * D
    drow_ptr += ((column_block * images + n) * heads + h) * num_queries * height
    dcolumn_ptr += ((row_block * images + n) * heads + h) * num_queries * width
    q, g, lse2, delta = _load_query_block(
        query_ptr, grad_ptr, output_ptr, logsumexp_ptr, first_query, query_q, grad_q, num_queries, heads, D, BLOCK_Q,
        BLOCK_D
    )  # fmt: skip
    of_columns = _bias_of_columns(by_column_ptr, column_q, column_k, queries, exists, columns, width, 1)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    sum_of_columns = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for row in range(first_row, end_row):
        first = row * width + first_column
        end = (row + 1) * width
        k = _load_rows(key_ptr, first, key_s, end, D, BLOCK_K, BLOCK_D)
        v = _load_rows(value_ptr, first, value_s, end, D, BLOCK_K, BLOCK_D)
        bias = _bias_of(by_row_ptr, row_q, queries, exists, row, row_k)[:, None] + of_columns
        attend = _attends(
            bits_ptr, row_any_ptr, queries, masked, exists, first, columns < width, num_words, BLOCK_Q, BLOCK_K, 1,
            MASKED
        )  # fmt: skip
        _, ds = _pair_gradients(dot(q, tl.trans(k)), dot(g, tl.trans(v)), bias, lse2, delta, attend, scale_log2, 1)
        dq += _gradient_dot(ds, k)
        sum_of_columns += ds
        tl.store(drow_ptr + queries * height + row, tl.sum(ds, axis=1), mask=exists)
    at = dcolumn_ptr + queries[:, None] * width + columns[None, :]
    tl.store(at, sum_of_columns, mask=exists[:, None] & (columns[None, :] < width))
    if _any_non_finite(dq):
        _biased_query_gradient_one_by_one(
            dquery_ptr, query_ptr, grad_ptr, output_ptr, logsumexp_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr,
            by_row_ptr, by_column_ptr, query_q, grad_q,
            key_s, value_s, row_q, row_k, column_q, column_k, first_query, num_queries, heads, first_row, end_row,
            first_column, width, masked, num_words, scale, scale_log2, D, BLOCK_D, BLOCK_Q, BLOCK_K, MASKED,
        )  # fmt: skip
    else:
        _store_rows(dquery_ptr, first_query, D, num_queries, dq * scale, D, BLOCK_Q, BLOCK_D)


@triton.jit
def _biased_query_gradient_one_by_one(
    dquery_ptr, query_ptr, grad_ptr, output_ptr, logsumexp_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr, by_row_ptr,
    by_column_ptr, query_q, grad_q, key_s,
    value_s, row_q, row_k, column_q, column_k, first_query, num_queries, heads, first_row, end_row, first_column, width,
    masked, num_words, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dQ computed key by key, a few queries at a time: only products with keys that are attended to are added."""
    BLOCK: tl.constexpr = 16
    for start in range(first_query, tl.minimum(first_query + BLOCK_Q, num_queries), BLOCK):
        queries = start + tl.arange(0, BLOCK)
        exists = queries < num_queries
        dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for row in range(first_row, end_row):
            for column in range(first_column, tl.minimum(first_column + BLOCK_K, width)):
                attend, k, v = _one_key(
                    key_ptr, value_ptr, bits_ptr, row_any_ptr, key_s, value_s, queries, masked, exists,
                    row * width + column, num_words, D, BLOCK_D, MASKED,
                )  # fmt: skip
                q, g, lse2, delta = _load_query_block(
                    query_ptr, grad_ptr, output_ptr, logsumexp_ptr, start, query_q, grad_q, num_queries, heads, D,
                    BLOCK, BLOCK_D
                )  # fmt: skip
                bias = _bias_of(by_row_ptr, row_q, queries, exists, row, row_k)
                bias += _bias_of(by_column_ptr, column_q, queries, exists, column, column_k)
                products = tl.sum(q.to(tl.float32) * k, axis=1) * scale_log2
                exponent = products + bias - lse2
                weights = tl.exp2(tl.where(exponent > 0, 0.0, exponent))
                ds = weights * (tl.sum(g.to(tl.float32) * v, axis=1) - delta)
                dq += tl.where(attend[:, None], ds[:, None] * k, 0.0)
        _store_rows(dquery_ptr, start, D, num_queries, dq * scale, D, BLOCK, BLOCK_D)


# ---------------------------------------------------------------- launch


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis, in the same order each time."""
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)


def _rows_per_program(height: int, programs: int, multiprocessors: int, waves: int) -> int:
    """Rows of keys that one program takes, where there are `programs` of them for each row: as many as leave `waves`
    programs for each multiprocessor."""
    splits = min(max(round(multiprocessors * waves / programs), 1), height)
    return triton.cdiv(height, splits)


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, bits: Tensor, row_any: Tensor, by_row: Tensor, by_column: Tensor
) -> dict[str, Any]:
    """The arguments that all kernels take, by name: inputs, their strides and sizes."""
    return {
        "query_ptr": query, "key_ptr": key, "value_ptr": value, "bits_ptr": bits, "row_any_ptr": row_any,
        "by_row_ptr": by_row, "by_column_ptr": by_column,
        **strides("query", query, "nhq"), **strides("key", key, "nhs"), **strides("value", value, "nhs"),
        **strides("row", by_row, "nhqk"), **strides("column", by_column, "nhqk"),
        "num_queries": query.shape[2], "height": by_row.shape[3], "width": by_column.shape[3],
        "masked": bits.shape[1], "num_words": bits.shape[2],
    }  # fmt: skip


def masked_attention_with_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: Tensor,
    row_any: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`m2f::masked_attention_with_bias`: the output [N, Q, H, D] and the log-sum-exp [N, H, Q] in float32."""
    n, heads, q, d = query.shape
    if n > MAX_GRID:
        output, logsumexp = in_parts(
            partial(masked_attention_with_bias, scale=scale), MAX_GRID, (0,) * 7,
            query, key, value, bits, row_any, by_row, by_column,
        )  # fmt: skip
        return output, logsumexp
    output = query.new_empty(n, q, heads, d)
    logsumexp = query.new_empty(n, heads, q, dtype=torch.float32)
    if output.numel() == 0:
        return output, logsumexp
    query, key, value = contiguous_last(query), contiguous_last(key), contiguous_last(value)
    bits, row_any = bits.contiguous(), row_any.contiguous()
    height, width = by_row.shape[3], by_column.shape[3]
    device = architecture(query.device)
    config = configs.biased_forward(device, VERSION, query.element_size(), q, d, width)
    query_blocks, column_blocks = triton.cdiv(q, config["BLOCK_Q"]), triton.cdiv(width, config["BLOCK_K"])
    rows = _rows_per_program(height, query_blocks * column_blocks * heads * n, device.multiprocessors, waves=2)
    splits = column_blocks * triton.cdiv(height, rows)
    sums = query.new_empty(splits, n, heads, q, d, dtype=torch.float32)
    statistics = query.new_empty(2, splits, n, heads, q, dtype=torch.float32)
    block_d = configs.padded(d)
    launch(
        _biased_forward_kernel, (query_blocks * splits * heads * n,),
        **_inputs(query, key, value, bits, row_any, by_row, by_column), sums_ptr=sums, statistics_ptr=statistics,
        query_blocks=query_blocks, column_blocks=column_blocks, rows=rows, splits=splits, heads=heads, images=n,
        scale_log2=scale * math.log2(math.e), D=d, BLOCK_D=block_d, MASKED=bits.shape[1] > 0, **config,
    )  # fmt: skip
    chunk = min(triton.next_power_of_2(splits), max(2048 // block_d, 1))
    launch(
        _combine_kernel, (q, heads, n), sums_ptr=sums, statistics_ptr=statistics, output_ptr=output,
        logsumexp_ptr=logsumexp, num_queries=q, num_splits=splits, D=d, BLOCK_D=block_d, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return output, logsumexp


def masked_attention_with_bias_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: Tensor,
    row_any: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`m2f::masked_attention_with_bias_backward`: the gradients of query, key and value, as [N, Q, H, D] and
    [N, S, H, D], and of the bias, as [N, H, Q, h] and [N, H, Q, w]."""
    n, heads, q, d = query.shape
    s, height, width = key.shape[2], by_row.shape[3], by_column.shape[3]
    if n > MAX_GRID:
        dquery, dkey, dvalue, drow, dcolumn = in_parts(
            partial(masked_attention_with_bias_backward, scale=scale), MAX_GRID, (0,) * 10,
            grad_output, query, key, value, bits, row_any, by_row, by_column, output, logsumexp,
        )  # fmt: skip
        return dquery, dkey, dvalue, drow, dcolumn
    dquery = query.new_empty(n, q, heads, d)
    if dquery.numel() == 0:
        nothing = (key.new_zeros(n, s, heads, d), value.new_zeros(n, s, heads, d))
        return dquery, *nothing, by_row.new_zeros(by_row.shape), by_column.new_zeros(by_column.shape)
    dkey, dvalue = key.new_empty(n, s, heads, d), value.new_empty(n, s, heads, d)
    query, key, value, grad = (contiguous_last(x) for x in (query, key, value, grad_output))
    bits, row_any, output, logsumexp = (x.contiguous() for x in (bits, row_any, output, logsumexp))
    device = architecture(query.device)
    config = configs.biased_backward(device, VERSION, query.element_size(), q, d, width)
    query_blocks, column_blocks = triton.cdiv(q, config["BLOCK_Q"]), triton.cdiv(width, config["BLOCK_K"])
    block_d = configs.padded(d)
    given = {
        **_inputs(query, key, value, bits, row_any, by_row, by_column),
        "grad_ptr": grad, "output_ptr": output, "logsumexp_ptr": logsumexp, **strides("grad", grad, "nqh"),
        "column_blocks": column_blocks, "heads": heads, "scale": float(scale), "scale_log2": scale * math.log2(math.e),
        "D": d, "BLOCK_D": block_d, "MASKED": bits.shape[1] > 0, **config,
    }  # fmt: skip
    launch(_biased_keys_kernel, (column_blocks * height * heads * n,), dkey_ptr=dkey, dvalue_ptr=dvalue, **given)
    rows = _rows_per_program(height, query_blocks * column_blocks * heads * n, device.multiprocessors, waves=2)
    row_blocks = triton.cdiv(height, rows)
    splits = column_blocks * row_blocks
    parts = query.new_empty(splits, n, heads, q, d, dtype=torch.float32)
    drow = query.new_empty(column_blocks, n, heads, q, height, dtype=torch.float32)
    dcolumn = query.new_empty(row_blocks, n, heads, q, width, dtype=torch.float32)
    launch(
        _biased_queries_kernel, (query_blocks * splits * heads * n,), dquery_ptr=parts, drow_ptr=drow,
        dcolumn_ptr=dcolumn, query_blocks=query_blocks, rows=rows, splits=splits, images=n, **given,
    )  # fmt: skip
    chunk = min(triton.next_power_of_2(splits), max(2048 // block_d, 1))
    launch(
        _sum_kernel, (q, heads, n), parts_ptr=parts, dquery_ptr=dquery, num_queries=q, num_splits=splits,
        D=d, BLOCK_D=block_d, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return dquery, dkey, dvalue, _summed(drow, by_row.dtype), _summed(dcolumn, by_column.dtype)
