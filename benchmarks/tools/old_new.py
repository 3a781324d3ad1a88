"""Each operator's kernels, or whole models, before and after a change, in turn on one machine.

    python -m benchmarks.old_new --old DIRECTORY                        # a tree of the older commit, with its libraries
    python -m benchmarks.old_new --old DIRECTORY --what model           # R50: time of a call, peak memory
    python -m benchmarks.old_new --old DIRECTORY --what integrations    # accelerated models of transformers

What counts is the ratio of the medians. Behind it stand the quartiles of the ratios of two measurements that follow
each other. Processes of one tree differ, too: `--old` with this tree shows by how much.

Kernels: `python -m benchmarks.kernels` runs in each tree alternately, in a process of its own (two versions of the
operators cannot be in one). `--with NAME=VALUE` adds a run of this tree with an environment variable set, which chooses
other kernels than the default's; its rows end with that. Models: each tree has a process that holds its model, and the
two are called alternately, by this tree's benchmarks on the packages of each. Peaks are each of a fresh process, by the
method of `measure.memory`: of a call above the weights (in training above the gradients, too), and of matching, loss
and gradients alone, for given predictions.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments
from benchmarks.cases import Scale

ROOT = Path(__file__).parents[2]
#: Side of the image, whether it is a training step, batch.
CALLS = {
    "inference 1024²": (1024, False, 1),
    "inference 512²": (512, False, 1),
    "training step 512²": (512, True, 1),
    "training step 512² N=2": (512, True, 2),
}
#: Side of the image, batch, targets of each image.
LOSSES = {"loss 512² T=10": (512, 1, 10), "loss 1024² T=30": (1024, 1, 30), "loss 1024² N=2 T=20": (1024, 2, 20)}
#: What was measured by name: of each tree a list, one value for each round.
Samples = dict[str, list[float]]

# ---------------------------------------------------------------- in the process of one tree, whose packages it imports


def loss_part(size: int, batch: int, count: int, device: str, backbone: str = "r50") -> Callable[[], dict[str, Any]]:
    """A call of the criterion: the losses of random predictions, for `count` targets of each image, by name."""
    from m2f_kernels import FactoredMasks
    from m2f_model import bench
    from m2f_model.criterion import build_criterion

    config, generator = bench.Case(backbone).config, torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    channels, q = config.mask_feature_size, config.num_queries
    features = random(batch, channels, size // 4, size // 4).requires_grad_()
    heads = [
        (random(batch, q, config.num_labels + 1).requires_grad_(), random(batch, q, channels).requires_grad_())
        for _ in range(config.decoder_layers + 1)
    ]
    targets = [{"labels": torch.arange(count, device=device), "masks": random(count, size, size) > 1}] * batch
    criterion = build_criterion(config).to(device)

    def losses() -> dict[str, torch.Tensor]:
        for leaf in (features, *(x for pair in heads for x in pair)):
            leaf.grad = None
        predictions = [{"class_logits": logits, "masks": FactoredMasks(embed, features)} for logits, embed in heads]
        found: dict[str, torch.Tensor] = criterion(predictions, targets)
        return found

    return losses


def calls(name: str, device: str) -> Iterable[Callable[[], Any]]:
    """A small call, and the one that is measured."""
    from m2f_model import bench

    if name in CALLS:
        case = bench.Case("r50", *CALLS[name], device=device)
        model = bench.build(case, "m2f")
        return bench.call(dataclasses.replace(case, size=64), model), bench.call(case, model)
    if name in LOSSES:
        losses = [loss_part(*LOSSES[which], device) for which in (min(LOSSES, key=LOSSES.__getitem__), name)]
        return [lambda run=run: sum(run().values()).backward() or () for run in losses]
    from benchmarks import models

    subject = models.Subject(next(model for model in models.MODELS if model.name == name), Scale(device, False))
    return [partial(subject.call, models.AFTER, arguments) for arguments in (subject.small, subject.arguments)]


def worker(task: str, name: str) -> None:
    """One number for each line that is read: of "peak" MiB, of "wall" or "cpu" milliseconds of a call.

    The latter are those in which its threads work. On a GPU where there is one.
    """
    from m2f_model import bench

    # Older trees have it elsewhere.
    peak_mib = getattr(bench, "peak_mib", None) or importlib.import_module("benchmarks.memory").peak_mib
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.process_time if task == "cpu" else time.perf_counter
    small, usual = calls(name, device)
    small()  # loads code, starts threads, makes gradients
    for _ in range(2 if task != "peak" else 0):
        usual()

    def milliseconds() -> float:
        start = clock()
        usual()
        if device == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) * 1e3

    for _ in sys.stdin:
        print(peak_mib(usual, device)[0] if task == "peak" else milliseconds(), flush=True)


# ---------------------------------------------------------------- one measurement of a tree


def _environment(tree: Path, **more: str) -> dict[str, str]:
    return (
        os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("M2F_SITE", "")]))} | more
    )


def parse(table: str, setting: str = "") -> dict[str, float]:
    """The times in a table of `benchmarks.kernels`, by operator, the setting if there is one, and dtype."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    (_, *heads), _, *rows = rows
    more = f", {setting}" if setting else ""
    return {
        f"{op}{more}, {head.split(',')[0]}": float(x)
        for op, *cells in rows
        for head, x in zip(heads, cells, strict=True)
    }


