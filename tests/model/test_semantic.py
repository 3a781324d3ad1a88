"""Label maps: what their pixels mean, published layouts, crops and colours, and that a model learns from them."""

import json
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.data import Batches, _View, jitter_colours
from m2f_model.evaluate import evaluate_semantic, label_map
from m2f_model.samples import AnnotationError
from m2f_model.semantic import CITYSCAPES_IDS, SemanticMaps, read_names
from m2f_model.train import Recipe, Trainer, of_data
from tests.model.command import m2f
from tests.model.generated import Beach, write_semantic

NAMES = ("a", "b", "c")
VALUES = np.array([[0, 1, 1, 2], [2, 2, 0, 255]], np.uint8)


def data_of(tmp_path, picture, size=(4, 2), **options):
    """The data of one image with the label map `picture`."""
    for name in ("images/x", "maps/x"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "images" / "x" / "1.png")
    picture.save(tmp_path / "maps" / "x" / "1.png")
    return SemanticMaps.from_directories(tmp_path / "images", tmp_path / "maps", options.pop("names", NAMES), **options)


def palette(values):
    picture = Image.fromarray(values, "P")
    picture.putpalette([200, 1, 1] * 256)  # colours are nobody's business
    return picture


@pytest.mark.parametrize("kind", ["8 bits", "palette", "16 bits", "reduced", "ignored"])
def test_what_pixels_mean(kind, tmp_path):
    picture, options = Image.fromarray(VALUES), {}
    expected = np.where(VALUES == 255, -1, VALUES.astype(int))
    if kind == "palette":
        picture = palette(VALUES)
    if kind == "16 bits":
        values = np.where(VALUES == 255, 65535, VALUES.astype(np.uint16) + 299 * (VALUES == 2))
        picture, options = Image.fromarray(values.astype(np.uint16)), {"ignore_label": 65535}
        options["names"] = [f"class {i}" for i in range(400)]
        expected = np.where(VALUES == 2, 301, expected)
    if kind == "reduced":
        options, expected = {"reduce_labels": True}, expected - 1
        expected[expected < 0] = -1
    if kind == "ignored":
        options, expected = {"ignore_label": 2, "names": ("a", "b")}, np.where(VALUES == 2, -1, expected)
        picture = Image.fromarray(np.where(VALUES == 255, 2, VALUES))
    data = data_of(tmp_path, picture, **options)
    data.check()
    sample = data[0]
    assert np.array_equal(label_map(sample), expected)
    assert np.array_equal(sample["void"], expected < 0)
    assert sample["labels"].tolist() == sorted(set(expected[expected >= 0].tolist()))
    assert sample["masks"].dtype == torch.bool
    assert sample["image"][:, 0, 0].tolist() == [9, 8, 7]
    assert data.class_counts == [int((expected == i).sum()) for i in range(len(data.label_names))]
    assert data.images_of_data == [("x/1", "x/1.png")]


def test_the_fingerprint_is_of_the_maps(tmp_path):
    first = data_of(tmp_path, Image.fromarray(VALUES)).fingerprint
    assert data_of(tmp_path, Image.fromarray(VALUES)).fingerprint == first
    assert data_of(tmp_path, Image.fromarray(VALUES), reduce_labels=True).fingerprint != first
    assert data_of(tmp_path, Image.fromarray(np.zeros((40, 40), np.uint8))).fingerprint != first


