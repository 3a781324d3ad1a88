"""Tests of the backend chosen for an operator on machines of every kind, which are described, not present."""

import inspect
import os
import warnings
from pathlib import Path

import pytest
import torch

import m2f_kernels
from m2f_kernels import _library, dispatch
from m2f_kernels._library import NativeLibrary
from m2f_kernels.dispatch import Device, Operator, Software, decide
from tests.ops.ms_deform_attn_cases import make_case

MODULE = "m2f_kernels.ops.masked_attention.triton"
BOTH = Operator("both", library=True, triton=MODULE, float64=True, reproducible=False)
TRITON_ONLY = Operator("triton_only", triton=MODULE)
CODE = ("sm_80", "sm_86", "sm_90", "sm_100", "compute_100")


def libraries(cpu=None, cuda=None):
    """Those of a machine; a text says why one is not in use."""
    return {
        "cpu": NativeLibrary("m2f_cpu", Path("libm2f_cpu.so"), cpu),
        "cuda": NativeLibrary("m2f_cuda", Path("libm2f_cuda.so"), cuda),
    }


def software(cuda=None, triton="3.9.0", problem=None, hip=False):
    return Software(libraries(cuda=cuda), triton, problem, hip, CODE if cuda is None else (), 12080)


def gpu(capability, driver=12080):
    return Device("cuda", 0, capability, driver=driver)


NO_NVCC = software(cuda="it was not built; reinstall")
NO_TRITON = "triton is not installed; pip install triton"
NO_COMPILER = "no C compiler is on PATH"

