"""Gives modules of another package this package's `forward`, and takes it back.

A replacement is a mixin whose methods override those of the original class and call `super()` for what only the
original does. The accelerated class of `X` is `(mixin, X)`, made once; accelerating an instance sets its `__class__`,
so that parameters, buffers, hooks, names and the object's identity stay what they are. The accelerated class bears the
original's name and module, since names of classes carry meaning in `transformers` (architectures in a configuration,
losses, recorded outputs, device maps); only `repr` tells the two apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pickle import PicklingError
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from m2f_kernels.integrations.transformers import _copies as copies
from m2f_kernels.integrations.transformers._copies import calls_super, methods_of, parameters, same_function

#: Modules beside this one, each with a `REPLACEMENTS`. Mask2Former's before EoMT's: a copy of the one's
#: loss in another package is a copy of the other's, too.
FAMILIES = ("deformable", "mask2former", "oneformer", "eomt", "rf_detr", "sam3")

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
        parts: `mixin`, then mixins that replace fewer methods. Where there are any, classes that override methods or
            are copies in other packages run the parts that they have left as they were; `_m2f_changed` of the
            accelerated class names the others.
        partly: `what` of an instance that runs some parts only; None where it runs all.
    """

    mixin: type
    what: str
    check: Callable[[nn.Module], str | None] = lambda module: None
    ops: tuple[str, ...] = ()
    parts: tuple[type, ...] = ()
    partly: Callable[[nn.Module], str | None] = lambda module: None


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

    #: Methods of the published class that this class has otherwise, where its replacement has parts.
    _m2f_changed: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._m2f_changed = _changed_methods(cls)

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


#: A name in the accelerated classes themselves, not in what derives from them.
_MADE = "_m2f_made"


@cache
def _metaclass(of: type) -> type:
    """The metaclass of accelerated classes: instances of the original class count as instances of the accelerated one.

    So `isinstance` still holds for modules that were made before a name was patched. What is made by a patched class is
    of the original one where `accelerate` would leave it alone."""

    def instance_check(cls: type, instance: object) -> bool:
        return type.__instancecheck__(cls, instance) or (cls in _PAIRS and isinstance(instance, _PAIRS[cls].original))

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        made = of.__call__(cls, *args, **kwargs)
        # Of a patched class: an instance that accelerate() would leave alone is one of the original class.
        if type(made) in _PAIRS and (found := plan(made)) is not None and found.reason is not None:
            _set_class(made, _PAIRS[type(made)].original)
        return made

    return type(of.__name__, (of,), {"__instancecheck__": instance_check, "__call__": make})


@cache
def accelerated_class(mixin: type, original: type) -> type:
    """The class of accelerated instances of `original`; always the same one."""
    names: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        _MADE: True,
    }
    base = _base(mixin, original)
    # What a class overrides goes before what is replaced, and its super() is that.
    bases = (mixin, _Accelerated, original) if base is original else (original, accelerated_class(mixin, base))
    if base is original and (forward := getattr(mixin, "forward", None)) is not None:
        # Not original.forward: a type has no such attribute for mypy.
        names["forward"] = _described(forward, getattr(original, "forward"))  # noqa: B009
    made: type = _metaclass(type(original))(original.__name__, bases, names)
    _PAIRS[made] = _Pair(mixin, original)
    return made


def _described(function: Any, original: Any) -> FunctionType:
    """A copy of a function that bears the signature and the docstring of what it replaces.

    Programs read the arguments that a `forward` takes: trainers to choose columns, exporters to name inputs."""
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    made.__dict__.update(vars(function))
    made.__doc__ = original.__doc__
    vars(made)["__signature__"] = inspect.signature(original)
    return made


def runs(module: nn.Module, method: Any) -> bool:
    """True if `method`, of a mixin, is what a call of that method arrives at: nothing derived from it overrides it."""
    name = method.__name__
    found = getattr(type(module), name)
    return name not in vars(module) and getattr(found, "__code__", None) is method.__code__


def _base(mixin: type, original: type) -> type:
    """Above which class in what `original` derives from the mixin belongs: itself, unless the replacement has parts."""
    known = known_class(original)
    return known.cls if known is not None and mixin in known.replacement.parts else original


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


class Known(NamedTuple):
    """The replacement for a class, found by its name, by that of a class that it derives from, or as a copy.

    Attributes:
        cls: the published class, or the copy of it.
        published: its name in transformers.
        derived: the classes between.
    """

    cls: type
    published: str
    replacement: Replacement
    derived: tuple[type, ...]


def _plain_mro(cls: type) -> list[type]:
    """The classes that `cls` derives from, and itself, without those made here."""
    return [x for x in cls.__mro__ if _MADE not in vars(x) and not x.__module__.startswith(f"{__package__}.")]


