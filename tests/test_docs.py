"""The pictures of the documentation can be made, those that pages show are committed, and no leftovers are."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

import m2f_kernels
from m2f_kernels import dispatch

ROOT = Path(__file__).parents[1]


def loaded(name):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_made_from_the_operators(tmp_path):
    pytest.importorskip("matplotlib", reason="the figures need matplotlib: `make docs-figures` installs it")
    loaded("figures").main(tmp_path)
    made = {p.name for p in tmp_path.glob("*.png")}
    assert made == {p.name for p in (ROOT / "docs" / "figures").glob("*.png")}
    assert all(2_000 < p.stat().st_size < 100_000 for p in tmp_path.glob("*.png"))


def test_pictures_of_the_pages_exist():
    shown = [
        (page, name)
        for page in (ROOT / "docs").rglob("*.md")
        for name in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
    ]
    assert shown
    for page, name in shown:
        assert (page.parent / name).exists(), f"{page.name}: {name}"


def test_tests_of_the_pages_exist():
    """Those that pages cite as proof. The worked example names files that are to be written."""
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    cited = {
        (page.name, name)
        for page in pages
        if page.name not in ("adding_an_operator.md", "CONTRIBUTING.md")
        for name in re.findall(r"tests/[a-z_/0-9]+\.py", page.read_text())
    }
    assert cited
    assert not [(page, name) for page, name in sorted(cited) if not (ROOT / name).exists()]


def test_every_page_is_in_the_navigation():
    """The navigation is written by hand but for docs/integrations, which docs/hooks.py adds."""
    text = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in text, page.name


def test_the_api_reference_lists_every_public_name():
    pytest.importorskip("mkdocs", reason="the site's hooks need mkdocs: `make docs` installs it")
    hooks = loaded("hooks")
    page = (ROOT / "docs" / "api.md").read_text().replace("<!-- operators -->", hooks.operators())
    listed = re.findall(r"^::: m2f_kernels\.(\w+)$", page, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(dispatch.OPERATORS) <= set(listed)
    assert set(m2f_kernels.__all__) - set(listed) == {"__version__", "nn"}


def test_no_leftovers_of_a_run_are_committed():
    """Weights are committed under benchmarks/models only; a run in the current folder is easily added by mistake."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("not a git checkout")
    odd = [
        name
        for name in git.stdout.splitlines()
        if re.search(r"\.(pth|pt|pkl|safetensors|so|pyc)$|events\.out\.tfevents", name)
        and not name.startswith("benchmarks/models/")
    ]
    assert odd == []
