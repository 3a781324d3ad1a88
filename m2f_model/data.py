"""What to train on: COCO's instance and panoptic formats, synthetic shapes, and large-scale jitter.

A data set maps an index to a sample `{"image": uint8 [3, H, W], "labels": int64 [T], "masks": bool [T, H, W]}`. For
evaluation alone it may have "void", bool [H, W], pixels that nobody labelled, and "crowd_labels" int64 [C] and
"crowd_masks" bool [C, H, W], groups that are not told apart. All other pixels outside the masks are background.
"""

from __future__ import annotations

import colorsys
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from m2f_model.config import PIXEL_MEAN, PIXEL_STD
from m2f_model.files import read_image
from m2f_model.segment import STRIDE, normalise

Sample = dict[str, Tensor]


class Dataset(Protocol):
    """Samples by index, and what their labels mean."""

    label_names: tuple[str, ...]
    stuff_labels: tuple[int, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def identity(data: Dataset) -> dict[str, Any]:
    """What a checkpoint remembers of the data that a run learned from."""
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
        self._label = torch.tensor(list(order), dtype=torch.int64)
        stuff = {int(self._label[i]) for i in data.stuff_labels}
        if stuff != set(self.stuff_labels):
            odd = [theirs[i] for i in sorted(stuff ^ set(self.stuff_labels))]
            raise ValueError(f"validation: expected the stuff of the training data; {_names(odd)} stuff in only one")
        self._data = data

    def __getattr__(self, name: str) -> Any:
        if name == "_data":  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self._data, name)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        sample = self._data[index]
        return {**sample, **{k: self._label[sample[k]] for k in ("labels", "crowd_labels") if k in sample}}


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---------------------------------------------------------------- synthetic shapes


class Shapes:
    """Discs, squares and triangles that hide each other, before a sky and on a ground.

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
        """What makes other samples of the same number and labels."""
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
        masks = torch.from_numpy(owner)[None] == torch.arange(len(labels))[:, None, None]
        return _without_empty({"image": image, "labels": torch.tensor(labels), "masks": masks})


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


# ---------------------------------------------------------------- COCO's formats


class AnnotationError(ValueError):
    """Annotations that cannot be used: the message names the file, the entry's id, and what is wrong with it."""


