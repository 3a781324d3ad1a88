"""Measures times of calls in turn, peak memory, bytes written, and the rates that give the floor under a time.

Times: A B C A B C ..., medians and interquartile ranges, in milliseconds. Interleaving spreads whatever else the
machine does over all implementations alike, which a ratio needs more than a small variance. CPU: `time.perf_counter`.
CUDA: events; before every run the L2 cache is overwritten and the GPU kept waiting for twice the time that the CPU
needs to launch the run, so that all are measured by what the GPU does. A run that waits for the GPU itself, or takes
the CPU more than `_LONGEST_LAUNCH_S`, gets no such start: it is measured from an idle GPU to its end, as a user meets
it. The result of a run is freed after the clock stops.

Rates of this machine, measured in the same run:

- bandwidth: the better of copying a buffer (bytes read + bytes written) and summing it (bytes read), over all cores,
  from buffers many times the last-level cache.
- gather rate: `embedding_bag(mode="sum")` over 128-byte rows (32 floats, one head of one pixel) at uniformly random
  indices, from a table that fills half of L1, of L2 or of the last-level cache, or exceeds them all. It reads rows
  and adds them, and writes one row in 256: a hand-vectorised loop in PyTorch, so a rate that
  code can really reach, not a data sheet's. Only the bytes of the rows are counted.
- matrix products: `torch.mm` of large square matrices in float32 and bfloat16 with the same number of threads, 2 n^3
  operations each; float32 in IEEE precision, PyTorch's default.

The least time of many runs counts, since a floor is about the hardware, not about its neighbours; a rate with more
threads is never below the one with fewer.

On a GPU `embedding_bag` saturates no cache. There floors are counted from the case's coordinates and sizes: bytes from
L2, cycles of L1, reductions in L2, special functions, over the rates of the part (`benchmarks/tools/time_model.py` has
them with their sources), which are known for the H200 only. Elsewhere these have no floor.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAX_ROUNDS = 50
#: The call whose result was checked before has warmed up a run that takes this long.
WARM_MS = 200.0
#: Of a run that takes this long, the checked call is itself a sample; a benchmark may set less (`Benchmark.long_ms`).
LONG_MS = 10_000.0
_L2_FLUSH_BYTES = 256 << 20
_CYCLES_PER_S = 2.0e9  # about
_LONGEST_LAUNCH_S = 0.010
_SHORTEST_START_S = 0.001

# ---------------------------------------------------------------- times


@dataclass(frozen=True)
class Plan:
    """The number of timed calls of a case.

    Its runs are timed in rounds until `budget_s` seconds have passed: at least `min_rounds`, at most `MAX_ROUNDS`.
    A run that takes longer than `long_ms` is called `long_calls` times more after the call whose result was checked.
    """

    budget_s: float
    min_rounds: int
    long_calls: int = 0
    long_ms: float = LONG_MS


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range in milliseconds; minor page faults per run (CPU) as a median."""

    median_ms: float
    iqr_ms: float
    rounds: int
    page_faults: float | None


def head_start(run: Callable[[], Any]) -> float:
    """Seconds that the GPU is kept waiting before a run; the run is called while the GPU is busy for longer."""
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2 * _LONGEST_LAUNCH_S * _CYCLES_PER_S))
    start = time.perf_counter()
    _result = run()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return 0.0 if seconds > _LONGEST_LAUNCH_S else max(2 * seconds, _SHORTEST_START_S)


def timer(device: str, clock: Callable[[], float] = time.perf_counter) -> Callable[..., tuple[float, float]]:
    """A function that gives the milliseconds and the page faults (NaN on a GPU) of one call of a run, which on a GPU
    starts after the seconds given."""

    def on_cpu(run: Callable[[], Any], start_s: float = 0.0) -> tuple[float, float]:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = clock()
        _result = run()
        elapsed = clock() - start
        return elapsed * 1e3, float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)

    def on_gpu(run: Callable[[], Any], start_s: float = 0.0) -> tuple[float, float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda._sleep(int(start_s * _CYCLES_PER_S))
        start.record()
        _result = run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), math.nan

    if device == "cpu":
        return on_cpu
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device)
    return on_gpu


