"""Multi-scale deformable attention as a citizen of PyTorch: opcheck, compile, export, autocast, determinism."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import m2f_kernels
from m2f_kernels import _library, dispatch
from tests.numerics import relative_error
from tests.ops.ms_deform_attn_cases import MODES, make_case, truth, value_and_gradients

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
OPS = torch.ops.m2f


def level_arguments(case, kind):
    """The three schema arguments, as host integers or as tensors."""
    if kind == "host":
        return case.levels, None, None
    levels = torch.tensor(case.levels, device=case.value.device).view(-1, 3)
    return [], levels[:, :2].contiguous(), levels[:, 2].contiguous()


def schema_call(case, kind):
    """Operator, backward operator, arguments of the first, needs_* flags of the second."""
    value, *rest = case.tensors.values()
    arguments = [value, *level_arguments(case, kind), *rest, case.points]
    if case.mode == "locations":
        return OPS.ms_deform_attn, OPS.ms_deform_attn_backward, arguments, 2
    arguments.append(0.5)
    return OPS.ms_deform_attn_from_offsets, OPS.ms_deform_attn_from_offsets_backward, arguments, 3


MIXED = {"dtype": BF16, "samples_dtype": F32, "weights_dtype": BF16, "reference_dtype": F32}


# ---------------------------------------------------------------- opcheck
@pytest.mark.parametrize("kind", ["host", "tensors"])
@pytest.mark.parametrize("dtypes", [{}, MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("mode", MODES)
class TestOpcheck:
    def test_forward(self, device, mode, dtypes, kind):
        case = make_case(mode, **dtypes).to(device)
        op, _, arguments, _ = schema_call(case, kind)
        torch.library.opcheck(op.default, arguments)
        differentiable = [
            x.detach().requires_grad_() if x is not None and torch.is_tensor(x) and x.is_floating_point() else x
            for x in arguments
        ]
        torch.library.opcheck(op.default, differentiable)

    def test_backward(self, device, mode, dtypes, kind):
        """Schema, fake kernel and dispatch of the backward operators, for every combination of wanted gradients."""
        case = make_case(mode, **dtypes).to(device)
        _, op, arguments, flags = schema_call(case, kind)
        for wanted in range(2**flags):
            needs = [bool(wanted >> bit & 1) for bit in range(flags)]
            torch.library.opcheck(op.default, [case.grad_output, *arguments, *needs])


@pytest.mark.parametrize("mode", MODES)
def test_fake_kernels_agree_with_real_ones(device, mode):
    """Shape, dtype, strides and device of every result; strided inputs included."""
    case = make_case(mode, **MIXED).to(device)
    case.tensors["value"] = case.value.transpose(1, 2).contiguous().transpose(1, 2)
    for kind in ("host", "tensors"):
        op, backward, arguments, flags = schema_call(case, kind)
        for function, inputs in [
            (op, arguments),
            *((backward, [case.grad_output, *arguments, *[on] * flags]) for on in (True, False)),
        ]:
            real = function(*inputs)
            with torch._subclasses.FakeTensorMode() as fake_mode:
                fake = function(*[fake_mode.from_tensor(x) if torch.is_tensor(x) else x for x in inputs])
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (real, fake)), strict=True):
                assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@pytest.mark.parametrize("op", ["ms_deform_attn", "ms_deform_attn_from_offsets"])
def test_meta_tensors(op):
    """Shape inference without memory."""
    case = make_case("locations" if op == "ms_deform_attn" else "offsets4").to("meta")
    out = case.run()
    assert out.device.type == "meta"
    assert out.shape == (2, 7, 32)


# ---------------------------------------------------------------- torch.compile
def compiled_call(case, shapes, backend, dynamic=None):
    torch._dynamo.reset()

    def function(*tensors):
        return case.call(*tensors[1:], sizes=tensors[0]) * 2

    function = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    return lambda *tensors: function(shapes, *tensors)


def as_shapes(case, kind):
    return case.sizes if kind == "host" else torch.tensor(case.sizes, device=case.value.device)


@pytest.mark.parametrize("kind", ["host", "tensors"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(device, mode, kind, backend):
    """fullgraph=True, values and gradients, sizes as a list of pairs and as a tensor."""
    case = make_case(mode).to(device)
    actual = value_and_gradients(compiled_call(case, as_shapes(case, kind), backend), case.tensors, case.grad_output)
    for name, expected in truth(case).items():
        assert relative_error(actual[name], 2 * expected) < 1e-4, name


def test_inductor(device):
    """One whole path in every run; the others are marked slow."""
    case = make_case("offsets2").to(device)
    actual = value_and_gradients(compiled_call(case, case.sizes, "inductor"), case.tensors, case.grad_output)
    for name, expected in truth(case).items():
        assert relative_error(actual[name], 2 * expected) < 1e-4, name


@pytest.mark.parametrize("kind", ["host", "tensors"])
@pytest.mark.parametrize("mode", MODES)
def test_compile_dynamic(device, mode, kind):
    """One graph for other batch sizes, numbers of queries and image sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    points = [3, 2]

    def call(shapes, value, *rest):
        if mode == "locations":
            return m2f_kernels.ms_deform_attn(value, shapes, None, *rest, points_per_level=points)
        return m2f_kernels.ms_deform_attn_from_offsets(value, shapes, *rest, points_per_level=points)

    function = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    # Sizes that differ from each other: the compiler takes equal ones for the same symbol.
    for n, q, sizes in [(3, 11, ((13, 7), (6, 8))), (5, 17, ((16, 9), (2, 12))), (7, 19, ((9, 4), (14, 6)))]:
        case = make_case(mode, n=n, q=q, heads=4, d=10, sizes=sizes).to(device)
        shapes = as_shapes(case, kind)
        actual = value_and_gradients(lambda *x, s=shapes: function(s, *x), case.tensors, case.grad_output)
        for name, expected in truth(case).items():
            assert relative_error(actual[name], expected) < 1e-4, name
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3, "compiled again for other sizes"


