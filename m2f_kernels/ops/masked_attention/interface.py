"""Masked attention: schemas, checks, fake kernels, autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels import dispatch
from m2f_kernels._checks import (
    check_dense,
    check_floating,
    check_number,
    check_same_device,
    check_same_dtype,
    check_shape,
    describe,
    host_size,
    readable,
)
from m2f_kernels._dtypes import accumulation_dtype, autocast
from m2f_kernels._library import LIBRARY
from m2f_kernels.masks import WORD, PackedMask, unpack, widen
from m2f_kernels.ops._autograd import (
    call,
    differentiable_once,
    reference_gradients,
    register_autograd,
    register_vmap,
)
from m2f_kernels.ops.attention_mask import pack_attention_mask
from m2f_kernels.ops.masked_attention import fallback, reference

__all__ = ["masked_attention"]

# ---------------------------------------------------------------- schemas
# Outputs and gradients are in memory as [N, Q, H, D] and [N, S, H, D], so that merging the heads of the public
# function's result needs no copy, whatever the layout of the inputs.

_TAGS = (torch.Tag.pt2_compliant_tag,)
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor bits, Tensor row_any"
LIBRARY.define(f"masked_attention({_INPUTS}, float scale) -> (Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(
    f"masked_attention_backward(Tensor grad_output, {_INPUTS}, Tensor output, Tensor logsumexp, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
# With a bias of rows and columns; its gradients are [N, H, Q, h] and [N, H, Q, w]. Operators of their own: those above
# are in exported programs.
_BIASED = f"{_INPUTS}, Tensor by_row, Tensor by_column"
LIBRARY.define(f"masked_attention_with_bias({_BIASED}, float scale) -> (Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(
    f"masked_attention_with_bias_backward(Tensor grad_output, {_BIASED}, Tensor output, Tensor logsumexp, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


# ---------------------------------------------------------------- public function


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask | Tensor | None = None,
    *,
    bias: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    first_key: int | None = None,
) -> Tensor:
    """Cross-attention in which each query attends only to its own mask (Cheng et al. 2022, section 3.2.1, equation 1).

    `softmax(scale * query key^T, over the keys that mask names) value`, the mask shared by all heads. Scores are never
    written; tiles that no query attends to are skipped; a blocked key contributes exactly nothing, even where it is
    NaN or infinite. A query whose mask is empty attends everywhere.

    Args:
        query: [N, H, Q, D]. float64, float32, bfloat16 or float16.
        key, value: [N, H, S, D], S >= 1. Any strides with unit stride in D: heads cut out of `[N, *, H*D]` by
            `x.unflatten(-1, (H, D)).transpose(1, 2)` need no copy.
        mask: from :func:`predict_attention_mask` or :func:`pack_attention_mask`; or bool [N, Q, S] or [N, 1, Q, S],
            True = attend, which is packed first. None, which only a call with a bias may have: all keys.
        bias: None, or (by_row [N, H, Q, h], by_column [N, H, Q, w]) with h * w = S: `by_row[..., s // w]` and
            `by_column[..., s % w]` are added to the score of key s, the keys being the pixels of h rows of w (SAM-3's
            decoder has such a bias for the box of each query). Any strides. A query without a bias has zeros. Their
            sum [N, H, Q, S] is never made.
        scale: factor of the scores; None for 1/sqrt(D).
        first_key: None if the mask covers all queries and keys. Otherwise `mask` [N, R, M] covers queries [0, R) and
            keys [first_key, first_key + M), and all other pairs attend: the self-attention of encoder-only models
            (EoMT, Kerssies et al. 2025, section 3.2), in which queries attend to patches under a mask. A query with an
            empty mask then attends everywhere only if the mask covers all keys.

    query, key, value and bias have one dtype; under autocast they are cast to autocast's. Arithmetic is float32;
    float64 runs through the reference.

    Returns:
        [N, H, Q, D] in query's dtype; in memory [N, Q, H, D], so that `out.transpose(1, 2).flatten(2)` copies nothing.
        Differentiable once in the floating tensors, the bias among them; only the output and one float32 log-sum-exp
        per query are saved for it. Bitwise deterministic, forward and backward, for any number of threads.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    check_floating("query", query, "[N, H, Q, D]")
    check_floating("key", key, "[N, H, S, D]")
    check_floating("value", value, "[N, H, S, D]")
    n, heads, _, d = query.shape
    s = key.shape[2]
    check_shape("key", key, "[N, H, S, D]", (n, heads, s, d))
    check_shape("value", value, "[N, H, S, D]", (n, heads, s, d))
    if d < 1 or s < 1:
        raise ValueError(f"key: expected at least one key and one channel per head; got {describe(key)}")
    for name, tensor in (("key", key), ("value", value)):
        check_same_device(name, tensor, "query", query)
    query, key, value = autocast(query), autocast(key), autocast(value)
    for name, tensor in (("key", key), ("value", value)):
        check_same_dtype(name, tensor, "query", query)
    scale = host_size(d) ** -0.5 if scale is None else check_number("scale", scale)
    sides = () if bias is None else _checked_bias(bias, query, s)
    part = None if mask is None and sides and first_key is None else _checked_part(mask, query, s, first_key)
    plain = dispatch.plain("masked_attention", query)
    if plain == "fallback":
        blocked = None if part is None else fallback.blocked(*part, query.shape[2], s)
        return fallback.masked_attention(query, key, value, blocked, scale, *sides)
    packed = _no_rows(query, s) if part is None else _packed(*part, s)
    if plain is not None:
        attend = _attend(packed.bits, packed.row_any, query, key)
        return reference.masked_attention(query, key, value, attend, scale, *sides)[0]
    name = "masked_attention_with_bias" if sides else "masked_attention"
    output, _ = call(name, query, key, value, packed.bits, packed.row_any, *sides, scale)
    return output.transpose(1, 2)


