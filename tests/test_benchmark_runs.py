"""The benchmark's machinery: how long it times, what reports keep, what is a regression, what a run on a GPU does."""

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")

import benchmarks
from benchmarks import (
    compare,
    facts,
    kernels,
    launches,
    learning,
    measure,
    models,
    plot,
    readme,
    report,
    run,
    sass,
    static_cuda,
    worker,
)
from benchmarks.cases import Benchmark, Row, Scale, ratio, write_csv
from benchmarks.report import Run
from m2f_model import bench

QUICK = ("--device", "cpu", "--quick", "--op")
SHORT, LONG = 2 * measure.WARM_MS, 2 * measure.LONG_MS
COMMITTED = [path.with_suffix(".csv") for path in report.RESULTS.glob("*.json")]


def _row(implementation="m2f_kernels", time=10.0, **given):
    usual = {"op": "attention_mask", "case": "9 layers 1024² fp32", "setting": "default", "direction": "forward"}
    usual |= {"distribution": "", "dtype": "fp32", "threads": 2, "iqr_ms": 0.1, "rounds": 3}
    usual["ours"] = implementation.startswith("m2f")
    return Row(implementation=implementation, median_ms=time, **usual | given)


@pytest.fixture
def command(monkeypatch):
    """A function that calls a command in this process, and gives its exit status."""

    def called(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        return module.main()

    before = signal.getsignal(signal.SIGTERM)
    yield called
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def forked(monkeypatch):
    """Measuring processes are forked from one that has imported this module, in the environment of peak memory's."""
    for name, value in {**bench.ENVIRONMENT, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    multiprocessing.set_forkserver_preload([__name__])
    monkeypatch.setattr(run, "get_context", lambda how: multiprocessing.get_context("forkserver"))


# ---------------------------------------------------------------- commands


def test_implementations_can_be_left_out(tmp_path, command, forked, capsys):
    """Their rows say so, and are not measured."""
    chosen = ("masked_attention", "--case", "random 0.05", "--skip", "SDPA")
    assert command(run, *QUICK, *chosen, "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "s  masked_attention, heap retained: S=4096 Q=100 random 0.05 fp32 forward\n" in printed
    (table,) = tmp_path.glob("cpu-*-quick-partial.csv")
    rows = compare.read(table)
    for row in rows:
        left_out = "SDPA" in row.implementation
        assert row.status == ("left out (--skip SDPA)" if left_out else "ok")
        assert (row.median_ms is None) == left_out
    assert {row.implementation for row in rows} >= {"m2f_kernels", "SDPA, boolean mask", "nn.MultiheadAttention's core"}


def _environment(*_):
    yield {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}


def test_a_process_has_its_allocator_from_its_start(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # another's setting
    runner = run.Runner(Scale("cpu", True), [], "", [], tmp_path, None, None)
    runner._phase("x", {"MALLOC_TOP_PAD_": "4096"}, _environment)
    assert (runner.facts, runner.failures) == ({"MALLOC_TOP_PAD_": "4096"}, [])


def _conditions(*_):
    yield {"device": "a CPU"}


def _interrupted(*_):
    """Two cases' times; before the third, the run is told to end."""
    for size in (256, 512):
        yield _row(case=f"9 layers {size}² fp32")
    time.sleep(1)  # in which they are read
    for _ in range(2):  # as `timeout` does
        os.kill(multiprocessing.parent_process().pid, signal.SIGTERM)
    time.sleep(60)


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, command, forked, monkeypatch, capsys):
    """Beside the results of whole runs, and not as one."""
    monkeypatch.setattr(worker, "prepare", _conditions)
    monkeypatch.setattr(worker, "times", _interrupted)
    start = time.monotonic()
    assert command(run, *QUICK, "attention_mask", "--output", tmp_path) == 1
    assert time.monotonic() - start < 50, "the process that measures was waited for"
    assert "Failed: interrupted" in capsys.readouterr().out
    (table,) = tmp_path.glob("*.csv")
    assert table.stem.endswith("-quick-partial")
    assert [row.case for row in compare.read(table)] == ["9 layers 512² fp32", "9 layers 256² fp32"]
    assert "| failures | interrupted |" in (table.with_suffix("") / "report.md").read_text()


def test_kernels_alone(tmp_path, command):
    command(kernels, "--part", "masks", "--part", "points", "--output", tmp_path / "k" / "x.md")
    lines = (tmp_path / "k" / "x.md").read_text().splitlines()
    times = {line.split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in lines}
    for name in ("resize_mask_features", "predict_attention_mask, stride 8", "point_sample backward",
                 "uncertain_points, 100 masks"):  # fmt: skip
        assert all(float(time) > 0 for time in times[f"| {name}"])
    assert any(line.startswith("- torch: ") for line in lines)


# ---------------------------------------------------------------- timing


def test_runs_are_called_in_turn_as_planned():
    called = []
    runs = [partial(called.append, name) for name in ("cold", "warm", "long")]
    found = measure.interleaved(runs, "cpu", measure.Plan(0.0, 3), [1.0, SHORT, LONG])
    assert called == ["cold", *["cold", "warm"] * 3], "a warm-up, none, and nothing but the checked call"
    assert [result.rounds for result in found] == [3, 3, 1]
    assert (found[2].median_ms, found[2].page_faults) == (LONG, None)
    called.clear()
    (twice,) = measure.interleaved(runs[2:], "cpu", measure.Plan(0.0, 3, long_calls=1), [LONG])
    assert (called, twice.rounds) == (["long"], 2)
    (fast,) = measure.interleaved([lambda: None], "cpu", measure.Plan(budget_s=0.2, min_rounds=3))
    assert fast.rounds == measure.MAX_ROUNDS, "faster than the budget: as many as are allowed"


def test_cpu_time_leaves_out_waiting():
    runs = [lambda: time.sleep(0.05), lambda: sum(range(10**6))]
    sleeping, working = measure.interleaved(runs, "cpu", measure.Plan(0.01, 3), clock=time.process_time)
    assert sleeping.median_ms < 5 < working.median_ms


@pytest.mark.parametrize(("launch_s", "expected"), [(0.0, 0.001), (0.004, 0.008), (0.02, 0.0)])
def test_head_start_covers_the_launch(monkeypatch, launch_s, expected):
    """Twice the launch; none for a call that waits for the GPU."""
    slept = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(measure.time, "perf_counter", iter([1.0, 1.0 + launch_s]).__next__)
    assert measure.head_start(lambda: None) == pytest.approx(expected)
    assert slept[0] / measure._CYCLES_PER_S > measure._LONGEST_LAUNCH_S  # else a call that waits would not be noticed


# ---------------------------------------------------------------- comparison

MEASURED = {"memory_extra_mib": 50.0, "kernels": 7}
BEFORE = [_row(**MEASURED), _row("peer", 100.0), _row("other", 50.0)]
SLOWER = [_row("peer", 150.0), _row("other", 70.0)]
REGRESSION = "Regression: attention_mask: 9 layers 1024² fp32, m2f_kernels, default: "


def _ours(time=10.0, **change):
    return _row(time=time, **MEASURED | change)


@pytest.mark.parametrize(
    ("new", "status", "words"),
    [
        ([_ours(11.5), *BEFORE[1:]], 1, "10.0 -> 11.5 ms"),
        ([_ours(memory_extra_mib=60.0)], 1, "50.0 -> 60.0 MiB"),
        ([_ours(None, status="wrong result")], 1, "now wrong result"),
        ([_ours(kernels=9)], 1, "7 -> 9 kernels"),
        ([_ours(18.0), *SLOWER], 1, "1.40x slower too"),  # a slower kernel on a slower machine
        ([_ours(12.0), _row("peer", 50.0), SLOWER[1]], 1, "ms"),  # a peer that became faster excuses nothing
        ([_ours(14.0), _row("peer", 200.0, case="another")], 1, "ms"),  # neither does another case's
        ([_ours(10.9)], 0, "1 rows"),  # less than a tenth
        ([_ours(14.0, iqr_ms=4.5)], 0, "1 rows"),  # within its own spread
        ([_ours(5.0)], 0, "1 rows"),
        ([_ours(memory_extra_mib=51.0)], 0, "1 rows"),
        ([_ours(14.5), *SLOWER], 0, "1 rows"),  # the machine is slower
        ([_ours(), _row("peer", 500.0)], 0, "1 rows"),
        ([_ours(case="another")], 2, "no row of this package in common"),
    ],
)
def test_regressions_are_told_from_noise(new, status, words):
    (line,), found = compare.report(BEFORE, new)
    assert found == status
    assert line.startswith(("No regression beyond noise in ", REGRESSION, "Nothing to compare: ")[status])
    assert words in line


@pytest.mark.parametrize(("name", "words"), [("other.csv", "columns of a benchmark's CSV"), ("none.csv", "found none")])
def test_a_file_that_is_no_run_is_named_before_anything_is_measured(
    tmp_path, command, monkeypatch, capsys, name, words
):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match="2"):
        command(run, "--compare", tmp_path / name)
    printed = capsys.readouterr().err
    assert name in printed
    assert words in printed


def test_runs_of_different_devices_are_warned_of(tmp_path, command, capsys):
    for name, device in (("old", "one CPU"), ("new", "another")):
        write_csv(tmp_path / f"{name}.csv", [asdict(_row(time={"old": 10.0, "new": 20.0}[name]))])
        (tmp_path / f"{name}.json").write_text(json.dumps({"facts": {"device": device}}))
    assert command(compare, tmp_path / "old.csv", tmp_path / "new.csv") == 1
    warning, regression = capsys.readouterr().out.splitlines()
    assert "different devices: another, one CPU" in warning
    assert regression == f"{REGRESSION}10.0 -> 20.0 ms"


def test_rows_survive_the_file(tmp_path):
    row = _row(stages="a=1.5;b, c=2", kernels=3, memory_extra_mib=1.25, headline=True)
    write_csv(tmp_path / "rows.csv", [asdict(row)])
    assert compare.read(tmp_path / "rows.csv") == [row]
    assert row.stage_ms == {"a": 1.5, "b, c": 2.0}


def test_older_results_can_be_compared(tmp_path):
    """A folder of a CSV for each operator, a full run's in a folder of its own, without the columns that came later."""
    older = tmp_path / "older" / "full"
    older.mkdir(parents=True)
    row = asdict(_row())
    write_csv(older / "attention_mask.csv", [{name: row[name] for name in list(row)[:20]} | {"ours": True}])
    (older / "learning.csv").write_text("step,kernels_loss\n1,41.8\n")
    (read,) = compare.read(older)
    assert (read.run, read.key, read.median_ms) == ("full", _row().key, 10.0)
    full, default = _row(run="full"), _row(time=20.0)
    for old, new, status in (
        ([read], [default], 1),
        ([read, default], [default], 0),
        # Where both runs are new, each is compared with its own.
        ([read], [full, default], 0),
        ([full, default], [full, _row(time=30.0)], 1),
    ):
        assert compare.report(old, new)[1] == status


# ---------------------------------------------------------------- figures


def test_figures_of_both_directions_and_of_one_value():
    rows = [_row(error_output=2e-6), _row("slow", 30.0), _row("broken", 3.0, status="wrong result")]
    time = partial(ratio, rows[0].case, "median_ms")
    error = partial(ratio, rows[0].case, "error_output", "m2f_kernels", None, "")
    asked = [
        *(time(("slow", "broken"), "m2f_kernels", "", target) for target in (3.0, 3.1)),
        time(("slow", "broken"), "m2f_kernels", "", 2.0, at_most=True),
        error(1e-6, at_most=True), error(1e-5, at_most=True), time("broken", "m2f_kernels", "", 1.0),
    ]  # fmt: skip
    benchmark = Benchmark("op", "title", figures={"cpu": asked})
    assert [line[2:] for line in report.judged(benchmark, Scale("cpu", False), rows)] == [
        ["≥ 3.00x", "3.00x", "met"], ["≥ 3.10x", "3.00x", "**MISSED**"], ["≤ 2.00x", "3.00x", "**MISSED**"],
        ["≤ 1.0e-06", "2.0e-06", "**MISSED**"], ["≤ 1.0e-05", "2.0e-06", "met"], ["≥ 1.00x", "-", "not measured"],
    ]  # fmt: skip
    assert report.judged(benchmark, Scale("cpu", quick=True), rows) == []


def test_of_several_peers_the_best_or_the_fastest_counts():
    measured = (("ours", 2.0, 4.0), ("fast", 6.0, 80.0), ("small", 9.0, 20.0), ("broken", None, None))
    rows = [_row(name, time, memory_extra_mib=memory) for name, time, memory in measured]
    best = ratio(rows[0].case, "median_ms", ("fast", "small", "broken"), "ours", "")
    less = replace(best, field="memory_extra_mib")
    for figure, value in ((best, 3.0), (less, 5.0), (replace(less, of_fastest=True), 20.0)):
        assert report.evaluate(figure, rows, "default") == (value, False)
    assert report.evaluate(best, rows, "another") is None
    assert report.evaluate(replace(best, below="broken"), rows, "default") is None
    rows[0].memory_extra_mib = 0.5
    assert report.evaluate(less, rows, "default") == (20.0, True), "no more than a lower bound"


# ---------------------------------------------------------------- reports


def _run(op, date, ratio):
    """A run of one operator in which a case's first peer takes `ratio` times as long as its first row, others more."""
    scale, rows = Scale("cpu", False), []
    for case in benchmarks.load(op).select(scale):
        about = {"op": op, "case": case.name, "direction": case.direction, "headline": case.headline, "iqr_ms": 1.0}
        for i, one in enumerate(case.implementations):
            time = 10.0 * (1 + i * (ratio - 1))
            amounts = {"memory_extra_mib": time, "written_mib": 10 * time, "error_output": 0.0, "ours": one.ours}
            of = about | amounts | {"dtype": case.dtype, "subject_speedup": time / 10}
            rows += [_row(one.name, time, setting=setting, **of) for setting in facts.SETTINGS["cpu"]]
    stated = {"device": "a CPU", "date": date, "torch": "2", "load average before": "0.1"}
    return Run(scale, stated, {"2": {"bandwidth": 1e9}}, rows)


def _report(folder, *runs):
    """The report's text after the runs."""
    for one in runs:
        report.save(folder / "device.csv", one)
    report.pages(folder / "device.csv", folder)
    return (folder / "report.md").read_text()


def _missing(text, *expected):
    return [part for part in expected if part not in text]


def test_a_run_of_one_operator_keeps_the_others_in_the_report(tmp_path):
    text = _report(tmp_path, _run("attention_mask", "Monday", 100.0), _run("masked_attention", "Tuesday", 100.0))
    assert not _missing(
        text,
        "| 9 layers 1024² fp32 | transformers | 1000 (1.00) | 100x |",
        "| S=16384 Q=100 open 1.0 fp32 forward | SDPA, boolean mask | 1000 (1.00) | 100x |",
        "Monday", "Tuesday", "come from several runs", "Not measured in this folder: point_loss",
    )  # fmt: skip
    assert "**MISSED**" not in text
    text = _report(tmp_path, _run("attention_mask", "Wednesday", 1.5))
    assert not _missing(
        text,
        "| 9 layers 1024² fp32 | transformers | 15.0 (1.00) | 1.50x |",
        "SDPA, boolean mask | 1000",
        "| 9 layers 1024² fp32: faster than transformers | default | ≥ 15.0x | 1.50x | **MISSED** |",
    )
    assert "Monday" not in text
    assert "- 9 layers 1024² fp32: faster than transformers (default): 1.50x, target ≥ 15.0x" in text.split("## ")[0]


def test_the_first_page_answers_what_is_saved(tmp_path):
    ops = ("point_loss", "end_to_end", "ms_deform_attn")
    lines = _report(tmp_path, *(_run(op, "Monday", 4.0) for op in ops)).splitlines()
    titles = [line for line in lines if line.startswith("## ")]
    assert titles[0].startswith("## The loss of a training step: full masks, K = 12544 points")
    assert titles[1].startswith("## A whole Mask2Former")
    assert lines.index(titles[1]) < 40, "not on the first screen"
    assert "| R50 inference 1024² | 40.0, 4.00x (40.0, 4.00x) | **10.0** (10.0) | 40.0, 4.00x | 10.0 | 0 |" in lines
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {f"{op}.{kind}" for op in ops for kind in ("md", "png")}
    assert written >= {"point_loss_curve.png", "end_to_end_sizes.png"}


def test_readme_tables_state_each_case_measured():
    rows = [row for op in ("attention_mask", "masked_attention") for row in _run(op, "Monday", 2.0).rows]
    text = readme.masked_attention(rows)
    times = "**10.0** (10.0) | 20.0, 2.00x (20.0, 2.00x) | 30.0, 3.00x (30.0, 3.00x) |"
    assert not _missing(
        text,
        f"| masks of 9 layers, 1024² | {times}",
        "| peak MiB above inputs, 1024² | 10.0 | 20.0 | 30.0 | 40.0 |",
        "| MiB written, 1024² | 100 | 200 | 300 | 400 |",
        f"| forward + backward, regions of 0.3 | {times}",
    )
    assert " - " not in text, "something is stated that was not measured"


def test_other_peoples_models_stand_in_the_report(tmp_path):
    rows = [
        _row(name, time, op="integrations", case=case, setting=setting, memory_extra_mib=memory, error_output=1e-6,
             ours=name == "after", stages=f"{models.ATTENTION}={0.7 * time}" if name == "before" else "")
        for case, name, setting, time, memory in (
            ("Mask2Former Swin-T, 1024²", "before", "default", 4000, 900),
            ("Mask2Former Swin-T, 1024²", "after", "default", 2000, 600),
            ("Mask2Former Swin-T, 1024²", "before", "heap retained", 3000, None),
            ("Mask2Former Swin-T, 1024²", "after", "heap retained", 2000, None),
            ("RT-DETR ResNet-50, 640²", "before", "default", 300, 90),
            ("RT-DETR ResNet-50, 640²", "after", "default", 250, 60),
        )
    ]  # fmt: skip
    run = _run("attention_mask", "Monday", 100.0)
    text = _report(tmp_path / "new", run, replace(run, rows=rows))
    times = "4000, 2.00x (3000, 1.50x) | **2000** (2000)"
    first = f"| Mask2Former Swin-T, 1024² | {times} | 900, 1.50x | 600 | 1.0e-06 |"
    assert first in text
    assert "| RT-DETR ResNet-50, 640² | 300, 1.20x | **250** | 90.0, 1.50x | 60.0 | 1.0e-06 |" in text
    lines = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| integrations |")]
    assert [line for line in lines if line[-2] != "-"] == [
        ["Mask2Former Swin-T, 1024²: faster than before", "default", "≥ 1.70x", "2.00x", "met |"],
        ["Mask2Former Swin-T, 1024²: less peak memory above weights", "default", "≥ 2.00x", "1.50x", "**MISSED** |"],
        ["RT-DETR ResNet-50, 640²: faster than before", "default", "≥ 1.30x", "1.20x", "**MISSED** |"],
    ]
    assert {row.op for row in compare.read(tmp_path / "new")} == {"attention_mask", "integrations"}
    # In detail: the target, of models that have one, and the share of deformable attention.
    assert f"{first} 1.7x | 70% |" in readme.integrations_in_detail(rows)
    others = [replace(row, case="A, 800²", memory_extra_mib=None) for row in rows[:4]]
    assert f"| A, 800² | {times} | - | - | 1.0e-06 | - | 70% |" in readme.integrations_in_detail(others)


@pytest.mark.parametrize("table", COMMITTED, ids=lambda table: table.stem)
def test_committed_reports_are_what_their_folders_say(tmp_path, table):
    """Each committed row and fact stands on a page made of it, and only what has facts. A default run is short."""
    found = report.load(table)
    for name, runs in found.items():
        text = report.text(tmp_path, runs)
        for op, one in runs.items():
            assert one.rows, (name, op)
            page = report.chapter(benchmarks.load(op), one, [])
            assert all(row.case in page and row.implementation in page for row in one.rows)
            assert f"]({op}.md)" in text
            if name == "default" and op in benchmarks.REGISTRY:
                assert int(one.facts["wall time of the run"].split()[0]) < 600
    assert {(row.run, row.op) for row in compare.read(table)} == {(name, op) for name in found for op in found[name]}


@pytest.mark.parametrize("op", benchmarks.REGISTRY)
def test_no_two_bars_have_one_colour(op):
    """All rows of every committed run, of which a picture shows some."""
    assert len(COMMITTED) >= 3
    for table in COMMITTED:
        rows = [row for row in compare.read(table) if row.op == op and row.run != "configurations"]
        colours = plot._colours(rows)
        assert set(colours) == {row.implementation for row in rows}
        assert len(set(colours.values())) == len(colours)


@pytest.mark.parametrize(("op", "known"), [("end_to_end", True), ("attention_mask", False)])
def test_images_per_second_stand_beside_the_latency(op, known):
    row = _row("m2f", 50.0, headline=True, op=op, case="R50 training step 1024² N=2")
    run, benchmark = Run(Scale("cpu", False), {}, {}, [row]), benchmarks.load(op)
    times = next(section for section in report._sections(benchmark, run) if section[0].startswith("Time"))
    for _, header, (line,) in (times, report._peers_table(benchmark, run.rows)):
        assert dict(zip(header, line, strict=True)).get("images/s") == ("40.0" if known else None)


# ---------------------------------------------------------------- measuring


def test_peak_memory_in_a_forked_process_and_its_failures(tmp_path, forked):
    steps = []
    runner = run.Runner(Scale("cpu", True), [], "", [], tmp_path, steps.append, None)
    assert runner._peak("check of the method", measure.calibration) == pytest.approx(64, abs=2)
    assert not runner.failures
    absent = (runner.scale, tmp_path, "attention_mask", "no such case", "m2f_kernels")
    assert runner._peak("x", worker.peak, *absent) is None
    assert steps == ["peak memory: check of the method", "peak memory: x"]
    assert runner.failures[0].startswith("peak memory, x: its process ended with 1: RuntimeError")


def test_kernels_of_a_trace_are_counted():
    events = [{"cat": "kernel"}, {"cat": "gpu_memcpy"}, {"name": "no category"}, {"cat": "kernel"}]
    assert launches.kernels(events) == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_kernels_of_a_call_are_counted():
    x = torch.ones(8, device="cuda")
    assert launches.count(lambda: (x * 2).add_(1)) == 2


def test_learning_writes_what_it_measured(tmp_path, command, monkeypatch):
    """The whole command for two steps: both backends start from the same loss."""
    monkeypatch.setattr(plot, "WINDOW", 1)
    options = {"steps": 2, "evaluate-every": 2, "images": 1, "output": tmp_path, "model": tmp_path / "model"}
    command(learning, *(f"--{name}={value}" for name, value in options.items()))
    (table,) = tmp_path.glob("*.csv")
    found = report.load(table)["default"]["learning"]
    kernels, reference = (found.curves[f"{backend}_loss"] for backend in learning.BACKENDS)
    assert len(kernels) == 2
    assert kernels[0] == pytest.approx(reference[0], rel=1e-5)
    assert kernels[0] > 10
    assert {row.implementation: row.ours for row in found.rows} == {"kernels": True, "reference": False}
    report.pages(table, tmp_path)
    assert "| panoptic quality on 1 new images | kernels " in (tmp_path / "learning.md").read_text()
    assert (tmp_path / "learning.png").stat().st_size > 1000
    assert (tmp_path / "model" / "model.safetensors").exists()


# ---------------------------------------------------------------- static reports


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "blocks"),
    [
        (80, 8, 32, 0, 8),  # all 64 warps
        (80, 4, 255, 0, 2),  # 8192 registers per warp
        (90, 4, 84, 0, 5),  # 2816 per warp: 23 warps, of which 20 in fours
        (90, 4, 32, 100 << 10, 2),  # shared memory
        (90, 1, 16, 0, 32),  # blocks
        (86, 8, 32, 0, 6),  # 48 warps
        (90, 16, 255, 0, 0),  # does not fit
    ],
)
def test_occupancy(capability, warps, registers, shared, blocks):
    assert sass.blocks_per_multiprocessor(capability, warps, registers, shared) == blocks
    most = sass.MULTIPROCESSORS[capability].warps
    assert sass.occupancy(capability, warps, registers, shared) == blocks * warps / most


