"""Registers, shared memory and spills of each CUDA kernel, as the compiler reports them, for all shipped architectures.

    python -m benchmarks.static_cuda --output benchmarks/results/cuda_resources.csv --check

Needs nvcc, of a toolkit or from PyPI, and triton, which brings the disassembler; no GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import cache
from operator import itemgetter
from pathlib import Path

import torch

from benchmarks import arguments, sass, static

SOURCE = "ms_deform_attn/cuda_kernels.cu"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
#: Threads of a block: the launch bound of every kernel (`kMaxThreads`).
THREADS = 256
_CSRC = Path(__file__).parents[2] / "csrc"
#: A kernel in the assembler's verbose report.
_REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


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
        RuntimeError: nvcc failed, or its report names no kernel, as when its wording changes; with its output.
    """
    import triton

    with tempfile.TemporaryDirectory() as directory:
        source, cubin = Path(directory) / "kernels.cu", Path(directory) / "kernels.cubin"
        source.write_text(f'#include "{file}"\n')
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
        command += ["-I", str(_CSRC), str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        found = _REPORT.findall(done.stderr)
        if done.returncode != 0 or not found:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        disassemble = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        code = dumps(subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout)
    kernels = []
    for mangled, *numbers in found:
        stack, stores, loads, registers, shared = (int(number or 0) for number in numbers)
        mix = sass.mix(code[mangled])
        kernels.append({
            # Without return types, parameters and the package's namespace.
            "kernel": re.sub(r"^void |m2f::|\((?!anonymous).*\)$", "", torch._C._demangle(mangled)),
            "architecture": f"sm_{architecture}", "registers": registers, "static shared memory": shared,
            "stack": stack, "spill stores": stores, "spill loads": loads,
            # What the launch adds to static shared memory may lower it.
            "occupancy": f"{sass.occupancy(int(architecture), THREADS // 32, registers, shared):.0%}",
            "instructions": mix.text(), "accesses to global memory": mix.memory(), "code": code[mangled],
        })  # fmt: skip
    return sorted(kernels, key=itemgetter("kernel"))


def dumps(code: str) -> dict[str, str]:
    """The part of each kernel in what cuobjdump writes, by its mangled name."""
    parts = re.split(r"^\s*Function : (\w+)$", code, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def control_codes(dump: str) -> str:
    """One kernel's `cuobjdump -sass` as Triton prints it: a label and control codes before each instruction."""
    from triton.tools.disasm import parseCtrl

    lines = []
    for address, code, control in re.findall(
        r"/\*([0-9a-f]{4,5})\*/\s+([^;]*;)\s*/\* 0x\w+ \*/\s*(/\* 0x\w+ \*/)", dump
    ):
        if re.search(r"\bBRA\b", code):
            code = re.sub(r"\b0x([0-9a-f]+)", lambda m: f"LBB{int(m[1], 16)}", code)
        lines += [f"LBB{int(address, 16)}:", f"{parseCtrl(control)}\t{code.strip()}"]
    return "\n".join(lines) + "\n"


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
    made = [kernel | origin for one in re.split("[;,]", options.archs) for kernel in compiled(nvcc, one)]
    spilling = [k for k in made if k["spill stores"] or k["spill loads"]]
    architectures, spills = {k["architecture"] for k in made}, f"{len(spilling)} of them with register spills"
    failed = [f"{k['kernel']} spills on {k['architecture']}" for k in spilling if "forward" in k["kernel"]]
    return static.report(made, f"{len(made)} kernels on {len(architectures)} architectures, {spills}.", failed, options)


if __name__ == "__main__":
    sys.exit(main())
