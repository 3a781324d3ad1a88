"""Tests of the backend that serves a call, of the fallback, and of the package without its libraries."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import m2f_kernels
from m2f_kernels import _library
from tests.numerics import relative_error
from tests.ops.ms_deform_attn_cases import make_case

OPS = ("ms_deform_attn", "ms_deform_attn_from_offsets")
PACKAGE = Path(m2f_kernels.__file__).parent


# ---------------------------------------------------------------- use_backend and explain
def test_use_backend_forces_the_reference(monkeypatch):
    """Inside the block the compiled operator is not called; afterwards it is again, also after an exception."""
    case = make_case()
    reference = "m2f_kernels.ops.ms_deform_attn.reference.ms_deform_attn"
    with m2f_kernels.use_backend("reference"):
        inside = case.run()
    assert relative_error(inside, case.run()) < 1e-5
    seen = []
    monkeypatch.setattr(reference, lambda *args: seen.append(1) or args[0])
    with m2f_kernels.use_backend("reference"):
        case.run()
        assert len(seen) == 1
        with m2f_kernels.use_backend("auto"):
            case.run()
        assert len(seen) == 1
        case.run()
        assert len(seen) == 2
    with pytest.raises(KeyError), m2f_kernels.use_backend("reference"):
        raise KeyError
    case.run()
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["cpp", "", None, 3])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=r"^name: expected"), m2f_kernels.use_backend(name):
        pass


@pytest.mark.parametrize("name", OPS)
def test_explain(name, cpu_capability, set_threads):
    set_threads(3)
    for op in (name, getattr(m2f_kernels, name)):
        choice = m2f_kernels.explain(op, torch.zeros(1))
        assert (choice.op, choice.device, choice.backend) == (name, "cpu", "cpp")
        for part in ("libm2f_cpu.so", cpu_capability, "3 threads"):
            assert part in choice.reason
        assert str(choice) == f"{name} on cpu: cpp ({choice.reason})"


def test_explain_forced():
    with m2f_kernels.use_backend("reference"):
        choice = m2f_kernels.explain("ms_deform_attn", torch.zeros(1))
    assert choice.backend == "reference"
    assert "use_backend" in choice.reason


def test_explain_the_meta_device():
    choice = m2f_kernels.explain("ms_deform_attn", 3, "x", torch.zeros(1, device="meta"))
    assert (choice.device, choice.backend) == ("meta", "fake")


def test_explain_takes_what_the_operator_takes():
    """Tensors and options by keyword too."""
    case = make_case("offsets4")
    value, points, offsets, logits = case.tensors.values()
    choice = m2f_kernels.explain(
        m2f_kernels.ms_deform_attn_from_offsets,
        value=value,
        spatial_shapes=case.sizes,
        reference_points=points,
        sampling_offsets=offsets,
        attention_logits=logits,
        offset_scale=0.5,
    )
    assert choice.backend == "cpp"


def test_explain_needs_a_known_operator_and_a_tensor():
    with pytest.raises(ValueError, match=r"^op: expected one of .*ms_deform_attn.*relu"):
        m2f_kernels.explain(torch.relu, torch.zeros(1))
    with pytest.raises(ValueError, match=r"^op: expected one of"):
        m2f_kernels.explain("nothing", torch.zeros(1))
    with pytest.raises((TypeError, ValueError), match=r"^op: expected"):
        m2f_kernels.explain(3, torch.zeros(1))
    with pytest.raises(ValueError, match=r"^args: expected at least one tensor"):
        m2f_kernels.explain("ms_deform_attn", 1, "x")


# ---------------------------------------------------------------- instruction sets
def test_set_cpu_capability(cpu_capability):
    assert _library.cpu_capability() == cpu_capability


@pytest.mark.parametrize("name", ["sse", "", "AVX2", "avx512 "])
def test_unknown_cpu_capability(name):
    before = _library.cpu_capability()
    with pytest.raises(ValueError, match=r"^name: expected .*'avx512', 'avx2', 'baseline'"):
        _library.set_cpu_capability(name)
    assert _library.cpu_capability() == before


@pytest.mark.parametrize(("direction", "successor"), [("forward", "lean"), ("backward", "gathered")])
def test_choosing_a_cuda_kernel_needs_a_library_that_has_the_choice(monkeypatch, direction, successor):
    choose = getattr(_library, f"set_cuda_{direction}")
    with pytest.raises(ValueError, match=rf"^name: expected 'general' or '{successor}'; got 'fast'"):
        choose("fast")
    absent = _library.NativeLibrary("m2f_cuda", Path("lib.so"), "it was not built")
    monkeypatch.setitem(_library.LIBRARIES, "cuda", absent)
    with pytest.raises(RuntimeError, match=r"^the CUDA library is not in use: it was not built"):
        choose(successor)
    older = _library.NativeLibrary("m2f_cuda", Path("lib.so"), None, ctypes.CDLL(None))
    monkeypatch.setitem(_library.LIBRARIES, "cuda", older)
    with pytest.raises(RuntimeError, match=rf"^lib\.so: it has one {direction} kernel .* build it again"):
        choose(successor)


# ---------------------------------------------------------------- in a fresh process
def run(code, cwd, expect_success=True, **environment):
    """Run code in a fresh interpreter that imports the package from `cwd` if it is there."""
    environment = {**os.environ, "PYTHONPATH": str(cwd), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == expect_success, done.stdout + done.stderr
    return done


PRINT_CAPABILITY = "import m2f_kernels._library as l; print(l.cpu_capability())"


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_environment_chooses_the_instruction_set(name):
    try:
        before = _library.cpu_capability()
        _library.set_cpu_capability(name)
    except ValueError as error:
        pytest.skip(f"this CPU cannot run the {name} kernels: {error}")
    finally:
        _library.set_cpu_capability(before)
    assert run(PRINT_CAPABILITY, PACKAGE.parent, M2F_CPU_CAPABILITY=name).stdout.strip() == name


def test_environment_with_unknown_cuda_kernels():
    warned = run("import m2f_kernels", PACKAGE.parent, M2F_CUDA_FORWARD="fast", M2F_CUDA_BACKWARD="lean").stderr
    assert "M2F_CUDA_FORWARD: expected 'general' or 'lean'; got 'fast', using 'general'" in warned
    assert "M2F_CUDA_BACKWARD: expected 'general' or 'gathered'; got 'lean', using 'general'" in warned


def test_environment_with_an_unknown_instruction_set():
    """Import never fails; the best instruction set is taken, and a warning says that the wish was not heard."""
    best = run(PRINT_CAPABILITY, PACKAGE.parent, M2F_CPU_CAPABILITY="").stdout
    done = run(PRINT_CAPABILITY, PACKAGE.parent, M2F_CPU_CAPABILITY="avx1024")
    assert done.stdout == best
    assert "M2F_CPU_CAPABILITY" in done.stderr
    assert "avx1024" in done.stderr


@pytest.fixture(scope="module")
def bare_package(tmp_path_factory):
    """A copy of the package without its libraries."""
    root = tmp_path_factory.mktemp("bare")
    shutil.copytree(PACKAGE, root / "m2f_kernels", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return root


WITHOUT_LIBRARIES = """
import json, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import m2f_kernels
    from m2f_kernels import _library
    quiet_import = not [w for w in caught if issubclass(w.category, RuntimeWarning)]
    value = torch.randn(1, 6, 1, 2, dtype=torch.float64, requires_grad=True)
    points = torch.rand(1, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    offsets = torch.randn(1, 4, 1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(1, 4, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    call = lambda *x: m2f_kernels.ms_deform_attn_from_offsets(x[0], [(2, 3)], *x[1:])
    leaves = (value, points, offsets, logits)
    with m2f_kernels.use_backend("reference"):
        expected = torch.autograd.grad(call(*leaves).sin().sum(), leaves)
    for _ in range(3):
        actual = torch.autograd.grad(call(*leaves).sin().sum(), leaves)
        locations = torch.rand(1, 4, 1, 1, 3, 2)
        m2f_kernels.ms_deform_attn(value, [(2, 3)], None, locations, logits).sum().backward()
try:
    _library.set_cpu_capability("baseline")
    refused = ""
except RuntimeError as error:
    refused = str(error)
print(json.dumps({
    "where": m2f_kernels.__file__,
    "quiet_import": quiet_import,
    "warnings": [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)],
    "others": [str(w.message) for w in caught if not issubclass(w.category, RuntimeWarning)],
    "equal": all(torch.allclose(a, b) for a, b in zip(actual, expected)),
    "explain": str(m2f_kernels.explain("ms_deform_attn", value)),
    "capability": _library.cpu_capability(),
    "refused": refused,
}))
"""


def check_fallback(root, why):
    answer = json.loads(run(WITHOUT_LIBRARIES, root).stdout)
    assert Path(answer["where"]).is_relative_to(root)
    assert answer["quiet_import"]
    assert answer["equal"]
    # Once per operator, whatever the number of calls.
    assert len(answer["warnings"]) == 2
    for op, message in zip(("ms_deform_attn_from_offsets", "ms_deform_attn"), answer["warnings"], strict=True):
        assert message.startswith(f"m2f_kernels.{op} runs on plain PyTorch on 'cpu'")
        assert "libm2f_cpu.so" in message
        assert why in message
    assert answer["others"] == []
    assert "fallback" in answer["explain"]
    assert why in answer["explain"]
    assert answer["capability"] is None
    assert "the CPU library is not in use" in answer["refused"]


def test_without_libraries(bare_package):
    """Import works, results and gradients come from the reference, one warning says what is missing."""
    check_fallback(bare_package, "it was not built")


def test_with_a_library_that_does_not_load(bare_package, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(bare_package, root)
    (root / "m2f_kernels" / "lib").mkdir()
    (root / "m2f_kernels" / "lib" / "libm2f_cpu.so").write_bytes(b"not a library")
    (root / "m2f_kernels" / "lib" / "libm2f_cuda.so").write_bytes(b"not a library")
    check_fallback(root, "it did not load")


def test_info_without_libraries(bare_package):
    """`python -m m2f_kernels.info` explains a broken installation instead of failing in it."""
    out = run("import runpy; runpy.run_module('m2f_kernels.info', run_name='__main__')", bare_package).stdout
    assert "it was not built" in out
    for op in OPS:
        assert op in out
