"""Copies from the host to a device that do not wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

#: Device types whose copies wait unless they come from pinned memory.
PINNED = {"cuda"}


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """`host` copied to `device`. The copy is asynchronous, and `host` may be changed at once."""
    if device.type in PINNED:
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