def kernels(tree: Path, setting: str = "") -> dict[str, float]:
    """Microseconds of a tree's kernels; with a setting "NAME=VALUE" of the environment, which the names get.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels"]
    environment = _environment(tree, **dict([setting.split("=", 1)] if setting else []))
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{tree}: benchmarks.kernels ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return parse(done.stdout, setting)


#: Packages are the tree's; benchmarks are this one's, so that the same code calls both, and behind them the tree's own.
_CODE = """
import sys, transformers, m2f_kernels, m2f_model
transformers.logging.set_verbosity_error()
sys.path.insert(0, {root!r})
from benchmarks import __path__, old_new
__path__.append("benchmarks")
old_new.worker({task!r}, {name!r})
"""


@contextmanager
def process(tree: Path, task: str, name: str) -> Iterator[Callable[[], dict[str, float]]]:
    """A process that runs `worker` in a tree; what it gives asks for the next measurement, under its name."""
    code = _CODE.format(root=str(ROOT), task=task, name=name)
    fixed = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"} if task == "peak" else {}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tree, env=_environment(tree, **fixed), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as running:  # fmt: skip

        def ask() -> dict[str, float]:
            print(file=running.stdin, flush=True)
            if not (line := running.stdout.readline()):
                raise RuntimeError(f"{tree}: the process that measures it ended with {running.wait()}")
            return {name: float(line)}

        try:
            yield ask
        finally:
            running.kill()


def fresh(tree: Path, name: str) -> dict[str, float]:
    """The peak of a call in a process of its own, in MiB."""
    with process(tree, "peak", name) as ask:
        return ask()


# ---------------------------------------------------------------- old against new


def in_turn(
    measures: Sequence[Callable[[], dict[str, float]]],
    rounds: int,
    seconds: float = float("inf"),
    after: Callable[[list[Samples]], None] = lambda found: None,
) -> list[Samples]:
    """The results of `measures`, called in turn; `after` each round it is handed over.

    Args:
        seconds: no round begins that would not end within these, but for the first.
    """
    start, found = time.monotonic(), [Samples() for _ in measures]
    for done in range(rounds):
        begun = time.monotonic()
        if done and begun + (begun - start) / done > start + seconds:
            break
        for measure, taken in zip(measures, found, strict=True):
            for name, value in measure().items():
                taken.setdefault(name, []).append(value)
        after(found)
    return found


HEADER = "| | | before | after | ratio (quartiles of pairs) |\n|---|---|---:|---:|---:|"


def lines(unit: str, old: Samples, new: Samples) -> list[str]:
    """Lines of the table. What only one tree has is shown without a ratio."""
    found = []
    for name in [*new, *(name for name in old if name not in new)]:
        before, after = old.get(name, []), new.get(name, [])
        cells = [f"{statistics.median(x):.1f}" if x else "" for x in (before, after)]
        ratio = ""
        if before and after:
            sides, better = ((after, before), "of it") if unit == "peak MiB" else ((before, after), "faster")
            # Drifts of the machine are the same for two measurements that follow each other.
            pairs = sorted(x / y for x, y in zip(*sides, strict=True))
            low, high = pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]
            above, below = map(statistics.median, sides)
            ratio = f"{above / below:.3f} {better} ({low:.3f} to {high:.3f})"
        found.append(f"| {name} | {unit} | {' | '.join(cells)} | {ratio} |")
    return found


def compare_kernels(options: argparse.Namespace, trees: Sequence[Path]) -> None:
    """Print the table; write it and this tree's medians as they come: a run that is cut off keeps its first round."""

    def new() -> dict[str, float]:
        runs = [kernels(trees[1], setting) for setting in ("", *options.settings)]
        return {name: x for run in runs for name, x in run.items()}

    def write(found: list[Samples]) -> None:
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            shown = "\n".join(["# Kernels before and after\n", HEADER, *lines("µs", *found)])
            (options.output / "old_new.md").write_text(shown + "\n")
            medians = {name: statistics.median(x) for name, x in found[1].items()}
            (options.output / "measured.json").write_text(json.dumps(medians, indent=1) + "\n")

    rounds = 2 if options.rounds is None else options.rounds
    print("\n".join(lines("µs", *in_turn((partial(kernels, trees[0]), new), rounds, options.seconds, write))))


