"""Data sets: shapes, COCO's formats, what is wrong with them, jitter, batches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from m2f_model.data import AnnotationError, Batches, CocoInstances, CocoPanoptic, Shapes, collate, jitter

H, W = 40, 60


def test_shapes_are_a_function_of_seed_and_index():
    a, b = Shapes(seed=3), Shapes(seed=3, length=5)
    for key in ("image", "labels", "masks"):
        assert torch.equal(a[4][key], b[4][key])
    assert not torch.equal(a[4]["image"], a[5]["image"])
    assert not torch.equal(a[4]["image"], Shapes(seed=4)[4]["image"])


def test_shapes_cover_every_pixel_once():
    labels = set()
    for i in range(40):
        sample = Shapes(size=64)[i]
        assert sample["image"].shape == (3, 64, 64)
        assert (sample["masks"].sum(0) == 1).all()
        assert sample["masks"].flatten(1).any(1).all()
        labels |= set(sample["labels"].tolist())
    assert labels == {0, 1, 2, 3, 4}


# ---------------------------------------------------------------- COCO


@pytest.fixture
def content(tmp_path):
    """Two images; three annotations in the first (polygon, run lengths, compressed run lengths) and a crowd."""
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.fromarray(random.integers(0, 255, (H, W, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    mask = np.zeros((H, W), np.uint8)
    mask[5:15, 20:30] = 1
    encoded = coco.encode(np.asfortranarray(mask))
    changes = np.flatnonzero(np.diff(mask.flatten("F").astype(int))) + 1
    runs = np.diff([0, *changes, H * W]).tolist()
    segmentations = [
        [[10, 10, 30, 10, 30, 30, 10, 30]],
        {"size": [H, W], "counts": runs},
        {"size": [H, W], "counts": encoded["counts"].decode()},
        {"size": [H, W], "counts": runs},
    ]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in (1, 2)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": 100 + i, "image_id": 1, "category_id": 7 if i else 3, "segmentation": s, "iscrowd": int(i == 3)}
            for i, s in enumerate(segmentations)
        ],
    }


def instances(tmp_path, content):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return CocoInstances(path, tmp_path / "images")


def test_instances(tmp_path, content):
    data = instances(tmp_path, content)
    assert (len(data), data.label_names, data.stuff_labels) == (2, ("cat", "dog"), ())
    sample = data[0]
    assert sample["labels"].tolist() == [1, 0, 0]
    assert torch.equal(
        sample["image"].permute(1, 2, 0), torch.from_numpy(np.array(Image.open(tmp_path / "images/1.png")))
    )
    assert sample["masks"].sum((1, 2)).tolist() == [400, 100, 100]
    assert sample["masks"][0, 10:30, 10:30].all()
    assert sample["masks"][1, 5:15, 20:30].all()
    assert torch.equal(sample["masks"][1], sample["masks"][2])
    assert (sample["crowd_labels"].tolist(), sample["crowd_masks"].sum((1, 2)).tolist()) == ([0], [100])
    assert "void" not in sample  # all else is background
    assert data[1]["masks"].shape == (0, H, W)
    assert "crowd_masks" not in data[1]


def damage(content, path, value):
    *most, last = path
    target = content
    for key in most:
        target = target[key]
    if value is None:
        del target[last]
    else:
        target[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["annotations"], None, r"instances\.json: expected lists .*; annotations missing"),
        (["images", 0, "height"], None, r"instances\.json: image 1: expected .*; height missing"),
        (["annotations", 1, "id"], None, r"instances\.json: annotation number 1: expected .*; id missing"),
        (["annotations", 1, "segmentation"], None, r"instances\.json: annotation 101: .*; segmentation missing"),
        (["annotations", 1, "category_id"], 9, r"instances\.json: annotation 101: category_id 9 is not in the file"),
        (["annotations", 1, "image_id"], 9, r"instances\.json: annotation 101: image_id 9 is not in the file"),
    ],
)
def test_malformed_files(path, value, message, tmp_path, content):
    damage(content, path, value)
    with pytest.raises(AnnotationError, match=message):
        instances(tmp_path, content)


def test_no_json(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(AnnotationError, match=r"bad\.json: expected JSON"):
        CocoInstances(tmp_path / "bad.json", tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["annotations", 0, "segmentation"], [[1, 2, 3, 4]], "annotation 100: .* fewer than three points"),
        (["annotations", 0, "segmentation"], [["a"] * 6], "annotation 100: expected polygons or"),
        (["annotations", 0, "segmentation"], "what", "annotation 100: expected polygons or"),
        (["annotations", 1, "segmentation", "size"], [H, 2], r"annotation 101: .*its size is \[40, 2\]"),
        (["images", 0, "width"], 61, "image 1: expected 40 x 61 pixels; 1.png has 40 x 60"),
        (["images", 0, "file_name"], "9.png", "image 1: .*No such file"),
    ],
)
def test_malformed_entries(path, value, message, tmp_path, content):
    damage(content, path, value)
    data = instances(tmp_path, content)
    with pytest.raises(AnnotationError, match=message) as error:
        data[0]
    assert "instances.json" in str(error.value)


def panoptic(tmp_path, content, segments, ids):
    (tmp_path / "panoptic").mkdir(exist_ok=True)
    colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "panoptic" / "1.png")
    content["categories"][0]["isthing"], content["categories"][1]["isthing"] = 1, 0
    content["annotations"] = [{"image_id": 1, "file_name": "1.png", "segments_info": segments}]
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    return CocoPanoptic(tmp_path / "panoptic.json", tmp_path / "images")


def test_panoptic(tmp_path, content):
    ids = np.zeros((H, W), int)
    ids[:10], ids[10:20], ids[30:] = 5, 70000, 300
    segments = [
        {"id": 5, "category_id": 7},
        {"id": 70000, "category_id": 3},
        {"id": 300, "category_id": 7, "iscrowd": 1},
    ]
    data = panoptic(tmp_path, content, segments, ids)
    assert (len(data), data.label_names, data.stuff_labels) == (1, ("cat", "dog"), (1,))
    assert data[0]["labels"].tolist() == [0, 1]
    assert torch.equal(data[0]["masks"], torch.from_numpy(np.stack([ids == 5, ids == 70000])))
    assert torch.equal(data[0]["void"], torch.from_numpy(ids == 0))
    assert data[0]["crowd_labels"].tolist() == [0]
    assert torch.equal(data[0]["crowd_masks"], torch.from_numpy(ids == 300)[None])


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"id": 6, "category_id": 7}, r"1\.png: expected pixels of every segment; segment 6 has none"),
        ({"id": 5, "category_id": 8}, r"panoptic\.json: annotation 5: category_id 8 is not in the file"),
        ({"id": 5}, r"panoptic\.json: segment 5: expected id, category_id; category_id missing"),
    ],
)
def test_malformed_panoptic(segment, message, tmp_path, content):
    with pytest.raises(AnnotationError, match=message):
        panoptic(tmp_path, content, [segment], np.full((H, W), 5))[0]


# ---------------------------------------------------------------- jitter and batches


@pytest.mark.parametrize("seed", range(8))
def test_jitter_moves_image_and_masks_alike(seed):
    """A mask that is the bright part of the image is the bright part of the result."""
    image = torch.zeros(3, 80, 120, dtype=torch.uint8)
    image[:, 20:60, 30:70] = 255
    sample = {"image": image, "labels": torch.tensor([4]), "masks": image[:1] > 0}
    out = jitter(sample, 64, (0.5, 2.0), torch.Generator().manual_seed(seed))
    assert max(out["image"].shape[1:]) <= 64
    if len(out["masks"]):
        assert ((out["image"][0] > 127) != out["masks"][0]).float().mean() < 0.02


def test_jitter_covers_its_range_and_flips():
    image = torch.arange(64, dtype=torch.uint8)[None, None].expand(3, 48, 64)
    sample = {"image": image, "labels": torch.tensor([0]), "masks": torch.ones(1, 48, 64, dtype=torch.bool)}
    out = [jitter(sample, 64, (0.1, 2.0), torch.Generator().manual_seed(i)) for i in range(60)]
    widths = [x["image"].shape[2] for x in out]
    assert min(widths) < 16
    assert max(widths) == 64
    flipped = [bool(x["image"][0, 0, 0] > x["image"][0, 0, -1]) for x in out]
    assert 15 < sum(flipped) < 45


def test_jitter_of_an_image_without_targets():
    sample = {
        "image": torch.zeros(3, 50, 40, dtype=torch.uint8),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 50, 40, dtype=torch.bool),
    }
    out = jitter(sample, 32, (0.5, 2.0), torch.Generator().manual_seed(0))
    assert out["masks"].shape == (0, *out["image"].shape[1:])


def test_collate_pads():
    samples = [Shapes(size=40)[0], Shapes(size=70)[1]]
    pixels, targets = collate(samples)
    assert pixels.shape == (2, 3, 96, 96)
    assert not pixels[0, :, 40:].any()
    assert torch.equal(targets[0]["masks"][:, :40, :40], samples[0]["masks"])
    assert not targets[0]["masks"][:, 40:].any()


def test_processes_share_the_sequence():
    """Two processes of batch 2 see what one of batch 4 sees, in the same order; every sample once per round."""
    data = Shapes(length=10, size=32)
    one = Batches(data, 4, seed=5)
    two = [Batches(data, 2, seed=5, rank=r, world_size=2) for r in range(2)]
    for step in (0, 1, 7):
        assert torch.equal(one[step][0], torch.cat([b[step][0] for b in two]))
    seen = torch.cat([one[step][0] for step in range(5)])
    assert len(seen.flatten(1).unique(dim=0)) == 10
    assert not torch.equal(one[0][0], one[5][0])
    assert not torch.equal(one[0][0], Batches(data, 4, seed=6)[0][0])
