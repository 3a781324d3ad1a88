"""Registers, shared memory and spills of each CUDA kernel, as the compiler reports them, for all shipped architectures.

    python -m benchmarks.static_cuda --output benchmarks/results/cuda_resources.csv --check

Needs nvcc, of a toolkit or from PyPI, torch, whose headers the bindings need, and triton, which brings the
disassembler; no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from benchmarks import sass, static
from benchmarks.arguments import arguments

SOURCE = "ms_deform_attn/cuda_kernels.cu"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
#: Threads of a block: the launch bound of every kernel (`kMaxThreads`).
THREADS = 256
_CSRC = Path(__file__).parents[2] / "csrc"


def compiler() -> str | None:
    """nvcc, as the build finds it."""
    sys.path.append(str(_CSRC.parent / "build_backend"))
    import cuda_compiler

    found = cuda_compiler.find()
    return None if found is None else str(found.path)


@cache
def compiled(nvcc: str, architecture: str, file: str = SOURCE) -> list[static.Line]:
    """The kernels of a file under csrc, compiled for one architecture: lines of the table, and "code" as cuobjdump
    writes it.

    Raises:
        RuntimeError: nvcc failed, with its output.
    """
    import triton

    with tempfile.TemporaryDirectory() as directory:
        source, cubin = Path(directory) / "kernels.cu", Path(directory) / "kernels.cubin"
        source.write_text(f'#include "{file}"\n')
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-DUSE_CUDA"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-I", str(_CSRC)]
        command += ["-isystem", str(Path(torch.__file__).parent / "include"), str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        disassemble = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    return parse(done.stderr, architecture, dumps(code))


def dumps(code: str) -> dict[str, str]:
    """The part of each kernel in what cuobjdump writes, by its mangled name."""
    parts = re.split(r"^\s*Function : (\w+)$", code, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def control_codes(dump: str) -> str:
    """One kernel's `cuobjdump -sass` as Triton prints it: before each instruction a label, the barriers that it waits
    for, those of its reads and its result, and cycles until the next may issue."""
    pairs = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*;)\s*/\* 0x\w+ \*/\s*/\* 0x(\w+) \*/", dump)
    lines = []
    for address, code, encoding in pairs:
        control = int(encoding, 16) >> 41
        stall, yields = control & 15, not control >> 4 & 1
        write, read, wait = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        if re.search(r"\bBRA\b", code):
            code = re.sub(r"\b0x([0-9a-f]+)", lambda m: f"LBB{int(m[1], 16)}", code)
        barriers = ":".join("-" if barrier == 7 else str(barrier) for barrier in (read, write))
        waits = f"{wait:02d}" if wait else "--"
        lines += [f"LBB{int(address, 16)}:", f"{waits}:{barriers}:{'Y' if yields else '-'}:{stall:x}\t{code.strip()}"]
    return "\n".join(lines) + "\n"


def demangle(names: list[str]) -> list[str]:
    """Readable names without return types, parameters and the package's namespace; as they are without c++filt."""
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |m2f::|\((?!anonymous).*\)$", "", line) for line in text.splitlines()]


def parse(report: str, architecture: str, dumped: Mapping[str, str]) -> list[static.Line]:
    """The kernels of a verbose assembler report, with their disassembly by mangled name.

    Raises:
        RuntimeError: it contains none, as when the compiler's wording changes.
    """
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        report,
        re.DOTALL,
    )
    if not found:
        raise RuntimeError(f"no kernel in the compiler's report:\n{report}")
    kernels = []
    for name, (mangled, *numbers) in zip(demangle([row[0] for row in found]), found, strict=True):
        stack, stores, loads, registers, shared = (int(number or 0) for number in numbers)
        mix = sass.mix(dumped[mangled])
        kernels.append({
            "kernel": name, "architecture": f"sm_{architecture}", "registers": registers,
            "static shared memory": shared, "stack": stack, "spill stores": stores, "spill loads": loads,
            # What the launch adds to static shared memory may lower it.
            "occupancy": f"{sass.occupancy(int(architecture), THREADS // 32, registers, shared):.0%}",
            "instructions": mix.text(), "accesses to global memory": mix.memory(), "code": dumped[mangled],
        })  # fmt: skip
    return sorted(kernels, key=lambda kernel: kernel["kernel"])


def main() -> int:
    options = arguments(
        __doc__,
        {
            "--archs": {"default": ";".join(ARCHITECTURES), "help": "separated by ';' or ','; default: all shipped"},
            "--output": {"type": Path, "help": "write the table there, as CSV, besides printing it"},
            "--check": {"action": "store_true", "help": "fail if a forward kernel spills registers"},
        },
    )
    nvcc = compiler()
    if nvcc is None:
        options.refuse("no nvcc here, neither on PATH nor PyPI's (build_backend/cuda_compiler.py)")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+, V[\d.]+)", version)
    origin = {"compiler": f"nvcc {release[1] if release else 'of unknown release'}"}
    kernels = [kernel for one in re.split("[;,]", options.archs) for kernel in compiled(nvcc, one)]
    made = [{name: value for name, value in kernel.items() if name != "code"} | origin for kernel in kernels]
    spilling = [k for k in made if k["spill stores"] or k["spill loads"]]
    architectures, spills = {k["architecture"] for k in made}, f"{len(spilling)} of them with register spills"
    failed = [f"{k['kernel']} spills on {k['architecture']}" for k in spilling if "forward" in k["kernel"]]
    return static.report(made, f"{len(made)} kernels on {len(architectures)} architectures, {spills}.", failed, options)


if __name__ == "__main__":
    sys.exit(main())
