"""Attention masks and masked attention under opcheck, compile, export, autocast and checkpointing."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import m2f_kernels
from tests.numerics import relative_error
from tests.ops.masked_attention_cases import make_case, truth, value_and_gradients

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


# ---------------------------------------------------------------- opcheck
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_opcheck_attention(device, dtype, interleaved):
    case = make_case(n=2, h=2, q=3, s=40, d=16, dtype=dtype, interleaved=interleaved).to(device)
    mask = case.mask
    leaves = [x.detach().requires_grad_() for x in case.tensors.values()]
    arguments = (*leaves, mask.bits, mask.row_any, 0.25)
    torch.library.opcheck(torch.ops.m2f.masked_attention.default, arguments)
    with torch.no_grad():
        output, logsumexp = torch.ops.m2f.masked_attention(*arguments)
    backward = (
        torch.randn_like(output),
        *(x.detach() for x in leaves),
        mask.bits,
        mask.row_any,
        output,
        logsumexp,
        0.25,
    )
    torch.library.opcheck(torch.ops.m2f.masked_attention_backward.default, backward)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck_masks(device, dtype):
    features = torch.randn(2, 8, 16, 16, device=device, dtype=dtype)
    torch.library.opcheck(torch.ops.m2f.resize_mask_features.default, (features, [8, 8, 5, 3]))
    embed = torch.randn(2, 5, 8, device=device, dtype=dtype)
    torch.library.opcheck(torch.ops.m2f.predict_attention_mask.default, (embed, features.flatten(2)))
    torch.library.opcheck(torch.ops.m2f.resize_mask_features_with_flags.default, (features, [8, 8, 5, 3], 2, 5))
    flags = torch.zeros(2, 5, dtype=torch.bool, device=device)
    given = (embed, features.flatten(2), flags)
    torch.library.opcheck(torch.ops.m2f.predict_attention_mask_with_flags.default, given)
    for mask in (torch.rand(2, 3, 50, device=device) < 0.5, torch.randn(2, 3, 50, device=device, dtype=dtype)):
        torch.library.opcheck(torch.ops.m2f.pack_attention_mask.default, (mask,))


def test_meta_tensors():
    """Shape inference without memory."""
    levels = m2f_kernels.resize_mask_features(torch.empty(1, 8, 64, 64, device="meta"), [(8, 8), (16, 16)])
    mask = m2f_kernels.predict_attention_mask(torch.empty(1, 5, 8, device="meta"), levels[1])
    assert mask.bits.shape == (1, 5, 8)
    levels, flags = m2f_kernels.attention_mask_levels(torch.empty(1, 8, 64, 64, device="meta"), [(8, 8)], 3, 5)
    assert levels[0].shape == (1, 8, 8, 8)
    assert flags.shape == (3, 1, 5)
    with_flags = m2f_kernels.predict_attention_mask(torch.empty(1, 5, 8, device="meta"), levels[0], flags[1])
    assert with_flags.bits.shape == (1, 5, 2)
    q, kv = torch.empty(1, 2, 5, 16, device="meta"), torch.empty(1, 2, 256, 16, device="meta")
    assert m2f_kernels.masked_attention(q, kv, kv, mask).shape == (1, 2, 5, 16)


# ---------------------------------------------------------------- the whole layer, compiled and exported
def layer(features, embed, query, key, value, size):
    """Masked attention as a decoder layer calls it: resize the features, predict the mask, attend."""
    (level,) = m2f_kernels.resize_mask_features(features, [size])
    mask = m2f_kernels.predict_attention_mask(embed, level)
    return m2f_kernels.masked_attention(query, key, value, mask)


def layer_inputs(device, n=2, q=5, h=6, w=7, heads=2, d=16, dtype=F32):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype)  # noqa: E731
    features, embed = draw(n, 8, 4 * h, 4 * w), draw(n, q, 8)
    return [features, embed, draw(n, heads, q, d), draw(n, heads, h * w, d), draw(n, heads, h * w, d)], (h, w)


def gradients(function, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs[2:]]
    output = function(*inputs[:2], *leaves)
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device, backend):
    """fullgraph=True, values and gradients."""
    torch._dynamo.reset()
    inputs, size = layer_inputs(device)
    compiled = torch.compile(lambda *x: layer(*x, size), fullgraph=True, backend=backend)
    for a, b in zip(gradients(compiled, inputs), gradients(lambda *x: layer(*x, size), inputs), strict=True):
        assert relative_error(a, b) < 1e-5


def test_compile_dynamic(device):
    """One graph for other batch sizes, numbers of queries and sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for shape in (
        {"n": 3, "q": 11, "h": 7, "w": 13},
        {"n": 5, "q": 17, "h": 9, "w": 8},
        {"n": 7, "q": 19, "h": 10, "w": 6},
    ):
        inputs, size = layer_inputs(device, **shape)
        actual = gradients(lambda *x, s=size: compiled(*x, s), inputs)
        for a, b in zip(actual, gradients(lambda *x, s=size: layer(*x, s), inputs), strict=True):
            assert relative_error(a, b) < 1e-5
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3, "compiled again for other sizes"


