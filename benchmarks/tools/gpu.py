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
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arguments import arguments
from benchmarks.formats import markdown

ROOT = Path(__file__).parents[2]
#: What `make gpu-bundle` prepares: plan.json, wheels/, lib/, old/.
BUNDLE = Path(os.environ.get("M2F_GPU_BUNDLE", ROOT / "build" / "gpu"))
PREDICTIONS = Path(__file__).with_name("predictions.json")
#: A step with less time than this is left to the next call.
_LEAST_SECONDS = 15.0
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Context:
    """The device of a run, its folder of logs, and the tests that belong to the change."""

    device: str
    architecture: str
    logs: Path
    tests: list[str]
    workers: int

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


Command = Callable[[Context, float], list[str]]


@dataclass(frozen=True)
class Step:
    """One step: what it runs, given the seconds that it has, and how many it gets at most."""

    name: str
    seconds: float
    command: Command


@dataclass
class State:
    """The finished steps of a run of one commit. Written to disk after every step."""

    path: Path
    commit: str
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, commit: str) -> State:
        """The state of `commit`; a fresh one where the file is of another commit or cannot be read."""
        try:
            content = json.loads(path.read_text())
            return cls(path, commit, content["steps"] if content["commit"] == commit else {})
        except (OSError, ValueError, KeyError, TypeError):
            return cls(path, commit)

    def ended(self, step: str) -> bool:
        return self.steps.get(step, {}).get("state") in ("passed", "failed")

    def note(self, step: str, state: str, seconds: float, last: str) -> None:
        self.steps[step] = {"state": state, "seconds": round(seconds, 1), "last line": last}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"commit": self.commit, "steps": self.steps}, indent=1) + "\n")
        temporary.replace(self.path)


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


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _tests(context: Context, seconds: float, name: str, every: str = "", few: Sequence[str] = ()) -> list[str]:
    """A run of tests, those of the change or `every`, that notes each outcome, and leaves out those that have passed;
    `few` in a rehearsal."""
    chosen = few if context.rehearsal else [every] if every else context.tests
    command = _python("-m", "pytest", "-p", "benchmarks.tools.resume", "-q", "-rfE", "--tb=short", "-m", "not slow")
    command += [f"--resume-from={context.logs / name}.outcomes", *chosen]
    return command if context.workers < 2 else [*command, "-n", str(context.workers)]


def _tuner(context: Context, seconds: float) -> list[str]:
    options = ["--help"] if context.rehearsal else ["--output", str(context.logs / "tuned.json")]
    return _python("-m", "m2f_kernels.tune", *options)


def _build(context: Context, seconds: float) -> list[str]:
    """The bundle's library, or one built here for this GPU. Says at the end what serves each operator."""
    info = _python("-m", "m2f_kernels.info")
    if any((ROOT / "m2f_kernels" / "lib").glob("*.so")) or context.rehearsal:
        return info
    both = f"{sys.executable} setup.py -q build_ext --inplace && {' '.join(info)}"
    return ["env", "M2F_CUDA=on", f"M2F_CUDA_ARCHS={context.architecture}", "bash", "-c", both]


def _old_new(context: Context, seconds: float) -> list[str]:
    rounds = "1" if context.rehearsal else "2"
    old = BUNDLE / "old"
    command = _python("-m", "benchmarks.tools.old_new", "--old", str(old if old.exists() else ROOT))
    command += [] if context.rehearsal else ["--with", "M2F_TF32X3=1", "--with", "M2F_ATTENTION=lean"]
    return [*command, "--rounds", rounds, "--seconds", str(seconds), "--output", str(context.logs)]


def _benchmark(context: Context, seconds: float, *, arguments: Sequence[str]) -> list[str]:
    base = _python("-m", "benchmarks.run", "--device", context.device, *arguments)
    if context.rehearsal:
        return [*base, "--quick", "--op", "attention_mask", "--output", str(context.logs)]
    return [*base, "--output", str(context.logs.parents[1])]


def _sanitizer(context: Context, seconds: float, *, tool: str, tests: Sequence[str] = ()) -> list[str]:
    chosen = tests or [t for t in context.tests if t.startswith("tests/ops")] or ["tests/ops"]
    run = _python("-m", "pytest", *chosen, "-m", "cuda and not slow", "-k", "sanitize", "-q")
    if context.rehearsal:
        return [*run, "--collect-only", "-q"]
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *run]


