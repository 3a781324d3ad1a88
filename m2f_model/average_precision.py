"""COCO's average precision of masks, by COCO's own code (pycocotools)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Precision(NamedTuple):
    """Average precision over thresholds of intersection over union from 0.5 to 0.95, at 0.5, at 0.75, and for small,
    medium and large instances; None where there are none to find."""

    ap: float | None
    ap50: float | None
    ap75: float | None
    small: float | None
    medium: float | None
    large: float | None


class PrecisionCounts:
    """True and predicted instances, by image.

    Args:
        num_labels: number of labels; a label is less than this.
    """

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        self._images: dict[Any, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}

    def add(self, image: Any, truth: Iterable[Mapping[str, Any]], found: Iterable[Mapping[str, Any]]) -> None:
        """Add the instances of one image.

        Args:
            image: its id. Of results with equal scores those of the image with the smallest id count first, as in COCO.
            truth: for each "label", "segmentation" (run lengths), "iscrowd", and "area" if the data state it.
            found: for each "label", "score", "segmentation".
        """
        self._images[image] = (list(map(dict, truth)), list(map(dict, found)))

    def quality(self) -> tuple[Precision, list[float | None]]:
        """The average precision over all labels, and that of each label."""
        from pycocotools import mask as coco
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        numbers = all(isinstance(i, int) for i in self._images)
        order = sorted(self._images) if numbers else sorted(self._images, key=str)
        keys = {image: image if numbers else k for k, image in enumerate(order)}
        annotations: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        for image in order:
            truth, found = self._images[image]
            for target in truth:
                area = target.get("area", float(coco.area(_compressed(target["segmentation"]))))
                entry = {"image_id": keys[image], "category_id": target["label"] + 1, "area": area}
                # COCO's code treats an annotation with the id 0 as none.
                entry |= {"id": len(annotations) + 1, "iscrowd": int(target["iscrowd"])}
                annotations.append({**entry, "segmentation": _compressed(target["segmentation"])})
            for result in found:
                segmentation = _compressed(result["segmentation"])
                entry = {"image_id": keys[image], "category_id": result["label"] + 1, "score": result["score"]}
                results.append({**entry, "segmentation": segmentation})
        categories = [{"id": i + 1, "name": str(i)} for i in range(self.num_labels)]
        with contextlib.redirect_stdout(io.StringIO()):
            tables = COCO()
            images = [{"id": keys[image], **self._size(image)} for image in order]
            tables.dataset = {"images": images, "annotations": annotations, "categories": categories}
            tables.createIndex()
            if results:
                guesses = tables.loadRes(results)
            else:  # loadRes wants at least one
                guesses = COCO()
                guesses.dataset = {"images": images, "annotations": [], "categories": categories}
                guesses.createIndex()
            judge = COCOeval(tables, guesses, "segm")
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        precision = judge.eval["precision"]  # [thresholds, recalls, labels, areas, limits]
        each = [_mean(precision[:, :, k, 0, -1]) for k in range(self.num_labels)]
        return Precision(*(None if x < 0 else float(x) for x in judge.stats[:6])), each

    def _size(self, image: Any) -> dict[str, int]:
        """COCO's code wants it where there is a mask."""
        masks = [entry["segmentation"] for part in self._images[image] for entry in part]
        return dict(zip(("height", "width"), masks[0]["size"], strict=True)) if masks else {}


def _compressed(segmentation: Mapping[str, Any]) -> Mapping[str, Any]:
    from pycocotools import mask as coco

    if isinstance(segmentation["counts"], Sequence) and not isinstance(segmentation["counts"], (str, bytes)):
        found: Mapping[str, Any] = coco.frPyObjects(dict(segmentation), *segmentation["size"])
        return found
    return segmentation


def _mean(values: np.ndarray[Any, Any]) -> float | None:
    there = values[values > -1]
    return float(there.mean()) if there.size else None
