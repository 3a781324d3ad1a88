"""Whole models before and after a change, in turn on one machine: time of a call and peak memory.

    python -m benchmarks.tools.old_new_model --old DIRECTORY      # a tree of the older commit, with its libraries
    python -m benchmarks.tools.old_new_model --old DIRECTORY --integrations       # accelerated models of transformers

Each tree has a process that holds its model, and the two are called alternately; what counts is the ratio of the
medians. Behind it stand the quartiles of the ratios of two calls that follow each other. Processes of one tree differ,
too: `--old` with this tree shows by how much. Peaks are each of a fresh process, by the method of
`benchmarks/memory.py`: of a call above the weights (in training above the gradients, too), and of matching, loss and
gradients alone, for given predictions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

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

#: Accelerated models of transformers; each tree has the same definitions of them in `benchmarks`.
INTEGRATIONS = (
    "Mask2Former Swin-T, 1024²",
    "Mask2Former Swin-T, training step, 512², 10 targets",
    "OneFormer Swin-T, 512²",
    "Deformable DETR ResNet-50, 800²",
    "Grounding DINO Swin-T, 800²",
    "RT-DETR ResNet-50, 640²",
)

# ---------------------------------------------------------------- in the process of one tree; imports are that tree's


def _integration(name: str, device: str) -> Any:
    import importlib

    import torch
    from torch.utils._pytree import tree_map_only

    import m2f_kernels

    try:
        module = importlib.import_module("benchmarks.integrations_models")
    except ImportError:  # its name since
        module = importlib.import_module("benchmarks.models")
    (case,) = (model for model in module.MODELS if model.name == name)
    model = case.make().to(device)
    m2f_kernels.accelerate(model)
    training = case.targets is not None

    def on_device(small: bool) -> Any:
        return tree_map_only(torch.Tensor, lambda x: x.to(device), case.arguments(small))

    def call(arguments: Any) -> Any:
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training):
            outputs = model(**arguments)
            if training:
                outputs.loss.backward()
        return list(outputs.values())

    call(on_device(True))  # loads code, starts threads
    model.zero_grad(set_to_none=True)
    arguments = on_device(False)
    return lambda: call(arguments)


def _call(name: str, device: str) -> Any:
    if name in INTEGRATIONS:
        return _integration(name, device)

    from m2f_model import bench

    size, training, batch = CALLS[name]
    case = bench.Case("r50", size, training, batch, device=device)
    return bench.call(case, bench.build(case, "m2f"))


def _loss(name: str, device: str) -> Any:
    import torch

    from m2f_kernels import FactoredMasks
    from m2f_model import bench
    from m2f_model.criterion import build_criterion

    size, batch, count = LOSSES[name]
    config = bench.Case().config
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    channels, q = config.mask_feature_size, config.num_queries
    features = random(batch, channels, size // 4, size // 4).requires_grad_()
    heads = [
        (random(batch, q, config.num_labels + 1).requires_grad_(), random(batch, q, channels).requires_grad_())
        for _ in range(config.decoder_layers + 1)
    ]
    masks = random(count, size, size) > 1
    targets = [{"labels": torch.arange(count, device=device), "masks": masks}] * batch
    criterion = build_criterion(config).to(device)

    def run() -> tuple[()]:
        predictions = [{"class_logits": logits, "masks": FactoredMasks(embed, features)} for logits, embed in heads]
        for leaf in (features, *(x for pair in heads for x in pair)):
            leaf.grad = None
        sum(criterion(predictions, targets).values()).backward()
        return ()

    return run


def _peak(name: str, device: str) -> float:
    from benchmarks import memory

    if name in INTEGRATIONS:
        return memory.peak_mib(_integration(name, device), device)[0]

    from m2f_model import bench

    if name in LOSSES:
        small = next(iter(LOSSES))
        _loss(small, device)()  # loads code, starts threads
        run = _loss(name, device)
        return memory.peak_mib(run, device)[0]
    size, training, batch = CALLS[name]
    return bench.measure_peak(bench.Case("r50", size, training, batch, device=device), "m2f")


def worker(task: str, name: str, device: str) -> None:
    """One answer in JSON for each line that is read: of "peak" the figure, of "wall" or "cpu" milliseconds of a call.

    The latter are those in which its threads work.
    """
    import time

    import torch

    if task == "peak":
        print(json.dumps(_peak(name, device)), flush=True)
        return
    clock = time.perf_counter if task == "wall" else time.process_time
    run = _call(name, device)
    for _ in range(2):
        run()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        start = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps((clock() - start) * 1e3), flush=True)


# ---------------------------------------------------------------- the command


def _start(tree: Path, *arguments: str) -> subprocess.Popen[str]:
    # By its path, since the older tree need not have it; imports are found in that tree.
    path, quiet = str(Path(__file__)), "import transformers; transformers.logging.set_verbosity_error()"
    code = f"{quiet}; import runpy; runpy.run_path({path!r})['worker'](*{list(arguments)!r})"
    fixed = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"} if arguments[0] == "peak" else {}
    environment = os.environ | fixed | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.Popen(
        command, cwd=tree, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def _answer(process: subprocess.Popen[str], tree: Path) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{tree}: the process that measures it ended with {process.wait()}")
    return json.loads(line)


def peaks(trees: list[Path], name: str, device: str, runs: int) -> list[list[float]]:
    """Peaks of each tree in MiB, fresh processes in turn."""
    found: list[list[float]] = [[] for _ in trees]
    for _ in range(runs):
        for tree, taken in zip(trees, found, strict=True):
            with _start(tree, "peak", name, device) as process:
                taken.append(_answer(process, tree))
    return found


def times(trees: list[Path], name: str, device: str, rounds: int, clock: str) -> list[list[float]]:
    """Milliseconds of each call in each tree, calls in turn."""
    processes = [_start(tree, clock, name, device) for tree in trees]
    found: list[list[float]] = [[] for _ in trees]
    try:
        for tree, process in zip(trees, processes, strict=True):
            _answer(process, tree)
        for _ in range(rounds):
            for tree, process, taken in zip(trees, processes, found, strict=True):
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                taken.append(_answer(process, tree))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def row(name: str, unit: str, before: list[float], after: list[float], better: str) -> str:
    """A line of the table; `better` says which way round the ratio is told."""

    def ratio(x: float, y: float) -> float:
        return x / y if better == "faster" else y / x

    old, new = statistics.median(before), statistics.median(after)
    # Drifts of the machine are the same for two calls that follow each other.
    pairs = sorted(ratio(x, y) for x, y in zip(before, after, strict=True))
    low, high = pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]
    return f"| {name} | {unit} | {old:.1f} | {new:.1f} | {ratio(old, new):.3f} {better} ({low:.3f} to {high:.3f}) |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="tree of the older commit, with m2f_kernels/lib")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7, help="calls of each tree that are timed (default: 7)")
    parser.add_argument("--runs", type=int, default=3, help="peaks of each tree that are measured (default: 3)")
    parser.add_argument("--only", action="append", help="repeatable; a row's name")
    parser.add_argument("--integrations", action="store_true", help="accelerated models of transformers instead of R50")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: the time of all threads' work")
    options = parser.parse_args(arguments)
    for name in ("rounds", "runs"):
        if getattr(options, name) < 0:
            parser.error(f"--{name}: expected at least 0; got {getattr(options, name)}")
    names = INTEGRATIONS if options.integrations else (*CALLS, *LOSSES)
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only: expected one of {'; '.join(names)}; got {'; '.join(sorted(unknown))}")
    if not (options.old / "m2f_model" / "bench.py").exists():
        parser.error(f"--old: expected a tree with m2f_model/bench.py; got {options.old}")
    trees = [options.old.resolve(), ROOT]
    print("| model | | before | after | ratio (quartiles of pairs) |\n|---|---|---:|---:|---:|", flush=True)
    for name in names:
        if options.only and name not in options.only:
            continue
        if options.rounds and name not in LOSSES:
            taken = times(trees, name, options.device, options.rounds, options.clock)
            print(row(name, f"{options.clock} ms", *taken, "faster"), flush=True)
        if options.runs:
            print(row(name, "peak MiB", *peaks(trees, name, options.device, options.runs), "of it"), flush=True)


if __name__ == "__main__":
    main()