CODE = """\
\tFunction : forward
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x0000 */
        /*0010*/              @!P0 LDG.E.128 R4, [R2] ;        /* 0x0000 */
        /*0020*/                   LDG.E R4, [R2] ;            /* 0x0000 */
        /*0030*/                   FFMA R1, R1, R2, R3 ;       /* 0x0000 */
        /*0040*/                   NOP;                        /* 0x0000 */
\tFunction : backward
        /*0000*/                   RED.E.ADD.F32 [R2], R3 ;    /* 0x0000 */
        /*0010*/                   STL [R1], R3 ;              /* 0x0000 */
"""


def test_instructions_are_counted_by_kind():
    found = {name: sass.mix(code) for name, code in static_cuda.dumps(CODE).items()}
    assert found["forward"].counts == {"other": 1, "load": 2, "float": 1}
    assert found["forward"].memory() == "2 (1 of 16 bytes)"
    assert found["backward"].text() == "2: atomic 50%, local 50%"
    triton = "Function:k\n--:-:-:-:8\tHGMMA.64x128x16.F32 R4, R2;\n--:-:1:-:1\t@P0 LDGSTS.E.BYPASS.128 [R1], [R2];\n"
    assert sass.mix(triton).counts == {"matrix": 1, "async copy": 1}
    with pytest.raises(ValueError, match="no instruction"):
        sass.mix("nothing")


