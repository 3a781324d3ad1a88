"""Registers, shared memory and spills of each CUDA kernel, as the compiler reports them, for all shipped architectures.

    python -m benchmarks.static_cuda --output benchmarks/results/cuda_resources.csv --check

Needs nvcc, of a toolkit or from PyPI, and the headers of any installed torch; no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import sass
from benchmarks.cases import write_csv
from benchmarks.formats import markdown

SOURCE = Path("ms_deform_attn/cuda.cu")
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
    mix: sass.Mix | None = None

    @property
    def occupancy(self) -> float:
        """By registers and static shared memory; what the launch adds may lower it."""
        return sass.occupancy(int(self.architecture), THREADS // 32, self.registers, self.shared)


def compiler() -> str | None:
    """nvcc, as the build finds it."""
    sys.path.append(str(_CSRC.parent / "build_backend"))
    import cuda_compiler

    found = cuda_compiler.find()
    return None if found is None else str(found.path)


def disassembler(name: str = "cuobjdump") -> str | None:
    """One of the toolkit, or the one that comes with triton."""
    found = shutil.which(name)
    if found is None and importlib.util.find_spec("triton"):
        import triton

        found = getattr(triton.knobs.nvidia, name).path
    return found


def mixes(code: str) -> dict[str, sass.Mix]:
    """The instructions of each kernel of a disassembled object, by its mangled name."""
    parts = re.split(r"^\s*Function : (\w+)$", code, flags=re.MULTILINE)[1:]
    return {name: sass.mix(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def compile_verbosely(nvcc: str, architecture: str) -> tuple[str, dict[str, sass.Mix]]:
    """The assembler's report on `SOURCE` for one architecture, and the instructions of its kernels."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise RuntimeError("torch is not installed: its headers are needed to compile the bindings")
    with tempfile.TemporaryDirectory() as directory:
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-Xcompiler", "-fPIC"]
        command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-I", str(_CSRC)]
        command += ["-isystem", str(Path(torch.origin).parent / "include")]
        command += ["-c", str(_CSRC / SOURCE), "-o", str(Path(directory) / "out.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        tool = disassembler()
        if tool is None:
            print("static_cuda: no cuobjdump here: instructions are not counted", file=sys.stderr)
            return done.stderr, {}
        dump = subprocess.run([tool, "-sass", command[-1]], capture_output=True, text=True, check=True)
    return done.stderr, mixes(dump.stdout)


def _disassembled(nvcc: str, architecture: str, text: str, name: str, *options: str) -> tuple[str, str]:
    """The compiler's report on a source and what a disassembler says of its code: nvdisasm or cuobjdump (`name`).

    Raises:
        RuntimeError: nvcc failed, with its output; or there is no such disassembler.
    """
    tool = disassembler(name)
    if tool is None:
        raise RuntimeError(f"no {name} here, neither of a CUDA toolkit nor triton's")
    with tempfile.TemporaryDirectory() as directory:
        source, cubin = Path(directory) / "kernels.cu", Path(directory) / "kernels.cubin"
        source.write_text(text)
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-I", str(_CSRC)]
        done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        code = subprocess.run([tool, *options, str(cubin)], capture_output=True, text=True, check=True).stdout
    return done.stderr, code


def labelled(nvcc: str, architecture: str, header: str, instances: Sequence[str] = ()) -> dict[str, str]:
    """The disassembly with labels of each kernel that a header under csrc holds, by its readable name.

    Args:
        header: such as "ms_deform_attn/cuda_lean.cuh".
        instances: instantiations that the header itself does not make, such as "f<float>(int)".
    """
    wanted = "".join(f"template __global__ void {instance};\n" for instance in instances)
    text = f'#include "{header}"\nnamespace m2f {{\n{wanted}}}\n'
    _, code = _disassembled(nvcc, architecture, text, "nvdisasm", "-c")
    parts = re.split(r"^\.text\.(\w+):$", code, flags=re.MULTILINE)[1:]
    return dict(zip(demangle(parts[::2]), parts[1::2], strict=True))


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


def with_control_codes(nvcc: str, architecture: str, header: str, kernels: Sequence[str]) -> dict[str, tuple[str, int]]:
    """`control_codes` and registers of kernels that a header under csrc holds, by their readable names."""
    report, dump = _disassembled(nvcc, architecture, f'#include "{header}"\n', "cuobjdump", "-sass")
    registers = {kernel.name: kernel.registers for kernel in parse(report, architecture)}
    parts = re.split(r"^\s*Function : (\w+)$", dump, flags=re.MULTILINE)[1:]
    return {
        name.removeprefix("ms_deform_attn_"): (control_codes(body), registers[name])
        for name, body in zip(demangle(parts[::2]), parts[1::2], strict=True)
        if name.removeprefix("ms_deform_attn_") in kernels
    }


def demangle(names: list[str]) -> list[str]:
    """Readable names without return types, parameters and the package's namespace; as they are without c++filt."""
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |m2f::|\((?!anonymous).*\)$", "", line) for line in text.splitlines()]


def parse(report: str, architecture: str, instructions: dict[str, sass.Mix] | None = None) -> list[Kernel]:
    """The kernels of a verbose assembler report, with their instructions by mangled name.

    Raises:
        RuntimeError: it contains none, as when the compiler's wording changes.
    """
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)$",
        report,
        re.DOTALL | re.MULTILINE,
    )
    if not found:
        raise RuntimeError(f"no kernel in the compiler's report:\n{report}")
    names = demangle([row[0] for row in found])
    kernels = []
    for name, (mangled, stack, stores, loads, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                name,
                architecture,
                int(registers),
                int(shared[1]) if shared else 0,
                int(stack),
                int(stores),
                int(loads),
                (instructions or {}).get(mangled),
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def line(k: Kernel, release: str) -> dict[str, Any]:
    """A kernel's resources, by column."""
    return {
        "kernel": k.name, "architecture": f"sm_{k.architecture}", "registers": k.registers,
        "static shared memory": k.shared, "stack": k.stack, "spill stores": k.spill_stores,
        "spill loads": k.spill_loads, "occupancy": f"{k.occupancy:.0%}",
        "instructions": "-" if k.mix is None else k.mix.text(),
        "accesses to global memory": "-" if k.mix is None else k.mix.memory(), "compiler": f"nvcc {release}",
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--archs", default=";".join(ARCHITECTURES), help="separated by ';' or ','; default: all shipped"
    )
    parser.add_argument("--output", type=Path, help="write the table there, as CSV, besides printing it")
    parser.add_argument("--check", action="store_true", help="fail if a forward kernel spills registers")
    options = parser.parse_args()
    nvcc = compiler()
    if nvcc is None:
        print("static_cuda: no nvcc here, neither on PATH nor PyPI's (build_backend/cuda_compiler.py)", file=sys.stderr)
        return 2
    kernels: list[Kernel] = []
    for architecture in re.split("[;,]", options.archs):
        report, instructions = compile_verbosely(nvcc, architecture)
        kernels += parse(report, architecture, instructions)
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
