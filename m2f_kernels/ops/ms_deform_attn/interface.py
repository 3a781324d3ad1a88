"""Multi-scale deformable attention: schemas, checks, fake kernels, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m2f_kernels import dispatch
from m2f_kernels._checks import check_floating, check_number, check_same_device, check_shape, describe, host_size
from m2f_kernels._dtypes import autocast
from m2f_kernels._library import CUDA_LIBRARY, LIBRARY
from m2f_kernels.ops._autograd import (
    call,
    differentiable_once,
    reference_gradients,
    register_autograd,
    register_vmap,
    saved_inputs,
)
from m2f_kernels.ops.ms_deform_attn import fallback, reference
from m2f_kernels.ops.ms_deform_attn.levels import SpatialShapes, read_levels, resolve_levels

__all__ = ["ms_deform_attn", "ms_deform_attn_from_offsets"]

# ---------------------------------------------------------------- schemas
# The levels come either as integers (h, w, start per level) or, where they are known only on the
# device, as the two tensors. Sampling tensors are flat over levels and points: K = sum(points_per_level).

_LEVELS = "SymInt[] levels, Tensor? spatial_shapes, Tensor? level_start_index"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_TITLE = "multi-scale deformable attention"

_SCHEMAS = (
    f"ms_deform_attn(Tensor value, {_LEVELS}, Tensor sampling_locations, Tensor attention_weights, "
    "int[] points_per_level) -> Tensor",
    f"ms_deform_attn_backward(Tensor grad_output, Tensor value, {_LEVELS}, Tensor sampling_locations, "
    "Tensor attention_weights, int[] points_per_level, bool needs_value, bool needs_sampling) "
    "-> (Tensor, Tensor, Tensor)",
    f"ms_deform_attn_from_offsets(Tensor value, {_LEVELS}, Tensor reference_points, Tensor sampling_offsets, "
    "Tensor attention_logits, int[] points_per_level, float offset_scale) -> Tensor",
    f"ms_deform_attn_from_offsets_backward(Tensor grad_output, Tensor value, {_LEVELS}, Tensor reference_points, "
    "Tensor sampling_offsets, Tensor attention_logits, int[] points_per_level, float offset_scale, "
    "bool needs_value, bool needs_reference, bool needs_sampling) -> (Tensor, Tensor, Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=_TAGS)
    CUDA_LIBRARY.define(_schema)

#: Plain PyTorch, by the name of the backend.
_PLAIN = {"fallback": fallback, "reference": reference}


# ---------------------------------------------------------------- public functions


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    points_per_level: Sequence[int] | None = None,
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, Zhu et al. 2021, section 4.1, equation 3).

    `out[n, q, h] = sum over levels l and points p of weight * bilinear(value_l[n, :, h], location * (w_l, h_l) - 0.5)`.
    A sample contributes only if its pixel coordinate lies in (-1, size) on both axes; corners outside
    the level are zero; a NaN or infinite coordinate contributes nothing.

    Args:
        value: [N, S, H, D], S the sum of all levels' h*w. float64, float32, bfloat16 or float16.
            Any strides; unit stride in D avoids a copy.
        spatial_shapes: (h, w) of each of up to 16 levels, as pairs or as an integer tensor [L, 2]. A CUDA
            tensor is read by the kernel, without synchronisation; a level that does not lie within value then
            contributes nothing, where on the host it is an error.
        level_start_index: [L], the index in value at which each level starts; None if the levels follow each other.
        sampling_locations: [N, Q, H, L, P, 2], (x, y) normalised to [0, 1], pixel centres at
            (i + 0.5) / size. With `points_per_level`, [N, Q, H, sum(points_per_level), 2].
        attention_weights: [N, Q, H, L, P], used as they are, without a softmax. With `points_per_level`,
            [N, Q, H, sum(points_per_level)].
        points_per_level: L counts, for levels with different numbers of points (RT-DETRv2, D-FINE).

    The three floating tensors may have different dtypes, as autocast leaves them. Arithmetic is float32
    (float64 if value is). Under autocast value is cast to autocast's dtype, the others stay as they are.

    Returns:
        [N, Q, H*D], contiguous, in value's dtype. Differentiable once in the three floating tensors.
        On CPU the gradients are bitwise reproducible for a given number of threads. On CUDA the value
        gradient is accumulated by float32 atomics in no fixed order; under
        `torch.use_deterministic_algorithms(True)` Triton computes it instead, or without Triton slow plain PyTorch.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    check_floating("value", value, "[N, S, H, D]")
    n, _, heads, _ = value.shape
    levels = resolve_levels(spatial_shapes, level_start_index, value)
    count = levels.num_levels
    locations, counts = _flatten_points("sampling_locations", sampling_locations, count, points_per_level, ", 2")
    weights, _ = _flatten_points("attention_weights", attention_weights, count, points_per_level, "")
    q = locations.shape[1]
    check_shape("sampling_locations", locations, "[N, Q, H, K, 2]", (n, q, heads, sum(counts), 2))
    check_shape("attention_weights", weights, "[N, Q, H, K]", (n, q, heads, sum(counts)))
    _check_heads(value)
    check_same_device("sampling_locations", locations, "value", value)
    check_same_device("attention_weights", weights, "value", value)
    value = autocast(value)
    if (plain := dispatch.plain("ms_deform_attn", value)) is not None:
        return _PLAIN[plain].ms_deform_attn(value, read_levels(*levels), locations, weights, counts)
    return call("ms_deform_attn", value, *levels, locations, weights, counts)


def ms_deform_attn_from_offsets(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    level_start_index: Tensor | Sequence[int] | None = None,
    points_per_level: Sequence[int] | None = None,
    offset_scale: float = 0.5,
) -> Tensor:
    """Multi-scale deformable attention from sampling offsets and attention logits (Deformable DETR, section 4.1, A.4).

    The same as :func:`ms_deform_attn` of the sampling locations and the softmaxed weights. Both are computed inside the
    kernel in float32, forward and backward, and never written to memory.

    Args:
        value, spatial_shapes, level_start_index, points_per_level: as in :func:`ms_deform_attn`.
        reference_points: [N, Q, L, 2], (x, y): `location = ref + offset / (w, h)`; or [N, Q, L, 4],
            (cx, cy, width, height): `location = ref_xy + offset / P * ref_wh * offset_scale`. L may be 1,
            shared by all levels.
        sampling_offsets: [N, Q, H, L, P, 2], in pixels of the level (2-d reference points). With
            `points_per_level`, [N, Q, H, sum(points_per_level), 2].
        attention_logits: [N, Q, H, L, P] or [N, Q, H, L*P], before the softmax.
        offset_scale: the constant of the 4-d formula; 0.5 in every published model.

    Returns:
        [N, Q, H*D], contiguous, in value's dtype. Differentiable once in the four floating tensors;
        reproducibility as in :func:`ms_deform_attn`.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    check_floating("value", value, "[N, S, H, D]")
    n, _, heads, _ = value.shape
    levels = resolve_levels(spatial_shapes, level_start_index, value)
    count = levels.num_levels
    offsets, counts = _flatten_points("sampling_offsets", sampling_offsets, count, points_per_level, ", 2")
    if isinstance(attention_logits, Tensor) and attention_logits.dim() == 4:
        logits = check_floating("attention_logits", attention_logits, "[N, Q, H, K]")
    else:
        logits, _ = _flatten_points("attention_logits", attention_logits, count, points_per_level, "")
    q = offsets.shape[1]
    check_shape("sampling_offsets", offsets, "[N, Q, H, K, 2]", (n, q, heads, sum(counts), 2))
    check_shape("attention_logits", logits, "[N, Q, H, K]", (n, q, heads, sum(counts)))
    check_floating("reference_points", reference_points, "[N, Q, L, 2 or 4]")
    if reference_points.shape[-1] not in (2, 4):
        raise ValueError(
            f"reference_points: expected 2 or 4 coordinates in the last axis; got {describe(reference_points)}"
        )
    if reference_points.shape[2] == 1:
        reference_points = reference_points.expand(-1, -1, count, -1)
    check_shape("reference_points", reference_points, "[N, Q, L, 2 or 4]", (n, q, count, reference_points.shape[-1]))
    offset_scale = check_number("offset_scale", offset_scale)
    _check_heads(value)
    check_same_device("sampling_offsets", offsets, "value", value)
    check_same_device("attention_logits", logits, "value", value)
    check_same_device("reference_points", reference_points, "value", value)
    value = autocast(value)
    if (plain := dispatch.plain("ms_deform_attn_from_offsets", value)) is not None:
        return _PLAIN[plain].ms_deform_attn_from_offsets(
            value, read_levels(*levels), reference_points, offsets, logits, counts, offset_scale
        )
    return call("ms_deform_attn_from_offsets", value, *levels, reference_points, offsets, logits, counts, offset_scale)