def compare_models(options: argparse.Namespace, trees: Sequence[Path], names: Sequence[str]) -> None:
    """Print the lines of each model or loss: times unless there are no rounds, and peaks."""
    rounds = 7 if options.rounds is None else options.rounds
    for name in names:
        if name not in LOSSES and rounds:
            old, new = (process(tree, options.clock, name) for tree in trees)
            with old as ask_old, new as ask_new:
                found = in_turn((ask_old, ask_new), rounds)
            print("\n".join(lines(f"{options.clock} ms", *found)), flush=True)
        found = in_turn([partial(fresh, tree, name) for tree in trees], options.runs)
        print("\n".join(lines("peak MiB", *found)), flush=True)


def main() -> None:
    options = arguments(
        __doc__,
        {
            "--old": {"type": Path, "required": True, "help": "tree of the older commit, with m2f_kernels/lib"},
            "--what": {"default": "kernels", "choices": ("kernels", "model", "integrations")},
            "--only": {"default": "", "help": "models and losses whose name contains this"},
            "--rounds": {"type": int, "help": "of each tree that are timed (default: 2, of models 7; 0: peaks)"},
            "--with": {"dest": "settings", "action": "append", "default": [], "metavar": "NAME=VALUE"},
            "--seconds": {"type": float, "default": float("inf"), "help": "no round begins after these"},
            "--output": {"type": Path, "help": "folder for old_new.md and measured.json"},
            "--runs": {"type": int, "default": 3, "help": "peaks of each tree that are measured (default: 3)"},
            "--clock": {"default": "wall", "choices": ("wall", "cpu"), "help": "cpu: the time of all threads"},
        },
    )
    if wrong := [x for x in options.settings if "=" not in x]:
        options.refuse(f"--with: expected NAME=VALUE; got {wrong[0]}")
    if not list((options.old / "benchmarks").rglob("kernels.py")):
        options.refuse(f"--old: expected a tree with benchmarks.kernels; got {options.old}")
    least = int(options.what == "kernels")
    if options.rounds is not None and options.rounds < least:
        options.refuse(f"--rounds: expected at least {least}; got {options.rounds}")
    known: Sequence[str] = (*CALLS, *LOSSES)
    if options.what == "integrations":
        from benchmarks import models

        known = [model.name for model in models.MODELS]
    names = [name for name in known if options.only in name]
    if not names:
        options.refuse(f"--only: expected a part of {'; '.join(known)}; got {options.only!r}")
    print(HEADER, flush=True)
    trees = options.old.resolve(), ROOT
    if options.what == "kernels":
        compare_kernels(options, trees)
    else:
        compare_models(options, trees, names)


if __name__ == "__main__":
    main()
