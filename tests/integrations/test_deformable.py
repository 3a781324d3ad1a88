"""The attention modules by themselves, called as each family's layers call them: masks, kinds of reference points,
dtypes, hooks, and calls that only the original takes."""

import copy
import inspect

import pytest
import torch

import m2f_kernels
from m2f_kernels.integrations.transformers import _swap, deformable
from tests.integrations.families import FAMILIES
from tests.numerics import relative_error

INSTALLED = [family for family in FAMILIES.values() if family.installed]
families = pytest.mark.parametrize("family", INSTALLED, ids=lambda family: family.name)
WITHOUT_PROJECTIONS = ("d_fine", "deimv2")


@pytest.fixture(scope="module")
def calls():
    """Of each family: (module, arguments) of its last call of deformable attention, from a photograph."""
    made = {}

    def get(family):
        if family.name not in made:
            model, seen = family.make(), []
            for module in model.modules():
                if type(module).__name__.endswith("MultiscaleDeformableAttention"):
                    module.register_forward_pre_hook(
                        lambda module, args, kwargs: seen.append((module, args, kwargs)), with_kwargs=True
                    )
            with torch.no_grad():
                model(**family.inputs())
            module, args, kwargs = seen[-1]
            module = copy.deepcopy(module)
            module._forward_pre_hooks.clear()
            assert len(args) <= 1
            made[family.name] = module, {"hidden_states": args[0], **kwargs} if args else kwargs
        module, kwargs = made[family.name]
        return copy.deepcopy(module), dict(kwargs)

    return get


def accelerated(module):
    module = copy.deepcopy(module)
    assert m2f_kernels.accelerate(module).report.replaced
    return module


def results(module, kwargs, count=1):
    """Outputs, then gradients of all inputs and parameters."""
    names = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    leaves = [kwargs[name].detach().clone().requires_grad_() for name in names]
    outputs = [x for x in module(**{**kwargs, **dict(zip(names, leaves, strict=True))})[:count] if x is not None]
    loss = sum((x.double() * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outputs)
    wanted = [*leaves, *module.parameters()]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*outputs, *gradients]


def assert_same(module, kwargs, count=1):
    expected, actual = results(module, kwargs, count), results(accelerated(module), kwargs, count)
    assert len(expected) == len(actual)
    largest = max(x.detach().norm() for x in expected if x is not None)
    for i, (first, second) in enumerate(zip(expected, actual, strict=True)):
        assert (first is None) == (second is None)
        if first is not None:
            assert first.dtype == second.dtype
            # A sample within rounding of a pixel's centre may have its gradient from the other side.
            bound = 1e-5 if i < count else 1e-3
            slack = 0 if i < count else 1e-6 * largest
            assert (first - second).detach().norm() <= bound * first.detach().norm() + slack


def count_fused(monkeypatch):
    done, operator = [], deformable.ms_deform_attn_from_offsets
    monkeypatch.setattr(deformable, "ms_deform_attn_from_offsets", lambda *a, **k: done.append(1) or operator(*a, **k))
    return done


@families
def test_as_called(calls, family, monkeypatch):
    """Output and all gradients, those of the reference points and of the position embeddings too."""
    done = count_fused(monkeypatch)
    module, kwargs = calls(family)
    assert_same(module, kwargs)
    assert done


@families
def test_weights(calls, family):
    """With the flag the weights come too, and their gradient flows."""
    module, kwargs = calls(family)
    if {"output_attentions", "kwargs"} & inspect.signature(type(module).forward).parameters.keys():
        kwargs["output_attentions"] = True
    assert_same(module, kwargs, count=2)


@families
def test_mask(calls, family, monkeypatch):
    """A mask means padding in Mask2Former and OneFormer, pixels elsewhere; D-FINE's is [N, S, H]."""
    done = count_fused(monkeypatch)
    module, kwargs = calls(family)
    n, s, _ = kwargs["encoder_hidden_states"].shape
    shape = (n, s, module.n_heads) if family.name in WITHOUT_PROJECTIONS else (n, s)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert_same(module, {**kwargs, "attention_mask": mask})
    assert bool(done) == (family.name not in WITHOUT_PROJECTIONS)
    whole = accelerated(module)(**kwargs)[0]
    assert relative_error(accelerated(module)(**{**kwargs, "attention_mask": mask})[0], whole) > 1e-3


@families
@pytest.mark.parametrize("coordinates", [2, 4])
def test_reference_points(calls, family, coordinates, monkeypatch):
    """Points and boxes, one per level; the descendants of RT-DETRv2 take one box for all levels and nothing else."""
    module, kwargs = calls(family)
    points = kwargs["reference_points"].detach()
    if coordinates == 4 and points.shape[-1] == 2:
        points = torch.cat([points, 0.1 + 0.2 * points], -1)
    scaled = hasattr(module, "offset_scale")
    if not scaled:
        points = points.expand(-1, -1, module.n_levels, -1) * torch.linspace(0.9, 1, module.n_levels).view(1, 1, -1, 1)
    kwargs["reference_points"] = points[..., :coordinates]
    if scaled and coordinates == 2:
        with pytest.raises((RuntimeError, TypeError)) as original:
            module(**kwargs)
        with pytest.raises(original.type):
            accelerated(module)(**kwargs)
        return
    done = count_fused(monkeypatch)
    assert_same(module, kwargs)
    assert done


