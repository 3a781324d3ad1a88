"""`python -m m2f_kernels.info`: what is installed, what is in use, and which backend serves each operator and why."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
import textwrap
from pathlib import Path

import torch

from m2f_kernels import dispatch
from m2f_kernels._library import LIBRARIES, cpu_capability
from m2f_kernels._version import __version__
from m2f_kernels.integrations.transformers import registry


def cpu_name() -> str:
    """The CPU's marketing name where the system reports one."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cuda_architectures(library: Path) -> list[str]:
    """Architectures whose machine code a CUDA library contains, read from the names nvcc leaves in it."""
    return sorted({m.decode() for m in re.findall(rb"sm_\d+[a-f]?", library.read_bytes())}, key=lambda s: (len(s), s))


def facts() -> dict[str, str]:
    """Versions, libraries and devices, by label."""
    result = {
        "m2f-kernels": f"{__version__} ({Path(__file__).parent})",
        "Python": sys.version.split()[0],
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "triton": _version("triton"),
        "CPU": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "CPU kernels": cpu_capability() or "not in use",
    }
    for device, library in LIBRARIES.items():
        state = f"{library.path} loaded" if library.loaded else f"not in use: {library.problem}"
        if device == "cuda" and library.path.exists():
            state += f"; built for {', '.join(cuda_architectures(library.path))}"
        result[f"lib{library.name}.so"] = state
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            result[f"CUDA device {i}"] = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
    else:
        result["CUDA device"] = "none visible"
    return result


def report() -> str:
    """The whole page as text."""
    known = facts()
    width = max(map(len, known))
    lines = [f"{label:<{width}}  {value}" for label, value in known.items()]
    lines += ["", "Operators"]
    lines += operators("cpu")
    if torch.version.cuda or torch.version.hip:
        for device in [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cuda"]:
            lines += operators(device)
    else:
        lines.append("  on cuda: not available, the installed torch has no CUDA support")
    lines.append("  on any other device: fallback (plain PyTorch)")
    lines += ["", *registry.report()]
    return "\n".join(lines)


def operators(device: str) -> list[str]:
    """Each backend that serves operators on `device`, with the reason, and below it their names."""
    names: dict[str, list[str]] = {}
    for op in sorted(dispatch.OPERATORS):
        names.setdefault(str(dispatch.choose(op, device)).partition(" on ")[2], []).append(op)
    return [
        line
        for backend, served in names.items()
        for line in (
            f"  on {backend}",
            textwrap.fill(", ".join(served), 110, initial_indent="    ", subsequent_indent="    "),
        )
    ]


if __name__ == "__main__":
    print(report())
