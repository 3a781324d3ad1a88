"""Operators under `torch.func`, forward-mode AD and activation checkpointing: the right values, or an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import m2f_kernels as m

SIZES = [(5, 4), (2, 3)]
Case = tuple[Callable[..., Any], tuple[Tensor, ...]]


def _random(seed: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return partial(torch.randn, generator=generator), partial(torch.rand, generator=generator)


def deform(seed: int = 0) -> Case:
    randn, rand = _random(seed)
    inputs = randn(2, 26, 2, 4), rand(2, 3, 2, 2, 3, 2), randn(2, 3, 2, 2, 3)
    return lambda v, x, w: m.ms_deform_attn(v, SIZES, None, x, w), inputs


def deform_on_device(seed: int = 0) -> Case:
    """The sizes of the levels are a tensor, as most models pass them."""
    function, inputs = deform(seed)
    del function
    return lambda v, x, w: m.ms_deform_attn(v, torch.tensor(SIZES), None, x, w), inputs


def from_offsets(coordinates: int, seed: int = 0) -> Case:
    randn, rand = _random(seed)
    inputs = randn(2, 26, 2, 4), rand(2, 3, 2, coordinates), randn(2, 3, 2, 2, 3, 2), randn(2, 3, 2, 2, 3)
    return lambda v, r, o, a: m.ms_deform_attn_from_offsets(v, SIZES, r, o, a), inputs


def attention(seed: int = 0) -> Case:
    randn, _ = _random(seed)
    mask = m.pack_attention_mask(_random(9)[0](2, 5, 40))
    inputs = randn(2, 2, 5, 8), randn(2, 2, 40, 8), randn(2, 2, 40, 8)
    return lambda q, k, v: m.masked_attention(q, k, v, mask), inputs


def points(seed: int = 0) -> Case:
    at = _random(9)[1](2, 4, 2)
    return lambda x: m.point_sample(x, at), (_random(seed)[0](2, 3, 6, 5),)


def loss(seed: int = 0) -> Case:
    rand = _random(9)[1]
    targets, at = [rand(3, 9, 8) > 0.5, rand(1, 9, 8) > 0.5], rand(3, 7, 2)
    matches = [(torch.tensor([0, 2]), torch.tensor([2, 1])), (torch.tensor([1]), torch.tensor([0]))]
    return lambda x: torch.stack(m.point_mask_loss(x, targets, at, matches=matches)), (_random(seed)[0](2, 3, 6, 5),)


def factored_loss(seed: int = 0) -> Case:
    rand, randn = _random(9)[1], _random(seed)[0]
    targets, at = [rand(3, 9, 8) > 0.5, rand(3, 9, 8) > 0.5], rand(6, 7, 2)

    def function(embed: Tensor, features: Tensor) -> Tensor:
        return torch.stack(m.point_mask_loss(m.FactoredMasks(embed, features), targets, at))

    return function, (randn(2, 3, 4), randn(2, 4, 6, 5))


DIFFERENTIABLE = {
    "ms_deform_attn": deform,
    "ms_deform_attn, sizes in a tensor": deform_on_device,
    "from offsets, points": partial(from_offsets, 2),
    "from offsets, boxes": partial(from_offsets, 4),
    "masked_attention": attention,
    "point_sample": points,
    "point_mask_loss": loss,
    "point_mask_loss, factored": factored_loss,
}
every = pytest.mark.parametrize("make", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs).square().sum()


def backward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients by `.backward()`, which other tests hold against the reference."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    function(*leaves).backward()
    return tuple(x.grad for x in leaves if x.grad is not None)


def stacked(make: Callable[[int], Case], count: int) -> tuple[Tensor, ...]:
    return tuple(torch.stack(x) for x in zip(*(make(seed)[1] for seed in range(count)), strict=True))


@every
def test_grad(make: Any) -> None:
    function, inputs = make()
    argnums = tuple(range(len(inputs)))
    torch.testing.assert_close(grad(scalar(function), argnums)(*inputs), backward(scalar(function), inputs))


@every
def test_vjp_and_jacrev(make: Any) -> None:
    function, inputs = make()
    output, pull = vjp(function, *inputs)
    torch.testing.assert_close(output, function(*inputs))
    argnums = tuple(range(len(inputs)))
    jacobians = jacrev(function, argnums)(*inputs)
    for row in (0, 3):
        chosen = torch.zeros(output.shape)
        chosen.view(-1)[row] = 1
        expected = backward(lambda *x, row=row: function(*x).flatten()[row], inputs)
        torch.testing.assert_close(pull(chosen), expected)
        torch.testing.assert_close(tuple(j.flatten(0, output.dim() - 1)[row] for j in jacobians), expected)


@every
def test_vmap(make: Any) -> None:
    function, _ = make()
    inputs = stacked(make, 3)
    torch.testing.assert_close(vmap(function)(*inputs), torch.stack([function(*x) for x in zip(*inputs, strict=True)]))


@every
def test_vmap_of_one_input(make: Any) -> None:
    """The others are shared by all elements, and the mapped axis is not the first."""
    function, inputs = make()
    first = stacked(make, 3)[0]
    expected = torch.stack([function(x, *inputs[1:]) for x in first])
    found = vmap(function, in_dims=(1, *[None] * (len(inputs) - 1)))(first.movedim(0, 1), *inputs[1:])
    torch.testing.assert_close(found, expected)


@every
def test_gradients_of_each_element(make: Any) -> None:
    """As per-sample gradients are computed, and the other way round."""
    function, _ = make()
    inputs = stacked(make, 3)
    argnums = tuple(range(len(inputs)))
    each = [backward(scalar(function), x) for x in zip(*inputs, strict=True)]
    expected = tuple(torch.stack(x) for x in zip(*each, strict=True))
    torch.testing.assert_close(vmap(grad(scalar(function), argnums))(*inputs), expected)
    total = grad(lambda *x: vmap(scalar(function))(*x).sum(), argnums)(*inputs)
    torch.testing.assert_close(total, expected)


@every
@pytest.mark.parametrize("second", [hessian, lambda f: jacrev(jacrev(f)), lambda f: grad(lambda x: grad(f)(x).sum())])
def test_second_derivative_raises(make: Any, second: Any) -> None:
    function, (first, *others) = make()
    with pytest.raises(RuntimeError, match=r"differentiable once|forward-mode AD of .* is not implemented"):
        second(lambda x: scalar(function)(x, *others))(first)


@every
def test_forward_mode_is_right_or_raises(make: Any) -> None:
    function, inputs = make()
    tangents = tuple(torch.randn_like(x) for x in inputs)
    with m.use_backend("reference"):
        expected = jvp(function, inputs, tangents)[1]
    assert expected.abs().max() > 0

    def eager() -> Tensor | None:
        with forward_ad.dual_level():
            output = function(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
            return forward_ad.unpack_dual(output).tangent

    for run in (lambda: jvp(function, inputs, tangents)[1], eager):
        if make is points:
            torch.testing.assert_close(run(), expected)
        else:
            with pytest.raises(NotImplementedError, match=r"AD of .* is not implemented; with .*reference"):
                run()


def test_forward_mode_of_samples() -> None:
    function, inputs = points()
    with m.use_backend("reference"):
        expected = jacfwd(function)(*inputs)
    torch.testing.assert_close(jacfwd(function)(*inputs), expected)
    at = torch.rand(2, 4, 2)
    with pytest.raises(NotImplementedError, match="with respect to its points"):
        jvp(lambda x: m.point_sample(inputs[0], x), (at,), (at,))


@every
def test_forward_mode_without_tangents(make: Any) -> None:
    """Inside a dual level, inputs that have no tangent are served as ever, and so are their gradients."""
    function, inputs = make()
    with forward_ad.dual_level():
        found = backward(scalar(function), inputs)
    torch.testing.assert_close(found, backward(scalar(function), inputs))


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(make: Any, reentrant: bool) -> None:
    function, inputs = make()

    def run(*leaves: Tensor) -> Tensor:
        output: Tensor = checkpoint(scalar(function), *leaves, use_reentrant=reentrant)
        return output

    torch.testing.assert_close(backward(run, inputs), backward(scalar(function), inputs))


def test_vmap_of_masks_and_costs() -> None:
    randn, rand = _random(0)
    embeds, features, targets = randn(3, 2, 4, 8), randn(3, 2, 8, 6, 5), rand(3, 2, 3, 9, 7) > 0.5
    at = rand(2, 11, 2)

    def masks(embed: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        level = m.resize_mask_features(pixels, [(3, 2), (4, 4)])[1]
        predicted = m.predict_attention_mask(embed, level)
        return predicted.bits, predicted.row_any, m.pack_attention_mask(pixels).bits

    def costs(embed: Tensor, pixels: Tensor, target: Tensor) -> Any:
        return m.mask_matching_cost(m.FactoredMasks(embed, pixels), target, at)

    for function, inputs in ((masks, (embeds, features)), (costs, (embeds, features, targets))):
        each = [function(*x) for x in zip(*inputs, strict=True)]
        expected = tuple(torch.stack(x) for x in zip(*each, strict=True))
        torch.testing.assert_close(vmap(function)(*inputs), expected)


def test_vmap_of_random_points() -> None:
    logits = torch.randn(3, 2, 6, 5)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: m.uncertain_points(x, 9))(logits)
    found = vmap(lambda x: m.uncertain_points(x, 9), randomness="different")(logits)
    assert found.shape == (3, 2, 9, 2)
    assert ((found >= 0) & (found < 1)).all()
    assert found.flatten(0, 1).unique(dim=0).shape[0] == 6


def test_per_sample_gradients_of_a_module() -> None:
    module = m.nn.MSDeformAttn(embed_dim=8, num_levels=2, num_heads=2, num_points=3)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.3)
    randn, rand = _random(0)
    query, reference, value = randn(3, 1, 4, 8), rand(3, 1, 4, 2, 2), randn(3, 1, 26, 8)
    parameters = dict(module.named_parameters())

    def of_sample(values: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        output: Tensor = functional_call(module, values, (*inputs, SIZES))
        return output.square().sum()

    found = vmap(grad(of_sample), in_dims=(None, 0, 0, 0))(parameters, query, reference, value)
    for i in range(3):
        module.zero_grad()
        of_sample(parameters, query[i], reference[i], value[i]).backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[name][i], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
