"""Building from a checkout: where the tools and the headers come from, again after they are gone, and without them."""

from __future__ import annotations

import http.server
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "build_backend"))

import cuda_compiler  # noqa: E402
import m2f_build  # noqa: E402
import native  # noqa: E402
import readme  # noqa: E402
import torch_headers  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the libraries are built on Linux only")


@pytest.fixture
def only_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """To keep it quick; and the tools beside this interpreter, as in an activated environment."""
    for name in ("CC", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "M2F_CUDA_ARCHS", "M2F_PURE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("M2F_CUDA", "off")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")


# ---------------------------------------------------------------- again


@pytest.mark.usefixtures("only_cpu")
def test_a_build_environment_that_is_gone_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip deletes the ninja of an isolated build; the build directory of a checkout stays."""
    ninja = Path(native.tool("ninja")).resolve()
    for name in ("first", "second"):
        tools = tmp_path / name
        tools.mkdir()
        (tools / "ninja").symlink_to(ninja)
        monkeypatch.setattr(native, "tool", lambda n, tools=tools: str(tools / n) if n == "ninja" else shutil.which(n))
        native.configure(tmp_path / "lib", tmp_path / "build")
        subprocess.run(["cmake", "--build", tmp_path / "build", "--target", "standin_torch"], check=True)
        shutil.rmtree(tools)


@pytest.mark.usefixtures("only_cpu")
def test_a_build_goes_on_with_the_same_tools_and_starts_afresh_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tmp_path / "build"
    assert not native.forget_other_tools(build, native.options(tmp_path))
    assert not native.forget_other_tools(build, native.options(tmp_path))
    for name, value in {"M2F_CUDA_ARCHS": "80", "CXX": "g++", "CXXFLAGS": "-O1", "M2F_CUDA": "auto"}.items():
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert native.forget_other_tools(build, native.options(tmp_path)), name
        assert native.forget_other_tools(build, native.options(tmp_path)), name
    (build / "tools.json").unlink()  # configured by something that left no record
    assert native.forget_other_tools(build, native.options(tmp_path))


def test_a_build_reads_a_copy_that_holds_all_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that MANIFEST.in names are copied, built ones are not, and the copy is gone afterwards."""
    monkeypatch.chdir(ROOT)
    with m2f_build.copy_of_sources():
        copy = Path.cwd()
        assert copy != ROOT
        for line in (ROOT / "MANIFEST.in").read_text().splitlines():
            command, *names = line.split()
            if command == "include":
                assert [n for n in names if not (copy / n).exists()] == []
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0:
            sources = [n for n in listed.stdout.split() if re.match(r"(csrc|m2f_kernels|m2f_model|build_backend)/", n)]
            assert [n for n in sources if (ROOT / n).exists() and not (copy / n).exists()] == []
        assert [*copy.rglob("*.so"), *copy.rglob("*.pyc")] == []
    assert not copy.exists()
    assert Path.cwd() == ROOT


