"""The choice of the backend that serves a call, with its reason. No other module chooses.

On the CPU the compiled library serves; on "cuda", ROCm included, the first that can of the compiled library, Triton and
the fallback; anywhere else the fallback, plain PyTorch. :func:`decide` is that rule, a function of what is known about
the operator (:class:`Operator`), the device (:class:`Device`) and the software (:class:`Software`). Choices are cached
by operator, device, dtype, what :func:`use_backend` forces and whether gradients must be reproducible.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2f_kernels import _library
from m2f_kernels._checks import traced_for_onnx
from m2f_kernels._library import LIBRARY, NativeLibrary, cpu_capability

#: What `use_backend` takes. "cuda" is the compiled library, "fallback" the plain PyTorch that runs where no kernel
#: does, "reference" the slow plain PyTorch that every test compares the others with.
BACKENDS = ("auto", "cuda", "triton", "fallback", "reference")
PLAIN = ("fallback", "reference")

#: The oldest Triton that the kernels are compiled and tested with: the one that belongs to the oldest torch.
OLDEST_TRITON = (3, 6)
#: The first compute capability that the kernels are compiled for ahead of time, and the AMD architectures.
OLDEST_CAPABILITY = (7, 5)
AMD_ARCHITECTURES = re.compile(r"gfx(90a|94\d|95\d|11\d\d|12\d\d)")


# ---------------------------------------------------------------- what is known


@dataclass(frozen=True)
class Operator:
    """The kernels that exist for one public operator.

    Attributes:
        name: the public name.
        library: `libm2f_cuda.so` has kernels of it.
        triton: the module of its Triton kernels, or None.
        float64: its kernels on the CPU and in the CUDA library take float64. (No Triton kernel does.)
        reproducible: the CUDA library's gradients do not depend on the order in which programs run.
    """

    name: str
    library: bool = False
    triton: str | None = None
    float64: bool = False
    reproducible: bool = True


@dataclass(frozen=True)
class Device:
    """The properties of a device that a choice depends on.

    Attributes:
        type, index: as in `torch.device`.
        capability: compute capability, (9, 0) for sm_90; None where there is no such device, only tensors that say so
            (tracing for another machine), or where it means nothing.
        architecture: AMD's name, such as "gfx942"; empty elsewhere.
        driver: the newest CUDA version that the driver supports, 12080 for 12.8; 0 where it is not known.
    """

    type: str
    index: int | None = None
    capability: tuple[int, int] | None = None
    architecture: str = ""
    driver: int = 0

    @property
    def name(self) -> str:
        if self.architecture:
            return self.architecture
        return f"sm_{self.capability[0]}{self.capability[1]}" if self.capability else self.type


@dataclass(frozen=True)
class Software:
    """The installed software that a choice depends on.

    Attributes:
        libraries: the compiled ones, by device type.
        triton: version, or None where it is not installed.
        triton_problem: why Triton cannot compile here whatever the kernel, or None.
        hip: torch is built for ROCm.
        code: what `libm2f_cuda.so` contains: names such as "sm_90" (machine code) and "compute_120" (PTX).
        runtime: the CUDA version it was built with, 12080 for 12.8; 0 where it is not loaded.
    """

    libraries: Mapping[str, NativeLibrary] = field(default_factory=dict)
    triton: str | None = None
    triton_problem: str | None = None
    hip: bool = False
    code: tuple[str, ...] = ()
    runtime: int = 0


@dataclass(frozen=True)
class BackendChoice:
    """The backend that serves an operator on a device, and the reason. `str()` gives one readable line.

    Attributes:
        op: the operator's public name.
        device: such as "cpu" or "cuda:0".
        backend: "cpp" (the CPU library), "cuda" (the CUDA library), "triton", "fallback" or "reference" (plain PyTorch,
            see `BACKENDS`); "fake" on the meta device, where nothing is computed.
        reason: in words.
        passed_over: the backends that are preferred to `backend`, each with the reason why it does not serve.
    """

    op: str
    device: str
    backend: str
    reason: str
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} on {self.device}: {self.backend} ({'; '.join([self.reason, *self.passed_over])})"


#: Public name -> operator.
OPERATORS: dict[str, Operator] = {}


def _compiler_problem() -> str | None:
    """The reason why Triton cannot build a kernel's launcher, or None. It compiles that, in C, at the first call."""
    compiler = os.environ.get("CC")
    if compiler is not None:
        if shutil.which(compiler.split()[0] if compiler.strip() else "") is None:
            return f"CC={compiler} names no C compiler, which Triton needs on the host"
    elif shutil.which("gcc") is None and shutil.which("clang") is None:
        return "no C compiler is on PATH (gcc or clang), which Triton needs on the host; install one or set CC"
    # Debian's own scheme names a directory without headers; Triton knows.
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not (Path(include) / "Python.h").exists():
        return f"Python's headers, which Triton needs on the host, are not in {include}; install python3-dev"
    return None


