"""Microseconds that a kernel should take on an H200, from its machine code: no GPU is asked.

    python -m benchmarks.time_model                     # the kernels as they are, modelled
    python -m benchmarks.time_model --check             # beside the committed times of an H200, half of them held out

The model of one launch:

- *One warp alone.* The disassembly's longest path, with the case's trip counts, is walked in order: each instruction
  waits for the barriers that it names and issues; what it starts completes after the latency of its kind. This gives
  the cycles that a warp needs when nothing is in its way.
- *A multiprocessor.* As many blocks as registers and shared memory let in run at once, and queue for its schedulers
  (an instruction per cycle) and execution units: mean value analysis of a closed queueing network.
- *The device.* Rounds of such blocks follow each other; and never faster than device memory, L2 and its reductions
  allow for the bytes that the case moves.

Rates and latencies are of data sheets, published measurements and ceilings that benchmarks of this project measured;
none is fitted to a kernel's time. Tables call these times *modelled*.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import geometric_mean
from typing import Any

import torch

from benchmarks import inputs, sass, static, static_cuda
from benchmarks.arguments import arguments
from m2f_kernels import _tuning

_WARP = 32


@dataclass(frozen=True)
class Part:
    """A GPU. Rates are per second of the whole part, or per cycle of one multiprocessor."""

    name: str
    capability: int
    multiprocessors: int
    clock: float
    memory: float  # bytes
    l2: float  # bytes, to the multiprocessors
    reductions: float  # sectors of 32 bytes
    start: float  # seconds from a launch to its first instruction, and from its last to the next launch


#: Clock: data sheet (boost). Memory: a copy, by `benchmarks.measure` on that machine (benchmarks/results/nvidia-h200).
#: L2 and reductions: measured on the same machine, docs/gpu.md. Start: assumed, from no source.
H200 = Part("H200", 90, 132, 1.98e9, 4.228e12, 7.5e12, 110e9, 2.0e-6)

#: Cycles until a result is there, on sm_90, rounded from microbenchmarks (such as Luo et al. 2024, arXiv:2402.13499):
#: shared memory, L2, and device memory. A byte that the launch has read before is taken to hit L2.
SHARED_LATENCY, L2_LATENCY, MEMORY_LATENCY = 30, 260, 480
#: Matrix instructions and special functions likewise; what a barrier costs beyond waiting is assumed.
MATRIX_LATENCY, SPECIAL_LATENCY, BARRIER_LATENCY = 33, 24, 20
#: Threads per cycle and scheduler of the units that do fewer than 32 (CUDA programming guide, throughput of native
#: arithmetic instructions, compute capability 9.0, a quarter of a multiprocessor).
SLOW_UNITS = {"special": 4, "conversion": 4}
#: Multiplications and additions of half precision per cycle and multiprocessor: data sheet, 989 TFLOP/s at 1.83 GHz.
#: `mma.sync` reaches 0.62 of it (arXiv:2402.13499); TF32 is half as fast.
MATRIX_RATE, SYNCHRONOUS = 2048, 0.62


# ---------------------------------------------------------------- one warp

_CONTROL = re.compile(r"^(?P<wait>--|\d\d):(?P<read>[-\d]):(?P<write>[-\d]):(?P<yield>[-Y]):(?P<stall>[0-9a-f])\t")
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)|\.(16816|1688|884)\b")


@dataclass(frozen=True)
class Walk:
    """The work of one warp: cycles when it is alone, instructions, cycles of units, bytes requested from memory."""

    cycles: float
    instructions: int
    units: dict[str, float]
    requested: float


def _products(opcode: str) -> float:
    """Cycles of a multiprocessor's matrix units that one instruction of a warp takes."""
    found = _SHAPE.search(opcode)
    if not found:
        return 0.0
    if found[4]:
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "884": (8, 8, 4)}[found[4]]
        rate = MATRIX_RATE * SYNCHRONOUS
    else:  # four warps together
        m, n, k = int(found[1]) / 4, int(found[2]), int(found[3])
        rate = MATRIX_RATE
    return m * n * k / (rate / 2 if "TF32" in opcode else rate)


def _width(opcode: str) -> int:
    """Bytes per thread of an access."""
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", opcode)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4


