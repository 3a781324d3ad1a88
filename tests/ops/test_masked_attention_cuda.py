"""Tests of attention masks and masked attention that need a CUDA device: compiled kernels, graphs, sanitizer runs.

Their arithmetic is also checked without a GPU, in Triton's interpreter (tests/triton).
"""

import pytest
import torch

import m2f_kernels
from tests.numerics import FORWARD, GRADIENT, relative_error
from tests.ops.masked_attention_cases import NAMES, Case, assert_matches, make_case, truth, value_and_gradients

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


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def cuda_case(**shape) -> Case:
    return make_case(**shape).to("cuda")


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(("q", "s"), [(1, 1), (7, 33), (100, 100), (130, 65)])
@pytest.mark.parametrize("d", [16, 17, 32, 64, 128])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_sanitize_values_and_gradients(dtype: torch.dtype, d: int, q: int, s: int, density: float) -> None:
    """Small enough for compute-sanitizer."""
    assert_matches(cuda_case(n=1, q=q, s=s, d=d, dtype=dtype, density=density))


@pytest.mark.parametrize("q", [20, 200])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sanitize_split_keys(dtype: torch.dtype, q: int) -> None:
    """Several programs per query, whose results are combined; some have no key for some queries."""
    case = cuda_case(n=1, h=2, q=q, s=3000, dtype=dtype, density=0.01)
    case.attend[:, 1, :2900] = False
    assert_matches(case)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize(("dtype", "q"), [(F32, 9), (F32, 70), (BF16, 9), (BF16, 200)], ids=str)
def test_sanitize_blocked_keys_contribute_nothing(dtype: torch.dtype, q: int, name: str, bad: float) -> None:
    case = cuda_case(n=1, q=q, s=150, dtype=dtype)
    case.attend[:, :, 40:45] = False
    case.attend[:, :, 0] = True
    expected = truth(case)
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40:45] = bad
    assert_matches(case, expected)


def test_bad_key_stays_with_who_attends_to_it() -> None:
    case = cuda_case(n=1, q=100, s=300)
    case.attend[:, :, 40] = False
    case.attend[:, :, 0] = True
    clean = truth(case)
    case.attend[:, 3, 40] = True
    case.tensors["value"] = case.tensors["value"].clone()
    case.tensors["value"][:, :, 40] = float("nan")
    actual = value_and_gradients(case.call, case)
    others = [i for i in range(100) if i != 3]
    assert actual["output"][:, :, 3].isnan().all()
    for name, bound in (("output", FORWARD), ("query", GRADIENT)):
        assert relative_error(actual[name][:, :, others], clean[name][:, :, others]) < bound[F32]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_large_logits(dtype: torch.dtype) -> None:
    """Compiled arithmetic fuses multiplication and addition: weights of scores of 1e31 must still be at most 1."""
    case = cuda_case(n=1, q=100, s=3000, dtype=dtype, scale=1.0)
    for name in ("query", "key"):
        case.tensors[name] = case.tensors[name] * 1e15
    assert all(x.isfinite().all() for x in value_and_gradients(case.call, case).values())


def test_cuda_graph_replays_on_new_values() -> None:
    """Forward and backward in one graph; replayed with other numbers and another mask of the same shape."""
    case, other = cuda_case(n=1, q=100, s=5000), cuda_case(n=1, q=100, s=5000, density=0.05, seed=1)
    leaves = [x.detach().clone().requires_grad_() for x in case.tensors.values()]
    mask, grad = m2f_kernels.pack_attention_mask(case.attend), case.grad_output.clone()

    def step() -> tuple[torch.Tensor, ...]:
        output = m2f_kernels.masked_attention(*leaves, mask)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf, x in zip(leaves, other.tensors.values(), strict=True):
            leaf.copy_(x)
        for old, new in zip(mask[:2], other.mask[:2], strict=True):
            old.copy_(new)
        grad.copy_(other.grad_output)
    graph.replay()
    expected = value_and_gradients(other.call, other)
    for name, x in zip(("output", *NAMES), captured, strict=True):
        assert torch.equal(x, expected[name]), name


def test_current_stream() -> None:
    """Kernels run on the current stream: they wait for what was queued there before."""
    case = cuda_case(n=1, q=100, s=5000)
    mask, expected = case.mask, case.call(*case.tensors.values())
    query, key, value = (x.clone() for x in case.tensors.values())
    late = torch.zeros_like(query)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(query)
        result = m2f_kernels.masked_attention(late, key, value, mask)
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one CUDA device is visible")
def test_another_device_than_the_current() -> None:
    case = make_case(n=1)
    expected = value_and_gradients(case.to("cuda:0").call, case.to("cuda:0"))
    moved = case.to("cuda:1")
    for name, x in value_and_gradients(moved.call, moved).items():
        assert x.device.index == 1
        assert torch.equal(x.cpu(), expected[name].cpu()), name
