"""The benchmark's machinery: how long it times, what reports keep, what is a regression, what a run on a GPU does."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark suite needs rich: `make bench` installs it")

import benchmarks
from benchmarks import compare, launches, measure, plot, report, run, sass, static_cuda, tables, worker
from benchmarks.cases import Benchmark, Row, Scale, ratio, write_csv
from benchmarks.report import Run
from m2f_model import bench

ROOT = Path(__file__).parents[1]
SHORT, LONG = 2 * measure.WARM_MS, 2 * measure.LONG_MS


def _row(implementation="m2f_kernels", time=10.0, setting="default", **values):
    ours = implementation.startswith("m2f")
    given = {"median_ms": time, "iqr_ms": 0.1, "rounds": 3, "ours": ours} | values
    return Row("attention_mask", "9 layers 1024² fp32", implementation, setting, "forward", "", "fp32", 2, **given)


def _python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )


# ---------------------------------------------------------------- commands


def test_implementations_can_be_left_out(tmp_path):
    """Their rows say so, and are not measured."""
    run = ("-m", "benchmarks.run", "--device", "cpu", "--quick", "--op", "attention_mask", "--case", "256")
    done = _python(*run, "--skip", "transformers", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = tmp_path.glob("cpu-*-quick-partial.csv")
    rows = compare.read(table)
    for row in rows:
        left_out = "transformers" in row.implementation
        assert row.status == ("left out (--skip transformers)" if left_out else "ok")
        assert (row.median_ms is None) == left_out
    assert {row.implementation for row in rows} >= {"m2f_kernels", "transformers", "PyTorch, strided slices"}


def test_an_interrupted_run_keeps_what_it_measured(tmp_path):
    """Beside the results of whole runs, and not as one."""
    command = [sys.executable, "-m", "benchmarks.run", "--device", "cpu", "--quick", "--op", "attention_mask"]
    process = subprocess.Popen([*command, "--output", tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    lines, cases = [], []
    for line in process.stdout:
        lines.append(line)
        cases += [line] if "attention_mask, default: " in line else []
        if len(cases) == 3:  # so two have rows
            break
    while process.poll() is None:  # `timeout` sends it twice
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    lines += process.stdout.readlines()
    assert process.wait(timeout=60) == 1
    assert "Failed: interrupted" in "".join(lines)
    (table,) = tmp_path.glob("*.csv")
    assert table.stem.endswith("-quick-partial")
    rows = compare.read(table)
    assert len({row.case for row in rows}) == 2
    assert all(row.median_ms > 0 for row in rows if row.status == "ok")
    assert "| failures | interrupted |" in (table.with_suffix("") / "report.md").read_text()


def test_kernels_alone(tmp_path):
    parts = ("--part", "masks", "--part", "points")
    done = _python("-m", "benchmarks.kernels", *parts, "--output", tmp_path / "k" / "x.md")
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "k" / "x.md").read_text()
    for name in (
        "resize_mask_features",
        "predict_attention_mask, stride 8",
        "point_sample backward",
        "uncertain_points, 100 masks",
    ):
        (line,) = [line for line in written.splitlines() if line.startswith(f"| {name} |")]
        assert all(float(cell) > 0 for cell in line.split("|")[2:4])
    assert "- torch: " in written


# ---------------------------------------------------------------- timing


def _counting(times):
    calls = dict.fromkeys(times, 0)

    def call(name):
        calls[name] += 1

    return calls, [lambda name=name: call(name) for name in times]


def test_runs_are_called_as_planned():
    calls, runs = _counting(("cold", "warm", "long"))
    found = measure.interleaved(runs, "cpu", measure.Plan(0.0, 3), [1.0, SHORT, LONG])
    assert calls == {"cold": 4, "warm": 3, "long": 0}, "a warm-up, none, and nothing but the checked call"
    assert [result.rounds for result in found] == [3, 3, 1]
    assert found[2].median_ms == LONG
    assert found[2].page_faults is None
    calls, runs = _counting(("long",))
    (result,) = measure.interleaved(runs, "cpu", measure.Plan(0.0, 3, long_calls=1), [LONG])
    assert calls == {"long": 1}
    assert result.rounds == 2


def test_rounds_go_on_until_the_budget_is_spent():
    plan = measure.Plan(budget_s=0.2, min_rounds=3, long_calls=0)
    calls, runs = _counting(("fast",))
    measure.interleaved(runs, "cpu", plan)
    assert calls["fast"] == 1 + measure.MAX_ROUNDS, "faster than the budget: as many as are allowed"


def test_a_default_run_is_short():
    """By what the committed ones say."""
    for table in report.RESULTS.glob("*.json"):
        for op, one in report.load(table.with_suffix(".csv")).get("default", {}).items():
            if op in benchmarks.REGISTRY:
                assert int(one.facts["wall time of the run"].split()[0]) < 600


# ---------------------------------------------------------------- comparison


def _csv(path, *rows):
    write_csv(path, map(asdict, rows))
    return path


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """Exit status and output of the comparison of two lists of rows."""

    def both(old, new):
        files = _csv(tmp_path / "old.csv", *old), _csv(tmp_path / "new.csv", *new)
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, files)])
        return compare.main(), capsys.readouterr().out

    return both


BEFORE = [_row(memory_extra_mib=50.0, kernels=7), _row("peer", 100.0), _row("other", 50.0)]
SLOWER = [_row("peer", 150.0), _row("other", 70.0)]


def _ours(time=10.0, **change):
    return _row(time=time, **({"memory_extra_mib": 50.0, "kernels": 7} | change))


@pytest.mark.parametrize(
    ("new", "word"),
    [
        ([_ours(11.5), *BEFORE[1:]], "10.0 -> 11.5 ms"),
        ([_ours(memory_extra_mib=60.0)], "50.0 -> 60.0 MiB"),
        ([_ours(None, status="wrong result")], "now wrong result"),
        ([_ours(kernels=9)], "7 -> 9 kernels"),
        ([_ours(18.0), *SLOWER], "1.40x slower too"),  # a slower kernel on a slower machine
        ([_ours(12.0), _row("peer", 50.0), SLOWER[1]], "ms"),  # a peer that became faster excuses nothing
        ([_ours(14.0), replace(_row("peer", 200.0), case="another")], "ms"),  # neither does another case's
    ],
)
def test_regressions_are_named(compared, new, word):
    code, out = compared(BEFORE, new)
    assert code == 1
    assert "Regression: attention_mask: 9 layers 1024² fp32, m2f_kernels, default" in out
    assert word in out


@pytest.mark.parametrize(
    "new",
    [
        [_ours(10.9)],  # less than a tenth
        [_ours(14.0, iqr_ms=4.5)],  # within its own spread
        [_ours(5.0)],
        [_ours(memory_extra_mib=51.0)],
        [_ours(14.5), *SLOWER],  # the machine is slower
        [_ours(), _row("peer", 500.0)],
    ],
)
def test_noise_is_no_regression(compared, new):
    code, out = compared(BEFORE, new)
    assert code == 0
    assert "No regression beyond noise in 1 rows" in out


def test_nothing_in_common_is_an_error(compared):
    code, out = compared([_row()], [replace(_row(), case="another")])
    assert (code, out.split(":")[0]) == (2, "Nothing to compare")


@pytest.mark.parametrize(("name", "word"), [("other.csv", "columns of a benchmark's CSV"), ("none.csv", "found none")])
def test_a_file_that_is_no_run_is_named_before_anything_is_measured(tmp_path, monkeypatch, capsys, name, word):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", ["run", "--compare", str(tmp_path / name)])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    out = capsys.readouterr().err
    assert name in out
    assert word in out


def test_runs_of_different_devices_are_warned_of(tmp_path, monkeypatch, capsys):
    for name, device in (("old", "one CPU"), ("new", "another")):
        _csv(tmp_path / f"{name}.csv", _row())
        (tmp_path / f"{name}.json").write_text(json.dumps({"facts": {"device": device}}))
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "old.csv"), str(tmp_path / "new.csv")])
    assert compare.main() == 0
    assert "different devices: another, one CPU" in capsys.readouterr().out


def test_rows_survive_the_file(tmp_path):
    row = _row(stages="a=1.5;b, c=2", kernels=3, memory_extra_mib=1.25, headline=True)
    (read,) = compare.read(_csv(tmp_path / "rows.csv", row))
    assert read == row
    assert read.stage_ms == {"a": 1.5, "b, c": 2.0}


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
        ["≥ 3.00x", "3.00x", "met"], ["≥ 3.10x", "3.00x", "MISSED"], ["≤ 2.00x", "3.00x", "MISSED"],
        ["≤ 1.0e-06", "2.0e-06", "MISSED"], ["≤ 1.0e-05", "2.0e-06", "met"], ["≥ 1.00x", "-", "not measured"],
    ]  # fmt: skip
    assert report.judged(benchmark, Scale("cpu", quick=True), rows) == []


# ---------------------------------------------------------------- reports


def _run(op, date, ratio):
    """A run of one operator in which a case's first peer takes `ratio` times as long as its first row, others more."""
    scale, rows = Scale("cpu", False), []
    for case in benchmarks.load(op).select(scale):
        for i, one in enumerate(case.implementations):
            for setting in ("default", "heap retained"):
                row = Row(op, case.name, one.name, setting, case.direction, "", case.dtype, 2, ours=one.ours)
                time = 10.0 * (1 + i * (ratio - 1))
                more = {
                    "median_ms": time,
                    "written_mib": 10 * time,
                    "iqr_ms": 1.0,
                    "rounds": 3,
                    "headline": case.headline,
                    "error_output": 0.0,
                }
                rows.append(replace(row, subject_speedup=time / 10, memory_extra_mib=time, **more))
    facts = {"device": "a CPU", "date": date, "torch": "2", "load average before": "0.1"}
    return Run(scale, facts, {"2": {"bandwidth": 1e9}}, rows)


