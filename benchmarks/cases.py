"""The parts of a benchmark: data, cases, implementations, targets, and the row that each measurement gives."""

from __future__ import annotations

import csv
import importlib.util
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import m2f_kernels

Tensors = dict[str, Tensor]
Levels = list[tuple[int, int]]

OURS = "m2f_kernels"
#: The part of a call outside of its stages.
REST = "the rest, backward included"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Relative L2 error against the fp64 reference above which a float32 row is wrong and gets no time.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
#: Peers have a looser bound: some are less precise than this package, and the error is printed.
PEER_SLACK = 10.0
#: Below float32: twice the error of rounding the exact result; a peer that accumulates in low precision may reach this.
PEER_LOW_PRECISION_TOLERANCE = 0.1
REFERENCE_CHUNK = 2048


@dataclass(frozen=True)
class Scale:
    """The size of a run: its device, the small shapes of `--quick` or the usual ones, all cases or the default ones."""

    device: str
    quick: bool
    full: bool = False


@dataclass(frozen=True)
class Data:
    """Inputs of a case and the fp64 reference's results for them.

    Attributes:
        inputs: by name; each implementation's adapter takes those it needs.
        truth: the outputs and, if requested, the gradients, by name; and other tensors that the operator's own check
            needs.
        levels: (h, w) of the feature levels, where the operator has any.
        outputs: names of the outputs in `truth`, in the order in which an implementation returns them.
        grad_outputs: the gradient of each output that has one, in the dtype of the truth.
        differentiable: inputs whose gradients are wanted; gradients are computed in the dtype of the first of them.
    """

    inputs: Tensors
    truth: Tensors
    levels: Levels = field(default_factory=list)
    outputs: tuple[str, ...] = ("output",)
    grad_outputs: tuple[Tensor, ...] = ()
    differentiable: tuple[str, ...] = ()

    def to(self, device: str) -> Data:
        return Data(**tree_map_only(Tensor, lambda tensor: tensor.to(device), vars(self)))


