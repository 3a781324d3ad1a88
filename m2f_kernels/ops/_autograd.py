"""What the autograd formulas of all operators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save an operator's tensors apart from its constants; both are listed in schema order."""
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.constants = [x for x in inputs if not isinstance(x, Tensor)]


def saved_inputs(ctx: Any) -> list[Any]:
    """The inputs that `setup_context` saved, in schema order."""
    tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
    return [next(tensors) if is_tensor else next(constants) for is_tensor in ctx.is_tensor]


def reference_gradients(
    function: Callable[..., Tensor], grad_output: Tensor, inputs: list[Tensor], needed: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)` by PyTorch's autograd; an empty tensor for an input that needs none."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        wanted = [x for x, need in zip(leaves, needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(function(*leaves), wanted, grad_output) if wanted else ())
    return tuple(next(gradients) if need else x.new_empty(0) for x, need in zip(inputs, needed, strict=True))


class _DifferentiableOnce(torch.autograd.Function):
    """Passes `gradients` on and ties them to what they were computed from, so that differentiating again is an error.

    Without it PyTorch would take them for constants, and second derivatives for zero.
    """

    @staticmethod
    def forward(ctx: Any, title: str, count: int, *sources_and_gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.title = title
        return tuple(g.view_as(g) for g in sources_and_gradients[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"m2f_kernels: {ctx.title} is differentiable once; its second derivative is not implemented")


def differentiable_once(title: str, gradients: tuple[Tensor, ...], sources: list[Any]) -> tuple[Tensor, ...]:
    """`gradients`, such that a second derivative raises; `title` names the operator in the message."""
    tensors = [x for x in sources if isinstance(x, Tensor) and x.requires_grad]
    if not torch.is_grad_enabled() or not tensors:
        return gradients
    return _DifferentiableOnce.apply(title, len(tensors), *tensors, *gradients)
