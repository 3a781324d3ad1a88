"""The real mmcv and mmdet, where they are installed. mmcv's compiled extension is not needed: where it is missing, a
module of its name stands in whose functions raise."""

import importlib.util
import sys

import pytest
import torch

from m2f_kernels.integrations import mmcv as integration
from tests.integrations.mmcv_cases import DIM, SIZES, assert_close, make_inputs, randomize, results
from tests.numerics import FORWARD, GRADIENT, relative_error
from tests.ops.ms_deform_attn_cases import make_case, truth

if importlib.util.find_spec("mmcv") is None or importlib.util.find_spec("mmcv.ops") is None:
    pytest.skip("mmcv with mmcv.ops is not installed", allow_module_level=True)


class _NotCompiled(type(sys)):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def fail(*_, **__):
            raise RuntimeError(f"{name} is not compiled")

        return fail


@pytest.fixture(scope="module", autouse=True)
def _extension():
    missing = importlib.util.find_spec("mmcv._ext") is None
    if missing:
        sys.modules["mmcv._ext"] = _NotCompiled("mmcv._ext")
    yield
    if missing:
        del sys.modules["mmcv._ext"]


@pytest.fixture
def patched():
    replaced = integration.patch()
    yield replaced
    integration.unpatch()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("options", [(), ("value", "query_pos"), ("value", "identity", "padding")], ids="-".join)
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_module(batch_first, coordinates, options, ratio):
    from mmcv.ops import MultiScaleDeformableAttention

    module = MultiScaleDeformableAttention(
        DIM, 4, len(SIZES), 3, dropout=0.0, batch_first=batch_first, value_proj_ratio=ratio
    )
    randomize(module)
    inputs = make_inputs(batch_first, coordinates, options)
    before = results(module, inputs)
    integration.patch()
    try:
        assert_close(results(module, inputs), before)
        if "identity" in options:
            renamed = {("residual" if k == "identity" else k): v for k, v in inputs.items()}
            with pytest.warns(DeprecationWarning, match="residual"):
                assert relative_error(module(**renamed), before["output"]) <= FORWARD[torch.float32]
    finally:
        integration.unpatch()
    again = results(module, inputs)
    assert all(torch.equal(again[name], x) for name, x in before.items())


def test_autograd_function(patched):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    case = make_case(points=(3, 3), n=5)
    value, shapes = case.value, torch.tensor(case.sizes)
    samples, weights = (case.tensors[name].unflatten(3, (2, 3)) for name in ("samples", "weights"))
    leaves = [x.clone().requires_grad_() for x in (value, samples, weights)]
    starts = torch.tensor(case.levels[2::3])
    output = MultiScaleDeformableAttnFunction.apply(leaves[0], shapes, starts, *leaves[1:], 3)
    gradients = torch.autograd.grad(output, leaves, case.grad_output)
    expected = truth(case)
    assert relative_error(output, expected["output"]) <= FORWARD[torch.float32]
    for name, gradient in zip(("value", "samples", "weights"), gradients, strict=True):
        assert relative_error(gradient.flatten(), expected[name].flatten()) <= GRADIENT[torch.float32]


def test_point_sample():
    import mmcv.ops

    input, points = torch.randn(2, 4, 6, 5), torch.rand(2, 3, 5, 2) * 1.4 - 0.2
    for p in (points, points.flatten(1, 2)):
        expected = mmcv.ops.point_sample(input, p)
        integration.patch()
        found = mmcv.ops.point_sample(input, p)
        integration.unpatch()
        assert found.shape == expected.shape
        assert relative_error(found, expected) <= FORWARD[torch.float32]


def test_pixel_decoder_of_mmdet():
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    from mmdet.models.layers import MSDeformAttnPixelDecoder
    from mmengine.config import ConfigDict

    torch.manual_seed(0)
    decoder = MSDeformAttnPixelDecoder(
        in_channels=[8, 16, 32, 64],
        strides=[4, 8, 16, 32],
        feat_channels=32,
        out_channels=32,
        num_outs=3,
        norm_cfg=ConfigDict(type="GN", num_groups=8),
        act_cfg=ConfigDict(type="ReLU"),
        encoder=ConfigDict(
            num_layers=2,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=32, num_heads=4, num_levels=3, num_points=4, batch_first=True),
                ffn_cfg=dict(embed_dims=32, feedforward_channels=64),
            ),
        ),
        positional_encoding=ConfigDict(num_feats=16, normalize=True),
    )
    decoder.init_weights()
    for name, parameter in decoder.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    decoder.eval()
    features = [torch.randn(2, c, 64 // s, 96 // s) for c, s in zip((8, 16, 32, 64), (1, 2, 4, 8), strict=True)]

    def run():
        decoder.zero_grad()
        mask_features, levels = decoder(features)
        sum(x.square().mean() for x in (mask_features, *levels)).backward()
        gradients = {name: p.grad for name, p in decoder.named_parameters()}
        return [mask_features, *levels], gradients

    expected, expected_gradients = run()
    replaced = integration.patch()
    try:
        found, gradients = run()
    finally:
        integration.unpatch()
    assert "mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttention.forward" in replaced
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) <= FORWARD[torch.float32]
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) <= GRADIENT[torch.float32], name
