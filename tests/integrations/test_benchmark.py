"""The benchmark of models before and after: its files, its table, its comparison."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")

from benchmarks import integrations

ROWS = [
    integrations.Row("A, 800²", "default", 1.3, 300.0, 100.0, 2.0, 1.0, 5, 1e-6, 2.5, 12, 0.7, 640.0, 160.0),
    integrations.Row("A, 800²", "heap retained", 1.3, 200.0, 100.0, 2.0, 1.0, 5, 1e-6, 2.5, 12, 0.7),
]


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    integrations.write_csv(path, ROWS)
    assert integrations.read_csv(path)[0] == ROWS[0]
    assert integrations.table(integrations.read_csv(path)) == integrations.table(ROWS)


def test_table():
    line = integrations.table(ROWS).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "A, 800²",
        "300",
        "100",
        "**3.00x**",
        "2.00x",
        "1.3x",
        "640 → 160, 4.00x",
        "70%",
        "1.0e-06 of 2.50",
    ]


def test_table_without_memory():
    assert integrations.table([replace(ROWS[0], before_mib=float("nan"), after_mib=float("nan"))]).count("| - |") == 1


def test_page():
    page = integrations.PAGE.read_text()
    assert integrations.update(page).count("\n| model |") == int(integrations.COMMITTED.exists())
    assert integrations.update(integrations.update(page)) == integrations.update(page)


def test_difference_whatever_the_order_of_queries():
    """Queries that change places do not count, a wrong value does."""
    scores = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1))
    assert integrations._permuted_difference([scores], [scores[:, torch.randperm(6)]])[0] == 0
    wrong = scores.clone()
    wrong[0, 2, 1] += 0.25
    assert integrations._permuted_difference([scores], [wrong])[0] > 0.01
    masks = torch.randn(1, 6, 4, 4)
    assert integrations._permuted_difference([masks], [masks.flip(1)])[0] > 0.1


def test_aims_are_those_of_every_model():
    assert len({model.name for model in integrations.MODELS}) == len(integrations.MODELS)
    assert all(model.aim >= 1.3 for model in integrations.MODELS)
