"""Which implementation serves a call, how to force one, and how to be told why."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from m2f_kernels import _library
from m2f_kernels._library import LIBRARIES, cpu_capability

#: Public name of each operator -> device type -> backend that implements it there.
IMPLEMENTED: dict[str, dict[str, str]] = {}

BACKENDS = ("auto", "reference")
_forced = "auto"


@dataclass(frozen=True)
class BackendChoice:
    """What serves an operator on a device, and why. `str()` gives one readable line."""

    op: str
    device: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} on {self.device}: {self.backend} ({self.reason})"


def reference_forced() -> bool:
    return _forced == "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for every operator of this package inside a `with` block.

    Args:
        name: "reference" for the plain PyTorch implementation, "auto" for the
            default choice by device. The setting is process-wide, not per thread.

    Raises:
        ValueError: `name` is neither.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {', '.join(map(repr, BACKENDS))}; got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def fall_back(op: str, device: str) -> None:
    """To be called where the reference serves `op` although nobody asked for it: warns once."""
    _library.warn_fallback(op, device, IMPLEMENTED[op].get(device))


def choose(op: str, device: str) -> BackendChoice:
    """The backend of operator `op` (its public name) on a device type such as "cpu" or "cuda"."""
    if op not in IMPLEMENTED:
        raise ValueError(f"op: expected one of {', '.join(sorted(IMPLEMENTED))}; got {op!r}")
    if reference_forced():
        return BackendChoice(op, device, "reference", 'forced by use_backend("reference")')
    backend = IMPLEMENTED[op].get(device)
    if backend is None:
        return BackendChoice(op, device, "reference", f"no compiled kernel for device type '{device}'")
    if backend == "triton":
        if _library.TRITON_PROBLEM is not None:
            return BackendChoice(op, device, "reference", f"triton: {_library.TRITON_PROBLEM}")
        return BackendChoice(op, device, backend, f"triton {importlib.metadata.version('triton')}")
    library = LIBRARIES[device]
    if not library.loaded:
        return BackendChoice(op, device, "reference", f"lib{library.name}.so: {library.problem}")
    detail = f"lib{library.name}.so"
    if device == "cpu":
        detail += f", {cpu_capability()} kernels, {torch.get_num_threads()} threads"
    return BackendChoice(op, device, backend, detail)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> BackendChoice:
    """Say which backend `op(*args)` would take and why, without running it.

    Args:
        op: an operator of this package, or its name.
        args, kwargs: what would be passed; the first tensor decides the device.

    Raises:
        ValueError: an unknown operator, or no tensor among the arguments.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    given = [*args, *kwargs.values()]
    device = next((a.device.type for a in given if isinstance(a, torch.Tensor)), None)
    if device is None:
        raise ValueError(
            f"args: expected at least one tensor, which decides the device; got {len(given)} arguments without one"
        )
    return choose(name, device)
