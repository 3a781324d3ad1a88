"""Building from a checkout: again, after the tools are gone, without what it needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))

import native  # noqa: E402


@pytest.fixture
def only_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """To keep it quick; and the tools beside this interpreter, as in an activated environment."""
    monkeypatch.setenv("M2F_CUDA", "off")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")


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
    for name, value in {"M2F_CUDA_ARCHS": "80", "CXX": "clang++", "M2F_CUDA": "auto"}.items():
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert native.forget_other_tools(build, native.options(tmp_path)), name
        assert native.forget_other_tools(build, native.options(tmp_path)), name
    (build / "tools.json").unlink()  # configured by something that left no record
    assert native.forget_other_tools(build, native.options(tmp_path))
