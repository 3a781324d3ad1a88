"""Gives modules of another package this package's `forward`, and takes it back.

A replacement is a mixin whose methods override those of the original class and call `super()` for what only the
original does. The accelerated class of `X` is `(mixin, X)`, made once; accelerating an instance sets its `__class__`,
so that parameters, buffers, hooks, names and the object's identity stay what they are. The accelerated class bears the
original's name and module, since names of classes carry meaning in `transformers` (architectures in a configuration,
losses, recorded outputs, device maps); only `repr` tells the two apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

#: Modules beside this one, each with a `REPLACEMENTS`.
FAMILIES = ("deformable", "eomt", "mask2former", "oneformer")

if TYPE_CHECKING:
    Mixin = nn.Module
else:
    #: The base of mixins: none. The original class follows them and is a module, which mypy has to be told.
    Mixin = object


@dataclass(frozen=True)
class Replacement:
    """The replacement for instances of one original class.

    Attributes:
        mixin: a class at module level. Nothing may be set on an instance when it is accelerated. A class can also be
            accelerated before it has instances, so the mixin itself takes `super()` for those that `check` refuses.
        what: one line for the report.
        check: returns the reason why an instance is left alone, or None if it is replaced.
        ops: operators that need a kernel on the device of a call; without one that call runs the original code.
    """

    mixin: type
    what: str
    check: Callable[[nn.Module], str | None] = lambda module: None
    ops: tuple[str, ...] = ()


@cache
def replacements() -> dict[str, Replacement]:
    """Every replacement, by the qualified name of the class that it is for."""
    table: dict[str, Replacement] = {}
    for family in FAMILIES:
        rows: Mapping[str, Replacement] = import_module(f"{__package__}.{family}").REPLACEMENTS
        if twice := table.keys() & rows.keys():
            raise RuntimeError(f"replaced by two families: {sorted(twice)}")
        table.update(rows)
    return table


# ---------------------------------------------------------------- accelerated classes


class _Accelerated:
    """The base of every accelerated class: gives it its name in `repr`, and lets instances be pickled."""

    def _get_name(self) -> str:
        return f"Accelerated{type(self).__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        pair = _PAIRS.get(type(self))
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, _, *state = reduced
        if pair is None:
            # A class derived from an accelerated one has a name of its own.
            return _new, (_Name(type(self)),), *state
        return _rebuild, (pair.mixin, _Name(pair.original)), *state


class _Name:
    """A class, pickled by its name; it unpickles as the original class, also where that name holds the other."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def __deepcopy__(self, memo: Any) -> _Name:
        return self

    def __reduce__(self) -> Any:
        module, name = self.cls.__module__, self.cls.__qualname__
        try:
            found = _find(module, name).cls
        except (ImportError, AttributeError):
            found = None
        if found is not self.cls:
            raise PicklingError(f"expected {module}.{name} to name {self.cls}; it names {found}")
        return _find, (module, name)


def _find(module: str, name: str) -> _Name:
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return _Name(_original(found))


def _rebuild(mixin: type, original: _Name) -> Any:
    return _new(_Name(accelerated_class(mixin, original.cls)))


def _new(name: _Name) -> Any:
    cls: Any = name.cls
    return cls.__new__(cls)


class _Pair(NamedTuple):
    mixin: type
    original: type


#: The mixin and the original of each accelerated class.
_PAIRS: dict[type, _Pair] = {}


def _original(cls: type) -> type:
    return _PAIRS[cls].original if cls in _PAIRS else cls


@cache
def _metaclass(of: type) -> type:
    """The metaclass of accelerated classes: instances of the original class count as instances of the accelerated one.

    So `isinstance` still holds for modules that were made before a name was patched."""

    def instance_check(cls: type, instance: object) -> bool:
        return type.__instancecheck__(cls, instance) or (cls in _PAIRS and isinstance(instance, _PAIRS[cls].original))

    return type(of.__name__, (of,), {"__instancecheck__": instance_check})