#: Name -> device, software, what serves an operator of both and one of Triton alone, and what the reasons say.
MACHINES = {
    "H100 with a toolkit": (gpu((9, 0)), software(), "cuda", "triton", "libm2f_cuda.so"),
    "H100 without a toolkit": (gpu((9, 0)), NO_NVCC, "triton", "triton", "it was not built"),
    # Machine code runs on the same generation from its own minor number on.
    "sm_89 runs sm_86": (gpu((8, 9)), software(), "cuda", "triton", ""),
    "sm_87 runs sm_86": (gpu((8, 7)), software(), "cuda", "triton", ""),
    "sm_75, older than the library": (gpu((7, 5)), software(), "triton", "triton", "built for sm_80, sm_86"),
    "sm_70, older than everything": (gpu((7, 0)), software(), "fallback", "fallback", "sm_75 and later"),
    "sm_120 by PTX": (gpu((12, 0)), software(), "cuda", "triton", ""),
    "sm_120, old driver": (gpu((12, 0), 12040), software(), "triton", "triton", "the driver knows 12.4"),
    "H100, old driver": (gpu((9, 0), 12020), software(), "triton", "triton", "built with CUDA 12.8"),
    "H100, newer driver": (gpu((9, 0), 13000), software(), "cuda", "triton", ""),
    "no Triton": (gpu((9, 0)), software(triton=None, problem=NO_TRITON), "cuda", "fallback", ""),
    "no Triton, no toolkit": (
        gpu((9, 0)), software("it was not built", None, NO_TRITON), "fallback", "fallback", "pip install triton",
    ),
    "Triton without a host C compiler": (
        gpu((7, 5)), software(problem=NO_COMPILER), "fallback", "fallback", NO_COMPILER,
    ),
    "MI300": (
        Device("cuda", 0, (9, 4), "gfx942"), software("torch is built for ROCm", hip=True), "triton", "triton", "ROCm",
    ),
    "gfx906": (
        Device("cuda", 0, (9, 0), "gfx906"), software("torch is built for ROCm", hip=True), "fallback", "fallback",
        "gfx906",
    ),
    "Apple": (Device("mps", 0), software(), "fallback", "fallback", "'mps'"),
    "Intel": (Device("xpu", 0), software(), "fallback", "fallback", "'xpu'"),
    "CPU": (Device("cpu"), software(), "cpp", "cpp", "libm2f_cpu.so"),
    "CPU without its library": (Device("cpu"), Software(libraries(cpu="gone")), "fallback", "fallback", "gone"),
    "meta": (Device("meta"), software(), "fake", "fake", "nothing is computed"),
    # Tracing for a machine that is not here.
    "tensors that say cuda": (Device("cuda", 0), NO_NVCC, "triton", "triton", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_machine(name):
    device, here, both, triton_only, why = MACHINES[name]
    for op, backend in ((BOTH, both), (TRITON_ONLY, triton_only)):
        choice = decide(op, device, here)
        assert choice.backend == backend, str(choice)
    assert why in str(decide(BOTH, device, here))


def test_machine_code_of_one_architecture_only():
    here = Software(libraries(), "3.9.0", None, False, ("sm_90a", "sm_100f"), 12080)
    assert decide(BOTH, gpu((9, 0)), here).backend == "cuda"
    assert decide(BOTH, gpu((10, 3)), here).backend == "triton"
    # A generation does not run another's, nor code of a later minor number.
    here = Software(libraries(), "3.9.0", None, False, ("sm_86",), 12080)
    for capability in ((8, 0), (9, 0)):
        assert decide(BOTH, gpu(capability), here).backend == "triton"


def test_float64_and_reproducible_gradients():
    h100 = gpu((9, 0))
    assert decide(BOTH, h100, software(), torch.float64).backend == "cuda"
    assert decide(BOTH, h100, NO_NVCC, torch.float64).backend == "fallback"
    assert decide(TRITON_ONLY, h100, software(), torch.float64).backend == "reference"
    assert decide(TRITON_ONLY, Device("cpu"), software(), torch.float64).backend == "reference"
    # The library adds with atomics; without Triton the reference has a fixed order, grid_sample has none.
    choice = decide(BOTH, h100, software(), reproducible=True)
    assert choice.backend == "triton"
    assert "use_deterministic_algorithms" in str(choice)
    without = software(triton=None, problem=NO_TRITON)
    assert decide(BOTH, h100, without, reproducible=True).backend == "reference"


def test_forced():
    h100 = gpu((9, 0))
    for name in ("fallback", "reference"):
        for device in (h100, Device("cpu"), Device("mps", 0)):
            choice = decide(BOTH, device, software(), forced=name)
            assert (choice.backend, choice.reason) == (name, f'forced by use_backend("{name}")')
    assert decide(BOTH, h100, software(), forced="triton").backend == "triton"
    assert decide(BOTH, h100, software(), forced="cuda").backend == "cuda"
    # Where there is no such kernel, or no such question, the choice is the default one.
    assert decide(TRITON_ONLY, h100, software(), forced="cuda").backend == "triton"
    assert decide(Operator("x", library=True), h100, software(), forced="triton").backend == "cuda"
    assert decide(BOTH, Device("cpu"), software(), forced="triton").backend == "cpp"
    # Forced is forced: an error, never something else in silence.
    with pytest.raises(RuntimeError, match=r'use_backend\("cuda"\).*both on cuda:0.*built for sm_80'):
        decide(BOTH, gpu((7, 5)), software(), forced="cuda")
    with pytest.raises(RuntimeError, match=r'use_backend\("triton"\).*float64'):
        decide(BOTH, h100, software(), torch.float64, "triton")


def test_masked_attention_on_b200_needs_no_newer_triton():
    op = dispatch.OPERATORS["masked_attention"]
    for version in ("3.6.0", "3.8.0"):
        assert decide(op, gpu((10, 0)), software(triton=version)).backend == "triton"


# ---------------------------------------------------------------- forcing one operator
def test_one_operator_or_all():
    def backends():
        return [m2f_kernels.explain(op, torch.zeros(1)).backend for op in ("point_sample", "masked_attention")]

    assert backends() == ["cpp", "cpp"]
    with m2f_kernels.use_backend("reference", "point_sample"):
        assert backends() == ["reference", "cpp"]
        with m2f_kernels.use_backend("fallback", m2f_kernels.masked_attention):
            assert backends() == ["reference", "fallback"]
            with m2f_kernels.use_backend("auto", "point_sample"):
                assert backends() == ["cpp", "fallback"]
            with m2f_kernels.use_backend("auto"):
                assert backends() == ["cpp", "cpp"]
    with m2f_kernels.use_backend("reference"), m2f_kernels.use_backend("auto", "point_sample"):
        assert backends() == ["cpp", "reference"]
    assert backends() == ["cpp", "cpp"]


def test_an_operator_without_such_a_kernel():
    refused = r"^op: expected an operator that has a kernel of backend 'cuda'.*point_sample"
    with pytest.raises(ValueError, match=refused), m2f_kernels.use_backend("cuda", "point_sample"):
        pass
    with pytest.raises(ValueError, match=r"^op: expected one of"), m2f_kernels.use_backend("reference", "nothing"):
        pass


def test_explain_looks_into_factored_masks():
    masks = m2f_kernels.FactoredMasks(torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 4, 3, 3))
    assert m2f_kernels.explain(m2f_kernels.point_sample, masks).backend == "reference"


# ---------------------------------------------------------------- calls
@pytest.fixture
def machine(monkeypatch):
    """Lets dispatch believe in a machine; calls on "cuda" cannot be made, but what they would run is known."""

    def become(device, here):
        monkeypatch.undo()
        dispatch.forget()
        monkeypatch.setattr(dispatch, "device_of", lambda type, index: device)
        monkeypatch.setattr(dispatch, "software_for", lambda type: here)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device.type == "cuda")

    yield become
    monkeypatch.undo()
    dispatch.forget()


