"""Segments image files: coloured overlays, and results in COCO's formats."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2f_kernels import CudaGraphs
from m2f_model import postprocess
from m2f_model.config import Mask2FormerConfig
from m2f_model.files import read_image, to_rgb
from m2f_model.model import Mask2Former
from m2f_model.postprocess import Frame
from m2f_model.results import TASKS, Ids, Result, Writer
from m2f_model.results import encode as encode
from m2f_model.results import overlay as overlay

STRIDE = 32


def prepare(image: Image.Image, config: Mask2FormerConfig) -> tuple[Tensor, Frame]:
    """The network's input [1, 3, H, W] from an RGB image, and where the image lies in it.

    Resized (bilinear, antialiased) as the configuration says, normalised, padded with zeros at the right and below to
    multiples of 32.
    """
    h, w = config.image_size
    if config.keep_aspect_ratio:
        h, w = resized_size(image.height, image.width, config.image_size)
    pixels = torch.from_numpy(np.array(image.resize((w, h), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    padded = torch.zeros(1, 3, -(-h // STRIDE) * STRIDE, -(-w // STRIDE) * STRIDE, device="cpu")
    padded[0, :, :h, :w] = normalise(pixels, config.pixel_mean, config.pixel_std)
    return padded, Frame((padded.shape[2], padded.shape[3]), (h, w), (image.height, image.width))


def resized_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image whose short side becomes `size[0]`, or its long side `size[1]` if that is less.

    At least 1. This follows the published evaluation's arithmetic (detectron2's ResizeShortestEdge) step by step: one
    product instead of two rounds differently for one size in some thousands.
    """
    short, long = size
    scale = short / min(height, width)
    h, w = (float(short), scale * width) if height < width else (scale * height, float(short))
    if max(h, w) > long:
        scale = long / max(h, w)
        h, w = h * scale, w * scale
    return max(1, int(h + 0.5)), max(1, int(w + 0.5))


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 from `pixels` [3, h, w] of values from 0 to 255; `mean` and `std` of each channel."""
    centre, scale = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (mean, std))
    return (pixels.float() - centre) / scale


class Segmenter:
    """A model with everything that turns an image into a segmentation.

    Args:
        model: in eval mode; its device and the dtype of its weights are used.
        task: "panoptic", "instance" or "semantic".
        mode: of post-processing, "original" or "compatible" (see :mod:`m2f_model.postprocess`).
        threshold: of scores, for panoptic (default 0.8) and instance (default 0.5) segmentation.
        image_size: (short, long) side of the resized image; by default what the model's configuration says.
        stuff_labels: labels that have one segment per image and no instances; by default what the configuration says.
            If that does not state them, nothing is stuff, with a warning.
        cuda_graphs: replay the model's kernels as a CUDA graph for each size, see :class:`m2f_kernels.CudaGraphs`.

    Raises:
        ValueError: bad input; the message names the argument.
    """

    def __init__(
        self,
        model: Mask2Former,
        task: str,
        *,
        mode: str = "original",
        threshold: float | None = None,
        image_size: tuple[int, int] | None = None,
        stuff_labels: Collection[int] | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(map(repr, TASKS))}; got {task!r}")
        if mode not in postprocess.MODES:
            raise ValueError(f"mode: expected one of {', '.join(map(repr, postprocess.MODES))}; got {mode!r}")
        if threshold is not None and (task == "semantic" or not 0 <= threshold <= 1):
            expected = "none for semantic segmentation" if task == "semantic" else "0 to 1"
            raise ValueError(f"threshold: expected {expected}; got {threshold}")
        self.model, self.task, self.mode, self.config = model, task, mode, model.config
        self._forward = CudaGraphs(model) if cuda_graphs else model
        if image_size is not None:
            self.config = replace(self.config, image_size=image_size, keep_aspect_ratio=True)
        if stuff_labels is not None:
            self.config = replace(self.config, stuff_labels=tuple(stuff_labels))
        if self.config.stuff_labels is None and task != "semantic":
            warnings.warn(
                "which labels are stuff is not known of this model: all are taken for things, of which each segment is "
                "one; say it by stuff_labels (m2f segment: --stuff)",
                stacklevel=2,
            )
        stuff = self.config.stuff_labels or ()
        self._finish: Callable[..., list[Any]] = partial(postprocess.semantic, resize_scores=model.config.semantic_only)
        if task == "instance":
            threshold = 0.5 if threshold is None else threshold
            self._finish = partial(postprocess.instance, threshold=threshold, stuff_labels=stuff)
        elif task == "panoptic":
            threshold = 0.8 if threshold is None else threshold
            self._finish = partial(postprocess.panoptic, threshold=threshold, stuff_labels=stuff)

    def __call__(self, image: Image.Image) -> Result:
        """Segment one image: a `Panoptic`, `Instances`, or labels [h, w], at the image's size."""
        return self.batch([self.prepare(image)])[0]

    def prepare(self, image: Image.Image) -> tuple[Tensor, Frame]:
        """The network's input [1, 3, H, W] from an image of any mode, and where the image lies in it."""
        return prepare(to_rgb(image, "image"), self.config)

    @torch.inference_mode()
    def batch(self, prepared: Sequence[tuple[Tensor, Frame]]) -> list[Result]:
        """Results of images that :meth:`prepare` has made, in one pass.

        Raises:
            ValueError: where inputs differ in size: the model has no mask for padding, which would change results.
        """
        sizes = {tuple(pixels.shape[1:]) for pixels, _ in prepared}
        if len(sizes) != 1:
            raise ValueError(f"prepared: expected inputs of one size; got {sorted(sizes)}")
        weight = next(self.model.parameters())
        pixels = torch.cat([x for x, _ in prepared])
        output = self._forward(pixels.to(weight.device, weight.dtype))
        return self._finish(output, [frame for _, frame in prepared], mode=self.mode)


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Summary:
    """The outcome for a list of files: those done, and those that failed (unreadable or too large), with the reason."""

    done: list[Path]
    failed: list[tuple[Path, str]]


