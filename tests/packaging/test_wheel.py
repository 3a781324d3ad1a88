"""Inside the wheel and the libraries: no Python symbols, no unexpected dependencies, one tag for every Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = sorted((ROOT / "m2f_kernels" / "lib").glob("*.so"))
#: The C and C++ runtimes, and the libraries of the torch that is already loaded.
ALLOWED = re.compile(
    r"(libtorch(_cpu|_cuda)?|libstdc\+\+|libgcc_s|libm|libc|libdl|libpthread|librt|ld-linux-[\w-]+)\.so(\.\d+)?$"
)

needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")


def readelf(*arguments: str) -> str:
    return subprocess.run(["readelf", "-W", *arguments], check=True, capture_output=True, text=True).stdout


def test_libraries_were_built() -> None:
    assert "libm2f_cpu.so" in [p.name for p in LIBRARIES]


@needs_readelf
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_library_needs_only_torch_and_the_c_runtimes(library: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", str(library)))
    assert needed
    assert [name for name in needed if not ALLOWED.match(name)] == []


@needs_readelf
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_library_uses_no_python_api_and_no_unstable_torch_symbols(library: Path) -> None:
    undefined = re.findall(r"\bUND\s+(\S+)", readelf("--dyn-syms", str(library)))
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
    assert [name for name in undefined if name.startswith(("Py", "_Py"))] == []
    # C++ symbols of at::, c10:: or torch:: would tie the library to one version of torch.
    assert [name for name in undefined if re.match(r"_ZN[KSV]*(2at|3c10|5torch)", name)] == []


@needs_readelf
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_library_exports_no_more_than_its_interface(library: Path) -> None:
    exported = []
    for line in readelf("--dyn-syms", str(library)).splitlines():
        fields = line.split()
        if len(fields) == 8 and fields[4] == "GLOBAL" and fields[5] == "DEFAULT" and fields[6] != "UND":
            exported.append(fields[7].split("@")[0])
    assert set(exported) <= {"m2f_cpu_capability", "m2f_set_cpu_capability"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the tree, without CUDA to keep it quick."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(directory),
        str(ROOT),
    ]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    result = subprocess.run(command, capture_output=True, text=True, env={"M2F_CUDA": "off", "PATH": path})
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = directory.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_is_for_every_python_and_holds_what_it_should(wheel: Path) -> None:
    assert re.fullmatch(r"m2f_kernels-[\w.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("m2f_kernels/lib/libm2f_cpu.so", "m2f_kernels/py.typed", "m2f_model/__init__.py"):
        assert expected in names
    assert [n for n in names if not re.match(r"m2f_(kernels|model)[/-]", n)] == []
    assert wheel.stat().st_size < 20_000_000
