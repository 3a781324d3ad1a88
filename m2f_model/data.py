"""Training data: synthetic shapes, large-scale jitter, batches. COCO's formats are in :mod:`m2f_model.coco`.

A data set maps an index to a sample `{"image": uint8 [3, H, W], "labels": int64 [T], "masks": bool [T, H, W]}`. For
evaluation alone it may have "void", bool [H, W], pixels that nobody labelled, and "crowd_labels" int64 [C] and
"crowd_masks" bool [C, H, W], groups that are not told apart. All other pixels outside the masks are background.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from m2f_kernels import RunLengths

# The names that this module had before coco.py and samples.py existed.
from m2f_model.coco import CocoInstances as CocoInstances
from m2f_model.coco import CocoPanoptic as CocoPanoptic
from m2f_model.config import PIXEL_MEAN, PIXEL_STD
from m2f_model.samples import AnnotationError, DenseMasks, Masks, Sample, describe, without_empty
from m2f_model.samples import Progress as Progress
from m2f_model.segment import STRIDE, normalise, resized_size

#: Pixels [N, 3, H, W], and for each image its target: labels and masks.
Batch = tuple[Tensor, list[dict[str, Any]]]


class Dataset(Protocol):
    """Samples by index, and what their labels mean."""

    label_names: tuple[str, ...]
    stuff_labels: tuple[int, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class DatasetOfFiles(Dataset, Protocol):
    """A data set whose files have ids of images and categories, by which results on disk belong to it."""

    category_ids: tuple[Any, ...]

    @property
    def images_of_data(self) -> list[tuple[Any, str]]:
        """The id and the file name of each image."""


def identity(data: Dataset) -> dict[str, Any]:
    """The description of a run's data that its checkpoints keep: names, stuff, number of samples, content."""
    return {
        "label_names": tuple(data.label_names),
        "stuff_labels": tuple(data.stuff_labels),
        "samples": len(data),
        "content": getattr(data, "fingerprint", ""),
    }


class Relabelled:
    """`data` with the labels of `like`: categories are the same by name, in any order.

    Raises:
        ValueError: naming categories that only one of them has, or that are stuff in only one of them.
    """

    def __init__(self, data: Dataset, like: Dataset) -> None:
        ours, theirs = tuple(data.label_names), tuple(like.label_names)
        missing, unknown = ([n for n in a if n not in b] for a, b in ((theirs, ours), (ours, theirs)))
        if missing or unknown:
            lines = [f"{_names(n)} {what}" for n, what in ((missing, "missing"), (unknown, "unknown")) if n]
            raise ValueError(f"validation: expected the categories of the training data; {'; '.join(lines)}")
        if ours != theirs and len(set(ours)) < len(ours):
            raise ValueError("validation: expected categories in the training data's order where two have one name")
        self.label_names, self.stuff_labels = theirs, tuple(like.stuff_labels)
        order = range(len(ours)) if ours == theirs else [theirs.index(name) for name in ours]
        self._label = torch.tensor(list(order), dtype=torch.int64, device="cpu")
        stuff = {int(self._label[i]) for i in data.stuff_labels}
        if stuff != set(self.stuff_labels):
            odd = [theirs[i] for i in sorted(stuff ^ set(self.stuff_labels))]
            raise ValueError(f"validation: expected the stuff of the training data; {_names(odd)} stuff in only one")
        self._data = data

    def __getattr__(self, name: str) -> Any:
        if name == "_data":  # does not exist yet during unpickling
            raise AttributeError(name)
        return getattr(self._data, name)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        sample = self._data[index]
        labels: Sample = {k: self._label[sample[k]] for k in ("labels", "crowd_labels") if k in sample}
        return {**sample, **labels, "masks": sample["masks"] != 0}


