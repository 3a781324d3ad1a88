"""Replaces deformable attention in any package that has it as a function in plain PyTorch.

from m2f_kernels.integrations import functions
functions.patch("ultralytics.nn.modules.utils", "multi_scale_deformable_attn_pytorch")
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any

from torch import Tensor

import m2f_kernels
from m2f_kernels import dispatch
from m2f_kernels._checks import describe
from m2f_kernels._moved import forwarder
from m2f_kernels.integrations._rebind import replace_everywhere
from m2f_kernels.ops.ms_deform_attn.levels import SpatialShapes

__all__ = ["patch", "unpatch"]

#: The ends of the parameters' names in all copies of the function.
_PARAMETERS = ("value", "shapes", "locations", "weights")
_EXPECTED = "(value, value_spatial_shapes, sampling_locations, attention_weights)"

#: The original of each replacement.
_originals: dict[Any, Any] = {}

#: For one more release.
__getattr__ = forwarder(__name__, {"patch_function": f"{__name__}.patch", "unpatch_function": f"{__name__}.unpatch"})

Holder = ModuleType | str | MutableMapping[str, Any]


def patch(holder: Holder, name: str) -> list[str]:
    """Replace a function of deformable attention in plain PyTorch by the operator, in all modules that hold it.

    The function takes `(value, value_spatial_shapes, sampling_locations, attention_weights)`, as in Deformable-DETR and
    its copies, and returns [N, Q, H*D]. value is [N, S, H, D], or [N, H, D, S] as in LW-DETR and RF-DETR; its shape
    tells which. A call with a device and dtype of value that no kernel serves runs the replaced function. A second
    call changes nothing. A function that a closure holds stays.

    Args:
        holder: a module, its name, which is imported, or a registry: a dictionary.
        name: of the function in the module, or its key in the registry.

    Returns:
        the names replaced, as "module.name".

    Raises:
        TypeError: the named object is not a function, or takes other arguments.
        ValueError: the holder has no such name.
    """
    where, original = _find(holder, name)
    if original in _originals:
        return []
    _check_signature(where, original)
    replacement = _replacement(original)
    _originals[replacement] = original
    return _rebind(holder, name, where, original, replacement)


def unpatch(holder: Holder, name: str) -> None:
    """Undo :func:`patch`, also in modules imported since.

    Raises:
        ValueError: the holder has no such name, or what it names was not patched.
    """
    where, replacement = _find(holder, name)
    if replacement not in _originals:
        raise ValueError(f"name: expected a function that patch replaced; {where} is {describe(replacement)}")
    _rebind(holder, name, where, replacement, _originals.pop(replacement))


def _rebind(holder: Holder, name: str, where: str, old: Any, new: Any) -> list[str]:
    renamed = replace_everywhere(old, new)
    if isinstance(holder, MutableMapping):
        holder[name] = new
        return [where, *renamed]
    return renamed


def _find(holder: Holder, name: str) -> tuple[str, Any]:
    """The full name of `holder`'s object `name`, and the object."""
    if isinstance(holder, MutableMapping):
        if name not in holder:
            raise ValueError(f"name: expected a key of the registry; got {name!r}")
        return f"[{name!r}]", holder[name]
    module = importlib.import_module(holder) if isinstance(holder, str) else holder
    if not isinstance(module, ModuleType):
        raise TypeError(f"holder: expected a module, its name or a dictionary; got {describe(holder)}")
    if name not in vars(module):
        raise ValueError(f"name: expected a name in {module.__name__}; it has no {name!r}")
    return f"{module.__name__}.{name}", vars(module)[name]


def _check_signature(where: str, function: Any) -> None:
    if not inspect.isfunction(function):
        raise TypeError(f"name: expected a function {_EXPECTED}; {where} is {describe(function)}")
    parameters = inspect.signature(function).parameters.values()
    names = [p.name.lower() for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    fits = len(parameters) == len(names) == len(_PARAMETERS) and all(
        given.endswith(wanted) for given, wanted in zip(names, _PARAMETERS, strict=True)
    )
    if not fits:
        raise TypeError(f"name: expected a function {_EXPECTED}; {where} takes {inspect.signature(function)}")


def _replacement(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    names = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def multi_scale_deformable_attention(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) + len(kwargs) != len(names) or given.keys() != set(names):
            return original(*args, **kwargs)  # raises, as Python does
        value, shapes, locations, weights = (given[name] for name in names)
        if isinstance(value, Tensor) and not dispatch.serves("ms_deform_attn", value):
            return original(*args, **kwargs)
        return m2f_kernels.ms_deform_attn(_channels_last(value, shapes, weights), shapes, None, locations, weights)

    return multi_scale_deformable_attention


def _channels_last(value: Tensor, shapes: SpatialShapes, weights: Tensor) -> Tensor:
    """[N, S, H, D] of a value that may be [N, H, D, S]: H is known from the weights [N, Q, H, L, P]."""
    if not isinstance(value, Tensor) or not isinstance(weights, Tensor) or value.dim() != 4 or weights.dim() != 5:
        return value  # the operator says what is wrong
    heads = weights.shape[2]
    if value.shape[1] != heads:
        return value
    if value.shape[2] != heads:
        return value.permute(0, 3, 1, 2)
    # Both could be: the number of positions decides.
    positions = int(shapes.prod(1).sum()) if isinstance(shapes, Tensor) else sum(h * w for h, w in shapes)
    return value if value.shape[1] == positions else value.permute(0, 3, 1, 2)
