"""The tables of what is known in `transformers` are made from the replacements, and their figures were measured."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from m2f_kernels.integrations.transformers import _swap, registry

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations" / "transformers.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu-intel-xeon.csv"


def test_every_replaced_class_is_listed():
    listed = {family.name: len(family.classes) for family in registry.families()}
    names = [name.split(".")[2] for name in _swap.replacements()]
    assert listed == {family: names.count(family) for family in names}
    mask2former = next(family for family in registry.families() if family.name == "mask2former")
    assert {"Loss", "HungarianMatcher", "PixelDecoderEncoderMultiscaleDeformableAttention"} <= set(mask2former.classes)
    assert all(all(family.classes) for family in registry.families())
    parts = [name for classes in registry.PARTS.values() for name in classes]
    assert sorted(parts) == sorted({name for family in registry.families() for name in family.classes})


@pytest.mark.skipif(not RESULTS.exists(), reason="the committed results are not here")
def test_gains_are_those_of_the_committed_run():
    with RESULTS.open() as file:
        rows = [row for row in csv.DictReader(file) if (row["op"], row["setting"]) == ("integrations", "default")]
    times = {(row["case"], row["implementation"]): float(row["median_ms"]) for row in rows}
    shown = dict(gain for gains in registry.GAINS.values() for gain in gains)
    assert shown == {case: round(times[case, "before"] / times[case, "after"], 2) for case, _ in times}


def test_the_page_has_this_table():
    text = PAGE.read_text()
    assert registry.update(text) == text, "python -m m2f_kernels.integrations.transformers.registry prints the table"


def test_tests_of_transformers_are_of_known_families():
    assert registry.PEERS.keys() <= {family.name for family in registry.families()}
    assert all(f"{family} {count}" in registry.peers() for family, count in registry.PEERS.items())
    assert f"  {registry.peers()}" in registry.report()


def test_info_lists_families(monkeypatch):
    lines = registry.report()
    assert any(line.split()[:1] == ["rt_detr"] and "1.02x" in line for line in lines)
    monkeypatch.setattr(registry, "installed", lambda: ("4.57.6", {"rt_detr"}))
    absent = {line.split()[0] for line in registry.report() if line.endswith("(not in the installed version)")}
    assert absent == {family.name for family in registry.families()} - {"rt_detr"}
    monkeypatch.setattr(registry, "installed", lambda: None)
    assert "  installed: none" in registry.report()


def test_transformers_is_not_imported():
    code = "import sys, m2f_kernels.info as i; i.report(); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)
