"""Runs CMake with Ninja, puts the two libraries into `m2f_kernels/lib`, and sets the wheel's tag.

Environment:
    M2F_CUDA        auto (default): build the CUDA library if nvcc is found; on: require it; off: skip it.
    M2F_CUDA_ARCHS  compute capabilities, for example "80;90"; default: all that are shipped.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_include() -> Path:
    """PyTorch's headers, found without importing it (its import takes seconds and may want CUDA)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "Building m2f-kernels needs PyTorch's headers, and torch is not installed in the build environment: "
            "either let pip build in isolation, or install torch >= 2.11 first."
        )
    return Path(spec.origin).parent / "include"


class CMakeBuild(build_ext):
    """One CMake project instead of a list of extension modules."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT if in_place else Path(self.build_lib).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        options = {
            "M2F_TORCH_INCLUDE": torch_include(),
            "M2F_OUTPUT": package / "m2f_kernels" / "lib",
            "M2F_CUDA": os.environ.get("M2F_CUDA", "auto"),
        }
        if "M2F_CUDA_ARCHS" in os.environ:
            options["M2F_CUDA_ARCHS"] = os.environ["M2F_CUDA_ARCHS"].replace(",", ";").replace(" ", ";")
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--log-level=STATUS"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        self.call(configure, build, "configure")
        self.call(["cmake", "--build", str(build)], build, "build")

    def call(self, command: list[str], build: Path, step: str) -> None:
        """Run quietly, keep the whole log, show the summary, or on failure everything."""
        build.mkdir(parents=True, exist_ok=True)
        log = build / f"{step}.log"
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log.write_text(result.stdout)
        if result.returncode != 0:
            raise RuntimeError(f"m2f-kernels: the native {step} failed:\n{' '.join(command)}\n{result.stdout}")
        if step == "configure":
            lines = [line.removeprefix("-- ") for line in result.stdout.splitlines()]
            start = lines.index("m2f-kernels")
            print("\n".join(lines[start : start + 6]), file=sys.stderr, flush=True)

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "m2f_kernels" / "lib").glob("*.so")]


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class AnyPythonWheel(bdist_wheel):
    """The libraries do not touch Python's C API: one wheel for every Python, per platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=NativeDistribution,
    # Named for build_ext to run at all; CMake knows the sources.
    ext_modules=[Extension("m2f_kernels.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
