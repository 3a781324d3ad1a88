"""The baseline kernels on another CPU: compiled for aarch64, run in an emulator, compared with this machine's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ("masked_attention", "point_sample")
OPTIONS = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-static"]
CROSS = "aarch64-linux-gnu-g++"


def run(compiler: str, directory: Path, emulator: list[str]) -> list[tuple[str, np.ndarray]]:
    """The arrays that portable_kernels.cpp prints, with their names."""
    program = directory / compiler
    sources = [ROOT / "tests/packaging/portable_kernels.cpp", *(ROOT / f"csrc/{op}/cpu_kernel.cpp" for op in KERNELS)]
    command = [
        compiler,
        *OPTIONS,
        f"-I{ROOT / 'csrc'}",
        "-DM2F_VARIANT=baseline",
        *map(str, sources),
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True).stdout
    lines = (line.split() for line in text.splitlines())
    return [(name, np.array(numbers, dtype=np.float64)) for name, *numbers in lines]


@pytest.mark.slow
def test_aarch64_gives_the_same_numbers(tmp_path: Path) -> None:
    """Up to rounding: the two contract multiplication and addition differently. Random points are the same bits."""
    for tool, package in ((CROSS, "g++-aarch64-linux-gnu"), ("qemu-aarch64", "qemu-user")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian's {package})")
    here, there = run("g++", tmp_path, []), run(CROSS, tmp_path, ["qemu-aarch64"])
    assert [name for name, _ in here] == [name for name, _ in there]
    assert len(here) == 14
    for (name, a), (_, b) in zip(here, there, strict=True):
        assert np.linalg.norm(a) > 0
        assert np.linalg.norm(a - b) <= (0 if name == "points" else 1e-5) * np.linalg.norm(a), name