def interleaved(
    runs: Sequence[Callable[[], Any]],
    device: str,
    plan: Plan,
    checked_ms: Sequence[float] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time several runs in turn.

    Args:
        runs: each is called once per round, in order.
        device: "cpu" or "cuda".
        plan: how often.
        checked_ms: what each run took when its result was checked; without it, every run is warmed up.
        clock: of the CPU's timing.
    """
    once, starts = timer(device, clock), [0.0] * len(runs)
    known = checked_ms or [0.0] * len(runs)
    samples: list[list[tuple[float, float]]] = [[] for _ in runs]
    for i, (run, before) in enumerate(zip(runs, known, strict=True)):
        if before > plan.long_ms:
            samples[i].append((before, math.nan))
        elif before < WARM_MS:
            once(run)
            starts[i] = head_start(run) if device == "cuda" else 0.0
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < plan.min_rounds or (rounds < MAX_ROUNDS and time.perf_counter() - start < plan.budget_s):
            for run, before, taken, start_s in zip(runs, known, samples, starts, strict=True):
                if before <= plan.long_ms or len(taken) <= plan.long_calls:
                    taken.append(once(run, start_s))
            rounds += 1
    finally:
        gc.enable()
    return [_summarise(taken) for taken in samples]


def _summarise(taken: list[tuple[float, float]]) -> Timing:
    times = [milliseconds for milliseconds, _ in taken]
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    faults = [count for _, count in taken if not math.isnan(count)]
    return Timing(quartiles[1], quartiles[2] - quartiles[0], len(times), statistics.median(faults) if faults else None)


# ---------------------------------------------------------------- memory

MIB = 1 << 20
#: MiB that the kernel's page accounting and newly touched code pages may add.
RESOLUTION_MIB = 1.0


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among `tensors`."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def memory(run: Callable[[], Any], inputs: Iterable[Any], device: str) -> tuple[float, float]:
    """The extra and the total MiB of one call, by its peak.

    CPU: the kernel's own peak of the resident set (`VmHWM` in /proc/self/status). One fresh process per measurement;
    a small call first starts threads and loads code; `malloc_trim` returns what is free; writing 5 to
    /proc/self/clear_refs resets the peak to the present; then the call runs once. glibc's mmap threshold is fixed
    (`m2f_model.bench.ENVIRONMENT`), so that a freed tensor leaves the resident set at once and the peak is that of live
    memory, not of the allocator's cache. `calibration` measures a known temporary by the same steps.

    CUDA: `torch.cuda.max_memory_allocated`, the peak of live tensors in the caching allocator.

    Both give: extra = peak - memory before the call - outputs, and total = inputs + outputs + extra. The outputs of
    forward + backward are the output and the gradients. A call that yields its results and has them dropped one by one
    has no outputs: its extra memory is all that it needs above its inputs.

    Raises:
        OSError: on CPU, where the system has no resettable peak (anything but Linux).
    """
    from m2f_model import bench  # which needs more than those do who count bytes

    peak, results = bench.peak_mib(run, device)
    outputs = bytes_of(results) / MIB
    extra = max(0.0, peak - outputs)
    return extra, bytes_of(inputs) / MIB + outputs + extra


def calibration() -> Iterator[float]:
    """Yields the extra memory measured, in MiB, of a call that needs exactly 64 MiB beside its 16 MiB output."""

    def known(mib: int = 64) -> tuple[Tensor, ...]:
        temporary = torch.ones(mib * MIB // 4)
        return (temporary[: mib * MIB // 16] + 1,)

    known(1)  # loads code
    yield memory(known, (), "cpu")[0]


class Operations(TorchDispatchMode):
    """Counts, under `with`, operations that neither make a view nor leave memory uninitialised, and bytes they write:
    outputs and temporaries alike, but not what an operator writes within itself.

    Attributes:
        names: of the operations, in order.
        written: bytes of their results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema, name = func._schema, func.overloadpacket.__name__
        view = not schema.is_mutable and any(a.alias_info is not None for a in schema.arguments)
        if not (view or "empty" in name or name in ("detach", "_unsafe_view")):
            self.names.append(schema.name)
            self.written += bytes_of(tree_leaves(result))
        return result


def written(run: Callable[[], tuple[Tensor, ...]], count: bool = True) -> tuple[tuple[Tensor, ...], float | None]:
    """The result of `run()` and the MiB that it wrote; None in place of these if `count` is False."""
    with Operations() if count else nullcontext() as operations:
        result = run()
    return result, operations and operations.written / MIB


# ---------------------------------------------------------------- rates

#: By name; bytes or operations per second.
Rates = dict[str, float]

_ROW_FLOATS = 32
_ROW_BYTES = 4 * _ROW_FLOATS
_BAG, _LOOKUPS = 256, 1 << 20
_REPEATS = 7
_SECONDS = 0.2
#: Used where the system does not say.
_DEFAULT_CACHES = {"l1": 32 << 10, "l2": 512 << 10, "l3": 16 << 20}


def part_rates(name: str) -> Rates:
    """Rates of a GPU by its name: bytes from L2, cycles of all L1s, sectors added to in L2, special functions; {} if it
    is not known."""
    from benchmarks.tools.time_model import H200, SLOW_UNITS

    if H200.name not in name:
        return {}
    cycles = H200.multiprocessors * H200.clock
    special = 4 * SLOW_UNITS["special"] * cycles
    return {"l2 bytes": H200.l2, "l1 cycles": cycles, "reductions": H200.reductions, "special functions": special}


def cache_sizes() -> dict[str, int]:
    """Bytes of the caches of a core (l1, l2) or the chip (l3)."""
    sizes = dict(_DEFAULT_CACHES)
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size, kind = ((cache / name).read_text().strip() for name in ("level", "size", "type"))
        if kind != "Instruction":
            sizes[f"l{level}"] = int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)
    return sizes


