"""m2f evaluate: the figures of COCO's own tools, of models and of results on disk, which carry the data's ids."""

import contextlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from m2f_model import cli
from m2f_model.data import Shapes
from m2f_model.evaluate import SemanticCounts, label_map
from tests.model.command import m2f
from tests.model.generated import write_instances, write_panoptic, write_semantic

MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "shapes"
H, W = 20, 30
CATEGORIES = [{"id": 5 + 3 * i, "name": f"class {i}", "isthing": int(i < 3)} for i in range(5)]


def evaluate(*arguments):
    code, output = m2f("evaluate", *arguments)
    assert code == 0, output
    return output


# ---------------------------------------------------------------- generated data, and results that are wrong in places


def maps(random, count):
    """Segment ids [H, W] of `count` segments (0: none) made of rectangles; all of those that are left have pixels."""
    ids = np.zeros((H, W), np.int64)
    for number in random.permutation(count) + 1:
        y, x = random.integers(0, H - 4), random.integers(0, W - 4)
        ids[y : y + random.integers(2, 14), x : x + random.integers(2, 18)] = number
    return ids


def colours(ids):
    return Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8))


def record(random, ids, name, image_id, crowds):
    """COCO's entry of a map; each label has a crowd at most."""
    segments, has_crowd = [], set()
    for number in np.unique(ids[ids > 0]).tolist():
        label = int(random.integers(5))
        crowd = crowds and label < 3 and label not in has_crowd and random.random() < 0.25
        if crowd:
            has_crowd.add(label)
        entry = {"id": number, "category_id": 5 + 3 * label, "area": int((ids == number).sum()), "bbox": [0, 0, 1, 1]}
        segments.append({**entry, "iscrowd": int(crowd)})
    return {"image_id": image_id, "file_name": name, "segments_info": segments}


@pytest.fixture(scope="module")
def panoptic_pair(tmp_path_factory):
    """200 images in COCO's panoptic format, and results: moved, relabelled and invented segments; some images empty."""
    folder, random = tmp_path_factory.mktemp("panoptic"), np.random.default_rng(0)
    for name in ("images", "truth", "found"):
        (folder / name).mkdir()
    truth, found, images = [], [], []
    for i in range(200):
        name = f"{i}.png"
        Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(folder / "images" / name)
        images.append({"id": 3 * i + 1, "file_name": name, "height": H, "width": W})
        ids = maps(random, int(random.integers(0, 7))) if i % 20 else np.zeros((H, W), np.int64)
        guess = np.roll(ids, random.integers(-1, 2, 2), (0, 1))
        guess[random.random((H, W)) < 0.03] = 0
        extra = maps(random, 2)
        guess = np.where((extra > 0) & (random.random() < 0.5), extra + 300, guess) if i % 30 else guess * 0
        colours(ids).save(folder / "truth" / name)
        colours(guess).save(folder / "found" / name)
        truth.append(record(random, ids, name, 3 * i + 1, crowds=True))
        found.append(record(random, guess, name, 3 * i + 1, crowds=False))
        known = {s["id"]: s["category_id"] for s in truth[-1]["segments_info"]}
        for segment in found[-1]["segments_info"]:
            if random.random() < 0.8:
                segment["category_id"] = known.get(segment["id"], segment["category_id"])
    for name, annotations in (("truth", truth), ("found", found)):
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def by_the_definition(folder):
    """{label: (pq, sq, rq)}: Kirillov et al. 2019, sections 4.2 and 4.3, with sets of pixels."""
    files = [json.loads((folder / f"{name}.json").read_text()) for name in ("truth", "found")]
    sums = {c["id"]: [0.0, 0, 0, 0] for c in CATEGORIES}
    for truth, found in zip(*(f["annotations"] for f in files), strict=True):
        pixels = [
            np.asarray(Image.open(folder / kind / r["file_name"])).astype(int) @ [1, 256, 65536]
            for kind, r in (("truth", truth), ("found", found))
        ]
        sets = [
            [(s, set(np.flatnonzero(ids == s["id"]).tolist())) for s in r["segments_info"]]
            for ids, r in zip(pixels, (truth, found), strict=True)
        ]
        void = set(np.flatnonzero(pixels[0] == 0).tolist())
        matched = set()
        for target, there in sets[0]:
            if target["iscrowd"]:
                continue
            sums[target["category_id"]][2] += 1
            for guess, here in sets[1]:
                iou = len(here & there) / len((here | there) - (void - there))
                if guess["category_id"] == target["category_id"] and iou > 0.5:
                    matched.add(guess["id"])
                    sums[target["category_id"]][0] += iou
                    sums[target["category_id"]][1] += 1
                    sums[target["category_id"]][2] -= 1
        for guess, here in sets[1]:
            excused = set(void)
            for target, there in sets[0]:
                if target["iscrowd"] and target["category_id"] == guess["category_id"]:
                    excused |= there
            if guess["id"] not in matched and len(here & excused) <= len(here) / 2:
                sums[guess["category_id"]][3] += 1
    return {
        k: (iou / (tp + fn / 2 + fp / 2), iou / max(tp, 1), tp / (tp + fn / 2 + fp / 2))
        for k, (iou, tp, fn, fp) in sums.items()
    }


