"""Inside the wheel and the libraries: no Python symbols, no unexpected dependencies, one tag for every Python."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import m2f_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
    assert set(exported) <= {
        "m2f_cpu_capability",
        "m2f_set_cpu_capability",
        "m2f_cuda_code",
        "m2f_cuda_driver_version",
        "m2f_cuda_runtime_version",
        "m2f_cuda_set_backward",
        "m2f_cuda_set_forward",
    }


def build(command: list[str]) -> None:
    """Without CUDA to keep it quick."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = [sys.executable, "-m", *command]
    result = subprocess.run(command, capture_output=True, text=True, env={"M2F_CUDA": "off", "PATH": path})
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdist")
    build(["build", "--sdist", "--no-isolation", "--outdir", str(directory), str(ROOT)])
    (built,) = directory.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that nothing outside it is needed."""
    directory = tmp_path_factory.mktemp("wheel")
    build(["pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(directory), str(sdist)])
    (built,) = directory.glob("*.whl")
    return built


@pytest.mark.slow
def test_sdist_holds_all_that_a_build_needs(sdist: Path) -> None:
    """Every source that git has under csrc/ and the packages, the licence and the texts; no tests, no results, nothing
    built."""
    root = f"m2f_kernels-{m2f_kernels.__version__}/"
    assert sdist.name == f"{root[:-1]}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(root) for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        sources = {n for n in listed.stdout.split() if re.match(r"csrc/.*\.(cpp|h|cu|cuh)$|m2f_(kernels|model)/", n)}
        assert sources - names == set()
    for expected in (
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "CMakeLists.txt",
        "pyproject.toml",
        "PKG-INFO",
    ):
        assert expected in names
    assert [n for n in names if n.endswith((".so", ".pyc")) or n.startswith(("tests/packaging", "build/"))] == []
    assert sdist.stat().st_size < 1_000_000


@pytest.mark.slow
def test_wheel_is_for_every_python_and_holds_what_it_should(wheel: Path) -> None:
    assert re.fullmatch(r"m2f_kernels-[\w.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("m2f_kernels/lib/libm2f_cpu.so", "m2f_kernels/py.typed", "m2f_model/py.typed", "m2f_model/cli.py"):
        assert expected in names
    assert [n for n in names if not re.match(r"m2f_(kernels|model)[/-]", n)] == []
    assert wheel.stat().st_size < 20_000_000


@pytest.mark.slow
def test_metadata_of_the_wheel(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(path))
    assert metadata["Name"] == "m2f-kernels"
    assert metadata["Version"] == m2f_kernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"bench", "model", "test"} <= set(metadata.get_all("Provides-Extra"))
    needed = {r for r in metadata.get_all("Requires-Dist") if "extra" not in r}
    assert needed == {"torch>=2.11", "numpy", "scipy"}
    assert "LICENSE" in {Path(n).name for n in archive.namelist()}
    (scripts,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "m2f = m2f_model.cli:main" in archive.read(scripts).decode()


@pytest.mark.slow
@needs_readelf
def test_library_in_the_wheel_is_like_the_one_in_the_tree(wheel: Path, tmp_path: Path) -> None:
    library = Path(zipfile.ZipFile(wheel).extract("m2f_kernels/lib/libm2f_cpu.so", tmp_path))
    test_library_needs_only_torch_and_the_c_runtimes(library)
    test_library_uses_no_python_api_and_no_unstable_torch_symbols(library)
    test_library_exports_no_more_than_its_interface(library)
    assert ".debug_info" not in readelf("-S", str(library))
    # Neither a place of the machine that built it nor a search path.
    assert "(RPATH)" not in readelf("-d", str(library))
    assert "(RUNPATH)" not in readelf("-d", str(library))


def test_the_version_is_written_once() -> None:
    """Everything else reads it from m2f_kernels/_version.py."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "m2f_kernels._version.__version__"}
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "CITATION.cff", "m2f_model/__init__.py"):
        assert m2f_kernels.__version__ not in (ROOT / name).read_text(), name
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", m2f_kernels.__version__)


def test_the_changelog_names_the_version_or_what_is_not_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    version = m2f_kernels.__version__
    assert ("## [Unreleased]" in text) if ".dev" in version else (f"## [{version}]" in text)
