"""The benchmark of models before and after: its table, its comparison."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")

from benchmarks import models, tables
from benchmarks.cases import Row

ROWS = [
    replace(
        Row("integrations", "A, 800²", name, setting, "forward", "", "float32", 2),
        median_ms=time,
        memory_extra_mib=memory,
        **more,
    )
    for name, setting, time, memory, more in (
        ("before", "default", 300.0, 640.0, {"stages": "deformable attention=210"}),
        ("after", "default", 100.0, 160.0, {"error_output": 1e-6}),
        ("before", "heap retained", 200.0, None, {"stages": "deformable attention=140"}),
        ("after", "heap retained", 100.0, None, {"error_output": 1e-6}),
    )
]


@pytest.mark.parametrize("memory", [True, False])
def test_table(memory):
    rows = ROWS if memory else [replace(row, memory_extra_mib=None) for row in ROWS]
    (line,) = [line for line in tables.integrations_in_detail(rows).splitlines() if line.startswith("| A, 800²")]
    peaks = ["640, 4.00x", "160"] if memory else ["-", "-"]
    times = ["300, 3.00x (200, 2.00x)", "**100** (100)"]
    assert line.strip("| ").split(" | ") == ["A, 800²", *times, *peaks, "1.0e-06", "-", "70%"]


def test_difference():
    scores = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1))
    wrong = scores.clone()
    wrong[0, 2, 1] += 0.25
    assert models.difference_of([scores], [scores]) == (0, scores.abs().max())
    assert models.difference_of([scores, scores], [scores, wrong])[0] == pytest.approx(0.25)
    absent = scores.clone()
    absent[..., 2] = -torch.inf
    assert models.difference_of([absent], [absent])[0] == 0
    assert models.difference_of([scores], [absent])[0] == torch.inf
    assert models.difference_of([scores], [absent.nan_to_num(neginf=torch.nan)])[0] == torch.inf


def test_choices_are_made_again_if_they_are_choices():
    """Scores within rounding of each other may change places; a choice by wrong scores is refused."""
    scores = torch.tensor([[1.0, 3.0, 3.0001, 2.0]])
    recorded = []
    with models.choices(recorded):
        assert torch.topk(scores, 2, dim=1)[1].tolist() == [[2, 1]]
    with models.choices(list(recorded), replay=True):
        assert torch.topk(torch.tensor([[1.0, 3.0001, 3.0, 2.0]]), 2, dim=1)[1].tolist() == [[2, 1]]
    with pytest.raises(RuntimeError, match="other queries"), models.choices(list(recorded), replay=True):
        torch.topk(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 2, dim=1)
    assert torch.topk(scores, 1, dim=1)[1].tolist() == [[2]]


def test_aims_are_those_of_every_model():
    assert len({model.name for model in models.MODELS}) == len(models.MODELS)
    assert all(model.aim >= 1.3 for model in models.MODELS)