def report_of(folder, path, *arguments):
    data = ("--data", "panoptic", "--annotations", folder / "truth.json", "--images", folder / "images")
    evaluate(*data, "--json", path, *arguments)
    return json.loads(path.read_text())


def test_panoptic_quality_by_the_definition(panoptic_pair, tmp_path):
    report = report_of(panoptic_pair, tmp_path / "r.json", "--results", panoptic_pair / "found.json")
    assert report["images"] == 200
    expected = by_the_definition(panoptic_pair)
    for category in CATEGORIES:
        ours = report["pq"]["classes"][category["name"]]
        assert tuple(ours.values()) == pytest.approx(expected[category["id"]], abs=1e-9)
        assert 0.1 < ours["pq"] < 0.9
    for part, chosen in (("all", (0, 1)), ("things", (1,)), ("stuff", (0,))):
        values = [expected[c["id"]] for c in CATEGORIES if c["isthing"] in chosen]
        assert tuple(report["pq"][part].values()) == pytest.approx(np.mean(values, 0), abs=1e-9)


def test_panoptic_quality_is_that_of_panopticapi(panoptic_pair, tmp_path):
    """The code of the metric's authors, on the same files."""
    reason = "not installed: pip install git+https://github.com/cocodataset/panopticapi.git"
    published = pytest.importorskip("panopticapi.evaluation", reason=reason)
    with contextlib.redirect_stdout(io.StringIO()):
        files = [str(panoptic_pair / name) for name in ("truth.json", "found.json", "truth", "found")]
        theirs = published.pq_compute(*files)
    ours = report_of(panoptic_pair, tmp_path / "r.json", "--results", panoptic_pair / "found.json")["pq"]
    for part, name in (("all", "All"), ("things", "Things"), ("stuff", "Stuff")):
        for key in ("pq", "sq", "rq"):
            assert ours[part][key] == pytest.approx(theirs[name][key], abs=1e-9)
    for category in CATEGORIES:
        assert ours["classes"][category["name"]] == pytest.approx(theirs["per_class"][category["id"]], abs=1e-9)


def figures(report):
    """Those of average precision, in COCO's words: -1 where there are none to find."""
    return [-1 if x is None else x for x in report["ap"]["all"].values()]


