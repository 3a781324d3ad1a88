"""Writes results to disk in COCO's formats, with the model's or the data's ids of images and categories."""

from __future__ import annotations

import colorsys
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from m2f_model.config import Mask2FormerConfig
from m2f_model.files import write_atomically
from m2f_model.labels import rows_of
from m2f_model.postprocess import Instances, Panoptic

TASKS = ("panoptic", "instance", "semantic")

Result = Panoptic | Instances | Tensor
Id = int | str


class Ids:
    """The ids of a data set's categories and images.

    Args:
        categories: of each of the model's labels.
        images: by file name.
        source: the name of the data in errors.

    Attributes:
        categories: as given.
    """

    def __init__(self, categories: Sequence[Id], images: dict[str, Id], source: str) -> None:
        self.categories, self._images, self._source = tuple(categories), images, source
        short = Counter(Path(name).name for name in images)
        self._short = {Path(name).name: i for name, i in images.items() if short[Path(name).name] == 1}

    @classmethod
    def read(cls, path: str | Path, config: Mask2FormerConfig) -> Ids:
        """From a JSON file of COCO's, whose categories are the model's by name.

        Raises:
            ValueError: the file is not in COCO's format, or lacks a category.
        """
        from m2f_model.coco import read_tables

        images, categories = read_tables(Path(path))
        names = config.label_names
        rows = rows_of(names or (), [str(c["name"]) for c in categories])
        missing = [name for name, row in zip(names or (), rows, strict=True) if row is None]
        if names is None or missing:
            raise ValueError(
                f"{path}: expected the model's categories by name; "
                + (f"{missing[0]} is missing" if missing else "the model does not name its own")
            )
        ids = [categories[row]["id"] for row in rows if row is not None]
        return cls(ids, {entry["file_name"]: entry["id"] for entry in images}, str(path))

    def of_image(self, path: Path) -> Id:
        """The id of an image, by the end of its path, or by its name alone where that is unique.

        Raises:
            ValueError: naming the image.
        """
        parts = path.parts
        for n in range(len(parts)):
            found = self._images.get("/".join(parts[n:]))
            if found is not None:
                return found
        if path.name not in self._short:
            raise ValueError(f"{path}: {self._source} has no image of that name")
        return self._short[path.name]