#: The least any implementation must do, from which the floor is computed: amounts by the name of the rate that bounds
#: them (`measure.rates`). What has no rate on a device does not count there.
#:
#: - "bandwidth": bytes, every input read once and every output written once.
#: - "l1" or "l2": bytes of rows gathered from (or scattered to) the value tensor, by the cache that bounds them.
#: - "float32 matmul" or "bfloat16 matmul": multiplications and additions of matrix products.
#: - On a GPU, in place of the gather: "l2 bytes" to the multiprocessors, "l1 cycles" over all of them, "reductions"
#:   (sectors of 32 bytes that are added to in L2), "special functions" (exponentials, logarithms and reciprocals).
Work = dict[str, float]


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case.

    Attributes:
        name: as printed; the first implementation of a case is the one that ratios are about.
        call: takes what `adapt` returned; only this is timed. Returns a tensor or a tuple of them; or yields one
            result after the other, of which the timed call drops each before the next is made, as a model does.
        adapt: converts the inputs to the form that suits this implementation best (dtype, layout, index tensors);
            untimed.
        ours: this package's tolerance applies, not the peers'.
        unavailable: the reason why it cannot run here ("not installed"), or None.
        decode: converts the tensors that `call` returned to the form of the truth; untimed.
        counts_writes: whether its operations pass PyTorch's dispatcher one by one, so that what they write can be
            counted; compiled code's do not.
        counts_memory: whether the memory of a call is what its caller needs for it.
        one_setting: timed in the first allocator setting only.
        spec: the operator's own parameters.
    """

    name: str
    call: Callable[[dict[str, Any]], Any]
    adapt: Callable[[Tensors, Levels], dict[str, Any]]
    ours: bool = False
    unavailable: Callable[[], str | None] = lambda: None
    decode: Callable[[Sequence[Tensor], Data], Sequence[Tensor]] = lambda results, data: results
    counts_writes: bool = True
    counts_memory: bool = True
    one_setting: bool = False
    spec: Any = None


def _results(found: Any, collect: bool) -> tuple[Tensor, ...]:
    """The tensors of what a call returned. Of a call that yields, all with `collect`; otherwise none, each is dropped
    before the next is made."""
    if isinstance(found, Iterator):
        found = deque(found, None if collect else 0)
    return tuple(t for t in tree_leaves(found) if isinstance(t, Tensor))


@dataclass(frozen=True)
class Case:
    """One comparison: the same data through several implementations.

    Attributes:
        name: unique within the operator.
        data: the name of the data.
        direction: "forward" or "forward+backward".
        threads: CPU threads; None for all.
        memory: whether peak memory is measured too.
        headline: whether the case is drawn in the picture.
        full: measured with `--full` only.
        one_setting: timed in the first allocator setting only, unless with `--full`.
        build: makes the data; cases of one name of data have the same.
        spec: the operator's own parameters.
        images: in a call, where a rate is of interest.
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
    full: bool = False
    one_setting: bool = False
    build: Callable[[], Data] | None = None
    spec: Any = None
    images: int | None = None

    @property
    def backward(self) -> bool:
        return self.direction == "forward+backward"

    def bind(self, implementation: Implementation, data: Data) -> Callable[..., tuple[Tensor, ...]]:
        """A call that returns the outputs and, with backward, the gradients in order.

        It takes one argument, `collect=False`: whether the outputs of a call that yields them are kept and returned.
        """
        arguments = implementation.adapt(data.inputs, data.levels)
        wanted = data.differentiable if self.backward else ()  # nothing, too, where the call computes gradients itself
        leaves = [arguments[name].detach().requires_grad_() for name in wanted]
        arguments.update(zip(wanted, leaves, strict=True))
        grad_outputs = [gradient.to(leaves[0].dtype) for gradient in data.grad_outputs if leaves]

        def run(collect: bool = False) -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(bool(leaves)):
                outputs = _results(implementation.call(arguments), collect or bool(leaves))
            if not leaves:
                return outputs
            return (*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, grad_outputs))

        return run


@dataclass(frozen=True)
class Figure:
    """A figure with a target: a field of `Row` in the rows `above`, over that of `below` if there is one, must be at
    least `target`; with `at_most`, at most.

    Of several implementations the least value counts, so that a peer is represented by its best backend; with
    `of_fastest`, the value of the one that takes the least time. `target` has a bound for each allocator setting, in
    the order of `facts.SETTINGS`; None shows the figure without judging it, and a setting that it lacks is not shown.
    """

    case: str
    field: str
    above: tuple[str, ...]
    below: str | None
    label: str
    target: Sequence[float | None]
    of_fastest: bool = False
    at_most: bool = False


def ratio(
    case: str,
    field: str,
    above: str | Sequence[str],
    below: str | None,
    label: str,
    *target: float | None,
    **options: bool,
) -> Figure:
    """The figure of a case."""
    names = (above,) if isinstance(above, str) else tuple(above)
    return Figure(case, field, names, below, f"{case}: {label}", target, **options)


@dataclass(frozen=True)
class Verdict:
    """The result of a check: `right` if all results are within tolerance, and the largest relative errors."""

    right: bool
    output: float
    gradients: float | None = None


Check = Callable[[Case, Implementation, Data, Sequence[Tensor]], Verdict]


def missing(module: str) -> Callable[[], str | None]:
    """A function that says "not installed" where `module` cannot be found."""
    return lambda: None if importlib.util.find_spec(module) else "not installed"


def as_given(inputs: Tensors, levels: Levels) -> dict[str, Any]:
    """The inputs as they are, and the levels."""
    return inputs | {"levels": levels}


def matmul(case: Case) -> str:
    """The rate of matrix products that bounds a case."""
    return "bfloat16 matmul" if case.dtype == "bf16" else "float32 matmul"


