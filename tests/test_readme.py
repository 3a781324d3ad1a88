"""README says what the committed results say, and its code runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Blocks with a title are files, which `test_adding_an_operator.py` makes and runs.
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if "```python\n" in p.read_text()]


def test_figures_are_those_of_the_committed_run():
    """README has its table, which every run that renews results writes; the pages have a place for each of theirs, that
    on `transformers` a row for each model."""
    pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")
    from benchmarks import models, readme

    text = readme.README.read_text()
    assert readme.update(text) == text, "python -m benchmarks.readme"
    names = [name for page in (ROOT / "docs").rglob("*.md") for name in readme.MARKER.findall(page.read_text())]
    assert sorted(names) == sorted(readme.BLOCKS)
    for name, block in readme.BLOCKS.items():
        assert block.text("").count("\n|") > 3 or name == "training"
    filled = readme.fill((ROOT / "docs" / "integrations" / "transformers.md").read_text(), "../../")
    assert all(filled.count(f"\n| {model.name} |") == 1 for model in models.MODELS)
    assert "| Mask2Former Swin-T, 1024² | 6676, 2.18x (4653, 1.76x) | **3068** (2651) | 1096, 2.72x | 402 |" in filled


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900
    assert len(re.findall(r"^\|[-|]+\|$", text, re.MULTILINE)) <= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """All Python blocks of a page, one after the other, in a folder for the files that they write."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # its models
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page.name, "exec"), {"__name__": "__page__"})