def test_packed_mask_passes_through_compile(device):
    """As an argument and as a result of a compiled function."""
    torch._dynamo.reset()
    case = make_case().to(device)
    pack = torch.compile(m2f_kernels.pack_attention_mask, fullgraph=True, backend="aot_eager")
    attend = torch.compile(m2f_kernels.masked_attention, fullgraph=True, backend="aot_eager")
    mask = pack(case.attend)
    assert isinstance(mask, m2f_kernels.PackedMask)
    assert torch.equal(mask.to_bool(), case.mask.to_bool())
    assert torch.equal(attend(*case.tensors.values(), mask), case.call(*case.tensors.values()))


class Layer(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, *inputs):
        return layer(*inputs, self.size)


def operator_nodes(program):
    return [node for node in program.graph.nodes if "m2f" in str(node.target)]


@pytest.mark.parametrize("strict", [False, True])
def test_export(device, strict):
    inputs, size = layer_inputs(device)
    program = torch.export.export(Layer(size), tuple(inputs), strict=strict)
    assert len(operator_nodes(program)) == 3
    assert len(operator_nodes(program.run_decompositions())) == 3
    assert torch.equal(program.module()(*inputs), layer(*inputs, size))


def test_export_dynamic_batch_and_queries(device):
    inputs, size = layer_inputs(device)
    n, q = torch.export.Dim("n", min=1, max=64), torch.export.Dim("q", min=1, max=4096)
    dims = ({0: n}, {0: n, 1: q}, {0: n, 2: q}, {0: n}, {0: n})
    program = torch.export.export(Layer(size), tuple(inputs), dynamic_shapes={"inputs": dims})
    others, _ = layer_inputs(device, n=5, q=20)
    assert torch.equal(program.module()(*others), layer(*others, size))


# ---------------------------------------------------------------- checkpointing, autocast
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(device, reentrant):
    """The packed mask is an argument of the checkpointed function like any other."""
    case = make_case().to(device)
    leaves = [x.detach().requires_grad_() for x in case.tensors.values()]
    output = checkpoint(m2f_kernels.masked_attention, *leaves, case.mask, use_reentrant=reentrant)
    output.backward(case.grad_output)
    expected = value_and_gradients(case.call, case)
    for name, x in zip(expected, (output, *(x.grad for x in leaves)), strict=True):
        assert torch.equal(x, expected[name]), name


def test_autocast(device):
    """All three tensors are cast; gradients come back in each input's dtype."""
    case = make_case().to(device)

    def call(*tensors):
        with torch.autocast(device.type, BF16):
            return case.call(*tensors)

    actual = value_and_gradients(call, case)
    assert actual["output"].dtype == BF16
    for name, expected in truth(case).items():
        assert relative_error(actual[name], expected) < 0.02, name
        assert name == "output" or actual[name].dtype == F32
    assert torch.equal(actual["output"], case.call(*(x.to(BF16) for x in case.tensors.values())))


def test_autocast_of_masks(device):
    inputs, size = layer_inputs(device)
    with torch.autocast(device.type, BF16):
        (level,) = m2f_kernels.resize_mask_features(inputs[0], [size])
        assert level.dtype == BF16
        mask = m2f_kernels.predict_attention_mask(inputs[1], level)
    assert torch.equal(mask.bits, m2f_kernels.predict_attention_mask(inputs[1].to(BF16), level).bits)


def test_autocast_leaves_float64_alone(device):
    case = make_case(dtype=F64).to(device)
    with torch.autocast(device.type, BF16):
        assert case.call(*case.tensors.values()).dtype == F64


def test_only_what_is_needed_has_a_gradient(device):
    case = make_case().to(device)
    query, key, value = case.tensors.values()
    query = query.detach().requires_grad_()
    case.call(query, key, value).sum().backward()
    assert query.grad is not None
    assert key.grad is None


# ---------------------------------------------------------------- what is not supported says so
def test_double_backward_is_an_error():
    """Differentiable once: a second derivative must not be silently zero."""
    case = make_case()
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    first = torch.autograd.grad(case.call(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="masked attention is differentiable once"):
        torch.autograd.grad(sum(x.sum() for x in first), leaves, allow_unused=True)


def test_double_backward_through_the_reference():
    case = make_case(n=1, h=1, q=2, s=4, d=2, dtype=F64)
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    with m2f_kernels.use_backend("reference"):
        assert torch.autograd.gradgradcheck(case.call, leaves)


def test_reference_backend(device):
    """use_backend("reference") gives the same numbers without the kernels."""
    case = make_case().to(device)
    with m2f_kernels.use_backend("reference"):
        expected = value_and_gradients(case.call, case)
        assert "forced" in str(m2f_kernels.explain("masked_attention", case.attend))
    for name, x in value_and_gradients(case.call, case).items():
        assert relative_error(x, expected[name]) < 1e-5, name