@cache
def accelerated_class(mixin: type, original: type) -> type:
    """The class of accelerated instances of `original`; always the same one."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    made: type = _metaclass(type(original))(original.__name__, (mixin, _Accelerated, original), names)
    _PAIRS[made] = _Pair(mixin, original)
    return made


def overridden_methods(mixin: type, original: type) -> set[str]:
    """The methods of `original` that `mixin` replaces."""
    own = {name for cls in mixin.__mro__ if cls is not object for name in vars(cls) if not name.startswith("__")}
    return {name for name in own if callable(getattr(original, name, None))}


# ---------------------------------------------------------------- what is to be done with a module


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def watched(module: nn.Module) -> bool:
    """True if any hooks are registered on a module, which only its call would run."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def observed(module: nn.Module) -> bool:
    """True if hooks of anything but FSDP2 are registered on a module: they see its inputs or outputs."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    owners = (type(getattr(hook, "__self__", None)).__module__ for table in hooks for hook in table.values())
    return any(not owner.startswith("torch.distributed.fsdp") for owner in owners)


class Plan(NamedTuple):
    """The plan for a module: its replacement, the reason to leave it alone or None, and whether it is accelerated."""

    replacement: Replacement
    reason: str | None
    already: bool


def plan(module: nn.Module) -> Plan | None:
    """The plan for `module`; None if neither its class nor any that it derives from is known."""
    table, derived = replacements(), []
    for cls in type(module).__mro__:
        replacement = table.get(qualified_name(cls))
        if replacement is not None:
            break
        derived.append(cls)
    else:
        return None
    methods = overridden_methods(replacement.mixin, _original(cls))
    for own in derived:
        if own not in replacement.mixin.__mro__ and (names := sorted(methods & vars(own).keys())):
            return Plan(replacement, f"the subclass {qualified_name(own)} overrides {', '.join(names)}", False)
    if names := sorted(methods & vars(module).keys()):
        return Plan(replacement, f"this instance has its own {', '.join(names)}, set by another package's hook", False)
    return Plan(replacement, replacement.check(module), isinstance(module, _Accelerated))


def swap(module: nn.Module, replacement: Replacement) -> None:
    """Accelerate one module in place."""
    cls: Any = type(module)
    _set_class(module, accelerated_class(replacement.mixin, cls))


def _set_class(module: nn.Module, cls: Any) -> None:
    # nn.Module's __setattr__ passes this on to object's.
    module.__class__ = cls
    # A graph that torch.compile made for the old class must not run again. In torch 2.11 its guards are skipped while
    # no module's dictionary has changed, and a class is not in the dictionary.
    vars(module)["_m2f_class_changed"] = True
    del vars(module)["_m2f_class_changed"]


def swap_back(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Undoes :func:`swap`. Returns the modules for which it cannot: instances of classes derived since."""
    stuck: list[nn.Module] = []
    for module in modules:
        cls: Any = type(module)
        if cls in _PAIRS:
            _set_class(module, _PAIRS[cls].original)
        elif isinstance(module, _Accelerated):
            stuck.append(module)
    return stuck


# ---------------------------------------------------------------- classes in their namespaces


def known_classes(families: Iterable[str] = ()) -> Iterator[tuple[str, type, Replacement]]:
    """Name, original and replacement of every known class that the installed transformers has.

    Args:
        families: directories of transformers/models; all where empty.

    Raises:
        ValueError: a family without a known class.
    """
    wanted, found = set(families), set()
    for name, replacement in replacements().items():
        module_name, _, class_name = name.rpartition(".")
        family = module_name.split(".")[2]
        if wanted and family not in wanted:
            continue
        found.add(family)
        try:
            module = import_module(module_name)
        except ModuleNotFoundError as error:
            if not module_name.startswith(f"{error.name}.") and error.name != module_name:
                raise
            continue  # a family of another version
        cls = getattr(module, class_name, None)
        if cls is not None:
            yield name, _original(cls), replacement
    if wanted - found:
        known = sorted({name.split(".")[2] for name in replacements()})
        raise ValueError(f"families: expected some of {', '.join(known)}; got {', '.join(sorted(wanted - found))}")


def rename(old: type, new: type) -> bool:
    """Binds the name of class `old` in transformers' modules to `new`. Returns True if there was one.

    In all modules, since packages cache the classes of their modules after the first access.
    """
    renamed = False
    for module_name, module in list(sys.modules.items()):
        inside = module is not None and module_name.partition(".")[0] == "transformers"
        if inside and vars(module).get(old.__name__) is old:
            setattr(module, old.__name__, new)
            renamed = True
    return renamed


def patched_classes() -> list[tuple[type, _Pair]]:
    """The accelerated classes that exist, each with its mixin and original."""
    return list(_PAIRS.items())
