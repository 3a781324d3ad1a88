"""Runs models of Hugging Face `transformers` on fused operators: `accelerate` and `restore`, `patch` and `unpatch`.

`accelerate` changes an existing model, `patch` the classes of which models are made. Parameters, their names
and the outputs stay the same; memory and time change. `transformers` is imported only when one of these
functions is called.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import NamedTuple

from torch import nn

from m2f_kernels import _moved, dispatch
from m2f_kernels._checks import describe
from m2f_kernels.graphs import ATTACHED, CudaGraphs
from m2f_kernels.integrations._rebind import replace_everywhere
from m2f_kernels.integrations.transformers import _swap

__all__ = ["Acceleration", "Entry", "Report", "accelerate", "patch", "restore", "unpatch"]

_PACKAGE = "transformers"
#: Supported versions of transformers, as (major, minor): from the first, below the second.
SUPPORTED = ((4, 57), (6, 0))


@dataclass(frozen=True)
class Entry:
    """A module of the model, or a class.

    Attributes:
        name: the module's path in the model, or the class's name.
        cls: name of its class.
        text: what replaced it, or why it was left alone.
    """

    name: str
    cls: str
    text: str


@dataclass(frozen=True)
class Report:
    """The modules that :func:`accelerate` replaced, and those that it left alone with the reason.

    Attributes:
        replaced: modules that were replaced.
        skipped: modules of known classes that were left alone, each with the reason.
        already_accelerated: modules that had been replaced before.
        unserved: operators without a kernel for the model's present device and dtype, each with the reason. The modules
            choose at every call, and run the original code where no kernel serves.
        modules: the modules of `replaced`, to be restored at the end of a `with` block.
        graphs: the replacement of `model.forward`, if `cuda_graphs` was given.
    """

    replaced: tuple[Entry, ...]
    skipped: tuple[Entry, ...]
    already_accelerated: tuple[Entry, ...]
    unserved: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)
    graphs: CudaGraphs | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        groups = (
            ("replaced", self.replaced), ("left alone", self.skipped), ("already replaced", self.already_accelerated)
        )  # fmt: skip
        lines = [f"{', '.join(f'{len(entries)} {title}' for title, entries in groups)} before"]
        for title, entries in groups:
            for (cls, text), count in Counter((entry.cls, entry.text) for entry in entries).items():
                first = next(entry.name for entry in entries if (entry.cls, entry.text) == (cls, text))
                where = "" if first == cls else f" ({first}{', ...' if count > 1 else ''})"
                lines.append(f"  {title}: {count} x {cls}{where}: {text}")
        lines += [f"  no kernel, so the published code runs: {text}" for text in self.unserved]
        return "\n".join(lines)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The former name of `skipped`, for one more release."""
        _moved.warn("Report.left", "Report.skipped", stacklevel=2)
        return self.skipped

    @property
    def already(self) -> tuple[Entry, ...]:
        """The former name of `already_accelerated`, for one more release."""
        _moved.warn("Report.already", "Report.already_accelerated", stacklevel=2)
        return self.already_accelerated


class Acceleration(NamedTuple):
    """The result of :func:`accelerate`: the model and the report. A `with` block undoes the acceleration at its end.

    Attributes:
        model: the model that was given.
        report: what was done to it.
    """

    model: nn.Module
    report: Report

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.report.graphs is not None:
            self.report.graphs.detach()
        _warn_stuck(_swap.swap_back(self.report.modules))

    def __repr__(self) -> str:
        return f"Acceleration of {type(self.model).__name__}: {self.report}"


