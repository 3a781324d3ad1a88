"""mmcv and detrex, before, while and after they are patched; stand-ins written from their interfaces."""

import copy
import importlib
import pickle
import sys
from pathlib import Path

import pytest
import torch

import m2f_kernels
from m2f_kernels.integrations import mmcv as integration
from tests.integrations.mmcv_cases import DIM, SIZES, assert_close, make_inputs, randomize, results
from tests.numerics import FORWARD, GRADIENT, relative_error
from tests.ops.ms_deform_attn_cases import make_case, truth

STANDINS = Path(__file__).parent / "standins"
PACKAGES = ("mmcv", "mmdet", "detrex", "standin_attention")
ATTENTION = {"mmcv": "mmcv.ops.multi_scale_deform_attn", "detrex": "detrex.layers.multi_scale_deform_attn"}


def forget_packages():
    found = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in PACKAGES}
    importlib.invalidate_caches()
    return found


@pytest.fixture
def standins(monkeypatch):
    """The stand-ins in place of whatever is installed; unpatched and forgotten afterwards."""
    real = forget_packages()
    monkeypatch.syspath_prepend(STANDINS)
    yield
    if integration._undo:
        integration.unpatch()
    forget_packages()
    sys.modules.update(real)


def attention_class(package):
    return importlib.import_module(ATTENTION[package]).MultiScaleDeformableAttention


def build(package, **options):
    module = attention_class(package)(DIM, 4, len(SIZES), 3, dropout=0.0, **options)
    randomize(module)
    return module


# ---------------------------------------------------------------- the module
@pytest.mark.parametrize("package", ["mmcv", "detrex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("options", [(), ("value", "query_pos"), ("value", "identity", "padding")], ids="-".join)
def test_module(standins, package, dtype, batch_first, coordinates, options):
    """Output, and gradients of every input and parameter."""
    module = build(package, batch_first=batch_first).to(dtype)
    inputs = make_inputs(batch_first, coordinates, options, dtype)
    before = results(module, inputs)
    integration.patch()
    after = results(module, inputs)
    assert_close(after, before)
    integration.unpatch()
    again = results(module, inputs)
    assert all(torch.equal(again[name], x) for name, x in before.items())
    assert any(not torch.equal(after[name], x) for name, x in before.items()), "the original ran in between"


def test_the_operator_runs_once(standins, monkeypatch):
    calls = []
    fused = m2f_kernels.ms_deform_attn_from_offsets
    monkeypatch.setattr(
        m2f_kernels, "ms_deform_attn_from_offsets", lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs)
    )
    module, inputs = build("mmcv"), make_inputs(False, 2)
    module(**inputs)
    assert not calls
    integration.patch()
    module(**inputs)
    assert len(calls) == 1


def test_value_projection_of_another_width(standins):
    """mmcv's value_proj_ratio: heads of another size than embed_dims / num_heads."""
    module, inputs = build("mmcv", value_proj_ratio=0.5), make_inputs(False, 2, ("value",))
    before = results(module, inputs)
    integration.patch()
    assert_close(results(module, inputs), before)


def test_dropout_and_identity(standins):
    module = attention_class("mmcv")(DIM, 4, len(SIZES), 3, dropout=0.4).train()
    inputs = make_inputs(False, 2, ("identity",))
    integration.patch()
    torch.manual_seed(3)
    dropped = (module(**inputs) - inputs["identity"] == 0).double().mean().item()
    assert 0.3 < dropped < 0.5
    module.eval()
    assert ((module(**inputs) - inputs["identity"]) == 0).double().mean().item() < 0.1


def test_residual_is_identity(standins):
    """mmcv's older name, which it takes with a warning."""
    module, inputs = build("mmcv"), make_inputs(False, 2, ("identity",))
    integration.patch()
    expected = module(**inputs)
    inputs["residual"] = inputs.pop("identity")
    with pytest.warns(DeprecationWarning, match="residual"):
        assert torch.equal(module(**inputs), expected)


def test_padding_mask_of_bytes(standins):
    module, inputs = build("mmcv"), make_inputs(False, 2, ("padding",))
    expected = module(**inputs)
    integration.patch()
    inputs["key_padding_mask"] = inputs["key_padding_mask"].to(torch.uint8)
    assert relative_error(module(**inputs), expected) < FORWARD[torch.float32]


def test_bfloat16_is_no_worse(standins):
    inputs = make_inputs(True, 2, ("value",))
    exact = results(build("mmcv", batch_first=True).double(), make_inputs(True, 2, ("value",), torch.float64))
    low = {k: x.detach().bfloat16() if x.is_floating_point() else x for k, x in inputs.items()}
    low["reference_points"] = inputs["reference_points"].detach()
    module = build("mmcv", batch_first=True).bfloat16()
    theirs = relative_error(module(**{**low, "reference_points": low["reference_points"].bfloat16()}), exact["output"])
    integration.patch()
    output = module(**low)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, exact["output"]) <= theirs