@cache
def _decoded(line: str) -> tuple[int, str, str, int, str, str]:
    """The barriers that an instruction waits for, those of its reads and its result, its stall, opcode and kind."""
    control, found = _CONTROL.match(line), sass.opcodes(line)
    if control is None or not found:
        raise ValueError(f"trace: expected instructions with control codes; got {line!r}")
    wait = 0 if control["wait"] == "--" else int(control["wait"])
    return wait, control["read"], control["write"], int(control["stall"], 16), found[0], sass.kind_of(found[0])


def walk(trace: Sequence[str], memory_latency: float = MEMORY_LATENCY) -> Walk:
    """One warp's way through `trace`, lines with control codes, with nothing in its way."""
    ready = [0.0] * 6
    copies, groups, last_product, now, count, requested = [], [0.0], 0.0, 0.0, 0, 0.0
    units: dict[str, float] = {"matrix": 0.0, "shared": 0.0, "memory": 0.0, **dict.fromkeys(SLOW_UNITS, 0.0)}
    for line in trace:
        wait, read, write, stall, opcode, kind = _decoded(line)
        count += 1
        for barrier in range(6):
            if wait >> barrier & 1:
                now = max(now, ready[barrier])
        latency: float = SPECIAL_LATENCY
        if kind in ("load", "async copy", "atomic") and not opcode.startswith("LDGDEPBAR"):
            latency = memory_latency
            requested += _width(opcode) * _WARP if kind != "atomic" else 0
            units["memory"] += max(1.0, _width(opcode) / 4)
        elif kind == "shared":
            latency = SHARED_LATENCY
            units["shared"] += max(1.0, _width(opcode) / 4)
        elif kind == "matrix":
            latency = MATRIX_LATENCY
            units["matrix"] += _products(opcode)
        elif kind in SLOW_UNITS and not opcode.startswith("F2FP"):
            units[kind] += _WARP / SLOW_UNITS[kind]
        if opcode.startswith("LDGSTS"):
            copies.append(now + latency)
        elif opcode.startswith("LDGDEPBAR"):
            groups.append(max(copies, default=now))
            copies = []
        elif opcode.startswith("DEPBAR.LE"):
            pending = int(re.findall(r"0x([0-9a-f]+)", line)[-1], 16)
            if len(groups) > pending:
                now = max(now, groups[-1 - pending])
        elif "GMMA" in opcode:
            last_product = max(last_product, now) + 4 * _products(opcode) + (MATRIX_LATENCY if "gsb0" in line else 0)
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            now = max(now, last_product)
        elif kind == "barrier":
            now += BARRIER_LATENCY
        if write != "-":
            ready[int(write)] = max(ready[int(write)], now + latency)
        if read != "-":
            ready[int(read)] = max(ready[int(read)], now + BARRIER_LATENCY)
        now += max(stall, 1)
    return Walk(now, count, units, requested)


# ---------------------------------------------------------------- a launch


