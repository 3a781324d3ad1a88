"""Shared by every operator's `triton.py`: launching kernels, architectures, recording.

Imported with them at the first call of a Triton kernel, never at the import of the package. A launch goes through
:func:`launch`, so that :func:`recording` can collect the kernels of an operator with their production configurations
on tensors of the meta device: that is how they are compiled ahead of time on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels import _tuning

#: Triton's, its first two numbers.
VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])
#: True in Triton's interpreter (TRITON_INTERPRET=1), which runs kernels on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class Architecture:
    """The properties of a GPU that launch configurations depend on.

    Attributes:
        capability: compute capability, 90 for sm_90; 0 for AMD.
        multiprocessors: their number.
        warp_size: threads of a warp.
        gfx: AMD's name, such as "gfx942"; empty for NVIDIA.
    """

    capability: int
    multiprocessors: int
    warp_size: int = 32
    gfx: str = ""

    @property
    def name(self) -> str:
        return self.gfx or f"sm_{self.capability}"


#: Options of every kernel. Triton 3.10 will no longer fuse multiplication and addition unless told to.
OPTIONS = {"enable_fp_fusion": True}

#: A part of each kind that kernels are compiled ahead of time for: T4, A100, RTX 3090, RTX 4090, H100, B200, RTX 5090;
#: MI250X (one of its two dies), MI300X, RX 7900 XTX.
ARCHITECTURES: dict[int | str, Architecture] = {
    75: Architecture(75, 40),
    80: Architecture(80, 108),
    86: Architecture(86, 82),
    89: Architecture(89, 128),
    90: Architecture(90, 132),
    100: Architecture(100, 148),
    120: Architecture(120, 170),
    "gfx90a": Architecture(0, 110, 64, "gfx90a"),
    "gfx942": Architecture(0, 304, 64, "gfx942"),
    "gfx1100": Architecture(0, 96, 32, "gfx1100"),
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: what `triton.jit` returned.
        arguments: by name, in the kernel's order, constants included.
        grid: number of programs along each axis.
        num_warps, num_stages: Triton's options.
    """

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int


#: Programs along the axes y and z of a grid; along x there may be 2^31 - 1.
MAX_GRID = 65535

_recording: tuple[Architecture, list[Launch]] | None = None


@contextmanager
def recording(architecture: Architecture) -> Iterator[list[Launch]]:
    """Collect launches instead of making them, configured for `architecture`; tensors may be on the meta device."""
    global _recording
    launches: list[Launch] = []
    before, _recording = _recording, (architecture, launches)
    try:
        yield launches
    finally:
        _recording = before


@cache
def _cuda_architecture(index: int) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        gfx = str(properties.gcnArchName).split(":")[0]
        return Architecture(0, properties.multi_processor_count, properties.warp_size, gfx)
    return Architecture(10 * properties.major + properties.minor, properties.multi_processor_count)


def architecture(device: torch.device) -> Architecture:
    """The architecture to configure a launch for; H100's in the interpreter."""
    if _recording is not None:
        return _recording[0]
    if device.type == "cuda":
        return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)
    return ARCHITECTURES[90]


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 1, **arguments: Any) -> None:
    """`kernel[grid](**arguments)` on the device of the first tensor among them, and its current stream.

    Args:
        kernel: what `triton.jit` returned.
        grid: numbers of programs, all positive; axis 0 may be as large as 2^31 - 1, the others `MAX_GRID`.
        num_warps, num_stages: Triton's options.
        arguments: the kernel's parameters: tensors, numbers and constants.

    Raises:
        ValueError: the grid is larger.
    """
    if any(count > (MAX_GRID if axis else 2**31 - 1) for axis, count in enumerate(grid)):
        raise ValueError(f"{kernel.__name__}: expected at most 2^31 - 1 x {MAX_GRID} x {MAX_GRID} programs; got {grid}")
    if _recording is not None:
        in_order = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        _recording[1].append(Launch(kernel, in_order, grid, num_warps, num_stages))
        return
    device: torch.device = next(x for x in arguments.values() if isinstance(x, Tensor)).device
    if INTERPRETED:
        kernel[grid](**arguments)
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, **OPTIONS}
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments, **options)
    else:
        kernel[grid](**arguments, **options)


def strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """The strides of the leading axes as arguments of a kernel: of `strides("key", key, "nh")` "key_n" and "key_h"."""
    return {f"{name}_{axis}": tensor.stride(i) for i, axis in enumerate(axes)}


def rows_and_blocks(rows: int, blocks: int) -> tuple[int, int, int]:
    """The grid of a kernel that processes many rows, each in blocks; its programs get their block from `block_id`."""
    layers = triton.cdiv(blocks, MAX_GRID)
    return rows, triton.cdiv(blocks, layers), layers


@triton.jit
def block_id():  # type: ignore[no-untyped-def]
    """The index within its row of the block that this program of a `rows_and_blocks` grid has."""
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


def in_parts(
    function: Callable[..., tuple[Tensor, ...]], limit: int, axes: tuple[int, ...], *tensors: Tensor, joined: int = 0
) -> tuple[Tensor, ...]:
    """`function(*tensors)`, at most `limit` elements at a time along one axis.

    Args:
        axes: that axis of each tensor; -1 for a tensor that every part gets whole.
        joined: that axis of the results.
    """
    count = next(x.shape[axis] for x, axis in zip(tensors, axes, strict=True) if axis >= 0)
    found = []
    for first in range(0, count, limit):
        size = min(limit, count - first)
        parts = (x if axis < 0 else x.narrow(axis, first, size) for x, axis in zip(tensors, axes, strict=True))
        found.append(function(*parts))
    return tuple(torch.cat(results, joined) for results in zip(*found, strict=True))


def contiguous_last(tensor: Tensor) -> Tensor:
    """`tensor` itself if its last axis has unit stride (or at most one element), else a contiguous copy."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


_PRECISION = tl.constexpr("tf32x3" if _tuning.TF32X3 else "ieee")


@triton.jit
def dot(a, b):  # type: ignore[no-untyped-def]
    """a @ b in float32: float32 factors without plain TF32, low precision exactly as the tensor cores multiply it."""
    if _INTERPRETED:
        # The interpreter keeps bfloat16 as raw 16-bit integers and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=_PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 in another floating dtype, rounded to nearest."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter does not round.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
