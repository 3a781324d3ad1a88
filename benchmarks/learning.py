"""Training of the tiny model on synthetic shapes, on the kernels and on the reference: loss curves, quality and times.

`python -m benchmarks.learning` trains both from the same weights on the same batches, in turns step by step, so that
whatever else the machine does falls on both. It writes, into results/<device>/: learning.csv (the loss of every step),
learning.md (panoptic quality, times) and learning.png; and the trained model, in Hugging Face's format, into `--model`.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import torch

import m2f_kernels
from benchmarks import facts
from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.data import Shapes
from m2f_model.evaluate import Quality, evaluate
from m2f_model.train import Recipe, Trainer

BACKENDS = ("auto", "reference")
NAMES = {"auto": "kernels", "reference": "reference"}
#: Steps over which a curve is averaged before curves are compared and drawn.
WINDOW = 50


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
        self.quality: dict[int, Quality] = {}

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
            self.quality[len(self.losses)] = evaluate(self.trainer.model, Shapes(length=count, seed=1))


def smooth(values: list[float]) -> list[float]:
    """The mean of every full window."""
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values) - WINDOW + 1, WINDOW)]


def train(steps: int, every: int, count: int, out: Path) -> dict[str, Run]:
    """Both runs, after `steps` steps; evaluated `every` so many on `count` images."""
    recipe = Recipe.shapes(steps=steps)
    runs = {backend: Run(backend, recipe, out) for backend in BACKENDS}
    for step in range(1, steps + 1):
        for run in runs.values():
            run.step()
        if step % every == 0 or step == steps:
            for run in runs.values():
                run.evaluate(count)
            line = ", ".join(
                f"{NAMES[b]} loss {statistics.fmean(r.losses[-WINDOW:]):.2f} PQ {r.quality[step].pq:.3f}"
                for b, r in runs.items()
            )
            print(f"step {step}: {line}", flush=True)
    return runs


def report(runs: dict[str, Run], steps: int, count: int) -> str:
    """The table, in Markdown."""
    ours, theirs = (runs[b] for b in BACKENDS)
    a, b = smooth(ours.losses), smooth(theirs.losses)
    worst = max((abs(x - y) / y for x, y in zip(a, b, strict=True)), default=float("nan"))
    lines = [
        "# Learning: the tiny model on synthetic shapes",
        "",
        f"`python -m benchmarks.learning`: {steps} steps of `m2f train --data shapes`, both backends in turns. "
        f"Float32, {facts.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        "",
        f"| backend | PQ on {count} new images | seconds of all steps | median ms of a step |",
        "|---|---|---|---|",
    ]
    for backend, run in runs.items():
        ratio = "" if run is ours else f", {statistics.median(run.seconds) / statistics.median(ours.seconds):.2f}x"
        lines.append(
            f"| {NAMES[backend]} | {run.quality[steps].pq:.3f} | {sum(run.seconds):.0f} | "
            f"{1e3 * statistics.median(run.seconds):.0f}{ratio} |"
        )
    lines += [
        "",
        f"Loss curves, means of {WINDOW} steps: they differ by at most {100 * worst:.1f} % (rounding parts the runs "
        "after a few steps: training is chaotic).",
        "",
        "![loss curves](learning.png)",
    ]
    return "\n".join(lines) + "\n"


def draw(runs: dict[str, Run], path: Path) -> None:
    """Loss over steps and over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for (backend, run), colour in zip(runs.items(), ("#d1495b", "#30638e"), strict=True):
        losses = smooth(run.losses)
        steps = [WINDOW * (i + 1) for i in range(len(losses))]
        panels[0].plot(steps, losses, color=colour, label=NAMES[backend])
        panels[1].plot([sum(run.seconds[:s]) for s in steps], losses, color=colour, label=NAMES[backend])
    for axes, label in zip(panels, ("step", "seconds"), strict=True):
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"training loss, mean of {WINDOW} steps")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--images", type=int, default=200, help="to measure panoptic quality on")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--model", type=Path, default=None, help="directory for the trained model")
    options = parser.parse_args()
    out = options.out or Path(__file__).parent / "results" / facts.device_slug("cpu")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = train(options.steps, options.evaluate_every, options.images, Path(scratch))
    if options.model is not None:
        runs["auto"].trainer.model.save_pretrained(options.model)
    with open(out / "learning.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{NAMES[b]}_{what}" for b in BACKENDS for what in ("loss", "seconds"))])
        for i in range(options.steps):
            values = [(f"{r.losses[i]:.5f}", f"{r.seconds[i]:.4f}") for r in runs.values()]
            writer.writerow([i + 1, *(x for pair in values for x in pair)])
    (out / "learning.md").write_text(report(runs, options.steps, options.images))
    draw(runs, out / "learning.png")
    print(report(runs, options.steps, options.images))


if __name__ == "__main__":
    main()