def kernel_of(op, name, device, reproducible=False):
    """The kernel that the registered operator runs on a device."""
    known = dispatch.OPERATORS[op]
    key = (op, torch.device(device.type, device.index), torch.float32, (), reproducible)
    return dispatch._kernel(known, name, _plain, key)


def _plain(*args):
    raise AssertionError


def test_the_operator_runs_what_was_chosen(machine):
    """Triton's function, the library's operator under its own namespace, or plain PyTorch; the public function calls
    plain PyTorch itself, which autograd then goes through."""
    h100 = gpu((9, 0))
    cuda = torch.device("cuda", 0)
    machine(h100, software())
    from m2f_kernels.ops.masked_attention import triton

    assert kernel_of("masked_attention", "masked_attention_backward", h100) is triton.masked_attention_backward
    library = kernel_of("ms_deform_attn", "ms_deform_attn", h100)
    assert library.name() == "m2f_cuda::ms_deform_attn"
    assert dispatch._plain("ms_deform_attn", cuda, torch.float32, (), False) is None
    machine(Device("mps", 0), software())
    with pytest.warns(RuntimeWarning, match="runs on plain PyTorch on 'mps'"):
        assert kernel_of("ms_deform_attn", "ms_deform_attn", Device("mps", 0)) is _plain
    assert dispatch._plain("ms_deform_attn", torch.device("mps", 0), torch.float32, (), False) == "fallback"


def test_a_library_that_is_passed_over_says_so_once(machine):
    machine(gpu((7, 5)), Software({**libraries(), "cuda": _existing()}, "3.9.0", None, False, CODE, 12080))
    key = ("ms_deform_attn", torch.device("cuda", 0), torch.float32, (), False)
    op = Operator("ms_deform_attn", library=True, triton=MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.OPERATORS, "ms_deform_attn", op)
        with pytest.warns(RuntimeWarning, match=r"served by triton, not by the compiled library.*this device is sm_75"):
            dispatch._choose_and_warn(key)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dispatch._choose_and_warn(key)
            # One that is not there is nothing to complain about.
            machine(gpu((9, 0)), NO_NVCC)
            dispatch._choose_and_warn(key)
        assert "it was not built" in str(dispatch.choose("ms_deform_attn", "cuda:0"))


def _existing():
    return NativeLibrary("m2f_cuda", Path(__file__), None)


def test_a_fallback_says_so_once_and_what_would_end_it(machine):
    machine(gpu((9, 0)), software("it was not built; reinstall", None, NO_TRITON))
    with pytest.warns(RuntimeWarning, match=r"point_sample runs on plain PyTorch on 'cuda'.*pip install triton"):
        assert dispatch._plain("point_sample", torch.device("cuda", 0), torch.float32, (), False) == "fallback"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._plain("point_sample", torch.device("cuda", 0), torch.bfloat16, (), False) == "fallback"


