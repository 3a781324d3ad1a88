"""The former name of a part of :mod:`m2f_kernels.ops.points`; its names stay here for one more release."""

from __future__ import annotations

import warnings
from typing import Any

from m2f_kernels.ops import points


def __getattr__(name: str) -> Any:
    if name not in points.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.{name} has moved to m2f_kernels.ops.points.{name} and will be gone in the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(points, name)
