"""Real builds of the CPU library by pip, from every kind of place and with every kind of tool that users have."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "build_backend"))

import m2f_build  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the libraries are built on Linux only"),
]
NO_ISOLATION = "--no-build-isolation"


class Checkout:
    """A copy of the sources and a virtual environment that sees this interpreter's packages."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "checkout"
        for name in m2f_build.SOURCES:
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=m2f_build._IGNORED, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / name, target)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory / "env"], check=True)
        self.python = directory / "env/bin/python"
        (site,) = (directory / "env/lib").glob("python*/site-packages")
        (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
        # No ninja, cmake or nvcc on PATH: only what a compiler needs.
        self.path = directory / "bin"
        self.path.mkdir()
        for tool in ("gcc", "cc", "clang", "as", "ld", "ar", "ranlib", "nm", "objcopy", "strip", "sh"):
            if found := shutil.which(tool):
                (self.path / tool).symlink_to(found)
        for tool in ("g++", "c++", "clang++"):
            if found := shutil.which(tool):  # how fast the kernels are is not at stake: not optimised they take seconds
                (self.path / tool).write_text(f'#!/bin/sh\nexec {found} "$@" -O0\n')
                (self.path / tool).chmod(0o755)

    def pip(self, *arguments: object, **environment: str) -> str:
        """The output of pip with the CPU library only, unless `environment` says otherwise."""
        kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or "proxy" in name.lower()}
        variables = {**kept, "M2F_CUDA": "off", "HOME": str(self.directory), "PATH": str(self.path), **environment}
        command = [str(self.python), "-m", "pip", "-v", *map(str, arguments)]
        done = subprocess.run(command, cwd=self.directory, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return done.stdout + done.stderr

    def wheel(self, *arguments: object, source: Path | None = None, **environment: str) -> str:
        """The output of a build, whose wheel holds the CPU library."""
        target = self.directory / "wheels"
        shutil.rmtree(target, ignore_errors=True)
        output = self.pip("wheel", "--no-deps", "-w", target, *arguments, source or self.root, **environment)
        (wheel,) = target.glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert [n for n in names if n.endswith(".so")] == ["m2f_kernels/lib/libm2f_cpu.so"]
        return output

    def runs(self) -> bool:
        code = "from m2f_kernels._library import LIBRARIES; print(LIBRARIES['cpu'].loaded)"
        command = [self.python, "-c", code]
        done = subprocess.run(command, cwd=self.directory, capture_output=True, text=True, check=True)
        return done.stdout.strip() == "True"

    def files(self) -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in sorted(self.root.rglob("*")) if p.is_file()}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_isolated_builds_from_one_checkout_which_is_read_only(checkout: Checkout) -> None:
    """Twice; each in an environment that is gone afterwards. Nothing is written into the checkout."""
    for path in checkout.root.rglob("*"):
        path.chmod(path.stat().st_mode & 0o555)
    before = checkout.files()
    for _ in range(2):
        # Python itself writes bytecode beside the backend where it may, as root does.
        output = checkout.wheel(PYTHONDONTWRITEBYTECODE="1")
        assert "[1/" in output, "no progress shown"
        assert "m2f-kernels: compiled in" in output
        assert checkout.files() == before
    for path in checkout.root.rglob("*"):  # so that pytest can delete it
        path.chmod(path.stat().st_mode | 0o200)


def test_editable_ten_times_compiles_once(tmp_path: Path) -> None:
    """With spaces in the path, and no ninja on PATH but the one of a Python package."""
    checkout = Checkout(tmp_path / "with some spaces")
    for turn in range(10):
        output = checkout.pip("install", NO_ISOLATION, "--no-deps", "-e", checkout.root)
        assert ("cpu_kernel.cpp.o" in output) == (turn == 0)
        assert checkout.runs()


def test_from_the_sdist(checkout: Checkout) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--sdist",
        "--no-isolation",
        "--outdir",
        checkout.directory,
        checkout.root,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (sdist,) = checkout.directory.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(checkout.directory / "unpacked", filter="data")
    (root,) = (checkout.directory / "unpacked").iterdir()
    checkout.wheel(NO_ISOLATION, source=root)


def test_with_clang(checkout: Checkout) -> None:
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed (Debian's clang)")
    assert "compiler       Clang" in checkout.wheel(NO_ISOLATION, CC="clang")
