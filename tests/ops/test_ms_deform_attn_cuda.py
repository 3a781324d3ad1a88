"""Tests that need a CUDA device: the kernels themselves, no host synchronisation, graph capture, sanitizer runs.

Their arithmetic is also checked without a GPU, by executing them on the host (tests/cuda_on_host).
"""

from __future__ import annotations

import pytest
import torch

import m2f_kernels
from m2f_kernels._library import LIBRARIES
from m2f_kernels.ops.ms_deform_attn import reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]

SHAPES = [(5, 7), (16, 12), (3, 2)]
LENGTH = sum(h * w for h, w in SHAPES)


@pytest.fixture(autouse=True)
def _library_loaded() -> None:
    assert LIBRARIES["cuda"].loaded, LIBRARIES["cuda"].problem


def make_inputs(
    dtype: torch.dtype, queries: int, d: int, coordinates: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """value, reference points, offsets, logits; coordinates stay in float32 as autocast leaves them."""
    generator = torch.Generator().manual_seed(queries * 1000 + d)
    other = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    value = normal(2, LENGTH, 4, d).to(dtype)
    points = torch.rand(2, queries, 3, coordinates, generator=generator, dtype=torch.float64).to(other)
    offsets, logits = (3 * normal(2, queries, 4, 3, 4, 2)).to(other), normal(2, queries, 4, 3, 4).to(other)
    return value.cuda(), points.cuda(), offsets.cuda(), logits.cuda()


def truth(inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    value, points, offsets, logits = (x.double().requires_grad_() for x in inputs)
    levels, start = [], 0
    for h, w in SHAPES:
        levels += [h, w, start]
        start += h * w
    output = reference.ms_deform_attn_from_offsets(
        value, levels, points, offsets.flatten(3, 4), logits.flatten(3), [4, 4, 4], 0.5
    )
    return [output.detach(), *torch.autograd.grad(output, (value, points, offsets, logits), grad.double())]


@pytest.mark.parametrize("levels_on_device", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(("queries", "d"), [(LENGTH, 32), (37, 32), (37, 33), (1, 8), (200, 64), (64, 256)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sanitize_values_and_gradients(
    dtype: torch.dtype, queries: int, d: int, coordinates: int, levels_on_device: bool
) -> None:
    """Small enough for compute-sanitizer, wide enough to touch every kernel."""
    inputs = [x.requires_grad_() for x in make_inputs(dtype, queries, d, coordinates)]
    shapes = torch.tensor(SHAPES, device="cuda") if levels_on_device else SHAPES
    output = m2f_kernels.ms_deform_attn_from_offsets(inputs[0], shapes, *inputs[1:])
    grad = torch.randn_like(output)
    results = [output.detach(), *torch.autograd.grad(output, inputs, grad)]
    # One rounding to the storage type is all that low precision adds: everything in between is float32.
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    forward, backward = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 1e-4)
    for i, (result, expected) in enumerate(zip(results, truth([x.detach() for x in inputs], grad), strict=True)):
        error = (result.double() - expected).norm() / expected.norm()
        assert error < (forward if i == 0 else backward) + rounding, f"result {i}: relative error {error:.2e}"


def test_no_host_synchronisation() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(torch.float32, LENGTH, 32)]
    shapes = torch.tensor(SHAPES, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        m2f_kernels.ms_deform_attn_from_offsets(inputs[0], shapes, *inputs[1:]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_on_new_values() -> None:
    value, points, offsets, logits = make_inputs(torch.float32, LENGTH, 32)
    shapes = torch.tensor(SHAPES, device="cuda")
    m2f_kernels.ms_deform_attn_from_offsets(value, shapes, points, offsets, logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = m2f_kernels.ms_deform_attn_from_offsets(value, shapes, points, offsets, logits)
    value.copy_(torch.randn_like(value))
    graph.replay()
    expected = m2f_kernels.ms_deform_attn_from_offsets(value, shapes, points, offsets, logits)
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


def test_deterministic_mode_reproduces_gradients() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(torch.float32, LENGTH, 32)]
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            output = m2f_kernels.ms_deform_attn_from_offsets(inputs[0], SHAPES, *inputs[1:])
            runs.append(torch.autograd.grad(output.square().sum(), inputs[0])[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_another_stream_and_device_guard() -> None:
    value, points, offsets, logits = make_inputs(torch.float32, 37, 32)
    expected = m2f_kernels.ms_deform_attn_from_offsets(value, SHAPES, points, offsets, logits)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = m2f_kernels.ms_deform_attn_from_offsets(value, SHAPES, points, offsets, logits)
    stream.synchronize()
    assert torch.equal(result, expected)
