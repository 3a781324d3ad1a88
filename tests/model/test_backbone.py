"""Frozen batch norm: the affine map it is, without what the backward pass of `nn.BatchNorm2d` keeps."""

import copy
import io
import threading

import pytest
import torch
import transformers
from torch import nn

from m2f_kernels.constants import _DERIVED
from m2f_model import Mask2FormerConfig
from m2f_model.backbone import Backbone, ConvolutionLayer, FrozenBatchNorm2d, ResidualLayer
from m2f_model.pixel_decoder import _pointwise
from tests.model.peers import photograph, their_config


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


# ---------------------------------------------------------------- folded norms
def backbone():
    torch.manual_seed(0)
    body = Backbone.from_config(Mask2FormerConfig.tiny(5)).body
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return Backbone(body, frozen_batch_norm=True).eval()


def unfolded(model, pixels):
    """As with gradients, where convolution and norm run one after the other."""
    with torch.enable_grad():
        return [x.detach() for x in model(pixels)]


def equals_unfolded(model, pixels, tolerance=1e-5):
    with torch.no_grad():
        for a, b in zip(model(pixels), unfolded(model, pixels), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_folded_weights_follow_training():
    """Train, validate, train, validate; every way in which weights change between."""
    model, pixels = backbone(), torch.randn(1, 3, 64, 64)
    pairs = sum(isinstance(x, ConvolutionLayer) for x in model.modules())
    assert pairs == sum(isinstance(x, FrozenBatchNorm2d) for x in model.modules()) > 5
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        equals_unfolded(model, pixels)
        assert sum(bool(_DERIVED.get(x)) for x in model.modules() if isinstance(x, nn.Conv2d)) == pairs
        model.train()
        assert not any(x in _DERIVED for x in model.modules()), "training needs the memory"
        sum(x.mean() for x in model(pixels)).backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    equals_unfolded(model, pixels)
    before = model(pixels)[-1].detach()
    optimiser.step()  # without train() in between
    model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items() if v.is_floating_point()}, strict=False)
    equals_unfolded(model, pixels)
    with torch.no_grad():
        assert not torch.allclose(model(pixels)[-1], before)
        next(x for x in model.modules() if isinstance(x, FrozenBatchNorm2d)).running_var.mul_(2)
    equals_unfolded(model, pixels)
    equals_unfolded(model.double(), pixels.double(), 1e-12)
    equals_unfolded(model.float(), pixels)
    equals_unfolded(copy.deepcopy(model), pixels)
    with torch.no_grad():
        copied = copy.deepcopy(model)
        next(x for x in copied.modules() if isinstance(x, nn.Conv2d)).weight.zero_()
    equals_unfolded(copied, pixels)
    equals_unfolded(model, pixels)


