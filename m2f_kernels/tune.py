"""`python -m m2f_kernels.tune`: measure launch configurations of the Triton kernels on this GPU and keep the fastest.

Nothing is tuned unless this runs. It writes `m2f_kernels/tuned/sm_<capability>.json` (or into the directory in the
environment variable M2F_TUNED), which the next process uses. Nearly all of its time goes into compiling 1250
configurations. That comes first, in as many processes as there are CPU cores, into Triton's cache on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from m2f_kernels import _tuning
from m2f_kernels._tuning import Configuration
from m2f_kernels.ops.attention_mask import configs as mask_configs
from m2f_kernels.ops.masked_attention import configs as attention_configs

#: Keys of the level at stride 8 of a 1024 x 1024 image, heads, and channels of the mask features.
KEYS, HEADS, CHANNELS = 16384, 8, 256
_REPEATS = 20
_HEAD_START_CYCLES = 1_000_000
#: Largest relative difference from the default configuration's result: room for another order of additions only.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Problem:
    """One line of the table to find: a kernel, its key, what to try (the default first), and a call that uses it."""

    kernel: str
    key: str
    candidates: list[Configuration]
    run: Callable[[], tuple[Tensor, ...]]


def problems(device: torch.device) -> Iterator[Problem]:
    """Every kernel that has a table, for the sizes that models use."""
    g = torch.Generator(device).manual_seed(0)
    for dtype in _TOLERANCE:
        size = dtype.itemsize
        for q in (20, 100, 200):
            embed = torch.randn(1, q, CHANNELS, generator=g, device=device).to(dtype)
            features = torch.randn(1, CHANNELS, KEYS, generator=g, device=device).to(dtype)
            yield Problem(
                mask_configs.PREDICT,
                mask_configs.key(size, q),
                mask_configs.candidates(size, q),
                lambda e=embed, f=features: torch.ops.m2f.predict_attention_mask(e, f),  # type: ignore[misc]
            )
            bits, row_any = torch.ops.m2f.predict_attention_mask(embed, features)
            for d in (32, 64):
                shapes = ((q, HEADS, d), (KEYS, HEADS, d), (KEYS, HEADS, d))
                heads = [torch.randn(1, *s, generator=g, device=device).to(dtype).transpose(1, 2) for s in shapes]
                inputs = (*heads, bits, row_any)
                default = attention_configs.default_forward(size, q, d)
                key = attention_configs.key(size, q, d)
                yield Problem(
                    attention_configs.forward_name(),
                    key,
                    attention_configs.candidates(default),
                    lambda x=inputs, d=d: torch.ops.m2f.masked_attention(*x, d**-0.5),  # type: ignore[misc]
                )
                output, logsumexp = torch.ops.m2f.masked_attention(*inputs, d**-0.5)
                saved = (torch.ones_like(output), *inputs, output, logsumexp)
                default = attention_configs.default_backward(size, q, d)
                yield Problem(
                    attention_configs.BACKWARD,
                    key,
                    attention_configs.candidates(default),
                    lambda x=saved, d=d: torch.ops.m2f.masked_attention_backward(*x, d**-0.5),  # type: ignore[misc]
                )


def agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """True if two configurations computed the same, up to rounding; bits of masks up to one in a million."""
    for a, b in zip(found, expected, strict=True):
        if not a.dtype.is_floating_point:
            if int((a != b).sum()) > 1e-6 * a.numel() * 32 + 1:
                return False
        elif not bool((a.double() - b.double()).norm() <= _TOLERANCE.get(a.dtype, 1e-5) * b.double().norm()):
            return False
    return True


#: Candidates of the problem that has this place among `problems`.
Batch = tuple[int, list[Configuration]]


def batches(found: Iterator[Problem], size: int = 8) -> list[Batch]:
    """The kernels to compile, in parts of about `size`. `waves` is no argument of a kernel: one of each suffices."""
    parts = []
    for index, problem in enumerate(found):
        kernels = {tuple((k, v) for k, v in c.items() if k != "waves"): c for c in problem.candidates}
        candidates = list(kernels.values())
        parts += [(index, candidates[i : i + size]) for i in range(0, len(candidates), size)]
    return parts


def compile_batch(batch: Batch, device: str) -> None:
    """Call the operator with each of the candidates. A candidate that fails here is reported when it is measured."""
    index, candidates = batch
    problem = next(islice(problems(torch.device(device)), index, None))
    for candidate in candidates:
        # Whatever Triton raises: too much shared memory, an assembler that gives up. `fastest` meets it again.
        with _tuning.forced(problem.kernel, problem.key, candidate), contextlib.suppress(Exception):
            problem.run()


def compile_ahead(parts: Sequence[Batch], device: str, jobs: int, log: Callable[[str], None]) -> None:
    """Fill Triton's cache from `jobs` processes; without it the same is compiled later, one kernel after another."""
    total, done = sum(len(candidates) for _, candidates in parts), 0
    failures = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(compile_batch, part, device): len(part[1]) for part in parts}
        for future in as_completed(waiting):
            if error := future.exception():  # a process ran out of memory, or died with its compiler
                failures.append(f"{type(error).__name__}: {error}")
            else:
                done += waiting[future]
                log(f"tried {done} of {total} candidates")
    if failures:
        log(f"{total - done} candidates wait until they are measured: {failures[0]}")


def milliseconds(run: Callable[[], object]) -> float:
    """Median of several runs by the GPU's clock, with inputs in its cache where they fit, as they are in a model."""
    run()
    times = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_HEAD_START_CYCLES)  # so that launches are queued when the clock starts
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def fastest(
    problem: Problem, measure: Callable[[Callable[[], object]], float], log: Callable[[str], None]
) -> tuple[Configuration, bool]:
    """The fastest candidate, and True if all that ran agree with the default.

    A candidate that fails or gives another result is reported and left out.

    Raises:
        RuntimeError: the default itself does not run.
    """
    best, least, expected, right = problem.candidates[0], float("inf"), None, True
    name = f"{problem.kernel}, {problem.key}"
    for candidate in problem.candidates:
        with _tuning.forced(problem.kernel, problem.key, candidate):
            try:
                result = problem.run()
                time = measure(problem.run)
            except Exception as error:  # too much shared memory, an assembler that gives up: whatever Triton raises
                if expected is None:
                    raise RuntimeError(f"{name}: the default {candidate} does not run") from error
                log(f"{name}: {candidate} failed: {type(error).__name__}: left out")
                continue
        if expected is None:
            expected = result
        elif not agree(result, expected):
            right = False
            log(f"{name}: {candidate} gives another result: left out")
            continue
        if time < least:
            best, least = candidate, time
    log(f"{name}: {least:.3f} ms with {best}")
    return best, right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the table to write; default: the one that is used")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1; got {options.jobs}")
    if not torch.cuda.is_available():
        print("m2f_kernels.tune: expected a CUDA device to measure on; torch sees none", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    path = options.output or _tuning.DIRECTORY / f"sm_{capability}.json"
    compile_ahead(batches(problems(torch.device("cuda"))), "cuda", options.jobs, print)
    wrong = []
    for problem in problems(torch.device("cuda")):
        best, right = fastest(problem, milliseconds, print)
        if not right:
            wrong.append(f"{problem.kernel}, {problem.key}")
        _tuning.write_table(path, {problem.kernel: {problem.key: best}})
    print(f"written to {path}")
    if wrong:
        print(f"m2f_kernels.tune: candidates gave wrong results, a bug: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
