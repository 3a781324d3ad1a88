"""`torch.compile` without graph breaks and what CUDA graphs cannot hold; `torch.export` with dynamic sizes."""

import pytest
import torch
import transformers
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.torch_version import TorchVersion

import m2f_kernels
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


def on_meta(implementation, training):
    """A small model; the meta device stands for a GPU, whose tensors differ from those on the host."""
    config = their_config("bottleneck")
    config.encoder_layers = 1
    if implementation == "ours":
        model = Mask2Former(Mask2FormerConfig.from_transformers(config))
    else:
        model = m2f_kernels.accelerate(transformers.Mask2FormerForUniversalSegmentation(config)).model
    model.to("meta").train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # frozen, as published: statistics are no inputs that change
            module.eval()
    return model


@pytest.mark.parametrize(
    ("implementation", "training"),
    [
        ("ours", True),
        ("accelerated", True),
        pytest.param("ours", False, marks=pytest.mark.slow),
        pytest.param("accelerated", False, marks=pytest.mark.slow),
    ],
)
def test_one_graph_that_a_cuda_graph_can_hold(implementation, training):
    """`mode="reduce-overhead"` passes over graphs that read tensors on the host or change their inputs."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    model = on_meta(implementation, training)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    with torch.set_grad_enabled(training):
        out = compiled(torch.empty(1, 3, 64, 96, device="meta"))
        if training:
            predicted = out.class_logits if implementation == "ours" else out.class_queries_logits
            predicted.sum().backward()
    assert len(graphs) == (2 if training else 1)
    for graph in graphs:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta", node.format_node()
            assert node.target is not torch.ops.aten.copy_.default, node.format_node()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["ours", "accelerated"])
@torch.no_grad()
def test_varying_shapes_are_compiled_twice_more_at_most(implementation):
    """Once for one size, once for other sizes, once for other batches."""
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(on_meta(implementation, False), backend=counter, fullgraph=True)
    for n, h, w in [(1, 64, 96), (1, 96, 64), (1, 128, 160), (2, 96, 96), (3, 64, 128), (2, 160, 96), (1, 96, 96)]:
        compiled(torch.empty(n, 3, h, w, device="meta"))
    assert counter.frame_count <= 3


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