@dataclass(frozen=True)
class Traffic:
    """The memory traffic of a launch, if it does not follow from its tensors and loads.

    Attributes:
        memory: bytes of device memory.
        l2: bytes from L2 to the multiprocessors; None: what the warps ask for.
        wavefronts: cycles of a multiprocessor's L1, summed over all of them; None: by the width of the accesses.
        reductions: sectors added to in L2.
    """

    memory: float
    l2: float | None = None
    wavefronts: float | None = None
    reductions: float = 0.0


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and its launch."""

    name: str
    code: str
    trips: Sequence[int]
    warps: int
    registers: int
    shared: int
    blocks: int
    traffic: Traffic


@dataclass(frozen=True)
class Estimate:
    """Seconds, and the same by what each bound alone would take."""

    seconds: float
    bounds: dict[str, float] = field(default_factory=dict)

    @property
    def binding(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])


def cycles_together(waiting: float, demands: Sequence[float], warps: float) -> float:
    """Cycles until `warps` equal warps have ended that share units.

    Mean value analysis of a closed queueing network (Reiser and Lavenberg 1980): each warp waits for `waiting` cycles
    in all on its own, and asks each unit for the cycles in `demands`.
    """
    waiting = max(waiting, 0.0)
    lengths, whole = [0.0] * len(demands), max(1, math.ceil(warps))
    total = 0.0
    for n in range(1, whole + 1):
        stays = [d * (1 + length) for d, length in zip(demands, lengths, strict=True)]
        total = waiting + sum(stays)
        lengths = [n * stay / total for stay in stays]
    return total


def estimate(kernel: Kernel, part: Part = H200) -> Estimate:
    """The time of a launch."""
    trace = sass.longest_trace(kernel.code, kernel.trips)
    alone = walk(trace)
    requested = alone.requested * kernel.warps * kernel.blocks
    if requested:
        # The first access of a byte goes to device memory, the others find it in L2.
        fresh = min(1.0, kernel.traffic.memory / requested)
        alone = walk(trace, fresh * MEMORY_LATENCY + (1 - fresh) * L2_LATENCY)
    resident = max(1, sass.blocks_per_multiprocessor(part.capability, kernel.warps, kernel.registers, kernel.shared))
    share = math.ceil(kernel.blocks / part.multiprocessors)  # blocks of the busiest multiprocessor
    resident = min(resident, share)
    rounds = share / resident if share >= 4 * resident else math.ceil(share / resident)
    memory = alone.units["memory"]
    if kernel.traffic.wavefronts is not None:
        memory = kernel.traffic.wavefronts / (kernel.blocks * kernel.warps)
    # Cycles of one warp. A scheduler and its units serve a quarter of the warps; L1 and matrix units serve all.
    demands = {
        "instructions": float(alone.instructions),
        "matrix products": 4 * alone.units["matrix"],
        "L1 and shared memory": 4 * (alone.units["shared"] + memory),
        **{name: alone.units[name] for name in SLOW_UNITS},
    }
    warps = resident * kernel.warps / 4
    busy = rounds * cycles_together(alone.cycles - alone.instructions, list(demands.values()), warps) / part.clock
    cycles = {"latency": rounds * alone.cycles, **{name: rounds * warps * d for name, d in demands.items()}}
    bounds = {name: value / part.clock for name, value in cycles.items()}
    bounds["device memory"] = kernel.traffic.memory / part.memory
    bounds["L2"] = (requested if kernel.traffic.l2 is None else kernel.traffic.l2) / part.l2
    bounds["reductions"] = kernel.traffic.reductions / part.reductions
    return Estimate(max(busy, *bounds.values()) + part.start, bounds)


# ---------------------------------------------------------------- kernels of this project


def triton_kernels(
    function: Callable[..., object],
    arguments: Sequence[Any],
    trips: Callable[[str, dict[str, Any], int], Sequence[int]],
    traffic: dict[str, Traffic] | None = None,
) -> list[Kernel]:
    """Every kernel that a Triton operator launches, compiled for sm_90.

    Args:
        function: of an operator's `triton.py`.
        arguments: on the meta device.
        trips: of the loops, from the kernel's name, its arguments and the number of loops.
        traffic: by kernel; where missing, each tensor is moved once.
    """
    kernels = []
    for launch, compiled, _ in static.compiled_launches(function, arguments):
        name, code = launch.kernel.__name__, compiled.asm["sass"]
        tensors = {id(x): x for x in launch.arguments.values() if isinstance(x, torch.Tensor)}
        moved = Traffic(float(sum(x.numel() * x.element_size() for x in tensors.values())))
        registers, _ = static.resource_usage(compiled.asm["cubin"])
        kernels.append(
            Kernel(
                name, code, trips(name, launch.arguments, sass.loops(code)), launch.num_warps, registers,
                compiled.metadata.shared, math.prod(launch.grid), (traffic or {}).get(name, moved),
            )
        )  # fmt: skip
    return kernels


@dataclass(frozen=True)
class Gather:
    """The rows of one (position, head) that the encoder's samples touch, for N images.

    Attributes:
        corners: inside the levels.
        tile_rows: distinct ones of each 8 x 8 tile of queries and head, summed: what L1 has to fetch.
        pair_rows: distinct ones among two neighbouring queries' same corner, summed: what a quarter of a warp reads.
    """

    corners: int
    tile_rows: int
    pair_rows: int


@cache
def gather(where: str, heads: int = 8, points: int = 4, size: int = 1024, images: int = 2) -> Gather:
    """Counted from the coordinates of the benchmark: "local" or "random". One image is counted."""
    sizes = [(size // s, size // s) for s in (32, 16, 8)]
    locations = (
        inputs.local_locations(sizes, 1, heads, points)
        if where == "local"
        else inputs.random_locations(sizes, 1, sum(h * w for h, w in sizes), heads, points)
    )
    return touched(locations[0], sizes, images)


def touched(locations: torch.Tensor, sizes: Sequence[tuple[int, int]], images: int = 1) -> Gather:
    """Counted from an encoder's sampling locations [Q, H, L, P, 2] of one image, times `images`; Q is even."""
    queries, heads, _, points, _ = locations.shape
    tiles: list[torch.Tensor] = []
    for h, w in sizes:
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        tiles.append((y // 8 * -(-w // 8) + x // 8).flatten() + (int(tiles[-1].max()) + 1 if tiles else 0))
    place = (torch.cat(tiles)[:, None] * heads + torch.arange(heads))[:, :, None, None]  # a tile and a head
    corners = tile_rows = pair_rows = start = 0
    for level, (h, w) in enumerate(sizes):
        size = torch.tensor([w, h])
        pixels = (locations[:, :, level] * size - 0.5).floor().long()
        corner = pixels.unsqueeze(-2) + torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
        inside = ((corner >= 0) & (corner < size)).all(-1)  # [Q, H, P, 4]
        row = torch.where(inside, start + corner[..., 1] * w + corner[..., 0], -1)
        first, second = row.view(queries // 2, 2, heads, points, 4).unbind(1)
        corners += int(inside.sum())
        pair_rows += int((first >= 0).sum() + ((second >= 0) & (second != first)).sum())
        tile_rows += int(torch.unique((place * queries + row)[inside]).numel())
        start += h * w
    return Gather(corners * images, tile_rows * images, pair_rows * images)


# ---------------------------------------------------------------- what is modelled

#: Deformable attention: N = 2, 21504 queries, 8 heads of 32, three levels of four points.
_QUERIES, _HEADS, _SAMPLES = 21504, 8, 12
_TILES = _QUERIES // 64 * _HEADS * 2
#: The shared memory of a block, in bytes; the general kernel has a table besides.
_DEFORMABLE_TABLE, _DEFORMABLE_SHARED = 352, 32 * 256


def deformable(nvcc: str, where: str, instance: str) -> Launches:
    """The launch of a forward of deformable attention in the CUDA library, by what its name begins with; samples
    "local" or "random". Its loops: see `sass.COMPILED`."""
    touched = gather(where)
    (name,) = (name for name in sass.COMPILED if name.startswith(instance) and name.endswith("false>"))
    compiled = static_cuda.compiled(nvcc, "90", "ms_deform_attn/cuda_kernels.cu")
    (kernel,) = (kernel for kernel in compiled if kernel["kernel"].removeprefix("ms_deform_attn_") == name)
    element, sampling = (4, 4) if "<float" in name else (2, 2 if "true" in name else 4)
    pairs = _QUERIES * _HEADS * 2
    rows, samples = pairs * 32 * element, pairs * _SAMPLES * 3 * sampling  # as many positions as queries
    # A quarter of a warp reads 128 bytes, of fp32 in different banks; of bfloat16 two rows' 64 bytes in the same.
    waves = touched.corners if element == 4 else touched.pair_rows
    traffic = Traffic(2 * rows + samples, touched.tile_rows * 32 * element + rows + samples, waves)
    shared = _DEFORMABLE_SHARED + (0 if "lean" in name else _DEFORMABLE_TABLE)
    warps, trips = static_cuda.THREADS // _WARP, sass.COMPILED[name][0]
    code = static_cuda.control_codes(kernel["code"])
    return [Kernel(name, code, trips, warps, kernel["registers"], shared, _TILES, traffic)], 0


def _by_digits(a: dict[str, Any], count: int) -> list[int]:
    tiles = math.ceil(a["candidates"] / a["BLOCK"])
    between = min(15, 65535 // a["BLOCK"])  # two sums
    return [math.ceil(tiles / between), min(tiles, between)] * (count // 2) + [tiles]


#: Triton kernel -> the trip counts of its loops in the benchmarks' cases, from its arguments and the number of loops.
TRIPS: dict[str, Callable[[dict[str, Any], int], list[int]]] = {
    "_predict_kernel": lambda a, count: [math.ceil(a["C"] / a["BLOCK_C"])] + [0] * (count - 1),
    # The last is the one for values that are not finite; the backward first looks which tiles are attended to.
    "_forward_kernel": lambda a, count: [a["TILES"]] * max(1, count - 1) + [0] * (count > 1),
    "_keep_kernel": lambda a, count: [math.ceil(a["candidates"] / a["BLOCK"])] * count,
    "_keep_by_digits_kernel": _by_digits,
    # The fullest two cells of 64 pixels, at a point for five; and the fullest of 8 pixels (1.9 on average), of which
    # none is crowded.
    "_gather_backward_kernel": lambda a, count: [3] * count,
    "_gather_rows_kernel": lambda a, count: [2] + [0] * (count - 1),
}
TRIPS["_forward_lean_kernel"] = TRIPS["_backward_kernel"] = TRIPS["_forward_kernel"]


def _trips(name: str, arguments: dict[str, Any], count: int) -> list[int]:
    return TRIPS.get(name, lambda _, n: [1] * n)(arguments, count) if count else []


#: The kernels that an operator launches, and the number of PyTorch's, of which only the starts are modelled.
Launches = tuple[list[Kernel], int]


def masks(dtype: torch.dtype, side: int, layers: int, fills: bool = True) -> Launches:
    """Launches of the masks of `layers` per level, of an image of side * 4 pixels; with `fills`, one of flags for each
    mask, which otherwise the kernel that resizes fills."""
    from m2f_kernels.ops.attention_mask import triton as op

    sizes = [side // ratio for ratio in (8, 4, 2)]
    total = sum(size**2 for size in sizes)
    features, embed, resized = static.tensors(f"x[1,256,{side},{side}] x[1,100,256] x[1,256,{total}]", dtype)
    kernels = triton_kernels(
        op.resize_mask_features if fills else op.resize_mask_features_with_flags,
        (features, [size for size in sizes for _ in range(2)], *(() if fills else (3 * layers, 100))), _trips,
        {"_shrink_kernel": Traffic(float(256 * (side**2 + total) * dtype.itemsize))},
    )  # fmt: skip
    for level in resized.split([size**2 for size in sizes], 2):
        traffic = Traffic(float((level.numel() + embed.numel()) * dtype.itemsize + 100 * level.shape[2] // 8))
        kernels += layers * triton_kernels(
            op.predict_attention_mask, (embed, level), _trips, {"_predict_kernel": traffic}
        )
    return kernels, 3 * layers if fills else 0


def attention(
    dtype: torch.dtype, images: int, queries: int, change: dict[str, int] | None = None, kernel: str = "general"
) -> Launches:
    """Launches of a forward of masked attention over 128 x 128 keys, with another configuration if one is given."""
    from m2f_kernels.ops.masked_attention import configs
    from m2f_kernels.ops.masked_attention import triton as op

    query, key, _, bits, flags = static.attention_inputs(dtype, 32, queries, images)
    chosen, usual = partial(static.choosing, "masked_attention.configs"), configs.forward
    with chosen("KERNEL", kernel), chosen("forward", lambda *a: {**usual(*a), **(change or {})}):
        return triton_kernels(op.masked_attention, (query, key, key, bits, flags, 32**-0.5), _trips), 0


def points_kept(masks_: int = 100, selection: str = "histogram") -> Launches:
    """Launches of `uncertain_points` for 12544 points of masks of 256 x 256, by one of the kernels that select them."""
    from m2f_kernels.ops.points import triton_sampling as op

    given = static.given(f"f32[{masks_},256,256] i32[{masks_}] i64[1]", 0, 37632, 9408, 3136)
    with static.choosing("points.triton_sampling", "SELECTION", selection):
        return triton_kernels(op.uncertain_points, given(), _trips), 0


#: Launches of PyTorch that sort points: four of a sort (`launches.KERNELS`), bounds, and their search.
_SORTING = 6


def points_gradient(gathered: str = "single") -> Launches:
    """Launches of `point_sample`'s gradient: 256 channels of a 256 x 256 map, 12544 points anywhere. Of PyTorch's sort
    only the starts are modelled; loads count for all lanes, also where a pixel has no more points."""
    from m2f_kernels.ops.points import triton_sampling as op

    given = static.given("f32[1,256,12544] f32[1,12544,2]", 256, 256)
    with static.choosing("points.triton_sampling", "GATHER", gathered):
        return triton_kernels(op.point_sample_backward, given(), _trips), _SORTING


#: Microseconds of forwards with other configurations on an H200: benchmarks/results/nvidia-h200/configurations.txt.
#: (BLOCK_Q, BLOCK_K, warps, stages, waves) -> N=1 Q=100, N=2 Q=100, N=1 Q=200.
CONFIGURATIONS = {
    (128, 64, 4, 2, 2): (33.0, 55.1, 51.8),
    (64, 32, 4, 3, 2): (30.5, 52.0, 51.1),
    (128, 32, 4, 3, 2): (31.4, 54.5, 54.2),
    (64, 64, 4, 3, 2): (28.2, 48.6, 47.6),
    (64, 64, 4, 2, 4): (41.0, 66.0, 61.5),
    (64, 128, 4, 2, 2): (32.3, 53.1, 50.0),
}


def rows(nvcc: str | None) -> Iterator[tuple[str, float | None, Callable[[], Launches]]]:
    """Yields the name of each row, the microseconds that an H200 took (benchmarks/results/nvidia-h200.csv) unless it is
    newer, and what compiles its launches; without nvcc those of deformable attention are left out."""
    for where, *times in (("local", 131.2, 168.8), ("random", 140.4, 229.5)) if nvcc else ():
        for kind, kernel in (("", "forward_kernel"), (", lean", "forward_lean_kernel")):
            for dtype, element, time in zip(("bf16", "fp32"), ("__nv_bfloat16", "float"), times, strict=True):
                call = partial(deformable, nvcc, where, f"{kernel}<{element}, ")
                yield f"ms_deform_attn {dtype}, {where}{kind}", None if kind else time, call
    low, single, exact = torch.bfloat16, torch.float32, not _tuning.TF32X3
    for name, dtype, side, time in (
        ("masks of 9 layers, 1024², fp32", single, 256, 522.3),
        ("masks of 9 layers, 512², fp32", single, 128, 330.6),
        ("masks of 9 layers, 1024², bf16", low, 256, 114.3),
    ):
        yield name, time if dtype == low or exact else None, partial(masks, dtype, side, 3)
        yield f"{name}, flags at once", None, partial(masks, dtype, side, 3, fills=False)
    yield "masked_attention fp32", 218.4 if exact else None, partial(attention, single, 1, 100)
    yield "masked_attention bf16, N=1 Q=100, lean", None, partial(attention, low, 1, 100, kernel="lean")
    yield "uncertain_points, 100 masks", 706.6, points_kept
    yield "uncertain_points, 100 masks, by digits", None, partial(points_kept, selection="digits")
    for change, times in CONFIGURATIONS.items():
        settings = dict(zip(("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages", "waves"), change, strict=True))
        for (images, queries), time in zip(((1, 100), (2, 100), (1, 200)), times, strict=True):
            name = f"masked_attention bf16, N={images} Q={queries}, {change}"
            yield name, time, partial(attention, low, images, queries, settings)
    yield "point_sample backward", 162.4, points_gradient
    yield "point_sample backward, tiles", None, partial(points_gradient, "tiles")


# ---------------------------------------------------------------- how far to believe it


def verdict(name: str, chosen: Sequence[tuple[float, float]]) -> str:
    """Rank order and factor of (modelled, measured)."""
    from scipy.stats import spearmanr

    factors = sorted(modelled / measured for modelled, measured in chosen)
    return (
        f"{name}: {len(chosen)} rows, rank correlation {spearmanr(chosen).statistic:.2f}, modelled / measured "
        f"{geometric_mean(factors):.2f} on (geometric) average, {factors[0]:.2f} to {factors[-1]:.2f}"
    )


def main() -> int:
    options = arguments(
        __doc__,
        {
            "--check": {"action": "store_true", "help": "say how the model compares with the committed times"},
            "--select": {"default": "", "help": "only rows whose name contains this regular expression"},
        },
    )
    if os.environ.get("TRITON_INTERPRET") == "1":
        options.refuse("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    nvcc = static_cuda.compiler()
    if nvcc is None:
        print("time_model: no nvcc here: the kernels of the CUDA library are left out", file=sys.stderr)
    print("| call | modelled, µs | bound by | measured, µs | modelled / measured |\n|---|---:|---|---:|---:|")
    pairs = []
    for name, measured, launches in rows(nvcc):
        if re.search(options.select, name):
            kernels, others = launches()
            estimates = [estimate(kernel) for kernel in kernels]
            modelled = (sum(one.seconds for one in estimates) + others * H200.start) * 1e6
            binding = max(estimates, key=lambda one: one.seconds).binding
            pairs += [] if measured is None else [(modelled, measured)]
            shown = " | " if measured is None else f"{measured:.1f} | {modelled / measured:.2f}"
            print(f"| {name} | {modelled:.1f} | {binding} | {shown} |", flush=True)
    if options.check:
        print("\n" + verdict("even rows, by which the model was changed", pairs[::2]))
        print(verdict("odd rows, held out", pairs[1::2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