def _report(folder, *runs):
    """The report's text after the runs."""
    for one in runs:
        report.save(folder / "device.csv", one)
    report.pages(folder / "device.csv", folder)
    return (folder / "report.md").read_text()


def test_a_run_of_one_operator_keeps_the_others_in_the_report(tmp_path):
    text = _report(
        tmp_path, *(_run(*x, 100.0) for x in (("attention_mask", "Monday"), ("masked_attention", "Tuesday")))
    )
    assert "| 9 layers 1024² fp32 | transformers | 1000 (1.00) | 100x |" in text
    assert "| S=16384 Q=100 open 1.0 fp32 forward | SDPA, boolean mask | 1000 (1.00) | 100x |" in text
    assert "Monday" in text
    assert "Tuesday" in text
    assert "come from several runs" in text
    assert "**MISSED**" not in text
    assert "Not measured in this folder: point_loss" in text
    text = _report(tmp_path, _run("attention_mask", "Wednesday", 1.5))
    assert "| 9 layers 1024² fp32 | transformers | 15.0 (1.00) | 1.50x |" in text
    assert "SDPA, boolean mask | 1000" in text
    assert "Monday" not in text
    assert "| 9 layers 1024² fp32: faster than transformers | default | ≥ 15.0x | 1.50x | **MISSED** |" in text
    assert "- 9 layers 1024² fp32: faster than transformers (default): 1.50x, target ≥ 15.0x" in text.split("## ")[0]


