"""A model, or results on disk, measured on data: panoptic quality, average precision, intersection over union."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2f_model import postprocess
from m2f_model.average_precision import PrecisionCounts
from m2f_model.coco import encode_checked, read_ids
from m2f_model.config import Mask2FormerConfig
from m2f_model.data import Dataset, DatasetOfFiles
from m2f_model.evaluate import PanopticCounts, SemanticCounts, label_map, predictions
from m2f_model.labels import rows_of, same_labels
from m2f_model.model import Mask2Former
from m2f_model.postprocess import Instances, Panoptic, Segment
from m2f_model.results import Writer, encode
from m2f_model.samples import Sample
from m2f_model.semantic import read_values

#: Each metric, and the kind of results that it measures.
METRICS = {"pq": "panoptic", "ap": "instance", "miou": "semantic"}


class Report(NamedTuple):
    """The measured metrics.

    Attributes:
        images: their number.
        values: by metric and part of the classes, the figures by name; None if there is nothing to measure.
        classes: by metric, the figures of each class that occurs.
    """

    images: int
    values: dict[str, dict[str, dict[str, float | None]]]
    classes: dict[str, dict[str, dict[str, float | None]]]

    def to_json(self) -> str:
        """The report as JSON."""
        found = {k: {**self.values[k], "classes": self.classes[k]} for k in self.values}
        return json.dumps({"images": self.images, **found}, indent=1) + "\n"


def metrics_of(data: Dataset, wanted: Collection[str] | None = None) -> tuple[str, ...]:
    """The metrics that data can be measured by: all of them for panoptic data, two for instances, one for label maps.

    Raises:
        ValueError: other metrics are wanted.
    """
    if getattr(data, "semantic", False):
        possible: tuple[str, ...] = ("miou",)
    elif hasattr(data, "truth"):
        possible = ("ap", "pq")
    else:
        possible = ("pq", "ap", "miou")
    odd = [name for name in wanted or () if name not in possible]
    if odd or (wanted is not None and not wanted):
        raise ValueError(
            f"metrics: expected some of {', '.join(possible)} for these data; got {', '.join(odd) or 'none'}"
        )
    return possible if wanted is None else tuple(name for name in possible if name in wanted)


class Scorer:
    """Counts results of `data`, of one image after the other.

    Args:
        data: samples with the ground truth.
        metrics: of :data:`METRICS`.
    """

    def __init__(self, data: Dataset, metrics: Sequence[str]) -> None:
        self.data, self.metrics = data, tuple(metrics)
        count = len(data.label_names)
        self.panoptic, self.semantic = PanopticCounts(count), SemanticCounts(count)
        self.precision = PrecisionCounts(count)
        self.images = 0

    def add(
        self,
        index: int,
        sample: Sample,
        panoptic: Panoptic | None = None,
        instances: Iterable[Mapping[str, Any]] | None = None,
        semantic: Tensor | None = None,
    ) -> None:
        """Count the results of one image.

        Args:
            index: of the sample.
            sample: itself.
            panoptic, semantic: results at the image's size, with the data's labels.
            instances: for each "label", "score", "segmentation" (run lengths).
        """
        self.images += 1
        if panoptic is not None:
            self.panoptic.add(panoptic, sample)
        if semantic is not None:
            self.semantic.add(semantic, label_map(sample))
        if instances is not None:
            truth = self.data.truth(index) if hasattr(self.data, "truth") else _things(sample, self.data.stuff_labels)
            names = getattr(self.data, "images_of_data", None)
            self.precision.add(index if names is None else names[index][0], truth, instances)

    def report(self) -> Report:
        """The metrics of the samples added so far."""
        names, stuff = self.data.label_names, set(self.data.stuff_labels)
        values: dict[str, Any] = {}
        classes: dict[str, Any] = {}
        if "pq" in self.metrics:
            parts: dict[str, Sequence[int]] = {"all": range(len(names))}
            if 0 < len(stuff) < len(names):
                parts |= {"things": [i for i in parts["all"] if i not in stuff], "stuff": sorted(stuff)}
            values["pq"] = {part: self.panoptic.quality(labels)._asdict() for part, labels in parts.items()}
            each = self.panoptic.qualities()
            classes["pq"] = {n: q._asdict() for n, q in zip(names, each, strict=True) if q is not None}
        if "ap" in self.metrics:
            precision, per_label = self.precision.quality()
            values["ap"] = {"all": precision._asdict()}
            classes["ap"] = {n: {"ap": x} for n, x in zip(names, per_label, strict=True) if x is not None}
        if "miou" in self.metrics:
            values["miou"] = {"all": self.semantic.quality()._asdict()}
            ious = self.semantic.ious()
            classes["miou"] = {n: {"iou": x} for n, x in zip(names, ious, strict=True) if x is not None}
        return Report(self.images, values, classes)


def _things(sample: Sample, stuff: Collection[int]) -> list[dict[str, Any]]:
    """The instances of a panoptic sample."""
    found = []
    for kind, crowd in (("", False), ("crowd_", True)):
        pairs = zip(sample.get(f"{kind}labels", ()), sample.get(f"{kind}masks", ()), strict=True)
        found += [
            {"label": int(label), "segmentation": encode(mask.numpy()), "iscrowd": crowd}
            for label, mask in pairs
            if int(label) not in stuff
        ]
    return found


# ---------------------------------------------------------------- models


def labels_of_model(model: Mask2Former, data: Dataset) -> list[int]:
    """For each label of the model the data's label of the same name; -1 for those that the data lack.

    Raises:
        ValueError: the model lacks one of the data's labels.
    """
    ours, theirs = model.config.label_names, tuple(data.label_names)
    if ours is None or same_labels(ours, theirs):
        if model.config.num_labels != len(theirs):
            raise ValueError(f"data: expected {model.config.num_labels} labels, the model's; got {len(theirs)}")
        return list(range(len(theirs)))
    rows = rows_of(theirs, ours)
    missing = [name for name, row in zip(theirs, rows, strict=True) if row is None]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"data: expected labels that the model knows; it has no {missing[0]!r}{more}")
    return [rows.index(i) if i in rows else -1 for i in range(len(ours))]


def config_of_data(config: Mask2FormerConfig, data: Dataset) -> Mask2FormerConfig:
    """`config` with the labels of `data`, as results that are written have them."""
    names = tuple(data.label_names)
    return replace(config, num_labels=len(names), label_names=names, stuff_labels=tuple(data.stuff_labels))


def score_model(
    model: Mask2Former,
    data: Dataset,
    scorer: Scorer,
    *,
    indices: Iterable[int],
    writers: Mapping[str, Writer] | None = None,
    threshold: float = 0.8,
    batch_size: int = 1,
    image_size: tuple[int, int] | None = None,
) -> None:
    """Lets `scorer` count the results of `model` on samples of `data`, processed as in the published test.

    Args:
        model: left in the mode that it was in.
        data: with labels that the model knows.
        scorer: of the same data.
        indices: which samples.
        writers: by task, where results are written too.
        threshold: of panoptic segments; published: 0.8.
        batch_size, image_size: see :func:`m2f_model.evaluate.predictions`.
    """
    table = labels_of_model(model, data)
    stuff = {label for label, of_data in enumerate(table) if of_data in data.stuff_labels}
    if -1 in table and model.config.stuff_labels is not None:
        stuff |= {label for label in model.config.stuff_labels if table[label] < 0}
    if -1 in table and "semantic" in (writers or {}):
        raise ValueError("semantic results: expected a model of the data's labels alone, to be written")
    lookup = torch.tensor(table, device="cpu")
    names = getattr(data, "images_of_data", None) or [(i, str(i)) for i in range(len(data))]
    tasks = {METRICS[metric] for metric in scorer.metrics}
    for batch in predictions(model, data, indices, batch_size, image_size):
        found: dict[str, list[Any]] = {}
        if "panoptic" in tasks:
            results = postprocess.panoptic(batch.output, batch.frames, stuff_labels=stuff, threshold=threshold)
            found["panoptic"] = [_relabelled(x, table) for x in results]
        if "instance" in tasks:
            instances = postprocess.instance(batch.output, batch.frames, stuff_labels=stuff)
            found["instance"] = [_kept(x, lookup) for x in instances]
        if "semantic" in tasks:
            maps = postprocess.semantic(batch.output, batch.frames, resize_scores=model.config.semantic_only)
            found["semantic"] = [lookup[x.cpu()] for x in maps]
        for k, (index, sample) in enumerate(zip(batch.indices, batch.samples, strict=True)):
            image_id, name = names[index]
            mine = {task: results[k] for task, results in found.items()}
            scorer.add(
                index,
                sample,
                panoptic=mine.get("panoptic"),
                instances=_encoded(mine["instance"]) if "instance" in mine else None,
                semantic=mine.get("semantic"),
            )
            for task, writer in (writers or {}).items():
                writer.add(mine[task], Path(name).with_suffix("").as_posix(), image_id)


def _relabelled(found: Panoptic, table: Sequence[int]) -> Panoptic:
    """With the data's labels; segments of others are no segments."""
    ids = found.segment_ids.cpu()
    segments = [s._replace(label=table[s.label]) for s in found.segments if table[s.label] >= 0]
    if len(segments) < len(found.segments):
        keep = torch.zeros(1 + len(found.segments), dtype=ids.dtype, device="cpu")
        kept = torch.tensor([s.id for s in segments], dtype=torch.int64, device="cpu")
        keep[kept] = kept.to(ids.dtype)
        ids = keep[ids.long()]
    return Panoptic(ids, segments)


