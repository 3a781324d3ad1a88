"""The layer that `kernels` finds, with and without a model of transformers around it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import m2f_kernels
from m2f_kernels.integrations import hub_kernels
from tests.numerics import relative_error

kernels = pytest.importorskip("kernels", reason="the package `kernels` is not installed: pip install kernels")
LAYER = hub_kernels.LAYER
SIZES = [(5, 7), (3, 4)]


@kernels.use_kernel_forward_from_hub(LAYER)
class MarkedLayer(torch.nn.Module):
    """A layer as transformers marks it: the same signature."""

    def forward(self, value, shapes, shapes_list, starts, locations, weights, im2col_step):
        raise AssertionError("the original ran")


def layer_inputs():
    g = torch.Generator().manual_seed(0)
    value = torch.randn(2, 47, 2, 8, generator=g)
    locations, weights = torch.rand(2, 6, 2, 2, 3, 2, generator=g), torch.rand(2, 6, 2, 2, 3, generator=g)
    return value, torch.tensor(SIZES), SIZES, torch.tensor([0, 35]), locations, weights, 64


@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING", "INFERENCE|TORCH_COMPILE", "TRAINING|TORCH_COMPILE"])
def test_kernelize(mode):
    """`kernels` accepts class and repository, in every mode, and its checks of both run (no fallback is allowed)."""
    modes = [getattr(kernels.Mode, name) for name in mode.split("|")]
    wanted = modes[0] if len(modes) == 1 else modes[0] | modes[1]
    layer = MarkedLayer()
    with kernels.use_kernel_mapping({LAYER: {"cpu": hub_kernels._Repository()}}, inherit_mapping=False):
        kernels.kernelize(layer, mode=wanted, device="cpu", use_fallback=False)
    value, shapes, _, starts, locations, weights, _ = layer_inputs()
    expected = m2f_kernels.ms_deform_attn(value, shapes, starts, locations, weights)
    assert torch.equal(layer(*layer_inputs()), expected)
    if "COMPILE" in mode:
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(*layer_inputs()), expected) < 1e-6


def test_models_of_transformers():
    """Deformable DETR and RT-DETR with `use_kernels`: outputs and gradients stay, on CPU and CUDA ours is chosen."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.utils.import_utils import is_kernels_available

    command = [sys.executable, "-m", "tests.integrations.hub_kernels_models"]
    if not is_kernels_available():
        command.append("--any-version")
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(": passed\n")


def test_a_version_that_transformers_refuses(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)
    with pytest.raises(ImportError, match=r"expected kernels >= .*, which transformers .* asks for; found kernels \d"):
        hub_kernels.patch()


def test_nothing_to_take_back():
    with pytest.raises(RuntimeError, match="patch\\(\\) has not been called"):
        hub_kernels.unpatch()
