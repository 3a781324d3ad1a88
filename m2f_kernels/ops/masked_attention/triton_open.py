"""Triton kernels for the queries without a mask, in `masked_attention` with a mask for its first queries only.

The first queries run the kernels of `triton.py`. The queries after them attend to every key, by the kernels here, which
need no memory beyond the output and one number per query: keys are not split, so nothing grows with queries times keys.
Gradients of keys and values are added to those of the masked queries, in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels._triton import VERSION, architecture, contiguous_last, dot, launch, strides
from m2f_kernels.ops.masked_attention import configs
from m2f_kernels.ops.masked_attention.triton import _LN2, _load_query_block, _load_rows, _store_rows


@triton.jit
def _place(blocks, heads):
    """Block, head and image of this program, all from one axis of the grid: the other axes are limited to 65535."""
    program = tl.program_id(0)
    head = program // blocks
    return program % blocks, (head % heads).to(tl.int64), (head // heads).to(tl.int64)


@triton.jit
def _add_keys(scores, v, maximum, total, acc):
    """A step of online softmax: `scores` [queries, keys], in base 2, and the values of these keys."""
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    # Before the first key: any finite maximum keeps exp2 from NaN.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(maximum - shift)
    total = total * decay + tl.sum(weights, axis=1)
    acc = acc * decay[:, None] + dot(weights.to(v.dtype), v)
    return new_maximum, total, acc


@triton.jit(do_not_specialize=["first", "num_queries", "num_keys", "blocks"])
def _open_forward_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, logsumexp_ptr,
    query_n, query_h, query_q, key_n, key_h, key_s, value_n, value_h, value_s,
    first, num_queries, num_keys, blocks, heads, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one head, from query `first` on, against all keys, with online softmax."""
    block, h, n = _place(blocks, heads)
    first_query = first + block * BLOCK_Q
    queries = first_query + tl.arange(0, BLOCK_Q)
    key_ptr += n * key_n + h * key_h
    value_ptr += n * value_n + h * value_h
    q = _load_rows(query_ptr + n * query_n + h * query_h, first_query, query_q, num_queries, D, BLOCK_Q, BLOCK_D)
    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first_key in range(0, num_keys, BLOCK_K):
        k = _load_rows(key_ptr, first_key, key_s, num_keys, D, BLOCK_K, BLOCK_D)
        v = _load_rows(value_ptr, first_key, value_s, num_keys, D, BLOCK_K, BLOCK_D)
        exists = first_key + tl.arange(0, BLOCK_K) < num_keys
        scores = tl.where(exists[None, :], dot(q, tl.trans(k)) * scale_log2, float("-inf"))
        maximum, total, acc = _add_keys(scores, v, maximum, total, acc)
    output_ptr += (n * num_queries * heads + h) * D
    _store_rows(output_ptr, first_query, heads * D, num_queries, acc / total[:, None], D, BLOCK_Q, BLOCK_D)
    at = logsumexp_ptr + (n * heads + h) * num_queries + queries
    tl.store(at, (maximum + tl.log2(total)) * _LN2, mask=queries < num_queries)


@triton.jit
def _pair_weights(k, q, lse2, scale_log2):
    """The weights [keys, queries] from the saved log-sum-exp, at most 1 in spite of rounding."""
    exponent = dot(k, tl.trans(q)) * scale_log2 - lse2[None, :]
    return tl.exp2(tl.where(exponent > 0, 0.0, exponent))


@triton.jit
def _gradient_dot(ds, x):
    """`ds` @ `x` in float32, where `ds` may be beyond float16: the gradient of a scaled loss fits, its products with
    the values need not."""
    if x.dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(ds), axis=1), axis=0)
        shrink = tl.where((largest > 32768.0) & (largest < float("inf")), largest / 32768.0, 1.0)
        return dot((ds / shrink).to(x.dtype), x) * shrink
    else:
        return dot(ds.to(x.dtype), x)


