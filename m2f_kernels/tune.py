"""Measure launch configurations of the Triton kernels on this GPU and write the fastest into its architecture's table.

    python -m m2f_kernels.tune --dtypes bfloat16 --queries 100 --head-dims 32

Opt-in, once per architecture: calls in production only read the table (`m2f_kernels/tuned/sm_90.json`, or the
directory that the environment variable M2F_TUNED names). What it has no line for runs with the heuristic default.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from m2f_kernels import _tuning
from m2f_kernels._tuning import Configuration, Table
from m2f_kernels.ops.attention_mask import configs as mask_configs
from m2f_kernels.ops.masked_attention import configs as attention_configs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = (mask_configs.PREDICT, attention_configs.FORWARD, attention_configs.BACKWARD)
HEADS, MASK_CHANNELS = 8, 256


@dataclass(frozen=True)
class Problem:
    """One line of the table to find.

    Attributes:
        kernel, key: the table's.
        candidates: what to measure, the heuristic default first.
        call: runs the operator and returns its results.
        bound: relative error that another configuration's results may have against the default's.
    """

    kernel: str
    key: str
    candidates: list[Configuration]
    call: Callable[[], tuple[Tensor, ...]]
    bound: float


@dataclass
class Outcome:
    """What tuning one problem found: times in microseconds, and configurations that cannot run or that are wrong."""

    best: Configuration
    time: float
    default_time: float
    failed: list[Configuration] = field(default_factory=list)
    wrong: list[Configuration] = field(default_factory=list)


def problems(
    kernels: Sequence[str], dtypes: Sequence[str], queries: Sequence[int], head_dims: Sequence[int], keys: int,
    device: torch.device,
) -> Iterator[Problem]:  # fmt: skip
    """Every line asked for, each made when its turn comes; one image."""
    for dtype in (DTYPES[name] for name in dtypes):
        for q in queries:
            if mask_configs.PREDICT in kernels:
                yield _predict_problem(dtype, q, keys, device)
            for d in head_dims:
                for kernel in KERNELS[1:]:
                    if kernel in kernels:
                        yield _attention_problem(kernel, dtype, q, d, keys, device)


def _predict_problem(dtype: torch.dtype, q: int, keys: int, device: torch.device) -> Problem:
    def integers(*shape: int) -> Tensor:
        # Their sums are exact in any order: bits must not differ at all.
        return torch.randint(-3, 4, shape, device=device).to(dtype)

    embed, features = integers(1, q, MASK_CHANNELS), integers(1, MASK_CHANNELS, keys)

    def call() -> tuple[Tensor, ...]:
        from m2f_kernels.ops.attention_mask import triton

        return triton.predict_attention_mask(embed, features)

    size = dtype.itemsize
    candidates = mask_configs.candidates(size, q)
    return Problem(mask_configs.PREDICT, mask_configs.key(size, q), candidates, call, 0.0)


def _attention_problem(kernel: str, dtype: torch.dtype, q: int, d: int, keys: int, device: torch.device) -> Problem:
    from m2f_kernels.masks import pack

    def heads(rows: int) -> Tensor:
        x = torch.randn(1, rows, HEADS * d, device=device).to(dtype)
        return x.unflatten(-1, (HEADS, d)).transpose(1, 2)

    query, key, value = heads(q), heads(keys), heads(keys)
    # A third of the keys, in a row: most tiles have some query of the block, as with the masks of a real image.
    start = torch.rand(q, 1, device=device) * (2 * keys / 3)
    position = torch.arange(keys, device=device)
    bits, row_any = pack(((position >= start) & (position < start + max(keys / 3, 1)))[None])
    scale, size = d**-0.5, dtype.itemsize
    forward = kernel == attention_configs.FORWARD

    def call() -> tuple[Tensor, ...]:
        from m2f_kernels.ops.masked_attention import triton

        if forward:
            return triton.masked_attention(query, key, value, bits, row_any, scale)
        return triton.masked_attention_backward(grad, query, key, value, bits, row_any, *saved, scale)

    if not forward:
        from m2f_kernels.ops.masked_attention import triton

        saved = triton.masked_attention(query, key, value, bits, row_any, scale)
        grad = torch.randn_like(saved[0])
    enumerate_ = attention_configs.candidates_forward if forward else attention_configs.candidates_backward
    bound = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    return Problem(kernel, attention_configs.key(size, q, d), enumerate_(size, q, d), call, bound)


def milliseconds(call: Callable[[], object], repetitions: int = 30) -> float:
    """Median time of a call on the device, after a warm-up."""
    for _ in range(5):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def agrees(results: Sequence[Tensor], expected: Sequence[Tensor], bound: float) -> bool:
    """Whether results are those of the default configuration: integers exactly, others up to a relative error."""
    for x, y in zip(results, expected, strict=True):
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return False
        elif not bool((x.double() - y.double()).norm() <= bound * y.double().norm()):  # NaN does not agree
            return False
    return True


def tune(
    problem: Problem,
    time: Callable[[Callable[[], object]], float] = milliseconds,
    refused: tuple[type[Exception], ...] = (),
) -> Outcome:
    """Measure every candidate; one that raises `refused` cannot run here, one whose results differ is wrong.

    Raises:
        whatever the default configuration raises: there is nothing to compare with then.
    """
    default = problem.candidates[0]
    with _tuning.forced(problem.kernel, problem.key, default):
        expected = problem.call()
        outcome = Outcome(default, *[1e3 * time(problem.call)] * 2)
    for candidate in problem.candidates[1:]:
        with _tuning.forced(problem.kernel, problem.key, candidate):
            try:
                results = problem.call()
            except refused:
                outcome.failed.append(candidate)
                continue
            if not agrees(results, expected, problem.bound):
                outcome.wrong.append(candidate)
                continue
            taken = 1e3 * time(problem.call)
        if taken < outcome.time:
            outcome.best, outcome.time = candidate, taken
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if some configuration gave wrong results; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--queries", nargs="+", type=int, default=[100])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[32])
    parser.add_argument("--keys", type=int, default=16384)
    parser.add_argument("--directory", type=Path, default=_tuning.DIRECTORY, help="of the tables")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("m2f_kernels.tune: expected a CUDA device to measure on; none is visible", file=sys.stderr)
        return 2
    from triton.runtime.errors import OutOfResources, PTXASError

    major, minor = torch.cuda.get_device_capability()
    path = options.directory / f"sm_{10 * major + minor}.json"
    wrong = False
    asked = (options.kernels, options.dtypes, options.queries, options.head_dims, options.keys)
    for problem in problems(*asked, device=torch.device("cuda")):
        outcome = tune(problem, refused=(OutOfResources, PTXASError))
        table: Table = {problem.kernel: {problem.key: outcome.best}}
        _tuning.write_table(path, table)
        print(
            f"{problem.kernel}, {problem.key}: {outcome.time:.1f} us, default {outcome.default_time:.1f} us, "
            f"{len(problem.candidates)} candidates, {len(outcome.failed)} cannot run here: {outcome.best}"
        )
        for configuration in outcome.wrong:
            wrong = True
            print(f"m2f_kernels.tune: {problem.kernel}, {problem.key}: wrong with {configuration}", file=sys.stderr)
    print(f"written to {path}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
