"""Registers, shared memory and occupancy of each Triton kernel, compiled ahead of time for all supported architectures.

    python -m benchmarks.static --check --output benchmarks/results/triton_resources.csv

Needs triton, which brings the assembler, and no GPU. Each operator is called on tensors of the meta device while
`m2f_kernels._triton.recording` collects its launches, so what is compiled is what production would launch. A new
operator needs a `static_cases()` in `benchmarks/ops/<op>.py`. `benchmarks.static_cuda` does the same for CUDA C++.

It also states the least time of a launch: its tensors, each moved once, over the data sheet's bandwidth of the GPU;
and, if `Case.flops` counts them, the operations of its matrix products in half precision over the data sheet's rate.
Nothing here is measured.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import arguments, measure, of_operators, sass
from benchmarks.cases import DTYPES, write_csv
from benchmarks.formats import markdown

#: Target (compute capability, or AMD's name) -> bytes of shared memory that one program may have.
SHARED_LIMITS: dict[int | str, int] = {
    75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
    "gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx1100": 64 << 10,
}  # fmt: skip
#: The same by the names of tables, such as "sm_90".
_LIMITS = {name if isinstance(name, str) else f"sm_{name}": limit for name, limit in SHARED_LIMITS.items()}
#: The data centre parts, which the reports in this folder are about.
_DATA_CENTRE = ("sm_80", "sm_90", "sm_100")


class Case(NamedTuple):
    """A function of an operator's `triton.py` and a call of it.

    Attributes:
        module: "m2f_kernels.ops.<op>.triton".
        function: the one to call.
        arguments: makes its arguments, on the meta device, from the dtype and the channels per head.
        head_dims: channels per head to compile for; the first is the representative one.
        targets: what it is compiled for.
        representative: CI compiles it on every change.
        chosen: a context that chooses other kernels than the default's.
        flops: operations of matrix products by the name of the kernel that makes them, from the channels per head.
    """

    module: str
    function: str
    arguments: Callable[[torch.dtype, int], tuple[Any, ...]]
    head_dims: tuple[int, ...] = (32,)
    targets: tuple[int | str, ...] = tuple(SHARED_LIMITS)
    representative: bool = True
    chosen: Callable[[], AbstractContextManager[Any]] = nullcontext
    flops: Callable[[int], dict[str, int]] = lambda d: {}


def choosing(module: str, name: str, value: Any) -> AbstractContextManager[Any]:
    """A context with another kernel: `name` of that module of `m2f_kernels.ops` has this value."""
    return mock.patch(f"m2f_kernels.ops.{module}.{name}", value)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that has no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def tensors(shapes: str, dtype: torch.dtype = torch.float32, d: int = 32) -> list[Tensor]:
    """Tensors without memory, from shapes such as "x[1,100,8d] i64[30]", in which `dtype` is called x; those of
    "x[1,100,8,d].T" are heads [1, 8, 100, d], cut out of [1, 100, 8d] as models have them."""
    names, made = {"x": dtype, "f32": torch.float32, "i32": torch.int32, "i64": torch.int64, "bool": torch.bool}, []
    for name, shape, heads in re.findall(r"(\w+)\[([\dd,]+)\](\.T)?", shapes):
        sizes = [d * int(x[:-1] or 1) if "d" in x else int(x) for x in shape.split(",")]
        made.append(meta(*sizes, dtype=names[name]).transpose(1, 2) if heads else meta(*sizes, dtype=names[name]))
    return made


def given(*parts: Any) -> Callable[..., tuple[Any, ...]]:
    """The arguments of a case: shapes give `tensors` of its dtype and channels per head, others are the same in all."""
    return lambda dtype=torch.float32, d=32: tuple(
        x for part in parts for x in (tensors(part, dtype, d) if isinstance(part, str) else [part])
    )


#: A softmax's factor; any will do.
_SCALE = 32**-0.5
#: One image of 640 x 640 in an encoder-only model: 200 queries under a mask, 5 prefix tokens, 1600 patches.
_ENCODER = " ".join(["x[1,1805,16,d].T"] * 3) + " i32[1,200,57] bool[1,200]"


def attention(queries: int = 100, images: int = 1) -> str:
    """The shapes of masked attention of 8 heads, 128 x 128 keys."""
    heads = [f"x[{images},{rows},8,d].T" for rows in (queries, 16384, 16384)]
    return " ".join([*heads, f"i32[{images},{queries},512] bool[{images},{queries}]"])


def with_gradient(queries: int, heads: int, *inputs: Any) -> Callable[..., tuple[Any, ...]]:
    """The arguments of the backward: the gradient of the output, the forward's inputs and results."""
    output = f"x[1,{queries},{heads},d]"
    return given(output, *inputs, output, f"f32[1,{heads},{queries}]", _SCALE)


