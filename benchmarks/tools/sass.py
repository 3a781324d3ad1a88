"""Instruction mix of disassembled kernels, and the number of their warps that fit on a multiprocessor.

Occupancy is the arithmetic of the CUDA programming guide (compute capabilities, technical specifications): a block
takes its warps' registers, allocated per warp in units of 256, and its shared memory and a reserved KiB.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from benchmarks import arguments


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor; registers are 65536 everywhere.

    Attributes:
        shared: bytes of shared memory of all its blocks.
        count: multiprocessors of a part that the reports are about.
        bandwidth: bytes per second of that part's memory, from its data sheet.
        tensor_flops: dense bfloat16 operations per second of that part's matrix units, from its data sheet.
    """

    warps: int
    blocks: int
    shared: int
    count: int = 0
    bandwidth: float = 0.0
    tensor_flops: float = 0.0


MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 << 10),
    80: Multiprocessor(64, 32, 164 << 10, 108, 2.039e12, 312e12),  # A100 SXM 80 GB
    86: Multiprocessor(48, 16, 100 << 10),
    89: Multiprocessor(48, 24, 100 << 10),
    90: Multiprocessor(64, 32, 228 << 10, 132, 3.35e12, 989e12),  # H100 SXM
    100: Multiprocessor(64, 32, 228 << 10, 148, 8.0e12, 2250e12),  # B200
    120: Multiprocessor(48, 24, 100 << 10),
}
_REGISTERS, _REGISTER_UNIT, _RESERVED_SHARED, _WARP = 65536, 256, 1 << 10, 32
#: A multiprocessor has four parts, each with its own registers: warps are allocated in fours.
_PARTS = 4


def blocks_per_multiprocessor(capability: int, warps: int, registers: int, shared: int) -> int:
    """The number of blocks of `warps` warps that fit at once; `registers` per thread, `shared` bytes per block."""
    limits = MULTIPROCESSORS[capability]
    per_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // per_warp // _PARTS * _PARTS // warps if registers else limits.blocks
    by_shared = limits.shared // (shared + _RESERVED_SHARED)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)


def occupancy(capability: int, warps: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's warps that can be resident."""
    return blocks_per_multiprocessor(capability, warps, registers, shared) * warps / MULTIPROCESSORS[capability].warps


# ---------------------------------------------------------------- instructions

#: Kind of instruction -> what its name begins with. The first that matches counts.
KINDS = {
    "matrix": r"[A-Z]*MMA\b|UT[A-Z]*MMA",
    "async copy": r"LDGSTS|UBLKCP|UTMA|CP\.",
    "load": r"LDG|LD\b",
    "store": r"STG|ST\b",
    "atomic": r"ATOM(?!S)|RED\b|REDG",
    "local": r"LDL|STL",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS",
    "float": r"F[A-Z]*FMA|FFMA|FADD|FMUL|FSETP|FSEL|FMNMX|FCHK|HFMA2|HADD2|HMUL2|HMNMX2|DFMA|DADD|DMUL|DSETP",
    "special": r"MUFU",
    "conversion": r"F2F|F2I|I2F|F2FP|FRND|I2I|I2FP",
    "integer": r"U?(?:I[A-Z]+|LOP3|SHF|LEA|PRMT|POPC|FLO|SEL|PLOP3|SGXT|BREV)|REDUX|VIADD|VIMNMX",
    "barrier": r"BAR|SYNCS|WARPSYNC|DEPBAR|MEMBAR|WARPGROUP|FENCE|UCGABAR",
    "branch": r"BRA|EXIT|CALL|RET|BSSY|BSYNC|BREAK|JMP|BRX",
}
#: The kinds that access global memory.
_GLOBAL = ("load", "store", "async copy", "atomic")
#: A line with an instruction: as Triton prints it, control codes (the barriers that it waits for, those of its reads
#: and of its result, cycles until the next may issue), by `nvdisasm` and `cuobjdump` an address; then a predicate, the
#: opcode with its modifiers, operands.
_INSTRUCTION = re.compile(
    r"(?:(?P<wait>--|\d\d):(?P<read>[-\d]):(?P<write>[-\d]):[-Y]:(?P<stall>[0-9a-f])\t|/\*[0-9a-f]{4,}\*/\s+)"
    r"(?P<predicate>@!?U?P[0-9T]\s+)?(?P<opcode>[A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)(?P<operands>.*)"
)
Instruction = re.Match[str]


def instructions(code: str) -> list[Instruction]:
    """The instructions in a disassembly, with the groups of `_INSTRUCTION`; without NOPs."""
    found = (_INSTRUCTION.match(line.lstrip(" ")) for line in code.splitlines())
    return [x for x in found if x and not x["opcode"].startswith("NOP")]


@cache
def kind_of(opcode: str) -> str:
    """The kind of an instruction by its opcode, modifiers included."""
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, opcode)), "other")