def summary(data: Dataset) -> list[str]:
    """A description of the data in lines of text, with the frequency of each class if it is known (`class_counts`).

    The user's own data set may have `class_counts`, the number of targets (or, if `semantic`, of pixels) of each label.
    """
    names, stuff = data.label_names, data.stuff_labels
    lines = [f"{len(data)} images; {len(names)} classes, {len(names) - len(stuff)} of things and {len(stuff)} of stuff"]
    counts = getattr(data, "class_counts", None)
    if counts is None:
        return lines
    what = "pixels" if getattr(data, "semantic", False) else "targets"
    order = sorted(range(len(names)), key=lambda i: -counts[i])
    shown = [f"{names[i]} {counts[i]}" for i in order if counts[i]]
    if len(shown) > 12:
        shown = [*shown[:6], "...", *shown[-6:]]
    lines.append(f"{sum(counts)} {what}: {', '.join(shown) or 'none'}")
    none = [names[i] for i in order if not counts[i]]
    if none:
        lines.append(f"no {what} of {_names(none)}")
    return lines


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---------------------------------------------------------------- synthetic shapes


class Shapes:
    """Synthetic images: discs, squares and triangles that occlude each other, before a sky and on a ground.

    Discs are reddish, squares greenish, triangles violet, in any brightness: with shapes as the only cue, telling them
    apart takes a small model much longer than finding them. Sample `i` is a function of `seed` and `i` alone; nothing
    is stored. Things: disc, square, triangle; stuff: sky, ground.

    Args:
        length: number of samples.
        size: side of the square images.
        seed: of all randomness; validation data are another seed.
    """

    label_names: tuple[str, ...] = ("disc", "square", "triangle", "sky", "ground")
    stuff_labels: tuple[int, ...] = (3, 4)

    def __init__(self, length: int = 4096, size: int = 128, seed: int = 0) -> None:
        if length < 1 or size < 16:
            raise ValueError(f"length, size: expected at least 1 and 16; got {length}, {size}")
        self.length, self.size, self.seed = length, size, seed

    def __len__(self) -> int:
        return self.length

    @property
    def fingerprint(self) -> str:
        """A string that differs between data sets whose samples differ, though their number and labels are the same."""
        return f"size {self.size}, seed {self.seed}"

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng((self.seed, index))
        size = self.size
        rows = np.arange(size)[:, None, None]
        horizon = random.uniform(0.3, 0.7) * size + random.uniform(-0.3, 0.3) * (np.arange(size) - size / 2)
        is_sky = rows[..., 0] < horizon
        sky = np.array([90, 140, 230]) + rows / size * np.array([120, 80, 20])
        ground = np.array([110, 90, 60]) + 25 * np.sin(rows * random.uniform(0.5, 1.5))
        pixels = np.where(is_sky[..., None], sky, ground)
        owner = np.where(is_sky, 0, 1)
        labels = [3, 4]
        for _ in range(random.integers(1, 6)):
            kind = int(random.integers(3))
            mask = _draw(kind, size, random)
            owner[mask] = len(labels)
            labels.append(kind)
            hue = (_HUES[kind] + random.uniform(-0.07, 0.07)) % 1
            colour = colorsys.hsv_to_rgb(hue, random.uniform(0.5, 1), random.uniform(0.4, 1))
            pixels[mask] = 255 * np.array(colour)
        pixels = pixels + random.normal(0, 8, pixels.shape)
        image = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
        masks = torch.from_numpy(owner)[None] == torch.arange(len(labels), device="cpu")[:, None, None]
        return without_empty({"image": image, "labels": torch.tensor(labels, device="cpu"), "masks": masks})


#: Of disc, square and triangle.
_HUES = (0.0, 0.33, 0.83)


