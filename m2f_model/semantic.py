"""Semantic data: images with label maps, whose pixels are numbers of classes, in any or in published layouts."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2f_model.files import image_size, open_image, read_image
from m2f_model.labels import DATASETS
from m2f_model.samples import AnnotationError, IdMap, Progress, Sample

#: Suffixes of images.
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}

#: Cityscapes' ids of its 19 labels, in their order.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class SemanticMaps:
    """Images with a label map each, a PNG file of one channel (8 or 16 bits) or with a palette, whose indices count.

    Args:
        pairs: path of each image and of its map.
        root: directory; errors and ids contain paths below it.
        label_names: of the classes, in order.
        ignore_label: value of ignored pixels.
        reduce_labels: value 0 is ignored, too, and the first class has the value 1, as in ADE20K.
        values: of the classes, if they are not 0, 1, ...; all other values of `known` are ignored.
        known: values that may occur, besides those of the classes.
        stuff_labels: by default all.

    Attributes:
        category_ids: the value of each class.
        class_counts: pixels of each class, after :meth:`check`.

    Raises:
        ValueError: bad input; the message names the argument.
        AnnotationError: by :meth:`check` and at reading, naming the file.
    """

    semantic = True
    class_counts: list[int] | None = None

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        root: str | Path,
        label_names: Sequence[str],
        *,
        ignore_label: int = 255,
        reduce_labels: bool = False,
        values: Sequence[int] | None = None,
        known: Sequence[int] = (),
        stuff_labels: Sequence[int] | None = None,
    ) -> None:
        self.pairs, self.root = list(pairs), Path(root)
        self.label_names = tuple(label_names)
        if not self.label_names:
            raise ValueError("labels: expected the names of at least one class; got none")
        count = len(self.label_names)
        self.stuff_labels = tuple(range(count) if stuff_labels is None else stuff_labels)
        first = int(reduce_labels)
        self.category_ids = tuple(range(first, first + count) if values is None else values)
        if not 0 <= ignore_label < 2**16:
            raise ValueError(f"ignore_label: expected 0 to 65535; got {ignore_label}")
        if ignore_label in self.category_ids:
            name = self.label_names[self.category_ids.index(ignore_label)]
            raise ValueError(f"ignore_label: expected no value of a class; {ignore_label} is that of {name!r}")
        self._ignored = ignore_label
        table = np.full(2**16, _UNKNOWN, np.int32)
        table[[ignore_label, *known, *([0] if reduce_labels else [])]] = -1
        table[list(self.category_ids)] = np.arange(count)
        self._table = table
        digest = hashlib.sha256(repr((self.category_ids, ignore_label)).encode())
        for image, labels in self.pairs:
            digest.update(f"{self._name(image)} {labels.stat().st_size}".encode())
        self.fingerprint = digest.hexdigest()[:16]

    @classmethod
    def from_directories(
        cls, images: str | Path, annotations: str | Path, label_names: Sequence[str], **options: Any
    ) -> SemanticMaps:
        """Maps in `annotations` and images in `images`, in the same folders and of the same names but for the suffix.

        Raises:
            AnnotationError: where a map has no image, or there is none.

        Warns:
            UserWarning: where images have no map; they are left out.
        """
        images, annotations = Path(images), Path(annotations)
        for directory in (images, annotations):
            if not directory.is_dir():
                raise AnnotationError(f"{directory}: expected a directory")
        maps = sorted(p for p in annotations.rglob("*.png") if p.is_file())
        by_name: dict[str, Path] = {}
        for path in sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGES and p.is_file()):
            by_name.setdefault(path.relative_to(images).with_suffix("").as_posix(), path)
        names = [path.relative_to(annotations).with_suffix("").as_posix() for path in maps]
        missing = [path for path, name in zip(maps, names, strict=True) if name not in by_name]
        if missing:
            raise AnnotationError(f"{missing[0]}: no image of that name in {images}")
        if not maps:
            raise AnnotationError(f"{annotations}: expected label maps, PNG files; there is none")
        left = sorted(set(by_name) - set(names))
        if left:
            warnings.warn(f"{images}: {len(left)} images have no label map and are left out ({left[0]})", stacklevel=2)
        return cls([(by_name[n], p) for n, p in zip(names, maps, strict=True)], images, label_names, **options)

    @classmethod
    def ade20k(cls, root: str | Path, split: str = "train") -> SemanticMaps:
        """ADE20K's scene parsing data (ADEChallengeData2016): images/training, annotations/training, .../validation."""
        folder = {"train": "training", "validation": "validation"}[split]
        known = DATASETS["ade20k-semantic"]
        images, annotations = (Path(root) / kind / folder for kind in ("images", "annotations"))
        return cls.from_directories(images, annotations, known.names, reduce_labels=True, stuff_labels=known.stuff)

    @classmethod
    def cityscapes(cls, root: str | Path, split: str = "train") -> SemanticMaps:
        """Cityscapes' layout: leftImg8bit/train/CITY/X_leftImg8bit.png, gtFine/train/CITY/X_gtFine_labelIds.png.

        Maps are those of labelIds, or of labelTrainIds if only these exist.
        """
        folder = Path(root) / "leftImg8bit" / {"train": "train", "validation": "val"}[split]
        if not folder.is_dir():
            raise AnnotationError(f"{folder}: expected a directory")
        images = sorted(folder.glob("*/*_leftImg8bit.png"))
        if not images:
            raise AnnotationError(f"{folder}: expected CITY/*_leftImg8bit.png; there is none")
        known = DATASETS["cityscapes-semantic"]
        gt = Path(root) / "gtFine" / folder.name

        def maps_of(kind: str) -> list[Path]:
            return [gt / p.parent.name / p.name.replace("leftImg8bit", f"gtFine_{kind}") for p in images]

        maps, values = maps_of("labelIds"), list(CITYSCAPES_IDS)
        if not maps[0].is_file() and maps_of("labelTrainIds")[0].is_file():
            maps, values = maps_of("labelTrainIds"), list(range(19))
        absent = next((path for path in maps if not path.is_file()), None)
        if absent is not None:
            raise AnnotationError(f"{absent}: no such file")
        pairs = list(zip(images, maps, strict=True))
        known_ids = range(34) if len(values) < max(values) else ()
        return cls(pairs, folder, known.names, values=values, known=tuple(known_ids), stuff_labels=known.stuff)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def images_of_data(self) -> list[tuple[Any, str]]:
        """The id of each image, its path below the directory without suffix, and the path."""
        return [(Path(self._name(p)).with_suffix("").as_posix(), self._name(p)) for p, _ in self.pairs]

    def check(self, progress: Progress = iter) -> None:
        """Look at the head of every image, and at every pixel of the maps.

        Args:
            progress: wraps the iteration over images, for a progress bar.

        Raises:
            AnnotationError: naming the file.
        """
        pixels = torch.zeros(len(self.label_names), dtype=torch.int64, device="cpu")
        for image, path in progress(self.pairs):
            labels = self._read(image, path, None)
            pixels += torch.bincount(labels[labels >= 0].flatten(), minlength=len(self.label_names))
        self.class_counts = pixels.tolist()

    def __getitem__(self, index: int) -> Sample:
        sample = self.compact(index)
        void = torch.from_numpy(sample["masks"].ids < 0)
        return {**sample, "masks": sample["masks"].dense(), "void": void}

    def compact(self, index: int) -> dict[str, Any]:
        """The sample for training, a mask for each class that occurs; its "masks" are made when one is needed."""
        image, path = self.pairs[index]
        try:
            pixels = torch.from_numpy(np.array(read_image(image))).permute(2, 0, 1).contiguous()
        except OSError as error:
            raise AnnotationError(f"{image}: {error}") from error
        except ValueError as error:
            raise AnnotationError(str(error)) from error
        labels = self._read(image, path, tuple(pixels.shape[1:]))
        found = labels.unique()
        found = found[found >= 0]
        return {"image": pixels, "labels": found, "masks": IdMap(labels.numpy(), found.tolist())}

    def values_to_labels(self, values: np.ndarray[Any, Any]) -> Tensor:
        """The labels of values of pixels, int64; -1 for ignored ones."""
        return torch.from_numpy(self._table[values].clip(min=-1).astype(np.int64))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _read(self, image: Path, path: Path, size: tuple[int, ...] | None) -> Tensor:
        """int64 [H, W], labels; -1 where there is none."""
        try:
            values = read_values(path)
            size = image_size(image) if size is None else size
        except OSError as error:
            raise AnnotationError(f"{path}: {error}") from error
        except ValueError as error:
            raise AnnotationError(str(error)) from error
        if values.shape != size:
            raise AnnotationError(f"{path}: expected the size of {image.name}, {list(size)}; got {list(values.shape)}")
        labels = self._table[values]
        if labels.size and int(labels.min()) == _UNKNOWN:
            odd = values[labels == _UNKNOWN]
            first, last = min(self.category_ids), max(self.category_ids)
            raise AnnotationError(
                f"{path}: expected values from {first} to {last}, those of {len(self.label_names)} classes, or the "
                f"ignored {self._ignored}; got {int(odd[0])} ({len(odd)} pixels)"
            )
        return torch.from_numpy(labels.astype(np.int64))


#: In tables of values: a value that must not occur.
_UNKNOWN = -2


def read_values(path: str | Path) -> np.ndarray[Any, Any]:
    """int [H, W], the values of a label map's pixels: of grey files of 8 or 16 bits, or the indices of a palette.

    Raises:
        ValueError: naming the file, where it is no image of one channel.
    """
    with open_image(path) as file:
        if file.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L", "I;16N"):
            raise ValueError(
                f"{path}: expected a label map of one channel or with a palette; got Pillow's mode {file.mode!r}"
            )
        values = np.array(file).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() < 2**16:
        raise ValueError(f"{path}: expected values from 0 to 65535; got {values.min()} to {values.max()}")
    return values


def read_names(text: str) -> list[str]:
    """Names of classes, from a text file with one in each line, or with commas between.

    Raises:
        ValueError: where there is none.
    """
    path = Path(text)
    is_file = path.suffix == ".txt" or path.is_file()
    lines = path.read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"labels: expected names of classes; none in {text!r}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"labels: expected different names; {twice!r} is there twice")
    return names
