"""Samples of masks and features at points, and points where masks are uncertain: schemas, checks, fakes, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m2f_kernels import dispatch
from m2f_kernels._checks import check_dense, check_floating, check_generator, check_same_device, check_shape, describe
from m2f_kernels._library import LIBRARY
from m2f_kernels.masks import FactoredMasks, Targets
from m2f_kernels.ops._autograd import (
    call,
    differentiable_once,
    reference_gradients,
    register_autograd,
    register_vmap,
)
from m2f_kernels.ops.points import fallback, reference
from m2f_kernels.ops.points.masks import select_rows

__all__ = ["point_sample", "uncertain_points"]

# ---------------------------------------------------------------- schemas
# `rows` picks planes of [P, h, w]; the m-th of them draws random points from stream first_stream + m.

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("point_sample(Tensor input, Tensor points, bool exact) -> Tensor", tags=_TAGS)
# An image's targets in a form that is not dense, see `masks.Targets`: [T, K] at points [K, 2].
LIBRARY.define("sample_targets(Tensor pixels, Tensor marks, Tensor points) -> Tensor", tags=_TAGS)
LIBRARY.define(
    "point_sample_backward(Tensor grad_output, Tensor points, SymInt height, SymInt width) -> Tensor", tags=_TAGS
)
LIBRARY.define(
    "uncertain_points(Tensor mask_logits, Tensor rows, Tensor seed, SymInt first_stream, SymInt candidates, "
    "SymInt keep, SymInt fresh) -> Tensor",
    tags=_TAGS,
)
#: Plain PyTorch, by the name of the backend.
_PLAIN = {"fallback": fallback, "reference": reference}


# ---------------------------------------------------------------- public functions


def point_sample(input: Tensor | FactoredMasks, points: Tensor) -> Tensor:
    """Bilinear samples at points (PointRend, Kirillov et al. 2020, section 3.1).

    Pixel centres lie at `(i + 0.5) / size`; pixels outside are zero, and so is a sample at a NaN coordinate.

    Args:
        input: [N, C, h, w]. float64, float32, bfloat16 or float16; or bool or uint8 (target masks), which are read in
            place, without a float copy. In uint8 any value but 0 is foreground: 255 counts as 1. Or factored masks,
            whose features are sampled and then multiplied.
        points: [N, K, 2], (x, y) in [0, 1]; outside is allowed. float64 or float32.

    Returns:
        [N, C, K] in input's dtype, float32 for bool and uint8 (factored masks: [N, Q, K]). Differentiable once in
        `input`, not in `points`; bitwise deterministic.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    if isinstance(input, FactoredMasks):
        check_masks("input", input)
        samples = point_sample(input.mask_features, points)
        with torch.autocast(samples.device.type, enabled=False):
            dtype = torch.promote_types(input.mask_embed.dtype, samples.dtype)
            return input.mask_embed.to(dtype) @ samples.to(dtype)
    check_pixels("input", input, "[N, C, h, w]")
    n = input.shape[0]
    check_points("points", points, "[N, K, 2]", (n,))
    check_same_device("points", points, "input", input)
    return sample(input, points, exact=False)


def sample(input: Tensor, points: Tensor, exact: bool) -> Tensor:
    """:func:`point_sample` without checks; `exact` leaves 16-bit samples in float32."""
    if (plain := dispatch.plain("point_sample", input)) is not None:
        return _PLAIN[plain].point_sample(input, points, exact)
    return call("point_sample", input, points.float(), exact)


