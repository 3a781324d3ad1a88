"""The benchmark of whole models: what is run where, and that a wrong result has no time."""

import time

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")

from benchmarks import timing, whole_model
from benchmarks.whole_model import ACCELERATED, CAPTURED, COMPILED, COMPILED_HELD, EAGER, HELD, OURS, TRANSFORMERS
from m2f_model import bench


def test_cells_on_a_gpu():
    cases = whole_model.cases("cuda", full=False)
    assert [(x.size, x.training, x.batch, x.autocast) for x in cases] == [
        (1024, False, 1, "bf16"), (1024, True, 2, "bf16"),
    ]  # fmt: skip
    inference, training = (whole_model.ways(case, full=False) for case in cases)
    assert training == [(TRANSFORMERS, EAGER), (TRANSFORMERS, COMPILED), (OURS, CAPTURED)]
    # The peer holds its weights in bfloat16 as well.
    assert inference == [*training[:2], (TRANSFORMERS, COMPILED_HELD), training[2]]
    assert len(whole_model.cases("cuda", full=True)) > 2
    assert (TRANSFORMERS, CAPTURED) in whole_model.ways(cases[0], full=True)


@pytest.mark.parametrize(("training", "autocast"), [(False, "none"), (False, "bf16"), (True, "none")])
def test_lines(training, autocast, monkeypatch):
    ways = [(TRANSFORMERS, EAGER), (OURS, EAGER), (ACCELERATED, EAGER)]
    monkeypatch.setattr(whole_model, "ways", lambda case, full: ways)
    lines = whole_model.measure(bench.Case("tiny", 64, training, autocast=autocast), False, 0.01)
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    assert [x[1] for x in cells] == ["transformers, eager", "m2f, eager", "transformers, accelerated, eager"]
    assert all(float(x[2]) > 0 for x in cells)
    assert float(cells[0][4]) == 1
    # Both are printed rounded, and a tiny model takes few milliseconds.
    assert float(cells[1][3]) == pytest.approx(1e3 / float(cells[1][2]), rel=0.1)


def test_cpu_time_leaves_out_waiting(monkeypatch):
    runs = [lambda: time.sleep(0.05), lambda: sum(range(10**6))]
    sleeping, working = timing.interleaved(runs, "cpu", 0.01, 3, clock=time.process_time)
    assert sleeping.median_ms < 5 < working.median_ms
    monkeypatch.setattr(whole_model, "ways", lambda case, full: [(OURS, EAGER)])
    (line,) = whole_model.measure(bench.Case("tiny", 64), False, 0.01, cpu_time=True)
    assert float(line.split("|")[3]) > 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit):
        whole_model.main(["--device", "cpu", "--cpu-time"])


def test_a_wrong_result_has_no_time(monkeypatch):
    monkeypatch.setattr(whole_model, "ways", lambda case, full: [(OURS, EAGER)])
    monkeypatch.setattr(whole_model, "run_of", lambda *_: lambda: (torch.ones(1, 100, 6), torch.ones(1, 100, 16, 16)))
    monkeypatch.setattr(whole_model, "problem", lambda *_: (1.0, "wrong: 1"))
    (line,) = whole_model.measure(bench.Case("tiny", 64), False, 0.01)
    assert line.split("|")[3].strip() == "wrong: 1"
    monkeypatch.setattr(whole_model, "run_of", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in whole_model.measure(bench.Case("tiny", 64), False, 0.01)[0]


def test_errors_are_told_from_rounding():
    case = bench.Case("tiny", 64)
    truth = (torch.ones(1, 2, 3), torch.tensor([[[[1.0, -1.0]]]]))
    assert whole_model.problem(case, truth, truth) == (0, None)
    assert whole_model.problem(case, (truth[0], truth[1] + 0.1), truth)[1].startswith("wrong")
    low = bench.Case("tiny", 64, autocast="bf16")
    logits = torch.rand(1, 2, 10, 10, generator=torch.Generator().manual_seed(0)) - 5  # no mask is above zero
    error, why = whole_model.problem(low, (truth[0], logits + 0.02), (truth[0], logits))
    assert 0 < error < 0.1
    assert why is None
    shuffled = logits.flip(2)
    assert whole_model.problem(low, (truth[0], shuffled), (truth[0], logits))[1].startswith("wrong")
    assert whole_model.problem(low, (truth[0], truth[1] + 0.1), truth)[1] is None
    assert whole_model.problem(low, (truth[0], -truth[1]), truth)[1].startswith("wrong")


def test_weights_held_in_bfloat16():
    """Of both packages, without autocast; the pixels are cast, too."""
    case = bench.Case("tiny", 64, autocast="bf16")
    for whose, how in ((OURS, EAGER), (TRANSFORMERS, f"{EAGER}, {HELD}")):
        called, model, dtype = whole_model.build(case, whose, how)
        assert (called.autocast, dtype) == ("none", torch.bfloat16)
        assert dtype in {p.dtype for p in model.parameters()}
        classes, masks = whole_model.run_of(case, whose, how)()
        assert (classes.dtype, masks.dtype) == (dtype, dtype)
    called, model, dtype = whole_model.build(case, TRANSFORMERS, EAGER)
    assert (called.autocast, dtype) == ("bf16", torch.float32)
