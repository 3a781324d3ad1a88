"""Models of `transformers` before and after `m2f_kernels.accelerate`: time, memory, difference.

    python -m benchmarks.integrations               renews these rows of benchmarks/results/<device>.csv
    python -m benchmarks.integrations --quick       small images, one round; written only with --output

Batch 1, float32, eager, the same weights, before and after in turns in one process per model and allocator setting
(benchmarks/timing.py: what takes more than two seconds is timed twice). Memory: peak above the weights and what was
there before the call, of one call each, in another process (benchmarks/memory.py); outputs count. Share: of a whole
call before, what the forward of the deformable attention modules takes. Where nothing else is replaced, a ratio cannot
exceed 1 / (1 - share). Difference: of predictions, with the original's choice of queries where a detector chooses; of
the loss for a training step, whose points are drawn anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import facts, memory, report, tables, timing
from benchmarks.cases import Row, Scale
from benchmarks.formats import error, markdown, mebibytes, number
from benchmarks.integrations_models import MODELS, Model
from benchmarks.other_models import AFTER, ATTENTION, BEFORE, new_row

ROOT = Path(__file__).parents[1]
#: Seconds of timing per model and allocator setting, at least, and least number of rounds.
BUDGET_S, ROUNDS = 3.0, 3
#: Largest difference of outputs, relative to the largest output, of a result that is timed.
TOLERANCE = 1e-3
#: The same for the loss of a training step, whose points are drawn anew.
SAMPLED = 1e-2


# ---------------------------------------------------------------- in a process of its own


class _Subject:
    """A model that is called before and after, as a user calls it."""

    def __init__(self, case: Model, device: str, quick: bool) -> None:
        self.case, self.device, self.quick = case, device, quick
        self.model = case.make().to(device)
        self.arguments = self._move(case.arguments(quick))

    def _move(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, dict):
            return {name: self._move(v) for name, v in value.items()}
        return [self._move(v) for v in value]

    def call(self, arguments: dict[str, Any] | None = None) -> list[Tensor]:
        """The outputs that are compared: predictions, or the loss and two gradients of a training step."""
        torch.manual_seed(0)
        given = self.arguments if arguments is None else arguments
        if self.case.targets is None:
            with torch.no_grad():
                found = self.model(**given)
            names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
            return [found[name] for name in names if name in found]
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**given).loss
        loss.backward()
        return [loss.detach().reshape(1)]

    def warm_up(self) -> None:
        self.call(self._move(self.case.arguments(quick=True)))


def difference_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Largest absolute difference of two lists of outputs, and their largest finite value."""
    difference = largest = 0.0
    for x, y in zip(before, after, strict=True):
        first, second = x.float(), y.float()
        # Grounding DINO's logits of absent tokens are -inf; a NaN is infinitely wrong.
        apart = torch.where(first == second, 0, (first - second).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        difference = max(difference, float(apart.max()))
        largest = max(largest, float(first[first.isfinite()].abs().max()))
    return difference, largest


@contextmanager
def choices(recorded: list[Tensor], replay: bool = False) -> Iterator[None]:
    """Record which positions `torch.topk` chooses inside a `with` block, or choose those again.

    Detectors choose their queries by score. Two of almost the same score may change places, and everything that
    follows depends on their order: to compare outputs, the second call takes the first's choices, which have to be
    choices by its own scores as well.
    """
    topk = torch.topk

    def choose(input: Tensor, k: int, dim: int = -1, **options: Any) -> tuple[Tensor, Tensor]:
        values, indices = topk(input, k, dim=dim, **options)
        if not replay:
            recorded.append(indices)
            return values, indices
        again = recorded.pop(0)
        chosen = input.gather(dim, again)
        error, largest = difference_of([values], [chosen])
        if error > TOLERANCE * largest:
            raise RuntimeError(f"wrong result: other queries are chosen, by scores that differ by {error:.3g}")
        return chosen, again

    torch.topk = choose
    try:
        yield
    finally:
        torch.topk = topk


@contextmanager
def _attention_time(model: nn.Module, device: str) -> Iterator[list[float]]:
    """Seconds that each call of a deformable attention module takes inside a `with` block, forward."""
    import m2f_kernels

    with m2f_kernels.accelerate(model) as acceleration:
        names = [
            entry.name for entry in acceleration.report.replaced if entry.cls.endswith("MultiscaleDeformableAttention")
        ]
    taken: list[float] = []
    starts: list[float] = []

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_: starts.append(now())))
        handles.append(module.register_forward_hook(lambda *_: taken.append(now() - starts.pop())))
    yield taken
    for handle in handles:
        handle.remove()