class Mix(NamedTuple):
    """Instructions of a kernel by kind, as they stand in the code: a loop counts once.

    Attributes:
        counts: by the names in `KINDS`, and "other".
        wide: loads and stores of global memory that move 16 bytes per thread.
    """

    counts: Counter[str]
    wide: int

    def text(self) -> str:
        """Shares of the kinds that make up at least 5 %, and numbers of the rarer kinds that matter most."""
        shown, total = [], self.counts.total()
        for kind, count in self.counts.most_common():
            if count >= 0.05 * total and kind != "other":
                shown.append(f"{kind} {count / total:.0%}")
            elif kind in ("matrix", "atomic", "local"):
                shown.append(f"{count} {kind}")
        return f"{total}: " + ", ".join(shown)

    def memory(self) -> str:
        """Accesses to global memory, and how many of them move 16 bytes per thread."""
        return f"{sum(self.counts[kind] for kind in _GLOBAL)} ({self.wide} of 16 bytes)"


def mix(code: str) -> Mix:
    """The instructions of one kernel's disassembly.

    Raises:
        ValueError: there are none, as when a disassembler's format changes.
    """
    found = [x["opcode"] for x in instructions(code)]
    if not found:
        raise ValueError("expected a kernel's disassembly; found no instruction in it")
    wide = sum(".128" in opcode and kind_of(opcode) in _GLOBAL for opcode in found)
    return Mix(Counter(map(kind_of, found)), wide)


Trips = Sequence[int] | Callable[[int], Sequence[int]]
_LABEL = re.compile(r"^\.?(L[A-Z]*_?\w*):")
#: The operands of a jump.
_TARGET = re.compile(r"\s+(?P<condition>!?U?P\w+,\s*)?(?:UR\w+,\s*)?`?\(?\.?(?P<label>L\w+)\)?")


def _graph(code: str) -> tuple[list[Instruction], list[list[int]], dict[int, int], int]:
    """Instructions of a disassembly with labels, where each leads, the loops (first -> last), and the last EXIT.

    Raises:
        ValueError: a jump whose target is not known.
    """
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    for line in code.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(found)
        found += instructions(line)
    if any(x["opcode"].startswith(("BRX", "JMX")) for x in found):
        raise ValueError("code: expected jumps to labels; found one to a computed address")
    last = max(i for i, x in enumerate(found) if x["opcode"].startswith("EXIT") and not x["predicate"])
    successors: list[list[int]] = []
    for i, x in enumerate(found):
        jumps = x["opcode"].startswith("BRA") and ".DIV" not in x["opcode"] and _TARGET.match(x["operands"])
        conditional = x["predicate"] or (jumps and jumps["condition"])
        ends = i == last or ((jumps or x["opcode"].startswith(("EXIT", "RET"))) and not conditional)
        successors.append([*([labels[jumps["label"]]] if jumps else []), *([] if ends else [i + 1])])
    loops = {target: i for i, targets in enumerate(successors[: last + 1]) for target in targets if target <= i}
    return found, successors, loops, last


def longest_trace(code: str, trips: Trips = ()) -> list[Instruction]:
    """The most instructions that a warp can execute from a kernel's entry to its last EXIT, one by one.

    Jumps that only diverged warps take (BRA.DIV) and early exits are not followed; a called function counts as its
    call.

    Args:
        code: the disassembly, with labels.
        trips: how often each loop runs for each entry, in the order of where they begin, or what gives that from the
            number of loops; 0 for one that the case in question does not enter.

    Raises:
        ValueError: there are more or fewer loops than `trips`, or a jump whose target is not known.
    """
    found, successors, loops, last = _graph(code)
    trips = trips(len(loops)) if callable(trips) else trips
    if len(loops) != len(trips):
        raise ValueError(f"trips: expected one number for each of {len(loops)} loops; got {list(trips)}")
    repeats = dict(zip(sorted(loops), trips, strict=True))

    def longest(begin: int, end: int) -> list[int]:
        """The path from `begin` to `end`, or back to `begin`; empty where there is none."""
        paths: dict[int, Any] = {}  # from an instruction on: length, the first instructions, and the rest likewise
        for i in range(end, begin - 1, -1):
            own, targets = [i], set(successors[i])
            if i in loops and i != begin and loops[i] <= end:
                # As a whole: its body as often as it runs, then any way out.
                own = longest(i, loops[i]) * repeats[i]
                targets = {t for j in range(i, loops[i] + 1) for t in successors[j] if t > loops[i]}
            after = [paths[t] for t in targets if begin < t <= end and t in paths]
            if i == end or (begin in loops and end == loops[begin] and begin in targets):
                after.append((0, [], None))  # leaves
            if after:
                rest = max(after, key=itemgetter(0))
                paths[i] = (len(own) + rest[0], own, rest)
        path, at = [], paths.get(begin)
        while at:
            path += at[1]
            at = at[2]
        return path

    if path := longest(0, last):
        return [found[i] for i in path]
    raise ValueError("code: expected a way from the entry to the last EXIT")