def test_every_kernel_that_is_registered_exists():
    """Triton's modules have a function for each registered operator, with the operator's arguments."""
    for op in dispatch.OPERATORS.values():
        if op.triton is None or not dispatch.importlib.util.find_spec(op.triton):
            continue
        module = dispatch.importlib.import_module(op.triton)
        for name in (op.name, f"{op.name}_backward"):
            if hasattr(torch.ops.m2f, name):
                schema = getattr(torch.ops.m2f, name).default._schema
                assert len(inspect.signature(getattr(module, name)).parameters) == len(schema.arguments), name


# ---------------------------------------------------------------- what is asked of this machine
def test_host_compiler(monkeypatch, tmp_path):
    """Triton compiles a little C at a kernel's first call: the compiler that it would take, and Python's headers."""
    for name in ("gcc", "clang", "mycc"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").write_text("")
    monkeypatch.setattr(dispatch.sysconfig, "get_paths", lambda **_: {"include": str(tmp_path / "include")})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert dispatch._compiler_problem() is None
    os.remove(tmp_path / "gcc")
    assert dispatch._compiler_problem() is None
    os.remove(tmp_path / "clang")
    assert "no C compiler is on PATH" in dispatch._compiler_problem()
    monkeypatch.setenv("CC", "mycc")
    assert dispatch._compiler_problem() is None
    os.remove(tmp_path / "include" / "Python.h")
    assert "python3-dev" in dispatch._compiler_problem()
    for name in ("nowhere", ""):
        monkeypatch.setenv("CC", name)
        assert f"CC={name} names no C compiler" in dispatch._compiler_problem()


@pytest.mark.parametrize(("version", "problem"), [("3.5.1", "3.6 or later"), ("3.6.0", None), ("3.10.0", None)])
def test_triton_version(monkeypatch, version, problem):
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr(dispatch, "_compiler_problem", lambda: None)
    found = dispatch._triton_state()
    assert found[0] == version
    assert found[1] is None if problem is None else problem in found[1]


def test_triton_that_is_not_there_or_does_not_import(monkeypatch):
    def broken(name):
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    assert dispatch._triton_state() == (None, "triton does not import: libtriton.so: undefined symbol")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch._triton_state() == (None, "triton is not installed; pip install triton")


def test_the_library_says_what_it_was_built_for():
    """Read from the file itself: a library loads without a GPU, and without a CUDA torch only its text can be read."""
    path = _library.LIBRARIES["cuda"].path
    if not path.exists():
        pytest.skip("the CUDA library was not built")
    assert b"compute_" in path.read_bytes()
    if _library.LIBRARIES["cuda"].loaded:
        code, runtime = _library.cuda_build()
        assert code[-1].startswith("compute_")
        assert all(c.startswith("sm_") for c in code[:-1])
        assert runtime >= 12000


# ---------------------------------------------------------------- torch.compile
def test_compiled_code_follows_use_backend(monkeypatch):
    """The choice is made while tracing, and what it depends on is guarded."""
    case = make_case()
    seen = []
    original = m2f_kernels.ops.ms_deform_attn.reference.ms_deform_attn
    monkeypatch.setattr(
        "m2f_kernels.ops.ms_deform_attn.reference.ms_deform_attn", lambda *args: seen.append(1) or original(*args)
    )

    tensors = [x.detach() for x in case.tensors.values()]
    torch._dynamo.reset()
    compiled = torch.compile(case.call, backend="eager", fullgraph=True)
    expected = compiled(*tensors)
    assert not seen
    with m2f_kernels.use_backend("reference"):
        forced = compiled(*tensors)
    assert seen
    torch.testing.assert_close(expected, forced, rtol=1e-4, atol=1e-5)
    seen.clear()
    compiled(*tensors)
    assert not seen


def test_a_library_of_another_version_is_not_used(monkeypatch):
    """One that cannot say what it was built for: the CPU library stands in for it."""
    cpu = _library.LIBRARIES["cpu"]
    older = NativeLibrary("m2f_cuda", Path("libm2f_cuda.so"), None, cpu.handle)
    monkeypatch.setattr(_library, "_load", lambda name, *_: older if name == "m2f_cuda" else cpu)
    assert "another version" in _library._load_all()["cuda"].problem
