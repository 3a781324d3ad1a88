"""Fixtures that every operator's tests share: where a test runs, with which instructions and how many threads."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU, Triton's interpreter runs the kernels on CPU tensors. It must be chosen before the first module
    # with kernels is imported, which the package does at the first call of one.
    os.environ["TRITON_INTERPRET"] = "1"

from m2f_kernels import _library

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))

CPU_CAPABILITIES = ("baseline", "avx2", "avx512")


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device of this machine that has compiled kernels."""
    return torch.device(request.param)


def _choose_cpu_capability(name):
    before = _library.cpu_capability()
    # Not a skip: without the library the reference would be compared with itself.
    assert before is not None, f"the CPU library is not in use: {_library.LIBRARIES['cpu'].problem}"
    try:
        _library.set_cpu_capability(name)
    except ValueError as error:
        pytest.skip(f"this CPU cannot run the {name} kernels: {error}")
    assert _library.cpu_capability() == name
    return before


@pytest.fixture(params=CPU_CAPABILITIES)
def cpu_capability(request):
    """Each instruction set of the CPU library in turn."""
    before = _choose_cpu_capability(request.param)
    yield request.param
    _library.set_cpu_capability(before)


@pytest.fixture(params=[*(f"cpu-{name}" for name in CPU_CAPABILITIES), *DEVICES[1:]])
def implementation(request):
    """Every compiled implementation that this machine can run: the device; on CPU each instruction set in turn."""
    name, _, capability = request.param.partition("-")
    if not capability:
        assert _library.LIBRARIES[name].loaded, _library.LIBRARIES[name].problem
        yield torch.device(name)
        return
    before = _choose_cpu_capability(capability)
    yield torch.device(name)
    _library.set_cpu_capability(before)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Inputs are small, and machines that run tests are often shared: waiting threads would take most of the time.
    What several threads change is tested where a test asks for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def set_threads():
    """Sets the number of threads; the former number comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def generator():
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(20)


@pytest.fixture
def deterministic():
    """torch.use_deterministic_algorithms(True), which also fills every fresh tensor with NaN: what a kernel forgets
    to write is then seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "fresh tensors are not poisoned"
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_finish():
    """Leave modules and tests, which stay to the end, out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let the interpreter free them as it ends; extensions would report leaks."""
    gc.unfreeze()