# ---------------------------------------------------------------- where things come from


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CC": "clang"}, "clang++"),
        ({"CC": "clang-18"}, "clang++-18"),
        ({"CC": "/opt/llvm/bin/clang"}, "/opt/llvm/bin/clang++"),
        ({"CC": "gcc-12"}, "g++-12"),
        ({"CC": "aarch64-linux-gnu-gcc"}, "aarch64-linux-gnu-g++"),
        ({"CC": "clang", "CXX": "g++"}, "g++"),
        ({"CXX": "ccache g++"}, "ccache g++"),
        ({}, "c++"),
    ],
)
def test_cc_chooses_the_cxx_compiler_too(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    assert native.compiler() == expected


def nvcc_packages(site: Path) -> None:
    """Files where PyPI's packages put them."""
    for part in cuda_compiler._PARTS:
        (site / "nvidia/cu13" / part).parent.mkdir(parents=True, exist_ok=True)
        (site / "nvidia/cu13" / part).touch()
    (site / "nvidia_cuda_nvcc-13.0.88.dist-info").mkdir()


@pytest.mark.usefixtures("only_cpu")
def test_nvcc_of_pypi_serves_where_none_is_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty"), str(tmp_path)])
    monkeypatch.setattr(cuda_compiler.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    monkeypatch.setattr(cuda_compiler, "served", lambda: True)
    monkeypatch.setenv("M2F_CUDA", "auto")
    assert cuda_compiler.find() is None
    assert set(cuda_compiler.PACKAGES) <= set(m2f_build.needed())
    monkeypatch.setenv("M2F_CUDA", "off")
    assert not set(cuda_compiler.PACKAGES) & set(m2f_build.needed())
    monkeypatch.setenv("M2F_CUDA", "auto")

    nvcc_packages(tmp_path)
    found = cuda_compiler.find()
    assert found == cuda_compiler.Nvcc(
        tmp_path / "nvidia/cu13/bin/nvcc", "PyPI: nvidia-cuda-nvcc 13.0.88", tmp_path / "nvidia/cu13/lib"
    )
    assert not set(cuda_compiler.PACKAGES) & set(m2f_build.needed())
    assert native.options(tmp_path)["CMAKE_CUDA_COMPILER"] == str(found.path)
    assert native.environment()["LIBRARY_PATH"].split(":")[0] == str(found.libraries)

    toolkit = tmp_path / "toolkit"
    toolkit.mkdir()
    (toolkit / "nvcc").touch(0o755)
    monkeypatch.setenv("PATH", f"{toolkit}:{os.environ['PATH']}")
    assert cuda_compiler.find() == cuda_compiler.Nvcc(toolkit / "nvcc", "PATH")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (tmp_path / "nvidia/cu13/include/cccl/nv/target").unlink()
    assert cuda_compiler.find() is None, "a part of it is of no use"


@pytest.mark.parametrize(
    ("text", "usable"),
    [("2.11.0", True), ("2.13.0+cpu", True), ("2.14.0a0+git1", True), ("3.0.0", True), ("2.9.1", False), ("", False)],
)
def test_headers_of_the_torch_that_is_installed_serve_from_2_11_on(
    text: str, usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where pip hides it, in the site-packages of the interpreter that builds."""
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "torch/version.py").write_text(f"__version__ = '{text}'\ndebug = False\n")
    monkeypatch.setattr(torch_headers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch_headers.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = torch_headers.find()
    assert (found is not None and found[0] == tmp_path / "torch/include") == usable
    if text == "2.9.1":
        assert "found torch 2.9 in" in torch_headers.missing()


class Index(http.server.BaseHTTPRequestHandler):
    """A package index with one wheel of torch; `parts` says if it sends parts of files."""

    parts = True
    wheel = b""
    name = f"torch-{torch_headers.FETCHED}-cp311-cp311-manylinux_2_28_{platform.machine()}.whl"

    def do_GET(self) -> None:
        if self.path == "/simple/torch/":
            files = [{"filename": self.name, "url": f"http://{self.headers['Host']}/wheel", "size": len(self.wheel)}]
            status, body = 200, json.dumps({"files": files}).encode()
        else:
            status, body = 200, b""
            if self.parts:
                first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
                status, body = 206, self.wheel[int(first) : int(last) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Index]]:
    """An index on this machine, and no torch to be found."""
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr("torch/lib/libtorch_cpu.so", os.urandom(8 << 20))
        for name in ("torch/csrc/stable/library.h", "torch/headeronly/macros/Macros.h", "ATen/ATen.h"):
            archive.writestr(f"torch/include/{name}", f"// {name}\n")
    served = type("Served", (Index,), {"wheel": (tmp_path / "wheel").read_bytes()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), served)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch_headers, "installed", list)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("index", "only_cpu")
def test_headers_are_fetched_out_of_a_wheel(capfd: pytest.CaptureFixture[str]) -> None:
    assert torch_headers.find() is None
    assert not [r for r in m2f_build.needed() if r.startswith("torch")]
    megabytes = float(re.search(r"([\d.]+) MB", capfd.readouterr().err)[1])
    assert megabytes < 1, "the wheel has 8"
    include, source = torch_headers.find()
    assert source == f"torch {torch_headers.FETCHED}, fetched from its wheel"
    files = sorted(str(p.relative_to(include)) for p in include.rglob("*.h"))
    assert files == ["torch/csrc/stable/library.h", "torch/headeronly/macros/Macros.h"]
    assert [p.name for p in include.parent.iterdir()] == ["include"], "something temporary was left"


@pytest.mark.usefixtures("only_cpu")
def test_torch_is_asked_for_where_its_headers_cannot_be_fetched(
    index: type[Index], capfd: pytest.CaptureFixture[str]
) -> None:
    index.parts = False
    assert f"torch=={torch_headers.FETCHED}" in m2f_build.needed()
    assert "does not send parts" in capfd.readouterr().err
    assert torch_headers.find() is None


# ---------------------------------------------------------------- errors


def backend(hook: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a hook of the build backend as pip does without isolation, with little more than a compiler on PATH."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'build_backend')!r}); import m2f_build; m2f_build.{hook}"
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"M2F_CUDA": "yes"}, "M2F_CUDA: expected auto, on or off; got 'yes'"),
        ({"M2F_CUDA": "on", "M2F_PURE": "1"}, "M2F_CUDA=on, but no libraries are built"),
        ({"CXX": "no-such-compiler"}, "building needs a C++17 compiler, and no-such-compiler is not on PATH"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_line(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    done = backend(f"build_wheel({str(tmp_path)!r})", tmp_path, **environment)
    assert done.returncode == 1
    assert done.stderr.startswith(f"m2f-kernels: {message}")
    assert len((done.stdout + done.stderr).splitlines()) == 1


def test_an_old_setuptools_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old setuptools, as Python's own virtual environments have it, is an error of one line."""
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"setuptools>={m2f_build.OLDEST_SETUPTOOLS[0]}"' in project
    monkeypatch.setattr(m2f_build.setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"^m2f-kernels: building needs setuptools >= 77, and 65.5.0 is installed"):
        m2f_build.prepare_metadata_for_build_wheel("unused")


def test_cuda_on_without_any_nvcc_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F_CUDA", "on")
    monkeypatch.setattr(cuda_compiler, "find", lambda: None)
    with pytest.raises(
        native.BuildError, match=r"^M2F_CUDA=on, but no nvcc was found: [^\n]*nvidia-cuda-nvcc==13[^\n]*$"
    ):
        native.check()


def test_a_wheel_without_libraries_is_for_any_system(tmp_path: Path) -> None:
    """macOS, Windows, and M2F_PURE=1; it needs no tools."""
    done = backend(f"build_wheel({str(tmp_path)!r})", tmp_path, M2F_PURE="1", CXX="none", PATH="/none")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "m2f_kernels/ops/__init__.py" in names
    assert [n for n in names if n.endswith(".so") or not re.match(r"m2f_(kernels|model)[/-]", n)] == []
    assert b"Root-Is-Purelib: true" in zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/WHEEL")))


def test_readme_has_absolute_links_on_pypi() -> None:
    """Each to a file that the repository has."""
    repository = "https://github.com/m2f-kernels/m2f-kernels"
    text = readme.absolute((ROOT / "README.md").read_text(), repository, "1.2.0")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("https://", "http://", "#"))] == []
    kinds = {
        f"{repository}/blob/v1.2.0/": 10,
        "https://raw.githubusercontent.com/m2f-kernels/m2f-kernels/v1.2.0/": 1,
    }
    for start, least in kinds.items():
        paths = [link.removeprefix(start).split("#")[0] for link in links if link.startswith(start)]
        assert len(paths) >= least
        assert [path for path in paths if not (ROOT / path).exists()] == []
    assert "/blob/main/" in readme.absolute("[x](docs/x.md)", repository, "1.2.0.dev0")