class Writer:
    """Writes one result after the other, and at the end the JSON file that lists them.

    Args:
        out: directory, made if it is not there.
        task: "panoptic", "instance" or "semantic".
        config: of the model, for the names of its labels.
        category_ids: of each label; by default the label itself.
    """

    def __init__(
        self, out: str | Path, task: str, config: Mask2FormerConfig, category_ids: Sequence[Id] | None = None
    ) -> None:
        self.out, self.task = Path(out), task
        self.names = list(config.label_names or map(str, range(config.num_labels)))
        self.ids: list[Any] = list(range(config.num_labels) if category_ids is None else category_ids)
        if task == "semantic" and not all(isinstance(i, int) and 0 <= i < 2**16 for i in self.ids):
            raise ValueError(
                f"category ids: expected numbers from 0 to 65535, which pixels can have; got {self.ids[:5]}"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        self.records: list[Any] = []

    def add(self, result: Result, name: str, image_id: Id, image: Image.Image | None = None) -> None:
        """Write one image's files, NAME.TASK.png, and an overlay where the image is given."""
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        records: list[dict[str, Any]]
        masks: Iterable[np.ndarray[Any, Any]]  # one at a time, if they do not exist yet
        if isinstance(result, Panoptic):
            ids = result.segment_ids.cpu().numpy()
            file_name = f"{name}.panoptic.png"
            colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
            _save(Image.fromarray(colours), self.out / file_name)
            segments = [
                {
                    "id": segment.id,
                    "category_id": self.ids[segment.label],
                    "isthing": int(not segment.is_stuff),
                    "score": round(segment.score, 6),
                    "area": int((ids == segment.id).sum()),
                    "bbox": _box(ids == segment.id),
                }
                for segment in result.segments
            ]
            records = [{"image_id": image_id, "file_name": file_name, "segments_info": segments}]
            labels = [segment.label for segment in result.segments]
            masks = (ids == segment.id for segment in result.segments)
        elif isinstance(result, Instances):
            masks = list(result.masks.cpu().numpy())
            labels = result.labels.tolist()
            records = [
                {
                    "image_id": image_id,
                    "category_id": self.ids[label],
                    "score": round(score, 6),
                    "segmentation": encode(mask),
                }
                for label, score, mask in zip(labels, result.scores.tolist(), masks, strict=True)
            ]
        else:
            found = result.cpu().numpy()
            file_name = f"{name}.semantic.png"
            table = np.array(self.ids, dtype=np.uint8 if max(self.ids) < 256 else np.uint16)
            _save(Image.fromarray(table[found]), self.out / file_name)
            labels, areas = (x.tolist() for x in np.unique(found, return_counts=True))
            segments = [{"category_id": self.ids[c], "area": a} for c, a in zip(labels, areas, strict=True)]
            records = [{"image_id": image_id, "file_name": file_name, "segments_info": segments}]
            masks = (found == label for label in labels)
        if image is not None:
            names = [self.names[label] for label in labels]
            _save(overlay(image, masks, labels, names), self.out / f"{name}.overlay.png")
        self.records += records

    def discard(self, name: str) -> None:
        """Remove the files of an image whose result could not be written completely."""
        for kind in (self.task, "overlay"):
            (self.out / f"{name}.{kind}.png").unlink(missing_ok=True)

    def finish(self) -> None:
        """Write TASK.json."""
        content: Any = self.records
        if self.task != "instance":
            categories = [{"id": i, "name": name} for i, name in zip(self.ids, self.names, strict=True)]
            content = {"annotations": self.records, "categories": categories}
        text = json.dumps(content, indent=1)
        write_atomically(self.out / f"{self.task}.json", lambda file: file.write(text.encode()))


# ---------------------------------------------------------------- pictures


def colour_of(label: int) -> np.ndarray[Any, Any]:
    """uint8 [3], a label's colour, the same in every picture: successive hues are a golden section apart."""
    return (255 * np.array(colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.75, 1.0))).astype(np.uint8)


def overlay(
    image: Image.Image,
    masks: Iterable[np.ndarray[Any, Any]],
    labels: Sequence[int],
    names: Sequence[str] | None = None,
) -> Image.Image:
    """The image with each mask [h, w] in the colour of its label, its outline, and its name where there are `names`."""
    pixels = np.array(image)
    places = []
    for mask, label in zip(masks, labels, strict=True):
        colour = colour_of(label)
        pixels[mask] = (0.5 * pixels[mask] + 0.5 * colour.astype(np.float32)).astype(np.uint8)
        inner = np.pad(mask, 1, mode="edge")
        inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        pixels[mask & ~inner] = colour
        places.append(_middle(mask))
    drawn = Image.fromarray(pixels)
    if names is not None:
        draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(max(10, min(image.size) // 40))
        for place, name in zip(places, names, strict=True):
            if place is not None:
                draw.text(place, name, fill="white", font=font, anchor="mm", stroke_width=1, stroke_fill="black")
    return drawn


def _middle(mask: np.ndarray[Any, Any]) -> tuple[int, int] | None:
    """(x, y) of the pixel of the mask that is nearest to its centre of mass; None for an empty one."""
    y, x = mask.nonzero()
    if not len(y):
        return None
    nearest = int(((y - y.mean()) ** 2 + (x - x.mean()) ** 2).argmin())
    return int(x[nearest]), int(y[nearest])


def encode(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    """COCO's run-length encoding of a bool mask [h, w]."""
    from pycocotools.mask import encode as rle

    found = rle(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": found["size"], "counts": found["counts"].decode("ascii")}


def _box(mask: np.ndarray[Any, Any]) -> list[int]:
    """[x, y, width, height]; zeros for an empty mask."""
    if not mask.any():
        return [0, 0, 0, 0]
    y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]


def _save(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda file: image.save(file, format="png"))
