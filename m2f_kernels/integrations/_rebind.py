"""Replacing an object in every module that holds it, so that `from library import name` done earlier is no obstacle."""

from __future__ import annotations

import sys
from typing import Any


def replace_everywhere(old: Any, new: Any) -> list[str]:
    """Let every name in an imported module that is bound to `old` be bound to `new`.

    This package's own modules keep what they have. Doing it again with the two exchanged undoes it, also in modules
    that were imported in between.

    Returns:
        the names, as "module.name".
    """
    replaced = []
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "m2f_kernels":
            continue
        # vars(), not getattr: a lazy module must not be made to import something.
        namespace = getattr(module, "__dict__", None)
        if not isinstance(namespace, dict):
            continue
        for name in [name for name, value in list(namespace.items()) if value is old]:
            namespace[name] = new
            replaced.append(f"{module_name}.{name}")
    return replaced
