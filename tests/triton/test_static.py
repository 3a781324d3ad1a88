"""Every Triton kernel compiles ahead of time for every supported architecture, without spills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import static
from m2f_kernels.ops.masked_attention import triton as masked_attention

ROOT = Path(__file__).parents[2]


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.static` in a process of its own: this one may have chosen the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "benchmarks.static", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    # Masked attention refuses sm_100 with an older Triton: test_masked_attention_guarantees.py.
    architectures = [a for a in static.SHARED_LIMITS if a != 100 or masked_attention._TRITON >= (3, 8)]
    chosen = ",".join(map(str, architectures))
    done = run("--check", "--representative", "--archs", chosen, "--output", str(tmp_path / "resources.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = (tmp_path / "resources.md").read_text()
    for case in static.CASES:
        for architecture in architectures:
            rows = [line for line in written.splitlines() if line.startswith(f"| {case.function} |")]
            assert any(f" sm_{architecture} " in row for row in rows), f"{case.function} on sm_{architecture}"


def test_interpreter_is_refused() -> None:
    done = run("--check", interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_unknown_operator_is_an_error() -> None:
    done = run("--select", "no such operator")
    assert done.returncode == 2
    assert "no such operator" in done.stderr


@pytest.mark.parametrize(("change", "word"), [({"spills": 2}, "spills"), ({"shared": 10**6}, "shared memory")])
def test_check_finds_problems(change: dict[str, int], word: str) -> None:
    fine = {
        "stack": 8,
        "spills": 0,
        "shared": 1024,
        "registers": 32,
        "shared_limit": 2048,
        "num_warps": 4,
        "num_stages": 1,
    }
    names = {"function": "f", "kernel": "k", "dtype": "bf16", "architecture": "sm_90", "constants": "", "head_dim": 32}
    assert static.Resources(**names, **fine).problems() == []
    (problem,) = static.Resources(**names, **{**fine, **change}).problems()
    assert word in problem


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
