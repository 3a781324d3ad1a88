"""Fine-tune a model to classes of your own, from a COCO file, and segment with it.

    python examples/finetune_coco.py run        # makes a small set of pictures of stars and rings, and learns it

`--annotations FILE.json --images DIRECTORY` takes your own data instead. Two commands do the
work, `m2f train` and `m2f segment`; both are printed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
CLASSES = ("star", "ring")


def picture(random: np.random.Generator, size: int = 96) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """A picture [size, size, 3], and the class and mask [size, size] of each object."""
    y, x = np.mgrid[:size, :size]
    pixels = random.normal(110, 12, (size, size, 3)) + 30 * np.sin(x / random.uniform(6, 14))[..., None]
    objects: list[tuple[int, np.ndarray]] = []
    for _ in range(random.integers(1, 4)):
        cx, cy = random.uniform(0.2, 0.8, 2) * size
        radius = random.uniform(0.12, 0.25) * size
        distance, angle = np.hypot(x - cx, y - cy), np.arctan2(y - cy, x - cx)
        kind = int(random.integers(2))
        if kind == 0:
            mask = distance < radius * (0.65 + 0.35 * np.cos(5 * angle))
        else:
            mask = (distance < radius) & (distance > 0.55 * radius)
        objects = [(k, m & ~mask) for k, m in objects] + [(kind, mask)]  # the last object is in front
        colour = random.uniform((200, 160, 0), (255, 220, 60)) if kind == 0 else random.uniform(0, (60, 90, 255))
        pixels[mask] = colour
    return pixels.clip(0, 255).astype(np.uint8), [(k, m) for k, m in objects if m.sum() > 20]


def write_coco(folder: Path, count: int, seed: int) -> Path:
    """A COCO instance file beside its pictures: what an annotation tool exports."""
    from pycocotools import mask as coco_mask

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in range(1, count + 1):
        pixels, objects = picture(random)
        name = f"{image_id:04}.png"
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": image_id, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
        for kind, mask in objects:
            runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            box = [float(v) for v in coco_mask.toBbox(runs)]
            runs["counts"] = runs["counts"].decode()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": kind + 1, "segmentation": runs}
                | {"bbox": box, "area": int(mask.sum()), "iscrowd": 0}
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def tile(overlays: list[Path], path: Path, side: int = 160) -> None:
    """A picture of pictures, at most six."""
    whole = Image.new("RGB", (side * len(overlays[:6]), side))
    for i, overlay in enumerate(overlays[:6]):
        whole.paste(Image.open(overlay).resize((side, side)), (i * side, 0))
    whole.quantize(128).save(path)


def run(*command: object) -> None:
    """One command of `m2f`, printed first."""
    words = [str(word) for word in command]
    print("\n$ m2f", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "m2f_model", *words], check=True)


def main(arguments: list[str] | None = None) -> Path:
    """The folder of the segmented pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of everything that this makes")
    parser.add_argument("--annotations", type=Path, help="a COCO instance file (default: stars and rings)")
    parser.add_argument("--images", type=Path, help="the directory of its pictures (default: that of the file)")
    parser.add_argument("--weights", default=str(ROOT / "benchmarks" / "models" / "shapes"), help="where to start from")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--picture", type=Path, help="put the overlays side by side into this file")
    options = parser.parse_args(arguments)

    annotations = options.annotations or write_coco(options.out / "train", 64, seed=0)
    images = options.images or annotations.parent
    unseen = images if options.annotations else write_coco(options.out / "unseen", 6, seed=1).parent

    recipe = ("--steps", options.steps, "--batch-size", 4, "--size", 96, "--lr", 5e-4, "--workers", 0)
    data = ("--data", "instance", "--annotations", annotations, "--images", images)
    run("train", *data, "--weights", options.weights, *recipe, "-o", options.out / "run")
    segmented = options.out / "segmented"
    run("segment", "--weights", options.out / "run", "--task", "instance", "-o", segmented, unseen)
    if options.picture:
        tile(sorted(segmented.glob("**/*.overlay.png")), options.picture)
    print(f"\nOverlays and COCO results are in {segmented}")
    return segmented


if __name__ == "__main__":
    main()
