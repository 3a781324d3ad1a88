"""What a benchmark consists of: data, cases, implementations, required figures, and the row each measurement gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Levels = list[tuple[int, int]]

#: Relative L2 error against the fp64 reference above which a float32 row is wrong and gets no time.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
#: Peers are held to a looser bound: some of them lose bits where this package does not, and the error is printed.
PEER_SLACK = 10.0
#: Below float32: twice the error of rounding the exact result; a peer that accumulates in low precision may reach this.
PEER_LOW_PRECISION_TOLERANCE = 0.1


@dataclass(frozen=True)
class Scale:
    """How large a run is: the device and whether the small shapes of `--quick` are used."""

    device: str
    quick: bool


@dataclass(frozen=True)
class Data:
    """Inputs of a case and what the fp64 reference makes of them.

    `truth` holds "output" and, for inputs named in `differentiable`, their gradients for `grad_output`. The output has
    the dtype of the first of them.
    """

    inputs: Tensors
    levels: Levels
    grad_output: Tensor
    differentiable: tuple[str, ...]
    truth: Tensors

    def to(self, device: str) -> Data:
        def move(tensors: Tensors) -> Tensors:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return Data(move(self.inputs), self.levels, self.grad_output.to(device), self.differentiable, move(self.truth))


@dataclass(frozen=True)
class Work:
    """The least any implementation must do, from which the floor is computed.

    Attributes:
        bytes_moved: every input read once and every output written once.
        gather_bytes: bytes of rows gathered from (or scattered to) the value tensor.
        gather_level: "l1" or "l2", the cache whose measured gather rate bounds `gather_bytes`.
    """

    bytes_moved: int
    gather_bytes: int = 0
    gather_level: str = "l2"


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case.

    Attributes:
        name: as printed; the first implementation of a case is the one that ratios are about.
        call: takes what `adapt` returned; only this is timed.
        adapt: brings the inputs into the form this implementation likes best (dtype, layout, index tensors); untimed.
        ours: held to this package's tolerance rather than to the peers'.
        unavailable: why it cannot run here ("not installed"), or None.
    """

    name: str
    call: Callable[[dict[str, Any]], Tensor]
    adapt: Callable[[Tensors, Levels], dict[str, Any]]
    ours: bool = False
    unavailable: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Case:
    """One comparison: the same data through several implementations.

    Attributes:
        name: unique within the operator.
        data: key into `Benchmark.data`.
        direction: "forward" or "forward+backward".
        threads: CPU threads; None for all.
        memory: whether peak memory is measured too.
        headline: whether the case is drawn in the picture.
    """

    name: str
    data: str
    direction: str
    implementations: Sequence[Implementation]
    distribution: str = ""
    dtype: str = "float32"
    threads: int | None = None
    memory: bool = False
    headline: bool = False

    @property
    def backward(self) -> bool:
        return self.direction == "forward+backward"

    @property
    def title(self) -> str:
        return self.name.replace("-", " ")

    def bind(self, implementation: Implementation, data: Data) -> Callable[[], tuple[Tensor, ...]]:
        """A call without arguments that returns the output and, with backward, the gradients in order."""
        arguments = implementation.adapt(data.inputs, data.levels)
        if not self.backward:

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (implementation.call(arguments),)

            return forward

        leaves = [arguments[name].detach().requires_grad_() for name in data.differentiable]
        arguments.update(zip(data.differentiable, leaves, strict=True))
        grad_output = data.grad_output.to(leaves[0].dtype)

        def forward_backward() -> tuple[Tensor, ...]:
            output = implementation.call(arguments)
            return (output.detach(), *torch.autograd.grad(output, leaves, grad_output))

        return forward_backward


@dataclass(frozen=True)
class Figure:
    """A required figure: numerator over denominator must be at least `target`.

    Each side is (case, implementations, field of `Row`); of several implementations the least value counts,
    so that a peer is represented by its best backend. `target` maps an allocator setting to the least ratio.
    """

    label: str
    numerator: tuple[str, tuple[str, ...], str]
    denominator: tuple[str, tuple[str, ...], str]
    target: dict[str, float]


@dataclass(frozen=True)
class Benchmark:
    """Everything the runner needs to know about one operator."""

    op: str
    title: str
    description: str
    cases: Callable[[Scale], list[Case]]
    data: Callable[[Scale], dict[str, Callable[[], Data]]]
    work: Callable[[Case, Data], Work]
    #: A smaller version of the data, to start threads and load code before peak memory is measured.
    shrink: Callable[[Data], Data]
    figures: Callable[[Scale], list[Figure]]


@dataclass
class Row:
    """One line of the CSV: one implementation of one case under one allocator setting.

    Times in milliseconds (median and interquartile range of interleaved runs), memory in MiB, errors relative L2
    against the fp64 reference. `subject_speedup` is this row's median over that of the case's first implementation.
    """

    op: str
    case: str
    implementation: str
    setting: str
    direction: str
    distribution: str
    dtype: str
    threads: int
    status: str = "ok"
    median_ms: float | None = None
    iqr_ms: float | None = None
    rounds: int | None = None
    subject_speedup: float | None = None
    error_output: float | None = None
    error_gradients: float | None = None
    page_faults: float | None = None
    floor_ms: float | None = None
    floor_kind: str = ""
    floor_share: float | None = None
    memory_extra_mib: float | None = None
    memory_total_mib: float | None = None
    ours: bool = False
    headline: bool = False

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.case, self.implementation, self.setting

    @classmethod
    def columns(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    @classmethod
    def from_strings(cls, record: dict[str, str]) -> Row:
        """From a line of CSV."""
        values: dict[str, Any] = {}
        for f in fields(cls):
            text = record.get(f.name, "")
            if f.name in ("ours", "headline"):
                values[f.name] = text == "True"
            elif f.name in ("threads", "rounds"):
                values[f.name] = int(text) if text else None
            elif "float" in str(f.type):
                values[f.name] = float(text) if text else None
            else:
                values[f.name] = text
        return cls(**values)


def relative_l2(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth|| in float64; the norm itself where truth is zero."""
    truth = truth.double()
    difference = (actual.to(truth.device).double() - truth).norm().item()
    scale = truth.norm().item()
    return difference / scale if scale else difference


def check(
    case: Case, implementation: Implementation, data: Data, results: Sequence[Tensor]
) -> tuple[bool, list[float]]:
    """Compare results with the truth: whether all are within tolerance, and the errors in order."""
    names = ("output", *data.differentiable) if case.backward else ("output",)
    errors, right = [], True
    for i, (name, actual) in enumerate(zip(names, results, strict=True)):
        truth = data.truth[name]
        if actual.shape != truth.shape:
            raise ValueError(f"{name}: expected shape {tuple(truth.shape)}; got {tuple(actual.shape)}")
        errors.append(relative_l2(actual, truth))
        tolerance = (GRADIENT_TOLERANCE if i else OUTPUT_TOLERANCE) * (1 if implementation.ours else PEER_SLACK)
        if results[0].dtype in (torch.bfloat16, torch.float16):
            rounding = 2 * relative_l2(truth.to(results[0].dtype), truth)
            tolerance = max(tolerance, rounding if implementation.ours else PEER_LOW_PRECISION_TOLERANCE)
        right &= errors[-1] <= tolerance
    return right, errors