def _least_seconds(run: Callable[[], Any], device: str) -> float:
    run()
    once, samples, start = timer(device), [], time.perf_counter()
    while len(samples) < _REPEATS or time.perf_counter() - start < _SECONDS:
        samples.append(once(run)[0] / 1e3)
    return min(samples)


def bandwidth(device: str, megabytes: int) -> float:
    """Bytes per second to and from memory."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.zeros_like(source)
    copied = 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device)
    return max(copied, source.nbytes / _least_seconds(source.sum, device))


def gather_rate(table_bytes: int) -> float:
    """Bytes of rows per second, gathered at random on a CPU from a table of the given size by all threads."""
    table = torch.ones(max(1, table_bytes // _ROW_BYTES), _ROW_FLOATS)
    indices = torch.randint(len(table), (_LOOKUPS // _BAG, _BAG), dtype=torch.int32)
    with torch.no_grad():
        seconds = _least_seconds(lambda: F.embedding_bag(indices, table, mode="sum"), "cpu")
    return _LOOKUPS * _ROW_BYTES / seconds


def matmul_rate(device: str, side: int, dtype: torch.dtype) -> float:
    """Multiplications and additions per second of a product of two square matrices."""
    # Not ones: a GPU multiplies constants faster than numbers, since fewer of its wires change.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * side**3 / _least_seconds(lambda: torch.mm(left, right, out=product), device)


def rates(device: str, quick: bool) -> Rates:
    """Rates in bytes per second: "bandwidth", and on a CPU of the gather "l1", "l2", "l3" and "memory", on a GPU
    `part_rates`; in operations per second: "float32 matmul" and "bfloat16 matmul"."""
    if device == "cuda":
        side, found = 8192, {"bandwidth": bandwidth(device, 1024)} | part_rates(torch.cuda.get_device_name())
    else:
        side, large = (1024, 128) if quick else (2048, 256)
        tables = {level: size // 2 for level, size in cache_sizes().items()} | {"memory": large << 20}
        found = {"bandwidth": bandwidth(device, large)} | {x: gather_rate(size) for x, size in tables.items()}
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return found | {f"{name} matmul": matmul_rate(device, side, dtype) for name, dtype in dtypes.items()}


def rates_by_threads(device: str, counts: set[int], quick: bool) -> dict[str, Rates]:
    """The rates with each number of threads."""
    usual, found, best = torch.get_num_threads(), {}, Rates()
    for count in sorted(counts):
        torch.set_num_threads(count)
        best = {name: max(rate, best.get(name, 0.0)) for name, rate in rates(device, quick).items()}
        found[str(count)] = best
    torch.set_num_threads(usual)
    return found


def floor(work: dict[str, float], rates: Rates) -> tuple[float, str]:
    """The floor time in milliseconds, and what bounds it."""
    milliseconds, name = max((amount / rates[name] * 1e3, name) for name, amount in work.items() if name in rates)
    return milliseconds, f"{name} gather" if name in ("l1", "l2") else name