def _flatten_points(
    name: str, tensor: Tensor, levels: int, points_per_level: Sequence[int] | None, tail: str
) -> tuple[Tensor, list[int]]:
    """Merge the level and point axes of a sampling tensor; returns it with the points of each level."""
    if points_per_level is None:
        check_floating(name, tensor, f"[N, Q, H, L, P{tail}]")
        if tensor.shape[3] != levels or tensor.shape[4] < 1:
            raise ValueError(
                f"{name}: expected [N, Q, H, L, P{tail}] with L = {levels}, the levels of spatial_shapes, and P >= 1; "
                f"got {describe(tensor)}"
            )
        return tensor.flatten(3, 4), [host_size(tensor.shape[4])] * levels
    try:
        counts = list(points_per_level)
    except TypeError:
        raise TypeError(
            f"points_per_level: expected {levels} counts, one per level; got {describe(points_per_level)}"
        ) from None
    if len(counts) != levels or any(not isinstance(p, int) or p < 1 for p in counts):
        raise ValueError(
            f"points_per_level: expected {levels} counts of at least 1, one per level; got {describe(points_per_level)}"
        )
    return check_floating(name, tensor, f"[N, Q, H, K{tail}]"), counts


def _check_heads(value: Tensor) -> None:
    if value.shape[2] < 1 or value.shape[3] < 1:
        raise ValueError(
            f"value: expected at least one head and one channel per head in [N, S, H, D]; got {describe(value)}"
        )