LINE = "--:-:-:-:1\t{}\n".format
#: Two loops in a row, the first with one inside; a branch forward, and the one to itself behind the end.
LOOPS = (
    LINE("MOV R1, R2") + "LBB0:\n" + LINE("FADD R1, R1, R2") + "LBB1:\n" + LINE("FMUL R1, R1, R2")
    + LINE("@P0 BRA LBB1") + LINE("@P1 BRA LBB0") + "LBB2:\n" + LINE("@P3 BRA LBB3") + LINE("IADD3 R1, R1, R2")
    + "LBB3:\n" + LINE("@P2 BRA LBB2") + LINE("EXIT") + "LBB4:\n" + LINE("BRA LBB4")
)  # fmt: skip
#: A branch around three instructions or one, and a loop with a way out in its middle.
BRANCHES = """\
        /*0010*/ MOV R1, R2
        /*0010*/ @P0 BRA `(.L_x_1)
        /*0010*/ FADD R1, R1, R2
        /*0010*/ FADD R1, R1, R2
        /*0010*/ BRA `(.L_x_2)
.L_x_1:
        /*0010*/ FMUL R1, R1, R2
.L_x_2:
        /*0010*/ IADD3 R1, R1, R2
        /*0010*/ @P1 BRA P2, `(.L_x_3)
        /*0010*/ @P0 EXIT
        /*0010*/ BRA `(.L_x_2)
.L_x_3:
        /*0010*/ EXIT
.L_x_4:
        /*0010*/ BRA `(.L_x_4)
"""


