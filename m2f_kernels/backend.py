"""The former name of :mod:`m2f_kernels.dispatch`; its public names stay here for one more release."""

from __future__ import annotations

import warnings
from typing import Any

from m2f_kernels import dispatch

_MOVED = ("BACKENDS", "BackendChoice", "choose", "explain", "use_backend")


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"m2f_kernels.backend.{name} has moved to m2f_kernels.dispatch.{name} and will be gone in the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(dispatch, name)
