"""The extension module that copies of Deformable-DETR import, called by an autograd function written as theirs is."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import m2f_kernels
from m2f_kernels.integrations import extension
from tests.numerics import FORWARD, GRADIENT, relative_error, tolerance
from tests.ops.ms_deform_attn_cases import make_case, truth

NAME = "MultiScaleDeformableAttention"

#: What a clone does with the module, written from its documented interface.
CLONE = """
import MultiScaleDeformableAttention as MSDA
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class MSDeformAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, spatial_shapes, level_start_index, sampling_locations, attention_weights, im2col_step):
        ctx.im2col_step = im2col_step
        tensors = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        ctx.save_for_backward(*tensors)
        return MSDA.ms_deform_attn_forward(*tensors, ctx.im2col_step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        gradients = MSDA.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, ctx.im2col_step)
        grad_value, grad_sampling_loc, grad_attn_weight = gradients
        return grad_value, None, None, grad_sampling_loc, grad_attn_weight, None
"""


@pytest.fixture
def installed():
    extension.patch()
    yield
    extension.unpatch()


@pytest.fixture
def import_clone(tmp_path, monkeypatch):
    """Imports the clone, once per test."""
    (tmp_path / "clone_functions.py").write_text(CLONE)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: importlib.import_module("clone_functions")
    sys.modules.pop("clone_functions", None)


@pytest.fixture
def clone(installed, import_clone):
    return import_clone()


def arguments(case, device="cpu"):
    """The six tensors' worth of a call, with the level axis written out."""
    case = case.to(device)
    levels = len(case.sizes)
    samples, weights = (case.tensors[name].unflatten(3, (levels, -1)) for name in ("samples", "weights"))
    shapes = torch.tensor(case.sizes, device=device)
    starts = torch.tensor(case.levels[2::3], device=device)
    return case.value, shapes, starts, samples, weights


def assert_clone_matches(clone, case, im2col_step, device="cpu"):
    value, shapes, starts, samples, weights = arguments(case, device)
    leaves = [x.detach().clone().requires_grad_() for x in (value, samples, weights)]
    output = clone.MSDeformAttnFunction.apply(leaves[0], shapes, starts, *leaves[1:], im2col_step)
    gradients = torch.autograd.grad(output, leaves, case.grad_output.to(device))
    expected = truth(case)
    assert output.dtype == value.dtype
    error = relative_error(output, expected["output"])
    assert error <= tolerance(FORWARD, value.dtype, value.dtype)
    for leaf, gradient, name in zip(leaves, gradients, ("value", "samples", "weights"), strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype
        error = relative_error(gradient.flatten(), expected[name].flatten())
        assert error <= tolerance(GRADIENT, value.dtype, leaf.dtype), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("im2col_step", [64, 1])
def test_values_and_gradients(clone, device, dtype, im2col_step):
    assert_clone_matches(clone, make_case(points=(3, 3), dtype=dtype), im2col_step, device)


@pytest.mark.parametrize("n", [1, 3, 5, 7])
@pytest.mark.parametrize("im2col_step", [2, 3, 128])
def test_any_batch_size_with_any_step(clone, device, n, im2col_step):
    """The compiled extension wants a batch that min(n, im2col_step) divides."""
    assert_clone_matches(clone, make_case(points=(2, 2), n=n, d=8), im2col_step, device)


def test_mixed_dtypes(clone):
    """Autocast without a cast in front: value in bfloat16, the rest in float32."""
    case = make_case(points=(3, 3), dtype=torch.bfloat16, samples_dtype=torch.float32, weights_dtype=torch.float32)
    assert_clone_matches(clone, case, 64)


def test_gradcheck(clone, device):
    case = make_case(sizes=((3, 4), (2, 5)), points=(2, 2), n=2, q=3, d=3, dtype=torch.float64, margin=0.1)
    value, shapes, starts, samples, weights = arguments(case, device)

    def function(value, samples, weights):
        return clone.MSDeformAttnFunction.apply(value, shapes, starts, samples, weights, 64)

    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in (value, samples, weights)])


