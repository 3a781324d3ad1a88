"""Layers of which both decoders are made."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2f_kernels.constants import ConstantCache
from m2f_kernels.nn import linear_relu


class CheckpointedLayer(nn.Module):
    """A layer that keeps only its inputs for backward, and computes twice, if `activation_checkpointing` is set."""

    activation_checkpointing = False

    def __call__(self, *args: Any) -> Any:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


class FeedForward(nn.Module):
    """Two linear layers, residual and layer norm."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.norm = nn.LayerNorm(channels)
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        # The hidden activations are the largest tensor of either decoder: one copy of them, not two.
        return self.norm(x + self.fc2(linear_relu(self.fc1, x)))


#: Positions of a row or a column, and centres of pixels: a few KiB each.
_CONSTANTS = ConstantCache(64)


def gathers(module: nn.Module) -> bool:
    """True if `module` or a part of it gathers its parameters when it is called (FSDP2), and has them only then."""
    # Where the class does not exist, nobody has sharded anything with it.
    sharded: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return any(isinstance(part, sharded) for part in module.modules())


def sine_positions(size: tuple[int, int], channels: int, like: Tensor) -> Tensor:
    """Sine position embedding [h*w, channels] in like's dtype (DETR, Carion et al. 2020): rows first, then columns.

    One half depends on the row only, the other on the column only, so h + w vectors are computed, once for each length.
    """
    half = channels // 2

    def axis(length: int) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        exponent = 2 * torch.arange(half // 2, device=like.device, dtype=dtype) / half
        position = torch.arange(1, length + 1, device=like.device, dtype=dtype) / (length + 1e-6) * (2 * math.pi)
        angle = position[:, None] / 10000**exponent
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(like.dtype)

    h, w = size
    rows, columns = (_CONSTANTS.get(partial(axis, n), ("sine", n, half), like) for n in size)
    return torch.cat([rows[:, None].expand(h, w, half), columns[None].expand(h, w, half)], -1).flatten(0, 1)


def pixel_centres(sizes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Normalised (x, y) of every pixel of every level [S, 2]; computed once for each list of sizes."""

    def make() -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        grids = []
        for h, w in sizes:
            y = (torch.arange(h, device=like.device, dtype=dtype) + 0.5) / h
            x = (torch.arange(w, device=like.device, dtype=dtype) + 0.5) / w
            grids.append(torch.stack([x[None].expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1))
        return torch.cat(grids)

    return _CONSTANTS.get(make, ("centres", *sizes), like)
