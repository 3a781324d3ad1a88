"""The conditions of a measurement: machine, driver, versions, threads, allocator."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import m2f_kernels
from m2f_kernels import dispatch
from m2f_kernels.info import cpu_name

#: The allocator settings of a device: environment of a fresh process. In the first everything is measured.
#:
#: On CPU large PyTorch temporaries cost page faults under glibc's defaults; with the heap retained and huge pages they
#: do not. Every CPU ratio is shown under both. On CUDA there is PyTorch's caching allocator. deformops may compile its
#: CUDA kernels: its best is measured.
SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {
        "default": {},
        "heap retained": {
            "MALLOC_TOP_PAD_": str(1 << 30),
            "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "THP_MEM_ALLOC_ENABLE": "1",
        },
    },
    "cuda": {"cuda": {"DEFORMOPS_COMPILE": "fallback"}},
}

_ALLOCATOR_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")


def environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment with every allocator variable replaced by `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_ALLOCATOR_VARIABLES)}
    return kept | extra


def _output(*command: str) -> str:
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=here)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else cpu_name()


def device_slug(device: str, name: str = "") -> str:
    """Name of the files of this machine's device, or of the one named: 'cpu-amd-epyc', 'nvidia-h100-80gb-hbm3'."""
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor|\d+-core)\b|@.*", " ", (name or device_name(device)).lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return slug if device == "cuda" else f"cpu-{slug}"


def version(distribution: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def gather(device: str, ops: list[str]) -> dict[str, str]:
    """The conditions of a measurement that the report states."""
    # Of a copy without its history, what M2F_COMMIT says.
    stated = os.environ.get("M2F_COMMIT", "not a git checkout")
    commit = _output("git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty= + uncommitted changes")
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "cpu": f"{cpu_name()}, {os.cpu_count()} logical processors, {torch.get_num_threads()} threads used",
        "load average before": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.release()}, {'-'.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "m2f-kernels": f"{m2f_kernels.__version__} at commit {commit or stated}",
    }
    facts |= {peer: version(peer) for peer in ("transformers", "torch-ms-deform-attn", "deformops")}
    if device == "cuda":
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        facts["cuda"] = str(torch.version.cuda)
        facts["float32"] = "without TF32, in matrix products (PyTorch's default) and in convolutions"
    else:
        for name, variables in SETTINGS["cpu"].items():
            given = ", ".join(f"{k}={v}" for k, v in variables.items())
            facts[f"allocator '{name}'"] = given or "glibc's defaults, no allocator variable set"
        pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        facts["transparent huge pages"] = pages.read_text().strip() if pages.exists() else "unknown"
        facts["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "not set")
    return facts | {f"backend of {op}": backend_of(op, device) for op in ops}


def backend_of(op: str, device: str) -> str:
    """One line naming the backend of this package that serves an operator here, with the reason."""
    return str(dispatch.choose(op, device)) if op in dispatch.OPERATORS else "not an operator of its own"