def longest_path(code: str, trips: Trips = ()) -> int:
    """The length of `longest_trace`."""
    return len(longest_trace(code, trips))


#: Kernel of the CUDA library -> how often its loops run for three levels of four points, by `longest_path`; and the
#: queries of a warp.
COMPILED: dict[str, tuple[Sequence[int], int]] = {
    "forward_kernel<__nv_bfloat16, 8, false>": ((0, 3, 1, 1, 2, 1, 1, 3, 1, 2), 8),
    "forward_lean_kernel<__nv_bfloat16, float, float, false>": ((3, 3, 0), 8),
    "forward_lean_kernel<__nv_bfloat16, __nv_bfloat16, float, true>": ((3, 2, 3, 0), 8),
    "forward_kernel<float, 4, false>": ((0, 3, 1, 1, 2, 2, 1, 2, 1, 3), 8),
    "forward_lean_kernel<float, float, float, false>": ((3, 3, 0, 4), 8),
}


def compiled_per_sample(nvcc: str, file: str = "ms_deform_attn/cuda_kernels.cu") -> dict[str, float]:
    """Instructions of a warp per sample of a query and head, at most, of those kernels in `COMPILED` that the header
    holds, on sm_90."""
    from benchmarks import static_cuda

    compiled = static_cuda.compiled(nvcc, "90", file)
    code = {k["kernel"].removeprefix("ms_deform_attn_"): k["code"] for k in compiled}
    return {
        name: longest_path(static_cuda.control_codes(code[name]), trips) / (12 * queries)
        for name, (trips, queries) in COMPILED.items()
        if name in code
    }


def per_sample(function: str, dtype: torch.dtype) -> float:
    """Instructions that the warps of the launch execute, compiled for sm_90, per sample of each query and head."""
    from benchmarks import static

    case = next(case for case in static.CASES if case.function == function)
    ((launch, compiled, _),) = static.compiled_launches(case, dtype)
    n, queries, heads = launch.arguments["value_ptr"].shape[0], launch.arguments["queries"], launch.arguments["HEADS"]
    samples = n * queries * heads * launch.arguments["FIRST"][-1]
    return longest_path(compiled.asm["sass"]) * launch.num_warps * math.prod(launch.grid) / samples


def deformops_per_sample(dtype: torch.dtype) -> float | None:
    """The same of deformops' Triton kernel, with locations and weights in value's dtype as it wants them; None where
    it is not installed."""
    if find_spec("deformops") is None:
        return None
    from deformops.backends.triton._kernels.msda_query_tiled import msda_forward_kernel as kernel
    from deformops.backends.triton._launch import DEFAULT_TILES as TILES

    from benchmarks import static

    n, queries, heads, d, levels, points = 2, 21504, 8, 32, 3, 4
    value, locations, weights, output, *index = static.tensors(
        "x[2,21504,8,32] x[2,21504,8,3,4,2] x[2,21504,8,3,4] x[2,21504,8,32] i64[3,2] i64[3]", dtype
    )
    strides = [stride for x in (value, locations, weights, output) for stride in x.stride()]
    given = [value, *index, locations, weights, output, n, queries, heads, levels, points, d, *strides]
    given += [TILES.block_size_q, d, 0]
    code = static.compile_kernel(kernel, dict(zip(kernel.arg_names, given, strict=True)), 90, {}).asm["sass"]
    warps = 4 * math.ceil(queries / TILES.block_size_q) * heads * n  # Triton's default is 4 a program
    return longest_path(code, (levels, points)) * warps / (n * queries * heads * levels * points)


def main() -> None:
    """Print what one sample of one query costs the forwards of deformable attention on sm_90.

    python -m benchmarks.sass
    """
    import triton

    from benchmarks import static_cuda

    print("| forward of deformable attention, Triton, sm_90 | executed instructions of a warp per (query, sample) |")
    print("|---|---:|")
    for name, count in (
        ("locations", partial(per_sample, "ms_deform_attn")),
        ("offsets, 2-d", partial(per_sample, "ms_deform_attn_from_offsets")),
        ("deformops, locations", deformops_per_sample),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            found = count(dtype)
            shown = "not installed" if found is None else f"{found:.1f}"
            print(f"| {name}, {str(dtype).removeprefix('torch.')} | {shown} |")
    if nvcc := static_cuda.compiler():
        print("\n| CUDA C++, sm_90 | on the longest path |\n|---|---:|")
        for name, number in compiled_per_sample(nvcc).items():
            print(f"| `{name}` | {number:.1f} |")
    else:
        print("\nNo nvcc here: the kernels of the CUDA library are not counted.")
    print(f"\ntriton {triton.__version__}; N = 2, 21504 queries, 8 heads of 32 channels, 3 levels of 4 points")


if __name__ == "__main__":
    arguments(__doc__, {})
    main()