def test_modules_survive(standins):
    """Built before or after: the same names; copies and pickles go with the class."""
    old = build("mmcv")
    keys, inputs = list(old.state_dict()), make_inputs(False, 2)
    expected = old(**inputs)
    integration.patch()
    new = build("mmcv")
    assert list(new.state_dict()) == list(old.state_dict()) == keys
    for module in (old, new, copy.deepcopy(old), pickle.loads(pickle.dumps(old))):
        assert relative_error(module(**inputs), expected) < FORWARD[torch.float32]
    integration.unpatch()
    assert torch.equal(pickle.loads(pickle.dumps(new))(**inputs), expected)


def test_a_subclass_with_a_forward_of_its_own_is_left_alone(standins):
    class Custom(attention_class("mmcv")):
        def forward(self, query, **kwargs):
            return query

    class Plain(attention_class("mmcv")):
        pass

    integration.patch()
    x = torch.randn(3)
    assert Custom(DIM, 4, 2, 3).forward(x) is x
    assert Plain.forward.__code__.co_filename == integration.__file__


def test_pixel_decoder_of_mmdet(standins):
    """Its attention is mmcv's class, imported before the patch."""
    from mmdet.models import MSDeformAttnPixelDecoder

    decoder, inputs = MSDeformAttnPixelDecoder(embed_dims=DIM, num_heads=4, num_levels=2, num_points=3), None
    inputs = make_inputs(False, 2)
    module = decoder.attention.eval()
    before = results(module, inputs)
    integration.patch()
    assert_close(results(module, inputs), before)
    assert type(module).forward.__code__.co_filename == integration.__file__


@pytest.mark.parametrize("missing", ["reference_points", "spatial_shapes"])
def test_bad_input(standins, missing):
    module, inputs = build("mmcv"), make_inputs(False, 2)
    integration.patch()
    with pytest.raises(ValueError, match=f"{missing}: expected a tensor; got None"):
        module(**{**inputs, missing: None})
    with pytest.raises(ValueError, match="spatial_shapes: expected levels that sum to value's 42 positions"):
        module(**{**inputs, "spatial_shapes": torch.tensor([[6, 5], [3, 3]])})
    with pytest.raises(ValueError, match="reference_points: expected 2 or 4 coordinates"):
        module(**{**inputs, "reference_points": torch.rand(3, 42, 2, 3)})


# ---------------------------------------------------------------- functions below the module
def level_inputs(case):
    levels = len(case.sizes)
    samples, weights = (case.tensors[name].unflatten(3, (levels, -1)) for name in ("samples", "weights"))
    starts = torch.tensor(case.levels[2::3])
    return case.value, torch.tensor(case.sizes), starts, samples, weights