def segment_files(
    segmenter: Segmenter,
    paths: Sequence[str | Path],
    out: str | Path,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = lambda paths: paths,
    *,
    root: str | Path | None = None,
    batch_size: int = 1,
    ids: Ids | None = None,
) -> Summary:
    """Segment image files into the directory `out`.

    Writes NAME.overlay.png for each image; and panoptic.json with NAME.panoptic.png (COCO's panoptic format),
    instance.json (COCO's results, run-length encoded) or semantic.json with NAME.semantic.png (category ids as pixels).
    A file that is no image, or one too large for the memory, is reported and the others are done.

    Args:
        segmenter: the model with its task.
        paths: image files.
        out: directory, made if it is not there.
        progress: wraps the iteration over paths, for a progress bar.
        root: directory that all files are in, by default the closest. NAME is a file's path below it without suffix
            (with it where two files differ by nothing else), so that `out` has the folders of the images.
        batch_size: images at once, where successive ones have the same size once they are resized.
        ids: of images and categories in some data; by default an image's id is NAME, a category's the model's label.

    Raises:
        ValueError: if a path is not below `root`, or is there twice, or its image has no id.
        OSError: if a result cannot be written.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1; got {batch_size}")
    files = [Path(p) for p in paths]
    names = _names(files, root)
    image_ids = names if ids is None else [ids.of_image(path) for path in files]
    writer = Writer(out, segmenter.task, segmenter.config, None if ids is None else ids.categories)
    failed: list[tuple[Path, str]] = []
    done: list[Path] = []
    batch: list[_Pending] = []

    def flush() -> None:
        for pending, reason in _segment_batch(segmenter, batch, writer):
            if reason is None:
                done.append(pending.path)
            else:
                failed.append((pending.path, reason))
        batch.clear()

    for path, name, image_id in zip(progress(files), names, image_ids, strict=True):
        try:
            image = read_image(path)
            prepared = segmenter.prepare(image)
        except (ValueError, OSError) as error:
            failed.append((path, str(error)))
            continue
        except MemoryError:
            failed.append((path, "not enough memory to read it"))
            continue
        if batch and (len(batch) == batch_size or prepared[0].shape != batch[0].prepared[0].shape):
            flush()
        batch.append(_Pending(path, name, image_id, image, prepared))
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    writer.finish()
    order = {path: i for i, path in enumerate(files)}
    return Summary(done, sorted(failed, key=lambda entry: order[entry[0]]))


class _Pending(NamedTuple):
    path: Path
    name: str
    image_id: int | str
    image: Image.Image
    prepared: tuple[Tensor, Frame]


def _segment_batch(
    segmenter: Segmenter, batch: list[_Pending], writer: Writer
) -> Iterator[tuple[_Pending, str | None]]:
    """Segments and writes some images; returns each with the reason if it failed, or None.

    Images that are too large together are tried one by one.
    """
    try:
        results: list[Any] = list(segmenter.batch([p.prepared for p in batch])) if len(batch) > 1 else [None]
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        results = [None] * len(batch)
    for pending, result in zip(batch, results, strict=True):
        image = pending.image
        try:
            (found,) = segmenter.batch([pending.prepared]) if result is None else (result,)
            writer.add(found, pending.name, pending.image_id, image)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            writer.discard(pending.name)  # half of a result
            yield pending, f"not enough memory for {image.width} x {image.height} pixels"
        else:
            yield pending, None


def _is_out_of_memory(error: Exception) -> bool:
    """True for an error of CPU or GPU memory: PyTorch has no exception type for that of a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "not enough memory" in str(error))


def _names(files: Sequence[Path], root: str | Path | None) -> list[str]:
    """The names of the results of each file: its path below `root`, without suffix where that is unique."""
    places = [Path(os.path.abspath(file)) for file in files]  # links stay what they are called
    if len(set(places)) < len(places):
        twice = Counter(places).most_common(1)[0][0]
        raise ValueError(f"paths: expected different files; {twice} is there twice")
    if not places:
        return []
    base = Path(os.path.abspath(os.path.commonpath([p.parent for p in places]) if root is None else root))
    try:
        below = [place.relative_to(base) for place in places]
    except ValueError as error:
        raise ValueError(f"paths: expected files below {base}; {error}") from error
    short = [path.with_suffix("").as_posix() for path in below]
    times = Counter(short)
    return [path.as_posix() if times[name] > 1 else name for path, name in zip(below, short, strict=True)]
