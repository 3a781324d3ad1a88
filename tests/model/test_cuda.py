"""What only a CUDA device can show of the whole model: that inference is captured in a CUDA graph."""

import pytest
import torch

from tests.model.peers import photograph
from tests.model.test_compile import assert_same, model_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


@pytest.mark.parametrize("name", ["swin", "resnet"])
@torch.no_grad()
def test_inference_replays_in_a_cuda_graph(name):
    """Captured on one photograph, replayed on another of the same size."""
    model = model_of(name).cuda()
    pixels, other = (photograph(one, 64, 96).cuda() for one in ("coffee", "astronaut"))
    expected = model(other)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(pixels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = model(pixels)
    pixels.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(found, expected)
