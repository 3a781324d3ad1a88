"""The whole model before and after a change, in turn on one machine: time of a call and peak memory.

    python -m benchmarks.tools.old_new_model --old DIRECTORY      # a tree of the older commit, with its libraries

Each tree has a process that holds its model, and the two are called alternately; what counts is the ratio of the
medians. Peaks are each of a fresh process, by the method of `benchmarks/memory.py`: of a call above the weights (in
training above the gradients, too), and of matching, loss and gradients alone, for given predictions.
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

# ---------------------------------------------------------------- in the process of one tree; imports are that tree's


def _call(name: str, device: str) -> Any:
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
    from m2f_model import bench

    if name in LOSSES:
        small = next(iter(LOSSES))
        _loss(small, device)()  # loads code, starts threads
        run = _loss(name, device)
        return memory.peak_mib(run, device)[0]
    size, training, batch = CALLS[name]
    return bench.measure_peak(bench.Case("r50", size, training, batch, device=device), "m2f")


def worker(task: str, name: str, device: str) -> None:
    """One answer in JSON for each line that is read: of "peak" the one figure, of "time" milliseconds per call."""
    import time

    import torch

    if task == "peak":
        print(json.dumps(_peak(name, device)), flush=True)
        return
    run = _call(name, device)
    for _ in range(2):
        run()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps((time.perf_counter() - start) * 1e3), flush=True)


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


def peaks(trees: list[Path], name: str, device: str, runs: int) -> list[float]:
    """Median peak of each tree in MiB, fresh processes in turn."""
    found: list[list[float]] = [[] for _ in trees]
    for _ in range(runs):
        for tree, taken in zip(trees, found, strict=True):
            with _start(tree, "peak", name, device) as process:
                taken.append(_answer(process, tree))
    return [statistics.median(taken) for taken in found]


def times(trees: list[Path], name: str, device: str, rounds: int) -> list[float]:
    """Median milliseconds of a call in each tree, calls in turn."""
    processes = [_start(tree, "time", name, device) for tree in trees]
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
    return [statistics.median(taken) for taken in found]


def row(name: str, unit: str, before: float, after: float, better: str) -> str:
    """A line of the table; `better` says which way round the ratio is told."""
    ratio = before / after if better == "faster" else after / before
    return f"| {name} | {unit} | {before:.1f} | {after:.1f} | {ratio:.3f} {better} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="tree of the older commit, with m2f_kernels/lib")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7, help="calls of each tree that are timed (default: 7)")
    parser.add_argument("--runs", type=int, default=3, help="peaks of each tree that are measured (default: 3)")
    parser.add_argument("--only", action="append", help=f"repeatable: {', '.join([*CALLS, *LOSSES])}")
    options = parser.parse_args(arguments)
    for name in ("rounds", "runs"):
        if getattr(options, name) < 0:
            parser.error(f"--{name}: expected at least 0; got {getattr(options, name)}")
    if unknown := set(options.only or ()) - CALLS.keys() - LOSSES.keys():
        parser.error(f"--only: expected one of {', '.join([*CALLS, *LOSSES])}; got {', '.join(sorted(unknown))}")
    if not (options.old / "m2f_model" / "bench.py").exists():
        parser.error(f"--old: expected a tree with m2f_model/bench.py; got {options.old}")
    trees = [options.old.resolve(), ROOT]
    print("| R50 | | before | after | ratio |\n|---|---|---:|---:|---:|", flush=True)
    for name in [*CALLS, *LOSSES]:
        if options.only and name not in options.only:
            continue
        if options.rounds and name in CALLS:
            print(row(name, "ms", *times(trees, name, options.device, options.rounds), "faster"), flush=True)
        if options.runs:
            print(row(name, "peak MiB", *peaks(trees, name, options.device, options.runs), "of it"), flush=True)


if __name__ == "__main__":
    main()
