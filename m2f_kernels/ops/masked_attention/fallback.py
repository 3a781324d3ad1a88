"""Masked attention in plain PyTorch, for devices without a kernel. It costs no more than the published code.

The published code is `torch.nn.MultiheadAttention` with a mask: a product, a softmax that autograd saves, a product.
Here one mask serves all heads, and blocked keys that are not finite contribute nothing, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._checks import readable
from m2f_kernels._dtypes import accumulation_dtype, without_autocast
from m2f_kernels.masks import PackedMask
from m2f_kernels.ops._autograd import differentiable_once
from m2f_kernels.ops.masked_attention import reference


def blocked(mask: PackedMask | Tensor, first_key: int, queries: int, keys: int) -> Tensor:
    """bool [N, queries, keys], True = may not attend.

    Args:
        mask: packed or bool [N, R, M], True = attend, for the first R queries and M keys from `first_key` on; all other
            pairs attend. If it covers all keys, a row without any True attends everywhere.
    """
    if isinstance(mask, Tensor):
        open_, row_any, covered = mask, mask.any(-1, keepdim=True), mask.shape[2]
    else:
        places = torch.arange(8, dtype=torch.uint8, device=mask.bits.device)
        octets = mask.bits.contiguous().view(torch.uint8).unsqueeze(-1)
        covered = mask.num_keys
        open_, row_any = (octets >> places & 1).flatten(-2)[..., :covered], mask.row_any.unsqueeze(-1)
    # 0 < 1: this key is not attended to, and another is.
    found = open_ < row_any if covered == keys else open_ == 0
    if found.shape[1:] == (queries, keys):
        return found
    return F.pad(found, (first_key, keys - covered - first_key, 0, queries - found.shape[1]), value=False)


def _finite(x: Tensor) -> Tensor:
    """The tensor with zeros in place of NaN and infinity."""
    return torch.nan_to_num(x, nan=0, posinf=0, neginf=0)


def _scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocked: Tensor | None,
    scale: float,
    by_row: Tensor | None,
    by_column: Tensor | None,
) -> Tensor:
    """Scores [N*H, Q, S], -inf where blocked. Arguments as of `_Attention`."""
    # NaN for values that are not finite, else 0: it makes the scores of queries that attend to them NaN.
    poison = (value * 0).sum(-1).unsqueeze(1)
    scores = torch.baddbmm(poison, query, key.transpose(1, 2), alpha=scale)
    if by_row is not None and by_column is not None:
        sides = by_row.shape[2], by_column.shape[2]
        scores.unflatten(2, sides).add_(by_row.unsqueeze(3)).add_(by_column.unsqueeze(2))
    if blocked is not None:
        scores.unflatten(0, (blocked.shape[0], -1)).masked_fill_(blocked.unsqueeze(1), -torch.inf)
    return scores


def _gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    scale: float,
    sides: tuple[int, int] | None,
) -> list[Tensor]:
    """Gradients of query, key and value, and of the biases of rows and columns of `sides`."""
    grad_value = torch.bmm(weights.transpose(1, 2), grad)
    grad_weights = torch.bmm(grad, _finite(value).transpose(1, 2))
    # The weight of a blocked key is zero, and so is this factor; the key that it is multiplied with is finite.
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_query = torch.baddbmm(query.new_empty(()), grad_scores, _finite(key), beta=0, alpha=scale)
    grad_key = torch.baddbmm(query.new_empty(()), grad_scores.transpose(1, 2), query, beta=0, alpha=scale)
    gradients = [grad_query, grad_key, grad_value]
    if sides is not None:
        places = grad_scores.unflatten(2, sides)
        gradients += [places.sum(3), places.sum(2)]
    return gradients


class _Attention(torch.autograd.Function):
    """Output [N*H, Q, D] and weights [N*H, Q, S] of query, key, value [N*H, *, D], blocked [N, Q, S] or None, and a
    bias [N*H, Q, h] of rows and [N*H, Q, w] of columns or None."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocked: Tensor | None,
        scale: float,
        by_row: Tensor | None,
        by_column: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        weights = _scores(query, key, value, blocked, scale, by_row, by_column).softmax(-1)
        return torch.bmm(weights, _finite(value)), weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, _, ctx.scale, by_row, by_column = inputs
        ctx.sides = None if by_row is None else (by_row.shape[2], by_column.shape[2])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        if grad is None:
            return (None,) * 7
        gradients = _gradients(grad, query, key, value, weights, ctx.scale, ctx.sides)
        found = differentiable_once("masked attention", tuple(gradients), [grad, *ctx.saved_tensors])
        return *found[:3], None, None, *(found[3:] or (None, None))


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocked: Tensor | None,
    scale: float,
    by_row: Tensor | None = None,
    by_column: Tensor | None = None,
) -> Tensor:
    """The output of `reference.masked_attention`, in query's dtype throughout; nothing is blocked if `blocked` is None.

    A query that attends to a value that is not finite has NaN in that head's output. Where checking is free (on a CPU)
    the reference computes it instead, which gives infinity in some channels.
    """
    if query.numel() == 0 or (readable(value) and not value.isfinite().all()):
        if blocked is None:
            blocked = key.new_zeros((), dtype=torch.bool).expand(query.shape[0], query.shape[2], key.shape[2])
        return reference.masked_attention(query, key, value, ~blocked, scale, by_row, by_column)[0]
    heads = [x.flatten(0, 1) for x in (query, key, value)]
    bias = [None if x is None else x.flatten(0, 1) for x in (by_row, by_column)]
    with without_autocast(query.device):  # which would make the weights float32, and gradients fail on two dtypes
        output: Tensor = _Attention.apply(*heads, blocked, scale, *bias)[0]
    return output.unflatten(0, query.shape[:2])


# ---------------------------------------------------------------- the registered operators, called directly


def attention_operator(
    query: Tensor, key: Tensor, value: Tensor, blocked: Tensor, scale: float, *bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [N, H, Q, D] and log-sum-exp [N, H, Q], as `reference.masked_attention`."""
    if query.numel() == 0 or (readable(value) and not value.isfinite().all()):
        return reference.masked_attention(query, key, value, ~blocked, scale, *bias)
    q, k, v = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    by_row, by_column = _flat(bias)
    with without_autocast(query.device):
        scores = _scores(q, k, v, blocked, scale, by_row, by_column).to(accumulation_dtype(query.dtype))
        logsumexp = scores.logsumexp(-1, keepdim=True)
        output = torch.bmm(scores.sub_(logsumexp).exp_().to(query.dtype), _finite(v))
    return output.unflatten(0, query.shape[:2]), logsumexp[..., 0].unflatten(0, query.shape[:2])


def attention_operator_backward(
    grad_output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocked: Tensor,
    scale: float,
    *bias: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and the biases, from that of the output, [N, H, Q, D], and the log-sum-exp."""
    q, k, v = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    by_row, by_column = _flat(bias)
    sides = None if by_row is None or by_column is None else (by_row.shape[2], by_column.shape[2])
    with without_autocast(query.device):
        scores = _scores(q, k, v, blocked, scale, by_row, by_column).to(logsumexp.dtype)
        weights = scores.sub_(logsumexp.flatten(0, 1).unsqueeze(-1)).exp_().to(query.dtype)
        gradients = _gradients(grad_output.flatten(0, 1), q, k, v, weights, scale, sides)
    return tuple(x.unflatten(0, query.shape[:2]) for x in gradients)


def _flat(bias: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if not bias:
        return None, None
    by_row, by_column = (x.flatten(0, 1) for x in bias)
    return by_row, by_column
