"""Models written as ONNX and run by onnxruntime; and as exported programs, where each operator stays one node."""

import collections

import numpy as np
import pytest
import torch
from torch import nn

import m2f_kernels
from m2f_kernels.integrations import onnx as integration
from m2f_model import Mask2Former, Mask2FormerConfig
from tests.integrations.families import FAMILIES, quick
from tests.integrations.test_fits import Tensors
from tests.model.peers import photograph, their_config

pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install onnx onnxscript onnxruntime")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")

DYNAMIC = torch.export.Dim.DYNAMIC
SIZES = [(6, 5), (3, 4)]
LENGTH = 42


def run(path, *inputs):
    """Outputs of onnxruntime as tensors."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(np.asarray(x)) for x in session.run(None, feeds)]


def assert_runs(model, inputs, path, others=(), **options):
    """Written, made of standard operators only, and giving the same for `inputs` and `others`."""
    program = integration.export(model, inputs, path, verbose=False, **options)
    graph = program.model_proto.graph
    assert not program.model_proto.functions
    assert {node.domain for node in graph.node} == {""}
    for case in (inputs, *others):
        with torch.no_grad():
            expected = model(*case)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for found, truth in zip(run(path, *case), expected, strict=True):
            assert found.dtype == truth.dtype
            rounding = torch.finfo(truth.dtype).eps if truth.is_floating_point() else 0
            torch.testing.assert_close(found, truth, rtol=max(1e-4, rounding), atol=max(1e-4, rounding))
    return collections.Counter(node.op_type for node in graph.node)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def attention(**options):
    torch.manual_seed(0)
    module = m2f_kernels.nn.MSDeformAttn(16, 2, 4, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def attention_inputs(n=2, q=7, length=LENGTH, coordinates=2):
    return torch.randn(n, q, 16), torch.rand(n, q, 2, coordinates), torch.randn(n, length, 16)


# ---------------------------------------------------------------- modules and operators
@pytest.mark.parametrize(("coordinates", "points"), [(2, (3, 1)), (4, 4)], ids=str)
def test_deformable_attention(tmp_path, coordinates, points):
    module = attention(num_points=points)
    model = Call(lambda query, refs, value: module(query, refs, value, SIZES))
    model.module = module
    inputs, other = (attention_inputs(q=q, coordinates=coordinates) for q in (7, 12))
    varying = {"inputs": ({1: DYNAMIC}, {1: DYNAMIC}, None)}
    counts = assert_runs(model.eval(), inputs, tmp_path / "m.onnx", [other], dynamic_shapes=varying)
    assert counts["GridSample"] == len(SIZES)


def test_deformable_attention_with_sizes_as_data(tmp_path):
    """Shapes that exist only as a tensor: one model for every size."""
    module = attention()
    model = Call(lambda query, refs, value, shapes: module(query, refs, value, shapes))
    model.module = module
    inputs = (*attention_inputs(), torch.tensor(SIZES))
    other = (*attention_inputs(q=9, length=79), torch.tensor([[7, 10], [3, 3]]))
    varying = {"inputs": ({1: DYNAMIC}, {1: DYNAMIC}, {1: DYNAMIC}, None)}
    counts = assert_runs(model.eval(), inputs, tmp_path / "m.onnx", [other], dynamic_shapes=varying)
    assert "GridSample" not in counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_locations_that_are_not_finite(tmp_path, dtype):
    def function(value, locations, weights):
        return m2f_kernels.ms_deform_attn(value, SIZES, None, locations, weights)

    locations = torch.rand(2, 9, 4, 2, 3, 2) * 1.6 - 0.3
    for i, bad in enumerate([torch.nan, torch.inf, -torch.inf, 1e30, -1e30]):
        locations[0, i, :, :, 0, i % 2] = bad
    inputs = torch.randn(2, LENGTH, 4, 4).to(dtype), locations, torch.rand(2, 9, 4, 2, 3)
    assert_runs(Call(function).eval(), inputs, tmp_path / "m.onnx")


class MaskedLayer(nn.Module):
    """Mask prediction and masked cross-attention, as the decoder has them."""

    def __init__(self, size):
        super().__init__()
        self.attention, self.size = m2f_kernels.nn.MaskedCrossAttention(16, 4), size

    def forward(self, query, pixels, embed, features):
        (level,) = m2f_kernels.resize_mask_features(features, [self.size])
        mask = m2f_kernels.predict_attention_mask(embed, level)
        return self.attention(query, pixels, mask)


@pytest.mark.parametrize("size", [(5, 7), (1, 1)], ids=str)
def test_masked_cross_attention(tmp_path, size):
    """More keys than a word of a mask has bits, and one; a query whose mask is empty."""
    torch.manual_seed(0)
    model = MaskedLayer(size).eval()
    features, embed = torch.randn(2, 8, 16, 16), torch.randn(2, 6, 8)
    features[0], embed[0, 3] = features[0].abs(), -1
    inputs = torch.randn(2, 6, 16), torch.randn(2, size[0] * size[1], 16), embed, features
    (level,) = m2f_kernels.resize_mask_features(features, [size])
    assert not m2f_kernels.predict_attention_mask(embed, level).row_any[0, 3]
    assert_runs(model, inputs, tmp_path / "m.onnx")


class AnySize(nn.Module):
    """Deformable attention among a map's pixels, then masked attention of queries to them; sizes from the inputs."""

    def __init__(self):
        super().__init__()
        self.deformable = m2f_kernels.nn.MSDeformAttn(16, 1, 4, 2)
        self.masked = m2f_kernels.nn.MaskedCrossAttention(16, 4)

    def forward(self, query, pixels, embed, features):
        size = pixels.shape[2:]
        pixels = pixels.flatten(2).transpose(1, 2)
        points = pixels[..., :2].sigmoid().unsqueeze(2)
        pixels = pixels + self.deformable(pixels, points, pixels, [size])
        (level,) = m2f_kernels.resize_mask_features(features, [size])
        return self.masked(query, pixels, m2f_kernels.predict_attention_mask(embed, level))