def _triton_state() -> tuple[str | None, str | None]:
    """Version and problem of Triton. Imports it, so asked for only where a choice on a GPU depends on it."""
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed; pip install triton"
    try:
        triton = importlib.import_module("triton")
        version = str(triton.__version__)
    except Exception as error:  # whatever a broken installation raises
        return None, f"triton does not import: {error}"
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TRITON:
        return version, f"triton {'.'.join(map(str, OLDEST_TRITON))} or later is needed, {version} is installed"
    return version, _compiler_problem()


@cache
def software() -> Software:
    """The software that is installed here."""
    version, problem = _triton_state()
    code, runtime = _library.cuda_build()
    return Software(_library.LIBRARIES, version, problem, torch.version.hip is not None, code, runtime)


@cache
def device_of(type: str, index: int | None) -> Device:
    """The properties of a device of this machine."""
    if type != "cuda" or not torch.cuda.is_available():
        return Device(type, index)
    index = torch.cuda.current_device() if index is None else index
    if index >= torch.cuda.device_count():
        return Device(type, index)
    properties = torch.cuda.get_device_properties(index)
    architecture = ""
    if torch.version.hip is not None:
        architecture = str(properties.gcnArchName).split(":")[0]
    return Device(type, index, (properties.major, properties.minor), architecture, _library.cuda_driver())


# ---------------------------------------------------------------- the rule


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def library_problem(op: Operator, device: Device, here: Software, reproducible: bool) -> str | None:
    """The reason why `libm2f_cuda.so` cannot serve `op` on `device`, or None."""
    library = here.libraries["cuda"]
    if not library.loaded:
        return library.problem
    if device.capability is not None:
        if device.driver and device.driver < here.runtime:
            return (
                f"it was built with CUDA {_version(here.runtime)}, and the driver knows {_version(device.driver)} "
                "at most; update the driver"
            )
        if not any(_runs(code, device.capability) for code in here.code):
            return f"it was built for {', '.join(here.code)}, and this device is {device.name}"
    if reproducible and not op.reproducible:
        return "its gradients are summed in no fixed order, and torch.use_deterministic_algorithms is on"
    return None


def _runs(code: str, capability: tuple[int, int]) -> bool:
    """True if a device runs this machine code ("sm_86"), or its driver compiles this PTX ("compute_120") for it."""
    kind, number = code.split("_")
    exactly = not number.isdecimal()  # sm_90a runs on sm_90 only
    number = number.rstrip("af")
    built = int(number[:-1]), int(number[-1])
    if exactly:
        return built == capability
    return built <= capability if kind == "compute" else built[0] == capability[0] and built[1] <= capability[1]


def triton_problem(op: Operator, device: Device, dtype: torch.dtype | None, here: Software) -> str | None:
    """The reason why Triton cannot serve `op` on `device`, or None."""
    if op.triton is None or importlib.util.find_spec(op.triton) is None:
        return f"there is no Triton kernel of {op.name}"
    if here.triton_problem is not None:
        return here.triton_problem
    if device.architecture:
        if not AMD_ARCHITECTURES.fullmatch(device.architecture):
            return f"its kernels are made for gfx90a, 94x, 95x, 11xx and 12xx, and this device is {device.name}"
    elif device.capability is not None and device.capability < OLDEST_CAPABILITY:
        return f"its kernels are made for sm_75 and later, and this device is {device.name}"
    if dtype == torch.float64:
        return "its kernels do not take float64"
    return None


