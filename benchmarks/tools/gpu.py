"""`make gpu`: on a machine with a CUDA GPU and no network, what is worth knowing most, in one call of nine minutes.

    make gpu                                  # in a checkout, or in a copy that `make gpu-bundle` has prepared
    make gpu ARGS="--seconds 200"             # a shorter call
    make gpu ARGS="--steps changed,headline"  # some of the steps, again if they have ended before
    make gpu ARGS=--rehearse                  # every step at its smallest on the CPU, to see that it runs

Steps come in the order of their worth, each with a limit of its own. What they print and find is written as it comes,
to `benchmarks/results/<GPU>/run`. Steps that have ended are kept in `state.json` there, and tests by name: the next
call of the same commit goes on where this one stopped. Last it prints what was predicted beside what was measured.

Exit status: 0 where every step that ran passed, 1 where one failed or was cut off, 2 where nothing could begin.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import arguments
from benchmarks.formats import markdown

ROOT = Path(__file__).parents[2]
#: What `make gpu-bundle` prepares: plan.json, wheels/, lib/, old/.
BUNDLE = Path(os.environ.get("M2F_GPU_BUNDLE", ROOT / "build" / "gpu"))
PREDICTIONS = Path(__file__).with_name("predictions.json")
#: A step with less time than this is left to the next call.
_LEAST_SECONDS = 15.0
_GRACE_SECONDS = 5.0


class Step(NamedTuple):
    """One step: how many seconds it gets at most, and what bash runs, in earnest and in a rehearsal.

    Variables: PYTHON, LOGS and RESULTS (folders), OLD (the older tree), ARCHITECTURE, TESTS (of the change), OPS (those
    of compiled kernels among them), PARALLEL (options of pytest), LIMIT (the seconds that the step has).
    """

    name: str
    seconds: float
    command: str
    rehearsal: str


def kept(path: Path, commit: str) -> dict[str, dict[str, Any]]:
    """The outcomes so far of the steps of `commit`; none where the file is of another commit or cannot be read."""
    try:
        content = json.loads(path.read_text())
        return content["steps"] if content["commit"] == commit else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# ---------------------------------------------------------------- which tests a change asks for


#: What a path looks like, and the tests that cover it; the first that fits counts.
COVERED = (
    (r"(?:m2f_kernels/ops|csrc)/(?!cpu/|torch/)(point|\w+)\w*/", r"tests/triton/test_\1*.py", r"tests/ops/test_\1*.py"),
    (r"m2f_kernels/(nn|integrations)/", r"tests/\1"),
    (r"m2f_kernels/|csrc/", "tests/triton", "tests/ops"),
    (r"m2f_model/", "tests/model"),
    (r"tests/(?:\w+/)*test_\w+\.py", r"\g<0>"),
)
_RANK = ("tests/triton", "tests/ops", "tests/nn", "tests/integrations", "tests/model", "")


def tests_of(paths: Sequence[str]) -> list[str]:
    """The test files and folders that cover changed paths, the kernels' first; all of tests/ops and tests/triton where
    what they share has changed."""
    patterns = set()
    for path in paths:
        fits = ((re.match(pattern, path), tests) for pattern, *tests in COVERED)
        match, tests = next((fit for fit in fits if fit[0]), (None, ()))
        patterns |= {match.expand(test) for test in tests if match}
    found = {str(match.relative_to(ROOT)) for pattern in patterns for match in ROOT.glob(pattern)}
    kept = [path for path in found if not any(str(folder) in found for folder in Path(path).parents)]
    return sorted(kept, key=lambda p: (next(i for i, r in enumerate(_RANK) if p.startswith(r)), p))


# ---------------------------------------------------------------- steps


_INFO = '"$PYTHON" -m m2f_kernels.info'
_TESTS = (
    '"$PYTHON" -m pytest -p benchmarks.tools.resume -q -rfE -m "not slow" --tb=short $PARALLEL --resume-from="$LOGS"/'
)
_OLD_NEW = '"$PYTHON" -m benchmarks.tools.old_new --old "$OLD" --seconds $LIMIT --output "$LOGS"'
_BENCHMARK = '"$PYTHON" -m benchmarks.run --device cuda --output "$RESULTS"'
_QUICK = '"$PYTHON" -m benchmarks.run --device cpu --quick --op attention_mask --output "$LOGS"'
_SANITIZER = "compute-sanitizer --error-exitcode 1 --tool"
_SANITIZED = '"$PYTHON" -m pytest -m "cuda and not slow" -k sanitize -q'
_CUDA_TESTS = "tests/ops/test_ms_deform_attn_cuda.py"
#: In the order of their worth. The limits of the first seven fit into nine minutes together.
STEPS = (
    # The bundle's library, or one built here for this GPU. Says at the end what serves each operator.
    Step(
        "build", 90,
        'compgen -G "m2f_kernels/lib/*.so" || M2F_CUDA=on M2F_CUDA_ARCHS=$ARCHITECTURE "$PYTHON" setup.py -q build_ext '
        f"--inplace && {_INFO}",
        _INFO,
    ),
    # Outcomes are noted test by test, and those that have passed left out.
    Step(
        "changed", 150, f"{_TESTS}changed.outcomes $TESTS",
        f"{_TESTS}changed.outcomes tests/ops/test_point_sample.py -k gradcheck",
    ),
    Step(
        "old_new", 110, f"{_OLD_NEW} --rounds 2 --with M2F_TF32X3=1 --with M2F_ATTENTION=lean",
        f"{_OLD_NEW} --rounds 1",
    ),
    Step("headline", 130, f"{_BENCHMARK} --op end_to_end --skip compiled", _QUICK),
    Step("memcheck", 60, f"{_SANITIZER} memcheck {_SANITIZED} $OPS", f"{_SANITIZED} $OPS --collect-only"),
    # CUDA C++ only: the shared memory of Triton's kernels is the compiler's, a vector that a layout repeats is stored
    # by several threads, and PyTorch's own attention is reported on Hopper too.
    Step(
        "racecheck", 40, f"{_SANITIZER} racecheck {_SANITIZED} {_CUDA_TESTS}",
        f"{_SANITIZED} {_CUDA_TESTS} --collect-only",
    ),
    Step(
        "tuner", 240, '"$PYTHON" -m m2f_kernels.tune --output "$LOGS"/tuned.json',
        '"$PYTHON" -m m2f_kernels.tune --help',
    ),
    Step("suite", 400, f"{_TESTS}suite.outcomes tests", f"{_TESTS}suite.outcomes tests/test_readme.py"),
    Step("bench", 300, f"{_BENCHMARK} --skip compiled", _QUICK),
    Step("bench_full", 540, f"{_BENCHMARK} --full", _QUICK),
)  # fmt: skip


# ---------------------------------------------------------------- running them


def _end(*_: object) -> None:
    """Ends this process so that the running step is ended and results are kept, if a second signal comes, too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def run_step(command: str, log: Path, seconds: float, environment: dict[str, str]) -> str:
    """The outcome of a command, "passed", "failed" or "cut off"; what it prints goes to the log as it comes.

    It runs in a process group of its own and is ended politely first: a benchmark then writes what it has.
    """
    limited = ["timeout", f"--kill-after={_GRACE_SECONDS}", str(seconds), "bash", "-c", command]
    with log.open("w") as file:
        process = subprocess.Popen(limited, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        try:
            return {0: "passed", 124: "cut off", 137: "cut off"}.get(process.wait(), "failed")
        finally:
            process.terminate()
            process.wait()


def run(
    steps: Sequence[Step],
    logs: Path,
    commit: str,
    seconds: float,
    environment: dict[str, str],
    rehearsal: bool = False,
    again: bool = False,
) -> tuple[bool, list[str]]:
    """Run steps within `seconds` together, without those that an earlier call has ended (`again`: with them).

    Returns:
        Whether all that ran passed, and the names of those left for the next call.
    """
    end, right, left = time.monotonic() + seconds, True, []
    states = kept(logs / "state.json", commit)
    for step in steps:
        before = states.get(step.name, {}).get("state")
        if before in ("passed", "failed") and not again:
            print(f"== {step.name}: {before} in an earlier call", flush=True)
            continue
        begun = time.monotonic()
        allowed = min(step.seconds, end - begun - _GRACE_SECONDS)
        if allowed < min(_LEAST_SECONDS, step.seconds):
            left.append(step.name)
            continue
        print(f"== {step.name}, at most {allowed:.0f} s", flush=True)
        log, command = logs / f"{step.name}.log", step.rehearsal if rehearsal else step.command
        ended = run_step(command, log, allowed, environment | {"LIMIT": str(allowed)})
        lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""]
        taken, last = time.monotonic() - begun, lines[-1].strip()[:200]
        states[step.name] = {"state": ended, "seconds": round(taken, 1), "last line": last}
        (logs / "state.json").write_text(json.dumps({"commit": commit, "steps": states}, indent=1) + "\n")
        print(f"   {ended} in {taken:.0f} s: {last}", flush=True)
        if ended == "cut off":
            left.append(step.name)
        if ended != "passed":
            right = False
            print("\n".join(f"   | {line}" for line in lines[-12:]), flush=True)
    return right, left


