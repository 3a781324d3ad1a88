"""Segment image files: coloured overlays, and results for machines to read."""

from __future__ import annotations

import colorsys
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2f_kernels import CudaGraphs
from m2f_model import postprocess
from m2f_model.config import Mask2FormerConfig
from m2f_model.files import read_image, to_rgb, write_atomically
from m2f_model.model import Mask2Former
from m2f_model.postprocess import Frame, Instances, Panoptic

TASKS = ("panoptic", "instance", "semantic")
STRIDE = 32

Result = Panoptic | Instances | Tensor


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

    The published evaluation's arithmetic (detectron2's ResizeShortestEdge), step by step: one product in place of two
    rounds another way for one size in some thousands. At least 1.
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
            Where that does not know, nothing is stuff, with a warning.
        cuda_graphs: replay the model's kernels as a CUDA graph for each size, see :class:`m2f_kernels.CudaGraphs`.

    Raises:
        ValueError: naming the argument.
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

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Result:
        """Segment one image: a `Panoptic`, `Instances`, or labels [h, w], at the image's size."""
        weight = next(self.model.parameters())
        pixels, frame = prepare(to_rgb(image, "image"), self.config)
        output = self._forward(pixels.to(weight.device, weight.dtype))
        return self._finish(output, [frame], mode=self.mode)[0]


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Summary:
    """What became of a list of files: those done, and those that could not be read or were too large, and why."""

    done: list[Path]
    failed: list[tuple[Path, str]]


def segment_files(
    segmenter: Segmenter,
    paths: Sequence[str | Path],
    out: str | Path,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = lambda paths: paths,
    *,
    root: str | Path | None = None,
) -> Summary:
    """Segment image files into the directory `out`.

    Writes NAME.overlay.png for each image; and panoptic.json with NAME.panoptic.png (COCO's panoptic format),
    instance.json (COCO's results, run-length encoded) or semantic.json with NAME.semantic.png (labels as pixels).
    Category ids are the model's labels. A file that is no image, or one too large for the memory, is reported and the
    others are done.

    Args:
        segmenter: what to do.
        paths: image files.
        out: directory, made if it is not there.
        progress: wraps the iteration over paths, for a progress bar.
        root: directory that all files are in, by default the closest. NAME is a file's path below it without suffix
            (with it where two files differ by nothing else), so that `out` has the folders of the images.

    Raises:
        ValueError: if a path is not below `root`, or is there twice.
        OSError: if a result cannot be written.
    """
    files = [Path(p) for p in paths]
    names = _names(files, root)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    records: list[Any] = []
    done: list[Path] = []
    failed: list[tuple[Path, str]] = []
    for path, name in zip(progress(files), names, strict=True):
        try:
            image = read_image(path)
        except (ValueError, OSError) as error:
            failed.append((path, str(error)))
            continue
        except MemoryError:
            failed.append((path, "not enough memory to read it"))
            continue
        try:
            records += _write(segmenter(image), image, name, out, segmenter)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            failed.append((path, f"not enough memory for {image.width} x {image.height} pixels"))
            for kind in (segmenter.task, "overlay"):
                (out / f"{name}.{kind}.png").unlink(missing_ok=True)  # half of a result
            continue
        done.append(path)
    names_of_labels = segmenter.model.config.label_names or [str(i) for i in range(segmenter.model.config.num_labels)]
    content: Any = records
    if segmenter.task != "instance":
        categories = [{"id": i, "name": name} for i, name in enumerate(names_of_labels)]
        content = {"annotations": records, "categories": categories}
    write_atomically(out / f"{segmenter.task}.json", lambda f: f.write(json.dumps(content, indent=1).encode()))
    return Summary(done, failed)


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has no type of its own for the memory of a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "not enough memory" in str(error))


def _names(files: Sequence[Path], root: str | Path | None) -> list[str]:
    """What to call the results of each: its path below `root`, without suffix where that is unique."""
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


def _write(result: Result, image: Image.Image, name: str, out: Path, segmenter: Segmenter) -> list[dict[str, Any]]:
    """Write one image's files; its records for the JSON file."""
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]]
    masks: Iterable[np.ndarray]  # one at a time, where they are not there anyway
    if isinstance(result, Panoptic):
        ids = result.segment_ids.cpu().numpy()
        file_name = f"{name}.panoptic.png"
        _save(Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)), out / file_name)
        segments = [
            {
                "id": segment.id,
                "category_id": segment.label,
                "isthing": int(not segment.is_stuff),
                "score": round(segment.score, 6),
                "area": int((ids == segment.id).sum()),
                "bbox": _box(ids == segment.id),
            }
            for segment in result.segments
        ]
        records = [{"image_id": name, "file_name": file_name, "segments_info": segments}]
        masks = (ids == segment.id for segment in result.segments)
        colours = list(range(len(result.segments)))
    elif isinstance(result, Instances):
        masks = list(result.masks.cpu().numpy())
        records = [
            {"image_id": name, "category_id": label, "score": round(score, 6), "segmentation": encode(mask)}
            for label, score, mask in zip(result.labels.tolist(), result.scores.tolist(), masks, strict=True)
        ]
        colours = list(range(len(masks)))
    else:
        labels = result.cpu().numpy()
        file_name = f"{name}.semantic.png"
        _save(Image.fromarray(labels.astype(np.uint8 if labels.max() < 256 else np.uint16)), out / file_name)
        found, areas = np.unique(labels, return_counts=True)
        areas_of = [{"category_id": int(c), "area": int(a)} for c, a in zip(found, areas, strict=True)]
        records = [{"image_id": name, "file_name": file_name, "segments_info": areas_of}]
        masks = (labels == c for c in found)
        colours = [int(c) for c in found]
    _save(overlay(image, masks, colours), out / f"{name}.overlay.png")
    return records


def overlay(image: Image.Image, masks: Iterable[np.ndarray], colours: Sequence[int]) -> Image.Image:
    """The image with each mask [h, w] in a colour of its own, and its outline."""
    pixels = np.array(image)
    for mask, number in zip(masks, colours, strict=True):
        # Successive hues a golden section apart: neighbours in the list never look alike.
        colour = 255 * np.array(colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, 1.0), dtype=np.float32)
        pixels[mask] = (0.5 * pixels[mask] + 0.5 * colour).astype(np.uint8)
        inner = np.pad(mask, 1, mode="edge")
        inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        pixels[mask & ~inner] = colour.astype(np.uint8)
    return Image.fromarray(pixels)


def encode(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run-length encoding of a bool mask [h, w]."""
    from pycocotools.mask import encode as rle

    found = rle(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": found["size"], "counts": found["counts"].decode("ascii")}


def _box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height]; zeros for an empty mask."""
    if not mask.any():
        return [0, 0, 0, 0]
    y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]


def _save(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda file: image.save(file, format="png"))
