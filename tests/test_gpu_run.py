"""`make gpu`, rehearsed without a GPU: order, limits, what is kept, and where the next call goes on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.tools import gpu, gpu_bundle, old_new
from tests.processes import ROOT, python


def _step(name: str, code: str, seconds: float = 20.0) -> gpu.Step:
    return gpu.Step(name, seconds, shlex.join([sys.executable, "-c", code]), "")


def _run(
    tmp_path: Path, steps: list[gpu.Step], seconds: float = 100.0, commit: str = "a"
) -> tuple[bool, list[str], dict]:
    logs = tmp_path / "run"
    logs.mkdir(exist_ok=True)
    right, left = gpu.run(steps, logs, commit, seconds, dict(PATH="/usr/bin:/bin"))
    return right, left, gpu.kept(logs / "state.json", commit)


def test_a_failing_step_and_a_slow_one_do_not_stop_the_others(tmp_path):
    steps = [
        _step("bad", "print('3 failed'); raise SystemExit(1)"),
        _step("slow", "import time; print('begun', flush=True); time.sleep(60)", seconds=2.0),
        gpu.Step("absent", 20, "no-such-command", ""),
        _step("good", "print('fine')"),
    ]
    right, left, states = _run(tmp_path, steps)
    assert not right
    assert left == ["slow"]
    assert {name: step["state"] for name, step in states.items()} == {
        "bad": "failed",
        "slow": "cut off",
        "absent": "failed",
        "good": "passed",
    }
    assert states["bad"]["last line"] == "3 failed"
    assert states["slow"]["last line"] == "begun"
    assert (tmp_path / "run" / "good.log").read_text() == "fine\n"


def test_the_next_call_goes_on_where_the_last_one_ended(tmp_path):
    count = tmp_path / "count"
    counting = _step("first", f"open({str(count)!r}, 'a').write('x')")
    cut = _step("second", "import time; time.sleep(60)", seconds=0.5)
    _, left, _ = _run(tmp_path, [counting, cut])
    assert left == ["second"]
    right, left, states = _run(tmp_path, [counting, _step("second", "pass")])
    assert (right, left) == (True, [])
    assert states["second"]["state"] == "passed"
    assert count.read_text() == "x"
    _run(tmp_path, [counting], commit="b")  # another commit begins anew
    assert count.read_text() == "xx"


def test_what_has_no_time_left_is_named_and_nothing_begins(tmp_path):
    begun = time.monotonic()
    right, left, states = _run(tmp_path, [_step("a", "pass"), _step("b", "pass")], seconds=3.0)
    assert (right, left, states) == (True, ["a", "b"], {})
    assert time.monotonic() - begun < 3


def test_a_cut_off_step_is_asked_first_and_its_children_end_too(tmp_path):
    """A benchmark writes what it has when it is asked to end."""
    code = (
        "import signal, subprocess, sys, time\n"
        "def end(*_):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # as benchmarks do: it is sent twice
        "    kept.write('rows')\n"
        "    sys.exit(1)\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "print(child.pid, flush=True)\n"
        f"kept = open({str(tmp_path / 'kept')!r}, 'w')\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "time.sleep(60)\n"
    )
    _, left, _ = _run(tmp_path, [_step("bench", code, seconds=3.0)])
    assert left == ["bench"]
    assert (tmp_path / "kept").read_text() == "rows"
    child = int((tmp_path / "run" / "bench.log").read_text().split()[0])
    deadline = time.monotonic() + 10
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("content", ["", "{", "[]", '{"commit": "a"}', '{"commit": "a", "steps": {"x": {}}}'])
def test_a_state_that_is_damaged_or_empty_ends_nothing(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text(content)
    _, _, states = _run(tmp_path, [_step("x", "pass")])
    assert states["x"]["state"] == "passed"


def test_the_first_steps_fit_into_nine_minutes():
    names = [step.name for step in gpu.STEPS]
    first = gpu.STEPS[: names.index("racecheck")]
    assert names[:4] == ["build", "changed", "old_new", "headline"]
    assert sum(step.seconds for step in first) <= 540


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["m2f_kernels/ops/masked_attention/triton.py"], "tests/triton/test_masked_attention.py"),
        (["csrc/ms_deform_attn/cuda_kernels.cu"], "tests/ops/test_ms_deform_attn_cuda.py"),
        (["m2f_kernels/ops/points/triton_loss.py"], "tests/triton/test_points.py"),
        (["m2f_kernels/_triton.py"], "tests/triton"),
        (["csrc/cpu/simd.h"], "tests/ops"),
        (["m2f_kernels/nn/point_mask_criterion.py"], "tests/nn"),
        (["m2f_model/train.py"], "tests/model"),
        (["tests/test_readme.py"], "tests/test_readme.py"),
    ],
)
def test_a_change_asks_for_its_tests(changed, expected):
    found = gpu.tests_of(changed)
    assert expected in found
    assert all((ROOT / path).exists() for path in found)


def test_kernels_come_first_and_no_test_twice():
    found = gpu.tests_of(["m2f_model/train.py", "m2f_kernels/ops/masked_attention/triton.py", "m2f_kernels/_dtypes.py"])
    assert found == ["tests/triton", "tests/ops", "tests/model"]
    assert gpu.tests_of(["README.md", "docs/faq.md"]) == []


# ---------------------------------------------------------------- tests that go on


TESTS = """
import pytest
@pytest.mark.parametrize("i", range(3))
def test_counted(i):
    open("count", "a").write(str(i))
    assert i != 2 or {fixed}
def test_skipped():
    pytest.skip("no reason")
