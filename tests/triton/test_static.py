"""Every Triton kernel compiles ahead of time for every supported architecture, without spills."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from benchmarks import static
from benchmarks.cases import read_csv
from tests.processes import python

#: `python -m benchmarks.static`
run = partial(python, "-m", "benchmarks.static")


@pytest.mark.parametrize(
    ("architecture", "dtype", "operators", "shown"),
    [
        (90, "bf16", "", ["--summary"]),
        (90, "fp32", "attention", ["--summary"]),
        (80, "bf16", "attention_backward", ["--summary"]),
        (100, "bf16", "attn", []),
    ],
)
def test_kernels_compile_without_spills(
    tmp_path: Path, architecture: int, dtype: str, operators: str, shown: list[str]
) -> None:
    """Every kernel where most users are; elsewhere those that spill first. A slow test compiles everything."""
    table = tmp_path / "resources.csv"
    chosen = ["--archs", architecture, "--dtypes", dtype, "--select", operators, *shown]
    done = run("--check", "--representative", *chosen, "--processes", 1, "--output", table)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_csv(table)
    assert shown or all(line["instructions"] for line in lines)
    expected = [
        case
        for case in static.cases()
        if case.representative and architecture in case.targets and operators in case.function
    ]
    assert {(line["operator"], line["dtype"]) for line in lines} == {(case.function, dtype) for case in expected}


@pytest.mark.parametrize(
    ("operator", "targets", "kernel"),
    [
        # The oldest NVIDIA generation, AMD with warps of 64 and of 32.
        ("ms_deform_attn_from_offsets", "gfx942", "_forward_kernel"),
        pytest.param("ms_deform_attn_from_offsets", "75,gfx1100", "_forward_kernel", marks=pytest.mark.slow),
        ("predict_attention_mask", "75,gfx1100", "_predict_kernel"),
        pytest.param("mask_matching_cost", "75,gfx1100", "_cost_kernel", marks=pytest.mark.slow),
        pytest.param("masked_attention", "75,86,gfx942,gfx1100", "_forward_kernel", marks=pytest.mark.slow),
        pytest.param("point", "75,120,gfx90a,gfx1100", "_sample_kernel", marks=pytest.mark.slow),
    ],
)
def test_other_parts_get_pieces_that_they_hold(operator: str, targets: str, kernel: str) -> None:
    """Consumers' and AMD's, whose registers or shared memory are fewer than those of the parts measured."""
    done = run("--check", "--summary", "--representative", "--select", operator, "--archs", targets)
    assert done.returncode == 0, done.stdout + done.stderr
    header = done.stdout.splitlines()[0]
    assert all(f" {f'sm_{t}' if t.isdecimal() else t} |" in header for t in targets.split(","))
    assert f"`{kernel}`" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", list(static.SHARED_LIMITS))
def test_every_kernel_compiles_for_its_targets(target: int | str) -> None:
    """Every dtype and every number of channels per head that the tables list; minutes per target."""
    assert any(target in case.targets for case in static.cases())
    done = run("--check", "--archs", str(target))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--archs", "90,gfx1"], {}, "gfx1100; got gfx1"),
        (["--select", "no such operator"], {}, "no such operator"),
        (["--check"], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], environment: dict[str, str], message: str) -> None:
    done = run(*arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr


FINE = {
    "operator": "f", "kernel": "k", "dtype": "bf16", "D": 32, "architecture": "sm_90", "constants": "", "shared": 1024,
    "stack": 8, "spills": 0,
}  # fmt: skip


@pytest.mark.parametrize(("change", "word"), [({"spills": 2}, "spills"), ({"shared": 10**6}, "shared memory")])
def test_check_finds_problems(change: dict[str, int], word: str) -> None:
    assert static.problems(FINE) == []
    (problem,) = static.problems(FINE | change)
    assert word in problem
    # Backward kernels may spill on parts that nobody has tuned them for, and only there.
    backward = FINE | {"operator": "f_backward"} | change
    assert static.problems(backward)
    assert bool(static.problems(backward | {"architecture": "gfx942"})) == ("shared" in change)


def test_summary() -> None:
    made = [
        FINE | {"architecture": target, "spills": spills, "seconds": seconds}
        for target, spills, seconds in (("gfx942", 3, 0.5), ("sm_90", 0, 1.25), ("sm_90", 2, 1.0))
    ]
    assert static.summary(made).splitlines()[::2] == [
        "| operator | kernel | sm_90 | gfx942 | seconds |",
        "| f | `k` | 2 (2) | 3 (1) | 1.2 |",
    ]


#: Prints what Triton's launcher tells kernels of deformable attention apart by, for images of two sizes.
LAUNCHES = """
import sys
from itertools import accumulate
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from m2f_kernels import _triton
from m2f_kernels.ops.ms_deform_attn import triton as op

name, points = sys.argv[1], [2, 1]
offsets, backward = "offsets" in name, name.endswith("backward")
tensor = lambda *shape: torch.empty(shape, device="meta")
for sizes, q in ((((64, 64), (1, 1)), 4097), (((48, 50), (31, 17)), 5000)):
    starts = list(accumulate((h * w for h, w in sizes), initial=0))
    levels = [n for (h, w), start in zip(sizes, starts) for n in (h, w, start)]
    given = [tensor(1, starts[-1], 8, 32), levels, None, None]
    given += [tensor(1, q, 2, 2)] if offsets else []
    given += [tensor(1, q, 8, 3, 2), tensor(1, q, 8, 3), points] + ([0.5] if offsets else [])
    if backward:
        given = [tensor(1, q, 256), *given, True, True] + ([True] if offsets else [])
    with _triton.recording(_triton.ARCHITECTURES[90]) as launches:
        getattr(op, name)(*given)
    backend, (launch,) = make_backend(GPUTarget("cuda", 90, 32)), [x for x in launches if "sizes" in x.arguments]
    kernel = launch.kernel
    _, key, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(**launch.arguments)
    print(launch.num_warps, key)
"""


@pytest.mark.parametrize("backward", ["", "_backward"])
@pytest.mark.parametrize("operator", ["ms_deform_attn", "ms_deform_attn_from_offsets"])
def test_sizes_and_queries_of_deformable_attention_do_not_recompile(operator: str, backward: str) -> None:
    """Images of other sizes are served by the kernels that are there."""
    done = python("-c", LAUNCHES, operator + backward)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert "constexpr" in first


def test_deformable_attention_executes_few_instructions() -> None:
    """Per sample of a query and head, in bfloat16 on sm_90: what bounds it."""
    # Without nvcc: the kernels of the CUDA library have a test of their own.
    done = python("-c", "from benchmarks import sass, static_cuda; static_cuda.compiler = lambda: None; sass.main()")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"\| (.*), bfloat16 \| ([\d.]+) \|", done.stdout)
    assert [name for name, _ in found] == ["locations", "offsets, 2-d"]
    assert all(float(number) <= 24 for _, number in found), done.stdout
