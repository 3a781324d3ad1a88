"""Instruction mix of disassembled kernels, and the number of their warps that fit on a multiprocessor.

Occupancy is the arithmetic of the CUDA programming guide (compute capabilities, technical specifications): a block
takes its warps' registers, allocated per warp in units of 256, and its shared memory and a reserved KiB.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from benchmarks.arguments import arguments


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor; registers are 65536 everywhere.

    Attributes:
        shared: bytes of shared memory of all its blocks.
        count: multiprocessors of the part named in the reports.
        bandwidth: bytes per second of that part's memory, from its data sheet.
        tensor_flops: dense bfloat16 operations per second of that part's matrix units, from its data sheet.
    """

    warps: int
    blocks: int
    shared: int
    part: str = ""
    count: int = 0
    bandwidth: float = 0.0
    tensor_flops: float = 0.0


MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 << 10),
    80: Multiprocessor(64, 32, 164 << 10, "A100 SXM 80 GB", 108, 2.039e12, 312e12),
    86: Multiprocessor(48, 16, 100 << 10),
    89: Multiprocessor(48, 24, 100 << 10),
    90: Multiprocessor(64, 32, 228 << 10, "H100 SXM", 132, 3.35e12, 989e12),
    100: Multiprocessor(64, 32, 228 << 10, "B200", 148, 8.0e12, 2250e12),
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
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
#: An opcode with its modifiers, after whatever a disassembler writes before it, and a predicate.
_INSTRUCTION = re.compile(
    r"(?:^[\w:-]+\t|/\*[0-9a-f]{4,}\*/\s+)(?:@!?U?P[0-9T]\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)"
)


@dataclass(frozen=True)
class Mix:
    """Instructions of a kernel by kind, as they stand in the code: a loop counts once.

    Attributes:
        counts: by the names in `KINDS`, and "other".
        wide: loads and stores of global memory that move 16 bytes per thread.
    """

    counts: dict[str, int]
    wide: int

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def text(self, least: float = 0.05) -> str:
        """Shares of the kinds that make up at least `least`, and numbers of the rarer kinds that matter most."""
        shown = []
        for kind, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            if count >= least * self.total and kind != "other":
                shown.append(f"{kind} {count / self.total:.0%}")
            elif kind in ("matrix", "atomic", "local"):
                shown.append(f"{count} {kind}")
        return f"{self.total}: " + ", ".join(shown)

    def memory(self) -> str:
        """Accesses to global memory, and how many of them move 16 bytes per thread."""
        accesses = sum(self.counts.get(kind, 0) for kind in ("load", "store", "async copy", "atomic"))
        return f"{accesses} ({self.wide} of 16 bytes)"


def kind_of(opcode: str) -> str:
    """The kind of an instruction by its opcode, modifiers included."""
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.match(opcode)), "other")


def opcodes(code: str) -> list[str]:
    """The opcodes with modifiers in a disassembly, by `nvdisasm`, `cuobjdump` or as Triton prints it; without NOPs."""
    found = (match[1] for line in code.splitlines() if (match := _INSTRUCTION.match(line.lstrip(" "))))
    return [opcode for opcode in found if not opcode.startswith("NOP")]


def mix(code: str) -> Mix:
    """The instructions of one kernel's disassembly.

    Raises:
        ValueError: there are none, as when a disassembler's format changes.
    """
    found = opcodes(code)
    if not found:
        raise ValueError("expected a kernel's disassembly; found no instruction in it")
    wide = sum(".128" in opcode and kind_of(opcode) in ("load", "store", "async copy", "atomic") for opcode in found)
    return Mix(dict(Counter(map(kind_of, found))), wide)


_LABEL = re.compile(r"^\.?(L[A-Z]*_?\w*):")
_TARGET = re.compile(
    r"\bBRA(?P<kind>(?:\.\w+)*)\s+(?P<condition>!?U?P\w+,\s*)?(?:UR\w+,\s*)?`?\(?\.?(?P<label>L\w+)\)?"
)
_PREDICATED = re.compile(r"(?:^|\s)@!?U?P\w+\s")


def _graph(code: str) -> tuple[list[str], list[list[int]], dict[int, int], int]:
    """Instructions of a disassembly with labels, where each leads, the loops (first -> last), and the last EXIT.

    Raises:
        ValueError: a jump whose target is not known.
    """
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in code.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(lines)
        elif opcodes(line):
            lines.append(line)
    if any(re.search(r"\bBRX\b|\bJMX\b", line) for line in lines):
        raise ValueError("code: expected jumps to labels; found one to a computed address")
    last = max(i for i, line in enumerate(lines) if re.search(r"\bEXIT\b", line) and not _PREDICATED.search(line))
    successors: list[list[int]] = []
    for i, line in enumerate(lines):
        found = _TARGET.search(line)
        conditional = bool(_PREDICATED.search(line)) or bool(found and found["condition"])
        if found and ".DIV" not in found["kind"]:
            successors.append([labels[found["label"]], *([i + 1] if conditional else [])])
        else:
            successors.append([] if i == last or (re.search(r"\b(EXIT|RET)\b", line) and not conditional) else [i + 1])
    loops: dict[int, int] = {}
    for i, targets in enumerate(successors[: last + 1]):
        for target in targets:
            if target <= i:
                loops[target] = max(i, loops.get(target, 0))
    return lines, successors, loops, last


