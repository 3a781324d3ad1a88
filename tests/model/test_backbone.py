"""Frozen batch norm: the affine map it is, without what the backward pass of `nn.BatchNorm2d` keeps."""

import copy

import pytest
import torch
from torch import nn

from m2f_model.backbone import Backbone, FrozenBatchNorm2d


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
