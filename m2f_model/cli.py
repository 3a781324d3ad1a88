"""The command `m2f`; `python -m m2f_model` is the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import m2f_kernels.info
from m2f_kernels.backend import BACKENDS
from m2f_model.bench import IMPLEMENTATIONS, Case, measure
from m2f_model.config import BACKBONES, Mask2FormerConfig
from m2f_model.data import CocoInstances, CocoPanoptic, Dataset, Shapes
from m2f_model.files import write_atomically
from m2f_model.model import Mask2Former
from m2f_model.segment import Segmenter, segment_files
from m2f_model.train import Process, Recipe, Trainer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Mask2Former on fused kernels.")
console = Console(stderr=True)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
Weights = Annotated[str, typer.Option(help="directory in Hugging Face's format, its hub name, or a detectron2 file.")]
Preset = Annotated[
    str | None, typer.Option("--config", help="preset that a detectron2 file is of, as in r50-coco-panoptic.")
]


def _device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"expected cpu, cuda or cuda:N; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"{name}: {torch.cuda.device_count()} CUDA devices here")
    return name


Device = Annotated[str, typer.Option(callback=_device, help="where to run: cpu, cuda, cuda:1, ...")]


def load(weights: str, preset: str | None) -> Mask2Former:
    """A model from any kind of weights."""
    if Path(weights).suffix in (".pkl", ".pth"):
        if preset is None:
            raise typer.BadParameter("a detectron2 checkpoint does not say what it is: give --config PRESET")
        return Mask2Former.load_detectron2(weights, Mask2FormerConfig.preset(preset))
    if preset is not None:
        raise typer.BadParameter("--config is for detectron2 checkpoints; this one brings its own configuration")
    return Mask2Former.from_pretrained(weights)


def collect(paths: Iterable[Path]) -> list[Path]:
    """Files as given, and all images of directories."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
        else:
            files.append(path)
    if not files:
        raise typer.BadParameter(f"no image in {', '.join(map(str, paths))}")
    return files


@app.command()
def segment(
    images: Annotated[list[Path], typer.Argument(help="image files, or directories of them.")],
    weights: Weights,
    task: Annotated[str, typer.Option(help="panoptic, instance or semantic.")] = "panoptic",
    out: Annotated[Path, typer.Option("--out", "-o", help="directory of the results.")] = Path("segmented"),
    config: Preset = None,
    mode: Annotated[str, typer.Option(help="post-processing: original, or compatible with transformers.")] = "original",
    threshold: Annotated[float | None, typer.Option(help="smallest score of a segment.")] = None,
    device: Device = "cpu",
) -> None:
    """Segment images: a coloured overlay of each, and results in COCO's formats."""
    files = collect(images)
    try:
        segmenter = Segmenter(load(weights, config).to(device), task, mode=mode, threshold=threshold)
        summary = segment_files(segmenter, files, out, lambda paths: track(paths, "segmenting", console=console))
    except (ValueError, OSError) as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    console.print(f"{len(summary.done)} of {len(files)} images segmented into {out}")
    for path, reason in summary.failed:
        console.print(f"[red]failed:[/] {path}: {reason}", soft_wrap=True)
    if summary.failed:
        raise typer.Exit(1)


@app.command()
def info(weights: Annotated[str | None, typer.Option(help="describe this model, too.")] = None) -> None:
    """What is installed, which kernels run where, and what a model is."""
    print(m2f_kernels.info.report())
    if weights is not None:
        try:
            model = Mask2Former.from_pretrained(weights)
        except (ValueError, OSError) as error:
            console.print(f"[red]error:[/] {error}", soft_wrap=True)
            raise typer.Exit(2) from error
        parameters = sum(p.numel() for p in model.parameters())
        print(f"\n{weights}: {parameters / 1e6:.1f} M parameters")
        for name, value in vars(model.config).items():
            print(f"  {name:26} {value}")


