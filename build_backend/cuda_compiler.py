"""nvcc: the toolkit's on PATH, else the one that PyPI serves as Python packages."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

#: 105 MB, without the gigabytes of a whole toolkit.
PACKAGES = tuple(f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl"))
#: One file of each package.
_PARTS = (
    "bin/nvcc",
    "include/crt/host_config.h",
    "nvvm/bin/cicc",
    "lib/libcudart_static.a",
    "include/cccl/nv/target",
)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Attributes:
        source: where it is from, for the summary.
        libraries: a directory that the linker must be told of; None where nvcc knows it.
    """

    path: Path
    source: str
    libraries: Path | None = None


def served() -> bool:
    """True if PyPI has nvcc for this kind of machine."""
    return (
        sys.platform == "linux"
        and platform.machine() in ("x86_64", "aarch64")
        and platform.libc_ver()[0] == "glibc"  # the packages are not for musl
    )


def find() -> Nvcc | None:
    """The nvcc that a build uses, or None: from `CUDACXX`, `PATH`, `CUDA_HOME`, `CUDA_PATH` or PyPI's packages."""
    if chosen := os.environ.get("CUDACXX"):
        return Nvcc(Path(shutil.which(chosen) or chosen), "CUDACXX")
    if found := shutil.which("nvcc"):
        return Nvcc(Path(found), "PATH")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if (place := os.environ.get(variable)) and (path := Path(place, "bin/nvcc")).exists():
            return Nvcc(path, variable)
    for place in [*sys.path, sysconfig.get_path("purelib")]:  # the last is hidden from an isolated build
        root = Path(place or ".", "nvidia", "cu13").absolute()
        if all((root / part).exists() for part in _PARTS):
            return Nvcc(root / "bin/nvcc", f"PyPI: {_packages(root.parents[1])}", root / "lib")
    return None


def _packages(site: Path) -> str:
    versions = [re.match(r"nvidia_cuda_nvcc-([\d.]+)\.dist-info", p.name) for p in site.glob("nvidia_cuda_nvcc-*")]
    return next((f"nvidia-cuda-nvcc {v[1]}" for v in versions if v), "nvidia-cuda-nvcc")
