"""Uses of accelerated models besides calling them: asking for attention weights, tracing, export, differentiation."""

import copy

import pytest
import torch
import transformers
from torch.func import functional_call, grad, vjp, vmap
from torch.utils.checkpoint import checkpoint

import m2f_kernels
from tests.integrations.families import FAMILIES, quick

INSTALLED = [family for family in FAMILIES.values() if family.installed]
families = pytest.mark.parametrize("family", quick(INSTALLED), ids=lambda family: family.name)


class Tensors(torch.nn.Module):
    """A model that takes and returns tensors."""

    def __init__(self, model, family):
        super().__init__()
        self.model, self.names, self.extra = model, family.outputs, family.inputs()
        del self.extra["pixel_values"]

    def forward(self, pixels):
        out = self.model(pixel_values=pixels, **self.extra)
        return tuple(out[name] for name in self.names)


def both(family):
    plain = family.make()
    return plain, m2f_kernels.accelerate(copy.deepcopy(plain)).model


def tensors_of(output, name=""):
    """The floating tensors in an output that have a gradient function, by where they are."""
    if isinstance(output, torch.Tensor):
        return {name: output} if output.requires_grad else {}
    parts = output.items() if isinstance(output, dict) else enumerate(output) if isinstance(output, tuple) else ()
    return {k: v for key, part in parts for k, v in tensors_of(part, f"{name}.{key}").items()}


@families
def test_attention_weights_have_gradients(family):
    """As have all the states that a model returns when it is asked for them."""
    if family.name == "d_fine" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 12):
        pytest.skip("the layers of d_fine before transformers 5.12 drop the flag for the weights: no gradient")
    found = []
    for model in both(family):
        out = model(**family.inputs(), output_attentions=True, output_hidden_states=True)
        kept = tensors_of(out)
        for tensor in kept.values():
            tensor.retain_grad()
        generator = torch.Generator().manual_seed(1)
        products = [out[k] * torch.randn(out[k].shape, generator=generator) for k in family.outputs]
        sum(x.nan_to_num(posinf=0.0, neginf=0.0).sum() for x in products).backward()
        found.append({name: tensor.grad for name, tensor in kept.items()})
    expected, got = found
    assert any("attentions" in name for name, gradient in expected.items() if gradient is not None)
    assert {k for k, g in expected.items() if g is not None} == {k for k, g in got.items() if g is not None}
    for name, gradient in expected.items():
        if gradient is not None:
            error = (got[name] - gradient).norm()
            assert error <= 1e-2 * gradient.norm() + 1e-6, f"{name}: {error} of {gradient.norm()}"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("family", quick(INSTALLED, ("deformable_detr", "mask2former")), ids=lambda family: family.name)