@pytest.mark.parametrize("ids", ["numbers", "strings"])
def test_average_precision_is_that_of_pycocotools(ids, tmp_path):
    """200 images with polygons, run lengths, crowds, equal scores and more results than 100 an image."""
    random = np.random.default_rng(1)
    (tmp_path / "images").mkdir()
    images, annotations, results = [], [], []
    for i in range(200):
        name = f"{i}.png"
        Image.fromarray(np.zeros((H * 4, W * 4, 3), np.uint8)).save(tmp_path / "images" / name)
        key = 1000 - i if ids == "numbers" else f"image {999 - i}"
        images.append({"id": key, "file_name": name, "height": H * 4, "width": W * 4})
        for _ in range(int(random.integers(0, 6))):
            x, y = random.uniform(0, 80), random.uniform(0, 50)
            w, h = random.uniform(4, 70), random.uniform(4, 50)
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            encoded = coco.merge(coco.frPyObjects([polygon], H * 4, W * 4))
            label, crowd = int(random.integers(3)), int(random.random() < 0.1)
            entry = {"id": len(annotations) + 1, "image_id": key, "category_id": 2 + label, "iscrowd": crowd}
            entry |= {"area": w * h, "bbox": [x, y, w, h], "segmentation": [polygon]}
            if crowd:
                entry["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
            annotations.append(entry)
            for _ in range(int(random.integers(*((60, 90) if i % 50 == 9 else (0, 3))))):
                moved = np.array(polygon) + np.tile(random.normal(0, 1.5, 2), 4)
                guess = coco.merge(coco.frPyObjects([moved.tolist()], H * 4, W * 4))
                guess = {"size": guess["size"], "counts": guess["counts"].decode()}
                category = 2 + (label if random.random() < 0.9 else int(random.integers(3)))
                score = round(float(random.random()), 1)
                results.append({"image_id": key, "category_id": category, "score": score, "segmentation": guess})
    categories = [{"id": 2 + i, "name": f"class {i}"} for i in range(4)]  # of the last there is none
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "instance.json").write_text(json.dumps(results))
    assert max(Counter(r["image_id"] for r in results).values()) > 100
    with contextlib.redirect_stdout(io.StringIO()):
        tables = COCO(tmp_path / "truth.json")
        judge = COCOeval(tables, tables.loadRes(results), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    data = ("--data", "instance", "--annotations", tmp_path / "truth.json", "--images", tmp_path / "images")
    output = evaluate(*data, "--results", tmp_path, "--json", tmp_path / "r.json", "--per-class")
    assert ("class 0" in output, "class 3" in output) == (True, False)
    report = json.loads((tmp_path / "r.json").read_text())
    assert figures(report) == pytest.approx(list(judge.stats[:6]), abs=1e-9)
    assert 0.05 < judge.stats[0] < 0.8
    assert judge.stats[4] > 0  # medium ones
    for k in range(3):
        each = judge.eval["precision"][:, :, k, 0, -1]
        assert report["ap"]["classes"][f"class {k}"]["ap"] == pytest.approx(each.mean(), abs=1e-9)
    assert set(report) == {"images", "ap"}  # there are no panoptic results


def test_mean_iou_by_the_confusion_matrix(tmp_path):
    """200 label maps with ignored pixels; the figures from the matrix, counted pixel by pixel."""
    random = np.random.default_rng(2)
    for name in ("images", "maps", "out"):
        (tmp_path / name).mkdir()
    table, records = np.zeros((6, 6), int), []
    for i in range(200):
        truth = random.integers(0, 5, (H, W), np.uint8)
        truth[random.random((H, W)) < 0.2] = 255
        found = np.where(random.random((H, W)) < 0.6, truth % 7, random.integers(0, 6, (H, W))).astype(np.uint8)
        Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(truth).save(tmp_path / "maps" / f"{i}.png")
        Image.fromarray(found).save(tmp_path / "out" / f"{i}.semantic.png")
        records.append({"image_id": str(i), "file_name": f"{i}.semantic.png"})
        for t, f in zip(truth.flat, found.flat, strict=True):
            if t < 255:
                table[t, f] += 1
    (tmp_path / "out" / "semantic.json").write_text(json.dumps({"annotations": records, "categories": []}))
    data = ("--data", "semantic", "--annotations", tmp_path / "maps", "--images", tmp_path / "images")
    evaluate(*data, "--labels", "a,b,c,d,e,f", "--results", tmp_path / "out", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())["miou"]
    right, size = table.diagonal()[:5], table.sum(1)[:5]
    ious = right / (size + table.sum(0)[:5] - right)
    assert table.sum(1)[5] == 0  # of label 5 there is none in the truth, but in the results: no IoU of its own
    assert list(report["classes"]) == list("abcde")
    assert [x["iou"] for x in report["classes"].values()] == pytest.approx(ious, abs=1e-9)
    expected = [ious.mean(), (ious * size).sum() / size.sum(), (right / size).mean(), right.sum() / size.sum()]
    assert list(report["all"].values()) == pytest.approx(expected, abs=1e-9)


def test_counts_of_labels():
    counts = SemanticCounts(2)
    assert counts.quality() == (0, 0, 0, 0)
    assert counts.ious() == [None, None]
    counts.add(torch.tensor([[0, 1, -1, 9]]), torch.tensor([[0, 0, 0, 255]]))  # what is no label is a mistake
    assert counts.ious() == [1 / 3, None]
    assert counts.quality() == pytest.approx((1 / 3, 1 / 3, 1 / 3, 1 / 3))
    with pytest.raises(ValueError, match=r"found: expected the truth's size, \[1, 2\]; got \[2, 1\]"):
        counts.add(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images of shapes in all three formats."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, write in (("p", write_panoptic), ("i", write_instances), ("s", write_semantic)):
        write(Shapes(length=6, seed=1), folder / name)
    return folder


def arguments_of(kind, folder):
    if kind == "semantic":
        names = ("--labels", ",".join(Shapes.label_names))
        return ("--data", kind, "--annotations", folder / "s" / "maps", "--images", folder / "s" / "images", *names)
    d, name = {"panoptic": ("p", "panoptic"), "instance": ("i", "instances")}[kind]
    return ("--data", kind, "--annotations", folder / d / f"{name}.json", "--images", folder / d / "images")


@pytest.mark.parametrize("kind", ["panoptic", "instance", "semantic"])
def test_a_model_and_its_results(kind, folder, tmp_path):
    """Written results score as the model does, carry the data's ids, and are read by COCO's tools as they are."""
    data, out = arguments_of(kind, folder), tmp_path / "out"
    options = ("--weights", MODEL, "--device", "cpu", "--batch-size", 4, "--size", 128, 256, "--threshold", 0.5)
    output = evaluate(*data, *options, "-o", out, "--json", tmp_path / "a.json")
    evaluate(*data, "--results", out, "--json", tmp_path / "b.json")
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert a == b
    assert set(a) == {
        "images",
        *{"panoptic": ("pq", "ap", "miou"), "instance": ("pq", "ap"), "semantic": ("miou",)}[kind],
    }
    metric = {"panoptic": "pq", "instance": "ap", "semantic": "miou"}[kind]
    assert f"{100 * a[metric]['all'][metric]:.2f}" in output
    if "pq" in a:
        assert a["pq"]["all"]["pq"] > 0.6
        content = json.loads((out / "panoptic.json").read_text())
        assert [r["image_id"] for r in content["annotations"]] == list(range(1000, 1006))
        assert {s["category_id"] for r in content["annotations"] for s in r["segments_info"]} <= {7, 17, 27, 37, 47}
    if "miou" in a:
        assert a["miou"]["all"]["miou"] > 0.8
    if kind == "instance":
        with contextlib.redirect_stdout(io.StringIO()):
            tables = COCO(folder / "i" / "instances.json")
            judge = COCOeval(tables, tables.loadRes(str(out / "instance.json")), "segm")
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        assert figures(a) == pytest.approx(list(judge.stats[:6]), abs=1e-9)
        assert judge.stats[0] > 0.4
    if kind == "semantic":
        counts = SemanticCounts(5)
        for i in range(6):
            found = np.asarray(Image.open(out / f"{i:03}.semantic.png")).astype(np.int64)
            counts.add(torch.from_numpy(found), label_map(Shapes(seed=1)[i]))
        assert a["miou"]["all"] == pytest.approx(counts.quality()._asdict(), abs=1e-9)


def test_metrics_and_count(folder, tmp_path):
    data = arguments_of("panoptic", folder)
    output = evaluate(*data, "--weights", MODEL, "--count", 1, "--metrics", "miou", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["images"], set(report)) == (1, {"images", "miou"})
    assert "intersection over union, 1 images" in output
    assert "ground" not in output
    output = evaluate("--data", "shapes", "--weights", MODEL, "--count", 2, "--dtype", "bf16", "--per-class")
    assert all(title in output for title in cli._TITLES.values())
    assert "ground" in output


def test_labels_in_another_order(folder, tmp_path):
    """The model's labels are the data's by name; those that the data lack are left out."""
    content = json.loads((folder / "p" / "panoptic.json").read_text())
    content["categories"].reverse()
    (tmp_path / "panoptic").symlink_to(folder / "p" / "panoptic")
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    reports = []
    for path in (folder / "p" / "panoptic.json", tmp_path / "panoptic.json"):
        data = ("--data", "panoptic", "--annotations", path, "--images", folder / "p" / "images")
        evaluate(*data, "--weights", MODEL, "--json", tmp_path / "r.json")
        reports.append(json.loads((tmp_path / "r.json").read_text()))
    for metric in ("pq", "ap", "miou"):
        parts = [{**report[metric].pop("classes"), **report[metric]} for report in reports]
        for part, values in parts[0].items():
            assert values == pytest.approx(parts[1][part], abs=1e-6), (metric, part)
    for entry in content["categories"]:
        entry["name"] = {"disc": "coin"}.get(entry["name"], entry["name"])
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    code, output = m2f("evaluate", *data, "--weights", MODEL)
    assert (code, "expected labels that the model knows; it has no 'coin'" in output) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --weights or --results"),
        (["--weights", MODEL, "--results", "x"], "expected either --weights or --results"),
        (["--results", "gone"], "gone: no such file or directory"),
        (["--results", "."], ".: expected results, panoptic.json or instance.json or semantic.json"),
        (["--results", ".", "--size", "9", "9"], "--size: expected none with --results"),
        (["--weights", MODEL, "--metrics", "pq,map"], "metrics: expected some of pq, ap, miou for these data; got map"),
        (["--weights", MODEL, "--metrics", ","], "metrics: expected some of pq, ap, miou for these data; got none"),
        (["--weights", MODEL, "--count", "0"], "count: expected at least 1; got 0"),
        (["--weights", MODEL, "--batch-size", "0"], "--batch-size: expected at least 1; got 0"),
        (["--weights", MODEL, "--threshold", "2"], "threshold: expected 0 to 1; got 2.0"),
        (["--weights", MODEL, "--dtype", "fp8"], "--dtype: expected fp32, bf16, fp16; got 'fp8'"),
        (["--weights", MODEL, "--labels", "a,b"], "--labels: only for --data semantic; got panoptic"),
        (["--weights", MODEL, "--size", "9", "8"], "image_size: expected (short, long) sides"),
        (["--weights", MODEL, "--config", "r50-coco-panoptic"], "--config is for detectron2 checkpoints"),
        (["--weights", MODEL, "--json", "gone/r.json"], "json: no directory "),
        (["--weights", MODEL, "--device", "abacus"], "--device: expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_mistakes(arguments, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = m2f("evaluate", *arguments_of("panoptic", folder), *arguments)
    assert (code, output.count("\n")) == (2, 1)
    assert output.startswith("error: ")
    assert message in output


def test_results_that_do_not_fit(folder, tmp_path):
    """One line with the file and what is wrong."""
    data, out = arguments_of("panoptic", folder), tmp_path / "out"
    evaluate(*data, "--weights", MODEL, "-o", out)
    whole = {name: json.loads((out / f"{name}.json").read_text()) for name in ("panoptic", "instance", "semantic")}

    def first(content, **changes):
        records = content["annotations"] if isinstance(content, dict) else content
        return [{**records[0], **changes}, *records[1:]]

    small, short = {"size": [1, 1], "counts": "1"}, {"size": [128, 128], "counts": [4, 5]}
    for name, records, message in [
        ("panoptic", first(whole["panoptic"], image_id="nobody"), "it has a result of 'nobody'"),
        ("panoptic", whole["panoptic"]["annotations"][1:], "expected a result of every image; none of 1000"),
        ("panoptic", first(whole["panoptic"], image_id=1001), "image 1001 is there twice"),
        ("panoptic", first(whole["panoptic"], file_name="gone.png"), "image 1000: "),
        ("panoptic", first(whole["panoptic"], segments_info=[]), "expected segments that panoptic.json lists"),
        ("panoptic", "nothing", "expected a list of results, each with image_id, file_name, segments_info"),
        ("instance", first(whole["instance"], category_id=3), "expected the data's category ids; got 3"),
        ("instance", first(whole["instance"], score="high"), "expected a number as score; got 'high'"),
        ("instance", first(whole["instance"], score=float("nan")), "expected a number as score; got nan"),
        (
            "instance",
            first(whole["instance"], segmentation=[[1, 2]]),
            "expected a mask of COCO's; a polygon",
        ),
        ("instance", first(whole["instance"], segmentation=small), "its size is [1, 1], the image's [128, 128]"),
        ("instance", first(whole["instance"], segmentation=short), "its run lengths add up to 9"),
        ("instance", first(whole["instance"], segmentation=None), "expected a mask of COCO's; got None"),
        ("instance", first(whole["instance"], category_id=[3]), "expected the data's category ids; got [3]"),
        ("instance", first(whole["instance"], image_id=[1]), "it has a result of [1]"),
        (
            "panoptic",
            first(whole["panoptic"], segments_info=[{}]),
            "expected segments_info with an id and a category_id",
        ),
        ("panoptic", first(whole["panoptic"], segments_info=3), "expected segments_info with an id"),
        ("panoptic", first(whole["panoptic"], file_name=3), "image 1000: "),
        ("semantic", first(whole["semantic"], file_name="gone.png"), "image 1000: "),
    ]:
        path = out / f"{name}.json"
        before = path.read_text()
        path.write_text(json.dumps(records if name == "instance" or records == "nothing" else {"annotations": records}))
        metric = {"panoptic": "pq", "instance": "ap", "semantic": "miou"}[name]
        code, output = m2f("evaluate", *data, "--results", out, "--metrics", metric)
        assert (code, output.count("\n")) == (2, 1), output
        assert str(tmp_path) in output
        assert message in output
        path.write_text(before)
    (out / "semantic.json").unlink()
    code, output = m2f("evaluate", *data, "--results", out, "--metrics", "pq,miou")
    assert (code, "expected results, semantic.json" in output) == (2, True)
    (out / "semantic.json").write_text("{")
    code, output = m2f("evaluate", *data, "--results", out / "semantic.json")
    assert (code, "semantic.json: expected JSON in UTF-8" in output) == (2, True)