@pytest.mark.parametrize(
    ("code", "trips", "executed"),
    [
        (LOOPS, [1, 1, 1], 9),
        (LOOPS, [2, 3, 5], 1 + 2 * (1 + 3 * 2 + 1) + 5 * 3 + 1),
        (BRANCHES, [1], 5 + 4 + 1),
        (BRANCHES, [10], 5 + 40 + 1),
        (BRANCHES, [0], 5 + 0 + 1),
    ],
)
def test_the_longest_path_weighs_loops_by_trips_and_takes_one_of_two_branches(code, trips, executed):
    assert sass.longest_path(code, trips) == executed


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (LOOPS, "each of 3 loops"),
        (BRANCHES, "each of 1 loops"),
        (BRANCHES + "        /*0010*/ BRX R2\n", "computed address"),
    ],
)
def test_what_has_no_longest_path_is_refused(code, message):
    with pytest.raises(ValueError, match=message):
        sass.longest_path(code)


def test_the_lean_forward_executes_few_instructions():
    """Per sample of a query and head on sm_90, which binds it; the general kernel takes 22.4 in bfloat16."""
    nvcc = static_cuda.compiler()
    if nvcc is None:
        pytest.skip("no nvcc here")
    found = sass.compiled_per_sample(nvcc, "ms_deform_attn/cuda_lean.cuh")
    assert found["forward_lean_kernel<__nv_bfloat16, float, float, false>"] <= 15
    assert found["forward_lean_kernel<__nv_bfloat16, __nv_bfloat16, float, true>"] <= 15
    assert found["forward_lean_kernel<float, float, float, false>"] <= 13


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [("IMMA.16816.S8.S8", "matrix"), ("UTCHMMA", "matrix"), ("IMAD.MOV.U32", "integer"), ("ULOP3.LUT", "integer"),
     ("LDS.128", "shared"), ("ATOMS.ADD", "shared"), ("ATOMG.E.ADD", "atomic"), ("REDUX.SUM", "integer"),
     ("MUFU.EX2", "special"), ("F2FP.BF16.F32.PACK_AB", "conversion"), ("HFMA2.BF16_V2", "float"),
     ("BAR.SYNC", "barrier"),
     ("ST.E", "store"), ("STS", "shared"), ("S2R", "other")],
)  # fmt: skip
def test_kinds_of_instructions(opcode, kind):
    assert sass.kind_of(opcode) == kind
