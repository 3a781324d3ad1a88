"""The dtype in which an operator computes, and the one that autocast wants."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(tensor: Tensor) -> Tensor:
    """`tensor` in autocast's dtype where autocast is on; float64 stays, as in PyTorch's own autocast rules."""
    device = tensor.device.type
    # The meta device has no autocast, and asking raises. torch.amp.is_autocast_available would tell, but
    # torch.compile of PyTorch 2.11 does not trace it.
    if device != "meta" and tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context with autocast off for tensors of `device`; also for the meta device, where PyTorch's own raises."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
