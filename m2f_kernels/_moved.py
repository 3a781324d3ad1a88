"""Former names, which lead to the present ones for one release."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def forwarder(module: str, moved: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module for names that it no longer has; a DeprecationWarning says where they are.

    Args:
        module: its `__name__`.
        moved: former name -> present name, as "module.name".
    """

    def getattr_moved(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name}", moved[name], stacklevel=2)
        holder, _, present = moved[name].rpartition(".")
        return getattr(import_module(holder), present)

    return getattr_moved


def warn(former: str, present: str, stacklevel: int) -> None:
    """Say that a name has moved."""
    warnings.warn(
        f"{former} has moved to {present} and will be gone in the next release",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )
