"""Accelerated models ask at every call: where no kernel serves, what they replaced runs, to the bit."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import m2f_kernels
from m2f_kernels import dispatch
from m2f_kernels._library import NativeLibrary
from tests.integrations.families import FAMILIES


class Operators(TorchDispatchMode):
    """The operators of this package that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "m2f":
            self.seen.add(func._schema.name.removeprefix("m2f::"))
        return func(*args, **(kwargs or {}))


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
    return output, operators.seen


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