def test_what_cannot_be_used(tmp_path):
    """Refused with the file's name, before training."""
    path = tmp_path / "maps" / "x" / "1.png"
    for picture, options, message in [
        (Image.new("RGB", (4, 2)), {}, f"{path}: expected a label map of one channel or with a palette; got .*'RGB'"),
        (Image.new("L", (4, 3)), {}, rf"{path}: expected the size of 1.png, \[2, 4\]; got \[3, 4\]"),
        (Image.fromarray(VALUES), {"names": ("a",)}, f"{path}: expected values from 0 to 0, .* ignored 255; got 1"),
        (Image.fromarray(VALUES), {"ignore_label": 9}, f"{path}: expected values from 0 to 2, .* ignored 9; got 255"),
    ]:
        data = data_of(tmp_path, picture, **options)
        for use in (data.check, lambda data=data: data[0]):
            with pytest.raises(AnnotationError, match=message):
                use()
    path.write_bytes(b"no image")
    with pytest.raises(AnnotationError, match=f"{path}: expected an image"):
        data.check()
    for options, message in [
        ({"ignore_label": 1}, "ignore_label: expected no value of a class; 1 is that of 'b'"),
        ({"ignore_label": -1}, "ignore_label: expected 0 to 65535; got -1"),
        ({"names": ()}, "labels: expected the names of at least one class; got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            data_of(tmp_path, Image.fromarray(VALUES), **options)
    Image.new("RGB", (4, 2)).save(tmp_path / "images" / "other.png")
    with pytest.warns(UserWarning, match="1 images have no label map and are left out"):
        data_of(tmp_path, Image.fromarray(VALUES))
    (tmp_path / "images" / "x" / "1.png").unlink()
    with pytest.raises(AnnotationError, match=f"{path}: no image of that name in {tmp_path}/images"):
        SemanticMaps.from_directories(tmp_path / "images", tmp_path / "maps", NAMES)
    path.unlink()
    with pytest.raises(AnnotationError, match="expected label maps, PNG files; there is none"):
        SemanticMaps.from_directories(tmp_path / "images", tmp_path / "maps", NAMES)
    with pytest.raises(AnnotationError, match="gone: expected a directory"):
        SemanticMaps.from_directories(tmp_path / "gone", tmp_path / "maps", NAMES)


def test_names_of_classes(tmp_path):
    (tmp_path / "names.txt").write_text("wall\n\n traffic light, red \n", encoding="utf-8")
    assert read_names(str(tmp_path / "names.txt")) == ["wall", "traffic light, red"]
    assert read_names("a, b") == ["a", "b"]
    with pytest.raises(ValueError, match="labels: expected names of classes; none in ','"):
        read_names(",")
    with pytest.raises(ValueError, match="labels: expected different names; 'a' is there twice"):
        read_names("a,b,a")


def write(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def ade20k(root):
    for split, number in (("training", 1), ("validation", 2)):
        write(root / "images" / split / f"{number}.jpg", Image.new("RGB", (64, 64)))
        values = np.full((64, 64), number, np.uint8)  # 0 is what nobody labelled, 150 the flag
        values[:3], values[60:] = 0, 150
        write(root / "annotations" / split / f"{number}.png", Image.fromarray(values))


def cityscapes(root, kind="labelIds"):
    for split, road in (("train", 7 if kind == "labelIds" else 0), ("val", 7 if kind == "labelIds" else 0)):
        write(root / "leftImg8bit" / split / "ulm" / "ulm_0_leftImg8bit.png", Image.new("RGB", (128, 64)))
        values = np.full((64, 128), road, np.uint8)
        values[:3], values[60:] = 255, 33 if kind == "labelIds" else 18  # nothing, bicycle
        values[10] = 5 if kind == "labelIds" else 255  # an id without a label
        write(root / "gtFine" / split / "ulm" / f"ulm_0_gtFine_{kind}.png", Image.fromarray(values))


def test_ade20k(tmp_path):
    ade20k(tmp_path)
    for split, label in (("train", 0), ("validation", 1)):
        data = SemanticMaps.ade20k(tmp_path, split)
        assert (len(data), len(data.label_names), data.label_names[0], data.label_names[149]) == (
            1,
            150,
            "wall",
            "flag",
        )
        labels = label_map(data[0])
        assert (labels[0, 0], labels[9, 9], labels[63, 0]) == (-1, label, 149)
        assert data.category_ids == tuple(range(1, 151))


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(kind, tmp_path):
    cityscapes(tmp_path, kind)
    for split in ("train", "validation"):
        data = SemanticMaps.cityscapes(tmp_path, split)
        data.check()
        assert (len(data), data.label_names[0], data.label_names[18]) == (1, "road", "bicycle")
        labels = label_map(data[0])
        assert (labels[0, 0], labels[9, 9], labels[63, 0], labels[10, 10]) == (-1, 0, 18, -1)
        assert data.category_ids == (CITYSCAPES_IDS if kind == "labelIds" else tuple(range(19)))
    for path in (tmp_path / "gtFine").rglob("*.png"):
        path.unlink()
    with pytest.raises(AnnotationError, match=r"ulm_0_gtFine_labelIds\.png: no such file"):
        SemanticMaps.cityscapes(tmp_path)
    for path in (tmp_path / "leftImg8bit").rglob("*.png"):
        path.unlink()
    with pytest.raises(AnnotationError, match=r"expected CITY/\*_leftImg8bit.png; there is none"):
        SemanticMaps.cityscapes(tmp_path)
    with pytest.raises(AnnotationError, match="leftImg8bit/train: expected a directory"):
        SemanticMaps.cityscapes(tmp_path / "gone")


# ---------------------------------------------------------------- crops and colours


def test_crops_are_the_published_ones():
    """Short sides are tenths of the crop's longer side, from half to twice; crops lie anywhere, and are no larger."""
    generator, shorts, places = torch.Generator().manual_seed(0), set(), set()
    for _ in range(400):
        view = _View.cropped((600, 900), (512, 512), (0.5, 2.0), generator)
        shorts.add(min(view.resized))
        assert (view.height, view.width) == tuple(min(512, side) for side in view.resized)
        assert 0 <= view.top <= view.resized[0] - view.height
        assert 0 <= view.left <= view.resized[1] - view.width
        places.add((view.top, view.left, view.flipped))
    assert shorts == {int(x * 0.1 * 512) for x in range(5, 21)}
    assert all(len({place[axis] for place in places}) > 100 for axis in (0, 1))
    assert {place[2] for place in places} == {False, True}
    wide = [_View.cropped((100, 1000), (512, 1024), (0.5, 2.0), generator).resized for _ in range(50)]
    assert max(w for _, w in wide) == 4096  # the long side is at most four times the crop's
    assert {h for h, _ in wide} == {410}


def test_crops_of_masks_are_those_of_the_image(tmp_path):
    values = np.kron(np.random.default_rng(0).integers(0, 3, (6, 8), np.uint8), np.ones((20, 20), np.uint8))
    data = data_of(tmp_path, Image.fromarray(values), (160, 120))
    Image.fromarray(np.repeat(values[..., None] * 80, 3, 2)).save(tmp_path / "images" / "x" / "1.png")
    batches = Batches(data, 3, crop=(64, 96), scales=(0.5, 2.0), mean=(0, 0, 0), std=(1, 1, 1))
    for step in range(3):
        pixels, targets = batches[step]
        assert pixels.shape == (3, 3, 64, 96)
        for image, target in zip(pixels, targets, strict=True):
            masks = target["masks"].masks()
            assert masks.shape[1:] == (64, 96)
            seen = (image[0] / 80).round()
            agree = [(seen[mask] == label).float().mean() for label, mask in zip(target["labels"], masks, strict=True)]
            assert min(agree) > 0.75  # all but where classes meet
    again = Batches(data, 3, crop=(64, 96), scales=(0.5, 2.0), colours=True)
    assert torch.equal(again[5][0], again[5][0])
    assert not torch.equal(again[5][0], Batches(data, 3, crop=(64, 96), scales=(0.5, 2.0))[5][0])


def test_colours():
    """A function of the generator; grey stays grey; brightness, contrast, saturation and hue all change."""
    image = torch.tensor([[200, 50], [20, 120], [90, 220]], dtype=torch.uint8).view(3, 1, 2).expand(3, 8, 2)
    found = [jitter_colours(image, torch.Generator().manual_seed(i)) for i in range(200)]
    assert torch.equal(found[7], jitter_colours(image, torch.Generator().manual_seed(7)))
    assert all(x.dtype == torch.uint8 and x.shape == image.shape for x in found)
    unchanged = sum((x.int() - image.int()).abs().max() <= 2 for x in found)
    assert 3 <= unchanged <= 30  # one of sixteen
    grey = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    for i in range(50):
        out = jitter_colours(grey, torch.Generator().manual_seed(i)).int()
        assert (out == out[:1]).all()
        assert 0.5 * (100 - 33) - 2 <= out[0, 0, 0] <= 1.5 * (100 + 33) + 2
    hsv = np.array([np.array(Image.fromarray(x.permute(1, 2, 0).numpy()).convert("HSV"))[0, 0] for x in found]).astype(
        int
    )
    before = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("HSV"))[0, 0].astype(int)
    turned = (hsv[:, 0] - before[0] + 128) % 256 - 128
    assert 15 < np.abs(turned).max() <= 40
    assert hsv[:, 1].min() < before[1] - 40
    assert np.ptp(hsv[:, 2]) > 80


def test_the_published_recipe():
    recipe = Recipe.semantic()
    assert (recipe.steps, recipe.crop, recipe.scales, recipe.colours) == (160000, (512, 512), (0.5, 2.0), True)
    assert [recipe.learning_rate(s) for s in (0, 80000, 160000)] == pytest.approx([1, 0.5**0.9, 0])
    for changes, message in [
        ({"crop": (512, 500)}, "crop: expected multiples of 32, and no size"),
        ({"size": 512}, "crop: expected multiples of 32, and no size"),
        ({"schedule": "cosine"}, "schedule: expected one of 'step', 'poly'; got 'cosine'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Recipe.semantic(**changes)


# ---------------------------------------------------------------- training


def tiny(data, **changes):
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 8, "num_points": 64}
    return Mask2FormerConfig.tiny(len(data.label_names), label_names=data.label_names, **{**sizes, **changes})


@pytest.fixture(scope="module")
def beach(tmp_path_factory):
    """16-bit maps with 0 for what does not count, beside JPEG files."""
    return write_semantic(Beach(length=4, size=64), tmp_path_factory.mktemp("beach"), np.uint16, offset=1)


def test_the_commands(beach, tmp_path):
    """Trained, evaluated and segmented; the model knows that it is one of semantic segmentation."""
    torch.manual_seed(0)
    Mask2Former(tiny(Beach)).save_pretrained(tmp_path / "start")
    (tmp_path / "names.txt").write_text("\n".join(Beach.label_names))
    files = ("--annotations", beach[0], "--images", beach[1], "--labels", tmp_path / "names.txt", "--reduce-labels")
    data, run = ("--data", "semantic", *files, "--ignore-label", 999), tmp_path / "run"
    validation = ("--validation-annotations", beach[0], "--validation-images", beach[1])
    options = ("--weights", tmp_path / "start", "--steps", 1, "--batch-size", 2, "--size", 64, "--workers", 0)
    code, output = m2f("train", "-o", run, *data, *validation, *options, "--device", "cpu")
    assert code == 0, output
    assert "mIoU 0." in output
    config = Mask2Former.from_pretrained(run).config
    assert (config.semantic_only, config.image_size, config.label_names) == (True, (64, 256), Beach.label_names)
    assert of_data(config, Beach(), Recipe()).semantic_only is False
    code, output = m2f("evaluate", *data, "--weights", run, "-o", tmp_path / "out", "--json", tmp_path / "r.json")
    assert code == 0, output
    assert 0 <= json.loads((tmp_path / "r.json").read_text())["miou"]["all"]["miou"] < 0.9
    values = np.asarray(Image.open(tmp_path / "out" / "003.semantic.png"))
    assert 1 <= values.min() <= values.max() <= 4  # those of the maps
    code, output = m2f("segment", beach[1], "--weights", run, "--task", "semantic", "-o", tmp_path / "segmented")
    assert (code, "4 of 4 images segmented" in output) == (0, True)


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes"])
def test_published_layouts_train(kind, tmp_path):
    {"ade20k": ade20k, "cityscapes": cityscapes}[kind](tmp_path / "data")
    torch.manual_seed(0)
    Mask2Former(tiny(getattr(SemanticMaps, kind)(tmp_path / "data"))).save_pretrained(tmp_path / "start")
    arguments = ("--data", kind, "--images", tmp_path / "data", "--weights", tmp_path / "start", "--device", "cpu")
    options = ("--steps", 1, "--batch-size", 1, "--size", 64, "--workers", 0)
    code, output = m2f("train", "-o", tmp_path / "run", *arguments, *options)
    assert code == 0, output
    assert "mIoU" in output
    config = Mask2Former.from_pretrained(tmp_path / "run").config
    assert config.image_size == ((64, 256) if kind == "ade20k" else (128, 512))
    recipe = torch.load(tmp_path / "run" / "checkpoint.pth")["recipe"]
    assert recipe["crop"] == ((64, 64) if kind == "ade20k" else (64, 128))
    assert recipe["schedule"] == "poly"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "semantic"], "--annotations, --images: expected both for semantic data"),
        (
            ["--data", "semantic", "--annotations", "maps", "--images", "images"],
            "labels: expected the names of the classes",
        ),
        (["--data", "semantic", "--annotations", "m", "--images", "i", "--labels", "a"], "i: expected a directory"),
        (["--data", "semantic", "--annotations", "m", "--images", "i", "--labels", "gone.txt"], "gone.txt"),
        (["--data", "instance", "--ignore-label", "0"], "--ignore-label: only for --data semantic; got instance"),
        (["--data", "panoptic", "--reduce-labels"], "--reduce-labels: only for --data semantic; got panoptic"),
        (["--data", "ade20k"], "--images: expected the root directory of ade20k, and no --annotations"),
        (["--data", "ade20k", "--images", "gone"], "gone/images/training: expected a directory"),
        (["--data", "cityscapes", "--images", "x", "--validation-images", "y"], "whose layout has them"),
        (["--data", "masks"], "data: expected shapes, instance, panoptic, semantic, ade20k or cityscapes; got 'masks'"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cityscapes(tmp_path / "x")
    code, output = m2f("train", "-o", "run", *arguments)
    assert (code, output.count("\n")) == (2, 1)
    assert output.startswith("error: ")
    assert message in output


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Label maps on disk, crops, colours, the polynomial schedule; new images; three seeds."""
    found = []
    for seed in range(3):
        folders = [tmp_path / f"{seed}-{name}" for name in ("train", "validation")]
        for length, folder, number in ((600, folders[0], seed), (100, folders[1], 100 + seed)):
            write_semantic(Beach(length=length, size=96, seed=number), folder)
        train, validation = (
            SemanticMaps.from_directories(folder / "images", folder / "maps", Beach.label_names) for folder in folders
        )
        torch.manual_seed(seed)
        config = Mask2FormerConfig.tiny(4, label_names=Beach.label_names)
        changes = {"crop": (96, 96), "batch_size": 8, "lr": 5e-4, "backbone_lr": 1.0, "workers": 0, "seed": seed}
        recipe = Recipe.semantic(steps=800, **changes, save_every=800, evaluate_every=200, evaluate_count=100)
        run = Trainer(Mask2Former(config), train, recipe, tmp_path / f"run{seed}", validation=validation)
        run.run()
        found.append(evaluate_semantic(Mask2Former.from_pretrained(run.out), validation).miou)
    print("mIoU:", found)
    assert min(found) >= 0.9
    assert statistics.median(found) >= 0.9