@app.command()
def bench(
    backbone: Annotated[str, typer.Option(help=f"one of {', '.join(BACKBONES)}.")] = "r50",
    size: Annotated[int, typer.Option(help="side of the square input.")] = 512,
    training: Annotated[bool, typer.Option(help="a training step in place of inference.")] = False,
    batch: Annotated[int, typer.Option(help="images at once.")] = 1,
    autocast: Annotated[str, typer.Option(help="none, bf16 or fp16.")] = "none",
    activation_checkpointing: Annotated[bool, typer.Option(help="for this package's training step.")] = False,
    rounds: Annotated[int, typer.Option(help="timed runs of each.")] = 5,
    output: Annotated[Path | None, typer.Option(help="also write the figures as JSON.")] = None,
    device: Device = "cpu",
) -> None:
    """Time and peak memory of the whole model beside transformers', same weights, runs interleaved."""
    try:
        case = Case(backbone, size, training, batch, 10, device, autocast, activation_checkpointing)
        row = measure(case, rounds)
    except (ValueError, RuntimeError) as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    theirs, ours = (row["seconds"][name] for name in IMPLEMENTATIONS)
    table = Table(title=f"{backbone} {size}² {'training step' if training else 'inference'}, batch {batch}, {device}")
    for column in ("", *IMPLEMENTATIONS, "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for stage in ("total", *(s for s in theirs if s != "total")):
        table.add_row(
            f"{stage}, ms", f"{1e3 * theirs[stage]:.1f}", f"{1e3 * ours[stage]:.1f}", _ratio(theirs, ours, stage)
        )
    peaks = {name: {"peak": value} for name, value in row["peak_mib"].items()}
    a, b = (peaks[name] for name in IMPLEMENTATIONS)
    table.add_row("peak memory, MiB", f"{a['peak']:.0f}", f"{b['peak']:.0f}", _ratio(a, b, "peak"))
    Console().print(table)
    print(f"largest difference of the predictions {row['error']:.1e}; {torch.get_num_threads()} threads")
    if "mask_iou" in row:
        overlaps = ", ".join(f"{name} {row['mask_iou'][name]:.3f}" for name in IMPLEMENTATIONS)
        print(f"intersection over union with float32's masks, random weights: {overlaps}")
    if output is not None:
        write_atomically(output, lambda file: file.write(json.dumps(row, indent=1).encode()))


def _ratio(theirs: dict[str, float], ours: dict[str, float], key: str) -> str:
    return f"{theirs[key] / ours[key]:.2f}x" if ours[key] > 0 else "-"


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="directory of checkpoints, events and the trained model.")],
    data: Annotated[str, typer.Option(help="shapes (synthetic, tiny model), instance or panoptic (COCO formats).")],
    annotations: Annotated[Path | None, typer.Option(help="COCO's JSON file.")] = None,
    images: Annotated[Path | None, typer.Option(help="directory of its images.")] = None,
    validation_annotations: Annotated[Path | None, typer.Option(help="JSON file of validation data.")] = None,
    validation_images: Annotated[Path | None, typer.Option(help="directory of its images.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help=f"of a new model with random weights: {', '.join(BACKBONES)}.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="start from this model, in Hugging Face's format, of the same labels.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="steps of the optimiser.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images per step of each process.")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate.")] = None,
    size: Annotated[int | None, typer.Option(help="side of the inputs that large-scale jitter makes.")] = None,
    autocast: Annotated[str, typer.Option(help="none, bf16 or fp16.")] = "none",
    parallel: Annotated[str, typer.Option(help="several processes: ddp, or fsdp (a share of the model each).")] = "ddp",
    activation_checkpointing: Annotated[bool, typer.Option(help="less memory, more time.")] = False,
    seed: int = 0,
    workers: Annotated[int | None, typer.Option(help="processes that prepare data.")] = None,
    backend: Annotated[str, typer.Option(help="kernels: auto, or reference (plain PyTorch).")] = "auto",
    device: Device = "cpu",
) -> None:
    """Train; started again with the same options, go on. Several processes: torchrun ... -m m2f_model train ..."""
    given = {"steps": steps, "batch_size": batch_size, "lr": lr, "size": size, "workers": workers}
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    changes |= {"autocast": autocast, "activation_checkpointing": activation_checkpointing, "seed": seed}
    changes["parallel"] = parallel
    try:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
        if backbone is not None and (weights is not None or data == "shapes"):
            raise ValueError("backbone: expected none with --weights or --data shapes, which bring their own")
        if backbone is not None and backbone not in BACKBONES:
            raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}; got {backbone!r}")
        samples, validation = _datasets(data, annotations, images, validation_annotations, validation_images)
        recipe = Recipe.shapes(**changes) if data == "shapes" else Recipe(**changes)
        torch.manual_seed(seed)  # of the initial weights: the same in all processes
        if weights is not None:
            model = Mask2Former.from_pretrained(weights)
        else:
            labels: dict[str, Any] = {"label_names": samples.label_names, "stuff_labels": samples.stuff_labels}
            if data == "shapes":
                config = Mask2FormerConfig.tiny(len(samples.label_names), **labels)
            else:
                # Batch norm is frozen where it is pre-trained; nothing is, here.
                labels["frozen_batch_norm"] = False
                config = Mask2FormerConfig(len(samples.label_names), BACKBONES[backbone or "r50"], **labels)
            model = Mask2Former(config)
        with Process.joined(device) as process, m2f_kernels.use_backend(backend):
            quiet = process.rank > 0
            log = (lambda _: None) if quiet else console.print
            progress: Any = iter if quiet else lambda entries: track(entries, "checking", console=console)
            trainer = Trainer(
                model, samples, recipe, out, process=process, validation=validation, log=log, progress=progress
            )
            trainer.run()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:  # the checkpoint is written, and that is said
        raise typer.Exit(130) from error


def _datasets(
    kind: str,
    annotations: Path | None,
    images: Path | None,
    validation_annotations: Path | None,
    validation_images: Path | None,
) -> tuple[Dataset, Dataset | None]:
    if kind == "shapes":
        if any((annotations, images, validation_annotations, validation_images)):
            raise ValueError("annotations, images: expected none with shapes, which are made as they are needed")
        return Shapes(), Shapes(length=200, seed=1)
    if kind not in ("instance", "panoptic"):
        raise ValueError(f"data: expected shapes, instance or panoptic; got {kind!r}")
    if annotations is None or images is None:
        raise ValueError(f"annotations, images: expected both for {kind} data")
    build = CocoInstances if kind == "instance" else CocoPanoptic
    if validation_images is not None and validation_annotations is None:
        raise ValueError("validation_annotations: expected a file where validation_images is given; got none")
    validation = None
    if validation_annotations is not None:
        validation = build(validation_annotations, validation_images or images)
    return build(annotations, images), validation


def main() -> None:
    """Entry point of the console script."""
    app()