def biased_inputs(dtype: torch.dtype, d: int, masked: int, backward: bool) -> tuple[Any, ...]:
    """SAM-3's decoder: 201 queries, 8 heads, 72 rows of 72 keys, and the bias as its layers give it."""
    query, key, _, bits, row_any = tensors(attention(201), dtype, d)
    key, bits, row_any = key[:, :, :5184], bits[:, :masked, :162], row_any[:, :masked]
    side = meta(1, 201, 72, 8, dtype=dtype).permute(0, 3, 1, 2)
    inputs = query, key, key, bits, row_any, side, side
    return (with_gradient(201, 8, *inputs) if backward else given(*inputs, _SCALE))(dtype, d)


def marked_targets(kind: torch.dtype | None) -> list[Tensor]:
    """30 targets of an image in a map of ids of a dtype, or (None) as run lengths."""
    if kind is None:
        return [meta(1, 1, 1, dtype=torch.bool).expand(30, 1024, 1024), meta(40000, dtype=torch.int32)]
    return [meta(1024, 1024, dtype=kind).expand(30, -1, -1), meta(30, dtype=torch.int64)]


#: Three levels of a 1024 x 1024 image at strides 32, 16, 8.
_LEVELS = [32, 32, 0, 64, 64, 1024, 128, 128, 5120]


def deformable(coordinates: int = 0, points: int = 4, backward: bool = False) -> Callable[..., tuple[Any, ...]]:
    """The encoder's call for two images: 21504 queries, 8 heads, 3 levels; `coordinates` 2 or 4: from offsets.

    Offsets and logits in value's dtype; locations and weights in float32, as autocast leaves them. The backward gets
    the gradient of the output, the same, and every gradient wanted."""
    kind, reference, scale = ("x", f"f32[2,21504,3,{coordinates}]", [0.5]) if coordinates else ("f32", "", [])
    samples = f"{kind}[2,21504,8,{3 * points},2] {kind}[2,21504,8,{3 * points}]"
    gradient, wanted = ("x[2,21504,8d]", [True] * (3 if coordinates else 2)) if backward else ("", [])
    value = gradient, "x[2,21504,8,d]", _LEVELS, None, None
    return given(*value, reference, samples, [points] * 3, *scale, *wanted)


