"""Microseconds that a kernel should take on an H200, from its machine code: no GPU is asked.

    python -m benchmarks.time_model                     # the kernels as they are, modelled
    python -m benchmarks.time_model --check             # beside the committed times of an H200, half of them held out

The model of one launch:

- *One warp alone.* The disassembly's longest path, with the case's trip counts, is walked in order: each instruction
  waits for the barriers that it names and issues; what it starts completes after the latency of its kind. This gives
  the cycles that a warp needs when nothing is in its way.
- *A multiprocessor.* As many blocks as registers and shared memory let in run at once, and queue for its schedulers
  (an instruction per cycle) and execution units: mean value analysis of a closed queueing network.
- *The device.* Rounds of such blocks follow each other; and never faster than device memory and L2 allow
  for the bytes that the case moves.

Rates and latencies are of data sheets, published measurements and ceilings that benchmarks of this project measured;
none is fitted to a kernel's time. Tables call these times *modelled*.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from statistics import geometric_mean
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks import arguments, inputs, measure, sass, static, static_cuda
from m2f_kernels import _tuning

_WARP = 32
#: The GPU that is modelled. Rates are per second of the whole part.
H200 = SimpleNamespace(
    name="H200",
    capability=90,
    multiprocessors=132,
    clock=1.98e9,  # data sheet (boost)
    memory=4.228e12,  # bytes of a copy, by `benchmarks.measure` on that machine (benchmarks/results/nvidia-h200)
    l2=7.5e12,  # bytes to the multiprocessors, measured on the same machine, docs/gpu.md
    reductions=110e9,  # sectors of 32 bytes, likewise
    start=2.0e-6,  # seconds from a launch to its first instruction, and from its last to the next launch: assumed
)
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

_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)|\.(16816|1688|884)\b")
#: Of `mma.sync`, which a warp executes by itself.
_SYNCHRONOUS_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "884": (8, 8, 4)}
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_MEMORY = ("load", "async copy", "atomic")


class Walk(NamedTuple):
    """The work of one warp: cycles when it is alone, instructions, cycles of units, bytes requested from memory."""

    cycles: float
    instructions: int
    units: Counter[str]
    requested: float


def _products(opcode: str) -> float:
    """Cycles of a multiprocessor's matrix units that one instruction of a warp takes."""
    found, rate = _SHAPE.search(opcode), MATRIX_RATE / 2 if "TF32" in opcode else MATRIX_RATE
    if not found:
        return 0.0
    if found[4]:
        return math.prod(_SYNCHRONOUS_SHAPES[found[4]]) / (rate * SYNCHRONOUS)
    return int(found[1]) / 4 * int(found[2]) * int(found[3]) / rate  # of four warps together


def _width(opcode: str) -> int:
    """Bytes per thread of an access."""
    found = re.search(rf"\.({'|'.join(_BYTES)})\b", opcode)
    return _BYTES[found[1]] if found else 4


def walk(trace: Sequence[sass.Instruction], memory_latency: float = MEMORY_LATENCY) -> Walk:
    """One warp's way through instructions that have control codes, with nothing in its way."""
    latencies = {"shared": SHARED_LATENCY, "matrix": MATRIX_LATENCY, **dict.fromkeys(_MEMORY, memory_latency)}
    ready, copies, groups, units = [0.0] * 6, [], [0.0], Counter[str]()
    now = last_product = requested = 0.0
    for x in trace:
        opcode = x["opcode"]
        # One that groups copies is no load; one that packs bfloat16 does not take the unit of conversions.
        kind = "other" if opcode.startswith(("LDGDEPBAR", "F2FP")) else sass.kind_of(opcode)
        waits = int(x["wait"].replace("--", "0"))
        now = max([now, *(at for barrier, at in enumerate(ready) if waits >> barrier & 1)])
        latency = latencies.get(kind, SPECIAL_LATENCY)
        if kind in _MEMORY:
            requested += _width(opcode) * _WARP if kind != "atomic" else 0
            units["memory"] += max(1.0, _width(opcode) / 4)
        elif kind == "shared":
            units["shared"] += max(1.0, _width(opcode) / 4)
        elif kind == "matrix":
            units["matrix"] += _products(opcode)
        elif kind in SLOW_UNITS:
            units[kind] += _WARP / SLOW_UNITS[kind]
        if opcode.startswith("LDGSTS"):
            copies.append(now + latency)
        elif opcode.startswith("LDGDEPBAR"):
            groups.append(max(copies, default=now))
            copies = []
        elif opcode.startswith("DEPBAR.LE"):
            pending = int(re.findall(r"0x([0-9a-f]+)", x["operands"])[-1], 16)
            if len(groups) > pending:
                now = max(now, groups[-1 - pending])
        elif "GMMA" in opcode:
            drained = MATRIX_LATENCY if "gsb0" in x["operands"] else 0
            last_product = max(last_product, now) + 4 * _products(opcode) + drained
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            now = max(now, last_product)
        elif kind == "barrier":
            now += BARRIER_LATENCY
        for barrier, at in ((x["write"], now + latency), (x["read"], now + BARRIER_LATENCY)):
            if barrier != "-":
                ready[int(barrier)] = max(ready[int(barrier)], at)
        now += max(int(x["stall"], 16), 1)
    return Walk(now, len(trace), units, requested)


