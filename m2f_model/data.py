"""What to train on: COCO's instance and panoptic formats, synthetic shapes, and large-scale jitter.

A data set maps an index to a sample `{"image": uint8 [3, H, W], "labels": int64 [T], "masks": bool [T, H, W]}`. For
evaluation alone it may have "void", bool [H, W], pixels that nobody labelled, and "crowd_labels" int64 [C] and
"crowd_masks" bool [C, H, W], groups that are not told apart. All other pixels outside the masks are background.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from m2f_kernels._checks import describe
from m2f_model.config import PIXEL_MEAN, PIXEL_STD
from m2f_model.files import image_size, open_image, read_image
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
        self._label = torch.tensor(list(order), dtype=torch.int64, device="cpu")
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
        labels: Sample = {k: self._label[sample[k]] for k in ("labels", "crowd_labels") if k in sample}
        return {**sample, **labels, "masks": sample["masks"] != 0}


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
        masks = torch.from_numpy(owner)[None] == torch.arange(len(labels), device="cpu")[:, None, None]
        return _without_empty({"image": image, "labels": torch.tensor(labels, device="cpu"), "masks": masks})


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


class Masks:
    """Masks of one image, each made when it is asked for.

    Args:
        height, width: of the image.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        """bool [H, W], one mask."""
        raise NotImplementedError

    def window(
        self, rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]
    ) -> Iterator[np.ndarray[Any, Any] | None]:
        """The pixels of these rows and columns of each mask, bool [R, C]; None for one that has none there."""
        for i in range(len(self)):
            yield self[i][np.ix_(rows, columns)]

    def dense(self) -> Tensor:
        """bool [T, H, W]."""
        masks = torch.empty(len(self), self.height, self.width, dtype=torch.bool, device="cpu")
        for i in range(len(self)):
            masks[i] = torch.from_numpy(self[i])
        return masks


class _Dense(Masks):
    def __init__(self, masks: Tensor) -> None:
        super().__init__(*masks.shape[1:])
        self._masks = masks

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        return (self._masks[index] != 0).numpy()


class _RunLengths(Masks):
    """COCO's compressed run lengths."""

    def __init__(self, encoded: list[Any], height: int, width: int) -> None:
        super().__init__(height, width)
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        from pycocotools import mask as coco

        return np.ascontiguousarray(coco.decode(self._encoded[index])).view(bool)

    def window(
        self, rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]
    ) -> Iterator[np.ndarray[Any, Any] | None]:
        from pycocotools import mask as coco

        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        for i, encoded in enumerate(self._encoded):
            x, y, w, h = coco.toBbox(encoded)
            within = w > 0 and x <= right and x + w > left and y <= bottom and y + h > top
            yield self[i][np.ix_(rows, columns)] if within else None


class _IdMap(Masks):
    """Where a map of ids [H, W] has each of some ids."""

    def __init__(self, ids: np.ndarray[Any, Any], wanted: list[int]) -> None:
        super().__init__(*ids.shape)
        self.ids, self._wanted = ids, wanted

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        return np.asarray(self.ids == self._wanted[index])

    def window(
        self, rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]
    ) -> Iterator[np.ndarray[Any, Any] | None]:
        ids = self.ids[np.ix_(rows, columns)]
        for wanted in self._wanted:
            yield np.asarray(ids == wanted)


Progress = Callable[[list[Any]], Iterable[Any]]


