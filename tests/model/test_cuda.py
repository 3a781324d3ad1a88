"""On a GPU: the model as on CPU, and its inference captured in a CUDA graph."""

import pytest
import torch

from m2f_model import Mask2Former, Mask2FormerConfig
from tests.model.peers import photograph, their_config

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def model_and_pixels(name="resnet"):
    torch.manual_seed(0)
    model = Mask2Former(Mask2FormerConfig.from_transformers(their_config(name))).eval()
    return model, photograph("coffee", 96, 160)


@torch.inference_mode()
def test_as_on_cpu():
    model, pixels = model_and_pixels()
    expected = model(pixels)
    model.cuda()
    # TF32 convolutions would differ by 1e-3: PyTorch's default allows them in cuDNN.
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = model(pixels.cuda())
    torch.testing.assert_close(found.class_logits.cpu(), expected.class_logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.masks.logits().cpu(), expected.masks.logits(), rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_fused_convolutions(monkeypatch):
    """cuDNN's convolutions with bias, residual and ReLU give the features of separate kernels, in both dtypes."""
    model, pixels = model_and_pixels()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        model = model.cuda().hold_in(dtype)
        given, found = pixels.cuda().to(dtype), []
        for how in ("separate", "fused"):
            monkeypatch.setattr("m2f_model.backbone.CONVOLUTION", how)
            with torch.backends.cudnn.flags(allow_tf32=False):
                found.append(model.backbone(given))
        for a, b in zip(*found, strict=True):
            assert float((a - b).float().norm() / a.float().norm()) < tolerance


@torch.inference_mode()
def test_captured_in_a_graph():
    """No operator waits for the GPU or allocates by what is on it: a replay with other pixels gives their result."""
    model, pixels = model_and_pixels()
    model.cuda()
    static = pixels.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(static)
        logits = captured.masks.logits()
    other = photograph("astronaut", 96, 160).cuda()
    static.copy_(other)
    graph.replay()
    expected = model(other)
    torch.testing.assert_close(captured.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, expected.masks.logits(), rtol=1e-4, atol=1e-4)


def test_training_step():
    model, pixels = model_and_pixels()
    model.cuda().train()
    masks = (photograph("rocket", 96, 160)[0, :1] > torch.tensor([-1.0, 0.0, 1.0])[:, None, None]).cuda()
    targets = [{"labels": torch.tensor([0, 1, 2]).cuda(), "masks": masks}]
    with torch.autocast("cuda", torch.bfloat16):
        losses = model(pixels.cuda(), targets).losses
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 100
    assert all(torch.isfinite(g).all() for g in gradients)
