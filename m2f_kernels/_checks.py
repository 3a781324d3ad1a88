"""Argument checks shared by the operators: each error names the argument, what was expected and what came."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_LARGEST = sys.float_info.max
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.layout != torch.strided:
            dtype = f"{str(value.layout).removeprefix('torch.')} {dtype}"
        return f"a {dtype} tensor of shape {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def tracing() -> bool:
    """True while `torch.jit.trace` runs, also inside the ONNX exporter."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def traced_for_onnx() -> bool:
    """True while one of the ONNX exporters traces: PyTorch's two, and that of `transformers`.

    The latter exports a program and hands it to PyTorch's, which does not know this package's operators.
    """
    if not (tracing() or torch.compiler.is_exporting()):
        return False
    return bool(torch.onnx.is_in_onnx_export()) or _transformers_writes_onnx()


def _transformers_writes_onnx() -> bool:
    """True while the exporter of `transformers` has a step of PyTorch's replaced, as it does from the export on."""
    exporter = "transformers.exporters.exporter_onnx"
    core = sys.modules.get("torch.onnx._internal.exporter._core") if exporter in sys.modules else None
    prepare = getattr(core, "_prepare_exported_program_for_export", None)
    return getattr(prepare, "__module__", None) == exporter


def host_size(value: Any) -> Any:
    """A size as an integer, since `torch.jit.trace` makes every size a tensor. Other values are returned unchanged."""
    return int(value) if tracing() and isinstance(value, Tensor) and value.dim() == 0 else value


def check_dense(name: str, value: Tensor) -> None:
    """Require an ordinary tensor, with strides: not a sparse one."""
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor; got {describe(value)}")


def check_floating(name: str, value: object, layout: str) -> Tensor:
    """Require a floating point tensor whose rank is that of `layout`, for example "[N, S, H, D]"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}; got {describe(value)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16; got {describe(value)}")
    check_dense(name, value)
    if value.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: expected {layout}; got {describe(value)}")
    return value


def check_shape(name: str, value: Tensor, layout: str, expected: Sequence[int]) -> None:
    """Require `value.shape == expected`; `layout` names the axes in the message."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected {layout} = {list(expected)}; got {describe(value)}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected it on {other.device}, where {other_name} is; got {describe(value)}")


def check_same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        expected = str(other.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected {other_name}'s dtype {expected}; got {describe(value)}")


def check_number(name: str, value: Any) -> float:
    """Require a finite integer or float; a symbolic number always passes."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number; got {describe(value)}")
    # Comparisons, unlike math.isfinite, are traced where torch.compile makes numbers dynamic; false for a NaN.
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number; got {describe(value)}")
    return float(value)


def readable(value: Tensor) -> bool:
    """True if a tensor's values can be read now: it is on the CPU, and nothing is tracing, compiling or vmapping."""
    if value.device.type != "cpu" or torch.compiler.is_compiling() or tracing() or isinstance(value, FakeTensor):
        return False
    return not torch._C._functorch.is_batchedtensor(value)


def check_indices(name: str, value: object, device: torch.device) -> Tensor:
    """Require int64 [M], on the host or on `device`."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
        raise TypeError(f"{name}: expected an int64 tensor [M]; got {describe(value)}")
    check_dense(name, value)
    if value.device.type != "cpu" and value.device != device:
        raise ValueError(f"{name}: expected it on the CPU or on {device}; got {describe(value)}")
    return value


def check_generator(name: str, value: object, device: torch.device) -> None:
    """Require a generator of random numbers on `device`, or None."""
    if value is None:
        return
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{name}: expected a torch.Generator or None; got {describe(value)}")
    if value.device.type != device.type:
        raise ValueError(f"{name}: expected one on {device}, where the masks are; got one on {value.device}")