def sample_targets(targets: Targets, points: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An image's targets sampled at points [K, 2]: [T, K]; `dtype` is that of the masks they are compared with."""
    pixels, marks = targets
    if dtype == torch.float64:
        return reference.sample_targets(targets, points.double())
    if marks is None:
        return sample(pixels[None], points[None], exact=True)[0]
    if (plain := dispatch.plain("point_sample", pixels)) is not None:
        return _PLAIN[plain].sample_targets(targets, points)
    return torch.ops.m2f.sample_targets(pixels, marks, points.float())


def uncertain_points(
    mask_logits: Tensor | FactoredMasks,
    num_points: int = 12544,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    *,
    queries: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random points, most of them where a mask is uncertain (PointRend, section 4.1.1; Cheng et al. 2022, section 3.3).

    Of `int(oversample_ratio * num_points)` uniform candidates it keeps the `int(importance_sample_ratio * num_points)`
    with the smallest |logit|, and fills up with fresh uniform points. The points depend only on a 64-bit seed, drawn
    from `generator`, and on each mask's position: they are the same on every device and for any number of threads.

    Args:
        mask_logits: [M, h, w] or [N, Q, h, w], or factored masks, which are multiplied out a bounded chunk at a time.
            float64, float32, bfloat16 or float16.
        num_points: K, at least 1.
        oversample_ratio: at least 1.
        importance_sample_ratio: from 0 to 1.
        queries: for each image the indices of its masks, an int64 tensor; None for all masks.
        generator: source of the seed, on the masks' device; None for PyTorch's.

    Returns:
        float32 [M, K, 2], M masks in order of images. No gradient flows through it.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    check_masks("mask_logits", mask_logits)
    counts = point_counts(num_points, oversample_ratio, importance_sample_ratio)
    masks = select_rows(mask_logits, queries)
    seed = draw_seed(masks.device, generator)
    with torch.no_grad():
        if not isinstance(mask_logits, FactoredMasks):
            return points_of_planes(masks.planes, masks.rows, seed, 0, *counts)
        found = [points_of_planes(chunk.logits, chunk.arange(), seed, chunk.first, *counts) for chunk in masks.chunks()]
        return torch.cat(found) if found else masks.rows.new_empty(0, num_points, 2, dtype=torch.float32)


def points_of_planes(mask_logits: Tensor, rows: Tensor, seed: Tensor, first_stream: int, *counts: int) -> Tensor:
    """The uncertain points by the operator, or by plain PyTorch where no kernel serves or the user forces it."""
    if (plain := dispatch.plain("uncertain_points", mask_logits)) is not None:
        return _PLAIN[plain].uncertain_points(mask_logits, rows, seed, first_stream, *counts)
    return torch.ops.m2f.uncertain_points(mask_logits, rows, seed, first_stream, *counts)


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """int64 [1] on `device`, from `generator`."""
    check_generator("generator", generator, device)
    return torch.randint(0, 2**63 - 1, (1,), device=device, generator=generator)


# ---------------------------------------------------------------- checks shared by the operators on points


def check_pixels(name: str, value: object, layout: str) -> Tensor:
    """Require images of floating point, bool or uint8 with at least one pixel."""
    if isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8):
        if value.dim() != layout.count(",") + 1:
            raise ValueError(f"{name}: expected {layout}; got {describe(value)}")
        check_dense(name, value)
        tensor = value
    elif isinstance(value, Tensor) and not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating point, bool or uint8 tensor {layout}; got {describe(value)}")
    else:
        tensor = check_floating(name, value, layout)
    if tensor.shape[-1] < 1 or tensor.shape[-2] < 1:
        raise ValueError(f"{name}: expected at least one pixel in {layout}; got {describe(tensor)}")
    return tensor


def check_points(name: str, value: object, layout: str, leading: tuple[int, ...]) -> None:
    """Require points [*leading, K, 2] of float64 or float32, K >= 1, without a gradient."""
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: expected float64 or float32, as coordinates need; got {describe(value)}")
    points = check_floating(name, value, layout)
    k = points.shape[-2]
    check_shape(name, points, layout, (*leading[:1], k, 2))
    if k < 1:
        raise ValueError(f"{name}: expected at least one point in {layout}; got {describe(points)}")
    if points.requires_grad:
        raise ValueError(
            f"{name}: expected points without a gradient, which does not reach them; got some that require it"
        )


def check_masks(name: str, masks: Tensor | FactoredMasks) -> None:
    """Require mask logits [M, h, w] or [N, Q, h, w], or factored masks that fit each other."""
    if not isinstance(masks, FactoredMasks):
        layout = "[M, h, w]" if isinstance(masks, Tensor) and masks.dim() == 3 else "[N, Q, h, w]"
        check_floating(name, masks, layout)
        check_pixels(name, masks, layout)
        return
    embed = check_floating(f"{name}.mask_embed", masks.mask_embed, "[N, Q, C]")
    features = check_floating(f"{name}.mask_features", masks.mask_features, "[N, C, h, w]")
    check_pixels(f"{name}.mask_features", features, "[N, C, h, w]")
    n, _, c = embed.shape
    check_shape(f"{name}.mask_features", features, "[N, C, h, w]", (n, c, *features.shape[2:]))
    check_same_device(f"{name}.mask_features", features, f"{name}.mask_embed", embed)
    if (embed.dtype == torch.float64) != (features.dtype == torch.float64):
        raise TypeError(
            f"{name}.mask_features: expected float64 for both factors or for none; got {describe(embed)} "
            f"and {describe(features)}"
        )


def point_counts(num_points: int, oversample_ratio: float, importance_sample_ratio: float) -> tuple[int, int, int]:
    """Numbers of candidates, of candidates to keep, and of fresh points."""
    if isinstance(num_points, bool) or not isinstance(num_points, int):
        raise TypeError(f"num_points: expected an integer of at least 1; got {describe(num_points)}")
    if num_points < 1:
        raise ValueError(f"num_points: expected an integer of at least 1; got {num_points}")
    for name, value in (
        ("oversample_ratio", oversample_ratio),
        ("importance_sample_ratio", importance_sample_ratio),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number; got {describe(value)}")
    if not 1 <= oversample_ratio < 2**31 / num_points:
        raise ValueError(
            f"oversample_ratio: expected at least 1, and fewer than 2^31 candidates; got {oversample_ratio}"
        )
    if not 0 <= importance_sample_ratio <= 1:
        raise ValueError(f"importance_sample_ratio: expected a number from 0 to 1; got {importance_sample_ratio}")
    keep = int(importance_sample_ratio * num_points)
    return int(oversample_ratio * num_points), keep, num_points - keep


# ---------------------------------------------------------------- plain PyTorch
# Implements the registered operators for direct calls where no kernel serves.


def _plain_module(op: str, like: Tensor) -> Any:
    return _PLAIN[dispatch.plain(op, like) or "fallback"]


@torch.no_grad()
def _point_sample_plain(input: Tensor, points: Tensor, exact: bool) -> Tensor:
    found: Tensor = _plain_module("point_sample", input).point_sample(input, points, exact)
    return found


@torch.no_grad()
def _sample_targets_plain(pixels: Tensor, marks: Tensor, points: Tensor) -> Tensor:
    found: Tensor = _plain_module("point_sample", pixels).sample_targets(Targets(pixels, marks), points)
    return found


def _point_sample_backward_plain(grad_output: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    n, c, _ = grad_output.shape
    pixels = grad_output.new_zeros(n, c, height, width)
    function = _plain_module("point_sample", grad_output).point_sample
    return reference_gradients(lambda x: function(x, points), grad_output, [pixels], [True])[0]


@torch.no_grad()
def _uncertain_points_plain(mask_logits: Tensor, *rest: Any) -> Tensor:
    found: Tensor = _plain_module("uncertain_points", mask_logits).uncertain_points(mask_logits, *rest)
    return found


_TRITON = "m2f_kernels.ops.points.triton_sampling"
dispatch.register(
    dispatch.Operator("point_sample", triton=_TRITON),
    {
        "point_sample": _point_sample_plain,
        "sample_targets": _sample_targets_plain,
        "point_sample_backward": _point_sample_backward_plain,
    },
)
dispatch.register(dispatch.Operator("uncertain_points", triton=_TRITON), {"uncertain_points": _uncertain_points_plain})


# ---------------------------------------------------------------- fake kernels


@torch.library.register_fake("m2f::point_sample", lib=LIBRARY)
def _(input: Tensor, points: Tensor, exact: bool) -> Tensor:
    return input.new_empty(*input.shape[:2], points.shape[1], dtype=reference.sample_dtype(input.dtype, exact))


@torch.library.register_fake("m2f::sample_targets", lib=LIBRARY)
def _(pixels: Tensor, marks: Tensor, points: Tensor) -> Tensor:
    return points.new_empty(pixels.shape[0], points.shape[0])


@torch.library.register_fake("m2f::point_sample_backward", lib=LIBRARY)
def _(grad_output: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    return grad_output.new_empty(*grad_output.shape[:2], height, width)


@torch.library.register_fake("m2f::uncertain_points", lib=LIBRARY)
def _(
    mask_logits: Tensor, rows: Tensor, seed: Tensor, first_stream: int, candidates: int, keep: int, fresh: int
) -> Tensor:
    return mask_logits.new_empty(rows.shape[0], keep + fresh, 2, dtype=torch.float32)


# ---------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, points, _ = inputs
    ctx.save_for_backward(points)
    ctx.size, ctx.dtype = input.shape[2:], input.dtype


def _point_sample_vjp(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    (points,) = ctx.saved_tensors
    gradient = torch.ops.m2f.point_sample_backward(grad_output, points, *ctx.size)
    return *differentiable_once("point sampling", (gradient.to(ctx.dtype),), [grad_output]), None, None


def _point_sample_jvp(tensors: Any, constants: Any, tangents: Any) -> Tensor:
    # Linear in the input; the points have no derivative, forward or backward.
    if tangents[1] is not None:
        raise NotImplementedError("m2f_kernels: point sampling has no derivative with respect to its points")
    found: Tensor = call("point_sample", tangents[0], tensors[1], *constants)
    return found


register_autograd("point_sample", "point sampling", _point_sample_vjp, _setup_context, _point_sample_jvp)
register_vmap("point_sample", shared=())
register_vmap("point_sample_backward", shared=())
register_vmap("sample_targets")
register_vmap("uncertain_points")
