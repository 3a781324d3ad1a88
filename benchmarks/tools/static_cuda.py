"""Registers, shared memory and spills of each CUDA kernel, as the compiler reports them, for all shipped architectures.

    python -m benchmarks.static_cuda --output benchmarks/results/cuda_resources.csv --check

Needs nvcc, of a toolkit or from PyPI, and the headers of any installed torch; no GPU.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import sass
from benchmarks.arguments import arguments
from benchmarks.cases import write_csv
from benchmarks.formats import markdown

SOURCE = "ms_deform_attn/cuda.cu"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
#: Threads of a block: the launch bound of every kernel (`kMaxThreads`).
THREADS = 256
_CSRC = Path(__file__).parents[2] / "csrc"


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture. Bytes are per thread, but shared memory per block: the static part."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    dump: str = ""

    @property
    def occupancy(self) -> float:
        """By registers and static shared memory; what the launch adds may lower it."""
        return sass.occupancy(int(self.architecture), THREADS // 32, self.registers, self.shared)

    @property
    def code(self) -> str:
        return control_codes(self.dump)


def compiler() -> str | None:
    """nvcc, as the build finds it."""
    sys.path.append(str(_CSRC.parent / "build_backend"))
    import cuda_compiler

    found = cuda_compiler.find()
    return None if found is None else str(found.path)


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that comes with triton."""
    found = shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton"):
        import triton

        found = triton.knobs.nvidia.cuobjdump.path
    return found


def compiled(nvcc: str, architecture: str, file: str = SOURCE) -> list[Kernel]:
    """The kernels of a file under csrc, compiled for one architecture.

    Raises:
        RuntimeError: nvcc failed, with its output; or torch, whose headers bindings need, is not installed.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise RuntimeError("torch is not installed: its headers are needed to compile the bindings")
    with tempfile.TemporaryDirectory() as directory:
        source, cubin = Path(directory) / "kernels.cu", Path(directory) / "kernels.cubin"
        source.write_text(f'#include "{file}"\n')
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-DUSE_CUDA"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-I", str(_CSRC)]
        command += ["-isystem", str(Path(torch.origin).parent / "include"), str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        tool, dump = disassembler(), ""
        if tool is None:
            print("static_cuda: no cuobjdump here: instructions are not counted", file=sys.stderr)
        else:
            dump = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return parse(done.stderr, architecture, dumps(dump))


def dumps(code: str) -> dict[str, str]:
    """The part of each kernel in what cuobjdump writes, by its mangled name."""
    parts = re.split(r"^\s*Function : (\w+)$", code, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def control_codes(dump: str) -> str:
    """One kernel's `cuobjdump -sass` as Triton prints it: labels, and before each instruction the barriers that it
    waits for, those of its reads and its result, and cycles until the next may issue."""
    pairs = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*;)\s*/\* 0x\w+ \*/\s*/\* 0x(\w+) \*/", dump)
    targets = {int(found[1], 16) for _, code, _ in pairs if (found := re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", code))}
    lines = []
    for address, code, encoding in pairs:
        control = int(encoding, 16) >> 41
        stall, yields = control & 15, not control >> 4 & 1
        write, read, wait = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        if int(address, 16) in targets:
            lines.append(f"LBB{int(address, 16)}:")
        if re.search(r"\bBRA\b", code):
            code = re.sub(r"\b0x([0-9a-f]+)", lambda m: f"LBB{int(m[1], 16)}", code)
        barriers = ["-" if barrier == 7 else str(barrier) for barrier in (read, write)]
        lines.append(
            f"{f'{wait:02x}' if wait else '--'}:{':'.join(barriers)}:{'Y' if yields else '-'}:{stall:x}\t{code.strip()}"
        )
    return "\n".join(lines) + "\n"


def demangle(names: list[str]) -> list[str]:
    """Readable names without return types, parameters and the package's namespace; as they are without c++filt."""
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |m2f::|\((?!anonymous).*\)$", "", line) for line in text.splitlines()]


def parse(report: str, architecture: str, dumped: Mapping[str, str]) -> list[Kernel]:
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
        kernels.append(Kernel(name, architecture, registers, shared, stack, stores, loads, dumped.get(mangled, "")))
    return sorted(kernels, key=lambda kernel: kernel.name)


def line(k: Kernel, release: str) -> dict[str, Any]:
    """A kernel's resources, by column."""
    mix = sass.mix(k.dump) if k.dump else None
    return {
        "kernel": k.name, "architecture": f"sm_{k.architecture}", "registers": k.registers,
        "static shared memory": k.shared, "stack": k.stack, "spill stores": k.spill_stores,
        "spill loads": k.spill_loads, "occupancy": f"{k.occupancy:.0%}",
        "instructions": "-" if mix is None else mix.text(),
        "accesses to global memory": "-" if mix is None else mix.memory(), "compiler": f"nvcc {release}",
    }  # fmt: skip


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
    kernels = [kernel for one in re.split("[;,]", options.archs) for kernel in compiled(nvcc, one)]
    spilling = [k for k in kernels if k.spill_stores or k.spill_loads]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+, V[\d.]+)", version)
    made = [line(k, release[1] if release else "of unknown release") for k in kernels]
    print(markdown(list(made[0]), [x.values() for x in made]))
    print(
        f"{len(kernels)} kernels on {len({k.architecture for k in kernels})} architectures, "
        f"{len(spilling)} of them with register spills."
    )
    if options.output is not None:
        write_csv(options.output, made)
    failed = [k for k in spilling if "forward" in k.name]
    for k in failed:
        print(f"static_cuda: {k.name} spills on sm_{k.architecture}", file=sys.stderr)
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
