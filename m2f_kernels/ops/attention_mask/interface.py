"""Attention masks from predicted masks: schemas, checks, fake kernels. Nothing here is differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m2f_kernels import dispatch
from m2f_kernels._checks import (
    check_dense,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    describe,
    host_size,
    traced_for_onnx,
)
from m2f_kernels._dtypes import autocast
from m2f_kernels._library import LIBRARY
from m2f_kernels.masks import WORD, PackedMask, empty_flags
from m2f_kernels.ops._autograd import call, register_vmap, transformed
from m2f_kernels.ops.attention_mask import fallback, reference

__all__ = ["attention_mask_levels", "pack_attention_mask", "predict_attention_mask", "resize_mask_features"]

# ---------------------------------------------------------------- schemas

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("resize_mask_features(Tensor mask_features, SymInt[] sizes) -> Tensor", tags=_TAGS)
LIBRARY.define("predict_attention_mask(Tensor mask_embed, Tensor level_features) -> (Tensor, Tensor)", tags=_TAGS)
# The same with flags that the first fills for all masks of the second: a launch less for each mask.
LIBRARY.define(
    "resize_mask_features_with_flags(Tensor mask_features, SymInt[] sizes, SymInt num_masks, SymInt num_queries)"
    " -> (Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "predict_attention_mask_with_flags(Tensor mask_embed, Tensor level_features, Tensor(a!) row_any) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define("pack_attention_mask(Tensor mask) -> (Tensor, Tensor)", tags=_TAGS)

#: Plain PyTorch, by the name of the backend.
_PLAIN: dict[str, Any] = {"fallback": fallback, "reference": reference}


# ---------------------------------------------------------------- public functions


def resize_mask_features(mask_features: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Mask features resized to every level that the decoder attends to, in one pass over `mask_features`.

    Bilinear, `align_corners=False`, no antialias: what Mask2Former does to full-resolution logits (Cheng et al. 2022,
    section 3.2.1). Resizing and the product with the mask embeddings are both linear and commute, so resizing the
    features once per image replaces resizing the logits of every query at every layer. At ratios 2, 4 and 8 this is
    the mean of the four centre pixels. Not differentiable: no gradient flows through an attention mask.

    Args:
        mask_features: [N, C, H, W]. float64, float32, bfloat16 or float16.
        sizes: (h, w) of each level, larger or smaller than (H, W).

    Returns:
        for each level [N, C, h, w] in mask_features' dtype (under autocast, in autocast's dtype); where a kernel
        serves, views of one tensor.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    _check_features(mask_features)
    pairs = _sizes(sizes)
    flat = [side for pair in pairs for side in pair]
    features = autocast(mask_features.detach())
    plain = dispatch.plain("resize_mask_features", features)
    if plain == "fallback":
        return fallback.resize_mask_features(features, flat)
    if plain == "reference":
        resized = reference.resize_mask_features(features, flat)
    else:
        resized = call("resize_mask_features", features, flat)
    return _split(resized, pairs)


def attention_mask_levels(
    mask_features: Tensor, sizes: Sequence[tuple[int, int]], num_masks: int, num_queries: int
) -> tuple[list[Tensor], Tensor]:
    """Resized mask features as of :func:`resize_mask_features`, and row flags for the masks that are made of them.

    A GPU kernel of :func:`predict_attention_mask` needs flags that begin as False. Here one kernel fills them for all
    masks while it resizes, instead of one for each mask.

    Args:
        mask_features, sizes: as of :func:`resize_mask_features`.
        num_masks: how many masks will be predicted.
        num_queries: Q of each.

    Returns:
        the levels; and bool [num_masks, N, Q], all False: give each mask one of them as `row_any`.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    counts = [_count("num_masks", num_masks), _count("num_queries", num_queries)]
    if not isinstance(mask_features, Tensor) or not _writes_flags("resize_mask_features", mask_features):
        levels = resize_mask_features(mask_features, sizes)
        shape = (counts[0], mask_features.shape[0], counts[1])
        return levels, torch.zeros(shape, dtype=torch.bool, device=mask_features.device)
    _check_features(mask_features)
    pairs = _sizes(sizes)
    features = autocast(mask_features.detach())
    flat = [side for pair in pairs for side in pair]
    resized, flags = call("resize_mask_features_with_flags", features, flat, *counts)
    return _split(resized, pairs), flags