def test_trace(family):
    """`torch.jit.trace` of an accelerated model, on images that it was not traced with."""
    plain, model = both(family)
    pixels = family.inputs()["pixel_values"]
    with torch.no_grad():
        try:
            torch.jit.trace(Tensors(plain, family), (pixels,), check_trace=False)
        except Exception as error:
            pytest.skip(f"the untouched model cannot be traced: {type(error).__name__}")
        traced = torch.jit.trace(Tensors(model, family), (pixels,), check_trace=False)
        found, expected = traced(pixels.flip(0)), Tensors(model, family)(pixels.flip(0))
    for name, x, y in zip(family.outputs, found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace_follows_the_sizes():
    """Levels' sizes that come from `x.shape` are not constants of the trace."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = m2f_kernels.nn.MSDeformAttn(embed_dim=32, num_levels=2, num_heads=2, num_points=3)

        def forward(self, query, points, a, b):
            sizes = [x.shape[-2:] for x in (a, b)]
            return self.attention(query, points, torch.cat([x.flatten(2).transpose(1, 2) for x in (a, b)], 1), sizes)

    own = Own().eval()
    query, points = torch.randn(2, 7, 32), torch.rand(2, 7, 2, 2)
    with torch.no_grad():
        traced = torch.jit.trace(own, (query, points, torch.randn(2, 32, 6, 5), torch.randn(2, 32, 3, 4)))
        others = query, points, torch.randn(2, 32, 8, 3), torch.randn(2, 32, 2, 6)
        torch.testing.assert_close(traced(*others), own(*others))


@families
def test_torch_func(family):
    """Gradients of parameters by `torch.func` are those of `.backward()`."""
    _, model = both(family)
    for module in model.modules():
        if hasattr(module, "config"):  # PyTorch's fused attention does not differentiate its mask under torch.func
            module.config._attn_implementation = "eager"
    if family.name in ("mask2former", "oneformer"):
        inputs = {key: value[:1] for key, value in family.inputs().items()}
    else:
        inputs = family.inputs()
    chosen = {k: p.detach() for k, p in model.named_parameters() if "sampling_offsets" in k or "value_proj" in k}
    chosen = dict(list(chosen.items())[:6]) or {k: p.detach() for k, p in list(model.named_parameters())[:2]}

    def loss(parameters):
        out = functional_call(model, parameters, kwargs=inputs)
        return sum(out[name].nan_to_num(posinf=0.0, neginf=0.0).square().mean() for name in family.outputs)

    leaves = {k: p.clone().requires_grad_() for k, p in chosen.items()}
    value = loss(leaves)
    value.backward()
    expected = {k: p.grad for k, p in leaves.items() if p.grad is not None}
    output, pull = vjp(loss, chosen)
    torch.testing.assert_close(output, value.detach())
    for found in (grad(loss)(chosen), pull(torch.ones(()))[0]):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
    if family.name == "deformable_detr":
        with pytest.raises(NotImplementedError, match=r"forward-mode AD|forward AD"):
            torch.func.jvp(loss, (chosen,), (chosen,))


def products(output, family):
    """One number that depends on every output of a model."""
    generator = torch.Generator().manual_seed(3)
    found = [output[name].nan_to_num(posinf=0.0, neginf=0.0) for name in family.outputs]
    return sum((x * torch.randn(x.shape, generator=generator)).mean() for x in found)


@families
def test_checkpoint_around_a_model(family):
    """Non-reentrant: the same gradients, all of them."""
    _, model = both(family)
    inputs, found = family.inputs(), []
    for call in (model, lambda **given: checkpoint(model, use_reentrant=False, **given)):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        products(call(**inputs), family).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, got = found
    assert expected.keys() == got.keys()
    assert any("sampling_offsets" in name and gradient.any() for name, gradient in expected.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@families
def test_an_ensemble_by_vmap(family):
    """Two sets of weights at once by `torch.func.vmap`, where the untouched model can be called so."""
    plain, model = both(family)
    for one in (*plain.modules(), *model.modules()):
        if hasattr(one, "config"):
            one.config._attn_implementation = "eager"
    inputs = family.inputs()
    names = [name for name, _ in model.named_parameters() if "sampling_offsets" in name][:2]
    weights = dict(model.named_parameters())
    stacked = {name: torch.stack([weights[name].detach() * times for times in (1.0, 1.1)]) for name in names}

    def call(one, parameters):
        output = functional_call(one, parameters, kwargs=inputs)
        return tuple(output[name] for name in family.outputs)

    with torch.no_grad():
        try:
            vmap(lambda parameters: call(plain, parameters), randomness="different")(stacked)
        except RuntimeError as error:
            pytest.skip(f"the untouched model cannot: {str(error)[:80]}")
        both_at_once = vmap(lambda parameters: call(model, parameters), randomness="different")(stacked)
        for i in range(2):
            alone = call(model, {name: x[i] for name, x in stacked.items()})
            for x, y in zip(both_at_once, alone, strict=True):
                torch.testing.assert_close(x[i], y, rtol=1e-3, atol=1e-4)
        assert not torch.equal(both_at_once[0][0], both_at_once[0][1]), "the weights count"