def loops(code: str) -> int:
    """The number of loops in a disassembly with labels."""
    return len(_graph(code)[2])


def longest_trace(code: str, trips: Sequence[int] = ()) -> list[str]:
    """The most instructions that a warp can execute from a kernel's entry to its last EXIT, line by line.

    Jumps that only diverged warps take (BRA.DIV) and early exits are not followed; a called function counts as its
    call.

    Args:
        code: the disassembly, with labels.
        trips: how often each loop runs for each entry, in the order of where they begin; 0 for one that the case in
            question does not enter.

    Raises:
        ValueError: there are more or fewer loops than `trips`, or a jump whose target is not known.
    """
    lines, successors, loops, last = _graph(code)
    if len(loops) != len(trips):
        raise ValueError(f"trips: expected one number for each of {len(loops)} loops; got {list(trips)}")
    repeats = dict(zip(sorted(loops), trips, strict=True))

    def longest(begin: int, end: int) -> list[int]:
        """The path from `begin` to `end`, or back to `begin`; empty where there is none."""
        found: dict[int, Any] = {}  # from an instruction on: length, the first instructions, and the rest likewise
        for i in range(end, begin - 1, -1):
            own, targets = [i], set(successors[i])
            if i in loops and i != begin and loops[i] <= end:
                # As a whole: its body as often as it runs, then any way out.
                own = longest(i, loops[i]) * repeats[i]
                targets = {t for j in range(i, loops[i] + 1) for t in successors[j] if t > loops[i]}
            after = [found[t] for t in targets if begin < t <= end and t in found]
            if i == end or (begin in loops and end == loops[begin] and begin in targets):
                after.append((0, [], None))  # leaves
            if after:
                rest = max(after, key=itemgetter(0))
                found[i] = (len(own) + rest[0], own, rest)
        path, at = [], found.get(begin)
        while at:
            path += at[1]
            at = at[2]
        return path

    if path := longest(0, last):
        return [lines[i] for i in path]
    raise ValueError("code: expected a way from the entry to the last EXIT")


def longest_path(code: str, trips: Sequence[int] = ()) -> int:
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


def compiled_per_sample(nvcc: str, header: str = "ms_deform_attn/cuda_kernels.cu") -> dict[str, float]:
    """Instructions of a warp per sample of a query and head, at most, of those kernels in `COMPILED` that the header
    holds, on sm_90."""
    from benchmarks import static_cuda

    compiled = static_cuda.compiled(nvcc, "90", header)
    code = {k["kernel"].removeprefix("ms_deform_attn_"): k["code"] for k in compiled}
    return {
        name: longest_path(static_cuda.control_codes(code[name]), trips) / (12 * queries)
        for name, (trips, queries) in COMPILED.items()
        if name in code
    }


def main() -> None:
    """Print what one sample of one query costs the forwards of deformable attention on sm_90.

    python -m benchmarks.sass
    """
    import triton

    from benchmarks import static_cuda
    from m2f_kernels.ops.ms_deform_attn import triton as deformable

    print("| forward of deformable attention, Triton, sm_90 | executed instructions of a warp per (query, sample) |")
    print("|---|---:|")
    for name, count in (
        ("locations", partial(per_sample, deformable.ms_deform_attn, 0)),
        ("offsets, 2-d", partial(per_sample, deformable.ms_deform_attn_from_offsets, 2)),
        ("deformops, locations", deformops_per_sample),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            try:
                shown = f"{count(dtype):.1f}"
            except ModuleNotFoundError:
                shown = "not installed"
            print(f"| {name}, {str(dtype).removeprefix('torch.')} | {shown} |")
    nvcc = static_cuda.compiler()
    if nvcc is None:
        print("\nNo nvcc here: the kernels of the CUDA library are not counted.")
    else:
        print("\n| CUDA C++, sm_90 | on the longest path |\n|---|---:|")
        for name, number in compiled_per_sample(nvcc).items():
            print(f"| `{name}` | {number:.1f} |")
    print(f"\ntriton {triton.__version__}; N = 2, 21504 queries, 8 heads of 32 channels, 3 levels of 4 points")


def per_sample(function: Callable[..., Any], coordinates: int, dtype: torch.dtype) -> float:
    """Instructions that the warps of the launch execute, compiled for sm_90, per sample of each query and head."""
    from benchmarks import static

    ((launch, compiled, _),) = static.compiled_launches(function, static.deformable_inputs(dtype, 32, coordinates))
    n, queries, heads = launch.arguments["value_ptr"].shape[0], launch.arguments["queries"], launch.arguments["HEADS"]
    samples = n * queries * heads * launch.arguments["FIRST"][-1]
    return longest_path(compiled.asm["sass"]) * launch.num_warps * math.prod(launch.grid) / samples


def deformops_per_sample(dtype: torch.dtype) -> float:
    """The same of deformops' Triton kernel, with locations and weights in value's dtype as it wants them.

    Raises:
        ModuleNotFoundError: deformops is not installed.
    """
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


if __name__ == "__main__":
    arguments(__doc__, {})
    main()
