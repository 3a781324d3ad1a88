"""The end-to-end comparison, on the tiny model: what it compares is the same, and what it reports is measured."""

import json
import re

import pytest
import torch

from m2f_model import bench
from m2f_model.bench import IMPLEMENTATIONS, Case, build, measure, measure_peak, peak_memory
from tests.model.command import m2f

TINY = Case("tiny", 96, targets=3)


@pytest.mark.parametrize("training", [False, True])
def test_both_are_measured(training):
    row = measure(Case("tiny", 96, training, targets=3), rounds=2, memory=False)
    assert row["error"] < 1e-4
    stages = {"backbone", "pixel decoder", "transformer decoder", "total"} | ({"loss"} if training else set())
    for name in IMPLEMENTATIONS:
        seconds = row["seconds"][name]
        assert seconds.keys() == stages
        assert 0 < sum(v for k, v in seconds.items() if k != "total") <= 1.5 * seconds["total"]


def test_overlap_of_masks_under_autocast():
    case = Case("tiny", 96, autocast="bf16")
    row = measure(case, rounds=1, memory=False)
    assert all(0.5 < row["mask_iou"][name] < 1 for name in IMPLEMENTATIONS)
    assert bench.mask_iou(Case("tiny", 96)) == 1


def test_memory_is_that_of_the_call(monkeypatch):
    """Of a large one in a process of its own, of a small one in this."""
    assert peak_memory(Case("tiny", 512), "transformers") > measure_peak(Case("tiny", 64), "transformers") + 20
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="measuring the memory of m2f failed"):
        peak_memory(TINY, "m2f")


def test_what_differs_has_no_times(monkeypatch):
    def broken(case, name):
        model = build(case, name)
        if name == "m2f":
            with torch.no_grad():
                model.transformer_decoder.class_head.bias += 1
        return model

    monkeypatch.setattr(bench, "build", broken)
    with pytest.raises(RuntimeError, match=r"expected the same predictions up to 0\.001"):
        measure(TINY, rounds=1)


def test_command(tmp_path, monkeypatch):
    """Its peaks are `peak_memory`'s, which is tested above: each takes a process of its own."""
    peaks = {"transformers": 40.0, "m2f": 16.0}
    monkeypatch.setattr(bench, "peak_memory", lambda case, name: peaks[name])
    result = m2f("bench", "--backbone", "tiny", "--size", "64", "--rounds", "1", "--output", tmp_path / "row.json")
    assert result.exit_code == 0, result.output
    assert re.search(r"peak memory, MiB\W+40\W+16\W+2\.50x", result.output)
    row = json.loads((tmp_path / "row.json").read_text())
    assert (row["case"]["size"], row["peak_mib"]) == (64, peaks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "vgg"], "backbone: expected one of r50"),
        (["--size", "100"], "size: expected a multiple of 32; got 100"),
        (["--rounds", "0"], "rounds: expected at least 1; got 0"),
        (["--batch", "0"], "batch: expected at least 1; got 0"),
        (["--autocast", "fp8"], "autocast: expected none, bf16 or fp16; got 'fp8'"),
    ],
)
def test_bad_commands(arguments, message):
    result = m2f("bench", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