def predict_attention_mask(mask_embed: Tensor, level_features: Tensor, row_any: Tensor | None = None) -> PackedMask:
    """The attention mask of one decoder layer: predict, threshold and pack in one kernel (Cheng et al. 2022, 3.2.1).

    A query attends to a pixel unless `sigmoid(mask_embed . feature) < 0.5`; the logits are accumulated in float32 and
    never written. A NaN logit therefore attends, as in the published code.

    Args:
        mask_embed: [N, Q, C], the mask embeddings of the queries. float64, float32, bfloat16 or float16.
        level_features: [N, C, h, w], one of :func:`resize_mask_features`' results; or [N, C, S]. mask_embed's dtype;
            under autocast both are cast.
        row_any: bool [N, Q], contiguous and all False, one of :func:`attention_mask_levels`' flags: on a GPU they
            become those of the result, and no kernel has to fill them first. Give each of them to one mask only.

    Returns:
        the mask, with S = h*w keys. Not differentiable.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    check_floating("mask_embed", mask_embed, "[N, Q, C]")
    n, _, c = mask_embed.shape
    if isinstance(level_features, Tensor) and level_features.dim() == 3:
        features = check_floating("level_features", level_features, "[N, C, S]")
        check_shape("level_features", features, "[N, C, S]", (n, c, features.shape[2]))
    else:
        features = check_floating("level_features", level_features, "[N, C, h, w]")
        check_shape("level_features", features, "[N, C, h, w]", (n, c, *features.shape[2:]))
        features = features.flatten(2)
    check_same_device("level_features", features, "mask_embed", mask_embed)
    embed, features = autocast(mask_embed.detach()), autocast(features.detach())
    check_same_dtype("level_features", features, "mask_embed", embed)
    _check_keys("level_features", features, features.shape[2])
    if row_any is not None:
        _check_flags(row_any, embed)
        if _writes_flags("predict_attention_mask", embed):
            bits = call("predict_attention_mask_with_flags", embed, features, row_any)
            return PackedMask(bits, row_any, host_size(features.shape[2]))
    if (plain := dispatch.plain("predict_attention_mask", embed)) is not None:
        packed = _PLAIN[plain].predict_attention_mask(embed, features)
    else:
        packed = call("predict_attention_mask", embed, features)
    return PackedMask(packed[0], packed[1], host_size(features.shape[2]))


def pack_attention_mask(mask: Tensor) -> PackedMask:
    """A boolean mask, or mask logits, packed to one bit per query and key.

    Args:
        mask: bool (True = attend), or logits (attend unless `sigmoid(logit) < 0.5`) as float64, float32, bfloat16 or
            float16. [N, Q, S] or [N, Q, h, w].

    Returns:
        the mask, with S (= h*w) keys. Not differentiable.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor [N, Q, S] or [N, Q, h, w]; got {describe(mask)}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"mask: expected bool (True = attend) or floating point logits; got {describe(mask)}")
    if mask.dtype != torch.bool:
        check_floating("mask", mask, "[N, Q, S]" if mask.dim() != 4 else "[N, Q, h, w]")
    check_dense("mask", mask)
    if mask.dim() not in (3, 4):
        raise ValueError(f"mask: expected [N, Q, S] or [N, Q, h, w]; got {describe(mask)}")
    flat = mask.detach().flatten(2)
    _check_keys("mask", mask, flat.shape[2])
    if (plain := dispatch.plain("pack_attention_mask", flat)) is not None:
        packed = _PLAIN[plain].pack_attention_mask(flat)
    else:
        packed = call("pack_attention_mask", flat)
    return PackedMask(packed[0], packed[1], host_size(flat.shape[2]))


def _sizes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    expected = "pairs (h, w) of integers of at least 1"
    try:
        pairs = [(host_size(h), host_size(w)) for h, w in sizes]
    except (TypeError, ValueError):
        raise TypeError(f"sizes: expected {expected}; got {describe(sizes)}") from None
    if not pairs:
        raise ValueError("sizes: expected at least one pair (h, w); got none")
    for side in (side for pair in pairs for side in pair):
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"sizes: expected {expected}; got {describe(sizes)}")
        if side < 1:
            raise ValueError(f"sizes: expected {expected}; got {describe(sizes)}")
    return pairs


def _split(resized: Tensor, pairs: list[tuple[int, int]]) -> list[Tensor]:
    """[N, C, h, w] of each level, views of all of them."""
    levels, start = [], 0
    for h, w in pairs:
        levels.append(resized[:, :, start : start + h * w].unflatten(2, (h, w)))
        start += h * w
    return levels


def _writes_flags(op: str, tensor: Tensor) -> bool:
    """True if a kernel on a GPU serves, in whose way no graph of operators without side effects is made."""
    if tensor.device.type not in ("cuda", "meta") or torch.compiler.is_exporting() or traced_for_onnx():
        return False
    return not transformed() and dispatch.plain(op, tensor) is None


