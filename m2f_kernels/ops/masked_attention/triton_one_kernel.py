"""Masked attention that predicts its own mask: an alternative to `predict_attention_mask` and `masked_attention`.

A program owns one tile of keys of one image. It multiplies mask embeddings and level features once, keeps the
thresholded result in registers, and goes through all heads with it: no bits are written, and there is one launch less.
The price is that every tile writes a partial sum per head and query, where `triton.py` adds several tiles up first.
Which of the two is faster only a GPU can tell (`benchmarks/bench_masked_attention.py` compares them there); until one
has, nothing calls this.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels._triton import architecture, contiguous_last, dot, launch
from m2f_kernels.ops.masked_attention import configs
from m2f_kernels.ops.masked_attention.triton import _any_non_finite, _check_compiler, _combine_kernel, _load_rows


@triton.jit(do_not_specialize=["num_queries", "num_keys", "heads"])
def _tile_kernel(
    query, key, value, embed, features, row_any, sums, statistics,
    query_n, query_h, query_q, key_n, key_h, key_s, value_n, value_h, value_s, embed_n, embed_q, features_n, features_c,
    num_queries, num_keys, heads, scale_log2,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, EMPTY_ROWS: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries against one tile of BLOCK_K keys, head by head.

    EMPTY_ROWS: the second pass, for queries whose mask turned out empty, which attend everywhere. Without any it ends
    at once.
    """
    split = tl.program_id(0)
    first_query = tl.program_id(1) * BLOCK_Q
    n = tl.program_id(2).to(tl.int64)
    first_key = split * BLOCK_K
    queries = first_query + tl.arange(0, BLOCK_Q)
    keys = first_key + tl.arange(0, BLOCK_K)
    exists = queries < num_queries
    rows = n * num_queries + queries
    if EMPTY_ROWS:
        written = exists & (tl.load(row_any + rows, mask=exists, other=1).to(tl.int32) == 0)
        if tl.max(written.to(tl.int32), axis=0) == 0:
            return
        attend = written[None, :] & (keys < num_keys)[:, None]
    else:
        written = exists
        logits = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
        for first in range(0, C, BLOCK_C):
            channels = first + tl.arange(0, BLOCK_C)
            e = tl.load(
                embed + n * embed_n + queries[:, None] * embed_q + channels[None, :],
                mask=exists[:, None] & (channels < C)[None, :], other=0.0,
            )  # fmt: skip
            f = tl.load(
                features + n * features_n + channels[:, None].to(tl.int64) * features_c + keys[None, :],
                mask=(channels < C)[:, None] & (keys < num_keys)[None, :], other=0.0,
            )  # fmt: skip
            logits += dot(tl.trans(f), tl.trans(e))
        # Not less: a logit of NaN attends.
        attend = ((logits < 0) == 0) & (keys < num_keys)[:, None] & exists[None, :]
        tl.store(row_any + rows, tl.full((BLOCK_Q,), 1, tl.int1), mask=tl.max(attend.to(tl.int32), axis=0) != 0)

    images = tl.num_programs(2)
    everything = tl.num_programs(0).to(tl.int64) * images * heads * num_queries
    d = tl.arange(0, BLOCK_D)
    for h in range(heads):
        head = tl.cast(h, tl.int64)
        q = _load_rows(query + n * query_n + head * query_h, first_query, query_q, num_queries, D, BLOCK_Q, BLOCK_D)
        k = _load_rows(key + n * key_n + head * key_h, first_key, key_s, num_keys, D, BLOCK_K, BLOCK_D)
        v = _load_rows(value + n * value_n + head * value_h, first_key, value_s, num_keys, D, BLOCK_K, BLOCK_D)
        scores = tl.where(attend, dot(k, tl.trans(q)) * scale_log2, float("-inf"))
        maximum = tl.max(scores, axis=0)
        weights = tl.exp2(scores - tl.where(maximum == float("-inf"), 0.0, maximum)[None, :])
        acc = dot(tl.trans(weights).to(v.dtype), v)
        if _any_non_finite(acc):
            # A value that is not finite spoils its column also for queries that do not attend to it: key by key.
            acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
            for j in range(BLOCK_K):
                here = (tl.arange(0, BLOCK_K) == j)[:, None]
                one = tl.max((attend & here).to(tl.int32), axis=0) != 0
                weight = tl.sum(tl.where(here & attend, weights, 0.0), axis=0)
                at = tl.cast(tl.minimum(first_key + j, num_keys - 1), tl.int64) * value_s
                v_row = tl.load(value + n * value_n + head * value_h + at + d, mask=d < D, other=0.0).to(tl.float32)
                acc += tl.where(one[:, None], weight[:, None] * v_row[None, :], 0.0)
        row = ((split * images + n) * heads + h) * num_queries + queries
        tl.store(statistics + row, maximum, mask=written)
        tl.store(statistics + everything + row, tl.sum(weights, axis=0), mask=written)
        tl.store(sums + row[:, None] * D + d[None, :], acc, mask=written[:, None] & (d < D)[None, :])


def predicted_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask_embed: Tensor, level_features: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention under the mask that `predict_attention_mask(mask_embed, level_features)` would give.

    Args:
        query: [N, H, Q, D]. float32, bfloat16 or float16.
        key, value: [N, H, S, D].
        mask_embed: [N, Q, C].
        level_features: [N, C, S].
        scale: factor of the scores.

    Returns:
        the output [N, Q, H, D] and the log-sum-exp [N, H, Q] in float32, as `masked_attention` gives them.
    """
    n, heads, q, d = query.shape
    s, c = key.shape[2], mask_embed.shape[2]
    output = query.new_empty(n, q, heads, d)
    logsumexp = query.new_empty(n, heads, q, dtype=torch.float32)
    if output.numel() == 0:
        return output, logsumexp
    _check_compiler(architecture(query.device))
    query, key, value = contiguous_last(query), contiguous_last(key), contiguous_last(value)
    embed, features = contiguous_last(mask_embed), contiguous_last(level_features)
    block_d, single = configs.padded(d), query.element_size() == 4
    block_q = min(configs.padded(q), 32 if single or block_d > 64 else 64)
    block_k, block_c = (32, 32) if single or block_d > 64 else (64, 64)
    splits = triton.cdiv(s, block_k)
    sums = query.new_empty(splits, n, heads, q, d, dtype=torch.float32)
    statistics = query.new_empty(2, splits, n, heads, q, dtype=torch.float32)
    row_any = torch.zeros(n, q, dtype=torch.bool, device=query.device)
    for empty_rows in (False, True):
        launch(
            _tile_kernel, (splits, triton.cdiv(q, block_q), n),
            query, key, value, embed, features, row_any, sums, statistics,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *embed.stride()[:2], *features.stride()[:2],
            q, s, heads, scale * math.log2(math.e),
            C=c, D=d, BLOCK_C=block_c, BLOCK_D=block_d, BLOCK_Q=block_q, BLOCK_K=block_k, EMPTY_ROWS=empty_rows,
            num_warps=4 if single and block_d <= 64 else 8, num_stages=1,
        )  # fmt: skip
    chunk = min(triton.next_power_of_2(splits), max(2048 // block_d, 1))
    launch(
        _combine_kernel, (q, heads, n), sums, statistics, output, logsumexp, q, splits,
        D=d, BLOCK_D=block_d, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return output, logsumexp