#: In the order of their worth. The limits of the first seven fit into nine minutes together.
STEPS = (
    Step("build", 90, _build),
    Step("changed", 150, partial(_tests, name="changed", few=("tests/ops/test_point_sample.py", "-k", "gradcheck"))),
    Step("old_new", 110, _old_new),
    Step("headline", 130, partial(_benchmark, arguments=("--op", "end_to_end", "--skip", "compiled"))),
    Step("memcheck", 60, partial(_sanitizer, tool="memcheck")),
    # CUDA C++ only: the shared memory of Triton's kernels is the compiler's, a vector that a layout repeats is stored
    # by several threads, and PyTorch's own attention is reported on Hopper too.
    Step("racecheck", 40, partial(_sanitizer, tool="racecheck", tests=("tests/ops/test_ms_deform_attn_cuda.py",))),
    Step("tuner", 240, _tuner),
    Step("suite", 400, partial(_tests, name="suite", every="tests", few=("tests/test_readme.py",))),
    Step("bench", 300, partial(_benchmark, arguments=("--skip", "compiled"))),
    Step("bench_full", 540, partial(_benchmark, arguments=("--full",))),
)


# ---------------------------------------------------------------- running them


def _end(*_: object) -> None:
    """Ends this process so that the running step is ended and results are kept, if a second signal comes, too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def run_step(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> tuple[str, float, str]:
    """Run a command in a process group of its own; what it prints goes to the log as it comes.

    It is ended politely first: a benchmark then writes what it has.

    Returns:
        ("passed" | "failed" | "cut off", seconds, last line of the log).
    """
    begun = time.monotonic()
    limited = ["timeout", f"--kill-after={_GRACE_SECONDS}", str(seconds), *command]
    with log.open("w") as file:
        process = subprocess.Popen(limited, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        try:
            state = {0: "passed", 124: "cut off", 137: "cut off"}.get(process.wait(), "failed")
        finally:
            process.terminate()
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return state, time.monotonic() - begun, lines[-1].strip()[:200] if lines else ""


def run(
    steps: Sequence[Step],
    context: Context,
    state: State,
    seconds: float,
    environment: dict[str, str],
    again: bool = False,
    after: Callable[[], None] = lambda: None,
) -> tuple[bool, list[str]]:
    """Run steps within `seconds` together, without those that an earlier call has ended (`again`: with them).

    `after` is called after each step.

    Returns:
        Whether all that ran passed, and the names of those left for the next call.
    """
    end, right, left = time.monotonic() + seconds, True, []
    for step in steps:
        if state.ended(step.name) and not again:
            print(f"== {step.name}: {state.steps[step.name]['state']} in an earlier call", flush=True)
            continue
        allowed = min(step.seconds, end - time.monotonic() - _GRACE_SECONDS)
        if allowed < min(_LEAST_SECONDS, step.seconds):
            left.append(step.name)
            continue
        print(f"== {step.name}, at most {allowed:.0f} s", flush=True)
        log = context.logs / f"{step.name}.log"
        ended, taken, last = run_step(step.command(context, allowed), log, allowed, environment)
        if ended == "cut off":
            left.append(step.name)
        right = right and ended == "passed"
        state.note(step.name, ended, taken, last)
        print(f"   {ended} in {taken:.0f} s: {last}", flush=True)
        if ended != "passed":
            print("\n".join(f"   | {line}" for line in log.read_text(errors="replace").splitlines()[-12:]), flush=True)
        after()
    return right, left


def archive(folder: Path, target: Path) -> None:
    """Pack a device's results into one file: its folder, and the tables of its name beside it."""
    temporary = target.with_suffix(".part")
    with tarfile.open(temporary, "w:gz") as file:
        for path in folder.parent.glob(f"{folder.name}*"):
            file.add(path, path.name)
    temporary.replace(target)


def predicted_and_measured(predictions: Path, measured: Path) -> str:
    """A table of what was predicted for each kernel before the run, beside what the run measured."""
    if not predictions.exists() or not measured.exists():
        missing = [path.name for path in (predictions, measured) if not path.exists()]
        return f"No table of predictions: {' and '.join(missing)} not there."
    expected, found = json.loads(predictions.read_text()), json.loads(measured.read_text())
    lines = []
    for op, dtype, prediction in ((op, *one) for op, by_dtype in expected.items() for one in by_dtype.items()):
        value, us = found.get(f"{op}, {dtype}"), prediction["us"]
        shown = ("", "") if value is None else (f"{value:.1f}", f"{value / us:.2f}")
        lines.append([op, dtype, f"{us:.1f}", *shown, prediction["why"]])
    return markdown(["operator", "dtype", "predicted, µs", "measured, µs", "measured / predicted", "why"], lines)


