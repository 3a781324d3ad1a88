"""Former names lead to the present ones for one release, and say so where they are used."""

import importlib
import re

import pytest
import torch

import m2f_kernels
from m2f_kernels.integrations.transformers import Entry, Report

MOVED = {
    "m2f_kernels.backend.choose": "m2f_kernels.dispatch.choose",
    "m2f_kernels.backend.use_backend": "m2f_kernels.dispatch.use_backend",
    "m2f_kernels.integrations.detectron2.install": "m2f_kernels.integrations.extension.patch",
    "m2f_kernels.integrations.detectron2.uninstall": "m2f_kernels.integrations.extension.unpatch",
    "m2f_kernels.integrations.functions.patch_function": "m2f_kernels.integrations.functions.patch",
    "m2f_kernels.integrations.functions.unpatch_function": "m2f_kernels.integrations.functions.unpatch",
    "m2f_kernels.integrations.hub_kernels.register": "m2f_kernels.integrations.hub_kernels.patch",
    "m2f_kernels.integrations.hub_kernels.unregister": "m2f_kernels.integrations.hub_kernels.unpatch",
    "m2f_kernels.ops.point_loss.point_mask_loss": "m2f_kernels.ops.points.point_mask_loss",
    "m2f_kernels.ops.point_sample.sample": "m2f_kernels.ops.points.sample",
}


def named(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("former", MOVED)
def test_former_names(former):
    with pytest.warns(DeprecationWarning, match=re.escape(f"{former} has moved to {MOVED[former]}")) as found:
        assert named(former) is named(MOVED[former])
    assert found[0].filename == __file__


@pytest.mark.parametrize("module", sorted({name.rpartition(".")[0] for name in MOVED}))
def test_other_names_are_errors(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        named(f"{module}.nothing")


def test_former_names_of_a_report():
    skipped, already = (Entry("a", "A", "why"),), (Entry("b", "B", "what"),)
    report = Report((), skipped, already)
    with pytest.warns(DeprecationWarning, match=r"Report\.left has moved to Report\.skipped") as found:
        assert report.left is skipped
    assert found[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"Report\.already has moved to Report\.already_accelerated"):
        assert report.already is already
    assert str(report).startswith("0 replaced, 1 left alone, 1 already replaced before\n")


def test_names_in_the_namespace_of_operators():
    """Programs that were exported call them: none goes, whatever becomes of the functions in Python."""
    for name in (
        "masked_attention", "masked_attention_backward", "mask_matching_cost", "ms_deform_attn",
        "ms_deform_attn_backward", "ms_deform_attn_from_offsets", "ms_deform_attn_from_offsets_backward",
        "pack_attention_mask", "point_mask_loss", "point_mask_loss_backward", "point_sample", "point_sample_backward",
        "predict_attention_mask", "resize_mask_features", "uncertain_points",
    ):  # fmt: skip
        assert hasattr(torch.ops.m2f, name), name
    assert m2f_kernels.point_sample.__module__.startswith("m2f_kernels.ops.points")