# ---------------------------------------------------------------- a launch


class Traffic(NamedTuple):
    """The memory traffic of a launch, if it does not follow from its tensors and loads.

    Attributes:
        memory: bytes of device memory.
        l2: bytes from L2 to the multiprocessors; None: what the warps ask for.
        wavefronts: cycles of a multiprocessor's L1, summed over all of them; None: by the width of the accesses.
    """

    memory: float
    l2: float | None = None
    wavefronts: float | None = None


class Kernel(NamedTuple):
    """A compiled kernel and its launch."""

    code: str
    trips: sass.Trips
    warps: int
    registers: int
    shared: int
    blocks: int
    traffic: Traffic


class Estimate(NamedTuple):
    """Seconds, and the name of the bound that alone would take the longest."""

    seconds: float
    binding: str


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


def estimate(kernel: Kernel) -> Estimate:
    """The time of a launch."""
    trace, traffic = sass.longest_trace(kernel.code, kernel.trips), kernel.traffic
    requested = walk(trace).requested * kernel.warps * kernel.blocks
    # The first access of a byte goes to device memory, the others find it in L2.
    fresh = min(1.0, traffic.memory / requested) if requested else 1.0
    alone = walk(trace, fresh * MEMORY_LATENCY + (1 - fresh) * L2_LATENCY)
    resident = max(1, sass.blocks_per_multiprocessor(H200.capability, kernel.warps, kernel.registers, kernel.shared))
    share = math.ceil(kernel.blocks / H200.multiprocessors)  # blocks of the busiest multiprocessor
    resident = min(resident, share)
    rounds = share / resident if share >= 4 * resident else math.ceil(share / resident)
    accesses = alone.units["memory"]
    if traffic.wavefronts is not None:
        accesses = traffic.wavefronts / (kernel.blocks * kernel.warps)
    # Cycles of one warp. A scheduler and its units serve a quarter of the warps; L1 and matrix units serve all.
    demands = {
        "instructions": float(alone.instructions),
        "matrix products": 4 * alone.units["matrix"],
        "L1 and shared memory": 4 * (alone.units["shared"] + accesses),
        **{name: alone.units[name] for name in SLOW_UNITS},
    }
    warps = resident * kernel.warps / 4
    busy = rounds * cycles_together(alone.cycles - alone.instructions, list(demands.values()), warps) / H200.clock
    cycles = {"latency": rounds * alone.cycles, **{name: rounds * warps * d for name, d in demands.items()}}
    bounds = {name: value / H200.clock for name, value in cycles.items()}
    bounds["device memory"] = traffic.memory / H200.memory
    bounds["L2"] = (requested if traffic.l2 is None else traffic.l2) / H200.l2
    return Estimate(max(busy, *bounds.values()) + H200.start, max(bounds, key=lambda name: bounds[name]))


# ---------------------------------------------------------------- kernels of this project