def test_the_first_page_answers_what_is_saved(tmp_path):
    runs = [_run(op, "Monday", 4.0) for op in ("point_loss", "end_to_end", "ms_deform_attn")]
    lines = _report(tmp_path, *runs).splitlines()
    titles = [line for line in lines if line.startswith("## ")]
    assert titles[0].startswith("## The loss of a training step: full masks, K = 12544 points")
    assert titles[1].startswith("## A whole Mask2Former")
    assert lines.index(titles[1]) < 40, "not on the first screen"
    assert "| R50 inference 1024² | 40.0, 4.00x (40.0, 4.00x) | **10.0** (10.0) | 40.0, 4.00x | 10.0 | 0 |" in lines
    for op in ("point_loss", "end_to_end", "ms_deform_attn"):
        assert (tmp_path / f"{op}.png").exists()
        assert (tmp_path / f"{op}.md").exists()
    assert (tmp_path / "point_loss_curve.png").exists()
    assert (tmp_path / "end_to_end_sizes.png").exists()


def test_readme_tables_state_each_case_measured():
    rows = [row for op in ("attention_mask", "masked_attention") for row in _run(op, "Monday", 2.0).rows]
    text = tables.masked_attention(rows)
    times = "**10.0** (10.0) | 20.0, 2.00x (20.0, 2.00x) | 30.0, 3.00x (30.0, 3.00x) |"
    assert f"| masks of 9 layers, 1024² | {times}" in text
    assert "| peak MiB above inputs, 1024² | 10.0 | 20.0 | 30.0 | 40.0 |" in text
    assert "| MiB written, 1024² | 100 | 200 | 300 | 400 |" in text
    assert f"| forward + backward, regions of 0.3 | {times}" in text
    assert " - " not in text, "something is stated that was not measured"


