"""mmcv, and with it mmdet and mmseg, and detrex: deformable attention and point sampling of this package.

:func:`patch` replaces methods and functions of the imported packages in place; modules that exist and modules that are
built later use the replacement, parameters and their names stay. :func:`unpatch` takes it back.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import m2f_kernels
from m2f_kernels import dispatch
from m2f_kernels.integrations import _extension
from m2f_kernels.integrations._rebind import replace_everywhere
from m2f_kernels.ops.ms_deform_attn.levels import SpatialShapes

__all__ = ["patch", "unpatch"]

MMCV_MODULE = "mmcv.ops.multi_scale_deform_attn"
DETREX_MODULE = "detrex.layers.multi_scale_deform_attn"

#: Functions that undo the replacements, in the order in which these were made. Empty: not patched.
_undo: list[Callable[[], object]] = []


# ---------------------------------------------------------------- replacements


def _attend(
    self: Any,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    identity: Tensor | None = None,
    query_pos: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    reference_points: Tensor | None = None,
    spatial_shapes: SpatialShapes | None = None,
    level_start_index: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`MultiScaleDeformableAttention.forward` of mmcv and detrex.

    Args:
        query: [Q, N, C], or [N, Q, C] where `self.batch_first`.
        key: not looked at, as in the original.
        value: [S, N, C] or [N, S, C]; None for query.
        identity: query's shape, added to the result; None for query without its position.
        query_pos: query's shape, added to the query.
        key_padding_mask: [N, S], nonzero where value is padding.
        reference_points: [N, Q, L, 2 or 4].
        spatial_shapes: [L, 2], (h, w).
        level_start_index: [L].
        kwargs: `residual` is mmcv's old name of `identity`; others are ignored, as in the original.

    Returns:
        query's shape.
    """
    if reference_points is None or spatial_shapes is None:
        missing = "reference_points" if reference_points is None else "spatial_shapes"
        raise ValueError(f"{missing}: expected a tensor; got None")
    if "residual" in kwargs:
        warnings.warn("`residual` is deprecated, use `identity`", DeprecationWarning, stacklevel=2)
        identity = kwargs["residual"]
    value = query if value is None else value
    identity = query if identity is None else identity
    if query_pos is not None:
        query = query + query_pos
    if not self.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    n, q, _ = query.shape
    projected = self.value_proj(value)
    if key_padding_mask is not None:
        projected = projected.masked_fill(key_padding_mask[..., None].bool(), 0)
    heads, levels, points = self.num_heads, self.num_levels, self.num_points
    output = m2f_kernels.ms_deform_attn_from_offsets(
        projected.unflatten(-1, (heads, -1)),
        spatial_shapes,
        reference_points,
        self.sampling_offsets(query).view(n, q, heads, levels, points, 2),
        self.attention_weights(query).view(n, q, heads, levels * points),
        level_start_index=level_start_index,
    )
    output = self.output_proj(output)
    if not self.batch_first:
        output = output.transpose(0, 1)
    return self.dropout(output) + identity


def _attention_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The method, which hands a call that no kernel serves to `original`."""

    @functools.wraps(original)
    def forward(self: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ours = dispatch.serves("ms_deform_attn_from_offsets", query)
        return (_attend if ours else original)(self, query, *args, **kwargs)

    return forward


def _attention_function(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`multi_scale_deformable_attn_pytorch`: the operator without level_start_index, where a kernel serves it. One
    function per original, so that taking it back knows what it stood for."""

    @functools.wraps(original)
    def multi_scale_deformable_attn_pytorch(
        value: Tensor, value_spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
    ) -> Tensor:
        if not dispatch.serves("ms_deform_attn", value):
            return original(value, value_spatial_shapes, sampling_locations, attention_weights)
        return m2f_kernels.ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)

    return multi_scale_deformable_attn_pytorch


class _Extension:
    """Stands in for detrex's compiled extension in `detrex.layers.multi_scale_deform_attn`: gradients are returned.

    A call that no kernel of this package serves goes to the extension that this one stands for, if there is one.
    """

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)  # the extension's other operators

    def _theirs(self, name: str, value: Tensor) -> Callable[..., Any] | None:
        if not isinstance(value, Tensor) or dispatch.serves("ms_deform_attn", value):
            return None
        return getattr(self._original, name, None)

    def ms_deform_attn_forward(self, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = (self._theirs("ms_deform_attn_forward", value) or _extension.forward)(value, *args, **kwargs)
        return found

    def ms_deform_attn_backward(self, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self._theirs("ms_deform_attn_backward", value) or self._backward)(value, *args, **kwargs)

    def _backward(self, *args: Any, **kwargs: Any) -> Any:
        return _extension.backward(*args, **kwargs)


class _InPlaceExtension(_Extension):
    """Stands in for mmcv's compiled extension in `mmcv.ops.multi_scale_deform_attn`: gradients go into buffers."""

    def _backward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        grad_output: Tensor,
        grad_value: Tensor,
        grad_sampling_loc: Tensor,
        grad_attn_weight: Tensor,
        im2col_step: int,
    ) -> None:
        gradients = _extension.backward(
            value,
            value_spatial_shapes,
            value_level_start_index,
            sampling_locations,
            attention_weights,
            grad_output,
            im2col_step,
        )
        for buffer, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
            buffer.copy_(gradient)