"""


def _pytest(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.tools.resume", "-p", "no:cacheprovider"]
    command += ["--resume-from=outcomes", "--rootdir=.", "test_it.py"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    )


def test_tests_that_passed_are_not_run_again(tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text(TESTS.format(fixed=False))
    assert _pytest(tmp_path).returncode == 1
    test.write_text(TESTS.format(fixed=True))
    done = _pytest(tmp_path)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "count").read_text() == "0122"
    assert _pytest(tmp_path).returncode == 0  # nothing is left
    assert (tmp_path / "count").read_text() == "0122"


# ---------------------------------------------------------------- old against new


def test_old_against_new_states_both_and_their_ratio():
    """Of medians, behind it the quartiles of pairs, in which a drift of the machine cancels."""
    text = "| operator | bfloat16, µs | float32, µs |\n|---|---:|---:|\n| points | 20.0 | 40.0 |\n"
    assert old_new.parse(text) == {"points, bfloat16": 20.0, "points, float32": 40.0}
    times = {"points": [10.0, 20.0, 30.0, 40.0, 50.0]}, {"points": [5.0, 10.0, 20.0, 20.0, 25.0], "masks": [1.0]}
    assert old_new.lines("µs", *times) == [
        "| points | µs | 30.0 | 20.0 | 1.500 faster (2.000 to 2.000) |", "| masks | µs |  | 1.0 |  |",
    ]  # fmt: skip
    peaks = {"m": [8.0]}, {"m": [4.0]}
    assert old_new.lines("peak MiB", *peaks) == ["| m | peak MiB | 8.0 | 4.0 | 0.500 of it (0.500 to 0.500) |"]


def test_trees_are_measured_in_turn():
    called = []

    def measure(tree):
        called.append(tree)
        return {"x": float(len(called))}

    measures = [lambda: measure("old"), lambda: measure("new")]
    assert old_new.in_turn(measures, 2) == [{"x": [1.0, 3.0]}, {"x": [2.0, 4.0]}]
    assert called == ["old", "new"] * 2
    assert len(old_new.in_turn(measures, 9, seconds=0.0)[0]["x"]) == 1, "another round would not end in time"


def test_kernels_that_a_variable_chooses_have_rows_of_their_own(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "kernels.py").write_text(
        "import os\n"
        "time = 2.0 if os.environ.get('M2F_TF32X3') == '1' else 4.0\n"
        "print(f'| operator | float32, µs |\\n|---|---:|\\n| masks | {time} |')\n"
    )
    assert old_new.kernels(tmp_path) == {"masks, float32": 4.0}
    assert old_new.kernels(tmp_path, "M2F_TF32X3=1") == {"masks, M2F_TF32X3=1, float32": 2.0}


def test_predictions_stand_beside_measurements(tmp_path):
    predictions, measured = tmp_path / "predictions.json", tmp_path / "measured.json"
    predictions.write_text(
        json.dumps({"points": {"bfloat16": {"us": 10.0, "why": "L2"}, "float32": {"us": 1, "why": "x"}}})
    )
    measured.write_text(json.dumps({"points, bfloat16": 12.5}))
    lines = gpu.predicted_and_measured(predictions, measured).splitlines()
    assert lines[2] == "| points | bfloat16 | 10.0 | 12.5 | 1.25 | L2 |"
    assert lines[3] == "| points | float32 | 1.0 |  |  | x |"
    assert "measured.json not there" in gpu.predicted_and_measured(predictions, tmp_path / "none" / "measured.json")


def test_committed_predictions_can_be_read():
    for by_dtype in json.loads(gpu.PREDICTIONS.read_text()).values():
        assert by_dtype.keys() <= {"bfloat16", "float32"}
        assert all(prediction["us"] > 0 and prediction["why"] for prediction in by_dtype.values())


# ---------------------------------------------------------------- the commands


#: A bundle that lies in the tree is not part of a test.
_command = partial(python, "-m", M2F_GPU_BUNDLE="/nowhere")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(tmp_path):
    done = _command("benchmarks.tools.gpu", "--output", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("make gpu: ")
    assert "torch sees no CUDA device" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (gpu, ["--steps", "nonsense"], "--steps: expected some of build, changed, "),
        (gpu, ["--seconds", "0"], "--seconds: expected more than 0; got 0"),
        (gpu_bundle, ["--base", "none"], "--base: expected a commit of this checkout; got 'none'"),
        (old_new, ["--old", "tests"], "--old: expected a tree with benchmarks.kernels; got tests"),
        (old_new, ["--old", ".", "--rounds", "0"], "--rounds: expected at least 1; got 0"),
        (old_new, ["--old", ".", "--what", "model", "--only", "nothing"], "got 'nothing'"),
    ],
)
def test_wrong_arguments_are_named(monkeypatch, capsys, tool, arguments, message):
    monkeypatch.setattr(sys, "argv", ["make gpu", *arguments])
    with pytest.raises(SystemExit, match="2"):
        tool.main()
    assert message in capsys.readouterr().err


def test_a_rehearsal_runs_and_keeps_what_it_found(tmp_path):
    done = _command("benchmarks.tools.gpu", "--rehearse", "--steps", "build,racecheck", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left for the next call: nothing" in done.stdout
    assert {"state.json", "build.log"} <= {path.name for path in (tmp_path / "rehearsal" / "run").iterdir()}


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    done = _command("benchmarks.tools.gpu", "--rehearse", "--seconds", "1000", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_bundle_holds_the_base_without_results(tmp_path):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode != 0:
        pytest.skip("not a git checkout")
    gpu_bundle.unpack(head.stdout.strip(), tmp_path)
    assert list((tmp_path / "benchmarks").rglob("kernels.py"))
    assert (tmp_path / "csrc").exists()
    assert not (tmp_path / "benchmarks" / "results").exists()
    assert gpu_bundle.size_mib(tmp_path) < 10
