"""The command `m2f`; `python -m m2f_model` is the same.

Slow imports, and those of packages that only `m2f-kernels[model]` installs, happen when a command runs, so that help
is fast and works without them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from m2f_model.config import BACKBONES
from m2f_model.hub import locate

if TYPE_CHECKING:
    from m2f_model.data import Dataset
    from m2f_model.finetune import Relabelling
    from m2f_model.model import Mask2Former
    from m2f_model.score import Report

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_AUTOCAST = "none, bf16 or fp16"
#: The dtypes of weights for inference, and PyTorch's names for them.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


#: Data sets with a layout of their own, and all kinds of data.
LAYOUTS = ("ade20k", "cityscapes")
DATA = ("shapes", "instance", "panoptic", "semantic", *LAYOUTS)


class UsageError(ValueError):
    """A mistake on the command line: a message of one line and exit code 2."""


# ---------------------------------------------------------------- what the commands do


def segment(given: argparse.Namespace) -> int:
    """Segment images: a coloured overlay of each, and results in COCO's formats."""
    files, root = collect(given.images)
    if given.dtype not in DTYPES:
        raise UsageError(f"--dtype: expected {', '.join(DTYPES)}; got {given.dtype!r}")
    _need("transformers", "PIL", "pycocotools", "rich")
    model = load(given.weights, given.config, DTYPES[given.dtype]).to(resolve_device(given.device))

    from m2f_model.results import Ids
    from m2f_model.segment import Segmenter, segment_files

    stuff = None if given.stuff is None else stuff_labels(given.stuff, model)
    size = None if given.size is None else tuple(given.size)
    segmenter = Segmenter(
        model,
        given.task,
        mode=given.mode,
        threshold=given.threshold,
        image_size=size,
        stuff_labels=stuff,
        cuda_graphs=given.cuda_graphs,
    )
    ids = None if given.ids_from is None else Ids.read(given.ids_from, model.config)
    summary = segment_files(
        segmenter, files, given.out, _progress("segmenting"), root=root, batch_size=given.batch_size, ids=ids
    )
    _say(f"{len(summary.done)} of {len(files)} images segmented into {given.out}")
    for path, reason in summary.failed:
        _say(f"failed: {path}: {_one_line(reason)}")
    return 1 if summary.failed else 0


def info(given: argparse.Namespace) -> int:
    """Print what is installed, which kernels run where, and, with --weights, a model's configuration."""
    import m2f_kernels.info

    if given.weights is None:
        print(m2f_kernels.info.report())
        return 0
    model = load(given.weights, given.config)
    print(m2f_kernels.info.report())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{given.weights}: {parameters / 1e6:.1f} M parameters")
    for name, value in vars(model.config).items():
        print(f"  {name:26} {value}")
    return 0


def bench(given: argparse.Namespace) -> int:
    """Measure time and peak memory of the whole model beside transformers', with the same weights."""
    _need("transformers", "PIL", "rich")
    import torch
    from rich.console import Console
    from rich.table import Table

    from m2f_model.bench import IMPLEMENTATIONS, Case, measure
    from m2f_model.files import write_atomically

    device = resolve_device(given.device)
    checkpointing = given.activation_checkpointing
    case = Case(given.backbone, given.size, given.training, given.batch, 10, device, given.autocast, checkpointing)
    row = measure(case, given.rounds)
    theirs, ours = (row["seconds"][name] for name in IMPLEMENTATIONS)
    kind = "training step" if given.training else "inference"
    table = Table(title=f"{given.backbone} {given.size}² {kind}, batch {given.batch}, {device}")
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
    if given.output is not None:
        write_atomically(given.output, lambda file: file.write(json.dumps(row, indent=1).encode()))
    return 0


def _ratio(theirs: dict[str, float], ours: dict[str, float], key: str) -> str:
    return f"{theirs[key] / ours[key]:.2f}x" if ours[key] > 0 else "-"


