"""README says what the committed results say, and its code runs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if "```python" in p.read_text()]


def skip_if_results_are_new():
    """After somebody's `make bench` on a machine of the same name the tables lag behind until they are committed."""
    command = ["git", "status", "--porcelain", "benchmarks/results"]
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode == 0 and git.stdout:
        pytest.skip("benchmarks/results has uncommitted results; `python -m benchmarks.readme` puts them into README")


def test_figures_are_those_of_the_committed_run():
    pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")
    skip_if_results_are_new()
    from benchmarks import readme

    shown = 0
    for page, root in readme.PAGES.items():
        text = page.read_text()
        assert readme.update(text, root) == text, f"{page}: python -m benchmarks.readme"
        shown += text.count("<!-- end of")
    assert shown == len(readme.BLOCKS) + 1  # none has lost its marks


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900
    assert len(re.findall(r"^\|[-|]+\|$", text, re.MULTILINE)) <= 4


def test_figures_of_the_page_on_transformers():
    pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")
    skip_if_results_are_new()
    from benchmarks import integrations

    text = integrations.PAGE.read_text()
    assert integrations.update(text) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """All Python blocks of a page, one after the other, in a folder for the files that they write."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # its models
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page.name, "exec"), {"__name__": "__page__"})
