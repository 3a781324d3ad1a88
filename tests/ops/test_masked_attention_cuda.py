"""What only a CUDA device can show of attention masks and masked attention: compiled kernels, graphs, sanitizer runs.

Their arithmetic is also checked without a GPU, in Triton's interpreter (tests/triton).
"""

import pytest
import torch

import m2f_kernels
from tests.ops.masked_attention_cases import assert_matches, make_case, value_and_gradients

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


def layer(features, embed, query, key, value):
    """Resize, predict and attend, forward and backward."""
    (level,) = m2f_kernels.resize_mask_features(features, [(16, 16)])
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = m2f_kernels.masked_attention(*leaves, m2f_kernels.predict_attention_mask(embed, level))
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]


def layer_inputs(dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 32, 64, 64), (2, 100, 32), (2, 4, 100, 32), (2, 4, 256, 32), (2, 4, 256, 32))
    return [torch.randn(*shape, generator=g).to("cuda", dtype) for shape in shapes]


def test_serves_from_triton():
    assert m2f_kernels.explain("masked_attention", torch.zeros(1, device="cuda")).backend == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [{"q": 100, "s": 4096}, {"q": 130, "s": 1000}, {"q": 20, "s": 16384}], ids=str)
def test_larger_shapes(dtype, shape):
    assert_matches(make_case(n=1, h=8, dtype=dtype, density=0.1, **shape).to("cuda"))


def test_no_host_synchronisation():
    inputs = layer_inputs()
    layer(*inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_capture():
    inputs = layer_inputs()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = layer(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = layer(*inputs)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_deterministic():
    inputs = layer_inputs()
    for a, b in zip(layer(*inputs), layer(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sanitize(dtype):
    """Small and ragged, for compute-sanitizer."""
    case = make_case(n=2, h=2, q=7, s=70, d=24, dtype=dtype).to("cuda")
    assert all(x.isfinite().all() for x in value_and_gradients(case.call, case).values())
    layer(*layer_inputs(dtype))