def train(given: argparse.Namespace) -> int:
    """Train a model, or resume with the same options. Several processes: torchrun ... -m m2f_model train ..."""
    _need("transformers", "PIL", "pycocotools", "tensorboard", "rich")
    import torch
    import transformers

    import m2f_kernels
    from m2f_kernels.dispatch import BACKENDS
    from m2f_model.backbone_weights import load_backbone, read_backbone
    from m2f_model.config import Mask2FormerConfig
    from m2f_model.data import summary
    from m2f_model.model import Mask2Former
    from m2f_model.train import Process, Recipe, Trainer

    changes = {
        name: getattr(given, name)
        for name in ("steps", "batch_size", "lr", "size", "workers", "log_every", "save_every", "evaluate_every")
        if getattr(given, name) is not None
    }
    free = ("autocast", "activation_checkpointing", "cuda_graphs", "seed", "parallel")
    changes |= {name: getattr(given, name) for name in free}
    if given.epochs is not None and (given.steps is not None or not 0 < given.epochs < math.inf):
        raise UsageError(
            f"--epochs: expected a positive number, and no --steps; got {given.epochs}, --steps {given.steps}"
        )
    if given.backend not in BACKENDS:
        raise UsageError(f"--backend: expected one of {', '.join(BACKENDS)}; got {given.backend!r}")
    backbone, weights, data = given.backbone, given.weights, given.data
    if given.backbone_weights is not None and (backbone or weights is not None or data == "shapes"):
        raise UsageError(
            "--backbone-weights: expected none with --backbone, --weights or --data shapes, which name a backbone"
        )
    if backbone is not None and (weights is not None or data == "shapes"):
        raise UsageError("--backbone: expected none with --weights or --data shapes, which have one")
    if backbone is not None and backbone not in BACKBONES:
        raise UsageError(f"--backbone: expected one of {', '.join(BACKBONES)}; got {backbone!r}")
    device = resolve_device(given.device)
    samples, validation = _datasets(given)
    if getattr(samples, "semantic", False):
        side = changes.pop("size", 512)
        published = {"crop": (side, 2 * side), "steps": 90000} if data == "cityscapes" else {"crop": (side, side)}
        recipe = Recipe.semantic(**{**published, **changes})
    else:
        recipe = Recipe.shapes(**changes) if data == "shapes" else Recipe(**changes)
    images_a_step = recipe.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    if given.epochs is not None:
        recipe = replace(recipe, steps=math.ceil(given.epochs * len(samples) / images_a_step))
    torch.manual_seed(given.seed)  # of the initial weights: the same in all processes
    report: object = None
    pretrained = None
    if given.backbone_weights is not None:
        pretrained = read_backbone(_existing(given.backbone_weights))
    if weights is not None:
        model = load(weights, given.config)
        report = fit_labels(model, samples)
    else:
        labels: dict[str, Any] = {"label_names": samples.label_names, "stuff_labels": samples.stuff_labels}
        if data == "shapes":
            config = Mask2FormerConfig.tiny(len(samples.label_names), **labels)
        else:
            # Only pre-trained batch norm is frozen.
            labels["frozen_batch_norm"] = pretrained is not None
            described = BACKBONES[backbone or "r50"] if pretrained is None else pretrained[0]
            config = Mask2FormerConfig(len(samples.label_names), described, **labels)
        model = Mask2Former(config)
        if pretrained is not None:
            report = load_backbone(model, pretrained[1], given.backbone_weights)
    transformers.logging.disable_progress_bar()  # of the models that are written on the way
    with Process.joined(device) as process, m2f_kernels.use_backend(given.backend):
        quiet = process.rank > 0
        log = (lambda _: None) if quiet else _say
        if report is not None:
            log(str(report))
        progress: Any = iter if quiet else _progress("checking")
        with tempfile.TemporaryDirectory() if given.dry_run else contextlib.nullcontext(given.out) as out:
            trainer = Trainer(
                model, samples, recipe, out, process=process, validation=validation, log=log, progress=progress
            )
            for line in summary(samples):
                log(f"data: {line}")
            epochs = recipe.steps * images_a_step / len(samples)
            log(f"steps: {recipe.steps} of {images_a_step} images, {epochs:.3g} times the data")
            trainer.check_validation(progress)
            if validation is not None:
                log(f"validation: {len(validation)} images, every {recipe.evaluate_every} steps")
            if given.dry_run:
                log(trainer.dry_run())
            else:
                trainer.run()
    return 0