def _draw(kind: int, size: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Bool [size, size], one shape at a random place in a random size and direction."""
    radius = random.uniform(0.08, 0.22) * size
    centre = random.uniform(0.1 * size, 0.9 * size, 2)
    canvas = Image.new("1", (size, size))
    draw = ImageDraw.Draw(canvas)
    if kind == 0:
        draw.ellipse([*(centre - radius), *(centre + radius)], fill=1)
    else:
        corners = (0, 4, 3)[kind]
        angles = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
        points = centre + 1.2 * radius * np.stack([np.cos(angles), np.sin(angles)], -1)
        draw.polygon([tuple(p) for p in points], fill=1)
    return np.array(canvas)


# ---------------------------------------------------------------- augmentation, batches, order


class _View(NamedTuple):
    """The part of an image that large-scale jitter shows: a window of the resized image, flipped or not."""

    resized: tuple[int, int]
    top: int
    left: int
    height: int
    width: int
    flipped: bool

    @classmethod
    def draw(cls, image: tuple[int, int], size: int, scales: tuple[float, float], generator: torch.Generator) -> _View:
        scale, flip, *offsets = torch.rand(4, generator=generator, device="cpu").tolist()
        factor = scales[0] + scale * (scales[1] - scales[0])
        ratio = factor * size / max(image)
        resized = h, w = max(1, round(image[0] * ratio)), max(1, round(image[1] * ratio))
        top, left = (int(offset * max(0, side - size + 1)) for offset, side in zip(offsets, resized, strict=True))
        return cls(resized, top, left, min(size, h), min(size, w), flip < 0.5)

    @classmethod
    def cropped(
        cls, image: tuple[int, int], crop: tuple[int, int], scales: tuple[float, float], generator: torch.Generator
    ) -> _View:
        """As published for semantic data: a random crop, after the short side has become a random multiple, in tenths
        and within `scales`, of the crop's longer side, and the long one at most four times that side."""
        scale, flip, *offsets = torch.rand(4, generator=generator, device="cpu").tolist()
        base, steps = max(crop), round(10 * (scales[1] - scales[0])) + 1
        short = max(1, int(base * (scales[0] + 0.1 * int(scale * steps)) + 1e-6))
        resized = h, w = resized_size(*image, (short, max(short, 4 * base)))
        height, width = min(crop[0], h), min(crop[1], w)
        top, left = int(offsets[0] * (h - height + 1)), int(offsets[1] * (w - width + 1))
        return cls(resized, top, left, height, width, flip < 0.5)

    def of_image(self, image: Tensor) -> Tensor:
        """uint8 [3, height, width]: only the window is resized (antialiased), from what lies in it and beside it."""
        (h, w), (height, width) = self.resized, image.shape[1:]
        box = (
            self.left * width / w,
            self.top * height / h,
            min(width, (self.left + self.width) * width / w),
            min(height, (self.top + self.height) * height / h),
        )
        whole = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        window = np.array(whole.resize((self.width, self.height), Image.Resampling.BILINEAR, box=box))
        found = torch.from_numpy(window).permute(2, 0, 1)
        return (found.flip(2) if self.flipped else found).contiguous()

    def indices(self, height: int, width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The rows and columns of the image whose pixels are nearest to those of the window."""
        axes = []
        for first, count, old, new in (
            (self.top, self.height, height, self.resized[0]),
            (self.left, self.width, width, self.resized[1]),
        ):
            centres = np.arange(first, first + count, dtype=np.float32) + np.float32(0.5)
            axes.append(np.minimum((centres * np.float32(old / new)).astype(np.int64), old - 1))
        return axes[0], axes[1][::-1] if self.flipped else axes[1]


def jitter(sample: Mapping[str, Any], size: int, scales: tuple[float, float], generator: torch.Generator) -> Sample:
    """Large-scale jitter (Ghiasi et al. 2021) and a random flip: resized to a random multiple of `size`, cropped to it.

    Only the part that is left after cropping is computed.

    Args:
        sample: of any size; its masks are a tensor or :class:`Masks`.
        size: side of the square result; smaller images lie at its upper left, padded with the mean colour.
        scales: range of the multiple; published: 0.1 to 2.
        generator: of the randomness.
    """
    view = _View.draw(tuple(sample["image"].shape[1:]), size, scales, generator)
    masks = torch.empty(len(sample["masks"]), view.height, view.width, dtype=torch.bool, device="cpu")
    kept: list[int] = []
    for i, window in enumerate(_windows(sample, view)):
        if window is not None and window.any():
            masks[len(kept)] = torch.from_numpy(window)
            kept.append(i)
    return {"image": view.of_image(sample["image"]), "labels": sample["labels"][kept], "masks": masks[: len(kept)]}


def jitter_colours(image: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [3, H, W]: brightness, contrast, saturation and hue changed at random, as in SSD (Liu et al. 2016).

    Each with a probability of 1/2: brightness by up to 32, contrast and saturation by factors from 0.5 to 1.5, hue by
    up to a tenth of the circle; contrast before or after the last two.
    """
    draws = torch.rand(9, generator=generator, device="cpu").tolist()
    pixels: np.ndarray[Any, Any] = image.permute(1, 2, 0).numpy()

    def whole(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values.clip(0, 255).astype(np.uint8)

    def contrast(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return whole(pixels * np.float32(0.5 + draws[4])) if draws[3] < 0.5 else pixels

    if draws[1] < 0.5:
        pixels = whole(pixels + np.float32(64 * draws[2] - 32))
    if draws[0] < 0.5:
        pixels = contrast(pixels)
    if draws[5] < 0.5 or draws[7] < 0.5:
        colours = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        if draws[5] < 0.5:
            colours[..., 1] = whole(colours[..., 1] * np.float32(0.5 + draws[6]))
        if draws[7] < 0.5:
            turn = round((2 * draws[8] - 1) * 25.5)  # of 255
            colours[..., 0] = ((colours[..., 0].astype(np.int16) + turn) % 256).astype(np.uint8)
        pixels = np.array(Image.fromarray(colours, "HSV").convert("RGB"))
    if draws[0] >= 0.5:
        pixels = contrast(pixels)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()


def _windows(sample: Mapping[str, Any], view: _View | None) -> Iterator[np.ndarray[Any, Any] | None]:
    """Of each mask what the view shows; all of it for None."""
    masks = sample["masks"]
    masks = masks if isinstance(masks, Masks) else DenseMasks(masks)
    height, width = sample["image"].shape[1:]
    return masks.window(*((np.arange(height), np.arange(width)) if view is None else view.indices(height, width)))


def _encoded(sample: Mapping[str, Any], view: _View | None) -> dict[str, Any]:
    """The part of a sample that `view` shows (all of it for None), its masks as run lengths; one at a time is dense."""
    image = sample["image"] if view is None else view.of_image(sample["image"])
    kept: list[int] = []

    def seen() -> Iterator[Tensor]:
        for i, window in enumerate(_windows(sample, view)):
            if window is not None and window.any():
                kept.append(i)
                yield torch.from_numpy(window)

    masks = RunLengths.from_masks(seen(), (image.shape[1], image.shape[2]))
    return {"image": image, "labels": sample["labels"][kept], "masks": masks}


def unpack(target: Mapping[str, Any]) -> dict[str, Any]:
    """A target of :func:`collate` or :class:`Batches` with dense masks, bool [T, H, W]; its losses need none."""
    masks = target["masks"]
    return {**target, "masks": masks.masks() if isinstance(masks, RunLengths) else masks}


def collate(
    samples: Sequence[Mapping[str, Any]],
    size: int | tuple[int, int] | None = None,
    mean: Sequence[float] = PIXEL_MEAN,
    std: Sequence[float] = PIXEL_STD,
) -> Batch:
    """Normalised pixels [N, 3, H, W] and targets, padded to `size`, or to the largest image and multiples of 32.

    Masks are tensors or run lengths, as the samples have them.
    """
    if size is None:
        sides = (max(s["image"].shape[axis] for s in samples) for axis in (1, 2))
        h, w = (-(-side // STRIDE) * STRIDE for side in sides)
    else:
        h, w = (-(-side // STRIDE) * STRIDE for side in ((size, size) if isinstance(size, int) else size))
    pixels = torch.zeros(len(samples), 3, h, w, device="cpu")
    targets = []
    for i, sample in enumerate(samples):
        _, height, width = sample["image"].shape
        pixels[i, :, :height, :width] = normalise(sample["image"], mean, std)
        masks = sample["masks"]
        padded = masks.padded(h, w) if isinstance(masks, RunLengths) else F.pad(masks, (0, w - width, 0, h - height))
        targets.append({"labels": sample["labels"], "masks": padded})
    return pixels, targets


class Batches(torch.utils.data.Dataset[Batch]):
    """Training batches by step: a function of the seed and the step alone, so that a resumed run goes on exactly.

    Masks are `m2f_kernels.RunLengths`, which the criterion samples as they are: dense ones of all targets never exist.

    All processes together go through the data in a new random order each time; each takes its part of every batch.

    Args:
        data: the samples.
        batch_size: of this process.
        seed: of order and augmentation.
        size: side of the square inputs; None for images as they are.
        scales: range of large-scale jitter, or of the sizes before the crop.
        crop: (height, width) of the inputs, in place of `size`: random crops, as published for semantic data.
        colours: change colours at random, see :func:`jitter_colours`.
        rank, world_size: which process this is.
        mean, std: of each channel, by which pixels are normalised.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        size: int | None = None,
        scales: tuple[float, float] = (0.1, 2.0),
        crop: tuple[int, int] | None = None,
        colours: bool = False,
        rank: int = 0,
        world_size: int = 1,
        mean: Sequence[float] = PIXEL_MEAN,
        std: Sequence[float] = PIXEL_STD,
    ) -> None:
        self.mean, self.std = mean, std
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.size, self.scales, self.crop, self.colours = size, scales, crop, colours
        self.rank, self.world_size = rank, world_size
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, device="cpu"))

    def __getitem__(self, step: int) -> Batch:
        first = (step * self.world_size + self.rank) * self.batch_size
        samples = [self._sample(first + i) for i in range(self.batch_size)]
        return collate(samples, self.crop or self.size, self.mean, self.std)

    def _sample(self, position: int) -> dict[str, Any]:
        """The sample at a position of the endless sequence of all processes."""
        epoch, place = divmod(position, len(self.data))
        if self._order[0] != epoch:
            order = torch.randperm(
                len(self.data), generator=torch.Generator().manual_seed(self.seed * 1000003 + epoch), device="cpu"
            )
            self._order = (epoch, order)
        index = int(self._order[1][place])
        read = getattr(self.data, "compact", self.data.__getitem__)
        sample = _checked(read(index), index, len(self.data.label_names))
        generator = torch.Generator().manual_seed((self.seed + 1) * 1000003 + position)
        height, width = sample["image"].shape[1:]
        view = None
        if self.crop is not None:
            view = _View.cropped((height, width), self.crop, self.scales, generator)
        elif self.size is not None:
            view = _View.draw((height, width), self.size, self.scales, generator)
        found = _encoded(sample, view)
        return {**found, "image": jitter_colours(found["image"], generator)} if self.colours else found


def _checked(sample: Mapping[str, Any], index: int, num_labels: int) -> Mapping[str, Any]:
    """The sample, after checking it: data sets may be the user's own."""
    image, labels, masks = (sample[key] for key in ("image", "labels", "masks"))
    wrong = None
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
        wrong = f"an image, uint8 [3, H, W]; got {describe(image)}"
    elif not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
        wrong = f"labels, int64 [T]; got {describe(labels)}"
    elif isinstance(masks, Tensor) and tuple(masks.shape) != (len(labels), *image.shape[1:]):
        wrong = f"masks {[len(labels), *image.shape[1:]]}; got {describe(masks)}"
    elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
        wrong = f"labels from 0 to {num_labels - 1}; got {labels.tolist()}"
    if wrong:
        raise AnnotationError(f"sample {index}: expected {wrong}")
    return sample


class Guarded(torch.utils.data.Dataset[Any]):
    """Batches for a process that prepares them: errors of the data are returned instead of raised, which would give a
    traceback of two processes."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Any:
        try:
            return self.batches[step]
        except (AnnotationError, OSError) as error:
            return AnnotationError(str(error))
        except MemoryError:
            return MemoryError(f"step {step + 1}: not enough memory for a batch")


class Steps(torch.utils.data.Sampler[int]):
    """The steps from `start` to `stop`."""

    def __init__(self, start: int, stop: int) -> None:
        self.steps = range(start, stop)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)