_MASK = "m2f_kernels.ops.attention_mask.triton"
_ATTENTION = "m2f_kernels.ops.masked_attention.triton"
_SAMPLE = "m2f_kernels.ops.points.triton_sampling"
_LOSS = "m2f_kernels.ops.points.triton_loss"
_DEFORMABLE = "m2f_kernels.ops.ms_deform_attn.triton"
#: Channels per head of models, and the smallest, the largest and an odd one that kernels serve.
_ATTENTION_HEADS, _SELF_ATTENTION_HEADS = (32, 16, 64, 128, 80), (64, 32, 80, 128)
_DEFORMABLE_HEADS = (32, 16, 64, 256, 20)
#: 100 masks; 12544 points, of which 9408 are the most uncertain of 37632.
_UNCERTAIN = given("x[100,256,256] i64[100] i64[1]", 0, 37632, 9408, 3136)
CASES = [
    Case(_MASK, "pack_attention_mask", given("x[1,100,16384]")),
    Case(
        _MASK, "predict_attention_mask",
        lambda dtype, _: (meta(1, 100, 256, dtype=dtype), meta(1, 256, 21504, dtype=dtype)[:, :, 5120:]),
        flops=lambda _: {"_predict_kernel": 2 * 100 * 256 * 16384},
    ),
    # The fast path and, for the last level, the general one.
    Case(_MASK, "resize_mask_features", given("x[1,256,256,256]", [32, 32, 64, 64, 128, 128, 100, 100])),
    Case(_MASK, "resize_mask_features_with_flags", given("x[1,256,256,256]", [32, 32, 64, 64, 128, 128], 9, 100)),
    Case(
        _ATTENTION, "masked_attention", given(attention(), _SCALE), _ATTENTION_HEADS,
        flops=lambda d: {"_forward_kernel": 4 * 8 * d * 100 * 16384},
    ),
    Case(
        _ATTENTION, "masked_attention", given(attention(), _SCALE), _ATTENTION_HEADS,
        chosen=partial(choosing, "masked_attention.configs", "KERNEL", "lean"),
    ),
    Case(_ATTENTION, "masked_attention", given(attention(20), _SCALE), _ATTENTION_HEADS),
    *(
        Case(_ATTENTION, "masked_attention_backward", with_gradient(queries, 8, attention(queries)), _ATTENTION_HEADS)
        for queries in (100, 200)
    ),
    Case(_ATTENTION, "masked_attention", given(_ENCODER, _SCALE), _SELF_ATTENTION_HEADS),
    Case(_ATTENTION, "masked_attention_backward", with_gradient(1805, 16, _ENCODER), _SELF_ATTENTION_HEADS),
    # Without a mask, as SAM-3 calls it, and with one.
    *(
        Case(
            _ATTENTION, f"masked_attention_with_bias{backward}",
            lambda dtype, d, backward=backward, masked=masked: biased_inputs(dtype, d, masked, bool(backward)),
            _ATTENTION_HEADS, representative=masked == 0,
        )
        for backward in ("", "_backward")
        for masked in (0, 201)
    ),
    Case(_SAMPLE, "point_sample", given("x[1,256,256,256] f32[1,12544,2]", True)),
    Case(_SAMPLE, "point_sample", given("bool[1,30,1024,1024] f32[1,12544,2]", True)),
    # A map of ids, and run lengths, in place of 30 masks.
    *(
        Case(_SAMPLE, "sample_targets", given(*marked_targets(marked), "f32[12544,2]"))
        for marked in (torch.int64, torch.int32, torch.int16, torch.uint8, None)
    ),
    Case(_SAMPLE, "point_sample_backward", given("x[1,256,12544] f32[1,12544,2]", 256, 256)),
    Case(
        _SAMPLE, "point_sample_backward", given("x[1,256,12544] f32[1,12544,2]", 256, 256), representative=False,
        chosen=partial(choosing, "points.triton_sampling", "GATHER", "chunks"),
    ),
    # Channels that fill their blocks, or in part, and sizes of 1.
    *(
        Case(
            _SAMPLE, "point_sample_backward", given(f"x[1,{c},{k}] f32[1,{k},2]", h, w), representative=False,
            chosen=partial(choosing, "points.triton_sampling", "GATHER", "tiles"),
        )
        for c, k, h, w in ((256, 12544, 256, 256), (300, 70, 9, 50), (64, 70, 1, 1), (64, 70, 1, 9), (64, 70, 9, 1))
    ),
    # With few channels another kernel serves.
    Case(_SAMPLE, "point_sample_backward", given("x[1,1,12544] f32[1,12544,2]", 256, 256)),
    # Sizes of 1 are constants to the compiler.
    *(Case(_SAMPLE, "point_sample", given(f"x[1,5,{h},{w}] f32[1,70,2]", True)) for h, w in ((1, 1), (1, 9), (9, 1))),
    *(
        Case(_SAMPLE, "point_sample_backward", given("x[1,64,70] f32[1,70,2]", h, w))
        for h, w in ((1, 1), (1, 9), (9, 1))
    ),
    Case(_SAMPLE, "uncertain_points", _UNCERTAIN),
    Case(
        _SAMPLE, "uncertain_points", _UNCERTAIN, representative=False,
        chosen=partial(choosing, "points.triton_sampling", "SELECTION", "digits"),
    ),
    Case(_LOSS, "mask_matching_cost", given("f32[1000,12544] f32[30,12544]")),
    # A chunk of 100 matched masks at stride 4 of a 1024 x 1024 image, and K = 12544 points of each.
    *(
        Case(_LOSS, "point_mask_loss", given("x[100,256,256] i64[100]", targets, "i64[100] f32[100,12544,2]"))
        for targets in (
            tensors("bool[30,1024,1024]"), tensors("f32[30,1024,1024]"),
            *map(marked_targets, (torch.int64, torch.int32, torch.int16, torch.uint8, None)),
        )
    ),
    Case(
        _LOSS, "point_mask_loss_backward",
        given("f32[100] f32[100] i64[100] f32[100,12544,2] f32[100,12544] f32[100,12544]", 100, 256, 256),
    ),
    Case(
        _LOSS, "factored_point_mask_loss",
        given(
            "x[1,100,256] x[1,256,256,256] i64[100]", [100], tensors("bool[30,1024,1024]"), "i64[100]", None, "i64[1]",
            37632, 9408, 3136,
        ),
    ),
    Case(
        _LOSS, "factored_point_mask_loss_backward",
        given(
            "f32[100] f32[100] x[1,100,256] x[1,256,256,256] i64[100]", [100],
            "f32[100,12544,2] f32[100,12544] f32[100,12544]",
        ),
    ),
    Case(
        _LOSS, "matching_costs",
        given("f32[10,1,100,134]", *map(tensors, ("i64[30]", "f32[1000,30]", "f32[1000,30]")), 2.0, 5.0, 5.0),
    ),
    # Class logits and labels of ten outputs of two images, weights of classes, and the output of each of 400 masks.
    Case(_LOSS, "criterion_losses", given("f32[10,200,134] i64[10,200] f32[134] f32[400] f32[400] i64[400]")),
    Case(
        _LOSS, "criterion_losses_backward",
        given("f32[10] f32[10] f32[10] f32[10,200,134] i64[10,200] f32[134] f32[10] i64[400]"),
    ),
    Case(_LOSS, "rows_backward", given("f32[300,256] i64[300] x[1000,256]")),
    Case(_DEFORMABLE, "ms_deform_attn", deformable(), _DEFORMABLE_HEADS),
    Case(_DEFORMABLE, "ms_deform_attn_from_offsets", deformable(2), _DEFORMABLE_HEADS),
    Case(_DEFORMABLE, "ms_deform_attn_backward", deformable(backward=True), _DEFORMABLE_HEADS, representative=False),
    # Channels in several pieces, which the interpreter forgives what the compiler does not.
    Case(_DEFORMABLE, "ms_deform_attn_backward", deformable(backward=True), (256,), targets=(90,)),
    Case(_DEFORMABLE, "ms_deform_attn_from_offsets_backward", deformable(4, backward=True), _DEFORMABLE_HEADS),
    Case(
        _DEFORMABLE, "ms_deform_attn_backward", deformable(backward=True), representative=False,
        chosen=partial(mock.patch, "torch.are_deterministic_algorithms_enabled", return_value=True),
    ),
    # More samples than are unrolled.
    Case(_DEFORMABLE, "ms_deform_attn_from_offsets", deformable(4, points=8), representative=False),
]  # fmt: skip