@triton.jit(do_not_specialize=["first", "num_queries", "num_keys", "blocks"])
def _open_keys_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, output_ptr, logsumexp_ptr, dkey_ptr, dvalue_ptr,
    query_n, query_h, query_q, key_n, key_h, key_s, value_n, value_h, value_s, grad_n, grad_h, grad_q,
    first, num_queries, num_keys, blocks, heads, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One program: the share of all queries from `first` on in dK and dV of BLOCK_K keys of one head.

    ADD: dkey and dvalue contain the share of the masked queries.
    """
    block, h, n = _place(blocks, heads)
    first_key = block * BLOCK_K
    query_ptr += n * query_n + h * query_h
    grad_ptr += n * grad_n + h * grad_h
    output_ptr += (n * num_queries * heads + h) * D
    logsumexp_ptr += (n * heads + h) * num_queries
    dkey_ptr += (n * num_keys * heads + h) * D
    dvalue_ptr += (n * num_keys * heads + h) * D
    k = _load_rows(key_ptr + n * key_n + h * key_h, first_key, key_s, num_keys, D, BLOCK_K, BLOCK_D)
    v = _load_rows(value_ptr + n * value_n + h * value_h, first_key, value_s, num_keys, D, BLOCK_K, BLOCK_D)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first_query in range(first, num_queries, BLOCK_Q):
        # Those beyond the last are zero, and so are their gradients: they add nothing.
        q, g, lse2, delta = _load_query_block(
            query_ptr, grad_ptr, output_ptr, logsumexp_ptr, first_query, query_q, grad_q, num_queries, heads, D,
            BLOCK_Q, BLOCK_D
        )  # fmt: skip
        weights = _pair_weights(k, q, lse2, scale_log2)
        dv += dot(weights.to(g.dtype), g)
        ds = weights * (dot(v, tl.trans(g)) - delta[None, :])
        dk += _gradient_dot(ds, q)
    dk *= scale
    if ADD:
        dk += _load_rows(dkey_ptr, first_key, heads * D, num_keys, D, BLOCK_K, BLOCK_D).to(tl.float32)
        dv += _load_rows(dvalue_ptr, first_key, heads * D, num_keys, D, BLOCK_K, BLOCK_D).to(tl.float32)
    _store_rows(dkey_ptr, first_key, heads * D, num_keys, dk, D, BLOCK_K, BLOCK_D)
    _store_rows(dvalue_ptr, first_key, heads * D, num_keys, dv, D, BLOCK_K, BLOCK_D)


@triton.jit(do_not_specialize=["first", "num_queries", "num_keys", "blocks"])
def _open_queries_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, output_ptr, logsumexp_ptr, dquery_ptr,
    query_n, query_h, query_q, key_n, key_h, key_s, value_n, value_h, value_s, grad_n, grad_h, grad_q,
    first, num_queries, num_keys, blocks, heads, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: dQ of BLOCK_Q queries of one head, from query `first` on."""
    block, h, n = _place(blocks, heads)
    first_query = first + block * BLOCK_Q
    key_ptr += n * key_n + h * key_h
    value_ptr += n * value_n + h * value_h
    q, g, lse2, delta = _load_query_block(
        query_ptr + n * query_n + h * query_h, grad_ptr + n * grad_n + h * grad_h,
        output_ptr + (n * num_queries * heads + h) * D,
        logsumexp_ptr + (n * heads + h) * num_queries, first_query, query_q, grad_q, num_queries, heads,
        D, BLOCK_Q, BLOCK_D,
    )  # fmt: skip
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first_key in range(0, num_keys, BLOCK_K):
        # Keys beyond the last are zero: they add nothing.
        k = _load_rows(key_ptr, first_key, key_s, num_keys, D, BLOCK_K, BLOCK_D)
        v = _load_rows(value_ptr, first_key, value_s, num_keys, D, BLOCK_K, BLOCK_D)
        ds = _pair_weights(k, q, lse2, scale_log2) * (dot(v, tl.trans(g)) - delta[None, :])
        dq += _gradient_dot(tl.trans(ds), k)
    dquery_ptr += (n * num_queries * heads + h) * D
    _store_rows(dquery_ptr, first_query, heads * D, num_queries, dq * scale, D, BLOCK_Q, BLOCK_D)


def _inputs(query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor) -> dict[str, Any]:
    """The arguments that all kernels take, by name: tensors, strides and sizes."""
    return {
        "query_ptr": query, "key_ptr": key, "value_ptr": value, "output_ptr": output, "logsumexp_ptr": logsumexp,
        **strides("query", query, "nhq"), **strides("key", key, "nhs"), **strides("value", value, "nhs"),
        "num_queries": query.shape[2], "num_keys": key.shape[2], "heads": query.shape[1],
    }  # fmt: skip


def forward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, first: int, scale: float
) -> None:
    """Write output [N, Q, H, D] and logsumexp [N, H, Q] of the queries from `first` on."""
    n, heads, q, d = query.shape
    query, key, value = contiguous_last(query), contiguous_last(key), contiguous_last(value)
    config = configs.open_forward(architecture(query.device), VERSION, query.element_size(), d)
    blocks = triton.cdiv(q - first, config["BLOCK_Q"])
    launch(
        _open_forward_kernel, (blocks * heads * n,), **_inputs(query, key, value, output, logsumexp),
        first=first, blocks=blocks, scale_log2=scale * math.log2(math.e), D=d, BLOCK_D=configs.padded(d), **config,
    )  # fmt: skip


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    first: int,
    scale: float,
) -> None:
    """Write dquery [N, Q, H, D] of the queries from `first` on; their share of dkey and dvalue [N, S, H, D] is added
    to what the tensors hold where `first` > 0, else written."""
    n, heads, q, d = query.shape
    s = key.shape[2]
    query, key, value, grad = (contiguous_last(x) for x in (query, key, value, grad))
    output, logsumexp = output.contiguous(), logsumexp.contiguous()
    config = configs.open_backward(architecture(query.device), VERSION, query.element_size(), d)
    given = {
        **_inputs(query, key, value, output, logsumexp), "grad_ptr": grad, **strides("grad", grad, "nqh"),
        "first": first, "scale": float(scale), "scale_log2": scale * math.log2(math.e),
        "D": d, "BLOCK_D": configs.padded(d), **config,
    }  # fmt: skip
    blocks = triton.cdiv(s, config["BLOCK_K"])
    launch(
        _open_keys_kernel, (blocks * heads * n,), dkey_ptr=dkey, dvalue_ptr=dvalue, blocks=blocks, ADD=first > 0,
        **given,
    )  # fmt: skip
    blocks = triton.cdiv(q - first, config["BLOCK_Q"])
    launch(_open_queries_kernel, (blocks * heads * n,), dquery_ptr=dquery, blocks=blocks, **given)