class CocoInstances:
    """Images with instances, in COCO's instance format. Crowds are no targets.

    Args:
        annotations: the JSON file.
        images: directory of the images.

    Raises:
        AnnotationError: naming file and id: at once for what the JSON file says of ids, categories and sizes; by
            :meth:`check` and at reading for images and masks.
    """

    stuff_labels: tuple[int, ...] = ()

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.path, self.images = Path(annotations), Path(images)
        content, self.fingerprint = _read_json(self.path, ("images", "annotations", "categories"))
        self.entries = _entries(self.path, content["images"], "image", ("id", "file_name", "height", "width"))
        categories = _entries(self.path, content["categories"], "category", ("id", "name"))
        self.label_names = tuple(str(c["name"]) for c in categories)
        self._label = {c["id"]: i for i, c in enumerate(categories)}
        known = {entry["id"] for entry in self.entries}
        self._annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        self._crowds: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        wanted = ("id", "image_id", "category_id", "segmentation")
        for annotation in _entries(self.path, content["annotations"], "annotation", wanted, unique=False):
            _known(self.path, annotation, known, self._label)
            kind = self._crowds if _flag(self.path, annotation, "annotation", "iscrowd") else self._annotations
            kind[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self.entries)

    def check(self, progress: Progress = iter) -> None:
        """Look at every annotation, and at the head of every image, without reading pixels.

        Args:
            progress: wraps the iteration over images, for a progress bar.

        Raises:
            AnnotationError: naming file and id.
        """
        for entry in progress(self.entries):
            _check_image(self.path, self.images, entry)
            for kind in (self._annotations, self._crowds):
                for annotation in kind.get(entry["id"], ()):
                    self._encode(annotation, entry["height"], entry["width"], check_only=True)

    def __getitem__(self, index: int) -> Sample:
        sample = self.compact(index)
        entry, (height, width) = self.entries[index], sample["image"].shape[1:]
        sample = _without_empty({**sample, "masks": sample["masks"].dense()})
        if entry["id"] in self._crowds:
            sample["crowd_labels"], crowds = self._segments(self._crowds[entry["id"]], height, width)
            sample["crowd_masks"] = crowds.dense()
        return sample

    def compact(self, index: int) -> dict[str, Any]:
        """The sample for training: its "masks" are :class:`Masks`, encoded until one is needed; some may be empty."""
        entry = self.entries[index]
        image = _read_pixels(self.path, self.images, entry)
        labels, masks = self._segments(self._annotations.get(entry["id"], []), *image.shape[1:])
        return {"image": image, "labels": labels, "masks": masks}

    def _segments(self, annotations: list[dict[str, Any]], height: int, width: int) -> tuple[Tensor, Masks]:
        """Labels and masks of some annotations of one image."""
        encoded = [self._encode(a, height, width) for a in annotations]
        labels = [self._label[a["category_id"]] for a in annotations]
        return torch.tensor(labels, dtype=torch.int64, device="cpu"), _RunLengths(encoded, height, width)

    def _encode(self, annotation: dict[str, Any], height: int, width: int, check_only: bool = False) -> Any:
        """Compressed run lengths, of what pycocotools can be trusted with: it checks nothing."""
        from pycocotools import mask as coco

        segmentation = annotation["segmentation"]
        try:
            if isinstance(segmentation, list):
                polygons = _polygons(segmentation, height, width)
                return None if check_only else coco.merge(coco.frPyObjects(polygons, height, width))
            if not isinstance(segmentation, dict):
                raise ValueError(f"got {_brief(segmentation)}")
            missing = {"size", "counts"} - set(segmentation)
            if missing:
                raise ValueError(f"{', '.join(sorted(missing))} missing")
            size, counts = segmentation["size"], segmentation["counts"]
            if not isinstance(size, list) or [_integer(x) for x in size] != [height, width]:
                raise ValueError(f"its size is {_brief(size)}, the image's {[height, width]}")
            runs = _decoded_runs(counts) if isinstance(counts, str) else _listed_runs(counts)
            if (
                len(runs) == 0
                or int(runs.min()) < 0
                or int(runs.max()) > height * width
                or runs.sum() != height * width
            ):
                raise ValueError(
                    f"its run lengths add up to {sum(runs.tolist())}; the image has {height * width} pixels, "
                    f"{height} x {width}"
                )
            if check_only:
                return None
            whole = {"size": [height, width], "counts": counts if isinstance(counts, str) else runs.tolist()}
            return whole if isinstance(counts, str) else coco.frPyObjects(whole, height, width)
        except Exception as error:  # whatever comes of whatever was given
            raise AnnotationError(
                f"{self.path}: annotation {annotation['id']}: expected polygons or a run-length encoding; {error}"
            ) from error


#: How far outside the image a polygon's coordinate may lie, in larger sides of the image.
_FAR = 10


