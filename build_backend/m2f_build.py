"""The build backend (PEP 517, PEP 660): setuptools, which is told what a build needs on this machine.

A wheel and an sdist are built in a copy of the sources: nothing of an earlier build gets into them, nothing is written
into the checkout, and several builds may run at once. An editable install is built in the checkout, and goes on where
the last one was. Run as a program it prints what a build needs, for `pip install`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_compiler
import native
import setuptools
import torch_headers
from setuptools import build_meta

#: The files that a build reads.
SOURCES = (
    *("build_backend", "csrc", "m2f_kernels", "m2f_model"),
    *("CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "setup.py"),
    *("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"),
    *(f"{folder}/requirements.txt" for folder in ("tests", "benchmarks", "m2f_model")),
)
#: As in pyproject.toml.
OLDEST_SETUPTOOLS = (77,)
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.egg-info")


@contextlib.contextmanager
def copy_of_sources() -> Iterator[None]:
    """A temporary copy of the sources as the working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="m2f-kernels-") as directory:
        for name in SOURCES:
            source, target = native.ROOT / name, Path(directory, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=_IGNORED, copy_function=shutil.copyfile, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)
        os.chdir(directory)
        try:
            yield
        finally:
            os.chdir(before)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """A context that ends the process with one line, without a traceback, for errors that the user can fix."""
    try:
        found = native.version_of(setuptools.__version__)
        if found < OLDEST_SETUPTOOLS:  # pip sees to that in an isolated build only
            raise native.BuildError(
                f"building needs setuptools >= {OLDEST_SETUPTOOLS[0]}, and {setuptools.__version__} is installed: "
                "pip install -U setuptools"
            )
        yield
    except native.BuildError as error:
        raise SystemExit(f"m2f-kernels: {error}") from None


def needed() -> list[str]:
    """The requirements that pip installs into an isolated build environment: only those that this machine lacks."""
    if native.pure():
        return []
    requirements = [f"{name}{bound}" for name, bound in (("cmake", ">=3.22"), ("ninja", "")) if not _usable(name)]
    if torch_headers.find() is None:
        try:
            torch_headers.fetch()
        except Exception as error:
            print(
                f"m2f-kernels: torch is needed for its headers, which could not be fetched: {error!r}", file=sys.stderr
            )
            requirements.append(f"torch=={torch_headers.FETCHED}")
    if native.wants_cuda() != "off" and cuda_compiler.find() is None and cuda_compiler.served():
        requirements += cuda_compiler.PACKAGES
    return requirements


def _usable(name: str) -> bool:
    """True if `name` is on PATH and runs. In pip's isolated environment, that of a virtual environment does not."""
    try:
        text = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return name != "cmake" or native.version_of(text) >= (3, 22)


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    with one_line():
        return needed()


get_requires_for_build_editable = get_requires_for_build_wheel


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    target = os.path.abspath(sdist_directory)
    with one_line(), copy_of_sources():
        return build_meta.build_sdist(target, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    target = os.path.abspath(metadata_directory)
    with one_line(), copy_of_sources():
        return build_meta.prepare_metadata_for_build_wheel(target, config_settings)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    target = os.path.abspath(wheel_directory)
    with one_line(), copy_of_sources():
        native.check()
        return build_meta.build_wheel(target, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    with one_line():
        native.check()
        if not os.access(native.ROOT, os.W_OK):
            raise native.BuildError(f"an editable install writes into {native.ROOT}, which is read-only")
        return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


if __name__ == "__main__":
    with one_line():
        print("\n".join(needed()))