def measure_time(case: Model, device: str, quick: bool) -> dict[str, Any]:
    import m2f_kernels

    subject = _Subject(case, device, quick)
    start = time.perf_counter()
    chosen: list[Tensor] = []
    with _attention_time(subject.model, device) as taken, choices(chosen):
        before = subject.call()
    share = sum(taken) / (time.perf_counter() - start)
    training = case.targets is not None
    with (
        m2f_kernels.accelerate(subject.model),
        nullcontext() if training else choices(chosen, replay=True),
    ):
        after = subject.call()
    difference, largest = difference_of(before, after)
    # A training step draws its points from the generator in another order.
    if difference > (SAMPLED if training else TOLERANCE) * largest:
        raise RuntimeError(f"wrong result: outputs of up to {largest:.3g} differ by {difference:.3g}")

    def accelerated() -> Any:
        with m2f_kernels.accelerate(subject.model):
            return subject.call()

    budget, rounds = (0.0, 1) if quick else (BUDGET_S, ROUNDS)
    first, second = timing.interleaved([subject.call, accelerated], device, budget, rounds)
    figures = {
        name: {"median_ms": timed.median_ms, "iqr_ms": timed.iqr_ms, "rounds": timed.rounds}
        for name, timed in ((BEFORE, first), (AFTER, second))
    }
    figures[BEFORE] |= {"subject_speedup": 1.0, "stages": f"{ATTENTION}={share * first.median_ms:.6g}"}
    figures[AFTER] |= {"subject_speedup": second.median_ms / first.median_ms, "error_output": difference / largest}
    return figures


def measure_memory(case: Model, device: str, quick: bool) -> dict[str, Any]:
    import m2f_kernels

    subject = _Subject(case, device, quick)
    found = {}
    for name in (BEFORE, AFTER):
        if name == AFTER:
            m2f_kernels.accelerate(subject.model)
        subject.warm_up()
        if case.targets is not None:
            subject.model.zero_grad(set_to_none=True)
        found[name] = {"memory_extra_mib": memory.peak_mib(subject.call, device)[0]}
    return found


# ---------------------------------------------------------------- the run


def _worker(task: str, case: Model, setting: dict[str, str], device: str, quick: bool) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.integrations", "--task", task, "--case", case.name]
    command += ["--device", device, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=facts.environment(setting))
    if done.returncode != 0:
        raise RuntimeError(f"{case.name}, {task}: " + "\n".join(done.stderr.strip().splitlines()[-8:]))
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run(device: str, quick: bool, wanted: str) -> tuple[list[Row], list[str]]:
    """Rows, and what failed."""
    rows, failures = [], []
    settings = dict(list(facts.settings(device).items())[: 1 if quick else None])
    for case in MODELS:
        if wanted not in case.name:
            continue
        made: dict[str, dict[str, Row]] = {}
        try:
            for setting, variables in settings.items():
                found = _worker("time", case, variables, device, quick)
                made[setting] = {name: replace(new_row(case.name, name, setting), **found[name]) for name in found}
                print(f"{case.name} ({setting}): {made[setting][AFTER].subject_speedup:.3f} of the time", flush=True)
            environment = memory.ENVIRONMENT if device == "cpu" else {}
            for name, peak in _worker("memory", case, environment, device, quick).items():
                vars(next(iter(made.values()))[name]).update(peak)
        except RuntimeError as problem:
            failures.append(str(problem))
        rows += [row for pair in made.values() for row in pair.values()]
    return rows, failures


def table(rows: Sequence[Row]) -> str:
    """Markdown: each model's times in every setting, memory and difference."""
    by_key, found = tables.measured(rows), tables.settings(rows)
    aims = {model.name: f"{model.aim}x" for model in MODELS}
    times = [f"{text}, ms ({found[0]} allocator)" for text in (BEFORE, AFTER)]
    header = ["model", *times, "ratio", *(f"ratio ({name})" for name in found[1:]), "target"]
    header += ["peak MiB above the weights", "deformable attention's share before", "largest relative difference"]
    lines = []
    for model in dict.fromkeys(row.case for row in rows):
        pairs = [(by_key[model, BEFORE, s], by_key[model, AFTER, s]) for s in found if (model, AFTER, s) in by_key]
        before, after = pairs[0]
        ratios = [f"{number(old.median_ms / new.median_ms)}x" for old, new in pairs]
        memories = "-"  # not measured: no resettable peak on this system, or the process failed
        if before.memory_extra_mib and after.memory_extra_mib:
            ratio = number(before.memory_extra_mib / after.memory_extra_mib)
            memories = f"{mebibytes(before.memory_extra_mib)} → {mebibytes(after.memory_extra_mib)}, {ratio}x"
        share = f"{before.stage_ms[ATTENTION] / before.median_ms:.0%}"
        cells = [
            number(before.median_ms),
            number(after.median_ms),
            f"**{ratios[0]}**",
            *ratios[1:],
            aims.get(model, "-"),
        ]
        lines.append([model, *cells, memories, share, error(after.error_output)])
    return markdown(header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small images, one round")
    parser.add_argument("--case", default="", help="only models whose name contains this; written only with --output")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results")
    parser.add_argument("--task", choices=["time", "memory"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        case = next(case for case in MODELS if case.name == arguments.case)
        measure = measure_time if arguments.task == "time" else measure_memory
        print(json.dumps(measure(case, arguments.device, arguments.quick)))
        return 0

    start = time.perf_counter()
    stated = facts.gather(arguments.device, ["ms_deform_attn_from_offsets"])
    rows, failures = run(arguments.device, arguments.quick, arguments.case)
    stated["wall time of the run"] = f"{time.perf_counter() - start:.0f} s"
    directory = arguments.output or (None if arguments.quick or arguments.case else report.RESULTS)
    if rows:
        print(table(rows))
    if rows and not failures and directory is not None:
        scale = Scale(arguments.device, arguments.quick)
        report.save(directory / f"{facts.device_slug(arguments.device)}.csv", report.Run(scale, stated, {}, rows))
        print(f"Written to {directory} in {stated['wall time of the run']}")
    for failure in failures:
        print(f"Failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