def _polygons(polygons: list[Any], height: int, width: int) -> list[list[float]]:
    """`polygons`, after checking that rasterising them costs no more than the image is worth."""
    if not polygons:
        raise ValueError("there is no polygon")
    side = max(height, width)
    checked = []
    for polygon in polygons:
        if not isinstance(polygon, list):
            raise ValueError(f"a polygon is {_brief(polygon)}, not a list of coordinates")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon has fewer than three points, or an odd number of coordinates")
        numbers = np.array(polygon, dtype=np.float64)
        if numbers.ndim != 1:
            raise ValueError("a polygon is a list of lists, not of coordinates")
        if not (-_FAR * side <= numbers.min() and numbers.max() <= (1 + _FAR) * side):  # false for NaN, too
            odd = next(x for x in numbers.tolist() if not -_FAR * side <= x <= (1 + _FAR) * side)
            raise ValueError(f"a polygon has the coordinate {odd:g}, in an image of {height} x {width}")
        checked.append(numbers.tolist())
    return checked


def _listed_runs(counts: Any) -> np.ndarray[Any, Any]:
    if not isinstance(counts, list) or not all(type(x) is int for x in counts):
        raise ValueError(f"its counts are {_brief(counts)}, neither a string nor a list of whole numbers")
    return np.array(counts, dtype=np.int64) if counts else np.zeros(0, np.int64)