def relative_l2(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth|| in float64; the norm itself where truth is zero.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != truth.shape:
        raise ValueError(f"expected shape {tuple(truth.shape)}; got {tuple(actual.shape)}")
    truth = truth.double()
    difference = (actual.to(truth.device).double() - truth).norm().item()
    return difference / (truth.norm().item() or 1)


def reference(
    operator: Callable[[dict[str, Any]], Tensor],
    inputs: Tensors,
    device: str,
    differentiable: Sequence[str] = (),
    grad_output: Tensor | None = None,
    by_query: Sequence[str] = (),
) -> Tensors:
    """The output of an operator's reference in fp64, and the gradients of the inputs that are differentiable, by name.

    They are stored as float32, which adds 6e-8 to an error at most.

    Args:
        operator: takes the inputs by name.
        inputs: of which those of floating point are converted.
        device: on which it is computed.
        grad_output: of the output.
        by_query: inputs with queries along dimension 1, as the output has. `REFERENCE_CHUNK` of them are evaluated at
            once: the fp64 intermediates then stay small.
    """
    exact = {k: t.to(device, torch.float64 if t.is_floating_point() else t.dtype) for k, t in inputs.items()}
    for name in differentiable:
        exact[name].requires_grad_()
    outputs, chunks = [], {name: exact[name].split(REFERENCE_CHUNK, 1) for name in by_query if name in exact}
    gradients = grad_output.split(REFERENCE_CHUNK, 1) if chunks else [grad_output]
    with m2f_kernels.use_backend("reference"), torch.set_grad_enabled(bool(differentiable)):
        for gradient, *parts in zip(gradients, *chunks.values(), strict=True):
            output = operator(exact | dict(zip(chunks, parts, strict=True)))
            if differentiable:
                output.backward(gradient.to(output))
            outputs.append(output.detach())
    truth = {"output": torch.cat(outputs, 1)} | {name: exact[name].grad for name in differentiable}
    return {name: tensor.float().cpu() for name, tensor in truth.items()}


def check_relative_l2(case: Case, implementation: Implementation, data: Data, results: Sequence[Tensor]) -> Verdict:
    """The verdict on the relative L2 error of each output and gradient."""
    names = (*data.outputs, *data.differentiable) if case.backward else data.outputs
    errors, right, slack = [], True, 1 if implementation.ours else PEER_SLACK
    for i, (name, actual) in enumerate(zip(names, results, strict=True)):
        truth = data.truth[name]
        errors.append(relative_l2(actual, truth))
        tolerance = slack * (OUTPUT_TOLERANCE if i < len(data.outputs) else GRADIENT_TOLERANCE)
        if results[0].dtype in (torch.bfloat16, torch.float16):
            rounding = 2 * relative_l2(truth.to(results[0].dtype), truth)
            tolerance = max(tolerance, rounding if implementation.ours else PEER_LOW_PRECISION_TOLERANCE)
        right &= errors[-1] <= tolerance
    outputs, gradients = errors[: len(data.outputs)], errors[len(data.outputs) :]
    return Verdict(right, max(outputs), max(gradients, default=None))


@dataclass(frozen=True)
class Benchmark:
    """Everything the runner needs to know about one operator.

    Attributes:
        op: name on the command line and of the files written.
        work: what the floor is computed from.
        quarters: dimensions of inputs, and of "grad_output", along which `shrink` leaves a quarter; and "levels".
        figures: the figures with targets, by device; of the usual shapes, not those of `--quick`.
        check: compares results, decoded, with the truth.
        operators: the package's operators that it measures, whose backends the report states; empty for `op` itself.
        budget_s: seconds of interleaved timing per case in a full run.
        long_ms: milliseconds from which on the call whose result was checked is itself a sample, and with `--full` one
            more is: full masks take half a minute where points take a third of a second, and it does not matter whether
                that is 90 or 92 times as long.
        cpu_time: times of one thread are CPU time, which other programs of the machine do not change.
        pictures: draws what bars do not show into a directory, and returns the names of the files.
        stages: milliseconds of the parts of a call, where an implementation that was just timed has any.
        peak: peak MiB of an implementation in a process that has just been started, where the general way of
            measuring it (`measure.memory`) does not fit.
    """

    op: str
    title: str
    description: str = ""
    cases: Callable[[Scale], list[Case]] = lambda scale: []
    work: Callable[[Case, Data], Work | None] = lambda case, data: None
    quarters: Mapping[str, Sequence[int]] = field(default_factory=dict)
    figures: Mapping[str, Sequence[Figure]] = field(default_factory=dict)
    check: Check = check_relative_l2
    operators: tuple[str, ...] = ()
    budget_s: float = 3.0
    long_ms: float = 10_000.0
    cpu_time: bool = False
    pictures: Callable[[Path, Sequence[Row]], list[str]] = lambda directory, rows: []
    stages: Callable[[Case, Implementation], dict[str, float]] = lambda case, implementation: {}
    peak: Callable[[Case, Implementation], float] | None = None

    def select(self, scale: Scale, only: str = "") -> list[Case]:
        """The cases that a run of this scale measures, whose names contain `only`."""
        return [case for case in self.cases(scale) if (scale.full or not case.full) and only in case.name]

    def data(self, scale: Scale) -> dict[str, Callable[[], Data]]:
        """The builders of the cases' data by name; a truth with gradients serves cases without, too."""
        made = sorted(self.cases(scale), key=lambda case: case.backward)
        return {case.data: case.build for case in made if case.build is not None}

    def shrink(self, data: Data) -> Data:
        """A smaller version of the data, to start threads and load code before peak memory is measured."""

        def few(name: str, x: Tensor) -> Tensor:
            for dim in self.quarters.get(name, ()):
                x = x.narrow(dim, 0, -(-x.shape[dim] // 4)).contiguous()
            return x

        levels = [(h // 4, w // 4) for h, w in data.levels] if "levels" in self.quarters else data.levels
        inputs = {name: few(name, x) for name, x in data.inputs.items()}
        return replace(data, inputs=inputs, levels=levels,
                       grad_outputs=tuple(few("grad_output", x) for x in data.grad_outputs))  # fmt: skip


@dataclass
class Row:
    """One line of the CSV: one implementation of one case under one allocator setting.

    Times in milliseconds (median and interquartile range of interleaved runs), memory in MiB, errors as the
    benchmark's check gives them. `subject_speedup` is this row's median over that of the case's first implementation.
    `stages` is "name=milliseconds" separated by ";", `kernels` the number of kernels that a call launches on a GPU,
    `run` "default", "full" (`--full`), or the name of an occasional measurement.
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
    written_mib: float | None = None
    stages: str = ""
    kernels: int | None = None
    ours: bool = False
    headline: bool = False
    run: str = "default"

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.case, self.implementation, self.setting

    @property
    def stage_ms(self) -> dict[str, float]:
        pairs = (part.rsplit("=", 1) for part in self.stages.split(";") if part)
        return {name: float(value) for name, value in pairs}

    @property
    def rest_ms(self) -> float:
        """Milliseconds of a call outside of its stages."""
        return max(0.0, self.median_ms - sum(self.stage_ms.values()))

    @classmethod
    def from_strings(cls, record: dict[str, str]) -> Row:
        """From a line of CSV; columns that an older one lacks have their defaults."""
        kinds: dict[str, Callable[[str], Any]] = {"str": str, "bool": "True".__eq__, "int": int, "float": float}
        values = {}
        for f in fields(cls):
            kind, _, optional = str(f.type).partition(" | ")
            if f.name in record:
                values[f.name] = None if optional and not record[f.name] else kinds[kind](record[f.name])
        return cls(**values)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """A CSV with the columns of the first line; floats with six digits."""
    lines = list(lines)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in x.items()} for x in lines)