def test_gradient_with_strides(clone):
    """`output.sum().backward()` hands down one number, expanded."""
    value, shapes, starts, samples, weights = arguments(make_case(points=(3, 3)))
    leaf = value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        clone.MSDeformAttnFunction.apply(leaf, shapes, starts, samples, weights, 64).sum(), leaf
    )
    output = m2f_kernels.ms_deform_attn(leaf, shapes, starts, samples, weights)
    (expected,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    assert torch.equal(gradient, expected)


def test_second_derivative_is_an_error(clone):
    value, shapes, starts, samples, weights = arguments(make_case(points=(3, 3)))
    leaf = value.clone().requires_grad_()
    output = clone.MSDeformAttnFunction.apply(leaf, shapes, starts, samples, weights, 64)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_autocast(installed):
    """Clones cast to float32 by custom_fwd, or do not cast at all: a compiled extension does not know autocast."""
    import MultiScaleDeformableAttention as MSDA

    class Casting(Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return MSDA.ms_deform_attn_forward(*inputs, 64)

        @staticmethod
        @once_differentiable
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, grad_output):
            grad_value, grad_loc, grad_weight = MSDA.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, 64)
            return grad_value, None, None, grad_loc, grad_weight

    value, shapes, starts, samples, weights = arguments(make_case(points=(3, 3)))
    expected = m2f_kernels.ms_deform_attn(value, shapes, starts, samples, weights)
    leaf = value.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(MSDA.ms_deform_attn_forward(value, shapes, starts, samples, weights, 64), expected)
        output = Casting.apply(leaf, shapes, starts, samples, weights)
    rounded = m2f_kernels.ms_deform_attn(leaf.float(), shapes, starts, samples, weights)
    assert output.dtype == torch.float32
    assert torch.equal(output, rounded)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
    (truth_gradient,) = torch.autograd.grad(rounded.square().sum(), leaf)
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(gradient, truth_gradient)


def test_reference_backend(clone):
    """use_backend reaches through the module, forward and backward."""
    with m2f_kernels.use_backend("reference"):
        assert_clone_matches(clone, make_case(points=(3, 3)), 64)


def test_meta_device(installed):
    """Shapes alone, where no autocast exists."""
    import MultiScaleDeformableAttention as MSDA

    value, shapes, starts, samples, weights = arguments(make_case(points=(3, 3)))
    output = MSDA.ms_deform_attn_forward(value.to("meta"), shapes, starts, samples.to("meta"), weights.to("meta"), 64)
    assert output.shape == (2, 7, 32)
    assert output.device.type == "meta"


def test_compiles(clone):
    value, shapes, starts, samples, weights = arguments(make_case(points=(3, 3)))
    expected = m2f_kernels.ms_deform_attn(value, shapes, starts, samples, weights)

    def function(*inputs):
        return clone.MSDeformAttnFunction.apply(*inputs, 64) * 2

    torch.compiler.reset()
    found = torch.compile(function, backend="aot_eager")(value, shapes, starts, samples, weights)
    assert relative_error(found, 2 * expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_against_the_compiled_operator(installed, dtype):
    """The operator of Deformable-DETR as torch-ms-deform-attn compiles it: the same outputs and gradients."""
    pytest.importorskip("torch_ms_deform_attn", reason="torch-ms-deform-attn is not installed; `make bench` builds it")
    import MultiScaleDeformableAttention as MSDA

    inputs = arguments(make_case(points=(4, 4), n=2, q=50, dtype=dtype))
    theirs = torch.ops.torch_ms_deform_attn
    output = MSDA.ms_deform_attn_forward(*inputs, 64)
    expected = theirs.forward(*inputs, 64)
    assert relative_error(output, expected) < FORWARD[dtype]
    grad_output = torch.randn_like(output)
    gradients = MSDA.ms_deform_attn_backward(*inputs, grad_output, 64)
    expected = theirs.backward(*inputs, grad_output, 64)
    for gradient, other in zip(gradients, expected, strict=True):
        assert relative_error(gradient, other) < GRADIENT[dtype]


# ---------------------------------------------------------------- bad input


def changed(inputs, position, value):
    return [value if i == position else x for i, x in enumerate(inputs)]


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (0, ValueError, "im2col_step: expected an integer of at least 1; got 0"),
        (-3, ValueError, "im2col_step: expected an integer of at least 1; got -3"),
        (2.0, TypeError, r"im2col_step: expected an integer of at least 1; got 2.0 \(float\)"),
        (None, TypeError, "im2col_step: expected an integer of at least 1; got None"),
    ],
)
def test_bad_step(installed, step, error, message):
    import MultiScaleDeformableAttention as MSDA

    inputs = arguments(make_case(points=(3, 3)))
    with pytest.raises(error, match=message):
        MSDA.ms_deform_attn_forward(*inputs, step)
    with pytest.raises(error, match=message):
        MSDA.ms_deform_attn_backward(*inputs, torch.zeros(2, 7, 32), step)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, 47, 2, 16, dtype=torch.int64), TypeError, "value: expected float64"),
        (0, torch.zeros(2, 47, 32), ValueError, r"value: expected \[N, S, H, D\]"),
        (1, torch.tensor([[5, 7], [3, 5]]), ValueError, "spatial_shapes: expected levels that sum to value's 47"),
        (2, torch.tensor([0]), ValueError, "level_start_index: expected 2 entries"),
        (3, torch.zeros(2, 7, 2, 2, 3), ValueError, r"sampling_loc\w*: expected \[N, Q, H, L, P, 2\]"),
        (4, torch.zeros(2, 7, 2, 2, 4), ValueError, r"att\w*: expected \[N, Q, H, \w"),
    ],
)
def test_bad_tensors(installed, position, value, error, message):
    import MultiScaleDeformableAttention as MSDA

    inputs = changed(arguments(make_case(points=(3, 3))), position, value)
    with pytest.raises(error, match=message):
        MSDA.ms_deform_attn_forward(*inputs, 64)
    with pytest.raises(error, match=message):
        MSDA.ms_deform_attn_backward(*inputs, torch.zeros(2, 7, 32), 64)


