"""A successor of masked attention's forward kernel, with fewer instructions and waits: see `docs/gpu.md`.

Selected by `M2F_ATTENTION=lean` before the first import; no GPU has run it. It computes what `triton.py`'s does, whose
numbers it does not give bit by bit: the scale is multiplied inside the exponent, and products of weights and values are
added to the accumulator after they are complete.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m2f_kernels._triton import dot
from m2f_kernels.masks import WORD
from m2f_kernels.ops.masked_attention.triton import (
    _any_non_finite,
    _forward_one_by_one,
    _load_rows,
    _load_words,
    _lowest_bit,
    _store_forward,
)

_WORD = tl.constexpr(WORD)


@triton.jit
def _active_tiles(
    bits_ptr, rows, exists, empty, first_key, num_words, num_keys, TILES: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The tiles of keys, of TILES, that any query attends to, as bits; and their number. See `triton.py`."""
    WORDS: tl.constexpr = BLOCK_K // _WORD
    tiles = tl.arange(0, TILES)
    there = first_key + tiles * BLOCK_K < num_keys
    index = first_key // _WORD + tl.arange(0, TILES * WORDS)
    at = bits_ptr + rows[:, None] * num_words + index[None, :]
    stored = tl.load(at, mask=exists[:, None] & (index[None, :] < num_words), other=0)
    # An empty row attends everywhere: any bit will do. The largest word is zero if all are.
    words = (stored | empty.to(tl.int32)[:, None]).to(tl.uint32, bitcast=True)
    active = (tl.max(tl.reshape(tl.max(words, axis=0), (TILES, WORDS)), axis=1) != 0) & there
    return tl.sum(active.to(tl.int32) << tiles, axis=0), tl.sum(active.to(tl.int32), axis=0)


@triton.jit
def _attends(words, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """One bool per query and key [BLOCK_Q, BLOCK_K]. Unlike a shift, the test of a bit is one instruction."""
    bit = 1 << tl.arange(0, _WORD)
    return tl.reshape(words[:, :, None] & bit[None, None, :], (BLOCK_Q, BLOCK_K)) != 0


@triton.jit(do_not_specialize=["num_queries", "num_keys", "query_blocks"])
def _forward_lean_kernel(
    query_ptr, key_ptr, value_ptr, bits_ptr, row_any_ptr, output_ptr, logsumexp_ptr, sums_ptr, statistics_ptr,
    query_n, query_h, query_q, key_n, key_h, key_s, value_n, value_h, value_s,
    num_queries, num_keys, num_words, query_blocks, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    """`_forward_kernel` in half precision, with queries as rows and a positive scale."""
    split = tl.program_id(0) // query_blocks
    first_query = (tl.program_id(0) % query_blocks) * BLOCK_Q
    h = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    first_key = split * (TILES * BLOCK_K)
    queries = first_query + tl.arange(0, BLOCK_Q)
    exists = queries < num_queries
    bits_ptr += n * num_queries * num_words
    empty = tl.load(row_any_ptr + n * num_queries + queries, mask=exists, other=1).to(tl.int32) == 0
    key_ptr += n * key_n + h.to(tl.int64) * key_h
    value_ptr += n * value_n + h.to(tl.int64) * value_h
    query_ptr += n * query_n + h.to(tl.int64) * query_h
    q = _load_rows(query_ptr, first_query, query_q, num_queries, D, BLOCK_Q, BLOCK_D)
    active, count = _active_tiles(bits_ptr, queries, exists, empty, first_key, num_words, num_keys, TILES, BLOCK_K)
    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)  # of the scores, without the scale
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for _ in range(count):
        first = first_key + _lowest_bit(active) * BLOCK_K
        active = active & (active - 1)
        words = _load_words(bits_ptr, queries, exists, empty, first // _WORD, num_words, num_keys, BLOCK_K // _WORD, 1)
        k = _load_rows(key_ptr, first, key_s, num_keys, D, BLOCK_K, BLOCK_D)
        v = _load_rows(value_ptr, first, value_s, num_keys, D, BLOCK_K, BLOCK_D)
        scores = tl.where(_attends(words, BLOCK_Q, BLOCK_K), dot(q, tl.trans(k)), float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum * scale_log2)
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        decay = tl.exp2(maximum * scale_log2 - shift)
        total = total * decay + tl.sum(weights, axis=1)
        # A product of its own: accumulated into `acc`, which is scaled between, it is issued ahead of the next tile's
        # scores, and the assembler then waits for each of its instructions.
        acc = tl.fma(acc, tl.broadcast_to(decay[:, None], (BLOCK_Q, BLOCK_D)), dot(weights.to(v.dtype), v))
        maximum = new_maximum
    maximum = maximum * scale_log2
    if _any_non_finite(acc):
        maximum, total, acc = _forward_one_by_one(
            query_ptr, key_ptr, value_ptr, bits_ptr, queries, exists, empty, query_q, key_s, value_s, first_query,
            num_queries, first_key, tl.minimum(first_key + TILES * BLOCK_K, num_keys), num_words, scale_log2,
            D, BLOCK_D, BLOCK_Q,
        )  # fmt: skip
    _store_forward(
        output_ptr, logsumexp_ptr, sums_ptr, statistics_ptr, maximum, total, acc, split, query_blocks, n, queries,
        exists, num_queries, count, D, BLOCK_D, DIRECT,
    )  # fmt: skip