def test_sizes_that_vary(tmp_path):
    """One file for every batch, number of queries and size of the maps."""

    def inputs(n, q, h, w):
        return torch.randn(n, q, 16), torch.randn(n, 16, h, w), torch.randn(n, q, 8), torch.randn(n, 8, 4 * h, 4 * w)

    torch.manual_seed(0)
    axes = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
    varying = ({0: DYNAMIC, 1: DYNAMIC}, axes, {0: DYNAMIC, 1: DYNAMIC}, axes)
    others = [inputs(1, 3, 8, 8), inputs(3, 9, 5, 17)]
    counts = assert_runs(AnySize().eval(), inputs(2, 6, 6, 7), tmp_path / "m.onnx", others, dynamic_shapes=varying)
    assert counts["GridSample"] == counts["Resize"] == 1


def _version(module):
    return tuple(map(int, module.__version__.split(".")[:2]))


def test_backbone_with_attention_of_pytorch(tmp_path):
    """Swin is taken apart without gradients, as it is traced: with them its attention has other strides, and a
    reshape behind it fails."""
    import transformers

    sizes = {"embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 7, "image_size": 56}
    backbone = transformers.SwinBackbone(transformers.SwinConfig(**sizes, out_features=["stage1"]))
    if _version(transformers) < (5, 12):
        pytest.skip("Swin in older transformers has no attention of PyTorch")
    assert backbone.config._attn_implementation == "sdpa"
    model = Call(lambda pixels: backbone(pixels).feature_maps)
    model.module = backbone
    assert torch.is_grad_enabled()
    assert_runs(model.eval(), (photograph("coffee", 56, 56),), tmp_path / "m.onnx")


def test_packed_masks(tmp_path):
    """Every bit of a word, the sign among them, as the operator packs it."""

    def function(logits, attend):
        return *m2f_kernels.pack_attention_mask(logits)[:2], *m2f_kernels.pack_attention_mask(attend)[:2]

    logits = torch.randn(2, 5, 70)
    logits[0, 0], logits[0, 1] = 1, -1
    assert_runs(Call(function).eval(), (logits, logits > 0.3), tmp_path / "m.onnx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.uint8], ids=str)
def test_point_sample(tmp_path, dtype):
    input = torch.rand(2, 3, 9, 7) * 4
    input = input > 2 if dtype == torch.bool else input.to(dtype)
    points = torch.rand(2, 40, 2) * 1.6 - 0.3
    points[0, 0, 0] = torch.nan
    assert_runs(Call(m2f_kernels.point_sample).eval(), (input, points), tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(tmp_path, opset):
    module = attention()
    model = Call(lambda query, refs, value: module(query, refs, value, SIZES))
    model.module = module
    assert_runs(model.eval(), attention_inputs(), tmp_path / "m.onnx", opset_version=opset)
    import onnx

    assert [(x.domain, x.version) for x in onnx.load(tmp_path / "m.onnx").opset_import if x.domain == ""] == [
        ("", opset)
    ]


# ---------------------------------------------------------------- Mask2Former
class Segmenter(nn.Module):
    """Class and mask logits of the last prediction."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        output = self.model(pixel_values)
        return output.class_logits, output.masks.logits()


def segmenter(name, **changes):
    config = their_config(name)
    config.update(changes)
    torch.manual_seed(0)
    return Segmenter(Mask2Former(Mask2FormerConfig.from_transformers(config))).eval()


def photographs(name, n, height, width):
    return torch.cat([photograph(name, height, width)] * n)


def test_torch_export_keeps_single_nodes():
    model = segmenter("resnet", encoder_layers=2, decoder_layers=4)
    with torch.no_grad():
        program = torch.export.export(model, (photographs("coffee", 1, 64, 96),))
    counts = collections.Counter(str(node.target) for node in program.graph.nodes if "m2f." in str(node.target))
    assert counts == {
        "m2f.ms_deform_attn_from_offsets.default": 2,
        "m2f.resize_mask_features.default": 1,
        "m2f.predict_attention_mask.default": 3,  # transformers counts the prediction before the first layer as one
        "m2f.masked_attention.default": 3,
    }


def test_mask2former(tmp_path):
    """A fixed size, and one layer of the decoder for each level."""
    model = segmenter("resnet", encoder_layers=1, decoder_layers=4)
    assert_runs(model, (photographs("coffee", 2, 128, 160),), tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_whole_mask2former(tmp_path, name):
    """All layers."""
    assert_runs(segmenter(name), (photographs("coffee", 2, 256, 320),), tmp_path / "m.onnx")


@pytest.mark.slow
def test_mask2former_of_any_size(tmp_path):
    """One file for every batch and image size, all layers."""
    sizes = [(1, 224, 350), (3, 320, 192)]
    assert_runs(
        segmenter("resnet"),
        (photographs("coffee", 2, 256, 320),),
        tmp_path / "m.onnx",
        [(photographs("astronaut", *size),) for size in sizes],
        dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},),
    )


def test_accelerated_model_of_transformers(tmp_path):
    """Deformable DETR with the modules that `accelerate` puts in."""
    import transformers

    if _version(transformers) < (5, 12):
        pytest.skip("older transformers configure this backbone otherwise")

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            stages = {"out_features": ["stage2", "stage3", "stage4"], "layer_type": "basic"}
            sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
            heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
            layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
            config = transformers.DeformableDetrConfig(
                backbone_config=transformers.ResNetConfig(**sizes, **stages),
                d_model=32,
                num_queries=7,
                **heads,
                **layers,
            )
            self.model = transformers.DeformableDetrForObjectDetection(config)
            for name, parameter in self.named_parameters():
                if "sampling_offsets" in name or "attention_weights" in name:
                    nn.init.normal_(parameter, std=0.3)

        def forward(self, pixel_values):
            output = self.model(pixel_values)
            return output.logits, output.pred_boxes

    model = Detector().eval()
    pixels = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        expected = model(pixels)
    m2f_kernels.accelerate(model.model)
    assert_runs(model, (pixels,), tmp_path / "m.onnx")
    for found, truth in zip(run(tmp_path / "m.onnx", pixels), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what is not exported
def test_an_exported_program_is_taken(tmp_path):
    inputs = torch.rand(2, 3, 9, 7), torch.rand(2, 40, 2)
    program = torch.export.export(Call(m2f_kernels.point_sample).eval(), inputs)
    integration.export(program, path=tmp_path / "m.onnx", verbose=False)
    (found,) = run(tmp_path / "m.onnx", *inputs)
    torch.testing.assert_close(found, m2f_kernels.point_sample(*inputs), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="args, kwargs, dynamic_shapes: expected none with an exported program"):
        integration.export(program, inputs)


def test_training_operators_are_named(tmp_path):
    def function(logits):
        return m2f_kernels.uncertain_points(logits, 5)

    with pytest.raises(ValueError, match=r"model: expected inference only; m2f\.uncertain_points\.default cannot be"):
        integration.export(Call(function).eval(), (torch.randn(2, 9, 9),), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_the_exporter_forgets_the_decompositions(tmp_path, monkeypatch):
    """They are PyTorch's only while a model is exported, also where that fails."""
    known = torch._decomp.decomposition_table
    before, seen = dict(known), []

    def failing(*_, **__):
        seen.extend(op for op in known if op not in before)
        raise RuntimeError("no")

    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(RuntimeError, match="no"):
        integration.export(nn.Identity().eval(), (torch.zeros(3),), tmp_path / "m.onnx")
    assert set(seen) == set(integration.decompositions())
    assert known == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"opset_version": 15}, ValueError, "opset_version: expected at least 18, which has GridSample .*; got 15"),
        ({"opset_version": "20"}, TypeError, r"opset_version: expected an integer of at least 18; got '20' \(str\)"),
        ({"model": nn.Identity()}, ValueError, r"model: expected evaluation mode; call model.eval\(\) first"),
        ({"model": len}, TypeError, "model: expected a module or an exported program; got <built-in"),
        ({"args": 3}, TypeError, r"args: expected a tuple of example inputs; got 3 \(int\)"),
        ({"args": torch.zeros(3)}, TypeError, "args: expected a tuple of example inputs; got a float32 tensor"),
    ],
    ids=str,
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        integration.export(**{"model": nn.Identity().eval(), "args": (torch.zeros(3),), **change})


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_packages(monkeypatch, missing):
    find = integration.importlib.util.find_spec
    monkeypatch.setattr(integration.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ImportError, match=rf"expected onnx and onnxscript to be installed; pip install {missing}$"):
        integration.export(nn.Identity().eval(), (torch.zeros(3),))