def test_compile_with_autocast(device):
    case = make_case("offsets4").to(device)
    call = compiled_call(case, case.sizes, "aot_eager")
    with torch.autocast(device.type, BF16):
        compiled, eager = call(*case.tensors.values()), 2 * case.run()
    assert compiled.dtype == eager.dtype == BF16
    assert torch.equal(compiled, eager)


def test_compiled_tensor_sizes_are_checked_when_they_are_known(device):
    """Sizes that a graph carries as a tensor meet the kernel's own check."""
    if device.type != "cpu":
        pytest.skip("on a GPU reading the sizes would be a synchronisation")
    case = make_case()
    call = compiled_call(case, torch.tensor([(5, 7), (3, 5)]), "aot_eager")
    with pytest.raises(RuntimeError, match=r"level"):
        call(*case.tensors.values())


# ---------------------------------------------------------------- torch.export
class Wrapper(torch.nn.Module):
    def __init__(self, case, sizes):
        super().__init__()
        self.case, self.sizes = case, sizes

    def forward(self, *tensors):
        return self.case.call(*tensors, sizes=self.sizes)


def operator_nodes(program):
    return [node for node in program.graph.nodes if "m2f" in str(node.target)]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_export(device, mode, strict):
    case = make_case(mode).to(device)
    program = torch.export.export(Wrapper(case, case.sizes), tuple(case.tensors.values()), strict=strict)
    assert len(operator_nodes(program)) == 1
    assert torch.equal(program.module()(*case.tensors.values()), case.run())
    decomposed = program.run_decompositions()
    assert len(operator_nodes(decomposed)) == 1


@pytest.mark.parametrize("mode", MODES)
def test_export_dynamic_batch_and_queries(device, mode):
    case = make_case(mode).to(device)
    n, q = torch.export.Dim("n", min=1, max=64), torch.export.Dim("q", min=1, max=4096)
    dims = [{0: n} if name == "value" else {0: n, 1: q} for name in case.tensors]
    program = torch.export.export(
        Wrapper(case, case.sizes), tuple(case.tensors.values()), dynamic_shapes=(tuple(dims),)
    )
    assert len(operator_nodes(program)) == 1
    other = make_case(mode, n=5, q=20).to(device)
    assert torch.equal(program.module()(*other.tensors.values()), other.run())


class FromMaps(torch.nn.Module):
    """Feature maps in, as a model has them: level sizes are read from their shapes."""

    def forward(self, maps, locations, weights):
        value = torch.cat([x.flatten(2).transpose(1, 2).unflatten(2, (2, -1)) for x in maps], 1)
        return m2f_kernels.ms_deform_attn(value, [x.shape[2:] for x in maps], None, locations, weights)


def maps_and_samples(device, sizes, n=2, q=6):
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(n, 16, h, w, generator=g).to(device) for h, w in sizes]
    locations = torch.rand(n, q, 2, 2, 3, 2, generator=g).to(device)
    return maps, locations, torch.rand(n, q, 2, 2, 3, generator=g).to(device)


def test_export_dynamic_image_size(device):
    h, w = torch.export.Dim("h", min=2, max=512), torch.export.Dim("w", min=2, max=512)
    small_h, small_w = torch.export.Dim("small_h", min=2, max=512), torch.export.Dim("small_w", min=2, max=512)
    program = torch.export.export(
        FromMaps(),
        maps_and_samples(device, [(8, 12), (4, 6)]),
        dynamic_shapes=([{2: h, 3: w}, {2: small_h, 3: small_w}], None, None),
    )
    assert len(operator_nodes(program)) == 1
    other = maps_and_samples(device, [(10, 6), (5, 3)])
    assert torch.equal(program.module()(*other), FromMaps()(*other))