def _kept(found: Instances, lookup: Tensor) -> Instances:
    labels = lookup[found.labels.cpu()]
    keep = labels >= 0
    return Instances(labels[keep], found.scores.cpu()[keep], found.masks.cpu()[keep])


def _encoded(found: Instances) -> list[dict[str, Any]]:
    return [
        # Rounded as they are written, so that scoring the file gives the same figures.
        {"label": label, "score": round(score, 6), "segmentation": encode(mask)}
        for label, score, mask in zip(found.labels.tolist(), found.scores.tolist(), found.masks.numpy(), strict=True)
    ]


# ---------------------------------------------------------------- results on disk


class ResultsError(ValueError):
    """Results that cannot be scored: the message names the file and what is wrong with it."""


def score_results(
    data: DatasetOfFiles,
    results: Mapping[str, Path],
    scorer: Scorer,
    indices: Sequence[int],
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> None:
    """Lets `scorer` count results on disk for samples of `data`, in COCO's formats with the data's own ids.

    Args:
        data: the data set that they belong to.
        results: for each task of the scorer's metrics the JSON file.
        scorer: of the same data.
        indices: which samples.
        progress: wraps the iteration over them.

    Raises:
        ResultsError: naming file and image.
    """
    readers: dict[str, Callable[[int, Sample], Any]] = {}
    for task in {METRICS[metric] for metric in scorer.metrics}:
        readers[task] = _READERS[task](data, results[task], indices)
    for index in progress(indices):
        sample = data[index]
        found = {task: read(index, sample) for task, read in readers.items()}
        scorer.add(index, sample, found.get("panoptic"), found.get("instance"), found.get("semantic"))


def find_results(path: Path, metrics: Sequence[str], *, all_of_them: bool) -> tuple[tuple[str, ...], dict[str, Path]]:
    """The metrics for which there are results at `path`, a directory or a JSON file, and the file of each task.

    Raises:
        ResultsError: there is none, or the results of a metric are missing and `all_of_them` are wanted.
    """
    files = {}
    if path.is_dir():
        files = {task: path / f"{task}.json" for task in METRICS.values() if (path / f"{task}.json").is_file()}
    elif path.is_file():
        content = _read(path)
        task = "instance" if isinstance(content, list) else "panoptic"
        records = content.get("annotations") if isinstance(content, dict) else None
        entries = [r.get("segments_info") for r in records if isinstance(r, dict)] if isinstance(records, list) else []
        segments = [s for entry in entries if isinstance(entry, list) for s in entry]
        if any(isinstance(s, dict) and "id" not in s for s in segments):
            task = "semantic"
        files = {task: path}
    else:
        raise ResultsError(f"{path}: no such file or directory")
    found = tuple(metric for metric in metrics if METRICS[metric] in files)
    missing = [METRICS[metric] for metric in metrics if metric not in found]
    if not found or (missing and all_of_them):
        expected = " or ".join(f"{name}.json" for name in missing)
        raise ResultsError(f"{path}: expected results, {expected}")
    return found, files


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ResultsError(f"{path}: expected JSON in UTF-8; {error}") from error


def _records(
    data: DatasetOfFiles, path: Path, keys: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[Any, int], dict[Any, int]]:
    """The records of a file of results, the index of each image id, and the label of each category id."""
    content = _read(path)
    records: Any = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(records, list) or any(not isinstance(r, dict) or set(keys) - set(r) for r in records):
        raise ResultsError(f"{path}: expected a list of results, each with {', '.join(keys)}")
    images = {image_id: i for i, (image_id, _) in enumerate(data.images_of_data)}
    labels = {category: i for i, category in enumerate(data.category_ids)}
    # Lists and the like are no ids, nor could they be looked up.
    odd = next((r["image_id"] for r in records if not _is_id(r["image_id"]) or r["image_id"] not in images), None)
    if odd is not None:
        raise ResultsError(
            f"{path}: expected the ids of the data's images; it has a result of {odd!r} (those ids are written "
            "by m2f evaluate --out and m2f segment --ids-from)"
        )
    return records, images, labels


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _label(path: Path, labels: Mapping[Any, int], category: Any) -> int:
    if not _is_id(category) or category not in labels:
        raise ResultsError(f"{path}: expected the data's category ids; got {category!r}")
    return labels[category]


def _one_each(
    path: Path, records: list[dict[str, Any]], images: Mapping[Any, int], wanted: Sequence[int]
) -> dict[int, Any]:
    by_index: dict[int, Any] = {}
    for record in records:
        index = images[record["image_id"]]
        if index in by_index:
            raise ResultsError(f"{path}: image {record['image_id']!r} is there twice")
        by_index[index] = record
    ids = {index: image_id for image_id, index in images.items()}
    absent = next((ids[i] for i in wanted if i not in by_index), None)
    if absent is not None:
        raise ResultsError(f"{path}: expected a result of every image; none of {absent!r}")
    return by_index


def _place(path: Path, name: str) -> Path:
    """The path of a result's PNG file: beside the JSON file, or in the folder that has its name."""
    beside = path.parent / name
    return beside if beside.is_file() else path.with_suffix("") / name


def _panoptic_reader(data: DatasetOfFiles, path: Path, wanted: Sequence[int]) -> Callable[[int, Sample], Panoptic]:
    records, images, labels = _records(data, path, ("image_id", "file_name", "segments_info"))
    by_index = _one_each(path, records, images, wanted)

    def read(index: int, sample: Sample) -> Panoptic:
        record = by_index[index]
        segments_info, file = record["segments_info"], _place(path, str(record["file_name"]))
        if not isinstance(segments_info, list) or not all(
            isinstance(s, dict) and isinstance(s.get("id"), int) and "category_id" in s for s in segments_info
        ):
            raise ResultsError(
                f"{path}: image {record['image_id']!r}: expected segments_info with an id and a category_id each"
            )
        try:
            ids = read_ids(file, [s["id"] for s in segments_info])
        except (OSError, ValueError) as error:
            raise ResultsError(f"{path}: image {record['image_id']!r}: {error}") from error
        if ids.shape != sample["image"].shape[1:]:
            size = list(sample["image"].shape[1:])
            raise ResultsError(f"{file}: expected the image's size, {size}; got {list(ids.shape)}")
        numbers, places = np.unique(ids, return_inverse=True)
        listed = {s["id"]: s for s in segments_info}
        unlisted = [i for i in numbers.tolist() if i and i not in listed]
        if unlisted:
            raise ResultsError(
                f"{file}: expected segments that {path.name} lists; it has one with the id {unlisted[0]}"
            )
        compact = np.zeros(len(numbers), np.int64)
        segments: list[Segment] = []
        for k, number in enumerate(numbers.tolist()):
            if number:
                compact[k] = len(segments) + 1
                label = _label(path, labels, listed[number]["category_id"])
                segments.append(Segment(len(segments) + 1, label, 1.0, label in data.stuff_labels))
        return Panoptic(torch.from_numpy(compact[places].reshape(ids.shape)).int(), segments)

    return read


def _instance_reader(data: DatasetOfFiles, path: Path, wanted: Sequence[int]) -> Callable[[int, Sample], Any]:
    records, images, labels = _records(data, path, ("image_id", "category_id", "score", "segmentation"))
    by_index: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        score = record["score"]
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ResultsError(f"{path}: image {record['image_id']!r}: expected a number as score; got {score!r}")
        entry = {
            "label": _label(path, labels, record["category_id"]),
            "score": score,
            "segmentation": record["segmentation"],
        }
        by_index.setdefault(images[record["image_id"]], []).append(entry)

    def read(index: int, sample: Sample) -> Any:
        found = []
        for entry in by_index.get(index, []):
            try:
                encoded = encode_checked(entry["segmentation"], *sample["image"].shape[1:])
            except Exception as error:  # whatever comes of whatever was given
                name = data.images_of_data[index][0]
                raise ResultsError(f"{path}: image {name!r}: expected a mask of COCO's; {error}") from error
            found.append({**entry, "segmentation": encoded})
        return found

    return read


def _semantic_reader(data: DatasetOfFiles, path: Path, wanted: Sequence[int]) -> Callable[[int, Sample], Tensor]:
    records, images, labels = _records(data, path, ("image_id", "file_name"))
    by_index = _one_each(path, records, images, wanted)
    table = torch.full((2**16,), -1, device="cpu")
    for category, label in labels.items():
        if isinstance(category, int) and 0 <= category < len(table):
            table[category] = label

    def read(index: int, sample: Sample) -> Tensor:
        file = _place(path, str(by_index[index]["file_name"]))
        try:
            values = read_values(file)
        except (OSError, ValueError) as error:
            raise ResultsError(f"{path}: image {by_index[index]['image_id']!r}: {error}") from error
        if values.shape != sample["image"].shape[1:]:
            size = list(sample["image"].shape[1:])
            raise ResultsError(f"{file}: expected the image's size, {size}; got {list(values.shape)}")
        return table[torch.from_numpy(values)]

    return read


_READERS: dict[str, Callable[[DatasetOfFiles, Path, Sequence[int]], Callable[[int, Sample], Any]]] = {
    "panoptic": _panoptic_reader,
    "instance": _instance_reader,
    "semantic": _semantic_reader,
}
