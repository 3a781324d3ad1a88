"""The two functions of the extension that Deformable-DETR ships, and that its many copies call, on this package's op.

The interface as published: `ms_deform_attn_forward` and `ms_deform_attn_backward` take tensors of one call, know
nothing of autograd, and are given `im2col_step`, the number of images per kernel launch. It is checked and then has no
effect: every batch size works.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from m2f_kernels._checks import check_floating, check_same_device, check_shape, describe
from m2f_kernels.ops.ms_deform_attn import interface as op
from m2f_kernels.ops.ms_deform_attn.levels import resolve_levels


def _check_step(im2col_step: object) -> None:
    if isinstance(im2col_step, bool) or not isinstance(im2col_step, int):
        raise TypeError(f"im2col_step: expected an integer of at least 1; got {describe(im2col_step)}")
    if im2col_step < 1:
        raise ValueError(f"im2col_step: expected an integer of at least 1; got {im2col_step}")


def forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention, as :func:`m2f_kernels.ms_deform_attn`; no autograd.

    Args:
        value: [N, S, H, D].
        spatial_shapes: [L, 2], (h, w).
        level_start_index: [L].
        sampling_loc: [N, Q, H, L, P, 2].
        attn_weight: [N, Q, H, L, P].
        im2col_step: at least 1; has no effect.

    Returns:
        [N, Q, H*D] in value's dtype, also under autocast, as from the compiled extension.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    _check_step(im2col_step)
    check_floating("value", value, "[N, S, H, D]")
    device = value.device.type
    no_autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with torch.no_grad(), no_autocast:
        return op.ms_deform_attn(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)


def backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward` for value, sampling_loc and attn_weight, each in its input's dtype.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    _check_step(im2col_step)
    check_floating("value", value, "[N, S, H, D]")
    check_floating("sampling_loc", sampling_loc, "[N, Q, H, L, P, 2]")
    check_floating("attn_weight", attn_weight, "[N, Q, H, L, P]")
    check_floating("grad_output", grad_output, "[N, Q, H*D]")
    n, _, heads, d = value.shape
    levels = resolve_levels(spatial_shapes, level_start_index, value)
    q, points = sampling_loc.shape[1], sampling_loc.shape[4]
    shape = (n, q, heads, levels.num_levels, points)
    check_shape("sampling_loc", sampling_loc, "[N, Q, H, L, P, 2]", (*shape, 2))
    check_shape("attn_weight", attn_weight, "[N, Q, H, L, P]", shape)
    check_shape("grad_output", grad_output, "[N, Q, H*D]", (n, q, heads * d))
    for name, tensor in (("sampling_loc", sampling_loc), ("attn_weight", attn_weight), ("grad_output", grad_output)):
        check_same_device(name, tensor, "value", value)
    flat = [sampling_loc.flatten(3, 4), attn_weight.flatten(3, 4), [points] * levels.num_levels]
    with torch.no_grad():
        grad_value, grad_loc, grad_weight = op.gradients(
            grad_output.to(value.dtype), [value, *levels, *flat], needs_value=True, needs_sampling=True
        )
    return grad_value, grad_loc.view_as(sampling_loc), grad_weight.view_as(attn_weight)