# ---------------------------------------------------------------- the machine


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def plan() -> tuple[str, list[str]]:
    """The commit and the paths changed since the last run on a GPU: the bundle's where there is one."""
    path = BUNDLE / "plan.json"
    if path.exists():
        content = json.loads(path.read_text())
        return content["commit"], content["changed"]
    return _git("rev-parse", "HEAD") or os.environ.get("M2F_COMMIT", "unknown"), ["m2f_kernels/__init__.py"]


def prepare() -> dict[str, str]:
    """Install the bundle's wheels beside the tree and its libraries into it; the environment of the steps.

    Raises:
        RuntimeError: pip refused the wheels.
    """
    site, wheels = BUNDLE / "site", sorted((BUNDLE / "wheels").glob("*.whl"))
    if wheels and not site.exists():
        command = _python("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site))
        done = subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True)
        if done.returncode != 0:
            shutil.rmtree(site, ignore_errors=True)
            raise RuntimeError(f"{BUNDLE / 'wheels'}: {done.stderr.strip().splitlines()[-1]}")
    libraries = ROOT / "m2f_kernels" / "lib"
    if (BUNDLE / "lib").exists() and not any(libraries.glob("*.so")):
        shutil.copytree(BUNDLE / "lib", libraries, dirs_exist_ok=True)
    search = os.pathsep.join(filter(None, [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": search, "M2F_SITE": str(site), "PYTHONUNBUFFERED": "1"}


def _device(environment: dict[str, str]) -> tuple[str, str, int]:
    """Folder name and architecture of the GPU, and the processes for tests, asked in the steps' environment.

    Raises:
        RuntimeError: there is none, or the benchmarks cannot be imported.
    """
    code = (
        "import importlib.util, torch; assert torch.cuda.is_available(), 'torch sees no CUDA device'; "
        "from benchmarks import facts; print(facts.device_slug('cuda'), "
        "'%d%d' % torch.cuda.get_device_capability(), importlib.util.find_spec('xdist') is not None)"
    )
    done = subprocess.run(_python("-c", code), cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["python could not be started"]
        raise RuntimeError(f"{sys.executable}: {lines[-1]}")
    slug, architecture, parallel = done.stdout.split()[-3:]
    return slug, architecture, max(1, (os.cpu_count() or 2) - 3) if parallel == "True" else 1


def main() -> int:
    options = arguments(
        __doc__,
        {
            "--seconds": {"type": float, "default": 540, "help": "of the whole call; default: nine minutes"},
            "--steps": {"default": "", "help": f"some of them, by comma: {', '.join(s.name for s in STEPS)}"},
            "--output": {"type": Path, "default": ROOT / "benchmarks" / "results"},
            "--archive": {"type": Path, "help": "also pack the results into this .tar.gz, after every step"},
            "--rehearse": {"action": "store_true", "help": "every step at its smallest on the CPU"},
        },
    )
    begun = time.monotonic()
    chosen = [name for name in options.steps.split(",") if name]
    unknown = [name for name in chosen if name not in {step.name for step in STEPS}]
    if unknown:
        options.refuse(f"--steps: expected some of {', '.join(s.name for s in STEPS)}; got {', '.join(unknown)}")
    if not options.seconds > 0:
        options.refuse(f"--seconds: expected more than 0; got {options.seconds:g}")
    try:
        environment = prepare()
        slug, architecture, workers = ("rehearsal", "", 1) if options.rehearse else _device(environment)
    except RuntimeError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    commit, changed = plan()
    logs = (options.output / slug / "run").resolve()
    logs.mkdir(parents=True, exist_ok=True)
    context = Context("cpu" if options.rehearse else "cuda", architecture, logs, tests_of(changed), workers)
    state = State.read(logs / "state.json", commit)
    print(f"make gpu on {slug}, commit {commit}, {options.seconds:.0f} s; results in {logs.parent}", flush=True)
    signal.signal(signal.SIGTERM, _end)
    left: list[str] = []
    keep: Callable[[], None] = partial(archive, logs.parent, options.archive) if options.archive else lambda: None
    try:
        steps = [step for step in STEPS if not chosen or step.name in chosen]
        remaining = options.seconds - (time.monotonic() - begun)
        right, left = run(steps, context, state, remaining, environment, bool(chosen), keep)
    finally:
        table = predicted_and_measured(PREDICTIONS, logs / "measured.json")
        (logs / "predictions.md").write_text(table + "\n")
        print(f"left for the next call: {', '.join(left) or 'nothing'}\n\n{table}", flush=True)
        keep()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
