"""`torch.compile` without graph breaks and `torch.export` with dynamic sizes, in inference."""

import pytest
import torch
from torch.torch_version import TorchVersion

from m2f_model import Mask2Former, Mask2FormerConfig
from tests.model.peers import photograph, their_config


def model_of(name):
    torch.manual_seed(0)
    return Mask2Former(Mask2FormerConfig.from_transformers(their_config(name))).eval()


def assert_same(found, expected):
    torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.masks.logits(), expected.masks.logits(), rtol=1e-4, atol=1e-4)
    assert len(found.auxiliary) == len(expected.auxiliary)


@pytest.mark.parametrize("name", ["swin", "resnet"])
@torch.inference_mode()
def test_compiles_as_one_graph(name):
    model, pixels = model_of(name), photograph("coffee", 64, 96)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled(pixels), model(pixels))


@torch.no_grad()
def test_exports_with_dynamic_batch_and_size():
    model = model_of("resnet")
    side = torch.export.Dim.DYNAMIC
    # Tracing takes a dimension of 1 for a constant: every level must have more keys than one word of a packed mask.
    example = torch.cat([photograph("coffee", 256, 320)] * 2)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: side, 2: side, 3: side},))
    # Seen in torch 2.11, gone in 2.13: tracing max_pool2d makes a ResNet serve only sizes whose halves are odd or even
    # as the example's are.
    width = 350 if torch.__version__ >= TorchVersion("2.13") else 352
    for sizes in [(2, 256, 320), (1, 224, width), (3, 320, 192)]:
        pixels = torch.cat([photograph("astronaut", *sizes[1:])] * sizes[0])
        assert_same(program.module()(pixels), model(pixels))
