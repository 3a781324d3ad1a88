"""Reads COCO's instance and panoptic formats. Errors name the file and the entry's id."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from m2f_model.files import image_size, open_image, read_image
from m2f_model.samples import AnnotationError, IdMap, Masks, Progress, RunLengths, Sample, without_empty


class CocoInstances:
    """Images with instances, in COCO's instance format. Crowds are no targets.

    Args:
        annotations: the JSON file.
        images: directory of the images.

    Raises:
        AnnotationError: naming file and id. Ids, categories and sizes in the JSON file are checked at once, images and
            masks by :meth:`check` and when they are read.
    """

    stuff_labels: tuple[int, ...] = ()

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.path, self.images = Path(annotations), Path(images)
        content, self.fingerprint = _read_json(self.path, ("images", "annotations", "categories"))
        self.entries = _entries(self.path, content["images"], "image", ("id", "file_name", "height", "width"))
        categories = _entries(self.path, content["categories"], "category", ("id", "name"))
        self.label_names = tuple(str(c["name"]) for c in categories)
        self.category_ids = tuple(c["id"] for c in categories)
        self._label = {c["id"]: i for i, c in enumerate(categories)}
        known = {entry["id"] for entry in self.entries}
        self._order: dict[Any, list[tuple[dict[str, Any], bool]]] = defaultdict(list)
        self._annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        self._crowds: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        wanted = ("id", "image_id", "category_id", "segmentation")
        for annotation in _entries(self.path, content["annotations"], "annotation", wanted, unique=False):
            _known(self.path, annotation, known, self._label)
            crowd = _flag(self.path, annotation, "annotation", "iscrowd")
            (self._crowds if crowd else self._annotations)[annotation["image_id"]].append(annotation)
            self._order[annotation["image_id"]].append((annotation, crowd))

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
        sample = without_empty({**sample, "masks": sample["masks"].dense()})
        if entry["id"] in self._crowds:
            sample["crowd_labels"], crowds = self._segments(self._crowds[entry["id"]], height, width)
            sample["crowd_masks"] = crowds.dense()
        return sample

    @property
    def images_of_data(self) -> list[tuple[Any, str]]:
        """The id and the file name of each image."""
        return [(entry["id"], entry["file_name"]) for entry in self.entries]

    @property
    def class_counts(self) -> list[int]:
        """Annotations of each label, without crowds."""
        found = Counter(self._label[a["category_id"]] for of_image in self._annotations.values() for a in of_image)
        return [found[i] for i in range(len(self.label_names))]

    def truth(self, index: int) -> list[dict[str, Any]]:
        """The annotations of an image, in the file's order: label, run lengths, area, and whether it is a crowd."""
        entry = self.entries[index]
        found = []
        for annotation, crowd in self._order.get(entry["id"], ()):
            encoded = self._encode(annotation, entry["height"], entry["width"])
            area = annotation.get("area")
            found.append({"label": self._label[annotation["category_id"]], "segmentation": encoded, "iscrowd": crowd})
            if isinstance(area, (int, float)) and not isinstance(area, bool):
                found[-1]["area"] = area
        return found

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
        return torch.tensor(labels, dtype=torch.int64, device="cpu"), RunLengths(encoded, height, width)

    def _encode(self, annotation: dict[str, Any], height: int, width: int, check_only: bool = False) -> Any:
        """Compressed run lengths of a segmentation, checked before pycocotools gets it, which checks nothing."""
        try:
            return encode_checked(annotation["segmentation"], height, width, check_only)
        except Exception as error:  # whatever comes of whatever was given
            raise AnnotationError(
                f"{self.path}: annotation {annotation['id']}: expected polygons or a run-length encoding; {error}"
            ) from error


def encode_checked(segmentation: Any, height: int, width: int, check_only: bool = False) -> Any:
    """Compressed run lengths of polygons or run lengths; None if they are only checked.

    Raises:
        ValueError: saying what is wrong; other errors may come of what is not JSON of COCO's at all.
    """
    from pycocotools import mask as coco

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
    if len(runs) == 0 or int(runs.min()) < 0 or int(runs.max()) > height * width or runs.sum() != height * width:
        raise ValueError(
            f"its run lengths add up to {sum(runs.tolist())}; the image has {height * width} pixels, {height} x {width}"
        )
    if check_only:
        return None
    whole = {"size": [height, width], "counts": counts if isinstance(counts, str) else runs.tolist()}
    return whole if isinstance(counts, str) else coco.frPyObjects(whole, height, width)


#: How far outside the image a polygon's coordinate may lie, in larger sides of the image.
_FAR = 10


def _polygons(polygons: list[Any], height: int, width: int) -> list[list[float]]:
    """`polygons`, after checking that they are near the image, so that rasterising them is cheap."""
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
        AnnotationError: naming file and id. The JSON file is checked at once, images and PNG files by :meth:`check` and
            when they are read.
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
        self.category_ids = tuple(c["id"] for c in categories)
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

    @property
    def images_of_data(self) -> list[tuple[Any, str]]:
        """The id and the file name of each image."""
        return [(entry["id"], entry["file_name"]) for entry, _ in self.entries]

    @property
    def class_counts(self) -> list[int]:
        """Segments of each label, without crowds."""
        segments = (s for _, annotation in self.entries for s in annotation["segments_info"] if not s["iscrowd"])
        found = Counter(self._label[s["category_id"]] for s in segments)
        return [found[i] for i in range(len(self.label_names))]

    def compact(self, index: int) -> dict[str, Any]:
        """The sample for training: its "masks" are :class:`Masks`, made when one is needed."""
        entry, annotation = self.entries[index]
        image = _read_pixels(self.path, self.images, entry)
        path = self.segments / annotation["file_name"]
        segments = [s for s in annotation["segments_info"] if not s["iscrowd"]]
        try:
            ids = read_ids(path, [s["id"] for s in segments])
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

    def _masks(self, segments: list[dict[str, Any]], ids: np.ndarray[Any, Any]) -> tuple[Tensor, IdMap]:
        """Labels and masks of some segments of one image."""
        labels = torch.tensor([self._label[s["category_id"]] for s in segments], dtype=torch.int64, device="cpu")
        return labels, IdMap(ids, [s["id"] for s in segments])


#: Pillow's modes of one channel.
_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")


def _check_id_image(file: Image.Image, path: Path) -> None:
    if file.mode not in (*_GREY, "P", "RGB", "RGBA"):
        raise ValueError(f"{path}: expected a PNG file whose colours are ids; got Pillow's mode {file.mode!r}")
    # Pillow keeps 8 bits of 16-bit colour channels.
    if file.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in getattr(file, "tile", [])):
        raise ValueError(
            f"{path}: expected colours of 8 bits, which are ids; got 16 bits for each of red, green and blue"
        )


def read_ids(path: Path, wanted: list[int]) -> np.ndarray[Any, Any]:
    """The ids of a PNG file, int [H, W], read as colours or as values: the way in which all wanted ids occur."""
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


def read_tables(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Images and categories of any JSON file of COCO's.

    Raises:
        AnnotationError: naming the file.
    """
    content, _ = _read_json(path, ("images", "categories"))
    images = _entries(path, content["images"], "image", ("id", "file_name"))
    return images, _entries(path, content["categories"], "category", ("id", "name"))


def _read_json(path: Path, keys: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The content, in any encoding of Unicode, and a digest of it."""
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
    """The repr of a value, cut to 60 characters for an error of one line."""
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
