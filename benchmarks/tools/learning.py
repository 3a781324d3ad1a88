"""Training of the tiny model on synthetic shapes, on the kernels and on the reference: loss curves, quality and times.

`python -m benchmarks.learning` trains both from the same weights on the same batches, in turns step by step, so that
whatever else the machine does falls on both. Times, losses and panoptic quality go into the device's results, and the
trained model, in Hugging Face's format, into `--model`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

import m2f_kernels
from benchmarks import arguments, facts, plot, report
from benchmarks.cases import Row, Scale
from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.data import Shapes
from m2f_model.evaluate import evaluate
from m2f_model.train import Recipe, Trainer

BACKENDS = {"kernels": "auto", "reference": "reference"}
CASE = "step of the tiny model"


class Run:
    """One backend's training, with random numbers of its own."""

    def __init__(self, backend: str, recipe: Recipe, out: Path) -> None:
        self.backend = backend
        torch.manual_seed(0)
        config = Mask2FormerConfig.tiny(5, stuff_labels=Shapes.stuff_labels, label_names=Shapes.label_names)
        self.trainer = Trainer(Mask2Former(config), Shapes(), recipe, out / backend, log=lambda _: None)
        self.batches = self.trainer._batches(recipe.steps)
        self.random = torch.get_rng_state()
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.pq = 0.0

    def step(self) -> None:
        batch = next(self.batches)
        torch.set_rng_state(self.random)
        with m2f_kernels.use_backend(self.backend):
            start = time.perf_counter()
            losses, _ = self.trainer.update(*batch)
            self.losses.append(sum(x.item() for x in losses.values()))
            self.seconds.append(time.perf_counter() - start)
        self.random = torch.get_rng_state()

    def evaluate(self, count: int) -> None:
        with m2f_kernels.use_backend(self.backend):
            self.pq = evaluate(self.trainer.model, Shapes(length=count, seed=1)).pq


def train(steps: int, every: int, count: int, out: Path) -> dict[str, Run]:
    """Both runs, after `steps` steps; evaluated `every` so many on `count` images."""
    recipe = Recipe.shapes(steps=steps)
    runs = {name: Run(backend, recipe, out) for name, backend in BACKENDS.items()}
    for step in range(1, steps + 1):
        for run in runs.values():
            run.step()
        if step % every == 0 or step == steps:
            for run in runs.values():
                run.evaluate(count)
            line = ", ".join(
                f"{name} loss {statistics.fmean(run.losses[-plot.WINDOW :]):.2f} PQ {run.pq:.3f}"
                for name, run in runs.items()
            )
            print(f"step {step}: {line}", flush=True)
    return runs


def measured(runs: dict[str, Run], count: int) -> report.Run:
    """The medians of a step, the curves, and the panoptic quality on `count` images."""
    smoothed = [plot.smooth(run.losses) for run in runs.values()]
    worst = max((abs(x - y) / y for x, y in zip(*smoothed, strict=True)), default=float("nan"))
    rows, curves = [], {}
    for name, run in runs.items():
        row = Row("learning", CASE, name, "default", "forward+backward", "", "float32", torch.get_num_threads())
        low, row.median_ms, high = (1e3 * x for x in statistics.quantiles(run.seconds, n=4))
        row.iqr_ms, row.rounds, row.ours = high - low, len(run.seconds), run.backend == "auto"
        rows.append(row)
        curves |= {f"{name}_loss": [round(x, 5) for x in run.losses]}
        curves |= {f"{name}_seconds": [round(x, 4) for x in run.seconds]}
    stated = facts.gather("cpu", ["ms_deform_attn_from_offsets"])
    stated |= {
        f"panoptic quality on {count} new images": ", ".join(f"{name} {run.pq:.3f}" for name, run in runs.items()),
        f"largest difference of the losses, means of {plot.WINDOW} steps": f"{worst:.1%}",
    }
    return report.Run(Scale("cpu", False), stated, {}, rows, curves)


def main() -> None:
    options = arguments(
        __doc__,
        {
            "--steps": {"type": int, "default": 1000},
            "--evaluate-every": {"type": int, "default": 500},
            "--images": {"type": int, "default": 200, "help": "to measure panoptic quality on"},
            "--output": {"type": Path, "default": report.RESULTS, "help": "default: benchmarks/results"},
            "--model": {"type": Path, "default": None, "help": "directory for the trained model"},
        },
    )
    with tempfile.TemporaryDirectory() as scratch:
        runs = train(options.steps, options.evaluate_every, options.images, Path(scratch))
    if options.model is not None:
        runs["kernels"].trainer.model.save_pretrained(options.model)
    report.save(options.output / f"{facts.device_slug('cpu')}.csv", measured(runs, options.images))


if __name__ == "__main__":
    main()