@pytest.mark.parametrize("package", ["mmcv", "detrex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autograd_function(standins, package, dtype):
    """Unchanged, on the replaced extension: in-place gradients for mmcv, returned ones for detrex; on CPU."""
    function = importlib.import_module(ATTENTION[package]).MultiScaleDeformableAttnFunction
    case = make_case(points=(3, 3), n=5, dtype=dtype)
    value, shapes, starts, samples, weights = level_inputs(case)
    leaves = [x.clone().requires_grad_() for x in (value, samples, weights)]
    with pytest.raises((RuntimeError, NameError), match=r"not found|not defined"):
        function.apply(leaves[0], shapes, starts, *leaves[1:], 3)
    integration.patch()
    output = function.apply(leaves[0], shapes, starts, *leaves[1:], 3)
    gradients = torch.autograd.grad(output, leaves, case.grad_output)
    expected = truth(case)
    assert relative_error(output, expected["output"]) <= FORWARD[dtype]
    for name, leaf, gradient in zip(("value", "samples", "weights"), leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert relative_error(gradient.flatten(), expected[name].flatten()) <= GRADIENT[dtype], name
    integration.unpatch()
    with pytest.raises((RuntimeError, NameError), match=r"not found|not defined"):
        function.apply(leaves[0], shapes, starts, *leaves[1:], 3)


def test_in_place_backward_overwrites_the_buffers(standins):
    """Whatever is in them; also buffers with strides, positional step."""
    integration.patch()
    module = importlib.import_module(ATTENTION["mmcv"])
    case = make_case(points=(3, 3))
    inputs = level_inputs(case)
    buffers = [torch.full_like(x, float("nan")) for x in (inputs[0], inputs[3], inputs[4])]
    buffers[0] = buffers[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert module.ext_module.ms_deform_attn_backward(*inputs, case.grad_output, *buffers, 64) is None
    expected = truth(case)
    for name, buffer in zip(("value", "samples", "weights"), buffers, strict=True):
        assert relative_error(buffer.flatten(), expected[name].flatten()) <= GRADIENT[torch.float32], name


@pytest.mark.parametrize("package", ["mmcv", "detrex"])
def test_pytorch_function(standins, package):
    module = importlib.import_module(ATTENTION[package])
    value, shapes, _, samples, weights = level_inputs(make_case(points=(3, 3)))
    before = module.multi_scale_deformable_attn_pytorch
    expected = before(value, shapes, samples, weights)
    replaced = integration.patch()
    assert f"{ATTENTION[package]}.multi_scale_deformable_attn_pytorch" in replaced
    assert module.multi_scale_deformable_attn_pytorch is not before
    found = module.multi_scale_deformable_attn_pytorch(value, shapes, samples, weights)
    assert relative_error(found, expected) <= FORWARD[torch.float32]
    integration.unpatch()
    assert module.multi_scale_deformable_attn_pytorch is before


# ---------------------------------------------------------------- point_sample
@pytest.mark.parametrize("shape", [(2, 11, 2), (2, 3, 5, 2)], ids=["points", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_point_sample(standins, shape, dtype):
    import mmcv.ops
    import mmdet.models

    calls = sys.modules["mmcv.ops.point_sample"].calls
    input = torch.randn(2, 4, 6, 5, dtype=dtype, requires_grad=True)
    points = torch.rand(shape, dtype=dtype) * 1.4 - 0.2
    original = mmcv.ops.point_sample
    expected = original(input, points)
    weight = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, input, weight)
    calls.clear()
    replaced = integration.patch()
    assert {"mmcv.ops.point_sample", "mmdet.models.point_sample", "mmcv.ops.point_sample.point_sample"} <= set(replaced)
    for function in (mmcv.ops.point_sample, mmdet.models.sample):
        found = function(input, points)
        (gradient,) = torch.autograd.grad(found, input, weight)
        assert found.shape == expected.shape
        assert relative_error(found, expected) <= FORWARD[dtype]
        assert relative_error(gradient, expected_gradient) <= GRADIENT[dtype]
    assert bool(calls) == (dtype == torch.float64), "no kernel takes float64"
    integration.unpatch()
    assert mmcv.ops.point_sample is mmdet.models.point_sample is original


def test_point_sample_of_half_precision_and_masks(standins):
    """The original wants one floating dtype for both; masks are read without a cast."""
    import mmcv.ops

    original = mmcv.ops.point_sample
    mask, points = torch.rand(2, 3, 20, 30) > 0.5, torch.rand(2, 50, 2)
    integration.patch()
    assert torch.allclose(mmcv.ops.point_sample(mask, points), original(mask.float(), points), atol=1e-6)
    input = torch.randn(2, 3, 20, 30).bfloat16()
    found = mmcv.ops.point_sample(input, points)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, original(input.float(), points)) < 4e-3
    assert mmcv.ops.point_sample(input, points.bfloat16()).shape == (2, 3, 50)


@pytest.mark.parametrize(
    "case", ["align_corners", "positional align_corners", "padding_mode", "points with a gradient"], ids=str
)
def test_point_sample_hands_the_rest_to_the_original(standins, case):
    import mmcv.ops

    calls = sys.modules["mmcv.ops.point_sample"].calls
    input, points = torch.randn(2, 4, 6, 5), torch.rand(2, 11, 2) * 1.4 - 0.2
    args, options = (), {}
    if case == "align_corners":
        options["align_corners"] = True
    elif case == "positional align_corners":
        args = (True,)
    elif case == "padding_mode":
        options["padding_mode"] = "border"
    else:
        points.requires_grad_()
    expected = mmcv.ops.point_sample(input, points, *args, **options)
    calls.clear()
    integration.patch()
    found = mmcv.ops.point_sample(input, points, *args, **options)
    assert torch.equal(found, expected)
    assert len(calls) == 1
    if points.requires_grad:
        found.sum().backward()
        assert points.grad.abs().max() > 0


# ---------------------------------------------------------------- patch and unpatch
def test_everything_comes_back(standins):
    import detrex.layers.multi_scale_deform_attn
    import mmcv.ops

    importlib.import_module("mmdet.models")
    names = [n for n in sys.modules if n.partition(".")[0] in PACKAGES]
    before = {n: dict(vars(sys.modules[n])) for n in names}
    forwards = {p: attention_class(p).forward for p in ATTENTION}
    integration.patch()
    assert any(dict(vars(sys.modules[n])) != before[n] for n in names)
    from mmcv.ops import point_sample  # a module imported while patched holds the replacement

    late = type(sys)("mmseg_late")
    late.point_sample = point_sample
    sys.modules["mmseg_late"] = late
    try:
        integration.unpatch()
        assert late.point_sample is mmcv.ops.point_sample is before["mmcv.ops"]["point_sample"]
    finally:
        del sys.modules["mmseg_late"]
    for name in names:
        assert dict(vars(sys.modules[name])) == before[name], name
    assert forwards == {p: attention_class(p).forward for p in ATTENTION}
    assert not hasattr(detrex.layers.multi_scale_deform_attn, "_C")
    with pytest.raises(RuntimeError, match="patch\\(\\) has not been called"):
        integration.unpatch()


def test_patching_twice_reaches_what_came_in_between(standins):
    import mmcv.ops

    original = mmcv.ops.point_sample
    integration.patch()
    late = type(sys)("mmseg_late")
    late.point_sample = original
    sys.modules["mmseg_late"] = late
    try:
        assert "mmseg_late.point_sample" in integration.patch()
        assert late.point_sample is mmcv.ops.point_sample is not original
        integration.unpatch()
        assert late.point_sample is mmcv.ops.point_sample is original
    finally:
        del sys.modules["mmseg_late"]


def without(monkeypatch, *modules):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


def test_one_package_alone(standins, monkeypatch):
    without(monkeypatch, "detrex")
    assert all(name.partition(".")[0] in ("mmcv", "mmdet", "standin_attention") for name in integration.patch())
    integration.unpatch()
    monkeypatch.undo()


def test_no_package(standins, monkeypatch):
    without(monkeypatch, "detrex", "mmcv")
    with pytest.raises(ImportError, match=r"expected mmcv .* or detrex to be installed; found neither"):
        integration.patch()
    assert not integration._undo


def test_mmcv_lite(standins, monkeypatch):
    """mmcv without mmcv.ops."""
    without(monkeypatch, "detrex", "mmcv.ops")
    with pytest.raises(ImportError, match="mmcv-lite has none"):
        integration.patch()


def test_an_import_that_fails_is_reported(standins, monkeypatch, tmp_path):
    """Not taken for absence; and nothing is half patched."""
    broken = tmp_path / "detrex" / "layers"
    broken.mkdir(parents=True)
    (broken.parent / "__init__.py").write_text("")
    (broken / "__init__.py").write_text("import a_dependency_of_detrex\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_dependency_of_detrex"):
        integration.patch()
    assert not integration._undo


def test_a_version_without_the_names_is_left_whole(standins):
    forward = attention_class("mmcv").forward
    del sys.modules["mmcv.ops.multi_scale_deform_attn"].multi_scale_deformable_attn_pytorch
    with pytest.raises(AttributeError, match="multi_scale_deformable_attn_pytorch"):
        integration.patch()
    assert attention_class("mmcv").forward is forward
    assert not integration._undo