# ---------------------------------------------------------------- plain PyTorch
# Implements the registered operators for direct calls where no kernel serves: without autograd, which has formulas
# of its own. The public functions call plain PyTorch itself.


def _plain_module(op: str, value: Tensor, sums: bool = False) -> Any:
    """The module of plain PyTorch for a call. `sums`: a fallback on a GPU would sum its gradients in no fixed order."""
    if sums and value.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        return reference
    return _PLAIN[dispatch.plain(op, value) or "fallback"]


def _ms_deform_attn_plain(
    value: Tensor,
    levels: list[int],
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    counts: list[int],
) -> Tensor:
    sizes = read_levels(levels, spatial_shapes, level_start_index)
    module = _plain_module("ms_deform_attn", value)
    out: Tensor = module.ms_deform_attn(value, sizes, locations, weights, counts)
    return out


def _ms_deform_attn_backward_plain(
    grad_output: Tensor,
    value: Tensor,
    levels: list[int],
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    counts: list[int],
    needs_value: bool,
    needs_sampling: bool,
) -> tuple[Tensor, ...]:
    sizes = read_levels(levels, spatial_shapes, level_start_index)
    module = _plain_module("ms_deform_attn", value, needs_value)
    return reference_gradients(
        lambda v, x, a: module.ms_deform_attn(v, sizes, x, a, counts),
        grad_output,
        [value, locations, weights],
        [needs_value, needs_sampling, needs_sampling],
    )


def _from_offsets_plain(
    value: Tensor,
    levels: list[int],
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    counts: list[int],
    offset_scale: float,
) -> Tensor:
    sizes = read_levels(levels, spatial_shapes, level_start_index)
    module = _plain_module("ms_deform_attn_from_offsets", value)
    out: Tensor = module.ms_deform_attn_from_offsets(
        value, sizes, reference_points, offsets, logits, counts, offset_scale
    )
    return out


def _from_offsets_backward_plain(
    grad_output: Tensor,
    value: Tensor,
    levels: list[int],
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    counts: list[int],
    offset_scale: float,
    needs_value: bool,
    needs_reference: bool,
    needs_sampling: bool,
) -> tuple[Tensor, ...]:
    sizes = read_levels(levels, spatial_shapes, level_start_index)
    module = _plain_module("ms_deform_attn_from_offsets", value, needs_value)
    return reference_gradients(
        lambda v, r, o, a: module.ms_deform_attn_from_offsets(v, sizes, r, o, a, counts, offset_scale),
        grad_output,
        [value, reference_points, offsets, logits],
        [needs_value, needs_reference, needs_sampling, needs_sampling],
    )