def accelerate(model: nn.Module, *, cuda_graphs: bool = False) -> Acceleration:
    """The model, its modules replaced in place by fused ones, and a report of what was replaced.

    Modules of `transformers` that this package knows are replaced. The model's results, its parameters and their names
    stay the same; a second call changes nothing. :func:`restore` undoes it, and so does the end of a `with` block. A
    module that is called on a device or with a dtype for which its operators have no kernel runs the original code, so
    nothing becomes slower.

        model, report = m2f_kernels.accelerate(model)
        with m2f_kernels.accelerate(model):
            ...

    Args:
        model: any module that contains modules of `transformers`; wrapped, compiled or on the meta device, too.
        cuda_graphs: replay a CUDA graph, one per input shape, in calls of `model` without gradients; in training mode
            two, of the forward and the backward pass. Where targets are given to Mask2Former, OneFormer or EoMT, their
            models are replayed, and matching and loss run between. `model.forward` is a
            :class:`m2f_kernels.CudaGraphs` until :func:`restore`.

    Returns:
        the model and a report. `str(report)` lists what was replaced, what was left alone and why, and which operators
        have no kernel on the model's present device.

    Raises:
        TypeError: not a module.
        ValueError: it contains no module that this package knows.
        ImportError: no supported version of transformers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {describe(model)}")
    version = _check_version()
    replaced: list[Entry] = []
    skipped: list[Entry] = []
    already: list[Entry] = []
    swapped: list[nn.Module] = []
    ops: set[str] = set()
    for name, module in model.named_modules():
        plan = _swap.plan(module)
        if plan is None:
            continue
        cls = type(module).__name__
        if plan.reason is None:
            ops.update(plan.replacement.ops)
        if plan.reason is not None:
            skipped.append(Entry(name, cls, plan.reason))
        elif plan.already:
            already.append(Entry(name, cls, plan.replacement.partly(module) or plan.replacement.what))
        else:
            replaced.append(Entry(name, cls, plan.replacement.partly(module) or plan.replacement.what))
            _swap.swap(module, plan.mixin)
            swapped.append(module)
    report = Report(tuple(replaced), tuple(skipped), tuple(already), _unserved(model, ops), tuple(swapped))
    if not (replaced or skipped or already):
        raise ValueError(
            f"model: expected a model of transformers with deformable or masked attention; {type(model).__name__} "
            f"has no module that m2f_kernels knows in transformers {version}; known are {', '.join(_families())}"
        )
    if not (replaced or already):
        warnings.warn(f"m2f_kernels.accelerate changed nothing: {report}", stacklevel=2)
    if cuda_graphs and "forward" not in vars(model):
        graphs = CudaGraphs(model, training=True)
        graphs.attach()
        report = replace(report, graphs=graphs)
    return Acceleration(model, report)


def _families() -> list[str]:
    """The directories of transformers/models with classes that are replaced."""
    return sorted({name.split(".")[2] for name in _swap.replacements()})


def _unserved(model: nn.Module, ops: Iterable[str]) -> tuple[str, ...]:
    """For each operator that plain PyTorch would serve on the model's device and dtype: one line with the reason."""
    like = next((x for x in model.parameters() if x.is_floating_point()), None)
    if like is None:
        return ()
    choices = [dispatch.choose(op, like.device, like.dtype) for op in sorted(ops)]
    return tuple(str(choice) for choice in choices if choice.backend in dispatch.PLAIN)


def restore(model: nn.Module) -> nn.Module:
    """The model with every replaced module's own class back, in place. Does nothing where none was replaced.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {describe(model)}")
    for graphs in [x for module in model.modules() if (x := vars(module).get(ATTACHED)) is not None]:
        graphs.detach()
    _warn_stuck(_swap.swap_back(model.modules()))
    return model


def patch(*families: str) -> Report:
    """Replace the classes themselves in `transformers`, so that models made from now on are accelerated.

    Models that exist already stay as they are. Imports the modules of the families that it patches.

    Args:
        families: directories of `transformers/models`, for example "mask2former"; all that are known where none is
            given.

    Raises:
        ValueError: an unknown family.
        ImportError: no supported version of transformers.
    """
    _check_version()
    replaced: list[Entry] = []
    already: list[Entry] = []
    for name, original, replacement in list(_swap.known_classes(families)):
        accelerated = _swap.accelerated_class(replacement.mixin, original)
        entry = Entry(name, name, replacement.what)
        (replaced if replace_everywhere(original, accelerated, _PACKAGE) else already).append(entry)
    return Report(tuple(replaced), (), tuple(already))


def unpatch() -> None:
    """Undo :func:`patch`, whichever families it was called for. Models made in between stay accelerated."""
    for accelerated, pair in _swap.patched_classes():
        replace_everywhere(accelerated, pair.original, _PACKAGE)


def _check_version() -> str:
    low, high = (".".join(map(str, version)) for version in SUPPORTED)
    wanted = f"transformers: expected a version from {low} to below {high}"
    try:
        from transformers import __version__
    except ImportError as error:
        raise ImportError(f"{wanted}; none can be imported: {error}") from None
    numbers = re.match(r"(\d+)\.(\d+)", __version__)
    if numbers is None or not SUPPORTED[0] <= (int(numbers[1]), int(numbers[2])) < SUPPORTED[1]:
        raise ImportError(f"{wanted}; {__version__} is installed")
    return __version__


def _warn_stuck(modules: list[nn.Module]) -> None:
    if modules:
        names = sorted({_swap.qualified_name(type(module)) for module in modules})
        warnings.warn(
            f"m2f_kernels.restore left alone what derives from an accelerated class: {', '.join(names)}", stacklevel=3
        )
