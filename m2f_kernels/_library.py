"""The `m2f` operator namespace and the two compiled libraries that implement it.

Importing this module defines the namespace and loads whatever libraries were
built; it never raises and never compiles. What could not be loaded, and why, is
kept in `LIBRARIES` for :mod:`m2f_kernels.dispatch`.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

NAMESPACE = "m2f"
#: Every schema, fake kernel and autograd formula of this package is registered through it.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
#: What the CUDA library implements, under the same names: `m2f_kernels.dispatch` calls it from the operators.
CUDA_LIBRARY = torch.library.Library(f"{NAMESPACE}_cuda", "FRAGMENT")

#: The environment variable names another build of the libraries (`make sanitize`).
_DIRECTORY = Path(os.environ.get("M2F_LIBRARIES", Path(__file__).parent / "lib"))


@dataclass(frozen=True)
class NativeLibrary:
    """One compiled library: its path, and the reason if it is not in use."""

    name: str
    path: Path
    problem: str | None
    handle: ctypes.CDLL | None = None

    @property
    def loaded(self) -> bool:
        return self.problem is None


def _load(name: str, missing: str, unusable: str | None = None) -> NativeLibrary:
    path = _DIRECTORY / f"lib{name}.so"
    if not path.exists():
        return NativeLibrary(name, path, missing)
    if unusable is not None:
        return NativeLibrary(name, path, unusable)
    try:
        torch.ops.load_library(path)
        return NativeLibrary(name, path, None, ctypes.CDLL(str(path)))
    except OSError as error:
        return NativeLibrary(name, path, f"it did not load: {error}")


def _load_all() -> dict[str, NativeLibrary]:
    reinstall = "reinstall m2f-kernels with a C++17 compiler at hand"
    cuda_unusable = None
    if torch.version.hip is not None:
        cuda_unusable = "the installed torch is built for ROCm"
    elif torch.version.cuda is None:
        cuda_unusable = "the installed torch has no CUDA support"
    cpu = _load("m2f_cpu", f"it was not built; {reinstall}")
    cuda = _load(
        "m2f_cuda",
        "it was not built; reinstall m2f-kernels, which fetches nvcc from PyPI where there is none "
        "(M2F_CUDA=on makes its absence an error)",
        cuda_unusable,
    )
    if cuda.loaded and not hasattr(cuda.handle, "m2f_cuda_code"):
        # It cannot say what it was built for.
        cuda = NativeLibrary(cuda.name, cuda.path, "it was built for another version of m2f-kernels; build it again")
    return {"cpu": cpu, "cuda": cuda}


#: By device type.
LIBRARIES = _load_all()


def cuda_build() -> tuple[tuple[str, ...], int]:
    """The architectures in the CUDA library, such as ("sm_90", "compute_120"), and its CUDA version, 12080 for 12.8.

    An empty tuple and 0 without the library."""
    handle = LIBRARIES["cuda"].handle
    if handle is None:
        return (), 0
    handle.m2f_cuda_code.restype = ctypes.c_char_p
    code: bytes = handle.m2f_cuda_code()
    return tuple(code.decode().split()), int(handle.m2f_cuda_runtime_version())


def cuda_driver() -> int:
    """The newest CUDA version that the driver supports, 12080 for 12.8; 0 without the CUDA library, which asks it."""
    handle = LIBRARIES["cuda"].handle
    return 0 if handle is None else int(handle.m2f_cuda_driver_version())


#: The compiled kernels of deformable attention, by direction; the first of each is the default and serves every call.
CUDA_FORWARDS = ("general", "lean")
CUDA_BACKWARDS = ("general", "gathered")

for _variable, _names in (("M2F_CUDA_FORWARD", CUDA_FORWARDS), ("M2F_CUDA_BACKWARD", CUDA_BACKWARDS)):
    if os.environ.get(_variable, _names[0]) not in _names:
        warnings.warn(
            f"{_variable}: expected {' or '.join(map(repr, _names))}; got {os.environ[_variable]!r}, "
            f"using {_names[0]!r}",
            RuntimeWarning,
            stacklevel=2,
        )


def set_cuda_forward(name: str) -> None:
    """Choose the compiled forward kernel of deformable attention for this process (tests and benchmarks).

    Args:
        name: 'general', which serves every call, or 'lean', which serves 32 channels per head and points in fours where
            level sizes are known on the host, and leaves the rest to the other. The environment variable
            `M2F_CUDA_FORWARD` does the same before the first call.

    Raises:
        ValueError: another name.
        RuntimeError: the CUDA library is not loaded, or was built before it had the choice.
    """
    _set_cuda_kernel("forward", CUDA_FORWARDS, name)


def set_cuda_backward(name: str) -> None:
    """Choose the compiled kernel of deformable attention's value gradient for this process (tests and benchmarks).

    Args:
        name: 'general', which serves every call, or 'gathered', which serves encoders (as many queries as positions) in
            float32, bfloat16 and float16 and up to 84 channels per head in fours, and leaves the rest to the other.
            The environment variable `M2F_CUDA_BACKWARD` does the same before the first call.

    Raises:
        ValueError: another name.
        RuntimeError: the CUDA library is not loaded, or was built before it had the choice.
    """
    _set_cuda_kernel("backward", CUDA_BACKWARDS, name)


def _set_cuda_kernel(direction: str, names: tuple[str, ...], name: str) -> None:
    if name not in names:
        raise ValueError(f"name: expected {' or '.join(map(repr, names))}; got {name!r}")
    library = LIBRARIES["cuda"]
    if library.handle is None:
        raise RuntimeError(f"the CUDA library is not in use: {library.problem}")
    if not hasattr(library.handle, f"m2f_cuda_set_{direction}"):
        raise RuntimeError(f"{library.path}: it has one {direction} kernel of deformable attention; build it again")
    getattr(library.handle, f"m2f_cuda_set_{direction}")(name.encode())


def cpu_capability() -> str | None:
    """Instruction set in use by the CPU library: 'avx512', 'avx2' or 'baseline'; None without the library."""
    handle = LIBRARIES["cpu"].handle
    if handle is None:
        return None
    handle.m2f_cpu_capability.restype = ctypes.c_char_p
    name: bytes = handle.m2f_cpu_capability()
    return name.decode()


_wish = os.environ.get("M2F_CPU_CAPABILITY")
if _wish and LIBRARIES["cpu"].loaded and cpu_capability() != _wish:
    warnings.warn(
        f"M2F_CPU_CAPABILITY: expected an instruction set that this CPU has, of 'avx512', 'avx2', 'baseline'; "
        f"got {_wish!r}, using {cpu_capability()!r}",
        RuntimeWarning,
        stacklevel=2,
    )


def set_cpu_capability(name: str) -> None:
    """Choose the CPU kernels' instruction set for this process (tests and benchmarks).

    Args:
        name: 'avx512', 'avx2' or 'baseline'; the environment variable
            `M2F_CPU_CAPABILITY` does the same at load time.

    Raises:
        ValueError: unknown, or not supported by this CPU.
        RuntimeError: the CPU library is not loaded.
    """
    handle = LIBRARIES["cpu"].handle
    if handle is None:
        raise RuntimeError(f"the CPU library is not in use: {LIBRARIES['cpu'].problem}")
    if handle.m2f_set_cpu_capability(name.encode()) != 0:
        raise ValueError(
            f"name: expected an instruction set that this CPU has, of 'avx512', 'avx2', 'baseline'; got {name!r}"
        )