def test_bad_grad_output(installed):
    import MultiScaleDeformableAttention as MSDA

    inputs = arguments(make_case(points=(3, 3)))
    with pytest.raises(ValueError, match=r"grad_output: expected \[N, Q, H\*D\] = \[2, 7, 32\]"):
        MSDA.ms_deform_attn_backward(*inputs, torch.zeros(2, 7, 31), 64)


# ---------------------------------------------------------------- install and uninstall


class Compiled:
    """A module that was compiled, as sys.modules would hold it."""

    def __init__(self):
        self.module = type(sys)(NAME)
        self.module.__file__ = "/somewhere/MultiScaleDeformableAttention.so"
        self.module.ms_deform_attn_forward = self.module.ms_deform_attn_backward = self.fail

    @staticmethod
    def fail(*_):
        raise AssertionError("the compiled function ran")


def test_without_install_there_is_nothing(import_clone):
    with pytest.raises(ModuleNotFoundError, match=NAME):
        import_clone()


def test_patch_twice_and_unpatch():
    extension.patch()
    module = sys.modules[NAME]
    extension.patch()
    assert sys.modules[NAME] is module
    extension.unpatch()
    assert NAME not in sys.modules
    with pytest.raises(RuntimeError, match="patch\\(\\) has not been called"):
        extension.unpatch()


def test_an_imported_module_is_not_replaced_silently(monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, Compiled().module)
    with pytest.raises(RuntimeError, match=r"imported already, from /somewhere/.*\.so; .*patch\(replace=True\)"):
        extension.patch()
    assert sys.modules[NAME].__file__.startswith("/somewhere")


def test_replace(monkeypatch, import_clone):
    """Code that imported the compiled module uses ours, and gets its own back."""
    compiled = Compiled().module
    monkeypatch.setitem(sys.modules, NAME, compiled)
    clone = import_clone()
    case = make_case(points=(3, 3))
    with pytest.raises(AssertionError, match="the compiled function ran"):
        assert_clone_matches(clone, case, 64)
    extension.patch(replace=True)
    assert sys.modules[NAME] is clone.MSDA is not compiled
    assert_clone_matches(clone, case, 64)
    extension.unpatch()
    assert sys.modules[NAME] is clone.MSDA is compiled


def test_importing_the_package_imports_no_other_library():
    code = """
import sys
import m2f_kernels
import m2f_kernels.integrations.extension, m2f_kernels.integrations.hub_kernels, m2f_kernels.integrations.mmcv
import m2f_kernels.integrations.onnx
foreign = {"detectron2", "detrex", "kernels", "mmcv", "mmdet", "onnx", "onnxscript", "transformers"}
assert not foreign & {name.partition(".")[0] for name in sys.modules}, foreign & set(sys.modules)
assert "MultiScaleDeformableAttention" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)