def triton_kernels(
    case: static.Case, dtype: torch.dtype = torch.float32, traffic: Traffic | None = None
) -> list[Kernel]:
    """Every kernel that a call of a Triton operator launches, compiled for sm_90; without `traffic`, each of a launch's
    tensors is moved once."""
    kernels = []
    for launch, compiled, _ in static.compiled_launches(case, dtype):
        code, tensors = compiled.asm["sass"], {id(x): x for x in launch.arguments.values()}
        moved = traffic or Traffic(float(measure.bytes_of(tensors.values())))
        registers, _ = static.resource_usage(compiled.asm["cubin"])
        trips = partial(TRIPS.get(launch.kernel.__name__, lambda _, count: [1] * count), launch.arguments)
        blocks = math.prod(launch.grid)
        kernels.append(Kernel(code, trips, launch.num_warps, registers, compiled.metadata.shared, blocks, moved))
    return kernels


class Gather(NamedTuple):
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
    starts = list(accumulate((h * w for h, w in sizes), initial=0))
    tiles = []
    for start, (h, w) in zip(starts, sizes, strict=False):
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        tiles.append((start + y // 8 * -(-w // 8) + x // 8).flatten())
    place = (torch.cat(tiles)[:, None] * heads + torch.arange(heads))[:, :, None, None]  # a tile and a head
    corners = tile_rows = pair_rows = 0
    for level, (start, (h, w)) in enumerate(zip(starts, sizes, strict=False)):
        size = torch.tensor([w, h])
        pixels = (locations[:, :, level] * size - 0.5).floor().long()
        corner = pixels.unsqueeze(-2) + torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
        inside = ((corner >= 0) & (corner < size)).all(-1)  # [Q, H, P, 4]
        row = torch.where(inside, start + corner[..., 1] * w + corner[..., 0], -1)
        first, second = row.view(queries // 2, 2, heads, points, 4).unbind(1)
        corners += int(inside.sum())
        pair_rows += int((first >= 0).sum() + ((second >= 0) & (second != first)).sum())
        tile_rows += int(torch.unique((place * queries + row)[inside]).numel())
    return Gather(corners * images, tile_rows * images, pair_rows * images)


# ---------------------------------------------------------------- what is modelled

#: Deformable attention: N = 2, 21504 queries, 8 heads of 32, three levels of four points.
_QUERIES, _HEADS, _SAMPLES = 21504, 8, 12
_TILES = _QUERIES // 64 * _HEADS * 2
#: The shared memory of a block, in bytes; the general kernel has a table besides.
_DEFORMABLE_TABLE, _DEFORMABLE_SHARED = 352, 32 * 256


def deformable(nvcc: str, where: str, instance: str) -> list[Kernel]:
    """The launch of a forward of deformable attention in the CUDA library, by what its name begins with; samples
    "local" or "random". Its loops: see `sass.COMPILED`."""
    found = gather(where)
    (name,) = (name for name in sass.COMPILED if name.startswith(instance) and name.endswith("false>"))
    compiled = static_cuda.compiled(nvcc, "90")
    (kernel,) = (kernel for kernel in compiled if kernel["kernel"].removeprefix("ms_deform_attn_") == name)
    element = 4 if "<float" in name else 2
    pairs = _QUERIES * _HEADS * 2
    rows, samples = pairs * 32 * element, pairs * _SAMPLES * 3 * 4  # as many positions as queries; in float32
    # A quarter of a warp reads 128 bytes, of fp32 in different banks; of bfloat16 two rows' 64 bytes in the same.
    waves = found.corners if element == 4 else found.pair_rows
    traffic = Traffic(2 * rows + samples, found.tile_rows * 32 * element + rows + samples, waves)
    shared = _DEFORMABLE_SHARED + (0 if "lean" in name else _DEFORMABLE_TABLE)
    code, (trips, _) = static_cuda.control_codes(kernel["code"]), sass.COMPILED[name]
    return [Kernel(code, trips, static_cuda.THREADS // _WARP, kernel["registers"], shared, _TILES, traffic)]


def _by_digits(a: dict[str, Any], count: int) -> list[int]:
    tiles = math.ceil(a["candidates"] / a["BLOCK"])
    between = min(15, 65535 // a["BLOCK"])  # two sums
    return [math.ceil(tiles / between), min(tiles, between)] * (count // 2) + [tiles]


def _keys(a: dict[str, Any], count: int) -> list[int]:
    """The last loop is the one for values that are not finite; the backward first looks which tiles are attended to."""
    return [a["TILES"]] * max(1, count - 1) + [0] * (count > 1)


#: Triton kernel -> the trip counts of its loops in the benchmarks' cases, from its arguments and the number of loops.
TRIPS: dict[str, Callable[[dict[str, Any], int], list[int]]] = {
    "_predict_kernel": lambda a, count: [math.ceil(a["C"] / a["BLOCK_C"])] + [0] * (count - 1),
    "_forward_kernel": _keys,
    "_forward_lean_kernel": _keys,
    "_backward_kernel": _keys,
    "_keep_kernel": lambda a, count: [math.ceil(a["candidates"] / a["BLOCK"])] * count,
    "_keep_by_digits_kernel": _by_digits,
    # The fullest two cells of 64 pixels, at a point for five; and the fullest of 8 pixels (1.9 on average), of which
    # none is crowded.
    "_gather_backward_kernel": lambda a, count: [3] * count,
    "_gather_rows_kernel": lambda a, count: [2] + [0] * (count - 1),
}
_MASK, _ATTENTION = "m2f_kernels.ops.attention_mask.triton", "m2f_kernels.ops.masked_attention.triton"
_POINTS = "m2f_kernels.ops.points.triton_sampling"


def masks(dtype: torch.dtype, side: int, resize: str = "resize_mask_features", *flags: int) -> list[Kernel]:
    """Launches of the masks of 9 layers of an image of side * 4 pixels, by one of the operators that resize."""
    sizes = [side // ratio for ratio in (8, 4, 2)]
    total = sum(size**2 for size in sizes)
    given = static.given(f"x[1,256,{side},{side}]", [size for size in sizes for _ in range(2)], *flags)
    traffic = Traffic(float(256 * (side**2 + total) * dtype.itemsize))
    kernels = triton_kernels(static.Case(_MASK, resize, given), dtype, traffic)
    embed, resized = static.tensors(f"x[1,100,256] x[1,256,{total}]", dtype)
    for level in resized.split([size**2 for size in sizes], 2):
        traffic = Traffic(float((level.numel() + embed.numel()) * dtype.itemsize + 100 * level.shape[2] // 8))
        case = static.Case(_MASK, "predict_attention_mask", static.given(embed, level))
        kernels += 3 * triton_kernels(case, dtype, traffic)
    return kernels


def attention(
    dtype: torch.dtype, images: int, queries: int, change: dict[str, int] | None = None, kernel: str = "general"
) -> list[Kernel]:
    """Launches of a forward of masked attention over 128 x 128 keys, with another configuration if one is given."""
    from m2f_kernels.ops.masked_attention import configs

    query, key, _, *mask = static.tensors(static.attention(queries, images), dtype)
    chosen, usual = partial(static.choosing, "masked_attention.configs"), configs.forward
    given = static.given(query, key, key, *mask, 32**-0.5)
    case = static.Case(_ATTENTION, "masked_attention", given, chosen=partial(chosen, "KERNEL", kernel))
    with chosen("forward", lambda *a: {**usual(*a), **(change or {})}):
        return triton_kernels(case, dtype)


def on_points(function: str, given: Callable[..., Any], *choice: str) -> list[Kernel]:
    """Launches of an operator on points, by one of its kernels: the name of what chooses it, and its value."""
    chosen = partial(static.choosing, "points.triton_sampling", *choice)
    return triton_kernels(static.Case(_POINTS, function, given, chosen=chosen))


#: 12544 points of 100 masks of 256 x 256.
_kept = partial(on_points, "uncertain_points", static.given("f32[100,256,256] i32[100] i64[1]", 0, 37632, 9408, 3136))
#: The gradient of 256 channels of a 256 x 256 map, from 12544 points anywhere; loads count for all lanes, also where a
#: pixel has no more points.
_gradient = partial(on_points, "point_sample_backward", static.given("f32[1,256,12544] f32[1,12544,2]", 256, 256))
#: PyTorch's launches that sort points: four of a sort (`launches.KERNELS`), bounds, and their search.
_SORTING = 6
#: Microseconds of forwards with other configurations on an H200: benchmarks/results/nvidia-h200/configurations.txt.
#: -> N=1 Q=100, N=2 Q=100, N=1 Q=200.
_SETTINGS = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages", "waves")
CONFIGURATIONS = {
    (128, 64, 4, 2, 2): (33.0, 55.1, 51.8),
    (64, 32, 4, 3, 2): (30.5, 52.0, 51.1),
    (128, 32, 4, 3, 2): (31.4, 54.5, 54.2),
    (64, 64, 4, 3, 2): (28.2, 48.6, 47.6),
    (64, 64, 4, 2, 4): (41.0, 66.0, 61.5),
    (64, 128, 4, 2, 2): (32.3, 53.1, 50.0),
}


#: A row's name; the microseconds that an H200 took (benchmarks/results/nvidia-h200.csv) unless it is newer; the number
#: of PyTorch's launches, of which only the starts are modelled; and what compiles the others.
Row = tuple[str, float | None, int, Callable[[], list[Kernel]]]


def rows(nvcc: str | None) -> list[Row]:
    """The calls that are modelled; without nvcc those of deformable attention are left out."""
    low, single, exact = torch.bfloat16, torch.float32, not _tuning.TF32X3
    compiled = [
        (f"ms_deform_attn {dtype}, {where}{kind}", None if kind else time, 0,
         partial(deformable, nvcc, where, f"{kernel}<{element}, "))
        for where, *times in (("local", 131.2, 168.8), ("random", 140.4, 229.5))
        for kind, kernel in (("", "forward_kernel"), (", lean", "forward_lean_kernel"))
        for dtype, element, time in zip(("bf16", "fp32"), ("__nv_bfloat16", "float"), times, strict=True)
    ]  # fmt: skip
    # Flags are filled for each mask, unless the kernel that resizes fills them.
    of_masks = [
        row
        for name, dtype, side, time in (
            ("masks of 9 layers, 1024², fp32", single, 256, 522.3),
            ("masks of 9 layers, 512², fp32", single, 128, 330.6),
            ("masks of 9 layers, 1024², bf16", low, 256, 114.3),
        )
        for row in (
            (name, time if dtype == low or exact else None, 9, partial(masks, dtype, side)),
            (f"{name}, flags at once", None, 0, partial(masks, dtype, side, "resize_mask_features_with_flags", 9, 100)),
        )
    ]
    configured = [
        (f"masked_attention bf16, N={images} Q={queries}, {change}", time, 0,
         partial(attention, low, images, queries, dict(zip(_SETTINGS, change, strict=True))))
        for change, times in CONFIGURATIONS.items()
        for (images, queries), time in zip(((1, 100), (2, 100), (1, 200)), times, strict=True)
    ]  # fmt: skip
    return [
        *(compiled if nvcc else ()),
        *of_masks,
        ("masked_attention fp32", 218.4 if exact else None, 0, partial(attention, single, 1, 100)),
        ("masked_attention bf16, N=1 Q=100, lean", None, 0, partial(attention, low, 1, 100, kernel="lean")),
        ("uncertain_points, 100 masks", 706.6, 0, partial(_kept, "SELECTION", "histogram")),
        ("uncertain_points, 100 masks, by digits", None, 0, partial(_kept, "SELECTION", "digits")),
        *configured,
        ("point_sample backward", 162.4, _SORTING, partial(_gradient, "GATHER", "single")),
        ("point_sample backward, tiles", None, _SORTING, partial(_gradient, "GATHER", "tiles")),
    ]


# ---------------------------------------------------------------- how far to believe it


def verdict(name: str, chosen: Sequence[tuple[float, float]]) -> str:
    """Rank order and factor of (modelled, measured)."""
    from scipy.stats import spearmanr

    factors = sorted(modelled / measured for modelled, measured in chosen)
    return (
        f"{name}: {len(chosen)} rows, rank correlation {spearmanr(chosen).statistic:.2f}, modelled / measured "
        f"{geometric_mean(factors):.2f} on (geometric) average, {factors[0]:.2f} to {factors[-1]:.2f}"
    )


def main() -> None:
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
    for name, measured, others, launches in rows(nvcc):
        if re.search(options.select, name):
            estimates = [estimate(kernel) for kernel in launches()]
            modelled = (sum(one.seconds for one in estimates) + others * H200.start) * 1e6
            pairs += [] if measured is None else [(modelled, measured)]
            shown = " | " if measured is None else f"{measured:.1f} | {modelled / measured:.2f}"
            print(f"| {name} | {modelled:.1f} | {max(estimates).binding} | {shown} |", flush=True)
    if options.check:
        print("\n" + verdict("even rows, by which the model was changed", pairs[::2]))
        print(verdict("odd rows, held out", pairs[1::2]))


if __name__ == "__main__":
    main()