@families
def test_bfloat16(calls, family):
    """At least as close to float32 as the original: locations are computed in float32."""
    module, kwargs = calls(family)
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(**_to(kwargs, torch.float64))[0]
        low = _to(kwargs, torch.bfloat16)
        low_module = module.bfloat16()
        original = low_module(**low)[0]
        fused = accelerated(low_module)(**low)[0]
    assert fused.dtype == original.dtype == torch.bfloat16
    assert relative_error(fused, truth) <= relative_error(original, truth)


def _to(kwargs, dtype):
    floating = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {**kwargs, **{k: v.to(dtype) for k, v in floating.items()}}


@families
def test_autocast(calls, family):
    module, kwargs = calls(family)
    with torch.no_grad():
        truth = module(**kwargs)[0]
        with torch.autocast("cpu", torch.bfloat16):
            original, fused = module(**kwargs)[0], accelerated(module)(**kwargs)[0]
    assert relative_error(fused, truth) <= 1.5 * relative_error(original, truth)


@families
def test_only_the_original_takes(calls, family, monkeypatch):
    """Positional arguments, a missing argument, wrong sizes: the original's result, or its kind of error."""
    done = count_fused(monkeypatch)
    module, kwargs = calls(family)
    fast = accelerated(module)
    rest = dict(kwargs)
    states = rest.pop("hidden_states")
    mask = rest.pop("attention_mask", None)
    if family.name not in WITHOUT_PROJECTIONS:
        assert relative_error(fast(states, mask, **rest)[0], module(states, mask, **rest)[0]) < 1e-5
    assert not done
    for missing in ("encoder_hidden_states", "reference_points"):
        with pytest.raises((AttributeError, TypeError)) as original:
            module(**{**kwargs, missing: None})
        with pytest.raises(original.type):
            fast(**{**kwargs, missing: None})
    assert not done
    short = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"][:, 1:], "attention_mask": None}
    with pytest.raises((ValueError, RuntimeError)):
        module(**short)
    with pytest.raises(ValueError, match="spatial_shapes: expected levels that sum to"):
        fast(**short)


def test_a_hook_gets_the_weights(calls):
    module, kwargs = calls(FAMILIES["deformable_detr"])
    fast = accelerated(module)
    assert fast(**kwargs)[1] is None
    seen = []
    handle = fast.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    fast(**kwargs)
    torch.testing.assert_close(seen[0], module(**kwargs)[1])
    handle.remove()
    assert fast(**kwargs)[1] is None


def test_a_watched_core_is_called(calls, monkeypatch):
    """A hook on the core still sees the sampling locations that it is given."""
    module, kwargs = calls(FAMILIES["deformable_detr"])
    fast = accelerated(module)
    done, seen = count_fused(monkeypatch), []
    handle = fast.attn.register_forward_pre_hook(lambda module, args: seen.append(args))
    torch.testing.assert_close(fast(**kwargs)[0], module(**kwargs)[0], atol=1e-5, rtol=1e-5)
    assert len(seen) == 1
    assert not done
    handle.remove()
    fast(**kwargs)
    assert done


def test_core():
    """`MultiScaleDeformableAttention` by itself, for whoever calls it from a module of their own."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    generator = torch.Generator().manual_seed(4)
    shapes = [(4, 5), (2, 3)]
    value, locations, weights = (
        torch.rand(size, generator=generator, requires_grad=True)
        for size in ((2, 26, 4, 8), (2, 7, 4, 2, 3, 2), (2, 7, 4, 2, 3))
    )
    core = MultiScaleDeformableAttention()
    fast = accelerated(core)
    outputs = [m(value, torch.tensor(shapes), shapes, None, locations, weights, 64) for m in (core, fast)]
    gradients = [torch.autograd.grad(out.sin().sum(), (value, locations, weights)) for out in outputs]
    for first, second in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert relative_error(second, first) < 1e-5


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine"])
def test_discrete_sampling_is_left_alone(name):
    family = FAMILIES[name]
    model = family.make(decoder_method="discrete")
    with torch.no_grad():
        before = model(**family.inputs())
        with pytest.warns(UserWarning, match="changed nothing"):
            report = m2f_kernels.accelerate(model).report
        after = model(**family.inputs())
    assert torch.equal(before.logits, after.logits)
    assert len(report.skipped) == 2
    assert not report.replaced
    assert all("discrete" in entry.text for entry in report.skipped)
    assert "left alone: 2 x" in str(report)


def test_discrete_sampling_of_a_patched_class():
    """Accelerated before it had instances, it still does what it did."""
    family = FAMILIES["rt_detr_v2"]
    model = family.make(decoder_method="discrete")
    with torch.no_grad():
        before = model(**family.inputs())
        for module in model.modules():
            if (plan := _swap.plan(module)) is not None:
                _swap.swap(module, plan.mixin)
                assert isinstance(module, _swap._Accelerated)
        after = model(**family.inputs())
    assert torch.equal(before.logits, after.logits)
