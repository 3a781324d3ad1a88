"""The command `m2f`; `python -m m2f_model` is the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

import m2f_kernels.info
from m2f_model.config import Mask2FormerConfig
from m2f_model.model import Mask2Former
from m2f_model.segment import Segmenter, segment_files

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Mask2Former on fused kernels.")
console = Console(stderr=True)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
Weights = Annotated[str, typer.Option(help="directory in Hugging Face's format, its hub name, or a detectron2 file.")]
Preset = Annotated[
    str | None, typer.Option("--config", help="preset that a detectron2 file is of, as in r50-coco-panoptic.")
]
Device = Annotated[str, typer.Option(help="where to run: cpu, cuda, cuda:1, ...")]


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
        model = Mask2Former.from_pretrained(weights)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"\n{weights}: {parameters / 1e6:.1f} M parameters")
        for name, value in vars(model.config).items():
            print(f"  {name:26} {value}")


def main() -> None:
    """Entry point of the console script."""
    app()
