"""Deformable attention of packages that have it as a plain function: stand-ins with the signatures in use."""

import sys
from types import ModuleType

import pytest
import torch

import m2f_kernels
from m2f_kernels.integrations.functions import patch, unpatch
from m2f_kernels.ops.ms_deform_attn import reference

SIZES = [(6, 5), (3, 4)]
LEVELS = [6, 5, 0, 3, 4, 30]


def inputs(heads=2, channels=8):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 42, heads, channels, generator=generator)
    locations = torch.rand(2, 7, heads, 2, 3, 2, generator=generator)
    return value, locations, torch.randn(2, 7, heads, 2, 3, generator=generator).softmax(-1)


def _functions():
    def core(value, value_spatial_shapes, sampling_locations, attention_weights):
        """As in Deformable-DETR, mmcv, RT-DETR and Ultralytics: value [N, S, H, D]."""
        calls.append("core")
        flat = sampling_locations.flatten(3, 4), attention_weights.flatten(3, 4)
        return reference.ms_deform_attn(value, LEVELS, *flat, [3, 3])

    def core_of_heads(value, value_spatial_shapes, sampling_locations, attention_weights):
        """As in LW-DETR and RF-DETR: value [N, H, D, S]."""
        return core(value.permute(0, 3, 1, 2), value_spatial_shapes, sampling_locations, attention_weights)

    return {"core": core, "core_of_heads": core_of_heads}


calls = []
#: Not as names of this module, which would be replaced, too.
ORIGINALS = _functions()


@pytest.fixture
def package():
    """A module that defines the functions, and one that imported them."""
    first, second = ModuleType("standin_functions"), ModuleType("standin_functions.user")
    vars(first).update(ORIGINALS)
    second.imported = ORIGINALS["core"]
    sys.modules.update({first.__name__: first, second.__name__: second})
    calls.clear()
    yield first, second
    for name in ("core", "core_of_heads"):
        if getattr(first, name) is not ORIGINALS[name]:
            unpatch(first, name)
    del sys.modules[first.__name__], sys.modules[second.__name__]


@pytest.mark.parametrize("shapes", [SIZES, torch.tensor(SIZES)], ids=["pairs", "tensor"])
def test_two_lines(package, shapes):
    first, second = package
    value, locations, weights = inputs()
    expected = ORIGINALS["core"](value, shapes, locations, weights)
    calls.clear()
    names = patch("standin_functions", "core")
    assert {"standin_functions.core", "standin_functions.user.imported"} <= set(names)
    for function in (first.core, second.imported):
        torch.testing.assert_close(function(value, shapes, locations, weights), expected)
        torch.testing.assert_close(
            function(value=value, value_spatial_shapes=shapes, sampling_locations=locations, attention_weights=weights),
            expected,
        )
    assert not calls
    assert patch(first, "core") == []
    unpatch(first, "core")
    assert (first.core, second.imported) == (ORIGINALS["core"],) * 2


@pytest.mark.parametrize("channels", [8, 2], ids=["channels", "as many channels as heads"])
def test_value_with_positions_last(package, channels):
    first, _ = package
    value, locations, weights = inputs(channels=channels)
    expected = ORIGINALS["core"](value, SIZES, locations, weights)
    calls.clear()
    patch(first, "core_of_heads")
    last = value.permute(0, 2, 3, 1).contiguous().requires_grad_()
    out = first.core_of_heads(last, torch.tensor(SIZES), locations, weights)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert last.grad.abs().sum() > 0
    assert not calls


def test_registry(package):
    registry = {"pytorch": ORIGINALS["core"]}
    value, locations, weights = inputs()
    patch(registry, "pytorch")
    assert registry["pytorch"] is not ORIGINALS["core"]
    torch.testing.assert_close(
        registry["pytorch"](value, SIZES, locations, weights),
        m2f_kernels.ms_deform_attn(value, SIZES, None, locations, weights),
    )
    unpatch(registry, "pytorch")
    assert registry["pytorch"] is ORIGINALS["core"]


def test_wrong_arguments_are_the_callers(package):
    first, _ = package
    patch(first, "core")
    with pytest.raises(TypeError, match="missing 3 required"):
        first.core(torch.zeros(1))
    with pytest.raises(TypeError, match="value: expected a tensor"):
        first.core(1, SIZES, 2, 3)


def test_errors(package):
    first, _ = package

    def other(value, shapes):
        return value

    def with_method(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method):
        return value

    first.other, first.with_method, first.number = other, with_method, 3
    expected = r"expected a function \(value, value_spatial_shapes, sampling_locations, attention_weights\); standin"
    for name, got in (("other", r"takes \(value, shapes\)"), ("with_method", "num_points_list"), ("number", "3 ")):
        with pytest.raises(TypeError, match=f"{expected}.*{got}"):
            patch(first, name)
    with pytest.raises(ValueError, match="standin_functions; it has no 'absent'"):
        patch(first, "absent")
    with pytest.raises(ValueError, match="expected a key of the registry"):
        patch({}, "absent")
    with pytest.raises(TypeError, match="holder: expected a module"):
        patch(3, "core")
    with pytest.raises(ValueError, match="expected a function that patch replaced"):
        unpatch(first, "core")
