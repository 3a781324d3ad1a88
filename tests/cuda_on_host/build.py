"""Builds the host module of the CUDA kernels, once per content of its sources."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_NAME = "m2f_cuda_on_host"
#: Type punning is allowed, as by nvcc.
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wextra"]
_FLAGS += ["-Wno-unknown-pragmas", "-DM2F_CUDA_ON_HOST"]
#: More of them, for `make sanitize`.
_FLAGS += os.environ.get("M2F_CUDA_ON_HOST_FLAGS", "").split()


def _sources() -> list[Path]:
    csrc = _ROOT / "csrc"
    return sorted([*_HERE.glob("*.h"), *_HERE.glob("*.cpp"), *csrc.rglob("*.cu*"), *csrc.rglob("*.h")])


def build() -> Path:
    """Compile the module, unless a build of the same sources, flags, compiler and Python exists; returns its path.

    Raises:
        RuntimeError: no C++ compiler, or it failed; with its output.
    """
    import pybind11

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler: install g++, or set CXX")
    key = hashlib.sha256(repr([compiler, _FLAGS, sys.version, pybind11.__version__]).encode())
    for source in _sources():
        key.update(source.name.encode() + source.read_bytes())
    directory = _ROOT / "build" / "cuda_on_host" / key.hexdigest()[:16]
    library = directory / f"{_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    includes = [_HERE, _ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    partial = library.with_suffix(f".{os.getpid()}")
    command = [
        *compiler.split(),
        *_FLAGS,
        *(f"-I{path}" for path in includes),
        str(_HERE / "module.cpp"),
        "-o",
        str(partial),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.replace(library)  # at once, for test processes that run beside each other
    return library


def load() -> ModuleType:
    """The module, built if necessary."""
    spec = importlib.util.spec_from_file_location(_NAME, build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