class Doubled(nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("what", ["another convolution", "wrapped", "another norm", "taken out", "parametrized"])
def test_exchanged_modules_are_not_folded(what):
    model, pixels = backbone(), torch.randn(1, 3, 64, 64)
    layer = next(x for x in model.modules() if isinstance(x, ConvolutionLayer))
    convolution, norm = layer.convolution, layer.normalization
    equals_unfolded(model, pixels)
    if what == "another convolution":
        layer.convolution = nn.Conv2d(3, 16, 7, 2, 3)
    elif what == "wrapped":
        layer.convolution = Doubled(convolution)
    elif what == "another norm":
        layer.normalization = nn.GroupNorm(4, 16)
    elif what == "parametrized":
        nn.utils.parametrizations.weight_norm(convolution)
    else:
        with torch.no_grad():
            assert torch.equal(
                nn.Sequential(convolution)(pixels), convolution._conv_forward(pixels, convolution.weight, None)
            )
            assert not torch.equal(norm(torch.ones(1, 16, 2, 2)), torch.ones(1, 16, 2, 2))
    equals_unfolded(model, pixels)


def test_hooks_see_convolution_and_norm_apart():
    model, pixels = backbone(), torch.randn(1, 3, 64, 64)
    convolution = next(x for x in model.modules() if isinstance(x, nn.Conv2d))
    seen = []
    handle = convolution.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(pixels)
    given = pixels.clone(memory_format=torch.channels_last)
    assert torch.equal(seen[0], convolution._conv_forward(given, convolution.weight, convolution.bias))
    handle.remove()


def test_threads_fold_at_once():
    model, pixels = backbone(), torch.randn(1, 3, 64, 64)
    expected, found = unfolded(model, pixels), []

    @torch.no_grad()
    def work():
        found.append(model(pixels))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for maps in found:
        for a, b in zip(maps, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_folded_weights_are_not_saved():
    model, pixels = backbone(), torch.randn(1, 3, 64, 64)
    before, after = io.BytesIO(), io.BytesIO()
    torch.save(model, before)
    with torch.no_grad():
        model(pixels)
    torch.save(model, after)
    assert len(before.getvalue()) == len(after.getvalue())
    after.seek(0)
    equals_unfolded(torch.load(after, weights_only=False), pixels)


def test_autocast_keeps_folded_weights_in_its_dtype():
    model, pixels = backbone(), torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(pixels)
    with torch.no_grad():
        for a, b in zip(found, model(pixels), strict=True):
            assert float((a - b).norm() / b.norm()) < 0.03
    kept = [v for x in model.modules() for v in _DERIVED.get(x, {})]
    assert kept.count("torch.bfloat16") == kept.count("torch.float32") > 5


# ---------------------------------------------------------------- cuDNN's fused convolutions


class Fused:
    """Stands for cuDNN's operators on CPU, and counts them."""

    def __init__(self):
        self.calls = []

    def relu(self, x, weight, bias, *geometry):
        self.calls.append("relu")
        return torch.conv2d(x, weight, bias, *geometry).relu()

    def add_relu(self, x, weight, z, alpha, bias, *geometry):
        self.calls.append("add_relu")
        return (torch.conv2d(x, weight, bias, *geometry) + alpha * z).relu()


@pytest.fixture
def fused(monkeypatch):
    found = Fused()
    monkeypatch.setattr(torch, "cudnn_convolution_relu", found.relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", found.add_relu)
    monkeypatch.setattr("m2f_model.backbone.CONVOLUTION", "fused")
    monkeypatch.setattr("m2f_model.backbone._on_cudnn", lambda x: True)
    return found


def resnet50():
    config = their_config("bottleneck").backbone_config
    return Backbone(transformers.AutoBackbone.from_config(config), frozen_batch_norm=True).eval()


@pytest.mark.parametrize("make", [backbone, resnet50])
def test_fused_convolutions_are_separate_ones(make, fused):
    model, pixels = make(), torch.randn(1, 3, 64, 64)
    residual = [x for x in model.modules() if isinstance(x, ResidualLayer)]
    convolutions = [x for x in model.modules() if isinstance(x, ConvolutionLayer)]
    shortcuts = sum(not isinstance(x.shortcut, nn.Identity) for x in residual)
    equals_unfolded(model, pixels)
    assert fused.calls.count("add_relu") == len(residual) > 1
    assert fused.calls.count("relu") == len(convolutions) - len(residual) - shortcuts
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(pixels)[-1].dtype == torch.bfloat16


def test_no_images_and_float64_are_not_fused(fused):
    model = backbone()
    with torch.no_grad():
        assert model(torch.randn(0, 3, 64, 64))[0].shape[0] == 0
        model.double()(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert not fused.calls


def test_hooks_see_what_is_not_fused(fused):
    model, pixels, seen = backbone(), torch.randn(1, 3, 64, 64), []
    layer = next(x for x in model.modules() if isinstance(x, ResidualLayer))
    for module in (layer.activation, layer.layer, layer.layer[0].activation, layer.layer[-1]):
        with module.register_forward_hook(lambda *args: seen.append(args[0])):
            equals_unfolded(model, pixels)
        assert seen.count(module) == 2, "with gradients and without"
