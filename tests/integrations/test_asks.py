"""Accelerated models ask at every call: where no kernel serves, what they replaced runs, to the bit."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import m2f_kernels
from m2f_kernels import dispatch
from m2f_kernels._library import NativeLibrary
from m2f_kernels.integrations import extension, functions, mmcv
from tests.integrations.families import FAMILIES
from tests.integrations.mmcv_cases import make_inputs, results
from tests.integrations.test_mmcv import build, standins  # noqa: F401, a fixture
from tests.ops.ms_deform_attn_cases import make_case
from tests.watching import Operators


@pytest.fixture
def without_library(monkeypatch):
    """Turns the CPU library off, as on a device without kernels; the result turns it on again."""
    here = dispatch.Software({"cpu": NativeLibrary("m2f_cpu", Path("libm2f_cpu.so"), "it was not built; reinstall")})
    dispatch.forget()
    monkeypatch.setattr(dispatch, "software_for", lambda type: here)

    def again():
        monkeypatch.undo()
        dispatch.forget()

    yield again
    again()


def run(model, family):
    inputs = family.inputs(labels=True)
    if "mask2former" in family.name:
        size = inputs["pixel_values"].shape[-2:]
        torch.manual_seed(2)
        inputs["mask_labels"] = [(torch.rand(2, *size) < 0.4).float() for _ in inputs["pixel_values"]]
        inputs["class_labels"] = [torch.tensor([0, 1]) for _ in inputs["pixel_values"]]
    torch.manual_seed(3)
    with Operators() as operators:
        output = model(**inputs)
    return output, operators.own


def tensors(output):
    return {key: x for key, x in output.items() if isinstance(x, torch.Tensor)}


@pytest.mark.filterwarnings("ignore:m2f_kernels.* runs on plain PyTorch")
@pytest.mark.parametrize("name", ["deformable_detr", "mask2former", "oneformer"])
def test_published_code_runs_where_no_kernel_serves(name, without_library):
    family = FAMILIES[name]
    model = family.make()
    expected, _ = run(model, family)
    _, report = m2f_kernels.accelerate(model)
    assert any("ms_deform_attn_from_offsets on cpu: fallback" in text for text in report.unserved)
    assert "no kernel, so the published code runs: " in str(report)
    assert "reinstall" in str(report)
    actual, seen = run(model, family)
    assert seen == set()
    assert tensors(actual).keys() == tensors(expected).keys()
    for key, x in tensors(expected).items():
        assert torch.equal(tensors(actual)[key], x), key
    # The same model where there are kernels, without accelerating again.
    without_library()
    actual, seen = run(model, family)
    assert "ms_deform_attn_from_offsets" in seen
    if name != "deformable_detr":
        assert {"masked_attention", "predict_attention_mask"} <= seen
    if name == "mask2former":
        assert any("point_mask_loss" in op for op in seen)
    assert m2f_kernels.accelerate(model).report.unserved == ()


def test_forced_plain_pytorch_is_not_passed_by():
    """A user who forces the reference gets it, also inside an accelerated model."""
    family = FAMILIES["deformable_detr"]
    model = m2f_kernels.accelerate(family.make()).model
    calls = []
    original = m2f_kernels.ops.ms_deform_attn.reference.ms_deform_attn
    with pytest.MonkeyPatch.context() as patch, m2f_kernels.use_backend("reference"):
        patch.setattr(
            "m2f_kernels.ops.ms_deform_attn.reference.ms_deform_attn", lambda *args: calls.append(1) or original(*args)
        )
        run(model, family)
    assert calls


def test_a_model_on_meta():
    """Accelerated before it has weights; where it ends up decides."""
    family = FAMILIES["deformable_detr"]
    model = family.make()
    state = model.state_dict()
    report = m2f_kernels.accelerate(model.to("meta")).report
    assert report.unserved == ()
    model.to_empty(device="cpu").load_state_dict(state)
    _, seen = run(model, family)
    assert "ms_deform_attn_from_offsets" in seen


# ---------------------------------------------------------------- packages other than transformers
NO_KERNEL = pytest.mark.filterwarnings("ignore:m2f_kernels.* runs on plain PyTorch")


@NO_KERNEL
@pytest.mark.parametrize("package", ["mmcv", "detrex"])
def test_attention_of_mmcv_and_detrex(package, standins, without_library):  # noqa: F811
    module, inputs = build(package, batch_first=True), make_inputs(True, 2)
    expected = results(module, inputs)
    mmcv.patch()
    with Operators() as operators:
        found = results(module, inputs)
    assert operators.own == set()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    without_library()
    with Operators() as operators:
        results(module, inputs)
    assert "ms_deform_attn_from_offsets" in operators.own


@NO_KERNEL
def test_functions_of_mmcv(standins, without_library):  # noqa: F811
    import mmcv.ops as ops
    from mmcv.ops import multi_scale_deform_attn as module

    case, images, points = make_case(points=(2, 2)), torch.randn(2, 3, 6, 5), torch.rand(2, 7, 2)
    samples, weights = (case.tensors[name].unflatten(3, (2, -1)) for name in ("samples", "weights"))
    shapes, starts = torch.tensor(case.sizes), torch.tensor(case.levels[2::3])

    def run():
        with Operators() as operators:
            attended = module.multi_scale_deformable_attn_pytorch(case.value, shapes, samples, weights)
            sampled = ops.point_sample(images, points)
        return attended, sampled, operators.own

    *expected, _ = run()
    original = module.ext_module
    calls = []
    module.ext_module = type("Compiled", (), {"ms_deform_attn_forward": lambda *args, **kwargs: calls.append(args)})
    mmcv.patch()
    *found, seen = run()
    assert seen == set()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    given = case.value, shapes, starts, samples, weights, 64
    module.ext_module.ms_deform_attn_forward(*given[:5], im2col_step=64)
    assert len(calls) == 1, "the compiled extension of mmcv"
    without_library()
    assert run()[2] == {"ms_deform_attn", "point_sample"}
    assert module.ext_module.ms_deform_attn_forward(*given).shape == expected[0].shape
    assert len(calls) == 1
    mmcv.unpatch()
    module.ext_module = original


@NO_KERNEL
def test_the_extension_of_detectron2(without_library):
    """The module that patch(replace=True) replaced runs where no kernel serves."""
    case, calls = make_case(points=(2, 2)), []
    samples, weights = (case.tensors[name].unflatten(3, (2, -1)) for name in ("samples", "weights"))
    given = case.value, torch.tensor(case.sizes), torch.tensor(case.levels[2::3]), samples, weights, 64
    compiled = ModuleType(extension.NAME)
    compiled.ms_deform_attn_forward = lambda *args: calls.append(args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, extension.NAME, compiled)
        extension.patch(replace=True)
        try:
            module = sys.modules[extension.NAME]
            assert module.ms_deform_attn_forward(*given) is None
            assert len(calls) == 1
            with m2f_kernels.use_backend("reference"):
                assert module.ms_deform_attn_forward(*given).shape == case.grad_output.shape
            without_library()
            assert module.ms_deform_attn_forward(*given).shape == case.grad_output.shape
            assert len(calls) == 1
        finally:
            extension.unpatch()


@NO_KERNEL
def test_any_function(without_library):
    module, calls = ModuleType("standin_asking"), []

    def core(value, shapes, locations, weights):
        calls.append(1)
        return value.new_zeros(weights.shape[0], weights.shape[1], value.shape[2] * value.shape[3])

    module.core = core
    case = make_case(points=(2, 2))
    samples, weights = (case.tensors[name].unflatten(3, (2, -1)) for name in ("samples", "weights"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        functions.patch(module, "core")
        module.core(case.value, case.sizes, samples, weights)
        assert calls == [1]
        without_library()
        module.core(case.value, case.sizes, samples, weights)
        assert calls == [1]
        functions.unpatch(module, "core")
