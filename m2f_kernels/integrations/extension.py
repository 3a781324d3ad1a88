"""The extension module of the original Mask2Former, Deformable-DETR, DINO and their copies, with nothing to compile.

Those repositories compile an extension module named `MultiScaleDeformableAttention` and call its two functions from an
autograd function of their own. :func:`patch` provides a module of that name; their code runs unchanged, on CPU too.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from m2f_kernels import dispatch
from m2f_kernels.integrations import _extension
from m2f_kernels.integrations._rebind import replace_everywhere

__all__ = ["patch", "unpatch"]

NAME = "MultiScaleDeformableAttention"

#: The installed module of this package, and the one that `replace=True` replaced.
_installed: ModuleType | None = None
_before: ModuleType | None = None


def _module(published: ModuleType | None) -> ModuleType:
    """The module to install. `published` runs the calls that no kernel serves; if None, plain PyTorch does."""
    module = ModuleType(NAME, f"The extension module {NAME}, provided by m2f_kernels.")
    functions: dict[str, Callable[..., Any]] = {
        "ms_deform_attn_forward": _extension.forward,
        "ms_deform_attn_backward": _extension.backward,
    }
    for name, ours in functions.items():
        vars(module)[name] = _asking(ours, getattr(published, name, None))
    return module


def _asking(ours: Callable[..., Any], theirs: Callable[..., Any] | None) -> Callable[..., Any]:
    if theirs is None:
        return ours

    @functools.wraps(ours)
    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        passed_on = isinstance(value, Tensor) and not dispatch.serves("ms_deform_attn", value)
        return (theirs if passed_on else ours)(value, *args, **kwargs)

    return call


def patch(*, replace: bool = False) -> None:
    """Provide the module `MultiScaleDeformableAttention`, before or after the code that imports it.

    Its functions, as the published extension has them:
    `ms_deform_attn_forward(value, spatial_shapes, level_start_index, sampling_loc, attn_weight, im2col_step)` and
    `ms_deform_attn_backward(value, spatial_shapes, level_start_index, sampling_loc, attn_weight, grad_output,
    im2col_step)`, which returns the gradients of value, sampling_loc and attn_weight. On CPU and CUDA; float64,
    float32, and unlike the published one bfloat16, float16 and mixed dtypes; any batch size, whatever `im2col_step`.
    A second call does nothing.

    Args:
        replace: replace a module of that name that is imported already, in all modules that hold it. A call with a
            device and dtype that no kernel serves still goes to the replaced module.

    Raises:
        RuntimeError: such a module is imported, and `replace` is False.
    """
    global _installed, _before
    if _installed is not None:
        return
    found = sys.modules.get(NAME)
    if found is not None and not replace:
        where = getattr(found, "__file__", None) or "no file"
        raise RuntimeError(
            f"a module {NAME} is imported already, from {where}; patch() before it is, or patch(replace=True) to "
            "take its place"
        )
    _installed, _before = _module(found), found
    if found is not None:
        replace_everywhere(found, _installed)
    sys.modules[NAME] = _installed


def unpatch() -> None:
    """Undo :func:`patch`: a replaced module comes back, in all modules that hold this package's.

    If there was none, code that has imported this package's module keeps it.

    Raises:
        RuntimeError: nothing is installed.
    """
    global _installed, _before
    if _installed is None:
        raise RuntimeError("nothing to undo: patch() has not been called")
    if _before is not None:
        replace_everywhere(_installed, _before)
        sys.modules[NAME] = _before
    elif sys.modules.get(NAME) is _installed:
        del sys.modules[NAME]
    _installed = _before = None
