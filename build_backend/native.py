"""CMake with Ninja for `setup.py`: finds the tools, starts afresh when they changed, compiles."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import cuda_compiler
import torch_headers

ROOT = Path(__file__).parents[1].resolve()
#: Environment variables that CMake reads at its first run only, and then caches.
REMEMBERED = ("CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "M2F_CUDA_ARCHS")


class BuildError(Exception):
    """A failed build, with a message of one line for the user."""


def pure() -> bool:
    """True if no libraries are built: where that is impossible, or for `M2F_PURE=1`, a wheel that runs anywhere."""
    return sys.platform != "linux" or os.environ.get("M2F_PURE", "0") not in ("", "0")


def wants_cuda() -> str:
    """`M2F_CUDA`: "auto", "on" or "off"."""
    chosen = os.environ.get("M2F_CUDA", "auto").lower()
    if chosen not in ("auto", "on", "off"):
        raise BuildError(f"M2F_CUDA: expected auto, on or off; got {chosen!r}")
    return chosen


def version_of(text: str) -> tuple[int, ...]:
    """The first version number in a text."""
    found = re.search(r"\d+(\.\d+)+", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def tool(name: str) -> str:
    """The path of `cmake` or `ninja`: on PATH, or of the Python package that is named so.

    Raises:
        BuildError: it is not there.
    """
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            files = [f for f in importlib.metadata.files(name) or () if f.parts[-2:] == ("bin", name)]
            found = next((path for f in files if (path := shutil.which(str(f.locate())))), None)
    if found is None:
        raise BuildError(f"building needs {name}, which is not on PATH: pip install {name}")
    return found


def compiler() -> str:
    """The C++ compiler that CMake will use. `CC` alone chooses the C++ compiler that belongs to it.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX")
    if not chosen and (c := os.environ.get("CC")):
        chosen = re.sub(r"gcc(?=(-\d+)?$)", "g++", re.sub(r"clang(?=(-\d+)?$)", "clang++", c))
    names = [chosen] if chosen else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(name.split()[0]) is not None:
            return name
    raise BuildError(
        f"building needs a C++17 compiler, and {' or '.join(names)} is not on PATH: install g++ or clang++"
    )


def check() -> None:
    """Raises `BuildError` before the build starts, if something would stop it."""
    cuda = wants_cuda()
    if pure():
        if cuda == "on":
            raise BuildError("M2F_CUDA=on, but no libraries are built on this system or with M2F_PURE=1")
        return
    for name in ("cmake", "ninja"):
        tool(name)
    compiler()
    if torch_headers.find() is None:
        raise BuildError(torch_headers.missing())
    if cuda == "on" and cuda_compiler.find() is None:
        raise BuildError(
            "M2F_CUDA=on, but no nvcc was found: put it on PATH, set CUDACXX, let pip isolate the build, or "
            f"pip install {' '.join(map(repr, cuda_compiler.PACKAGES))}"
        )


def options(output: Path) -> dict[str, str]:
    """The options for CMake, by the names of its cache variables."""
    headers = torch_headers.find()
    if headers is None:
        raise BuildError(torch_headers.missing())
    chosen = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "M2F_TORCH_INCLUDE": str(headers[0]),
        "M2F_TORCH_SOURCE": headers[1],
        "M2F_OUTPUT": str(output),
        "M2F_CUDA": wants_cuda(),
    }
    nvcc = cuda_compiler.find() if chosen["M2F_CUDA"] != "off" else None
    if nvcc is not None:
        chosen |= {"CMAKE_CUDA_COMPILER": str(nvcc.path), "M2F_NVCC_SOURCE": nvcc.source}
    if "M2F_CUDA_ARCHS" in os.environ:
        chosen["M2F_CUDA_ARCHS"] = re.sub("[, ]+", ";", os.environ["M2F_CUDA_ARCHS"].strip())
    return chosen


def environment() -> dict[str, str]:
    """The compilers' environment."""
    result = dict(os.environ, CXX=compiler(), NINJA_STATUS="[%f/%t] ")
    if shutil.which("g++") is None:  # what nvcc would call
        result.setdefault("CUDAHOSTCXX", result["CXX"])
    # PyPI's nvcc does not tell the linker where its libraries are.
    nvcc = cuda_compiler.find()
    if nvcc is not None and nvcc.libraries is not None:
        known = result.get("LIBRARY_PATH")
        result["LIBRARY_PATH"] = f"{nvcc.libraries}:{known}" if known else str(nvcc.libraries)
    return result


def forget_other_tools(build: Path, chosen: dict[str, str]) -> bool:
    """Empty `build` unless it was configured with the same tools, which CMake finds once and then remembers.

    pip deletes its build environment with ninja, nvcc and torch's headers, so a cache that names them is useless.
    Returns True if anything was deleted.
    """
    tools: dict[str, str | None] = {**chosen, "cmake": tool("cmake"), "compiler": compiler()}
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
    command += [f"-D{name}={value}" for name, value in chosen.items()]
    lines = [line.removeprefix("-- ") for line in call(command, build / "configure.log")]
    start = lines.index("m2f-kernels")
    say("\n".join(lines[start : start + 6]))
    if not any(line.startswith("  libm2f_cuda    nvcc") for line in lines[start:]):
        (output / "libm2f_cuda.so").unlink(missing_ok=True)  # of an earlier build, and of other sources


def compile_all(build: Path) -> None:
    """Compile, naming each file when it is done, and say how long it took."""
    start = time.monotonic()
    call([tool("cmake"), "--build", str(build)], build / "build.log", progress=True)
    say(f"m2f-kernels: compiled in {time.monotonic() - start:.0f} s")


def call(command: list[str], log: Path, progress: bool = False) -> list[str]:
    """Run, keep the whole output in `log`, and return its lines; on failure show everything.

    Args:
        progress: show Ninja's lines meanwhile, "[3/21] Building CXX object ...". pip shows them with -v.
    """
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment()
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if progress and re.match(r"\[\d+/\d+\] ", line):
                say("  " + lines[-1])
    log.write_text("\n".join(lines))
    if process.returncode != 0:
        say("\n".join(lines))
        raise BuildError(f"{log.stem} failed, see above; the command was {' '.join(command)}")
    return lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
