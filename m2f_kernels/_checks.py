"""Argument checks shared by the operators: each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_floating(name: str, value: object, layout: str) -> Tensor:
    """Require a floating point tensor whose rank is that of `layout`, for example "[N, S, H, D]"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}; got {describe(value)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16; got {describe(value)}")
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