def decide(
    op: Operator,
    device: Device,
    here: Software,
    dtype: torch.dtype | None = None,
    forced: str = "auto",
    reproducible: bool = False,
) -> BackendChoice:
    """The backend that serves `op` on `device`. This is the rule itself, a function of its arguments only.

    Args:
        op, device, here: what is known.
        dtype: of the first tensor; None for any but float64.
        forced: one of `BACKENDS`.
        reproducible: gradients are wanted that do not depend on the order in which programs run.

    Raises:
        RuntimeError: "cuda" or "triton" is forced and cannot serve.
    """
    where = device.type if device.index is None else f"{device.type}:{device.index}"
    if forced in PLAIN:
        return BackendChoice(op.name, where, forced, f'forced by use_backend("{forced}")')
    if device.type == "meta":
        return BackendChoice(op.name, where, "fake", "the meta device has shapes only, nothing is computed")
    if device.type == "cpu":
        return _decide_cpu(op, where, here, dtype)
    if device.type != "cuda":
        return BackendChoice(
            op.name, where, "fallback", f"no compiled kernel for device type '{device.type}' (there are for: cpu, cuda)"
        )
    if (forced == "cuda" and not op.library) or (forced == "triton" and op.triton is None):
        forced = "auto"
    passed_over = []
    if op.library and forced != "triton":
        problem = library_problem(op, device, here, reproducible)
        if problem is None:
            return BackendChoice(op.name, where, "cuda", "libm2f_cuda.so")
        passed_over.append(f"libm2f_cuda.so: {problem}")
    if op.triton is not None and forced != "cuda":
        problem = triton_problem(op, device, dtype, here)
        if problem is None:
            return BackendChoice(op.name, where, "triton", f"triton {here.triton}", tuple(passed_over))
        passed_over.append(f"triton: {problem}")
    if forced != "auto":
        raise RuntimeError(f'use_backend("{forced}"): cannot serve {op.name} on {where}: {"; ".join(passed_over)}')
    backend = "reference" if reproducible or (dtype == torch.float64 and not op.float64) else "fallback"
    reason = "plain PyTorch"
    if backend == "reference" and reproducible:
        reason += ", whose gradients here are the same every time"
    return BackendChoice(op.name, where, backend, reason, tuple(passed_over))


def _decide_cpu(op: Operator, where: str, here: Software, dtype: torch.dtype | None) -> BackendChoice:
    if dtype == torch.float64 and not op.float64:
        return BackendChoice(op.name, where, "reference", "plain PyTorch, for float64")
    library = here.libraries["cpu"]
    if not library.loaded:
        return BackendChoice(op.name, where, "fallback", "plain PyTorch", (f"lib{library.name}.so: {library.problem}",))
    detail = f"{cpu_capability()} kernels, {torch.get_num_threads()} threads"
    return BackendChoice(op.name, where, "cpp", f"lib{library.name}.so, {detail}")


# ---------------------------------------------------------------- forcing a backend

#: Pairs (operator, backend); "*" stands for every operator that has no pair of its own.
_forced: tuple[tuple[str, str], ...] = ()


@contextmanager
def use_backend(name: str, op: str | Callable[..., Any] | None = None) -> Iterator[None]:
    """Force a backend inside a `with` block.

    Args:
        name: "auto", the default choice; "cuda", the compiled CUDA library; "triton"; "fallback", the plain PyTorch
            that runs where no kernel does; "reference", the slow plain PyTorch that defines the right results. "cuda"
            and "triton" act on devices of type "cuda", and on operators that have such a kernel; elsewhere the choice
            stays as it is. A call that they cannot serve raises a RuntimeError with the reason.
        op: an operator of this package, or its name; None for all. The setting is process-wide, not per thread.

    Raises:
        ValueError: an unknown name or operator, or an operator that has no such kernel.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {', '.join(map(repr, BACKENDS))}; got {name!r}")
    key = "*"
    if op is not None:
        known = operator(op)
        if (name == "cuda" and not known.library) or (name == "triton" and known.triton is None):
            raise ValueError(f"op: expected an operator that has a kernel of backend {name!r}; got {known.name!r}")
        key = known.name
    before = _forced
    _forced = ((key, name),) if op is None else tuple(sorted({**dict(before), key: name}.items()))
    try:
        yield
    finally:
        _forced = before


def forced() -> tuple[tuple[str, str], ...]:
    """The backends that :func:`use_backend` forces now, as pairs of operator and backend."""
    return _forced


def _forced_for(op: str, forced: tuple[tuple[str, str], ...]) -> str:
    by_op = dict(forced)
    return by_op.get(op, by_op.get("*", "auto"))


# ---------------------------------------------------------------- asking


def operator(op: object) -> Operator:
    """The operator of a public name or function.

    Raises:
        ValueError: there is none.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPERATORS:
        raise ValueError(f"op: expected one of {', '.join(sorted(OPERATORS))}; got {name!r}")
    return OPERATORS[name]


