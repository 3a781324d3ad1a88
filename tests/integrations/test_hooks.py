"""Forward hooks on an accelerated model see what they saw: one call per module and forward, the same tensors."""

import copy

import pytest
import torch
from torch.utils import _pytree

import m2f_kernels
from tests.integrations.families import FAMILIES, quick

INSTALLED = [family for family in FAMILIES.values() if family.installed]
MASKS = [family for family in INSTALLED if family.name in ("mask2former", "oneformer")]


def by_name(family):
    return family.name


def seen(model, names, inputs):
    """For each module the calls of one forward pass: first positional input and output, as trees."""
    calls = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, given, output, name=name: calls[name].append((given[:1], output))
        )
        for name in names
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return calls


def assert_same(expected, found, plain):
    for name, calls in expected.items():
        where = f"{name} ({type(plain.get_submodule(name)).__name__})"
        assert len(calls) == len(found[name]), f"{where}: {len(calls)} calls, {len(found[name])} when accelerated"
        for call, other in zip(calls, found[name], strict=True):
            leaves, others = _pytree.tree_leaves(call), _pytree.tree_leaves(other)
            shapes, other_shapes = ([getattr(x, "shape", x) for x in tree] for tree in (leaves, others))
            assert shapes == other_shapes, where
            for x, y in zip(leaves, others, strict=True):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    finite = x.isfinite()
                    assert torch.equal(finite, y.isfinite()), where
                    error = (x - y)[finite].norm() / x[finite].norm().clamp(min=1e-3)
                    assert error < 1e-2, f"{where}: {error}"


@pytest.mark.parametrize("family", quick(INSTALLED), ids=by_name)
def test_hooks_on_every_module(family):
    plain = family.make()
    model = m2f_kernels.accelerate(copy.deepcopy(plain)).model
    names = [name for name, _ in plain.named_modules() if name]
    with pytest.warns(RuntimeWarning, match="has hooks") if family in MASKS else torch.no_grad():
        found = seen(model, names, family.inputs())
    assert_same(seen(plain, names, family.inputs()), found, plain)


@pytest.mark.filterwarnings("ignore:.*runs as in transformers:RuntimeWarning")
@pytest.mark.parametrize("family", MASKS, ids=by_name)
def test_a_hook_on_one_module(family):
    """A hook on one module, with everything around it still fused, sees the same: one module of each class and name."""
    plain = family.make()
    model = m2f_kernels.accelerate(copy.deepcopy(plain)).model
    inputs = {key: value[:1] for key, value in family.inputs().items()}
    chosen = {}
    for name, module in plain.named_modules():
        if name and ".encoder.model." not in name and not name.startswith("model.pixel_level_module.encoder"):
            chosen.setdefault((type(module), name.rpartition(".")[2].strip("0123456789")), name)
    expected = seen(plain, list(chosen.values()), inputs)
    for name in chosen.values():
        assert_same({name: expected[name]}, seen(model, [name], inputs), plain)


def test_hooks_see_whole_maps():
    """Above the number of pixels whose activations the pixel decoder otherwise holds at a time, and with gradients."""
    family = FAMILIES["mask2former"]
    plain = family.make()
    model = m2f_kernels.accelerate(copy.deepcopy(plain)).model
    name = "model.pixel_level_module.decoder.encoder.layers.0"
    inputs = {"pixel_values": torch.randn(1, 3, 256, 320)}
    for hooked in ([f"{name}.fc1"], [f"{name}.fc2"], [f"{name}.fc1", f"{name}.fc2"]):
        expected = seen(plain, hooked, inputs)
        assert all(calls[0][1].shape[:2] == (1, 1680) for calls in expected.values())
        assert_same(expected, seen(model, hooked, inputs), plain)
    kept = []
    model.get_submodule(f"{name}.fc2").register_forward_hook(lambda _module, _given, output: kept.append(output))
    model(**inputs).class_queries_logits.sum().backward()
    assert [x.shape for x in kept] == [(1, 1680, 32)]
