"""Converts callers' descriptions of the feature levels into the two forms that the operators take.

`levels` is `(h, w, start)` per level, flattened, on the host. If the sizes
exist only in a tensor whose values cannot be read now (on a GPU, where reading is a
synchronisation, or while tracing), `levels` is empty and the tensors are passed on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor

from m2f_kernels._checks import check_dense, check_same_device, describe, host_size, tracing

MAX_LEVELS = 16

#: What callers may pass for `spatial_shapes`.
SpatialShapes = Tensor | Sequence[Sequence[int]]


class Levels(NamedTuple):
    """The three leading schema arguments that describe the levels."""

    levels: list[int]
    spatial_shapes: Tensor | None
    level_start_index: Tensor | None

    @property
    def num_levels(self) -> int:
        return len(self.levels) // 3 if self.spatial_shapes is None else host_size(self.spatial_shapes.shape[0])


def _unreadable(tensor: Tensor) -> bool:
    traced = tracing() and not torch.onnx.is_in_onnx_export()
    return tensor.device.type != "cpu" or traced or torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def _check_integers(name: str, tensor: Tensor, ndim: int, layout: str) -> None:
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32; got {describe(tensor)}")
    check_dense(name, tensor)
    if tensor.dim() != ndim or (ndim == 2 and tensor.shape[1] != 2):
        raise ValueError(f"{name}: expected {layout}; got {describe(tensor)}")


def _integers(name: str, values: Any, expected: str) -> list[Any]:
    """`values` as a list of integers, symbolic ones included; NumPy's are taken too."""
    try:
        items = list(values)
    except TypeError:
        items = [None]
    if all(isinstance(v, (Integral, SymInt)) for v in items):
        return [v if isinstance(v, SymInt) else int(v) for v in items]
    raise TypeError(f"{name}: expected {expected}; got {describe(values)}")


def _host_levels(sizes: list[tuple[int, int]], starts: Sequence[int] | None, length: int) -> list[int]:
    flat: list[int] = []
    for i, (h, w) in enumerate(sizes):
        if h < 1 or w < 1:
            raise ValueError(f"spatial_shapes: expected sizes of at least 1; got {(h, w)} for level {i}")
    total = sum(h * w for h, w in sizes)
    if total != length:
        raise ValueError(
            f"spatial_shapes: expected levels that sum to value's {length} positions; got {sizes}, which sum to {total}"
        )
    end = 0
    for i, (h, w) in enumerate(sizes):
        start = end if starts is None else starts[i]
        if start < 0 or start + h * w > length:
            raise ValueError(
                f"level_start_index: expected level {i} of {h} x {w} to lie within value's {length} positions; "
                f"it starts at {start}"
            )
        flat += [h, w, start]
        end += h * w
    if starts is not None:
        # Levels with as many positions as value has cover all of them exactly if no two levels overlap.
        order = sorted(range(len(sizes)), key=lambda i: starts[i])
        for first, second in itertools.pairwise(order):
            if starts[first] + sizes[first][0] * sizes[first][1] > starts[second]:
                raise ValueError(
                    f"level_start_index: expected levels that do not overlap; got {list(starts)} for sizes {sizes}, "
                    f"where levels {first} and {second} do"
                )
    return flat


def _traced_sizes(sizes: Any) -> Any:
    """Pairs of sizes as one tensor [L, 2] under `torch.jit.trace`, where they are tensors: the trace depends on them.

    The ONNX exporter that traces gets integers, and writes `GridSample` for these sizes only.
    """
    try:
        pairs = [list(pair) for pair in sizes]
    except TypeError:
        return sizes
    if isinstance(sizes, Tensor) or not any(isinstance(side, Tensor) for pair in pairs for side in pair):
        return sizes

    if torch.onnx.is_in_onnx_export():
        return [[host_size(side) for side in pair] for pair in pairs]

    def scalar(side: Any) -> Tensor:
        if not isinstance(side, Tensor):
            return torch.tensor(side, dtype=torch.int64, device="cpu")
        return side.to("cpu", torch.int64)

    return torch.stack([torch.stack([scalar(side) for side in pair]) for pair in pairs])


def resolve_levels(
    spatial_shapes: SpatialShapes, level_start_index: Tensor | Sequence[int] | None, value: Tensor
) -> Levels:
    """The levels in the form of the operators' schema, after checking them.

    Args:
        spatial_shapes: `(h, w)` of each level, as pairs or an integer tensor [L, 2].
        level_start_index: first position of each level in value, [L]; None for
            levels that follow each other. On a GPU the kernel reads it; it is
                ignored if `spatial_shapes` is on the host.
        value: [N, S, H, D]; the levels have to cover its S positions.

    Raises:
        ValueError, TypeError: bad input; the message names the argument.
    """
    length = value.shape[1]
    if tracing():
        spatial_shapes = _traced_sizes(spatial_shapes)
    if isinstance(spatial_shapes, Tensor):
        _check_integers("spatial_shapes", spatial_shapes, 2, "[L, 2]")
        count = host_size(spatial_shapes.shape[0])
    else:
        expected = "a tensor [L, 2] or pairs (h, w) of integers"
        try:
            pairs = [_integers("spatial_shapes", pair, expected) for pair in spatial_shapes]
        except TypeError:
            pairs = [[]]
        if isinstance(spatial_shapes, str) or any(len(pair) != 2 for pair in pairs):
            raise TypeError(f"spatial_shapes: expected {expected}; got {describe(spatial_shapes)}")
        count = len(pairs)
    if not 1 <= count <= MAX_LEVELS:
        raise ValueError(f"spatial_shapes: expected 1 to {MAX_LEVELS} levels; got {count}")

    starts = level_start_index
    if isinstance(starts, Tensor):
        _check_integers("level_start_index", starts, 1, "[L]")
    elif starts is not None:
        starts = _integers("level_start_index", starts, "a tensor [L] or integers")
    if starts is not None and len(starts) != count:
        raise ValueError(f"level_start_index: expected {count} entries, one per level; got {len(starts)}")
    for name, tensor in (("spatial_shapes", spatial_shapes), ("level_start_index", starts)):
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            check_same_device(name, tensor, "value", value)

    if isinstance(spatial_shapes, Tensor) and _unreadable(spatial_shapes):
        shapes = spatial_shapes.to(value.device, torch.int64).contiguous()
        if starts is None:
            starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        elif not isinstance(starts, Tensor):
            starts = torch.tensor(starts, dtype=torch.int64, device=shapes.device)
        return Levels([], shapes, starts.to(value.device, torch.int64).contiguous())

    if isinstance(spatial_shapes, Tensor):
        pairs = spatial_shapes.tolist()
    if isinstance(starts, Tensor):
        starts = None if _unreadable(starts) else starts.tolist()
    return Levels(_host_levels([(h, w) for h, w in pairs], starts, length), None, None)


def read_levels(levels: Sequence[int], spatial_shapes: Tensor | None, level_start_index: Tensor | None) -> list[int]:
    """`(h, w, start)` per level, flattened, read from the tensors if needed. The inverse of :func:`resolve_levels`."""
    if levels:
        return list(levels)
    if spatial_shapes is None or level_start_index is None:
        raise ValueError("levels: expected (h, w, start) per level, or spatial_shapes and level_start_index as tensors")
    return torch.cat([spatial_shapes, level_start_index[:, None]], 1).flatten().tolist()