def _count(name: str, value: int) -> int:
    value = host_size(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer; got {describe(value)}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0; got {describe(value)}")
    return value


def _check_features(mask_features: Tensor) -> None:
    check_floating("mask_features", mask_features, "[N, C, H, W]")
    if mask_features.shape[2] < 1 or mask_features.shape[3] < 1:
        raise ValueError(f"mask_features: expected at least one pixel; got {describe(mask_features)}")


def _check_flags(row_any: Tensor, embed: Tensor) -> None:
    if not isinstance(row_any, Tensor) or row_any.dtype != torch.bool:
        raise TypeError(f"row_any: expected bool [N, Q] or None; got {describe(row_any)}")
    check_shape("row_any", row_any, "[N, Q]", tuple(embed.shape[:2]))
    check_same_device("row_any", row_any, "mask_embed", embed)
    if not row_any.is_contiguous():
        raise ValueError(f"row_any: expected a contiguous tensor; got strides {tuple(row_any.stride())}")


def _check_keys(name: str, tensor: Tensor, keys: int) -> None:
    if keys < 1:
        raise ValueError(f"{name}: expected at least one key (pixel); got {describe(tensor)}")


# ---------------------------------------------------------------- implementations


def _resize_plain(mask_features: Tensor, sizes: list[int]) -> Tensor:
    if dispatch.plain("resize_mask_features", mask_features) == "reference":
        return reference.resize_mask_features(mask_features, sizes)
    return torch.cat([level.flatten(2) for level in fallback.resize_mask_features(mask_features, sizes)], 2)


def _predict_plain(mask_embed: Tensor, level_features: Tensor) -> tuple[Tensor, Tensor]:
    plain = dispatch.plain("predict_attention_mask", mask_embed) or "fallback"
    return _PLAIN[plain].predict_attention_mask(mask_embed, level_features)


def _resize_plain_with_flags(
    mask_features: Tensor, sizes: list[int], num_masks: int, num_queries: int
) -> tuple[Tensor, Tensor]:
    flags = empty_flags(mask_features, num_masks, mask_features.shape[0], num_queries)
    return _resize_plain(mask_features, sizes), flags.zero_()


def _predict_plain_with_flags(mask_embed: Tensor, level_features: Tensor, row_any: Tensor) -> Tensor:
    bits, found = _predict_plain(mask_embed, level_features)
    row_any.copy_(found)
    return bits


def _pack_plain(mask: Tensor) -> tuple[Tensor, Tensor]:
    return _PLAIN[dispatch.plain("pack_attention_mask", mask) or "fallback"].pack_attention_mask(mask)


_IMPLEMENTED: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "resize_mask_features",
        {"resize_mask_features": _resize_plain, "resize_mask_features_with_flags": _resize_plain_with_flags},
    ),
    (
        "predict_attention_mask",
        {"predict_attention_mask": _predict_plain, "predict_attention_mask_with_flags": _predict_plain_with_flags},
    ),
    ("pack_attention_mask", {"pack_attention_mask": _pack_plain}),
)
for _name, _plains in _IMPLEMENTED:
    _kernels = {name: torch.no_grad()(plain) for name, plain in _plains.items()}
    dispatch.register(dispatch.Operator(_name, triton="m2f_kernels.ops.attention_mask.triton"), _kernels)


# ---------------------------------------------------------------- fake kernels


def _fake_packed(like: Tensor, n: int, q: int, s: int) -> tuple[Tensor, Tensor]:
    words = (s + WORD - 1) // WORD
    return like.new_empty(n, q, words, dtype=torch.int32), like.new_empty(n, q, dtype=torch.bool)


@torch.library.register_fake("m2f::resize_mask_features", lib=LIBRARY)
def _(mask_features: Tensor, sizes: list[int]) -> Tensor:
    total = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    return mask_features.new_empty(*mask_features.shape[:2], total)


@torch.library.register_fake("m2f::predict_attention_mask", lib=LIBRARY)
def _(mask_embed: Tensor, level_features: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_packed(mask_embed, mask_embed.shape[0], mask_embed.shape[1], level_features.shape[2])


@torch.library.register_fake("m2f::resize_mask_features_with_flags", lib=LIBRARY)
def _(mask_features: Tensor, sizes: list[int], num_masks: int, num_queries: int) -> tuple[Tensor, Tensor]:
    total = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    n, c = mask_features.shape[:2]
    return mask_features.new_empty(n, c, total), empty_flags(mask_features, num_masks, n, num_queries)


@torch.library.register_fake("m2f::predict_attention_mask_with_flags", lib=LIBRARY)
def _(mask_embed: Tensor, level_features: Tensor, row_any: Tensor) -> Tensor:
    return _fake_packed(mask_embed, mask_embed.shape[0], mask_embed.shape[1], level_features.shape[2])[0]


@torch.library.register_fake("m2f::pack_attention_mask", lib=LIBRARY)
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_packed(mask, *mask.shape)


# ---------------------------------------------------------------- torch.vmap

for _name in ("resize_mask_features", "predict_attention_mask", "pack_attention_mask"):
    register_vmap(_name, shared=())
