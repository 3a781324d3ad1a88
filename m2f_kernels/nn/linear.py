"""A linear layer and its activation, as one kernel where a device has one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear_relu(linear: nn.Module, x: Tensor) -> Tensor:
    """`relu(linear(x))`, without gradients as one kernel where the device has one.

    Args:
        linear: an `nn.Linear`, or any module in its place; its hooks run.
        x: [..., in_features].
    """
    hooked = bool(linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))
    own = type(linear) is nn.Linear and linear.bias is not None and not hooked
    if not own or not x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return F.relu(linear(x), inplace=not hooked)  # a hook may keep what it sees
    assert isinstance(linear, nn.Linear)
    found: Tensor = torch._addmm_activation(linear.bias, x.reshape(-1, x.shape[-1]), linear.weight.t())
    return found.view(*x.shape[:-1], linear.out_features)