@cache
def cases() -> list[Case]:
    """Those of this file and of operators' own files."""
    return [*CASES, *of_operators("static_cases")]


#: A compiled kernel and its launch, by column of the table; and "seconds" of CPU time that compiling took.
Line = dict[str, Any]


def problems(line: Line) -> list[str]:
    """Sentences about spills and about shared memory beyond what a program may have.

    Backward kernels may spill on GPUs that they are not tuned for: there that is listed, and no error."""
    name = f"{line['kernel']} ({line['dtype']}, D={line['D']}, {line['constants']}) on {line['architecture']}"
    limit, found = _LIMITS[line["architecture"]], []
    may_spill = line["operator"].endswith("backward") and line["architecture"] not in _DATA_CENTRE
    if line["spills"] and not may_spill:
        found.append(f"{name} spills: {line['spills']} instructions, {line['stack']} bytes of stack per thread")
    if line["shared"] > limit:
        found.append(f"{name} wants {line['shared']} bytes of shared memory; a program may have {limit}")
    return found


def amd_usage(assembly: str) -> tuple[int, int, int]:
    """Vector registers, bytes of stack per thread and registers spilled to it, by the metadata in AMD's assembly.

    Where there is no stack, scalar registers were spilled to lanes of vector registers: no memory is touched."""
    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    # Each stands there once, for the one kernel.
    found = (map(int, re.findall(rf"\.{name}:\s+(\d+)", assembly)) for name in names)
    (registers,), (stack,), (vectors,), (scalars,) = found
    return registers, stack, vectors + scalars if stack else 0


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, by the tool that comes with triton."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", text)  # of one kernel
    return int(registers), int(stack)


