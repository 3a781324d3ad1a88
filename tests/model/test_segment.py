"""Segmenting files, from Python and from the command line."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from typer.testing import CliRunner

from m2f_model import Mask2Former, Mask2FormerConfig, Segmenter, segment_files
from m2f_model.cli import app
from m2f_model.data import Shapes
from m2f_model.segment import TASKS, overlay, prepare, resized_size
from m2f_model.train import Recipe, Trainer


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny model that has seen enough shapes to find sky and ground."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = Mask2FormerConfig.tiny(5, stuff_labels=Shapes.stuff_labels, label_names=Shapes.label_names)
    Trainer(Mask2Former(config), Shapes(), Recipe.shapes(steps=80), path, log=print).run()
    return path


@pytest.fixture
def photos(tmp_path):
    directory = tmp_path / "photos"
    directory.mkdir()
    for i, name in enumerate(("first", "second", "third")):
        image = Image.fromarray(Shapes(seed=1)[i]["image"].permute(1, 2, 0).numpy())
        image.resize((90, 70)).save(directory / f"{name}.png")
    return directory


def test_prepare():
    image = Image.fromarray(np.full((100, 150, 3), 124, np.uint8))
    config = Mask2FormerConfig.tiny(1, image_size=(50, 1000))
    pixels, frame = prepare(image, config)
    assert frame == ((64, 96), (50, 75), (100, 150))
    assert pixels.shape == (1, 3, 64, 96)
    torch.testing.assert_close(pixels[0, 0, :50, :75], torch.full((50, 75), (124 - 123.675) / 58.395))
    assert not pixels[0, :, 50:].any()
    assert not pixels[0, :, :, 75:].any()
    assert prepare(image, dataclasses.replace(config, image_size=(300, 300)))[1].content == (200, 300)


@pytest.mark.parametrize("step", [31, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [(800, 1333), (1024, 2048), (640, 2560), (512, 2048)])
def test_sizes_are_those_of_the_published_evaluation(size, step):
    """Sizes from 100 to 1499 squared: all 1.96 million where slow; else every 31st height, where one product fails."""
    short, long = size
    h, w = np.meshgrid(np.arange(100 + -100 % step, 1500, step), np.arange(100, 1500), indexing="ij")
    # detectron2's ResizeShortestEdge: the short side first, then both by what the long side is too long.
    first = float(short) / np.minimum(h, w)
    new_h, new_w = np.where(h < w, short, first * h), np.where(h < w, first * w, short)
    longest = np.maximum(new_h, new_w)
    second = np.where(longest > long, long * 1.0 / longest, 1.0)
    expected = np.stack([new_h * second + 0.5, new_w * second + 0.5], -1).astype(int)
    found = [resized_size(*pair, size) for pair in zip(h.ravel().tolist(), w.ravel().tolist(), strict=True)]
    assert np.array_equal(np.reshape(found, expected.shape), expected)


def test_sizes_of_slivers():
    assert resized_size(1, 100000, (800, 1333)) == (1, 1333)


@pytest.mark.parametrize("task", TASKS)
def test_files(task, weights, photos, tmp_path):
    segmenter = Segmenter(Mask2Former.from_pretrained(weights), task, threshold=None if task == "semantic" else 0.3)
    files = sorted(photos.iterdir())
    summary = segment_files(segmenter, files, tmp_path / "out")
    assert (summary.done, summary.failed) == (files, [])
    content = json.loads((tmp_path / "out" / f"{task}.json").read_text())
    found = 0
    for file in files:
        image = Image.open(file)
        assert Image.open(tmp_path / "out" / f"{file.stem}.overlay.png").size == image.size
        result = segmenter(image)
        if task == "instance":
            records = [r for r in content if r["image_id"] == file.stem]
            masks = np.stack([coco.decode(r["segmentation"]) for r in records])
            assert np.array_equal(masks, result.masks.numpy())
            assert [r["category_id"] for r in records] == result.labels.tolist()
            found += len(records)
            continue
        (record,) = [r for r in content["annotations"] if r["image_id"] == file.stem]
        pixels = np.asarray(Image.open(tmp_path / "out" / record["file_name"])).astype(int)
        found += len(record["segments_info"])
        if task == "semantic":
            assert np.array_equal(pixels, result.numpy())
            assert {s["category_id"]: s["area"] for s in record["segments_info"]} == {
                c: int((pixels == c).sum()) for c in np.unique(pixels)
            }
        else:
            ids = pixels @ [1, 256, 65536]
            assert np.array_equal(ids, result.segment_ids.numpy())
            for segment, ours in zip(record["segments_info"], result.segments, strict=True):
                y, x = (ids == segment["id"]).nonzero()
                assert segment["area"] == len(y)
                assert segment["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
                assert segment["isthing"] == (segment["category_id"] not in Shapes.stuff_labels)
                assert segment["category_id"] == ours.label
    assert found > 2, "the model finds nothing: the case is empty"


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (4000, 3), (2500, 1900), (33, 47)])
@pytest.mark.parametrize("task", TASKS)
def test_odd_sizes(task, size, weights):
    result = Segmenter(Mask2Former.from_pretrained(weights), task)(Image.new("RGB", size, (200, 30, 90)))
    pixels = {"semantic": lambda: result, "instance": lambda: result.masks, "panoptic": lambda: result.segment_ids}
    assert pixels[task]().shape[-2:] == size[::-1]


def test_overlay_leaves_the_rest_alone():
    image = Image.fromarray(np.full((20, 30, 3), 100, np.uint8))
    mask = np.zeros((20, 30), bool)
    mask[5:10, 5:10] = True
    pixels = np.asarray(overlay(image, [mask], [0]))
    assert (pixels[~mask] == 100).all()
    assert (pixels[mask] != 100).any(-1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "depth"}, "task: expected one of 'panoptic', 'instance', 'semantic'; got 'depth'"),
        ({"task": "panoptic", "mode": "x"}, "mode: expected one of 'original', 'compatible'; got 'x'"),
        ({"task": "panoptic", "threshold": 2}, "threshold: expected 0 to 1; got 2"),
        ({"task": "semantic", "threshold": 0.5}, "threshold: expected none for semantic segmentation; got 0.5"),
    ],
)
def test_bad_arguments(arguments, message, weights):
    with pytest.raises(ValueError, match=message):
        Segmenter(Mask2Former.from_pretrained(weights), **arguments)


# ---------------------------------------------------------------- the command


def m2f(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_command(weights, photos, tmp_path):
    code, output = m2f("segment", photos, "--weights", weights, "--task", "semantic", "-o", tmp_path / "out")
    assert code == 0, output
    assert "3 of 3 images segmented" in output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "semantic.json",
        *(f"{n}.{kind}.png" for n in ("first", "second", "third") for kind in ("overlay", "semantic")),
    }


def test_one_bad_file_does_not_stop_the_others(weights, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"no image")
    code, output = m2f("segment", photos, "--weights", weights, "-o", tmp_path / "out")
    assert code == 1
    assert "3 of 4 images segmented" in output
    assert f"failed: {photos}/broken.jpg: " in output
    assert len(json.loads((tmp_path / "out" / "panoptic.json").read_text())["annotations"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "absent.pkl"], "give --config PRESET"),
        (["--weights", "absent.pkl", "--config", "r50"], "name: expected BACKBONE-DATASET"),
        (["--task", "depth"], "task: expected one of"),
        (["--config", "r50-coco-panoptic"], "--config is for detectron2 checkpoints"),
    ],
)
def test_bad_commands(arguments, message, weights, photos, tmp_path):
    code, output = m2f("segment", photos, "--weights", weights, "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert message in output
    assert not (tmp_path / "out").exists()


def test_no_image_and_same_names(weights, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    code, output = m2f("segment", tmp_path / "empty", "--weights", weights)
    assert (code, "no image in" in output) == (2, True)
    Image.new("RGB", (8, 8)).save(photos / "second.jpg")
    code, output = m2f("segment", photos, "--weights", weights, "-o", tmp_path / "out")
    assert (code, "paths: expected different names" in output) == (2, True)


def test_info(weights):
    code, output = m2f("info", "--weights", weights)
    assert code == 0
    assert "0.6 M parameters" in output
    assert "num_labels 5" in output


@pytest.mark.parametrize("where", ["allocator", "numpy", "GPU", "reading"])
def test_an_image_too_large_for_the_memory(where, weights, photos, tmp_path, monkeypatch):
    """It is named, the others are done, and the JSON file holds them; other errors are not taken for it."""
    from m2f_model import segment

    segmenter = Segmenter(Mask2Former.from_pretrained(weights), "semantic")
    files = sorted(photos.iterdir())
    Image.open(files[1]).resize((91, 70)).save(files[1])

    def fail(*_):
        if where == "allocator":
            torch.empty(2**60)
        if where == "numpy":
            np.empty(2**55)
        if where == "reading":
            raise MemoryError
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    if where == "reading":
        read = segment.read_image
        monkeypatch.setattr(segment, "read_image", lambda p: fail() if p == files[1] else read(p))
    else:
        draw = segment.overlay
        monkeypatch.setattr(
            segment, "overlay", lambda image, *rest: (fail if image.width == 91 else draw)(image, *rest)
        )
    summary = segment_files(segmenter, files, tmp_path / "out")
    assert summary.done == [files[0], files[2]]
    reason = "not enough memory to read it" if where == "reading" else "not enough memory for 91 x 70 pixels"
    assert summary.failed == [(files[1], reason)]
    content = json.loads((tmp_path / "out" / "semantic.json").read_text())
    assert [x["image_id"] for x in content["annotations"]] == ["first", "third"]
    assert not list((tmp_path / "out").glob("second*"))

    monkeypatch.setattr(segment, "overlay", lambda *_: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="must match"):
        segment_files(segmenter, files, tmp_path / "out")
