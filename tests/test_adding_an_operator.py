"""The worked example of docs/adding_an_operator.md: applied to a copy of the tree, built, and run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_an_operator.md").read_text()
#: (kind, path, text) of each block.
BLOCKS = re.findall(r'^```(\w+) title="(.+?)"\n(.*?)^```$', PAGE, flags=re.DOTALL | re.MULTILINE)
PLACES = dict.fromkeys(path for _, path, _ in BLOCKS)
COPIED = (
    *("benchmarks", "csrc", "docs", "m2f_kernels", "m2f_model", "tests"),
    *(".clang-format", "CHANGELOG.md", "CMakeLists.txt", "README.md", "pyproject.toml"),
)


def edited(before: str, change: str) -> str:
    """`before` with the lines that begin with + put between those that begin with a space, which stand there once."""
    lines = [(line[:1], line[1:]) for line in change.splitlines()]
    old = "\n".join(text for sign, text in lines if sign != "+")
    assert f"\n{before}\n".count(f"\n{old}\n") == 1, f"expected once:\n{old}"
    return before.replace(old, "\n".join(text for _, text in lines))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree with the operator added, and its CPU kernels built into a library of their own."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copyfile(ROOT / name, tree / name)
    for kind, path, text in BLOCKS:
        file = tree / path
        if kind == "diff":
            file.write_text(edited(file.read_text(), text))
        else:
            assert not file.exists(), path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    include = Path(torch.__file__).parent / "include"
    options = ("-DM2F_CUDA=off", "-DM2F_OPERATORS=mask_area", f"-DM2F_TORCH_INCLUDE={include}")
    run(tree, "cmake", "-S", ".", "-B", "build", "-G", "Ninja", *options)
    run(tree, "cmake", "--build", "build")
    return tree


def run(tree: Path, *command: str) -> str:
    environment = {"PYTHONPATH": str(tree), "M2F_LIBRARIES": str(tree / "build" / "lib"), "HOME": str(tree)}
    environment["PATH"] = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ten_places():
    assert len(PLACES) <= 10
    headings = re.findall(r"^## \d+\. `(.+)`$", PAGE, flags=re.MULTILINE)
    assert headings == list(PLACES)


def test_the_page_is_followed_to_the_end(tree):
    """Its own tests, those that every operator is put to, and its benchmark."""
    tests = (
        "tests/ops/test_mask_area.py", "tests/fuzz", "tests/test_dispatch.py", "tests/test_fallbacks.py",
        "tests/test_benchmarks.py", "tests/test_docs.py", "benchmarks/test_operators.py",
    )  # fmt: skip
    selected = "mask_area or registered_exists or has_a_row or reference_lists"
    options = ("-n", "0", "-q", "--benchmark-disable", "-k", selected)
    found = run(tree, sys.executable, "-m", "pytest", *tests, *options)
    assert int(re.search(r"(\d+) passed", found)[1]) >= 90


@pytest.mark.slow
def test_its_kernel_compiles_ahead_of_time(tree):
    options = ("--select", "mask_area", "--representative", "--archs", "90", "--check")
    assert "| mask_area | _area_kernel | bf16 |" in run(tree, sys.executable, "-m", "benchmarks.static", *options)


def test_its_style(tree):
    for tool in ("ruff", "clang-format"):
        if shutil.which(tool, path=Path(sys.executable).parent) is None:
            pytest.skip(f"{tool} is not installed: `make lint` installs it")
    python = [path for path in PLACES if path.endswith(".py")]
    run(tree, "ruff", "check", *python)
    run(tree, "ruff", "format", "--check", *python)
    run(tree, "clang-format", "--dry-run", "--Werror", *(path for path in PLACES if path.endswith(".cpp")))