def compile_kernel(kernel: Any, arguments: dict[str, Any], target: int | str, options: dict[str, Any]) -> Any:
    """A Triton kernel compiled as for a launch with these arguments.

    Triton's own launcher says which of them are constants, or divisible by 16. What it says of numbers in tuples, on
    which no code depends, and on AMD of tensors below 2 GiB is left out: one kernel is compiled for all."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from m2f_kernels._triton import ARCHITECTURES

    one = ARCHITECTURES[target]
    gpu = GPUTarget("hip", one.gfx, one.warp_size) if one.gfx else GPUTarget("cuda", one.capability, 32)
    backend = make_backend(gpu)
    bound, specialization, given = create_function_from_signature(kernel.signature, kernel.params, backend)(
        **arguments, **options
    )
    _, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, given)
    divisible = {
        at: [x for x in found if x[0] == "tt.divisibility"] for at, found in attributes.items() if len(at) == 1
    }
    return triton.compile(ASTSource(kernel, signature, constants, divisible), target=gpu, options=options)


def compiled_launches(
    case: Case, dtype: torch.dtype, head_dim: int = 32, target: int | str = 90
) -> Iterator[tuple[Any, Any, float]]:
    """Yields every launch of a case, its compiled kernel, and the CPU seconds that went into compiling it."""
    from m2f_kernels._triton import ARCHITECTURES, OPTIONS, recording

    with case.chosen(), recording(ARCHITECTURES[target]) as launches:
        getattr(importlib.import_module(case.module), case.function)(*case.arguments(dtype, head_dim))
    if not launches:
        raise RuntimeError(f"{case.function} launched no kernel")
    for launch in launches:
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **OPTIONS}
        before = sum(os.times()[:4])
        compiled = compile_kernel(launch.kernel, launch.arguments, target, options)
        yield launch, compiled, sum(os.times()[:4]) - before


#: What is stated of a kernel for one number of channels per head only, its first, and for data centre parts.
_LEAST = ("programs (waves)", "MiB", "least µs", "instructions", "accesses to global memory")


def compile_case(counted: bool, index: int, dtype: str, head_dim: int, target: int | str) -> list[Line]:
    """The lines of every kernel that `cases()[index]` launches, compiled; instructions only if they are `counted`."""
    import triton

    from m2f_kernels._triton import ARCHITECTURES

    case, architecture = cases()[index], ARCHITECTURES[target]
    part, results = sass.MULTIPROCESSORS.get(architecture.capability), {}
    for launch, compiled, seconds in compiled_launches(case, DTYPES[dtype], head_dim, target):
        constants = ", ".join(f"{name}={value}" for name, value in launch.arguments.items() if name.isupper())
        line = {
            "operator": case.function, "kernel": launch.kernel.__name__, "dtype": dtype, "D": head_dim,
            "architecture": architecture.name, "constants": constants,
            "warps": launch.num_warps, "stages": launch.num_stages, "shared": compiled.metadata.shared,
        }  # fmt: skip
        shown, mix = dict.fromkeys(("occupancy", *_LEAST), ""), None
        if part is None:
            line["registers"], line["stack"], line["spills"] = amd_usage(compiled.asm["amdgcn"])
        else:
            line["registers"], line["stack"] = resource_usage(compiled.asm["cubin"])
            if counted or line["stack"]:  # spills need a stack; disassembly takes as long as compilation
                mix = sass.mix(compiled.asm["sass"])
            line["spills"] = mix.counts["local"] if mix else 0
            takes = architecture.capability, launch.num_warps, line["registers"], compiled.metadata.shared
            shown["occupancy"] = f"{sass.occupancy(*takes):.0%}"
        programs, moved = math.prod(launch.grid), measure.bytes_of(launch.arguments.values())
        if part and part.bandwidth:
            waves = programs / max(1, sass.blocks_per_multiprocessor(*takes) * part.count)
            products = case.flops(head_dim).get(launch.kernel.__name__, 0) if dtype != "fp32" else 0
            least, bound = max((moved / part.bandwidth, "bandwidth"), (products / part.tensor_flops, "products"))
            cells = f"{programs} ({waves:.1f})", f"{moved / 2**20:.2f}", f"{least * 1e6:.2g} ({bound})"
            shown |= zip(_LEAST, (*cells, *((mix.text(), mix.memory()) if mix else ("", ""))), strict=True)
        about = {**line, **shown, "compiler": f"triton {triton.__version__}"}
        # Kernels that are launched twice, and alike, are stated once.
        results.setdefault(f"{about} {programs} {moved} {mix}", about | {"seconds": seconds})
    return list(results.values())


def summary(results: list[Line]) -> str:
    """A Markdown table of kernels by targets: spills of the worst compiled variant, the number of variants, and the CPU
    seconds of the slowest."""
    targets = [name for name in _LIMITS if any(r["architecture"] == name for r in results)]
    lines = []
    for function, kernel in dict.fromkeys((r["operator"], r["kernel"]) for r in results):
        of = [r for r in results if (r["operator"], r["kernel"]) == (function, kernel)]
        by_target = [[r["spills"] for r in of if r["architecture"] == target] for target in targets]
        cells = [f"{max(spills)} ({len(spills)})" if spills else "" for spills in by_target]
        lines.append([function, f"`{kernel}`", *cells, f"{max(r['seconds'] for r in of):.1f}"])
    return markdown(["operator", "kernel", *targets, "seconds"], lines)


#: What is known of a kernel besides the columns of its table.
_HIDDEN = ("seconds", "code")


def report(made: list[Line], counted: str, wrong: list[str], options: argparse.Namespace, shown: str = "") -> int:
    """The exit status, after printing lines (or what is `shown` in place of them), their number and what is wrong, and
    writing them to the file that the options name."""
    made = [{name: value for name, value in line.items() if name not in _HIDDEN} for line in made]
    print(f"{shown or markdown(list(made[0]), [line.values() for line in made])}\n{counted}")
    if options.output is not None:
        write_csv(options.output, made)
    for problem in wrong:
        print(f"wrong: {problem}", file=sys.stderr)
    return int(options.check and bool(wrong))


def main() -> int:
    options = arguments(
        __doc__,
        {
            "--check": {
                "action": "store_true",
                "help": "fail if a kernel spills or wants too much shared memory; backward kernels may spill on other "
                "parts than sm_80, sm_90 and sm_100",
            },
            "--representative": {"action": "store_true", "help": "one D, in fp32 and bf16"},
            "--dtypes": {"nargs": "+", "choices": DTYPES, "help": "default: those of the set"},
            "--select": {"default": "", "help": "only operators whose name contains this"},
            "--archs": {
                "default": ",".join(map(str, SHARED_LIMITS)),
                "help": "compute capabilities and AMD's names, separated by ','; default: all, %(default)s",
            },
            "--summary": {
                "action": "store_true",
                "help": "print kernels by targets with their spills, not every kernel; no instructions are counted",
            },
            "--processes": {"type": int, "default": os.cpu_count() or 1},
            "--output": {"type": Path, "help": "write the table there, as CSV, besides printing it"},
        },
    )
    if os.environ.get("TRITON_INTERPRET") == "1":
        options.refuse("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    targets: list[int | str] = [int(a) if a.isdecimal() else a for a in options.archs.split(",")]
    if unknown := [a for a in targets if a not in SHARED_LIMITS]:
        known = ", ".join(map(str, SHARED_LIMITS))
        options.refuse(f"--archs: expected some of {known}; got {unknown[0]}")
    few = options.representative
    work = [
        (index, dtype, head_dim, target)
        for index, case in enumerate(cases())
        if options.select in case.function and (case.representative or not few)
        for dtype in options.dtypes or (("fp32", "bf16") if few else DTYPES)
        for head_dim in (case.head_dims[:1] if few else case.head_dims)
        for target in targets
        if target in case.targets
    ]
    if not work:
        options.refuse(f"--select: no operator's name contains {options.select!r}")
    # Forked, they need not import torch again; nothing has been computed here, nor a GPU touched.
    with ProcessPoolExecutor(options.processes, mp_context=get_context("fork")) as pool:
        compiled = pool.map(partial(compile_case, not options.summary), *zip(*work, strict=True))
        made = [line for lines in compiled for line in lines]
    first = {(line["operator"], line["kernel"]): line["D"] for line in reversed(made)}
    for line in made:
        if line["D"] != first[line["operator"], line["kernel"]]:
            line.update(dict.fromkeys(_LEAST, ""))
    wrong = [problem for line in made for problem in problems(line)]
    counted = f"{len(made)} kernels, {len(wrong)} of them with spills or too much shared memory."
    return report(made, counted, wrong, options, summary(made) if options.summary else "")


if __name__ == "__main__":
    sys.exit(main())
