"""Frozen batch norm: the affine map it is, without what the backward pass of `nn.BatchNorm2d` keeps."""

import copy

import pytest
import torch
from torch import nn

from m2f_model import Mask2FormerConfig
from m2f_model.backbone import Backbone, FrozenBatchNorm2d
from m2f_model.pixel_decoder import _pointwise
from tests.model.peers import photograph


class OneNorm(nn.Module):
    channels = (6, 6, 6, 6)

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, pixels):
        return [self.norm(pixels)] * 4


def norm_with_statistics(affine):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_is_batch_norm_in_eval_mode(affine, dtype):
    norm = norm_with_statistics(affine)
    published = copy.deepcopy(norm).eval()
    frozen = Backbone(OneNorm(norm)).train().body.norm
    assert isinstance(frozen, FrozenBatchNorm2d)
    assert frozen.state_dict().keys() == published.state_dict().keys()
    x, grad = torch.randn(2, 2, 6, 5, 7).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = frozen(a), published(b)
    found.backward(grad)
    expected.backward(grad)
    assert torch.equal(found, expected)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)
    assert all(p.grad is None for p in frozen.parameters())
    assert torch.equal(frozen.running_mean, published.running_mean)


def test_frozen_keeps_no_activations():
    frozen = Backbone(OneNorm(norm_with_statistics(True))).body.norm
    kept = []
    x = torch.randn(2, 6, 40, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        frozen(x)
    assert kept == [6]


def test_without_statistics_nothing_is_frozen():
    norm = Backbone(OneNorm(nn.BatchNorm2d(6, track_running_stats=False))).body.norm
    assert type(norm) is nn.BatchNorm2d
    assert norm.weight.requires_grad


@pytest.mark.parametrize("given", ["planes", "channels last", "image read as [H, W, 3]"])
@torch.no_grad()
def test_channels_last_on_cpu(given):
    pixels = photograph("coffee", 64, 96)
    assert pixels.stride(1) == 1  # as it was read
    if given != "image read as [H, W, 3]":
        layout = torch.contiguous_format if given == "planes" else torch.channels_last
        pixels = pixels.clone(memory_format=layout)
    for features in Backbone.from_config(Mask2FormerConfig.tiny(5)).eval()(pixels):
        _, c, h, w = features.shape
        assert features.stride() == (c * h * w, 1, w * c, c)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pointwise_is_the_convolution_in_planes(n, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, 1).double()
    x = torch.randn(n, 5, 3, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    found, expected = _pointwise(conv, x), conv(x)
    assert found.stride()[2:] == (7, 1)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    leaves = (x, conv.weight, conv.bias)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