def choose(
    op: str | Callable[..., Any],
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    reproducible: bool = False,
) -> BackendChoice:
    """The backend that serves operator `op` (or its public name) on a device such as "cpu" or "cuda", and the reason.

    Args:
        dtype: of the first tensor; None for any but float64.
        reproducible: gradients are wanted under `torch.use_deterministic_algorithms`.

    Raises:
        ValueError: an unknown operator.
        RuntimeError: a backend is forced that cannot serve.
    """
    known, where = operator(op), torch.device(device)
    forced = _forced_for(known.name, _forced)
    return decide(known, device_of(where.type, where.index), software_for(where.type), dtype, forced, reproducible)


def software_for(type: str) -> Software:
    """The software that matters for a type of device. Triton, slow to import, is asked for on "cuda" only."""
    return software() if type == "cuda" else Software(_library.LIBRARIES)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> BackendChoice:
    """The backend that `op(*args)` would take, and the reason. Nothing is run.

    Args:
        op: an operator of this package, or its name.
        args, kwargs: what would be passed; the first tensor decides device and dtype.

    Raises:
        ValueError: an unknown operator, or no tensor among the arguments.
        RuntimeError: a backend is forced that cannot serve.
    """
    known = operator(op)
    tensors = [x for given in (*args, *kwargs.values()) for x in _tensors(given)]
    if not tensors:
        given = len(args) + len(kwargs)
        raise ValueError(
            f"args: expected at least one tensor, which decides the device; got {given} arguments without one"
        )
    first = tensors[0]
    return choose(known.name, first.device, first.dtype, _wants_reproducible(any(x.requires_grad for x in tensors)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _tensors(part)] if isinstance(value, (tuple, list)) else []


def _wants_reproducible(requires_grad: bool) -> bool:
    return requires_grad and torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled()


# ---------------------------------------------------------------- serving


def plain(op: str, tensor: Tensor) -> str | None:
    """ "fallback" or "reference" if plain PyTorch has to serve a call; None if the registered operator has a kernel (or
    on the meta device a fake).

    Args:
        op: the public name.
        tensor: the one that decides device and dtype.
    """
    if traced_for_onnx():
        return None  # the exporter has operators of its own for them: `ops._autograd.call`
    return _plain(op, tensor.device, tensor.dtype, _forced, _wants_reproducible(tensor.requires_grad))


def serves(op: str, tensor: Tensor) -> bool:
    """True if a kernel serves a call, or the user has forced plain PyTorch on it.

    Integrations call the operator if so, and otherwise the code that they replaced.

    Args:
        op: the public name.
        tensor: the one that decides device and dtype.
    """
    return plain(op, tensor) is None or _forced_for(op, _forced) in PLAIN


_Key = tuple[str, torch.device, torch.dtype, tuple[tuple[str, str], ...], bool]
_plain_choices: dict[_Key, str | None] = {}


def _plain(
    op: str, device: torch.device, dtype: torch.dtype, forced: tuple[tuple[str, str], ...], reproducible: bool
) -> str | None:
    key = (op, device, dtype, forced, reproducible)
    if key not in _plain_choices:
        if device.type == "cuda" and not torch.cuda.is_available() and _forced_for(op, forced) not in PLAIN:
            # Tracing for another machine, which chooses when the operator is called there.
            _plain_choices[key] = None
        else:
            backend = _choose_and_warn(key).backend
            _plain_choices[key] = backend if backend in PLAIN else None
    return _plain_choices[key]


# torch.compile calls it while tracing and takes its result for a constant, which it is: its arguments are guarded. This
# is what torch.compiler.assume_constant_result does, which imports the whole compiler.
_plain._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose_and_warn(key: _Key) -> BackendChoice:
    """The choice for a call, with the warnings that belong to it."""
    op, device, dtype, forced, reproducible = key
    wish = _forced_for(op, forced)
    here = software_for(device.type)
    choice = decide(OPERATORS[op], device_of(device.type, device.index), here, dtype, wish, reproducible)
    if choice.backend in PLAIN:
        documented = dtype == torch.float64 and not OPERATORS[op].float64
        if wish not in PLAIN and not documented:
            warn_fallback(choice, device.type)
    elif choice.passed_over and wish == "auto" and not reproducible:
        library = here.libraries["cuda"]
        # No warning for a library that was not built, or not for this make of GPU: Triton serves.
        if library.path.exists() and not here.hip:
            _warn_once(
                choice.passed_over[0],
                f"m2f_kernels.{op} on '{device.type}' is served by {choice.backend}, not by the compiled library: "
                f"{choice.passed_over[0]}.",
            )
    return choice


def forget() -> None:
    """Drop what is cached: choices, warnings given, what was found installed (tests)."""
    _plain_choices.clear()
    _kernel_choices.clear()
    _warned.clear()
    software.cache_clear()
    device_of.cache_clear()


_warned: set[str] = set()


def _warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=6)