def predicted_and_measured(predictions: Path, measured: Path) -> str:
    """A table of what was predicted for each kernel before the run, beside what the run measured."""
    if not measured.exists():
        return f"No table of predictions: {measured.name} not there."
    expected, found = json.loads(predictions.read_text()), json.loads(measured.read_text())
    lines = []
    for op, by_dtype in expected.items():
        for dtype, prediction in by_dtype.items():
            value, us = found.get(f"{op}, {dtype}"), prediction["us"]
            shown = ("", "") if value is None else (f"{value:.1f}", f"{value / us:.2f}")
            lines.append([op, dtype, f"{us:.1f}", *shown, prediction["why"]])
    return markdown(["operator", "dtype", "predicted, µs", "measured, µs", "measured / predicted", "why"], lines)


# ---------------------------------------------------------------- the machine


def _ask(arguments: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """The output of Python.

    Raises:
        RuntimeError: it failed; with the last line of its message.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{sys.executable}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout


def plan() -> tuple[str, list[str]]:
    """The commit and the paths changed since the last run on a GPU: the bundle's where there is one."""
    path = BUNDLE / "plan.json"
    if path.exists():
        content = json.loads(path.read_text())
        return content["commit"], content["changed"]
    head = subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return head or os.environ.get("M2F_COMMIT", "unknown"), ["m2f_kernels/__init__.py"]


def prepare() -> dict[str, str]:
    """Install the bundle's wheels beside the tree and its libraries into it; the environment of the steps.

    Raises:
        RuntimeError: pip refused the wheels.
    """
    site, wheels = BUNDLE / "site", sorted((BUNDLE / "wheels").glob("*.whl"))
    if wheels and not site.exists():
        _ask(["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), *map(str, wheels)])
    libraries, old = ROOT / "m2f_kernels" / "lib", BUNDLE / "old"
    if (BUNDLE / "lib").exists() and not any(libraries.glob("*.so")):
        shutil.copytree(BUNDLE / "lib", libraries, dirs_exist_ok=True)
    search = os.pathsep.join(filter(None, [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {
        "PYTHONPATH": search, "M2F_SITE": str(site), "PYTHONUNBUFFERED": "1", "PYTHON": sys.executable,
        "OLD": str(old if old.exists() else ROOT),
    }  # fmt: skip


def device(environment: dict[str, str]) -> tuple[str, str, str]:
    """Folder name and architecture of the GPU, and options of pytest, asked in the steps' environment.

    Raises:
        RuntimeError: there is none, or the benchmarks cannot be imported.
    """
    code = (
        "import importlib.util, torch; assert torch.cuda.is_available(), 'torch sees no CUDA device'; "
        "from benchmarks import facts; print(facts.device_slug('cuda'), "
        "'%d%d' % torch.cuda.get_device_capability(), importlib.util.find_spec('xdist') is not None)"
    )
    slug, architecture, parallel = _ask(["-c", code], environment).split()[-3:]
    workers = (os.cpu_count() or 2) - 3 if parallel == "True" else 1
    return slug, architecture, f"-n {workers}" if workers > 1 else ""


def main() -> int:
    options = arguments(
        __doc__,
        {
            "--seconds": {"type": float, "default": 540, "help": "of the whole call; default: nine minutes"},
            "--steps": {"default": "", "help": f"some of them, by comma: {', '.join(s.name for s in STEPS)}"},
            "--output": {"type": Path, "default": ROOT / "benchmarks" / "results"},
            "--rehearse": {"action": "store_true", "help": "every step at its smallest on the CPU"},
        },
    )
    begun, chosen = time.monotonic(), [name for name in options.steps.split(",") if name]
    if unknown := set(chosen) - {step.name for step in STEPS}:
        options.refuse(f"--steps: expected some of {', '.join(s.name for s in STEPS)}; got {', '.join(unknown)}")
    if not options.seconds > 0:
        options.refuse(f"--seconds: expected more than 0; got {options.seconds:g}")
    try:
        environment = prepare()
        slug, architecture, parallel = ("rehearsal", "", "") if options.rehearse else device(environment)
    except RuntimeError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    commit, changed = plan()
    logs, tests = (options.output / slug / "run").resolve(), tests_of(changed)
    logs.mkdir(parents=True, exist_ok=True)
    ops = [test for test in tests if test.startswith("tests/ops")] or ["tests/ops"]
    environment |= {
        "LOGS": str(logs), "RESULTS": str(logs.parents[1]), "ARCHITECTURE": architecture, "PARALLEL": parallel,
        "TESTS": " ".join(tests), "OPS": " ".join(ops),
    }  # fmt: skip
    print(f"make gpu on {slug}, commit {commit}, {options.seconds:.0f} s; results in {logs.parent}", flush=True)
    signal.signal(signal.SIGTERM, _end)
    left: list[str] = []
    try:
        steps = [step for step in STEPS if not chosen or step.name in chosen]
        remaining = options.seconds - (time.monotonic() - begun)
        right, left = run(steps, logs, commit, remaining, environment, options.rehearse, bool(chosen))
    finally:
        table = predicted_and_measured(PREDICTIONS, logs / "measured.json")
        (logs / "predictions.md").write_text(table + "\n")
        print(f"left for the next call: {', '.join(left) or 'nothing'}\n\n{table}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