def _checked_bias(bias: tuple[Tensor, Tensor], query: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """A bias of rows and columns in autocast's dtype, after checking that it fits the queries and keys."""
    if not isinstance(bias, (tuple, list)) or len(bias) != 2:
        raise TypeError(f"bias: expected a pair (by_row [N, H, Q, h], by_column [N, H, Q, w]); got {describe(bias)}")
    n, heads, q, _ = query.shape
    found = []
    for name, side, tensor in zip(("by_row", "by_column"), "hw", bias, strict=True):
        check_floating(f"bias: {name}", tensor, f"[N, H, Q, {side}]")
        check_shape(f"bias: {name}", tensor, f"[N, H, Q, {side}]", (n, heads, q, tensor.shape[3]))
        check_same_device(f"bias: {name}", tensor, "query", query)
        found.append(autocast(tensor))
        check_same_dtype(f"bias: {name}", found[-1], "query", query)
    by_row, by_column = found
    if by_row.shape[3] * by_column.shape[3] != keys:
        raise ValueError(
            f"bias: expected by_row [N, H, Q, h] and by_column [N, H, Q, w] with h * w = S = {keys}; got "
            f"{describe(by_row)} and {describe(by_column)}"
        )
    return by_row, by_column


def _no_rows(query: Tensor, keys: int) -> PackedMask:
    """A mask of no queries: all of them attend everywhere."""
    n = query.shape[0]
    bits = query.new_zeros(n, 0, (keys + WORD - 1) // WORD, dtype=torch.int32)
    return PackedMask(bits, query.new_zeros(n, 0, dtype=torch.bool), keys)


def _checked_part(
    mask: PackedMask | Tensor | None, query: Tensor, keys: int, first_key: int | None
) -> tuple[PackedMask | Tensor, int]:
    """A mask, packed or bool [N, R, M], and the index of its first key (0 for a whole mask), after checking that it
    fits the queries and keys."""
    if first_key is None:
        return _checked(mask, query.shape[2], query, keys), 0
    bits = mask.bits if isinstance(mask, PackedMask) else mask
    if not isinstance(bits, Tensor) or bits.dim() not in (3, 4):
        raise TypeError(f"mask: expected a PackedMask or a bool tensor [N, R, M]; got {describe(mask)}")
    if isinstance(first_key, bool) or not isinstance(first_key, (int, torch.SymInt)):
        raise TypeError(f"first_key: expected an integer or None; got {describe(first_key)}")
    rows, covered = bits.shape[-2], mask.num_keys if isinstance(mask, PackedMask) else bits.shape[-1]
    if rows > query.shape[2]:
        raise ValueError(f"mask: expected R of at most {query.shape[2]} queries; got {describe(bits)}")
    given = _checked(mask, rows, query, covered)
    if not 0 <= first_key <= keys - covered:
        raise ValueError(
            f"first_key: expected an integer in [0, {keys - covered}], so that the mask's {covered} keys lie within "
            f"key's {keys}; got {first_key}"
        )
    return given, first_key


def _checked(mask: PackedMask | Tensor | None, q: int, query: Tensor, keys: int) -> PackedMask | Tensor:
    """The mask of `q` queries, packed or bool [N, Q, S], after checking that it fits the queries and keys."""
    n = query.shape[0]
    if isinstance(mask, PackedMask):
        if isinstance(mask.num_keys, bool) or not isinstance(mask.num_keys, (int, torch.SymInt)):
            raise TypeError(f"mask: expected a PackedMask of an integer num_keys; got {describe(mask.num_keys)}")
        if mask.num_keys != keys:
            raise ValueError(f"mask: expected S = {keys}, key's; got a PackedMask of num_keys = {mask.num_keys}")
        if not isinstance(mask.bits, Tensor) or not isinstance(mask.row_any, Tensor):
            raise TypeError(f"mask: expected tensors bits and row_any in a PackedMask; got {describe(mask)}")
        check_dense("mask.bits", mask.bits)
        check_dense("mask.row_any", mask.row_any)
        check_shape("mask.bits", mask.bits, "[N, Q, ceil(S/32)]", (n, q, (keys + WORD - 1) // WORD))
        check_shape("mask.row_any", mask.row_any, "[N, Q]", (n, q))
        check_same_device("mask.bits", mask.bits, "query", query)
        check_same_device("mask.row_any", mask.row_any, "query", query)
        if mask.bits.dtype != torch.int32 or mask.row_any.dtype != torch.bool:
            raise TypeError(
                f"mask: expected bits in int32 and row_any in bool; got {describe(mask.bits)} "
                f"and {describe(mask.row_any)}"
            )
        return mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"mask: expected a PackedMask or a bool tensor [N, Q, S], True = attend; got {describe(mask)}; "
            "pack_attention_mask takes logits"
        )
    check_dense("mask", mask)
    check_same_device("mask", mask, "query", query)
    if mask.dim() == 4:
        check_shape("mask", mask, "[N, 1, Q, S]", (n, 1, q, keys))
        mask = mask.squeeze(1)
    check_shape("mask", mask, "[N, Q, S]", (n, q, keys))
    return mask


def _packed(mask: PackedMask | Tensor, first_key: int, keys: int) -> PackedMask:
    """A packed mask of all `keys` from one of some of them; the others are attended to, and there is no row rule."""
    packed = mask if isinstance(mask, PackedMask) else pack_attention_mask(mask)
    if packed.num_keys == keys:
        return packed
    return PackedMask(widen(packed.bits, first_key, packed.num_keys, keys), torch.ones_like(packed.row_any), keys)


# ---------------------------------------------------------------- plain PyTorch
# Implements the registered operators for direct calls where no kernel serves.


def _attend(bits: Tensor, row_any: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The bool mask [N, Q, S] from the bits of the first queries; all later queries attend everywhere."""
    attend = unpack(bits, row_any, key.shape[2])
    return F.pad(attend, (0, 0, 0, query.shape[2] - attend.shape[1]), value=True)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bits: Tensor, row_any: Tensor, sides: tuple[Tensor, ...], scale: float
) -> tuple[Tensor, Tensor]:
    attend = _attend(bits, row_any, query, key)
    if dispatch.plain("masked_attention", query) == "reference":
        output, logsumexp = reference.masked_attention(query, key, value, attend, scale, *sides)
    else:
        output, logsumexp = fallback.attention_operator(query, key, value, ~attend, scale, *sides)
    return output.transpose(1, 2).contiguous(), logsumexp


def _masked_attention_plain(
    query: Tensor, key: Tensor, value: Tensor, bits: Tensor, row_any: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _attention(query, key, value, bits, row_any, (), scale)


def _masked_attention_with_bias_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: Tensor,
    row_any: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _attention(query, key, value, bits, row_any, (by_row, by_column), scale)


def _gradients(
    grad_output: Tensor,
    heads: list[Tensor],
    bits: Tensor,
    row_any: Tensor,
    sides: list[Tensor],
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    attend = _attend(bits, row_any, *heads[:2])
    plain = dispatch.plain("masked_attention", heads[0])
    if plain == "reference" or (readable(heads[2]) and not heads[2].isfinite().all()):
        gradients = reference_gradients(
            lambda q, k, v, *b: reference.masked_attention(q, k, v, attend, scale, *b)[0].transpose(1, 2),
            grad_output,
            [*heads, *sides],
            [True] * (3 + len(sides)),
        )
    else:
        grad = grad_output.transpose(1, 2)
        query, key, value = heads
        gradients = fallback.attention_operator_backward(grad, logsumexp, query, key, value, ~attend, scale, *sides)
    return (*(g.transpose(1, 2).contiguous() for g in gradients[:3]), *(g.contiguous() for g in gradients[3:]))


def _masked_attention_backward_plain(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: Tensor,
    row_any: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    return _gradients(grad_output, [query, key, value], bits, row_any, [], logsumexp, scale)


def _masked_attention_with_bias_backward_plain(
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
) -> tuple[Tensor, ...]:
    return _gradients(grad_output, [query, key, value], bits, row_any, [by_row, by_column], logsumexp, scale)


dispatch.register(
    dispatch.Operator("masked_attention", triton="m2f_kernels.ops.masked_attention.triton"),
    {
        "masked_attention": _masked_attention_plain,
        "masked_attention_backward": _masked_attention_backward_plain,
        "masked_attention_with_bias": _masked_attention_with_bias_plain,
        "masked_attention_with_bias_backward": _masked_attention_with_bias_backward_plain,
    },
)


# ---------------------------------------------------------------- fake kernels


@torch.library.register_fake("m2f::masked_attention", lib=LIBRARY)
@torch.library.register_fake("m2f::masked_attention_with_bias", lib=LIBRARY)
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, heads, q, d = query.shape
    logsumexp = query.new_empty(n, heads, q, dtype=accumulation_dtype(query.dtype))
    return query.new_empty(n, q, heads, d), logsumexp


def _empty_like_heads(x: Tensor) -> Tensor:
    n, heads, length, d = x.shape
    return x.new_empty(n, length, heads, d)


@torch.library.register_fake("m2f::masked_attention_backward", lib=LIBRARY)
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _empty_like_heads(query), _empty_like_heads(key), _empty_like_heads(value)


@torch.library.register_fake("m2f::masked_attention_with_bias_backward", lib=LIBRARY)
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: Tensor,
    row_any: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    heads = (_empty_like_heads(x) for x in (query, key, value))
    return (*heads, *(x.new_empty(x.shape) for x in (by_row, by_column)))


# ---------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _vjp(ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    biased = len(saved) == 9
    name = "masked_attention_with_bias_backward" if biased else "masked_attention_backward"
    gradients = getattr(torch.ops.m2f, name)(grad_output, *saved, ctx.scale)
    gradients = differentiable_once("masked attention", gradients, [grad_output, *saved])
    heads, sides = [g.transpose(1, 2) for g in gradients[:3]], gradients[3:]
    # One for each input: the bits, row_any and the scale have none.
    found = [*heads, None, None, *sides, None]
    return tuple(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=True))


for _name in ("masked_attention", "masked_attention_with_bias"):
    register_autograd(_name, "masked attention", _vjp, _setup_context)
    register_vmap(_name, shared=())
    register_vmap(f"{_name}_backward", shared=())
