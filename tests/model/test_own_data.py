"""Costs of own data in training and in results: figures that the documentation quotes. Takes minutes."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from m2f_model.coco import CocoInstances

pytestmark = pytest.mark.slow

#: Annotations in each image of the data set of 100 000, about as many as COCO has.
EACH = 10


def write(directory, sizes, annotations, pixels):
    """A data set in COCO's format: images of `sizes` (height, width), all with the same `annotations`."""
    (directory / "images").mkdir()
    Image.fromarray(pixels).save(directory / "images" / "0.jpg")
    first = directory / "images" / "0.jpg"
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    for i, (h, w) in enumerate(sizes):
        if i:
            (directory / "images" / f"{i}.jpg").write_bytes(first.read_bytes())
        content["images"].append({"id": i, "file_name": f"{i}.jpg", "height": h, "width": w})
        content["annotations"] += [
            {"id": i * len(annotations) + k, "image_id": i, "category_id": 1, "iscrowd": 0, "segmentation": s}
            for k, s in enumerate(annotations)
        ]
    (directory / "instances.json").write_text(json.dumps(content))
    return directory / "instances.json", directory / "images"


def circle(x, y, radius, corners=40):
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return [np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], -1).round(2).flatten().tolist()]


def test_check_of_a_hundred_thousand_annotations(tmp_path):
    """Images of 640 x 480, polygons of 40 points, every second one as compressed run lengths; reading the JSON file
    included; less than a minute of one core."""
    from pycocotools import mask as coco

    polygons = [circle(60 + 50 * k, 240, 45) for k in range(EACH)]
    encoded = [coco.merge(coco.frPyObjects(p, 480, 640)) for p in polygons[1::2]]
    polygons[1::2] = [{"size": [480, 640], "counts": e["counts"].decode()} for e in encoded]
    pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    paths = write(tmp_path, [(480, 640)] * (100_000 // EACH), polygons, pixels)
    began, began_cpu = time.monotonic(), time.process_time()
    data = CocoInstances(*paths)
    data.check()
    seconds, cpu = time.monotonic() - began, time.process_time() - began_cpu
    print(f"100 000 annotations of {len(data)} images checked in {seconds:.1f} s, {cpu:.1f} s of CPU time")
    assert cpu < 60


def test_memory_of_a_worker(tmp_path):
    """1000 instances, each as large as the image could hold, in an image of 1024 x 1024: a process that prepares the
    batch, from its start, needs less than 1 GiB."""
    g = np.random.default_rng(0)
    polygons = [circle(*g.uniform(300, 700, 2), g.uniform(100, 300)) for _ in range(1000)]
    paths = write(tmp_path, [(1024, 1024)], polygons, g.integers(0, 255, (1024, 1024, 3), np.uint8))
    program = """
import resource, sys, torch
from m2f_model.coco import CocoInstances
from m2f_model.data import Batches
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(1)
before = peak()
batches = Batches(CocoInstances(*sys.argv[1:3]), 1, size=1024)
most = 0
for step in range(8):  # of scales from 0.1 to 2
    pixels, targets = batches[step]
    most = max(most, len(targets[0]["labels"]))
print(before, peak(), most)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, paths)], capture_output=True, text=True, check=True
    )
    before, peak, most = map(float, result.stdout.split())
    print(f"process that prepares batches: {peak:.0f} MiB, {before:.0f} before the first; up to {most:.0f} instances")
    assert most > 900
    assert peak < 1024


@pytest.mark.parametrize("semantic_only", [False, True])
def test_memory_of_semantic_results(semantic_only):
    """150 labels, an image of 3 megapixels, 100 queries: less than 200 MB above what the model itself takes."""
    program = """
import resource, sys, torch
from m2f_kernels import FactoredMasks
from m2f_model import Mask2FormerOutput
from m2f_model.postprocess import Frame, semantic
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(1)
torch.manual_seed(0)
size = 1536, 2048
output = Mask2FormerOutput(
    torch.randn(1, 100, 151), FactoredMasks(torch.randn(1, 100, 256), torch.randn(1, 256, 160, 214)), []
)
semantic(output, [Frame((640, 856), (640, 853), (8, 8))])
before = peak()
(labels,) = semantic(output, [Frame((640, 856), (640, 853), size)], resize_scores=sys.argv[1] == "True")
assert labels.shape == size and labels.unique().numel() > 50
print(peak() - before)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(semantic_only)], capture_output=True, text=True, check=True
    )
    mib = float(result.stdout)
    which = "scores" if semantic_only else "masks"
    print(f"semantic result of 150 labels at 3 megapixels, {which} resized: {mib:.0f} MiB above the model")
    assert mib < 190
