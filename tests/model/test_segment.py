"""Segmenting files, from Python and from the command line."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from m2f_model import Mask2Former, Mask2FormerConfig, Segmenter, results, segment, segment_files
from m2f_model.data import Shapes
from m2f_model.results import TASKS, overlay
from m2f_model.segment import prepare, resized_size
from m2f_model.weights import to_detectron2
from tests.model import command


@pytest.fixture(scope="module")
def weights():
    """The tiny model trained on shapes."""
    return Path(__file__).parents[2] / "benchmarks" / "models" / "shapes"


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


def test_overlay_colours_stay_with_the_class():
    """Whatever else is in the image; and names are drawn where the masks are."""
    image, masks = Image.new("RGB", (120, 80)), np.zeros((3, 80, 120), bool)
    masks[0, :40, :60], masks[1, 40:, 60:], masks[2, 50:70, 5:25] = True, True, True
    first, second = (np.asarray(overlay(image, masks[i], n)) for i, n in (([0, 1, 2], [4, 7, 4]), ([1], [4])))
    colours = [
        picture[mask].max(0).tolist() for picture, mask in ((first, masks[0]), (first, masks[2]), (second, masks[1]))
    ]
    assert colours == [results.colour_of(4).tolist()] * 3
    assert first[masks[1]].max(0).tolist() == results.colour_of(7).tolist()
    assert len({tuple(results.colour_of(i)) for i in range(150)}) == 150
    named = np.asarray(overlay(image, masks[:2], [4, 7], ["star", "sky"]))
    bare = np.asarray(overlay(image, masks[:2], [4, 7]))
    assert (named != bare)[:40, :60].any()
    assert (named != bare)[40:, 60:].any()
    assert named.min(-1).max() > 150 > bare.min(-1).max()  # white letters
    nowhere = np.zeros((80, 120), bool)
    assert np.array_equal(overlay(image, [nowhere], [4], ["star"]), image)


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
    code, output = command.m2f(*arguments)
    return code, " ".join(output.split())


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
        (["--weights", "absent.pkl", "--config", "r50-coco-panoptic"], "--weights: no file absent.pkl"),
        (["--weights", "absent"], "absent: no such directory"),
        (["--weights", "./absent/model"], "./absent/model: no such directory"),
        (["--weights", __file__], "expected a directory in Hugging Face's format; got a file"),
        (["--task", "depth"], "task: expected one of"),
        (["--config", "r50-coco-panoptic"], "--config is for detectron2 checkpoints"),
        (["--device", "abacus"], "--device: expected auto, cpu, cuda or cuda:N; got 'abacus'"),
        (["--device", "cuda:77"], "--device cuda:77: "),
        (["--stuff", "sky,moon"], "--stuff: expected one of disc, square, "),
        (["--size", "9", "8"], "image_size: expected (short, long) sides of at least 1; got (9, 8)"),
        (["--size", "9"], "argument --size: expected 2 arguments"),
        (["absent.jpg"], "error: no file or directory absent.jpg"),
        (["--batch-size", "0"], "batch_size: expected at least 1; got 0"),
        (["--dtype", "int8"], "--dtype: expected fp32, bf16, fp16; got 'int8'"),
        (["--ids-from", "absent.json"], "absent.json"),
        (["--threshold", "2"], "threshold: expected 0 to 1; got 2.0"),
        (["--mod", "original"], "unrecognized arguments: --mod"),
    ],
)
def test_bad_commands(arguments, message, weights, photos, tmp_path):
    """One line, exit code 2, nothing written."""
    code, output = command.m2f("segment", photos, "--weights", weights, "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert output.startswith("error: ")
    assert message in output
    assert output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_image(weights, tmp_path):
    (tmp_path / "empty").mkdir()
    code, output = m2f("segment", tmp_path / "empty", "--weights", weights)
    assert (code, "no image in" in output) == (2, True)


def test_weights_that_are_no_model(weights, photos, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pth").write_bytes(b"")
    code, output = m2f("segment", photos, "--weights", tmp_path / "run")
    assert (code, "no config.json there (an unfinished training run: give its checkpoint.pth" in output) == (2, True)
    state = to_detectron2(Mask2Former.from_pretrained(weights).state_dict())
    torch.save(state, tmp_path / "tiny.pth")
    code, output = m2f("segment", photos, "--weights", tmp_path / "tiny.pth", "--config", "r50-coco-panoptic")
    assert code == 2
    assert "tiny.pth: expected the weights of this model; " in output
    assert len(output) < 600


def test_a_name_that_the_hub_does_not_know(monkeypatch):
    """One question, and no retries."""
    asked = []

    def model_info(self, name, timeout):
        asked.append(name)
        raise OSError("offline\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(ValueError, match=r"^own/er: no such directory here, nor such a model on the hub \(offline\)$"):
        Mask2Former.from_pretrained("own/er")
    assert asked == ["own/er"]


def test_folders_are_kept(weights, photos, tmp_path):
    """Equal names in two folders, and two files that differ by their suffix, have results of their own."""
    for folder in ("monday", "tuesday/late"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("a.png", "a.jpg", "b.png"):
            Image.open(photos / "first.png").save(tmp_path / folder / name)
    (tmp_path / "monday" / "b.png").unlink()
    (tmp_path / "monday" / "b.png").symlink_to(photos / "first.png")  # it stays in its folder
    arguments = ["--weights", weights, "--task", "semantic", "-o", tmp_path / "out"]
    code, output = m2f("segment", tmp_path / "monday", tmp_path / "tuesday", *arguments)
    assert code == 0, output
    content = json.loads((tmp_path / "out" / "semantic.json").read_text())
    names = {f"{d}/{n}" for d in ("monday", "tuesday/late") for n in ("a.png", "a.jpg", "b")}
    assert {r["image_id"] for r in content["annotations"]} == names
    assert all((tmp_path / "out" / r["file_name"]).is_file() for r in content["annotations"])
    assert all((tmp_path / "out" / f"{name}.overlay.png").is_file() for name in names)
    code, output = m2f("segment", tmp_path / "monday", *arguments[:-1], tmp_path / "one")
    assert (tmp_path / "one" / "b.overlay.png").is_file()
    code, output = m2f("segment", tmp_path / "monday", tmp_path / "tuesday" / ".." / "monday" / "b.png", *arguments)
    assert (code, "is there twice" in output) == (2, True)


def test_stuff_and_size_of_the_command(weights, photos, tmp_path):
    """--stuff names the stuff classes of a checkpoint that does not; without it a warning says they are unknown."""
    model = Mask2Former.from_pretrained(weights)
    model.config = dataclasses.replace(model.config, stuff_labels=None)
    model.save_pretrained(tmp_path / "model")
    for arguments, warns, stuff in (
        ([], True, set()),
        (["--stuff", "Sky, 4"], False, {3, 4}),
        (["--stuff", "none"], False, set()),
    ):
        out = tmp_path / f"out{len(arguments)}"
        code, output = m2f(
            "segment", photos, "--weights", tmp_path / "model", "-o", out, "--threshold", 0.3, *arguments
        )
        assert code == 0, output
        assert ("warning: which labels are stuff is not known" in output) == warns
        segments = [
            s for r in json.loads((out / "panoptic.json").read_text())["annotations"] for s in r["segments_info"]
        ]
        assert segments
        assert all(s["isthing"] == (s["category_id"] not in stuff) for s in segments)
    small = Segmenter(model, "semantic", image_size=(64, 96))
    code, output = m2f(
        "segment", photos, "--weights", weights, "--task", "semantic", "--size", 64, 96, "-o", tmp_path / "s"
    )
    assert code == 0, output
    found = np.asarray(Image.open(tmp_path / "s" / "first.semantic.png"))
    assert np.array_equal(found, small(Image.open(photos / "first.png")).numpy())


def test_batches_change_nothing(weights, photos, tmp_path, monkeypatch):
    """Images of one resized size go through the model together, others by themselves; what is too much at once does."""
    for i in range(3, 6):
        image = Image.fromarray(Shapes(seed=1)[i]["image"].permute(1, 2, 0).numpy())
        image.resize((90, 70) if i < 5 else (70, 90)).save(photos / f"more{i}.png")
    one, many = (tmp_path / name for name in ("one", "many"))
    sizes, forward, batch = [], Mask2Former.forward, Segmenter.batch
    monkeypatch.setattr(Mask2Former, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    arguments = ("segment", photos, "--weights", weights, "--device", "cpu", "--mode", "original", "--task", "panoptic")
    assert m2f(*arguments, "-o", one)[0] == 0
    assert m2f(*arguments, "-o", many, "--batch-size", 4)[0] == 0
    assert sizes == [1] * 6 + [3, 1, 2]
    found = [json.loads((d / "panoptic.json").read_text())["annotations"] for d in (one, many)]
    for a, b in zip(*found, strict=True):
        scores = [[s.pop("score") for s in r["segments_info"]] for r in (a, b)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        assert a["image_id"] == b["image_id"]
        assert [s["category_id"] for s in a["segments_info"]] == [s["category_id"] for s in b["segments_info"]]
        maps = [np.asarray(Image.open(d / a["file_name"])) for d in (one, many)]
        assert (maps[0] != maps[1]).mean() < 0.002

    def too_much(self, prepared):
        if len(prepared) > 1:
            raise MemoryError
        return batch(self, prepared)

    monkeypatch.setattr(Segmenter, "batch", too_much)
    segmenter = Segmenter(Mask2Former.from_pretrained(weights), "semantic")
    files = sorted(photos.iterdir())
    assert segment_files(segmenter, files, tmp_path / "rest", batch_size=3) == segment.Summary(files, [])
    monkeypatch.undo()
    inputs = [segmenter.prepare(Image.new("RGB", size)) for size in ((40, 40), (400, 40))]
    with pytest.raises(ValueError, match="prepared: expected inputs of one size"):
        segmenter.batch(inputs)


def test_ids_of_the_data(weights, photos, tmp_path):
    """Results have ids of a COCO file, whose categories are in another order, and whose images are in folders."""
    categories = [{"id": 10 + i, "name": n} for i, n in enumerate(("ground", "sky", "triangle", "square", "disc"))]
    images = [{"id": 70, "file_name": "photos/first.png"}, {"id": "b", "file_name": "second.png"}]
    content = {"images": [*images, {"id": 5, "file_name": "x/third.png"}], "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(content))
    arguments = ("segment", photos, "--weights", weights, "--ids-from", tmp_path / "data.json", "-o", tmp_path / "out")
    assert m2f(*arguments)[0] == 0
    found = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert [a["image_id"] for a in found["annotations"]] == [70, "b", 5]
    names = {c["id"]: c["name"] for c in found["categories"]}
    assert names == {c["id"]: c["name"] for c in categories}
    segments = [s for a in found["annotations"] for s in a["segments_info"]]
    assert all(s["isthing"] == (names[s["category_id"]] not in ("sky", "ground")) for s in segments)
    for change, message in (
        ({"categories": categories[1:]}, "expected the model's categories by name; ground is missing"),
        ({"images": images}, "third.png: "),
    ):
        (tmp_path / "data.json").write_text(json.dumps(content | change))
        code, output = command.m2f(*arguments)
        assert (code, output.count("\n")) == (2, 1)
        assert message in output


def test_info(weights):
    code, output = m2f("info", "--weights", weights)
    assert code == 0
    assert "0.6 M parameters" in output
    assert "num_labels 5" in output


@pytest.mark.parametrize("where", ["allocator", "numpy", "GPU", "reading"])
def test_an_image_too_large_for_the_memory(where, weights, photos, tmp_path, monkeypatch):
    """It is named, the others are done, and the JSON file holds them; other errors are not taken for it."""
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
        draw = results.overlay
        monkeypatch.setattr(
            results, "overlay", lambda image, *rest: (fail if image.width == 91 else draw)(image, *rest)
        )
    summary = segment_files(segmenter, files, tmp_path / "out")
    assert summary.done == [files[0], files[2]]
    reason = "not enough memory to read it" if where == "reading" else "not enough memory for 91 x 70 pixels"
    assert summary.failed == [(files[1], reason)]
    content = json.loads((tmp_path / "out" / "semantic.json").read_text())
    assert [x["image_id"] for x in content["annotations"]] == ["first", "third"]
    assert not list((tmp_path / "out").glob("second*"))

    monkeypatch.setattr(results, "overlay", lambda *_: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="must match"):
        segment_files(segmenter, files, tmp_path / "out")
