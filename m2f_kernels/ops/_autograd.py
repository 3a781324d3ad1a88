"""Code shared by the autograd formulas of all operators, and :func:`call`, by which public functions call operators.

`torch.library.register_autograd` makes an `autograd.Function` that `torch.func` refuses, and that silently ignores
forward-mode tangents. So :func:`call` uses an autograd function of this module, with the same formula, while one of the
two is active. Otherwise, also under `torch.compile` and `torch.export`, it calls the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

from m2f_kernels._checks import traced_for_onnx
from m2f_kernels._library import LIBRARY, NAMESPACE


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
    """Identity on `gradients` whose backward raises, so that a double backward is an error instead of zero.

    Without it PyTorch would take the gradients for constants.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(title: str, count: int, *sources_and_gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in sources_and_gradients[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.title = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"m2f_kernels: {ctx.title} is differentiable once; its second derivative is not implemented")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(f"m2f_kernels: {ctx.title} is differentiable once; its second derivative is not implemented")


def differentiable_once(title: str, gradients: tuple[Tensor, ...], sources: list[Any]) -> tuple[Tensor, ...]:
    """`gradients` unchanged, but a second derivative raises; `title` names the operator in the message."""
    tensors = [x for x in sources if isinstance(x, Tensor) and (transformed() or x.requires_grad)]
    if not tensors or not (torch.is_grad_enabled() or transformed()):
        return gradients
    return _DifferentiableOnce.apply(title, len(tensors), *tensors, *gradients)


# ---------------------------------------------------------------- torch.func and forward mode


def transformed() -> bool:
    """True if a transform of `torch.func` or forward-mode AD is active, in eager mode."""
    if torch.compiler.is_compiling():
        return False
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


#: The backward formula of each differentiable operator, and the function that saves tensors for it.
_FORMULAS: dict[str, type[torch.autograd.Function]] = {}


def call(name: str, *args: Any) -> Any:
    """`torch.ops.m2f.<name>(*args)`, with derivatives under `torch.func` too, and decomposed for ONNX' exporters.

    Raises:
        NotImplementedError: forward-mode AD reaches an operator without a formula for it.
    """
    if traced_for_onnx():
        return _for_onnx(name)(*args)
    function = _FORMULAS.get(name)
    if function is None or not transformed():
        return getattr(torch.ops.m2f, name)(*args)
    # Tensors in a list are targets, which have no gradient; only top-level arguments are looked at.
    return function.apply(*args)


def _for_onnx(name: str) -> Callable[..., Any]:
    """The function that PyTorch's ONNX exporters trace: an operator's decomposition, or without one the operator."""
    from m2f_kernels.integrations.decompositions import decompositions

    op = getattr(torch.ops.m2f, name)
    return decompositions().get(op.default, op)


def register_autograd(
    name: str,
    title: str,
    vjp: Callable[..., Any],
    setup: Callable[..., None] = setup_context,
    jvp: Callable[..., Any] | None = None,
) -> None:
    """Give `m2f::<name>` a derivative: with PyTorch's dispatcher, and for :func:`call`.

    Args:
        title: names the operator in messages.
        vjp, setup: as in `torch.library.register_autograd`.
        jvp: `jvp(tensors, constants, tangents)`, the tangent of the output, from the operator's inputs and a tangent or
            None for each of them; without one, forward-mode AD is an error.
    """
    torch.library.register_autograd(f"{NAMESPACE}::{name}", vjp, setup_context=setup, lib=LIBRARY)

    def forward(*inputs: Any) -> Any:
        return getattr(torch.ops.m2f, name)(*inputs)

    def setup_both(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup(ctx, inputs, output)
        if jvp is not None:
            ctx.set_materialize_grads(False)  # so that a tensor without a tangent has None
            ctx.constants_for_forward = [x for x in inputs if not isinstance(x, Tensor)]
            ctx.save_for_forward(*(x for x in inputs if isinstance(x, Tensor)))

    def backward(ctx: Any, *grads: Any) -> Any:
        gradients = vjp(ctx, *grads)
        # For a list of tensors the dispatcher takes a list of gradients, an autograd function a single None.
        return tuple(None if isinstance(g, list) else g for g in gradients)

    def forward_mode(ctx: Any, *tangents: Any) -> Any:
        if jvp is None:
            raise NotImplementedError(
                f"m2f_kernels: forward-mode AD of {title} is not implemented; "
                'with m2f_kernels.use_backend("reference") it is plain PyTorch, which has it'
            )
        return jvp(ctx.saved_tensors, ctx.constants_for_forward, tangents)

    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _MAPS[name](info, in_dims, *inputs)

    methods = {"forward": forward, "setup_context": setup_both, "backward": backward, "jvp": forward_mode, "vmap": vmap}
    _FORMULAS[name] = type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in methods.items()})


#: The `torch.vmap` rule of each operator.
_MAPS: dict[str, Callable[..., Any]] = {}


def register_vmap(name: str, shared: Sequence[int] | None = None) -> None:
    """Register a `torch.vmap` rule for `m2f::<name>`.

    Args:
        shared: positions of the tensors without a batch axis, where all others and all outputs begin with the batch:
            the mapped axis then becomes part of it, in one call. None for an operator that is called once for each
            element.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        if shared is None or any(in_dims[i] is not None for i in shared if i < len(inputs)):
            return _one_by_one(name, info.batch_size, in_dims, inputs)
        return _in_the_batch(name, info.batch_size, in_dims, inputs, shared)

    _MAPS[name] = rule
    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=LIBRARY)


def _one_by_one(name: str, count: int, in_dims: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    flat, spec = _pytree.tree_flatten(inputs)
    dims = _pytree.tree_leaves(in_dims, is_leaf=lambda x: x is None)
    outputs = []
    for i in range(count):
        chosen = [x if dim is None else x.select(dim, i) for x, dim in zip(flat, dims, strict=True)]
        outputs.append(call(name, *_pytree.tree_unflatten(chosen, spec)))
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def _in_the_batch(
    name: str, count: int, in_dims: Any, inputs: tuple[Any, ...], shared: Sequence[int]
) -> tuple[Any, Any]:
    given: list[Any] = list(inputs)
    images = 0
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and i not in shared:
            placed = x.expand(count, *x.shape) if in_dims[i] is None else x.movedim(in_dims[i], 0)
            images = placed.shape[1]
            given[i] = placed.flatten(0, 1)
    found = call(name, *given)
    outputs = (found,) if isinstance(found, Tensor) else tuple(found)
    # Gradients that were not needed are empty, of rank 1.
    mapped = [x.dim() > 1 or images == 0 for x in outputs]
    unfolded = tuple(x.unflatten(0, (count, images)) if m else x for x, m in zip(outputs, mapped, strict=True))
    dims = tuple(0 if m else None for m in mapped)
    return (unfolded[0], dims[0]) if isinstance(found, Tensor) else (unfolded, dims)