# ---------------------------------------------------------------- PyTorch's exporters by themselves
def plainly_exported(model, family, path, dynamo):
    """Largest difference of a file that `torch.onnx.export` wrote from the model, relative to the largest output."""
    wrapped, pixels = Tensors(model, family).eval(), family.inputs()["pixel_values"]
    with torch.no_grad():
        torch.onnx.export(wrapped, (pixels,), str(path), dynamo=dynamo, opset_version=20, verbose=False)
        expected = wrapped(pixels)
    pairs = [(x[y.isfinite()], y[y.isfinite()]) for x, y in zip(run(path, pixels), expected, strict=True)]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


#: What fails for the untouched model, too.
UNTOUCHED_FAILS = {
    ("rf_detr", False): "aten::_upsample_bicubic2d_aa",
    ("pp_doclayout_v2", False): "take_along_dim",
    ("deformable_detr", True): "sigmoid_min_1",
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "family",
    quick([f for f in FAMILIES.values() if f.installed], ("deformable_detr", "lw_detr")),
    ids=lambda family: family.name,
)
def test_torchscript_exporter(family, tmp_path):
    """`torch.onnx.export(..., dynamo=False)` of accelerated models."""
    model = m2f_kernels.accelerate(family.make()).model
    reason = UNTOUCHED_FAILS.get((family.name, False))
    if reason is None:
        assert plainly_exported(model, family, tmp_path / "m.onnx", dynamo=False) < 1e-4
        return
    for one in (family.make(), model):
        with pytest.raises(Exception, match=reason):
            plainly_exported(one, family, tmp_path / "m.onnx", dynamo=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["mask2former", "d_fine", "deformable_detr"])