def _register(name: str, plain: Any, plain_backward: Any, value_gradient: int) -> None:
    """Registers a forward and a backward operator; argument `value_gradient` of the backward is `needs_value`."""
    dispatch.register(
        dispatch.Operator(
            name, library=True, triton="m2f_kernels.ops.ms_deform_attn.triton", float64=True, reproducible=False
        ),
        {name: plain, f"{name}_backward": plain_backward},
        {f"{name}_backward": lambda args: bool(args[value_gradient])},
    )


_register("ms_deform_attn", _ms_deform_attn_plain, _ms_deform_attn_backward_plain, -2)
_register("ms_deform_attn_from_offsets", _from_offsets_plain, _from_offsets_backward_plain, -3)


# ---------------------------------------------------------------- fake kernels
# Arguments in schema order; only shapes matter, so each names what it needs.


def _fake_output(value: Tensor, sampling: Tensor) -> Tensor:
    n, _, heads, d = value.shape
    return value.new_empty(n, sampling.shape[1], heads * d)


def _fake_gradients(inputs: list[Tensor], needed: list[bool]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needed, strict=True))


@torch.library.register_fake("m2f::ms_deform_attn", lib=LIBRARY)
def _(value: Tensor, *rest: Any) -> Tensor:
    _, _, _, locations, _, _ = rest
    return _fake_output(value, locations)


@torch.library.register_fake("m2f::ms_deform_attn_backward", lib=LIBRARY)
def _(grad_output: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, locations, weights, _, needs_value, needs_sampling = rest
    return _fake_gradients([value, locations, weights], [needs_value, needs_sampling, needs_sampling])


@torch.library.register_fake("m2f::ms_deform_attn_from_offsets", lib=LIBRARY)
def _(value: Tensor, *rest: Any) -> Tensor:
    _, _, _, _, offsets, _, _, _ = rest
    return _fake_output(value, offsets)


@torch.library.register_fake("m2f::ms_deform_attn_from_offsets_backward", lib=LIBRARY)
def _(grad_output: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, reference_points, offsets, logits, _, _, needs_value, needs_reference, needs_sampling = rest
    return _fake_gradients(
        [value, reference_points, offsets, logits], [needs_value, needs_reference, needs_sampling, needs_sampling]
    )


# ---------------------------------------------------------------- autograd


def gradients(grad_output: Tensor, inputs: list[Any], needs_value: bool, needs_sampling: bool) -> tuple[Tensor, ...]:
    """Gradients of value, locations and weights, empty if not needed; `inputs` as in the schema of ms_deform_attn."""
    plain = dispatch.plain("ms_deform_attn", inputs[0]) is not None
    op: Any = _ms_deform_attn_backward_plain if plain else torch.ops.m2f.ms_deform_attn_backward
    return op(grad_output, *inputs, needs_value, needs_sampling)


def _ms_deform_attn_vjp(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    inputs = saved_inputs(ctx)
    needs = ctx.needs_input_grad
    needs_value, needs_sampling = needs[0], needs[4] or needs[5]
    found = torch.ops.m2f.ms_deform_attn_backward(grad_output, *inputs, needs_value, needs_sampling)
    grad_value, grad_locations, grad_weights = differentiable_once(_TITLE, found, [grad_output, *inputs])
    return (
        grad_value if needs_value else None,
        *(None, None, None),
        grad_locations if needs[4] else None,
        grad_weights if needs[5] else None,
        None,
    )


def _from_offsets_vjp(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    inputs = saved_inputs(ctx)
    needs = ctx.needs_input_grad
    needs_value, needs_reference, needs_sampling = needs[0], needs[4], needs[5] or needs[6]
    found = torch.ops.m2f.ms_deform_attn_from_offsets_backward(
        grad_output, *inputs, needs_value, needs_reference, needs_sampling
    )
    grad_value, grad_reference, grad_offsets, grad_logits = differentiable_once(_TITLE, found, [grad_output, *inputs])
    return (
        grad_value if needs_value else None,
        *(None, None, None),
        grad_reference if needs_reference else None,
        grad_offsets if needs[5] else None,
        grad_logits if needs[6] else None,
        *(None, None),
    )


register_autograd("ms_deform_attn", _TITLE, _ms_deform_attn_vjp)
register_autograd("ms_deform_attn_from_offsets", _TITLE, _from_offsets_vjp)
for _name in ("ms_deform_attn", "ms_deform_attn_from_offsets"):
    register_vmap(_name, shared=(2, 3))
    register_vmap(f"{_name}_backward", shared=(3, 4))