def _decoded_runs(counts: str) -> np.ndarray[Any, Any]:
    """Run lengths from COCO's string: groups of 5 bits, low ones first, each group but a number's last with bit 32 set;
    from the fourth number on differences to the number before the last one."""
    if not counts:
        return np.zeros(0, np.int64)
    groups = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    if int(groups.min()) < 0 or int(groups.max()) > 63 or groups[-1] & 32:
        raise ValueError("its counts are no string that COCO's encoding makes")
    ends = np.flatnonzero((groups & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if int((ends - starts).max()) > 6:  # of 7 groups and 35 bits; lengths have 32
        raise ValueError("its counts are no string that COCO's encoding makes")
    place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((groups & 31) << (5 * place), starts)
    negative = (groups[ends] & 16) != 0
    numbers[negative] -= np.int64(1) << (5 * (ends - starts + 1))[negative]
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return np.asarray(numbers)


class CocoPanoptic:
    """Images with panoptic segmentations, in COCO's panoptic format: a JSON file, and a directory of PNG files.

    A segment's id is the colour of its pixels, `R + 256 G + 65536 B`; in grey files of 8 or 16 bits and in files with a
    palette it may be the pixels' value instead.

    Args:
        annotations: the JSON file.
        images: directory of the images.
        segments: directory of the PNG files; by default named as the JSON file without its suffix.

    Raises:
        AnnotationError: naming file and id: at once for what the JSON file says; by :meth:`check` and at reading for
            images and PNG files.
    """

    def __init__(self, annotations: str | Path, images: str | Path, segments: str | Path | None = None) -> None:
        self.path, self.images = Path(annotations), Path(images)
        self.segments = Path(segments) if segments is not None else self.path.with_suffix("")
        content, self.fingerprint = _read_json(self.path, ("images", "annotations", "categories"))
        images_by_id = {
            e["id"]: e for e in _entries(self.path, content["images"], "image", ("id", "file_name", "height", "width"))
        }
        categories = _entries(self.path, content["categories"], "category", ("id", "name", "isthing"))
        self.label_names = tuple(str(c["name"]) for c in categories)
        self.stuff_labels = tuple(i for i, c in enumerate(categories) if not _flag(self.path, c, "category", "isthing"))
        self._label = {c["id"]: i for i, c in enumerate(categories)}
        self.entries = []
        wanted = ("image_id", "file_name", "segments_info")
        for annotation in _entries(self.path, content["annotations"], "annotation", wanted, "image_id", unique=False):
            if annotation["image_id"] not in images_by_id:
                raise AnnotationError(f"{self.path}: annotation of image {annotation['image_id']}: no such image")
            for segment in _entries(self.path, annotation["segments_info"], "segment", ("id", "category_id")):
                _known(self.path, {**segment, "image_id": annotation["image_id"]}, images_by_id, self._label)
                segment["iscrowd"] = _flag(self.path, segment, "segment", "iscrowd")
                if not isinstance(segment["id"], int):
                    raise AnnotationError(
                        f"{self.path}: annotation of image {annotation['image_id']}: expected segments with whole "
                        f"numbers as ids; got {_brief(segment['id'])}"
                    )
            self.entries.append((images_by_id[annotation["image_id"]], annotation))

    def __len__(self) -> int:
        return len(self.entries)

    def check(self, progress: Progress = iter) -> None:
        """Look at the head of every image and PNG file, without reading pixels.

        Args:
            progress: wraps the iteration over images, for a progress bar.

        Raises:
            AnnotationError: naming file and id.
        """
        for entry, annotation in progress(self.entries):
            _check_image(self.path, self.images, entry)
            path = self.segments / annotation["file_name"]
            try:
                with open_image(path) as file:
                    _check_id_image(file, path)
                    size = [file.height, file.width]
            except (OSError, ValueError) as error:
                raise AnnotationError(f"{self.path}: annotation of image {entry['id']}: {error}") from error
            self._check_size(path, entry, size)

    def __getitem__(self, index: int) -> Sample:
        sample = self.compact(index)
        segments, ids = self.entries[index][1]["segments_info"], sample["masks"].ids
        known = np.array([s["id"] for s in segments], dtype=np.int64)
        sample = {**sample, "masks": sample["masks"].dense(), "void": torch.from_numpy(~np.isin(ids, known))}
        crowds = [s for s in segments if s["iscrowd"]]
        if crowds:
            sample["crowd_labels"], masks = self._masks(crowds, ids)
            sample["crowd_masks"] = masks.dense()
        return sample

    def compact(self, index: int) -> dict[str, Any]:
        """The sample for training: its "masks" are :class:`Masks`, made when one is needed."""
        entry, annotation = self.entries[index]
        image = _read_pixels(self.path, self.images, entry)
        path = self.segments / annotation["file_name"]
        segments = [s for s in annotation["segments_info"] if not s["iscrowd"]]
        try:
            ids = _read_ids(path, [s["id"] for s in segments])
        except (OSError, ValueError) as error:
            raise AnnotationError(f"{self.path}: annotation of image {entry['id']}: {error}") from error
        self._check_size(path, entry, list(ids.shape))
        labels, masks = self._masks(segments, ids)
        return {"image": image, "labels": labels, "masks": masks}

    def _check_size(self, path: Path, entry: dict[str, Any], size: list[int]) -> None:
        if size != [entry["height"], entry["width"]]:
            raise AnnotationError(
                f"{path}: expected the size of image {entry['id']}, {[entry['height'], entry['width']]}; got {size}"
            )

    def _masks(self, segments: list[dict[str, Any]], ids: np.ndarray[Any, Any]) -> tuple[Tensor, _IdMap]:
        """Labels and masks of some segments of one image."""
        labels = torch.tensor([self._label[s["category_id"]] for s in segments], dtype=torch.int64, device="cpu")
        return labels, _IdMap(ids, [s["id"] for s in segments])


#: Pillow's modes of one channel.
_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")


def _check_id_image(file: Image.Image, path: Path) -> None:
    if file.mode not in (*_GREY, "P", "RGB", "RGBA"):
        raise ValueError(f"{path}: expected a PNG file whose colours are ids; got Pillow's mode {file.mode!r}")
    # Of channels of 16 bits Pillow keeps 8.
    if file.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in getattr(file, "tile", [])):
        raise ValueError(
            f"{path}: expected colours of 8 bits, which are ids; got 16 bits for each of red, green and blue"
        )


def _read_ids(path: Path, wanted: list[int]) -> np.ndarray[Any, Any]:
    """int [H, W], the ids of a PNG file, whichever way of writing them has pixels of all that are wanted."""
    with open_image(path) as file:
        _check_id_image(file, path)
        image = ImageOps.exif_transpose(file)
        image.load()
    mode = image.mode
    colours = np.array([1, 256, 65536])
    ways: list[np.ndarray[Any, Any]] = []
    if mode in ("RGB", "RGBA"):
        ways.append(np.asarray(image)[..., :3] @ colours)
    elif mode == "P":
        ways += [np.asarray(image.convert("RGB")) @ colours, np.asarray(image).astype(np.int64)]
    else:
        grey = np.asarray(image.getchannel(0) if mode == "LA" else image).astype(np.int64)
        ways += [grey, grey * int(colours.sum())]  # some programs write grey for colours of three equal parts
    absent: list[int] = []
    for ids in ways:
        found = set(np.unique(ids).tolist())
        missing = [x for x in wanted if x not in found]
        if not missing:
            return ids
        absent = absent or missing
    which = (
        "" if len(ways) == 1 else f" (a file of Pillow's mode {mode!r}: neither its colours nor its values are the ids)"
    )
    raise ValueError(f"{path}: expected pixels of every segment; segment {absent[0]} has none{which}")


def _read_json(path: Path, keys: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The content, in whatever encoding Unicode has, and a digest of it."""
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AnnotationError(f"{path}: expected JSON in UTF-8; {error}") from error
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise AnnotationError(f"{path}: expected lists {', '.join(keys)}; {', '.join(missing)} missing")
    return content, hashlib.sha256(data).hexdigest()[:16]


def _entries(
    path: Path, entries: Any, kind: str, keys: Sequence[str], name: str = "id", unique: bool = True
) -> list[dict[str, Any]]:
    """`entries`, after checking that each has all of `keys`; numbers written as strings become numbers."""
    if not isinstance(entries, list):
        raise AnnotationError(f"{path}: expected a list with a {kind} each; got {type(entries).__name__}")
    seen = set()
    for i, entry in enumerate(entries):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            known = entry.get(name) if isinstance(entry, dict) else None
            which = f"{kind} number {i}" if known is None else f"{kind} {known}"
            raise AnnotationError(f"{path}: {which}: expected {', '.join(keys)}; {', '.join(missing)} missing")
        for key in keys:
            value = entry[key]
            if key.endswith("id") and type(value) is not int:
                entry[key] = _id(path, f"{kind} number {i}", key, value)
            elif key in ("height", "width"):
                number = _integer(value)
                if number is None or number < 1:
                    raise AnnotationError(
                        f"{path}: {kind} {entry[name]}: expected a {key} of at least 1; got {_brief(value)}"
                    )
                entry[key] = number
            elif key == "file_name" and not isinstance(value, str):
                raise AnnotationError(f"{path}: {kind} {entry[name]}: expected a file_name; got {_brief(value)}")
        if unique:
            if entry[name] in seen:
                raise AnnotationError(f"{path}: {kind} {entry[name]}: expected different ids; two have this one")
            seen.add(entry[name])
    return list(entries)


def _integer(value: Any) -> int | None:
    """A whole number, also where it is written as 5.0 or "5"; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and str(int(value)) == value:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _id(path: Path, which: str, key: str, value: Any) -> int | str:
    """A number or a string; "5" and 5 are one id."""
    number = _integer(value)
    if number is None and not isinstance(value, str):
        raise AnnotationError(f"{path}: {which}: expected a number or a string as {key}; got {_brief(value)}")
    return value if number is None else number


def _flag(path: Path, entry: dict[str, Any], kind: str, key: str) -> bool:
    value = entry.get(key, 0)
    number = int(value) if isinstance(value, bool) else _integer(value)
    if number not in (0, 1):
        raise AnnotationError(f"{path}: {kind} {entry.get('id')}: expected 0 or 1 as {key}; got {_brief(value)}")
    return bool(number)


def _brief(value: Any) -> str:
    """What came, for one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known(path: Path, entry: dict[str, Any], images: Any, categories: Any) -> None:
    for key, known in (("image_id", images), ("category_id", categories)):
        if entry[key] not in known:
            raise AnnotationError(f"{path}: annotation {entry['id']}: {key} {entry[key]!r} is not in the file")


def _check_image(path: Path, directory: Path, entry: dict[str, Any]) -> None:
    try:
        height, width = image_size(directory / entry["file_name"])
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path}: image {entry['id']}: {error}") from error
    _check_image_size(path, entry, height, width)


def _check_image_size(path: Path, entry: dict[str, Any], height: int, width: int) -> None:
    if (height, width) != (entry["height"], entry["width"]):
        raise AnnotationError(
            f"{path}: image {entry['id']}: expected {entry['height']} x {entry['width']} pixels; "
            f"{entry['file_name']} has {height} x {width}"
        )


def _read_pixels(path: Path, directory: Path, entry: dict[str, Any]) -> Tensor:
    try:
        image = read_image(directory / entry["file_name"])
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path}: image {entry['id']}: {error}") from error
    _check_image_size(path, entry, image.height, image.width)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _without_empty(sample: Sample) -> Sample:
    keep = sample["masks"].flatten(1).any(1)
    return {"image": sample["image"], "labels": sample["labels"][keep], "masks": sample["masks"][keep]}


# ---------------------------------------------------------------- augmentation, batches, order


class _View(NamedTuple):
    """What large-scale jitter shows of an image: a window of the resized image, flipped or not."""

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

    Only what is left after cropping is ever made.

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


def _windows(sample: Mapping[str, Any], view: _View | None) -> Iterator[np.ndarray[Any, Any] | None]:
    """Of each mask what the view shows; all of it for None."""
    masks = sample["masks"]
    masks = masks if isinstance(masks, Masks) else _Dense(masks)
    height, width = sample["image"].shape[1:]
    return masks.window(*((np.arange(height), np.arange(width)) if view is None else view.indices(height, width)))


def _packed(sample: Mapping[str, Any], view: _View | None) -> Sample:
    """What the view shows of a sample (all of it for None), with eight pixels of a mask to a byte."""
    image = sample["image"] if view is None else view.of_image(sample["image"])
    height, width = image.shape[1:]
    packed = np.zeros((len(sample["masks"]), height, -(-width // 8)), np.uint8)
    kept: list[int] = []
    for i, window in enumerate(_windows(sample, view)):
        if window is not None and window.any():
            packed[len(kept)] = np.packbits(window, axis=1)
            kept.append(i)
    return {"image": image, "labels": sample["labels"][kept], PACKED: torch.from_numpy(packed[: len(kept)])}


#: The key of masks that are packed, uint8 [T, H, W / 8]: the first of eight pixels is a byte's highest bit.
PACKED = "packed_masks"
#: Bytes that unpacking takes beside its result.
_UNPACK_BYTES = 32 * 2**20


def unpack(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A target with "masks", bool [T, H, W], on the device of its packed ones; any other as it is."""
    if PACKED not in target:
        return dict(target)
    packed = target[PACKED]
    count, height, width = packed.shape
    bits = torch.tensor([1 << i for i in reversed(range(8))], dtype=torch.uint8, device=packed.device)
    masks = torch.empty(count, height, width, 8, dtype=torch.bool, device=packed.device)
    step = max(1, _UNPACK_BYTES // max(1, 8 * height * width))
    for part, out in zip(packed.split(step), masks.split(step), strict=True):
        torch.ne(part[..., None] & bits, 0, out=out)
    return {**{k: v for k, v in target.items() if k != PACKED}, "masks": masks.flatten(2)}


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
    pixels = torch.zeros(len(samples), 3, h, w, device="cpu")
    targets = []
    for i, sample in enumerate(samples):
        _, height, width = sample["image"].shape
        pixels[i, :, :height, :width] = normalise(sample["image"], mean, std)
        key, pixels_each = (PACKED, 8) if PACKED in sample else ("masks", 1)
        masks = F.pad(sample[key], (0, w // pixels_each - sample[key].shape[2], 0, h - height))
        targets.append({"labels": sample["labels"], key: masks})
    return pixels, targets


class Batches(torch.utils.data.Dataset[tuple[Tensor, list[dict[str, Tensor]]]]):
    """Training batches by step: a function of the seed and the step alone, so that a resumed run goes on exactly.

    Masks are packed, eight pixels to a byte: :func:`unpack` makes them bool, on whatever device.

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
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, device="cpu"))

    def __getitem__(self, step: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        first = (step * self.world_size + self.rank) * self.batch_size
        return collate([self._sample(first + i) for i in range(self.batch_size)], self.size, self.mean, self.std)

    def _sample(self, position: int) -> Sample:
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
        if self.size is None:
            return _packed(sample, None)
        generator = torch.Generator().manual_seed((self.seed + 1) * 1000003 + position)
        return _packed(sample, _View.draw(tuple(sample["image"].shape[1:]), self.size, self.scales, generator))


def _checked(sample: Mapping[str, Any], index: int, num_labels: int) -> Mapping[str, Any]:
    """A sample that is one, of a data set that may be anybody's."""
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
    """Batches for a process that prepares them: what is wrong with the data is handed over instead of raised there,
    where it would become a traceback of two processes."""

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