# ---------------------------------------------------------------- autocast
@pytest.mark.parametrize("mode", MODES)
def test_autocast(device, mode):
    """Value is cast, sampling tensors stay float32, gradients come back in each input's dtype."""
    case = make_case(mode).to(device)

    def call(*tensors):
        with torch.autocast(device.type, BF16):
            return case.call(*tensors)

    actual = value_and_gradients(call, case.tensors, case.grad_output)
    assert actual["output"].dtype == BF16
    for name, expected in truth(case).items():
        assert relative_error(actual[name], expected) < 0.01, name
        assert name == "output" or actual[name].dtype == F32
    assert torch.equal(actual["output"], case.call(case.value.to(BF16), *list(case.tensors.values())[1:]))


def test_autocast_leaves_float64_alone(device):
    case = make_case(dtype=F64).to(device)
    with torch.autocast(device.type, BF16):
        assert case.run().dtype == F64


# ---------------------------------------------------------------- determinism
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("path", [{"q": 600}, {"sizes": ((40, 50), (30, 20)), "q": 3}], ids=["many", "few"])
@pytest.mark.parametrize("mode", MODES)
def test_deterministic_on_cpu(deterministic, set_threads, mode, path, threads):
    """The same bits in every run for a given number of threads."""
    set_threads(threads)
    case = make_case(mode, n=1, heads=2, d=20, **path)
    first = value_and_gradients(case.call, case.tensors, case.grad_output)
    for _ in range(4):
        again = value_and_gradients(case.call, case.tensors, case.grad_output)
        for name, x in first.items():
            assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_images_are_independent(implementation, set_threads, mode):
    """The result for an image does not depend, in one bit, on what else is in the batch."""
    set_threads(1)
    case = make_case(mode, n=3, q=200).to(implementation)
    whole = value_and_gradients(case.call, case.tensors, case.grad_output)
    for i in range(3):
        tensors = {name: x[i : i + 1] for name, x in case.tensors.items()}
        alone = value_and_gradients(case.call, tensors, case.grad_output[i : i + 1])
        for name, x in alone.items():
            if implementation.type == "cpu" or name != "value":
                assert torch.equal(x[0], whole[name][i]), name


@pytest.mark.parametrize("mode", MODES)
def test_deterministic_backward_on_cuda(monkeypatch, deterministic, mode):
    """The routing, without a GPU: the library adds value gradients with atomics, so where those are wanted and there is
    no Triton plain PyTorch computes them, the same gradients."""
    libraries = {"cuda": _library.NativeLibrary("m2f_cuda", Path("libm2f_cuda.so"), None)}
    here = dispatch.Software(libraries, None, "triton is not installed", False, ("sm_90",), 12080)
    dispatch.forget()
    monkeypatch.setattr(dispatch, "device_of", lambda *_: dispatch.Device("cuda", 0, (9, 0), driver=12080))
    monkeypatch.setattr(dispatch, "software_for", lambda _: here)
    case = make_case(mode)
    name = "ms_deform_attn" if mode == "locations" else "ms_deform_attn_from_offsets"
    value, *rest = case.tensors.values()
    tail = [case.points] if mode == "locations" else [case.points, case.options.get("offset_scale", 0.5)]
    inputs = [case.grad_output.to(value.dtype), value, case.levels, None, None, *rest, *tail]
    others = [True] * (1 if mode == "locations" else 2)
    backward = dispatch.ON_CUDA[f"{name}_backward"]
    with pytest.warns(RuntimeWarning, match="use_deterministic_algorithms is on"):
        actual = backward(*inputs, True, *others)
    for x, (key, expected) in zip(actual, list(truth(case).items())[1:], strict=True):
        assert relative_error(x, expected) < 1e-4, key
    # Without the value gradient it is the library's operator, which has no kernel for these tensors on the CPU.
    with pytest.raises(NotImplementedError, match=f"m2f_cuda::{name}_backward"):
        backward(*inputs, False, *others)
    monkeypatch.undo()
    dispatch.forget()


# ---------------------------------------------------------------- what is not supported says so
@pytest.mark.parametrize("mode", MODES)
def test_double_backward_is_an_error(mode):
    """Differentiable once: a second derivative must not be silently zero."""
    case = make_case(mode)
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    first = torch.autograd.grad(case.run().square().sum(), leaves, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)once|double|second|twice"):
        torch.autograd.grad(sum(x.sum() for x in first), leaves, allow_unused=True)


def test_double_backward_through_the_reference():
    """use_backend("reference") is plain PyTorch and differentiable twice."""
    case = make_case("offsets2", sizes=((3, 4),), points=(2,), n=1, q=2, d=2, dtype=F64, margin=0.1)
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    with m2f_kernels.use_backend("reference"):
        assert torch.autograd.gradgradcheck(case.call, leaves)


def test_vmap_over_values():
    """Served by PyTorch's loop over the batch, with its own warning."""
    case = make_case()
    value, samples, weights = case.tensors.values()
    values = torch.stack([value, -3 * value])
    out = torch.vmap(lambda v: case.call(v, samples, weights))(values)
    assert relative_error(out, torch.stack([case.run(), -3 * case.run()])) < 1e-6
