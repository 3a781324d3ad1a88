"""Every Triton kernel compiles ahead of time for every supported architecture, without spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import static
from benchmarks.cases import read_csv
from m2f_kernels import _triton
from m2f_kernels.ops.ms_deform_attn import triton as ms_deform_attn

ROOT = Path(__file__).parents[2]


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.static` in a process of its own: this one may have chosen the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "benchmarks.static", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(
    ("architecture", "dtypes", "operators"),
    [(90, ["bf16"], ""), (90, ["fp32"], "attention"), (80, ["bf16"], "masked_attention"), (100, ["bf16"], "attn")],
)
def test_kernels_compile_without_spills(tmp_path: Path, architecture: int, dtypes: list[str], operators: str) -> None:
    """Every kernel where most users are; elsewhere those that spill first. A slow test compiles everything."""
    table = tmp_path / "resources.csv"
    chosen = ["--archs", str(architecture), "--dtypes", *dtypes, "--select", operators]
    done = run("--check", "--representative", *chosen, "--processes", "1", "--output", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    written = {(line["operator"], line["dtype"]) for line in read_csv(table)}
    expected = [
        case
        for case in static.cases()
        if case.representative and architecture in case.targets and operators in case.function
    ]
    assert written == {(case.function, dtype) for case in expected for dtype in dtypes}


@pytest.mark.parametrize(
    "target", [pytest.param(75, marks=pytest.mark.slow), "gfx942", pytest.param("gfx1100", marks=pytest.mark.slow)]
)
def test_deformable_attention_compiles_without_spills_elsewhere(target: int | str) -> None:
    """The oldest NVIDIA generation, AMD with warps of 64 and of 32."""
    done = run("--check", "--representative", "--select", "ms_deform_attn_from_offsets", "--archs", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_forward_kernel" in done.stdout
    assert "_softmax_backward_kernel" in done.stdout


@pytest.mark.parametrize(
    ("operator", "targets"),
    [
        ("predict_attention_mask", "75,gfx1100"),
        pytest.param("mask_matching_cost", "75,gfx1100", marks=pytest.mark.slow),
        pytest.param("masked_attention", "75,86,gfx942,gfx1100", marks=pytest.mark.slow),
        pytest.param("point", "75,120,gfx90a,gfx1100", marks=pytest.mark.slow),
    ],
)
def test_other_parts_get_pieces_that_they_hold(operator: str, targets: str) -> None:
    """Consumers' and AMD's, whose registers or shared memory are fewer than those of the parts measured."""
    done = run("--check", "--summary", "--representative", "--select", operator, "--archs", targets)
    assert done.returncode == 0, done.stdout + done.stderr
    header = done.stdout.splitlines()[0]
    assert all(f" {f'sm_{t}' if t.isdecimal() else t} |" in header for t in targets.split(","))


@pytest.mark.slow
@pytest.mark.parametrize("target", list(static.SHARED_LIMITS))
def test_every_kernel_compiles_for_its_targets(target: int | str) -> None:
    """Every dtype and every number of channels per head that the tables list; minutes per target."""
    assert any(target in case.targets for case in static.cases())
    done = run("--check", "--archs", str(target))
    assert done.returncode == 0, done.stdout + done.stderr


def test_unknown_target_is_an_error() -> None:
    done = run("--archs", "90,gfx1")
    assert done.returncode == 2
    assert "gfx1100; got gfx1" in done.stderr


def test_interpreter_is_refused() -> None:
    done = run("--check", interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_unknown_operator_is_an_error() -> None:
    done = run("--select", "no such operator")
    assert done.returncode == 2
    assert "no such operator" in done.stderr


FINE = static.Resources(
    function="f", kernel="k", dtype="bf16", head_dim=32, architecture="sm_90", constants="", num_warps=4, num_stages=1,
    shared=1024, shared_limit=2048, registers=32, stack=8, spills=0,
)  # fmt: skip


@pytest.mark.parametrize(("change", "word"), [({"spills": 2}, "spills"), ({"shared": 10**6}, "shared memory")])
def test_check_finds_problems(change: dict[str, int], word: str) -> None:
    assert FINE.problems() == []
    (problem,) = replace(FINE, **change).problems()
    assert word in problem
    # Backward kernels may spill on parts that nobody has tuned them for, and only there.
    backward = replace(FINE, function="f_backward", **change)
    assert backward.problems()
    assert bool(replace(backward, architecture="gfx942").problems()) == ("shared" in change)


def test_summary() -> None:
    made = [
        replace(FINE, architecture=target, spills=spills, seconds=seconds)
        for target, spills, seconds in (("gfx942", 3, 0.5), ("sm_90", 0, 1.25), ("sm_90", 2, 1.0))
    ]
    assert static.summary(made).splitlines()[::2] == [
        "| operator | kernel | sm_90 | gfx942 | seconds |",
        "| f | `k` | 2 (2) | 3 (1) | 1.2 |",
    ]


def test_launch_arguments_are_specialised_as_triton_does() -> None:
    class Parameter:
        def __init__(self, name: str, is_constexpr: bool = False, do_not_specialize: bool = False) -> None:
            self.name, self.is_constexpr, self.do_not_specialize = name, is_constexpr, do_not_specialize

    class Kernel:
        params = (
            Parameter("x"), Parameter("one"), Parameter("sixteen"), Parameter("free", do_not_specialize=True),
            Parameter("large"), Parameter("scale"), Parameter("BLOCK", is_constexpr=True),
        )  # fmt: skip

    x = static.meta(4, dtype=torch.bfloat16)
    arguments = {"x": x, "one": 1, "sixteen": 16, "free": 1, "large": 2**31 + 1, "scale": 1.0, "BLOCK": 64}
    signature, constants, attributes = static.specialise(Kernel, arguments)
    assert signature == {
        "x": "*bf16", "one": "constexpr", "sixteen": "i32", "free": "i32", "large": "i64", "scale": "fp32",
        "BLOCK": "constexpr",
    }  # fmt: skip
    assert constants == {"one": 1, "BLOCK": 64}
    assert set(attributes) == {(0,), (2,)}


def test_sizes_and_queries_of_deformable_attention_do_not_recompile() -> None:
    """Images of other sizes are served by the kernels that are there."""

    def specialised(sizes: tuple[tuple[int, int], ...], q: int) -> tuple[dict[str, object], int]:
        length = sum(h * w for h, w in sizes)
        tensors = [
            static.meta(*shape, dtype=torch.float32) for shape in ((1, length, 8, 32), (1, q, 8, 2, 2), (1, q, 8, 2))
        ]
        levels = [n for i, (h, w) in enumerate(sizes) for n in (h, w, i * sizes[0][0] * sizes[0][1])]
        with _triton.recording(_triton.ARCHITECTURES[90]) as launches:
            ms_deform_attn.ms_deform_attn(tensors[0], levels, None, None, *tensors[1:], [1, 1])
        constants = {k: v for k, v in launches[0].arguments.items() if k.isupper()}
        return constants, launches[0].num_warps

    assert specialised(((64, 64), (1, 1)), 4097) == specialised(((48, 50), (31, 17)), 5000)


def test_deformable_attention_executes_few_instructions() -> None:
    """Per sample of a query and head, in bfloat16 on sm_90: what bounds it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Without nvcc: the kernels of the CUDA library have a test of their own.
    script = "from benchmarks import sass, static_cuda; static_cuda.compiler = lambda: None; sass.main()"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"\| (.*), bfloat16 \| ([\d.]+) \|", done.stdout)
    assert [name for name, _ in found] == ["locations", "offsets, 2-d"]
    assert all(float(number) <= 24 for _, number in found), done.stdout
