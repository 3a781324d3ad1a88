"""Replaces an object in every module that holds it, also where it came by an earlier `from library import name`."""

from __future__ import annotations

import sys
from typing import Any


def replace_everywhere(old: Any, new: Any, package: str | None = None) -> list[str]:
    """Binds every name in an imported module that is bound to `old` to `new`, and returns the names.

    This package's own modules are left out. Calling it again with the arguments exchanged undoes it, also in modules
    that were imported in between.

    Args:
        package: the only one whose modules are looked at; None for all.

    Returns:
        the names, as "module.name".
    """
    replaced = []
    for module_name, module in list(sys.modules.items()):
        root = module_name.partition(".")[0]
        if root == "m2f_kernels" or package not in (None, root):
            continue
        # vars(), not getattr: a lazy module must not be made to import something.
        namespace = getattr(module, "__dict__", None)
        if not isinstance(namespace, dict):
            continue
        for name in [name for name, value in list(namespace.items()) if value is old]:
            namespace[name] = new
            replaced.append(f"{module_name}.{name}")
    return replaced