def export(given: argparse.Namespace) -> int:
    """Write a model in Hugging Face's format: of an unfinished run's checkpoint.pth, or of any other weights."""
    path = Path(given.checkpoint)
    if path.is_dir() and not (path / "config.json").exists() and (path / "checkpoint.pth").is_file():
        path = path / "checkpoint.pth"
    weights = str(path) if path.exists() else given.checkpoint
    model = load(weights, given.config)
    model.save_pretrained(given.out)
    _say(f"{given.checkpoint}: a model of {model.config.num_labels} classes is in {given.out}")
    return 0


def evaluate(given: argparse.Namespace) -> int:
    """Measure a model, or results on disk: panoptic quality, COCO's average precision of masks, mean IoU."""
    if (given.weights is None) == (given.results is None):
        raise UsageError("expected either --weights or --results")
    if given.results is not None:
        model_only = ("config", "threshold", "size", "out")
        odd = [f"--{name}" for name in model_only if getattr(given, name) is not None]
        if odd:
            raise UsageError(f"{', '.join(odd)}: expected none with --results, which are there already")
    if given.dtype not in DTYPES:
        raise UsageError(f"--dtype: expected {', '.join(DTYPES)}; got {given.dtype!r}")
    for name in ("batch_size", "count"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1; got {getattr(given, name)}")
    if given.threshold is not None and not 0 <= given.threshold <= 1:
        raise UsageError(f"--threshold: expected 0 to 1; got {given.threshold}")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        raise UsageError(f"--json: no directory {given.json.absolute().parent}")
    wanted = None if given.metrics is None else [m.strip() for m in given.metrics.split(",") if m.strip()]
    # Without COCO's tools there are no run lengths, and no average precision.
    _need("transformers", "PIL", "pycocotools", "rich")
    from rich.console import Console

    from m2f_model import score
    from m2f_model.data import DatasetOfFiles
    from m2f_model.files import write_atomically
    from m2f_model.results import Writer

    data = _dataset(given, split="validation")
    metrics = score.metrics_of(data, wanted)
    indices = range(len(data) if given.count is None else min(given.count, len(data)))
    progress = _progress("evaluating")
    if given.results is not None:
        if not isinstance(data, DatasetOfFiles):
            raise UsageError("results: expected data on disk, to which results can belong; got shapes")
        metrics, files = score.find_results(given.results, metrics, all_of_them=wanted is not None)
        scorer = score.Scorer(data, metrics)
        score.score_results(data, files, scorer, indices, progress)
    else:
        size = None if given.size is None else tuple(given.size)
        model = load(given.weights, given.config, DTYPES[given.dtype]).to(resolve_device(given.device))
        scorer = score.Scorer(data, metrics)
        writers = {}
        if given.out is not None:
            like = score.config_of_data(model.config, data)
            ids = getattr(data, "category_ids", None)
            writers = {task: Writer(given.out, task, like, ids) for task in map(score.METRICS.__getitem__, metrics)}
        score.score_model(
            model,
            data,
            scorer,
            indices=progress(indices),
            writers=writers,
            threshold=0.8 if given.threshold is None else given.threshold,
            batch_size=given.batch_size,
            image_size=size,
        )
        for writer in writers.values():
            writer.finish()
    report = scorer.report()
    console = Console()
    for table in _tables(report, per_class=given.per_class):
        console.print(table)
    if given.json is not None:
        text = report.to_json()
        write_atomically(given.json, lambda file: file.write(text.encode()))
    return 0


#: The headings of a report's figures in tables.
_TITLES = {"pq": "panoptic quality", "ap": "average precision of masks", "miou": "intersection over union"}


def _tables(report: Report, per_class: bool) -> Iterable[Any]:
    from rich.table import Table

    for metric, parts in report.values.items():
        rows = {**parts, **(report.classes[metric] if per_class else {})}
        columns = list(next(iter(parts.values())))
        columns += [name for row in rows.values() for name in row if name not in columns][:1]
        table = Table(title=f"{_TITLES[metric]}, {report.images} images")
        table.add_column("")
        for name in columns:
            table.add_column(name, justify="right")
        for name, row in rows.items():
            values = [row.get(column, "") for column in columns]
            table.add_row(name, *("-" if x is None else x if isinstance(x, str) else f"{100 * x:.2f}" for x in values))
        yield table


# ---------------------------------------------------------------- what they share


def load(weights: str, preset: str | None, dtype: str = "float32") -> Mask2Former:
    """A model from any kind of weights, in `dtype`. Wrong arguments are reported before slow imports."""
    from m2f_model.config import Mask2FormerConfig

    path = Path(weights)
    original = path.suffix in (".pkl", ".pth")
    unnamed = "--weights: a detectron2 checkpoint does not say what it is: give --config PRESET"
    if original and preset is None and (path.suffix == ".pkl" or not path.is_file()):
        raise UsageError(unnamed if path.suffix == ".pkl" else f"--weights: no file {weights}")
    if preset is not None and not original:
        raise UsageError("--config is for detectron2 checkpoints; this one brings its own configuration")
    config = None if preset is None else Mask2FormerConfig.preset(preset)
    if original and not path.is_file():
        raise UsageError(f"--weights: no file {weights}")
    _need("transformers", "PIL")
    if not original:
        locate(weights)
    import torch
    import transformers

    from m2f_model.model import Mask2Former

    transformers.logging.disable_progress_bar()
    kept = getattr(torch, dtype)
    if config is None and original:
        try:
            return Mask2Former.from_checkpoint(path, dtype=kept)
        except ValueError as error:
            raise UsageError(f"{error}; {unnamed}") from error
    if config is None:
        return Mask2Former.from_pretrained(weights, dtype=kept)
    return Mask2Former.load_detectron2(path, config, dtype=kept)


def _existing(name: str) -> str:
    """`name`, unless it is that of a file that is not there."""
    if Path(name).suffix in (".pth", ".pt", ".pkl", ".safetensors", ".bin") and not Path(name).is_file():
        raise UsageError(f"--backbone-weights: no file {name}")
    return name


def fit_labels(model: Mask2Former, data: Dataset) -> Relabelling | None:
    """Gives `model` the classes of `data` if it has others, and returns which were kept, or None."""
    from m2f_model.labels import same_labels

    known = model.config.label_names
    if known is not None and same_labels(known, data.label_names):
        return None
    return model.relabel(data.label_names, data.stuff_labels)


def collect(paths: Sequence[Path]) -> tuple[list[Path], Path]:
    """The given files and all images in the given directories (recursively), and the closest directory of all."""
    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
            files |= dict.fromkeys(sorted(found))
        elif path.exists():
            files[path] = None
        else:
            raise UsageError(f"no file or directory {path}")
    if not files:
        raise UsageError(f"no image in {', '.join(map(str, paths))}")
    root = os.path.commonpath([os.path.abspath(path if path.is_dir() else path.parent) for path in paths])
    return list(files), Path(root)


def stuff_labels(text: str, model: Mask2Former) -> list[int]:
    """Labels from names or numbers separated by commas; an empty result from "none"."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    known = [name.strip().lower() for name in model.config.label_names or ()]
    labels = []
    for name in [] if names == ["none"] else names:
        if name.lower() in known:
            labels.append(known.index(name.lower()))
        elif name.isdecimal() and int(name) < model.config.num_labels:
            labels.append(int(name))
        else:
            expected = f"one of {', '.join(known[:5])}, ..." if known else f"a number below {model.config.num_labels}"
            raise UsageError(f"--stuff: expected {expected}; got {name!r}")
    return labels


def resolve_device(name: str) -> str:
    """The device that `name` means: "auto" is CUDA where there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: {torch.cuda.device_count()} CUDA devices here")
    return name


def _datasets(given: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    """Data for training and validation."""
    from m2f_model.data import Shapes
    from m2f_model.semantic import SemanticMaps

    kind, annotations, images = given.data, given.validation_annotations, given.validation_images
    samples = _dataset(given)
    if kind == "shapes":
        if annotations or images:
            raise UsageError("--annotations, --images: expected none with --data shapes, which makes its own")
        return samples, Shapes(length=200, seed=1)
    if kind in LAYOUTS:
        if annotations or images:
            raise UsageError(
                f"--validation-annotations, --validation-images: expected none for {kind}, whose layout has them"
            )
        return samples, getattr(SemanticMaps, kind)(given.images, "validation")
    if annotations is None:
        if images is not None:
            raise UsageError("--validation-annotations: expected a file where --validation-images is given; got none")
        return samples, None
    if kind == "semantic" and images is None:
        raise UsageError("--validation-images: expected a directory for the semantic data of --validation-annotations")
    return samples, _dataset(given, annotations, images or given.images)


def _dataset(
    given: argparse.Namespace, annotations: Path | None = None, images: Path | None = None, split: str = "train"
) -> Dataset:
    """The data set that --data and its options name, from `annotations` and `images` where these are given."""
    from m2f_model.coco import CocoInstances, CocoPanoptic
    from m2f_model.data import Shapes
    from m2f_model.semantic import SemanticMaps, read_names

    kind, annotations, images = given.data, annotations or given.annotations, images or given.images
    if kind not in DATA:
        raise UsageError(f"--data: expected {', '.join(DATA[:-1])} or {DATA[-1]}; got {kind!r}")
    if kind != "semantic":
        values = {name: getattr(given, name) for name in ("labels", "ignore_label", "reduce_labels")}
        odd = [f"--{n.replace('_', '-')}" for n, value in values.items() if value is not None and value is not False]
        if odd:
            raise UsageError(f"{', '.join(odd)}: only for --data semantic; got {kind}")
    if kind == "shapes":
        if annotations or images:
            raise UsageError("--annotations, --images: expected none with --data shapes, which makes its own")
        return Shapes() if split == "train" else Shapes(length=200, seed=1)
    if kind in LAYOUTS:
        if annotations is not None or images is None:
            raise UsageError(f"--images: expected the root directory of {kind}, and no --annotations")
        found: Dataset = getattr(SemanticMaps, kind)(images, split)
        return found
    if annotations is None or images is None:
        raise UsageError(f"--annotations, --images: expected both for {kind} data")
    if kind == "semantic":
        if given.labels is None:
            raise UsageError(
                "--labels: expected the names of the classes for semantic data: a text file, or with commas"
            )
        ignored = 255 if given.ignore_label is None else given.ignore_label
        return SemanticMaps.from_directories(
            images, annotations, read_names(given.labels), ignore_label=ignored, reduce_labels=given.reduce_labels
        )
    if not annotations.is_file():
        raise UsageError(f"--annotations: no file {annotations}")
    return (CocoInstances if kind == "instance" else CocoPanoptic)(annotations, images)


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"this command needs {', '.join(missing)}: pip install 'm2f-kernels[model]'")


def _progress(what: str) -> Any:
    """Wraps an iteration to show a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    return lambda items: track(items, what, console=Console(stderr=True), disable=not sys.stderr.isatty())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _one_line(error: Exception | str) -> str:
    """The message of an error without line breaks; the first and the last of many lines."""
    text = getattr(error, "summary", None) or str(error) or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines if len(lines) < 4 else [lines[0], "...", lines[-1]])


# ---------------------------------------------------------------- the command line


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage; options may be mixed with images."""

    _intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._intermixed or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._intermixed = True  # what follows calls this method
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help with the default of each option that has one: not of flags, nor where the text states it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or "default" in (action.help or ""):
            return action.help
        return f"{action.help} (default: %(default)s)"


def _command(commands: Any, run: Callable[[argparse.Namespace], int], example: str) -> _Parser:
    parser: _Parser = commands.add_parser(
        run.__name__,
        help=run.__doc__,
        description=run.__doc__,
        epilog=f"example:\n  {example}",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _device_option(parser: _Parser) -> None:
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")


def _size_option(parser: _Parser) -> None:
    meta = ("SHORT", "LONG")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=meta,
        help="resize images to this short side, and at most this long side (default: as the model was trained)",
    )


def _config_option(parser: _Parser) -> None:
    parser.add_argument(
        "--config", metavar="PRESET", help="architecture of a detectron2 file, for example r50-coco-panoptic"
    )


def _data_options(parser: _Parser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        help="instance or panoptic (COCO's formats); semantic (label maps); ade20k or cityscapes (semantic data in "
        "their published layouts; --images is the root); shapes (synthetic images, to try the command)",
    )
    parser.add_argument("--annotations", type=Path, help="COCO's JSON file, or the directory of label maps")
    parser.add_argument("--images", type=Path, help="directory of the images")
    parser.add_argument("--labels", help="semantic data: names of the classes, in a text file or with commas")
    parser.add_argument(
        "--ignore-label", type=int, help="semantic data: pixels of this value are ignored (default: 255)"
    )
    parser.add_argument(
        "--reduce-labels", action="store_true", help="semantic data: 0 is ignored, and 1 is the first class"
    )


_WEIGHTS = "a directory or hub name in Hugging Face's format, a run's checkpoint.pth, or a detectron2 file (.pkl, .pth)"


def parser() -> argparse.ArgumentParser:
    """The parser of `m2f`'s command line."""
    main = _Parser("m2f", description="Mask2Former on fused kernels.", allow_abbrev=False)
    commands = main.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    p = _command(
        commands, segment, "m2f segment photos --weights facebook/mask2former-swin-tiny-coco-panoptic -o segmented"
    )
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or directories of them")
    p.add_argument("--weights", required=True, help=_WEIGHTS)
    _config_option(p)
    p.add_argument("--task", default="panoptic", help="panoptic, instance or semantic")
    p.add_argument("-o", "--out", type=Path, default=Path("segmented"), help="directory of the results")
    p.add_argument("--mode", default="original", help="post-processing: original, or compatible (as transformers)")
    p.add_argument("--threshold", type=float, help="smallest score of a segment (default: panoptic 0.8, instance 0.5)")
    _size_option(p)
    p.add_argument("--stuff", help="classes that have one segment per image: names or numbers with commas, or none")
    p.add_argument("--dtype", default="fp32", help="dtype of the weights: fp32, bf16 or fp16")
    p.add_argument(
        "--batch-size", type=int, default=1, help="images at once, where their sizes after resizing are equal"
    )
    p.add_argument(
        "--ids-from", type=Path, metavar="JSON", help="take the ids of images and categories from this COCO file"
    )
    p.add_argument("--cuda-graphs", action="store_true", help="on a GPU, replay one CUDA graph per image size")
    _device_option(p)

    p = _command(
        commands,
        evaluate,
        "m2f evaluate --data instance --annotations val.json --images photos --weights run --json figures.json",
    )
    _data_options(p)
    p.add_argument("--weights", help=f"the model to measure: {_WEIGHTS}")
    _config_option(p)
    p.add_argument("--results", type=Path, help="measure these results instead of a model: a directory, or a JSON file")
    p.add_argument("--metrics", help="some of pq, ap, miou, with commas (default: all that the data allow)")
    p.add_argument("-o", "--out", type=Path, help="also write the results into this directory, with the data's ids")
    p.add_argument("--json", type=Path, help="also write the metrics of the data and of each class to this file")
    p.add_argument("--per-class", action="store_true", help="print the metrics of each class")
    p.add_argument("--count", type=int, help="use only this many images, from the first on")
    p.add_argument("--threshold", type=float, help="smallest score of a panoptic segment (default: 0.8)")
    _size_option(p)
    p.add_argument(
        "--batch-size", type=int, default=1, help="images at once, where their sizes after resizing are equal"
    )
    p.add_argument("--dtype", default="fp32", help="dtype of the weights: fp32, bf16 or fp16")
    _device_option(p)

    p = _command(commands, export, "m2f export run/checkpoint.pth -o model")
    p.add_argument("checkpoint", metavar="CHECKPOINT", help=f"a run's directory, or weights: {_WEIGHTS}")
    _config_option(p)
    p.add_argument("-o", "--out", type=Path, required=True, help="directory of the model")

    p = _command(commands, info, "m2f info --weights run")
    p.add_argument("--weights", help=f"also describe this model: {_WEIGHTS}")
    _config_option(p)

    p = _command(commands, bench, "m2f bench --backbone swin-tiny --size 1024")
    p.add_argument("--backbone", default="r50", help=f"one of {', '.join(BACKBONES)}")
    p.add_argument("--size", type=int, default=512, help="side of the square input")
    p.add_argument("--training", action="store_true", help="measure a training step instead of inference")
    p.add_argument("--batch", type=int, default=1, help="images at once")
    p.add_argument("--autocast", default="none", help=_AUTOCAST)
    p.add_argument(
        "--activation-checkpointing", action="store_true", help="in m2f's training step: less memory, more time"
    )
    p.add_argument("--rounds", type=int, default=5, help="timed runs of each model")
    p.add_argument("--output", type=Path, help="also write the results to this JSON file")
    _device_option(p)

    p = _command(
        commands,
        train,
        "m2f train --data instance --annotations mine.json --images photos --weights START --epochs 12 -o run\n"
        "  torchrun --nproc-per-node 8 -m m2f_model train ...    (several processes)",
    )
    p.add_argument(
        "-o", "--out", type=Path, required=True, help="directory for checkpoints, TensorBoard's log and the model"
    )
    _data_options(p)
    p.add_argument("--validation-annotations", type=Path, help="--annotations of the validation data")
    p.add_argument("--validation-images", type=Path, help="--images of the validation data (default: --images)")
    p.add_argument("--backbone", help=f"train a new model from random weights: {', '.join(BACKBONES)} (default: r50)")
    p.add_argument(
        "--backbone-weights",
        help="start from this ImageNet classifier, a ResNet or Swin: a directory or hub name in Hugging Face's format, "
        "or a file of torchvision, timm or detectron2 (.pth, .pkl, .safetensors)",
    )
    p.add_argument("--weights", help=f"fine-tune this model, whatever its classes: {_WEIGHTS}")
    _config_option(p)
    p.add_argument(
        "--steps",
        type=int,
        help="optimiser steps (default: the published recipe's, as of all options without a default)",
    )
    p.add_argument("--batch-size", type=int, help="images per step and process")
    p.add_argument("--lr", type=float, help="learning rate")
    p.add_argument("--size", type=int, help="side of the training crops")
    p.add_argument("--workers", type=int, help="processes that load data")
    p.add_argument("--epochs", type=float, help="passes over the data, instead of --steps")
    p.add_argument("--log-every", type=int, help="steps between log lines")
    p.add_argument("--save-every", type=int, help="steps between checkpoints")
    p.add_argument("--evaluate-every", type=int, help="steps between validations; the best model is kept in OUT/best")
    p.add_argument(
        "--dry-run", action="store_true", help="run two steps on one batch, print time and peak memory, write nothing"
    )
    p.add_argument("--autocast", default="none", help=_AUTOCAST)
    p.add_argument("--parallel", default="ddp", help="with several processes: ddp, or fsdp (shards the model)")
    p.add_argument("--activation-checkpointing", action="store_true", help="less memory, more time")
    p.add_argument("--cuda-graphs", action="store_true", help="on a GPU, replay the model's passes as CUDA graphs")
    p.add_argument("--seed", type=int, default=0, help="seed of weights, data order and augmentation")
    p.add_argument(
        "--backend", default="auto", help="kernels: auto, cuda, triton, fallback or reference (plain PyTorch)"
    )
    _device_option(p)
    return main


def main(arguments: Iterable[str] | None = None) -> NoReturn:
    """Entry point of the console script. Exit codes: 0 done, 1 some images failed, 2 a mistake, 130 Ctrl-C."""
    whole = parser()
    given = whole.parse_args(None if arguments is None else list(arguments))
    if not hasattr(given, "run"):
        whole.print_help()
        sys.exit(2)
    warnings.showwarning = lambda message, *_args, **_kwargs: _say(f"warning: {_one_line(str(message))}")
    # transformers warns about every backbone but Swin; the published ResNets are right here.
    logging.getLogger("transformers.models.mask2former.configuration_mask2former").setLevel(logging.ERROR)
    try:
        code = given.run(given)
    except (ValueError, TypeError, OSError, ArithmeticError, MemoryError, ImportError, RuntimeError) as error:
        if os.environ.get("M2F_TRACEBACK") or not _is_expected(error):
            raise
        _say(f"error: {_one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt:  # the message has been printed
        sys.exit(130)
    sys.exit(code)


def _is_expected(error: Exception) -> bool:
    """True for errors with a message for the user; all others are bugs, and keep their traceback."""
    kinds = (ValueError, OSError, FloatingPointError, MemoryError, ImportError)
    named = (type(error).__module__ == "m2f_model.bench", type(error).__name__ == "OutOfMemoryError")
    return isinstance(error, kinds) or any(named)
