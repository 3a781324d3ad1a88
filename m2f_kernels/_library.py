"""The `m2f` operator namespace and the two compiled libraries that implement it.

Importing this module defines the namespace and loads whatever libraries were
built; it never raises and never compiles. What could not be loaded, and why, is
kept in `LIBRARIES` for :mod:`m2f_kernels.info` and for the one-time fallback warning.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NAMESPACE = "m2f"
#: Every schema, fake kernel and autograd formula of this package is registered through it.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

#: The environment variable names another build of the libraries (`make sanitize`).
_DIRECTORY = Path(os.environ.get("M2F_LIBRARIES", Path(__file__).parent / "lib"))


@dataclass(frozen=True)
class NativeLibrary:
    """One compiled library: where it is, and why it is not in use if it is not."""

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
    if torch.version.cuda is None:
        cuda_unusable = "the installed torch has no CUDA support"
    cpu = _load("m2f_cpu", f"it was not built; {reinstall}")
    cuda = _load(
        "m2f_cuda",
        "it was not built; reinstall m2f-kernels with nvcc on PATH (M2F_CUDA=on makes its absence an error)",
        cuda_unusable,
    )
    return {"cpu": cpu, "cuda": cuda}


#: By device type. A device that is not a key here is served by the reference.
LIBRARIES = _load_all()

#: Why the Triton kernels are not in use, or None. Triton itself is imported at the first call of a kernel.
TRITON_PROBLEM: str | None = None
if importlib.util.find_spec("triton") is None:
    TRITON_PROBLEM = "triton is not installed; pip install triton"


def implement_with_triton(op: str, module: str) -> None:
    """Serve `m2f::<op>` on CUDA by the function `op` of `module`, which is imported at the first call."""
    if TRITON_PROBLEM is not None:
        return

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), op)(*args)

    LIBRARY.impl(op, call, "CUDA")


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
        f"M2F_CPU_CAPABILITY: expected an instruction set that this processor has, of 'avx512', 'avx2', 'baseline'; "
        f"got {_wish!r}, using {cpu_capability()!r}",
        RuntimeWarning,
        stacklevel=2,
    )

_warned: set[tuple[str, str]] = set()


def warn_fallback(op: str, device: str, backend: str | None = None) -> None:
    """Say once per operator and device that the slow reference is running, and what would end that.

    `backend` is what would serve the operator there: "cpp", "cuda" or "triton".
    """
    if (op, device) in _warned:
        return
    _warned.add((op, device))
    library = LIBRARIES.get(device)
    if backend == "triton" and TRITON_PROBLEM is not None:
        why = TRITON_PROBLEM
    elif library is None:
        why = f"m2f-kernels has no compiled kernel for device type '{device}' (it has for: {', '.join(LIBRARIES)})"
    elif library.problem is None:
        why = f"lib{library.name}.so is loaded but does not implement it"
    else:
        why = f"lib{library.name}.so is not in use: {library.problem}"
    warnings.warn(
        f"m2f_kernels.{op} runs on the plain PyTorch reference on '{device}', which is slow and uses much memory: "
        f"{why}. `python -m m2f_kernels.info` shows the whole picture.",
        RuntimeWarning,
        stacklevel=3,
    )


def set_cpu_capability(name: str) -> None:
    """Choose the CPU kernels' instruction set for this process (tests and benchmarks).

    Args:
        name: 'avx512', 'avx2' or 'baseline'; the environment variable
            `M2F_CPU_CAPABILITY` does the same at load time.

    Raises:
        ValueError: unknown, or not supported by this processor.
        RuntimeError: the CPU library is not loaded.
    """
    handle = LIBRARIES["cpu"].handle
    if handle is None:
        raise RuntimeError(f"the CPU library is not in use: {LIBRARIES['cpu'].problem}")
    if handle.m2f_set_cpu_capability(name.encode()) != 0:
        raise ValueError(
            f"name: expected an instruction set that this processor has, of 'avx512', 'avx2', 'baseline'; got {name!r}"
        )
