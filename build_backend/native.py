"""CMake with Ninja for `setup.py`: finds the tools, starts afresh when they changed, compiles."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()
#: What CMake reads from the environment at its first run only, and then remembers.
REMEMBERED = ("CC", "CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "M2F_CUDA_ARCHS")


class BuildError(Exception):
    """A build that cannot go on, in one line for the user."""


def torch_include() -> Path:
    """PyTorch's headers, found without importing it (its import takes seconds and may want CUDA)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "building needs PyTorch's headers, and torch is not installed in the build environment: "
            "either let pip build in isolation, or install torch >= 2.11 first"
        )
    return Path(spec.origin).parent / "include"


def tool(name: str) -> str:
    """The path of `cmake` or `ninja`."""
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"building needs {name}, which is not on PATH: pip install {name}")
    return found


def options(output: Path) -> dict[str, str]:
    """What CMake is told, by the names of its cache."""
    chosen = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "M2F_TORCH_INCLUDE": str(torch_include()),
        "M2F_OUTPUT": str(output),
        "M2F_CUDA": os.environ.get("M2F_CUDA", "auto"),
    }
    if "M2F_CUDA_ARCHS" in os.environ:
        chosen["M2F_CUDA_ARCHS"] = os.environ["M2F_CUDA_ARCHS"].replace(",", ";").replace(" ", ";")
    return chosen


def forget_other_tools(build: Path, chosen: dict[str, str]) -> bool:
    """Empty `build` unless it was configured with the same tools, which CMake finds once and then remembers.

    pip deletes its build environment, ninja, nvcc and torch's headers with it: a cache that names them is of no use.
    Returns whether anything was deleted.
    """
    tools = {**chosen, "cmake": tool("cmake"), "nvcc": shutil.which("nvcc")}
    tools |= {name: os.environ.get(name) for name in REMEMBERED}
    record = build / "tools.json"
    known = json.loads(record.read_text()) if record.exists() else None
    stale = build.exists() and known != tools
    if stale:
        shutil.rmtree(build)
    build.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(tools, indent=1))
    return stale


def configure(output: Path, build: Path) -> None:
    """Run CMake's first half and show the summary of what will be built."""
    chosen = options(output)
    forget_other_tools(build, chosen)
    command = [tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--log-level=STATUS"]
    text = call(command + [f"-D{name}={value}" for name, value in chosen.items()], build / "configure.log")
    lines = [line.removeprefix("-- ") for line in text.splitlines()]
    start = lines.index("m2f-kernels")
    print("\n".join(lines[start : start + 6]), file=sys.stderr, flush=True)


def compile_all(build: Path) -> None:
    call([tool("cmake"), "--build", str(build)], build / "build.log")


def call(command: list[str], log: Path) -> str:
    """Run quietly, keep the whole output, and return it; on failure show everything."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log.write_text(result.stdout)
    if result.returncode != 0:
        raise RuntimeError(f"m2f-kernels: {log.stem} failed:\n{' '.join(command)}\n{result.stdout}")
    return result.stdout