def test_exporter_of_programs(name, tmp_path):
    """`torch.onnx.export(..., dynamo=True)` of accelerated models."""
    family = FAMILIES[name]
    model = m2f_kernels.accelerate(family.make()).model
    reason = UNTOUCHED_FAILS.get((name, True))
    if reason is None:
        assert plainly_exported(model, family, tmp_path / "m.onnx", dynamo=True) < 1e-4
        return
    for one in (family.make(), model):
        with pytest.raises(Exception, match=reason):
            plainly_exported(one, family, tmp_path / "m.onnx", dynamo=True)


# ---------------------------------------------------------------- the exporter of transformers
def test_operators_are_taken_apart_for_the_exporter_of_transformers():
    """It exports a program first, and hands PyTorch's exporter that."""
    pytest.importorskip("transformers.exporters.exporter_onnx", reason="transformers has no exporters")
    from transformers.exporters.utils import apply_patches

    module, inputs = attention(num_points=2), attention_inputs()
    model = Call(lambda query, refs, value: module(query, refs, value, SIZES))
    model.module = module
    with torch.no_grad():
        with apply_patches("onnx"):
            program = torch.export.export(model.eval(), inputs)
        assert "m2f." not in str(program.graph)
        torch.testing.assert_close(program.module()(*inputs), model(*inputs))
        assert "m2f." in str(torch.export.export(model, inputs).graph), "afterwards operators are single nodes again"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rt_detr", "deformable_detr"])
def test_exporter_of_transformers(name):
    exporters = pytest.importorskip("transformers.exporters.exporter_onnx", reason="transformers has no exporters")
    family = FAMILIES[name]
    model = m2f_kernels.accelerate(family.make()).model
    exported = exporters.OnnxExporter().export(model, family.inputs(), config=exporters.OnnxConfig())
    with torch.no_grad():
        expected = model(**family.inputs())
    found = exported(**family.inputs())
    for output in family.outputs:
        torch.testing.assert_close(torch.as_tensor(found[output]), expected[output], rtol=1e-3, atol=1e-4)
