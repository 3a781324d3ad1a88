"""What both decoders are made of."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CheckpointedLayer(nn.Module):
    """A layer that, where `activation_checkpointing` is set, keeps its inputs alone and computes twice."""

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
        return self.norm(x + self.fc2(F.relu(self.fc1(x), inplace=True)))


def gathers(module: nn.Module) -> bool:
    """Whether `module` or a part of it gathers its parameters when it is called (FSDP2), and has them only then."""
    # Where the class does not exist, nobody has sharded anything with it.
    sharded: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return any(isinstance(part, sharded) for part in module.modules())


def sine_positions(size: tuple[int, int], channels: int, like: Tensor) -> Tensor:
    """Sine position embedding [h*w, channels] in like's dtype (DETR, Carion et al. 2020): rows first, then columns.

    A row's part depends on the row alone and a column's on the column alone, so only h + w of them are computed.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    half = channels // 2
    exponent = 2 * torch.arange(half // 2, device=like.device, dtype=dtype) / half

    def axis(length: int) -> Tensor:
        position = torch.arange(1, length + 1, device=like.device, dtype=dtype) / (length + 1e-6) * (2 * math.pi)
        angle = position[:, None] / 10000**exponent
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    h, w = size
    rows, columns = axis(h)[:, None].expand(h, w, half), axis(w)[None].expand(h, w, half)
    return torch.cat([rows, columns], -1).flatten(0, 1).to(like.dtype)
