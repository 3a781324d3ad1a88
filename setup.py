"""Puts the two libraries that CMake builds into `m2f_kernels/lib`, and sets the wheel's tag.

Environment:
    M2F_CUDA        auto (default): build the CUDA library if nvcc is found; on: require it; off: skip it.
    M2F_CUDA_ARCHS  compute capabilities, for example "80;90"; default: all that are shipped.
    M2F_PURE        1: no libraries, a wheel for any system. The default where the system is not Linux.

The tools are found by `build_backend`, which also asks pip for those that are missing.
"""

import re
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))

import native  # noqa: E402
import readme  # noqa: E402


class CMakeBuild(build_ext):
    """One CMake project instead of a list of extension modules."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT if in_place else Path(self.build_lib).resolve()
        # Of an editable install setuptools makes a temporary directory, whose files would be compiled every time.
        build = ROOT / "build" / "in-place" if in_place else Path(self.build_temp).resolve() / "cmake"
        try:
            native.configure(package / "m2f_kernels" / "lib", build)
            native.compile_all(build)
        except native.BuildError as error:
            raise SystemExit(f"m2f-kernels: {error}") from None

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "m2f_kernels" / "lib").glob("*.so")]


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return not native.pure()


class AnyPythonWheel(bdist_wheel):
    """The libraries do not touch Python's C API: one wheel for every Python, per platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", "any" if native.pure() else super().get_tag()[2]


def long_description() -> str:
    project = (ROOT / "pyproject.toml").read_text()
    version = (ROOT / "m2f_kernels" / "_version.py").read_text()
    return readme.absolute(
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.search(r'^Repository = "(.+)"', project, re.MULTILINE)[1],
        re.search(r'"(.+)"', version)[1],
    )


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    distclass=NativeDistribution,
    # Named for build_ext to run at all; CMake knows the sources.
    ext_modules=[] if native.pure() else [Extension("m2f_kernels.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