def _known_class(cls: type) -> Known | None:
    table, mro = replacements(), _plain_mro(cls)
    for i, base in enumerate(mro):
        if (replacement := table.get(qualified_name(base))) is not None:
            return Known(base, qualified_name(base), replacement, tuple(mro[:i]))
    for i, base in enumerate(mro):
        for name, replacement in table.items():
            if any(_copies(base, name, part) for part in replacement.parts):
                return Known(base, name, replacement, tuple(mro[:i]))
    return None


#: The replacement for a class; None where none is known.
known_class: Callable[[type], Known | None] = cache(_known_class)


def _copies(cls: type, name: str, mixin: type) -> bool:
    """True if a class has a method of its own that is the published one which the mixin replaces."""
    for method, replaced in methods_of(mixin).items():
        own = vars(cls).get(method)
        # By the names of the arguments first: what is published may not have been imported.
        if parameters(own) == parameters(replaced) != ():
            published = published_class(name)
            if published is not None and same_function(own, vars(published).get(method)):
                return True
    return False


def published_class(name: str) -> type | None:
    """The class of that qualified name in transformers, as it is published; None where this version has none."""
    module, _, own = name.rpartition(".")
    try:
        found = getattr(import_module(module), own, None)
    except ModuleNotFoundError:
        return None
    return None if found is None else _original(found)


def _changed_methods(cls: type) -> frozenset[str]:
    known = known_class(cls)
    published = published_class(known.published) if known is not None and known.replacement.parts else None
    return frozenset() if published is None else copies.changed_methods(_plain_mro(cls), published)


#: The methods of the published class that a class has otherwise; none where its replacement has no parts.
changed_methods: Callable[[type], frozenset[str]] = cache(_changed_methods)


class Plan(NamedTuple):
    """The plan for a module: its replacement, the reason to leave it alone or None, and whether it is accelerated."""

    replacement: Replacement
    reason: str | None
    already: bool
    mixin: type


def plan(module: nn.Module) -> Plan | None:
    """The plan for `module`; None if neither its class nor any that it derives from is known."""
    known = known_class(type(module))
    if known is None:
        return None
    replacement, already = known.replacement, isinstance(module, _Accelerated)
    methods = overridden_methods(replacement.mixin, known.cls)
    mixin: type | None = replacement.mixin
    reason = None
    if replacement.parts:
        mixin = _part(known)
        if mixin is None:
            changed = sorted(methods & changed_methods(known.cls))
            reason = f"its {', '.join(changed)} is not as in transformers"
    else:
        # Its own, too, which the replaced ones may call no longer.
        methods |= methods_of(known.cls).keys()
        for own in known.derived:
            if names := sorted(name for name in methods & vars(own).keys() if not _only_wrapped(own, name)):
                reason = f"the subclass {qualified_name(own)} overrides {', '.join(names)}"
                break
    if reason is None and (names := sorted(methods & vars(module).keys())):
        reason = f"this instance has its own {', '.join(names)}, set by another package's hook"
    if reason is not None:
        return Plan(replacement, reason, False, replacement.mixin)
    assert mixin is not None
    return Plan(replacement, replacement.check(module), already, mixin)


def _only_wrapped(cls: type, name: str) -> bool:
    """True if a class has a method of its own only because transformers wraps the `forward` of every class that derives
    from a layer which checkpoints itself, such as those that FSDP2 makes."""
    own = vars(cls)[name]
    wrapped = isinstance(own, FunctionType) and own.__globals__.get("__name__") == "transformers.modeling_layers"
    return wrapped and getattr(own, "__wrapped__", None) is getattr(super(cls, cls), name, None)


def _part(known: Known) -> type | None:
    """The first part that replaces nothing which the published class or its copy has otherwise."""
    changed = changed_methods(known.cls)
    parts = known.replacement.parts
    return next((part for part in parts if not overridden_methods(part, known.cls) & changed), None)


def reaches(module: nn.Module, method: str) -> bool:
    """True if a call of a method may arrive at what replaces it: whoever overrides it names `super()`."""
    known = known_class(type(module))
    if known is None or (part := _part(known)) is None or method not in overridden_methods(part, known.cls):
        return False
    return all(calls_super(vars(x)[method]) for x in known.derived if method in vars(x))


def swap(module: nn.Module, mixin: type) -> None:
    """Accelerate one module in place."""
    cls: Any = type(module)
    _set_class(module, accelerated_class(mixin, cls))


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
            missing = module_name.startswith(f"{error.name}.") or error.name == module_name
            if family in wanted and not missing:
                raise
            continue  # a family of another version, or one that needs a package that is not there: nobody can use it
        cls = getattr(module, class_name, None)
        if cls is not None:
            yield name, _original(cls), replacement
    if wanted - found:
        known = sorted({name.split(".")[2] for name in replacements()})
        raise ValueError(f"families: expected some of {', '.join(known)}; got {', '.join(sorted(wanted - found))}")


def patched_classes() -> list[tuple[type, _Pair]]:
    """The accelerated classes that exist, each with its mixin and original."""
    return list(_PAIRS.items())
