"""Peak rates of this machine, measured in the same run: they give the floor under every time.

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

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import timing
from benchmarks.cases import Work

Floors = dict[str, float]

_ROW_FLOATS = 32
_ROW_BYTES = 4 * _ROW_FLOATS
_BAG, _LOOKUPS = 256, 1 << 20
_REPEATS = 7
_SECONDS = 0.2
#: Used where the system does not say.
_DEFAULT_CACHES = {"l1": 32 << 10, "l2": 512 << 10, "l3": 16 << 20}


def part_rates(name: str) -> Floors:
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
        if (cache / "type").read_text().strip() == "Instruction":
            continue
        text = (cache / "size").read_text().strip()
        level = "l" + (cache / "level").read_text().strip()
        sizes[level] = int(text.rstrip("KM")) << (20 if text.endswith("M") else 10)
    return sizes


def _least_seconds(run: Callable[[], Any], device: str) -> float:
    run()
    once, samples, start = timing.timer(device), [], time.perf_counter()
    while len(samples) < _REPEATS or time.perf_counter() - start < _SECONDS:
        samples.append(once(run)[0] / 1e3)
    return min(samples)


def bandwidth(device: str, megabytes: int) -> float:
    """Bytes per second to and from memory."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.zeros_like(source)
    copied = 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device)
    read = source.nbytes / _least_seconds(source.sum, device)
    return max(copied, read)


def gather_rate(device: str, table_bytes: int) -> float:
    """Bytes of rows per second, gathered at random from a table of the given size by all threads."""
    rows = max(1, table_bytes // _ROW_BYTES)
    table = torch.ones(rows, _ROW_FLOATS, device=device)
    indices = torch.randint(rows, (_LOOKUPS // _BAG, _BAG), dtype=torch.int32, device=device)
    with torch.no_grad():
        seconds = _least_seconds(lambda: F.embedding_bag(indices, table, mode="sum"), device)
    return _LOOKUPS * _ROW_BYTES / seconds


def matmul_rate(device: str, side: int, dtype: torch.dtype) -> float:
    """Multiplications and additions per second of a product of two square matrices."""
    # Not ones: a GPU multiplies constants faster than numbers, since fewer of its wires change.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * side**3 / _least_seconds(lambda: torch.mm(left, right, out=product), device)


def measure_all(device: str, counts: set[int], quick: bool) -> dict[str, Floors]:
    """The rates of `measure` by number of threads."""
    usual, rates, best = torch.get_num_threads(), {}, Floors()
    for count in sorted(counts):
        torch.set_num_threads(count)
        best = {name: max(rate, best.get(name, 0.0)) for name, rate in measure(device, quick).items()}
        rates[str(count)] = best
    torch.set_num_threads(usual)
    return rates


def measure(device: str, quick: bool) -> Floors:
    """Rates in bytes per second: "bandwidth", and on a CPU of the gather "l1", "l2", "l3" and "memory", on a GPU
    `part_rates`; in operations per second: "float32 matmul" and "bfloat16 matmul"."""
    if device == "cuda":
        side, found = 8192, {"bandwidth": bandwidth(device, 1024)} | part_rates(torch.cuda.get_device_name())
    else:
        side, large = (1024, 128) if quick else (2048, 256)
        tables = {level: size // 2 for level, size in cache_sizes().items()} | {"memory": large << 20}
        found = {"bandwidth": bandwidth(device, large)}
        found |= {level: gather_rate(device, size) for level, size in tables.items()}
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return found | {f"{name} matmul": matmul_rate(device, side, dtype) for name, dtype in dtypes.items()}


def floor(work: Work, rates: Floors) -> tuple[float, str]:
    """The floor time in milliseconds, and what bounds it."""
    milliseconds, name = max((amount / rates[name] * 1e3, name) for name, amount in work.items() if name in rates)
    return milliseconds, f"{name} gather" if name in ("l1", "l2") else name