def test_other_peoples_models_stand_in_the_report(tmp_path):
    rows = [
        Row("integrations", case, name, setting, "forward", "", "float32", 2, median_ms=time, memory_extra_mib=memory,
            error_output=1e-6, ours=name == "after")
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
    first = "| Mask2Former Swin-T, 1024² | 4000, 2.00x (3000, 1.50x) | **2000** (2000) | 900, 1.50x | 600 | 1.0e-06 |"
    assert first in text
    assert "| RT-DETR ResNet-50, 640² | 300, 1.20x | **250** | 90.0, 1.50x | 60.0 | 1.0e-06 |" in text
    lines = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| integrations |")]
    assert [line for line in lines if line[-2] != "-"] == [
        ["Mask2Former Swin-T, 1024²: faster than before", "default", "≥ 1.70x", "2.00x", "met |"],
        ["Mask2Former Swin-T, 1024²: less peak memory above weights", "default", "≥ 2.00x", "1.50x", "**MISSED** |"],
        ["RT-DETR ResNet-50, 640²: faster than before", "default", "≥ 1.30x", "1.20x", "**MISSED** |"],
    ]
    assert {row.op for row in compare.read(tmp_path / "new")} == {"attention_mask", "integrations"}


def test_committed_reports_are_what_their_folders_say(tmp_path):
    """Each committed row and fact stands on a page made of it, and only what has facts."""
    tables = [path.with_suffix(".csv") for path in report.RESULTS.glob("*.json")]
    assert len(tables) >= 3
    for table in tables:
        for name, runs in report.load(table).items():
            text = report.text(tmp_path, runs)
            for op, one in runs.items():
                assert one.rows, (table, name, op)
                page = report.chapter(benchmarks.load(op), one, [])
                assert all(row.case in page and row.implementation in page for row in one.rows)
                assert f"]({op}.md)" in text
        stated = {(name, op) for name, runs in report.load(table).items() for op in runs}
        assert {(row.run, row.op) for row in compare.read(table)} == stated


def test_older_results_can_be_compared(tmp_path, compared):
    """A folder of a CSV for each operator, a full run's in a folder of its own, without the columns that came later."""
    older = tmp_path / "older" / "full"
    older.mkdir(parents=True)
    row = asdict(_row())
    write_csv(older / "attention_mask.csv", [{name: row[name] for name in list(row)[:20]} | {"ours": True}])
    (older / "learning.csv").write_text("step,kernels_loss\n1,41.8\n")
    (read,) = compare.read(older)
    assert (read.run, read.key, read.median_ms) == ("full", _row().key, 10.0)
    assert compared([read], [_row(time=20.0)])[0] == 1
    assert compared([read, replace(read, run="default", median_ms=20.0)], [_row(time=20.0)])[0] == 0
    # Where both runs are new, each is compared with its own.
    both = [_row(time=10.0, run="full"), _row(time=20.0)]
    assert compared([read], both)[0] == 0
    assert compared([*both], [both[0], replace(both[1], median_ms=30.0)])[0] == 1


# ---------------------------------------------------------------- measuring


def test_peak_memory_in_a_forked_process_and_its_failures(tmp_path, monkeypatch):
    """The environment is the one in which the first process is started, from which all are forked."""
    for name, value in bench.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    steps = []
    runner = run.Runner(Scale("cpu", True), [], "", [], tmp_path, steps.append, None)
    assert runner._peak("check of the method", worker.calibration) == pytest.approx(64, abs=2)
    assert not runner.failures
    assert (
        runner._peak("x", worker.peak, runner.scale, tmp_path, "attention_mask", "no such case", "m2f_kernels") is None
    )
    assert steps == ["peak memory: check of the method", "peak memory: x"]
    assert runner.failures[0].startswith("peak memory, x: its process ended with 1: RuntimeError")


@pytest.mark.parametrize(("op", "known"), [("end_to_end", True), ("attention_mask", False)])
def test_images_per_second_stand_beside_the_latency(op, known):
    row = replace(_row("m2f", 50.0, headline=True), op=op, case="R50 training step 1024² N=2")
    run, benchmark = Run(Scale("cpu", False), {}, {}, [row]), benchmarks.load(op)
    times = next(section for section in report._sections(benchmark, run) if section[0].startswith("Time"))
    for _, header, (line,) in (times, report._peers_table(benchmark, run.rows)):
        assert dict(zip(header, line, strict=True)).get("images/s") == ("40.0" if known else None)


@pytest.mark.parametrize(("launch_s", "expected"), [(0.0, 0.001), (0.004, 0.008), (0.02, 0.0)])
def test_head_start_covers_the_launch(monkeypatch, launch_s, expected):
    """Twice the launch; none for a call that waits for the GPU."""
    slept = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    clock = iter([1.0, 1.0 + launch_s])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure.head_start(lambda: None) == pytest.approx(expected)
    assert slept[0] / measure._CYCLES_PER_S > measure._LONGEST_LAUNCH_S  # else a call that waits would not be noticed


def test_kernels_of_a_trace_are_counted():
    events = [{"cat": "kernel"}, {"cat": "gpu_memcpy"}, {"name": "no category"}, {"cat": "kernel"}]
    assert launches.kernels(events) == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_kernels_of_a_call_are_counted():
    x = torch.ones(8, device="cuda")
    assert launches.count(lambda: (x * 2).add_(1)) == 2


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


def test_executed_instructions_are_weighted_by_trips():
    """Two loops in a row, the first with one inside; a branch forward, and the one to itself behind the end."""
    line = "--:-:-:-:1\t{}\n".format
    code = (
        line("MOV R1, R2") + "LBB0:\n" + line("FADD R1, R1, R2") + "LBB1:\n" + line("FMUL R1, R1, R2")
        + line("@P0 BRA LBB1") + line("@P1 BRA LBB0") + "LBB2:\n" + line("@P3 BRA LBB3") + line("IADD3 R1, R1, R2")
        + "LBB3:\n" + line("@P2 BRA LBB2") + line("EXIT") + "LBB4:\n" + line("BRA LBB4")
    )  # fmt: skip
    assert sass.longest_path(code, [1, 1, 1]) == 9
    assert sass.longest_path(code, [2, 3, 5]) == 1 + 2 * (1 + 3 * 2 + 1) + 5 * 3 + 1
    with pytest.raises(ValueError, match="each of 3 loops"):
        sass.longest_path(code)


def test_the_longest_path_takes_one_of_two_branches():
    """A branch around three instructions or one, and a loop with a way out in its middle."""
    code = (
        "MOV R1, R2\n@P0 BRA `(.L_x_1)\nFADD R1, R1, R2\nFADD R1, R1, R2\nBRA `(.L_x_2)\n.L_x_1:\nFMUL R1, R1, R2\n"
        ".L_x_2:\nIADD3 R1, R1, R2\n@P1 BRA P2, `(.L_x_3)\n@P0 EXIT\nBRA `(.L_x_2)\n.L_x_3:\nEXIT\n"
        ".L_x_4:\nBRA `(.L_x_4)\n"
    )
    code = "".join(line if line.startswith(".") else f"        /*0010*/ {line}" for line in code.splitlines(True))
    assert sass.longest_path(code, [1]) == 5 + 4 + 1
    assert sass.longest_path(code, [10]) == 5 + 40 + 1
    assert sass.longest_path(code, [0]) == 5 + 0 + 1
    with pytest.raises(ValueError, match="each of 1 loops"):
        sass.longest_path(code)
    with pytest.raises(ValueError, match="computed address"):
        sass.longest_path(code + "        /*0010*/ BRX R2\n")


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


def test_learning_writes_what_it_measured(tmp_path, monkeypatch):
    """The whole command for two steps: both backends start from the same loss."""
    from benchmarks import learning

    monkeypatch.setattr(plot, "WINDOW", 1)
    arguments = ["learning", "--steps", "2", "--evaluate-every", "2", "--images", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--model", str(tmp_path / "model")])
    learning.main()
    (table,) = tmp_path.glob("*.csv")
    run = report.load(table)["default"]["learning"]
    assert len(run.curves["kernels_loss"]) == 2
    assert run.curves["kernels_loss"][0] == pytest.approx(run.curves["reference_loss"][0], rel=1e-5)
    assert run.curves["kernels_loss"][0] > 10
    assert {row.implementation: row.ours for row in run.rows} == {"kernels": True, "reference": False}
    report.pages(table, tmp_path)
    assert "| panoptic quality on 1 new images | kernels " in (tmp_path / "learning.md").read_text()
    assert (tmp_path / "learning.png").stat().st_size > 1000
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_learned_masks_are_those_of_a_trained_model():
    """Some queries see a region, others nothing and therefore everything; none sees nothing."""
    from benchmarks import inputs

    attend = inputs.learned_masks((32, 32), 1, 40)
    share = attend.float().mean(-1)[0]
    assert attend.shape == (1, 40, 1024)
    assert (share > 0).all()
    assert 0.2 < (share == 1).float().mean() < 0.9
    assert (share < 0.5).sum() >= 5


@pytest.mark.parametrize("op", benchmarks.REGISTRY)
def test_no_two_bars_have_one_colour(op):
    """All rows of every committed run, of which a picture shows some."""
    for table in report.RESULTS.glob("*.json"):
        rows = [row for row in compare.read(table.with_suffix(".csv")) if row.op == op and row.run != "configurations"]
        colours = plot._colours(rows)
        assert set(colours) == {row.implementation for row in rows}
        assert len(set(colours.values())) == len(colours)