class CocoInstances:
    """Images with instances, in COCO's instance format. Crowds are no targets.

    Args:
        annotations: the JSON file.
        images: directory of the images.

    Raises:
        AnnotationError: naming file and id, at once for what the JSON file says, at reading for masks.
    """

    stuff_labels: tuple[int, ...] = ()

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.path, self.images = Path(annotations), Path(images)
        content = _read_json(self.path, ("images", "annotations", "categories"))
        self.entries = _entries(self.path, content["images"], "image", ("id", "file_name", "height", "width"))
        categories = _entries(self.path, content["categories"], "category", ("id", "name"))
        self.label_names = tuple(str(c["name"]) for c in categories)
        self._label = {c["id"]: i for i, c in enumerate(categories)}
        known = {entry["id"] for entry in self.entries}
        self._annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        self._crowds: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        wanted = ("id", "image_id", "category_id", "segmentation")
        for annotation in _entries(self.path, content["annotations"], "annotation", wanted):
            _known(self.path, annotation, known, self._label)
            kind = self._crowds if annotation.get("iscrowd", 0) else self._annotations
            kind[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        image = _read_pixels(self.path, self.images, entry)
        labels, masks = self._segments(self._annotations.get(entry["id"], []), *image.shape[1:])
        sample = _without_empty({"image": image, "labels": labels, "masks": masks})
        if entry["id"] in self._crowds:
            sample["crowd_labels"], sample["crowd_masks"] = self._segments(self._crowds[entry["id"]], *image.shape[1:])
        return sample

    def _segments(self, annotations: list[dict[str, Any]], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Labels and masks of some annotations of one image."""
        masks = [self._mask(a, height, width) for a in annotations]
        labels = torch.tensor([self._label[a["category_id"]] for a in annotations], dtype=torch.int64)
        return labels, torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)

    def _mask(self, annotation: dict[str, Any], height: int, width: int) -> Tensor:
        from pycocotools import mask as coco

        segmentation = annotation["segmentation"]
        try:
            if isinstance(segmentation, list):
                if not all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation):
                    raise ValueError("a polygon has fewer than three points, or an odd number of coordinates")
                encoded: Any = coco.merge(coco.frPyObjects(segmentation, height, width))
            else:
                if list(segmentation["size"]) != [height, width]:
                    raise ValueError(f"its size is {segmentation['size']}, the image's {[height, width]}")
                compressed = isinstance(segmentation["counts"], str | bytes)
                encoded = segmentation if compressed else coco.frPyObjects(segmentation, height, width)
            mask = coco.decode(encoded)
        except Exception as error:  # whatever pycocotools raises for whatever it was given
            raise AnnotationError(
                f"{self.path}: annotation {annotation['id']}: expected polygons or a run-length encoding; {error}"
            ) from error
        return torch.from_numpy(np.ascontiguousarray(mask)).bool()


class CocoPanoptic:
    """Images with panoptic segmentations, in COCO's panoptic format: a JSON file, and a directory of PNG files.

    Args:
        annotations: the JSON file.
        images: directory of the images.
        segments: directory of the PNG files; by default named as the JSON file without its suffix.

    Raises:
        AnnotationError: naming file and id, at once for what the JSON file says, at reading for the PNG files.
    """

    def __init__(self, annotations: str | Path, images: str | Path, segments: str | Path | None = None) -> None:
        self.path, self.images = Path(annotations), Path(images)
        self.segments = Path(segments) if segments is not None else self.path.with_suffix("")
        content = _read_json(self.path, ("images", "annotations", "categories"))
        images_by_id = {
            e["id"]: e for e in _entries(self.path, content["images"], "image", ("id", "file_name", "height", "width"))
        }
        categories = _entries(self.path, content["categories"], "category", ("id", "name", "isthing"))
        self.label_names = tuple(str(c["name"]) for c in categories)
        self.stuff_labels = tuple(i for i, c in enumerate(categories) if not c["isthing"])
        self._label = {c["id"]: i for i, c in enumerate(categories)}
        self.entries = []
        for annotation in _entries(
            self.path, content["annotations"], "annotation", ("image_id", "file_name", "segments_info"), "image_id"
        ):
            if annotation["image_id"] not in images_by_id:
                raise AnnotationError(f"{self.path}: annotation of image {annotation['image_id']}: no such image")
            for segment in _entries(self.path, annotation["segments_info"], "segment", ("id", "category_id")):
                _known(self.path, {**segment, "image_id": annotation["image_id"]}, images_by_id, self._label)
            self.entries.append((images_by_id[annotation["image_id"]], annotation))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry, annotation = self.entries[index]
        image = _read_pixels(self.path, self.images, entry)
        path = self.segments / annotation["file_name"]
        try:
            pixels = torch.from_numpy(np.array(read_image(path))).int()
        except (OSError, ValueError) as error:
            raise AnnotationError(f"{self.path}: annotation of image {entry['id']}: {error}") from error
        if pixels.shape[:2] != image.shape[1:]:
            raise AnnotationError(
                f"{path}: expected the size of image {entry['id']}, {list(image.shape[1:])}; "
                f"got {list(pixels.shape[:2])}"
            )
        ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
        segments, crowds = (
            [s for s in annotation["segments_info"] if bool(s.get("iscrowd", 0)) is crowd] for crowd in (False, True)
        )
        labels, masks = self._masks(segments, ids)
        absent = [s["id"] for s, mask in zip(segments, masks, strict=True) if not mask.any()]
        if absent:
            raise AnnotationError(f"{path}: expected pixels of every segment; segment {absent[0]} has none")
        known = torch.tensor([s["id"] for s in annotation["segments_info"]], dtype=ids.dtype)
        sample = {"image": image, "labels": labels, "masks": masks, "void": ~torch.isin(ids, known)}
        if crowds:
            sample["crowd_labels"], sample["crowd_masks"] = self._masks(crowds, ids)
        return sample

    def _masks(self, segments: list[dict[str, Any]], ids: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and masks of some segments of one image."""
        labels = torch.tensor([self._label[s["category_id"]] for s in segments], dtype=torch.int64)
        return labels, ids[None] == torch.tensor([s["id"] for s in segments], dtype=ids.dtype).view(-1, 1, 1)


def _read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: expected JSON; {error}") from error
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise AnnotationError(f"{path}: expected lists {', '.join(keys)}; {', '.join(missing)} missing")
    return content


def _entries(path: Path, entries: Any, kind: str, keys: Sequence[str], name: str = "id") -> list[dict[str, Any]]:
    """`entries`, after checking that each has all of `keys`."""
    if not isinstance(entries, list):
        raise AnnotationError(f"{path}: expected a list with a {kind} each; got {type(entries).__name__}")
    for i, entry in enumerate(entries):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            known = entry.get(name) if isinstance(entry, dict) else None
            which = f"{kind} number {i}" if known is None else f"{kind} {known}"
            raise AnnotationError(f"{path}: {which}: expected {', '.join(keys)}; {', '.join(missing)} missing")
    return list(entries)


def _known(path: Path, entry: dict[str, Any], images: Any, categories: Any) -> None:
    for key, known in (("image_id", images), ("category_id", categories)):
        if entry[key] not in known:
            raise AnnotationError(f"{path}: annotation {entry['id']}: {key} {entry[key]!r} is not in the file")


def _read_pixels(path: Path, directory: Path, entry: dict[str, Any]) -> Tensor:
    try:
        image = read_image(directory / entry["file_name"])
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path}: image {entry['id']}: {error}") from error
    if (image.height, image.width) != (entry["height"], entry["width"]):
        raise AnnotationError(
            f"{path}: image {entry['id']}: expected {entry['height']} x {entry['width']} pixels; "
            f"{entry['file_name']} has {image.height} x {image.width}"
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _without_empty(sample: Sample) -> Sample:
    keep = sample["masks"].flatten(1).any(1)
    return {"image": sample["image"], "labels": sample["labels"][keep], "masks": sample["masks"][keep]}


# ---------------------------------------------------------------- augmentation, batches, order


def jitter(sample: Sample, size: int, scales: tuple[float, float], generator: torch.Generator) -> Sample:
    """Large-scale jitter (Ghiasi et al. 2021) and a random flip: resized to a random multiple of `size`, cropped to it.

    Args:
        sample: of any size.
        size: side of the square result; smaller images lie at its upper left, padded with the mean colour.
        scales: range of the multiple; published: 0.1 to 2.
        generator: of the randomness.
    """
    image, masks = sample["image"], sample["masks"]
    scale, flip, *offsets = torch.rand(4, generator=generator).tolist()
    factor = scales[0] + scale * (scales[1] - scales[0])
    ratio = factor * size / max(image.shape[1:])
    h, w = (max(1, round(side * ratio)) for side in image.shape[1:])
    image = F.interpolate(image[None].float(), (h, w), mode="bilinear", antialias=True)[0].round().clamp(0, 255).byte()
    resized = F.interpolate(masks[None].byte(), (h, w), mode="nearest-exact")[0] if len(masks) else masks[:, :1, :1]
    masks = resized.expand(-1, h, w).bool()
    top, left = (int(offset * max(0, side - size + 1)) for offset, side in zip(offsets, (h, w), strict=True))
    image, masks = (x[:, top : top + size, left : left + size] for x in (image, masks))
    if flip < 0.5:
        image, masks = image.flip(2), masks.flip(2)
    return _without_empty({"image": image.contiguous(), "labels": sample["labels"], "masks": masks.contiguous()})


def collate(
    samples: Sequence[Sample],
    size: int | None = None,
    mean: Sequence[float] = PIXEL_MEAN,
    std: Sequence[float] = PIXEL_STD,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Normalised pixels [N, 3, H, W] and targets, padded to `size`, or to the largest image and multiples of 32."""
    if size is None:
        sides = (max(s["image"].shape[axis] for s in samples) for axis in (1, 2))
        h, w = (-(-side // STRIDE) * STRIDE for side in sides)
    else:
        h = w = -(-size // STRIDE) * STRIDE
    pixels = torch.zeros(len(samples), 3, h, w)
    targets = []
    for i, sample in enumerate(samples):
        _, height, width = sample["image"].shape
        pixels[i, :, :height, :width] = normalise(sample["image"], mean, std)
        masks = F.pad(sample["masks"], (0, w - width, 0, h - height))
        targets.append({"labels": sample["labels"], "masks": masks})
    return pixels, targets


class Batches(torch.utils.data.Dataset[tuple[Tensor, list[dict[str, Tensor]]]]):
    """Training batches by step: a function of the seed and the step alone, so that a resumed run goes on exactly.

    All processes together go through the data in a new random order each time; each takes its part of every batch.

    Args:
        data: the samples.
        batch_size: of this process.
        seed: of order and augmentation.
        size: side of the square inputs; None for images as they are.
        scales: range of large-scale jitter.
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
        rank: int = 0,
        world_size: int = 1,
        mean: Sequence[float] = PIXEL_MEAN,
        std: Sequence[float] = PIXEL_STD,
    ) -> None:
        self.mean, self.std = mean, std
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.size, self.scales = size, scales
        self.rank, self.world_size = rank, world_size
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __getitem__(self, step: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        first = (step * self.world_size + self.rank) * self.batch_size
        return collate([self._sample(first + i) for i in range(self.batch_size)], self.size, self.mean, self.std)

    def _sample(self, position: int) -> Sample:
        """The sample at a position of the endless sequence of all processes."""
        epoch, place = divmod(position, len(self.data))
        if self._order[0] != epoch:
            order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.seed * 1000003 + epoch))
            self._order = (epoch, order)
        sample = self.data[int(self._order[1][place])]
        if self.size is None:
            return sample
        generator = torch.Generator().manual_seed((self.seed + 1) * 1000003 + position)
        return jitter(sample, self.size, self.scales, generator)


class Steps(torch.utils.data.Sampler[int]):
    """The steps from `start` to `stop`."""

    def __init__(self, start: int, stop: int) -> None:
        self.steps = range(start, stop)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)