def warn_fallback(choice: BackendChoice, device: str) -> None:
    """Warns once per operator and device type that no kernel serves it, and how to get one."""
    why = "; ".join(choice.passed_over) or choice.reason
    _warn_once(
        f"{choice.op} {device}",
        f"m2f_kernels.{choice.op} runs on plain PyTorch on '{device}', without a kernel of this package: {why}. "
        "`python -m m2f_kernels.info` shows the whole picture.",
    )


# ---------------------------------------------------------------- registration


#: What runs the registered operators on CUDA devices, by name. Tests call it where there are none.
ON_CUDA: dict[str, Callable[..., Any]] = {}


def register(
    op: Operator,
    kernels: Mapping[str, Callable[..., Any]],
    reproducible: Mapping[str, Callable[[tuple[Any, ...]], bool]] | None = None,
) -> None:
    """Register the implementations of the operators that belong to a public one, on every device.

    Args:
        op: its kernels. :func:`operator` finds it by its name from now on.
        kernels: name in the namespace `m2f` -> plain PyTorch, which serves where no kernel does. The CUDA library
            implements the same name in the namespace `m2f_cuda`, the Triton module a function of that name.
        reproducible: for operators of which some calls need a fixed order of sums: a function of the arguments that is
            true for such a call.
    """
    OPERATORS[op.name] = op
    for name, function in kernels.items():
        LIBRARY.impl(name, _plain_kernel(op, function), "CompositeExplicitAutograd")
        if op.library or op.triton is not None:
            ON_CUDA[name] = _cuda_kernel(op, name, function, (reproducible or {}).get(name))
            LIBRARY.impl(name, ON_CUDA[name], "CUDA")


def _plain_kernel(op: Operator, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        first: Tensor = args[0]
        plain(op.name, first)  # warns
        return function(*args)

    return call


_kernel_choices: dict[tuple[str, _Key], Callable[..., Any]] = {}


def _cuda_kernel(
    op: Operator, name: str, function: Callable[..., Any], needs: Callable[[tuple[Any, ...]], bool] | None
) -> Callable[..., Any]:
    """The implementation on CUDA devices: picks the kernel by the first argument, from the second call on with one
    lookup in a dictionary."""

    def call(*args: Any) -> Any:
        first: Tensor = args[0]
        reproducible = needs is not None and torch.are_deterministic_algorithms_enabled() and needs(args)
        key = (name, (op.name, first.device, first.dtype, _forced, reproducible))
        kernel = _kernel_choices.get(key)
        if kernel is None:
            kernel = _kernel_choices[key] = _kernel(op, name, function, key[1])
        return kernel(*args)

    return call


def _kernel(op: Operator, name: str, function: Callable[..., Any], key: _Key) -> Callable[..., Any]:
    backend = _choose_and_warn(key).backend
    if backend == "cuda":
        kernel: Callable[..., Any] = getattr(torch.ops.m2f_cuda, name).default
        return kernel
    if backend == "triton":
        assert op.triton is not None
        kernel = getattr(importlib.import_module(op.triton), name)
        return kernel
    return function