def _point_sample(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`mmcv.ops.point_sample` by the operator; other calls go to `original`."""

    @functools.wraps(original)
    def point_sample(input: Tensor, points: Tensor, align_corners: bool = False, **kwargs: Any) -> Tensor:
        ours = not align_corners and not kwargs and not points.requires_grad and input.dim() == 4
        if not ours or points.dim() not in (3, 4) or not dispatch.serves("point_sample", input):
            return original(input, points, align_corners, **kwargs)
        flat = points.flatten(1, 2) if points.dim() == 4 else points
        flat = flat if flat.dtype == torch.float64 else flat.float()
        sampled = m2f_kernels.point_sample(input, flat)
        return sampled.unflatten(2, points.shape[1:3]) if points.dim() == 4 else sampled

    return point_sample


# ---------------------------------------------------------------- patch and unpatch


def _find(name: str) -> ModuleType | None:
    """The module `name`, or None where it or a package around it is not installed; other failures are raised."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def _set(owner: Any, name: str, value: Any) -> None:
    existed, before = hasattr(owner, name), getattr(owner, name, None)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before) if existed else delattr(owner, name))


def _everywhere(old: Any, new: Any) -> list[str]:
    _undo.append(lambda: replace_everywhere(new, old))
    return replace_everywhere(old, new)


def _patch_attention(module: ModuleType, extension_name: str, extension: type[_Extension]) -> list[str]:
    original = module.multi_scale_deformable_attn_pytorch
    attention: Any = module.MultiScaleDeformableAttention
    _set(attention, "forward", _attention_forward(attention.forward))
    _set(module, extension_name, extension(getattr(module, extension_name, None)))
    return [
        f"{module.__name__}.MultiScaleDeformableAttention.forward",
        f"{module.__name__}.{extension_name}",
        *_everywhere(original, _attention_function(original)),
    ]


def patch() -> list[str]:
    """Replace deformable attention in mmcv (mmdet, mmseg) and detrex, and `point_sample` in mmcv; imports them.

    - `MultiScaleDeformableAttention.forward`, which is the attention of `MSDeformAttnPixelDecoder`, Deformable DETR,
      DINO and others. A subclass that overrides `forward` keeps its own.
    - `ms_deform_attn_forward` and `ms_deform_attn_backward` of the compiled extension, as
      `MultiScaleDeformableAttnFunction` calls them: it then runs on CPU too.
    - `multi_scale_deformable_attn_pytorch` and `mmcv.ops.point_sample`, under whatever name a module imported them.
      `point_sample` with `align_corners=True`, other options of `grid_sample`, 5-d inputs or points that need a
      gradient runs as before.

    Functions are replaced in the namespaces of modules; those that a closure or a registry holds stay. A call with a
    device and dtype that no kernel serves runs the replaced code, that of an extension included. A second call of
    `patch` replaces what was imported since the first.

    Returns:
        the names replaced, as "module.name".

    Raises:
        ImportError: neither mmcv with `mmcv.ops` nor detrex is installed; or the import of one fails.
    """
    _take_back()
    mmcv, detrex = _find(MMCV_MODULE), _find(DETREX_MODULE)
    if mmcv is None and detrex is None:
        raise ImportError("expected mmcv (with mmcv.ops; mmcv-lite has none) or detrex to be installed; found neither")
    try:
        replaced = []
        if mmcv is not None:
            replaced += _patch_attention(mmcv, "ext_module", _InPlaceExtension)
            original = importlib.import_module("mmcv.ops").point_sample
            replaced += _everywhere(original, _point_sample(original))
        if detrex is not None:
            replaced += _patch_attention(detrex, "_C", _Extension)
    except BaseException:
        _take_back()
        raise
    return replaced


def _take_back() -> None:
    while _undo:
        _undo.pop()()


def unpatch() -> None:
    """Undo :func:`patch`, also in modules imported since.

    Raises:
        RuntimeError: nothing is patched.
    """
    if not _undo:
        raise RuntimeError("nothing to undo: patch() has not been called")
    _take_back()
