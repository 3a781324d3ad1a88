"""Data sets: shapes, COCO's formats, what is wrong with them, jitter, batches."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco

import m2f_kernels
from m2f_model.coco import CocoInstances, CocoPanoptic
from m2f_model.data import Batches, Guarded, Shapes, collate, jitter, unpack
from m2f_model.samples import AnnotationError, IdMap, RunLengths

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
        (["annotations", 0, "segmentation"], [], "annotation 100: .* there is no polygon"),
        (["annotations", 0, "segmentation"], None, "annotation 100: .* segmentation missing"),
        (["annotations", 0, "segmentation"], [[float("nan"), 1, 9, 1, 9, 9]], "annotation 100: .* coordinate nan"),
        (["annotations", 0, "segmentation"], [[1, 1, 9, float("inf"), 9, 9]], "annotation 100: .* coordinate inf"),
        (["annotations", 0, "segmentation"], [[1, -1e8, 9, 1, 9, 9]], r"annotation 100: .* coordinate -1e\+08"),
        (["annotations", 0, "segmentation"], [[1, 1e5, 9, 1, 9, 9]], r"annotation 100: .* coordinate 100000"),
        (["annotations", 0, "segmentation"], [[[1, 1]] * 6], "annotation 100: .* list of lists"),
        (["annotations", 0, "segmentation"], [7], "annotation 100: .* a polygon is 7"),
        (["annotations", 1, "segmentation"], {"size": [H, W]}, "annotation 101: .* counts missing"),
        (["annotations", 1, "segmentation", "size"], [W, H], r"annotation 101: .*its size is \[60, 40\]"),
        (["annotations", 1, "segmentation", "counts"], [], "annotation 101: .* add up to 0; the image has 2400"),
        (["annotations", 1, "segmentation", "counts"], "", "annotation 101: .* add up to 0; the image has 2400"),
        (["annotations", 1, "segmentation", "counts"], [10, 50], "annotation 101: .* add up to 60; the image has 2400"),
        (["annotations", 1, "segmentation", "counts"], [10, 2400], "annotation 101: .* add up to 2410; the"),
        (["annotations", 1, "segmentation", "counts"], [2500, -100], "annotation 101: .* add up to 2400; the"),
        (["annotations", 1, "segmentation", "counts"], [2**63, 2400 - 2**63], "annotation 101: expected polygons or"),
        (["annotations", 1, "segmentation", "counts"], [2399.5, 0.5], "annotation 101: .* neither a string nor"),
        (["annotations", 2, "segmentation", "counts"], "0000", "annotation 102: .* add up to 0; the image has 2400"),
        (["annotations", 2, "segmentation", "counts"], "PPP", "annotation 102: .* no string that COCO's encoding"),
        (["annotations", 2, "segmentation", "counts"], "größe", "annotation 102: expected polygons or"),
        (["annotations", 2, "segmentation", "counts"], "o" * 20 + "0", "annotation 102: .* no string that COCO's"),
    ],
)
def test_malformed_entries(path, value, message, tmp_path, content):
    """Found by the check before training, and by whoever reads the sample."""
    damage(content, path, value)
    if "missing" in message and path[-1] == "segmentation" and value is None:
        with pytest.raises(AnnotationError, match=message):
            instances(tmp_path, content)
        return
    data = instances(tmp_path, content)
    for find in (data.check, lambda: data[0], lambda: data.compact(0)):
        with pytest.raises(AnnotationError, match=message) as error:
            find()
        assert "instances.json" in str(error.value)


def test_malformed_crowds_are_found_before_training(tmp_path, content):
    damage(content, ["annotations", 3, "segmentation", "counts"], [5])
    with pytest.raises(AnnotationError, match=r"annotation 103: .* add up to 5"):
        instances(tmp_path, content).check()


def test_check_reads_every_image_once(tmp_path, content):
    seen = []
    data = instances(tmp_path, content)
    data.check(lambda entries: (seen.append(e["id"]) or e for e in entries))
    assert seen == [1, 2]
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    with pytest.raises(AnnotationError, match=r"instances\.json: image 2: .*2\.png: expected an image"):
        data.check()


def test_polygons_a_little_outside(tmp_path, content):
    content["annotations"][0]["segmentation"] = [[-5.5, -3, W + 80, -3, W + 80, H + 2, -5.5, H + 2]]
    assert instances(tmp_path, content)[0]["masks"][0].all()


def test_runs_are_decoded_as_pycocotools_does(tmp_path, content):
    """Random masks, large ones too, whose lengths take several characters; the decoder is only for the sum."""
    from m2f_model.coco import _decoded_runs

    g = np.random.default_rng(0)
    for size, share in (((40, 60), 0.5), ((300, 500), 0.001), ((7, 5), 0.0), ((2000, 1500), 0.00001), ((9, 9), 1.0)):
        mask = np.asfortranarray(g.random(size) < share, dtype=np.uint8)
        flat = mask.flatten("F").astype(int)
        runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
        runs = [0, *runs] if flat[0] else runs
        assert _decoded_runs(coco.encode(mask)["counts"].decode()).tolist() == runs


def test_numbers_as_strings(tmp_path, content):
    """ "5" and 5 are one id; sizes and flags are numbers however they are written. Names may be ids, too."""
    expected = instances(tmp_path, json.loads(json.dumps(content)))[0]
    for entry in content["images"]:
        entry.update(id=str(entry["id"]), height=str(H), width=float(W))
    for entry in content["categories"]:
        entry["id"] = float(entry["id"])
    for entry in content["annotations"]:
        entry.update(iscrowd=str(entry["iscrowd"]), category_id=str(entry["category_id"]))
    found = instances(tmp_path, content)[0]
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    for entry in (*content["images"], *content["annotations"]):
        for key in ("image_id",) if "image_id" in entry else ("id",):
            entry[key] = f"street/{entry[key]}"
    found = instances(tmp_path, content)[0]
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["images", 0, "id"], [1], r"image number 0: expected a number or a string as id; got \[1\]"),
        (["images", 1, "id"], "1", "image 1: expected different ids; two have this one"),
        (["categories", 1, "id"], 7, "category 7: expected different ids; two have this one"),
        (["images", 0, "height"], "tall", "image 1: expected a height of at least 1; got 'tall'"),
        (["images", 0, "width"], 0, "image 1: expected a width of at least 1; got 0"),
        (["images", 0, "file_name"], 5, "image 1: expected a file_name; got 5"),
        (["annotations", 0, "iscrowd"], "no", "annotation 100: expected 0 or 1 as iscrowd; got 'no'"),
        (["annotations", 0, "image_id"], {}, "annotation number 0: expected a number or a string as image_id"),
    ],
)
def test_malformed_numbers(path, value, message, tmp_path, content):
    damage(content, path, value)
    with pytest.raises(AnnotationError, match=message):
        instances(tmp_path, content)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_unicode_whatever_the_locale(encoding, tmp_path, content):
    content["categories"][0]["name"] = "größe"
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert CocoInstances(path, tmp_path / "images").label_names == ("größe", "dog")


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


@pytest.mark.parametrize("way", ["RGBA", "grey", "grey and alpha", "16 bits", "32 bits", "palette", "colours", "equal"])
def test_other_panoptic_files(way, tmp_path, content):
    """Ids as values of grey and palette files; files that programs have made smaller without changing the colours."""
    ids = np.zeros((H, W), np.int32)
    ids[:10], ids[10:20] = 5, 200
    if way in ("16 bits", "32 bits"):
        ids[10:20] = 60000
    if way in ("colours", "equal"):
        ids[:10], ids[10:20] = 5 * 65793, 200 * 65793
    a, b = int(ids[0, 0]), int(ids[10, 0])
    segments = [{"id": str(a), "category_id": 7}, {"id": b, "category_id": 3}]
    data = panoptic(tmp_path, content, segments, ids)
    path = tmp_path / "panoptic" / "1.png"
    colours = Image.open(path).convert("RGB")
    if way == "RGBA":
        colours.convert("RGBA").save(path)
    elif way == "16 bits":
        Image.fromarray(ids.astype(np.uint16)).save(path)
    elif way == "32 bits":
        Image.fromarray(ids).save(path, format="TIFF")
    elif way == "colours":
        colours.quantize(8).save(path)
    elif way == "equal":
        colours.convert("L").save(path)
    else:
        image = Image.fromarray(ids.astype(np.uint8))
        if way == "palette":
            image.putpalette(np.random.default_rng(0).integers(0, 255, 768, np.uint8).tobytes())
        (image.convert("LA") if way == "grey and alpha" else image).save(path)
    data.check()
    assert torch.equal(data[0]["masks"], torch.from_numpy(np.stack([ids == a, ids == b])))


def test_panoptic_files_that_are_no_ids(tmp_path, content):
    ids = np.full((H, W), 70000)
    data = panoptic(tmp_path, content, [{"id": 70000, "category_id": 7}], ids)
    path = tmp_path / "panoptic" / "1.png"
    Image.fromarray(ids.astype(np.uint8)).save(path)
    with pytest.raises(AnnotationError, match=r"image 1: .*1\.png: .*segment 70000 has none .*Pillow's mode 'L'"):
        data[0]
    deep = np.zeros((2, H, W, 3), np.uint8)
    write_deep_png(path, deep[0])
    for find in (data.check, lambda: data[0]):
        with pytest.raises(AnnotationError, match=r"image 1: .*1\.png: expected colours of 8 bits"):
            find()
    Image.fromarray(ids.astype(np.uint8)[:, :-1]).save(path)
    with pytest.raises(AnnotationError, match=r"1\.png: expected the size of image 1, \[40, 60\]; got \[40, 59\]"):
        data.check()
    path.unlink()
    with pytest.raises(AnnotationError, match=r"image 1: .*No such file"):
        data.check()


def write_deep_png(path, pixels):
    """A PNG file of 16 bits for each of red, green and blue, which Pillow does not write."""
    height, width, _ = pixels.shape

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"id": "a", "category_id": 7}, "annotation of image 1: expected segments with whole numbers as ids; got 'a'"),
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


@pytest.mark.parametrize("seed", range(12))
def test_jitter_crops_first(seed):
    """Its result is the crop of the whole image resized: masks to the pixel, the image to rounding, with every kind of
    masks."""
    g = torch.Generator().manual_seed(seed)
    image = F.interpolate(torch.rand(1, 3, 9, 12, generator=g), (83, 117), mode="bilinear")[0]
    image = (255 * image).byte()
    ids = torch.randint(0, 5, (6, 8), generator=g)[None, None].float()
    ids = F.interpolate(ids, (83, 117), mode="nearest")[0, 0].long()
    masks = ids == torch.arange(6)[:, None, None]  # the last is empty
    sample = {"image": image, "labels": torch.arange(6), "masks": masks}
    out = jitter(sample, 64, (0.3, 2.0), torch.Generator().manual_seed(seed))
    scale, flip, *offsets = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    ratio = (0.3 + scale * 1.7) * 64 / 117
    h, w = round(83 * ratio), round(117 * ratio)
    whole = F.interpolate(image[None].float(), (h, w), mode="bilinear", antialias=True)[0]
    resized = F.interpolate(masks[None].byte(), (h, w), mode="nearest-exact")[0].bool()
    top, left = (int(o * max(0, side - 63)) for o, side in zip(offsets, (h, w), strict=True))
    whole, resized = (x[:, top : top + 64, left : left + 64] for x in (whole, resized))
    if flip < 0.5:
        whole, resized = whole.flip(2), resized.flip(2)
    keep = resized.flatten(1).any(1)
    assert torch.equal(out["masks"], resized[keep])
    assert torch.equal(out["labels"], torch.arange(6)[keep])
    assert (out["image"].float() - whole).abs().max() <= 1.01  # Pillow rounds after rows and after columns
    encoded = [coco.encode(np.asfortranarray(m.numpy(), dtype=np.uint8)) for m in masks]
    for other in (
        masks.byte() * 255,
        masks.float(),
        RunLengths(encoded, 83, 117),
        IdMap(ids.numpy(), list(range(6))),
    ):
        found = jitter({**sample, "masks": other}, 64, (0.3, 2.0), torch.Generator().manual_seed(seed))
        assert all(torch.equal(found[k], out[k]) for k in out)


@pytest.mark.parametrize("size", [None, 48])
def test_batches_have_run_lengths(size):
    """Of the masks that dense ones, scaled, flipped, cropped and padded, are."""
    read = []

    class Recorded(Shapes):
        def __getitem__(self, index):
            read.append(super().__getitem__(index))
            return read[-1]

    batches = Batches(Recorded(length=6, size=70, seed=1), 6, seed=2, size=size, scales=(0.5, 2.0))
    pixels, targets = batches[0]
    samples, flipped = read, set()
    if size is not None:
        seeds = [torch.Generator().manual_seed(3 * 1000003 + i) for i in range(6)]
        flipped = {bool(torch.rand(2, generator=g.clone_state())[1] < 0.5) for g in seeds}
        samples = [jitter(s, size, (0.5, 2.0), g) for s, g in zip(read, seeds, strict=True)]
    expected_pixels, expected = collate(samples, size)
    assert torch.equal(pixels, expected_pixels)
    for found, dense in zip(targets, expected, strict=True):
        assert isinstance(found["masks"], m2f_kernels.RunLengths)
        assert torch.equal(found["masks"].masks(), dense["masks"])
        assert torch.equal(found["labels"], dense["labels"])
    assert size is None or flipped == {True, False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(3, 8, 8)}, "sample 0: expected an image, uint8"),
        ({"labels": torch.zeros(2)}, "sample 0: expected labels, int64"),
        ({"labels": torch.tensor([0, 5])}, r"sample 0: expected labels from 0 to 4; got \[0, 5\]"),
        ({"masks": torch.zeros(2, 8, 9, dtype=torch.bool)}, r"sample 0: expected masks \[2, 8, 8\]"),
    ],
)
def test_samples_of_somebody_elses_data_set(change, message):
    class Theirs(Shapes):
        def __getitem__(self, index):
            good = {
                "image": torch.zeros(3, 8, 8, dtype=torch.uint8),
                "labels": torch.tensor([0, 1]),
                "masks": torch.ones(2, 8, 8, dtype=torch.uint8) * 255,
            }
            return {**good, **change}

    with pytest.raises(AnnotationError, match=message):
        Batches(Theirs(length=1), 1)[0]


def test_no_traceback_from_a_worker(tmp_path, content):
    """An error about an image crosses the border between processes as one line."""
    data = instances(tmp_path, content)
    for i in (1, 2):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no image")
    loader = torch.utils.data.DataLoader(Guarded(Batches(data, 1)), batch_size=None, num_workers=1, sampler=[0])
    (found,) = loader
    assert isinstance(found, AnnotationError)
    assert str(found).startswith(str(tmp_path / "instances.json"))
    assert "\n" not in str(found)


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


def test_names_that_moved_are_still_here():
    """Programs import the formats from `m2f_model.data`, and what draws and encodes from `m2f_model.segment`."""
    from m2f_model import coco, data, results, samples, segment

    assert (data.CocoInstances, data.CocoPanoptic) == (coco.CocoInstances, coco.CocoPanoptic)
    assert (data.AnnotationError, data.Progress) == (samples.AnnotationError, samples.Progress)
    assert (segment.overlay, segment.encode) == (results.overlay, results.encode)


def test_targets_of_a_batch_unpacked():
    _, (target,) = Batches(Shapes(size=40), 1, seed=0, size=32)[0]
    dense = unpack(target)
    assert dense["masks"].dtype == torch.bool
    assert dense["masks"].shape == (len(target["labels"]), 32, 32)
    assert dense["masks"].flatten(1).any(1).all()
    assert unpack(dense)["masks"] is dense["masks"]
