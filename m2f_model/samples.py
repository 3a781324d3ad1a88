"""Samples of a data set, with masks that are made when they are read, and what errors say of wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Sample = dict[str, Tensor]
#: Wraps an iteration, for a progress bar.
Progress = Callable[[list[Any]], Iterable[Any]]


class AnnotationError(ValueError):
    """Annotations that cannot be used: the message names the file, the entry's id, and what is wrong with it."""


def describe(value: object) -> str:
    """Text of a value for error messages: of a tensor its dtype, shape and device."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


class Masks:
    """Masks of one image, each computed when it is read.

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


class DenseMasks(Masks):
    def __init__(self, masks: Tensor) -> None:
        super().__init__(*masks.shape[1:])
        self._masks = masks

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        return (self._masks[index] != 0).numpy()


class RunLengths(Masks):
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


class IdMap(Masks):
    """The masks of some ids in a map of ids [H, W]."""

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


def without_empty(sample: Sample) -> Sample:
    keep = sample["masks"].flatten(1).any(1)
    return {"image": sample["image"], "labels": sample["labels"][keep], "masks": sample["masks"][keep]}
