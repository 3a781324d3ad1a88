"""Generated data of other classes than the synthetic shapes', and data sets on disk in the formats that people have."""

import colorsys
import json

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco


class Beach:
    """Discs and stars before a sky and on water: two classes of the shapes' and two new ones, stuff and things each."""

    label_names = ("star", "disc", "water", "sky")
    stuff_labels = (2, 3)

    def __init__(self, length=2048, size=128, seed=0):
        self.length, self.size, self.seed = length, size, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        random = np.random.default_rng((77, self.seed, index))
        size, rows = self.size, np.arange(self.size)[:, None, None]
        horizon = random.uniform(0.3, 0.7) * size + random.uniform(-0.3, 0.3) * (np.arange(size) - size / 2)
        is_sky = rows[..., 0] < horizon
        sky = np.array([90, 140, 230]) + rows / size * np.array([120, 80, 20])
        water = np.array([20, 90, 110]) + 20 * np.sin(rows * random.uniform(0.5, 1.5))
        pixels = np.where(is_sky[..., None], sky, water)
        owner, labels = np.where(is_sky, 0, 1), [3, 2]
        for _ in range(random.integers(1, 6)):
            kind = int(random.integers(2))
            mask = self._draw(kind, random)
            owner[mask] = len(labels)
            labels.append(kind)
            hue = ((0.15, 0.0)[kind] + random.uniform(-0.05, 0.05)) % 1
            pixels[mask] = 255 * np.array(colorsys.hsv_to_rgb(hue, random.uniform(0.5, 1), random.uniform(0.4, 1)))
        pixels = (pixels + random.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        masks = torch.from_numpy(owner)[None] == torch.arange(len(labels))[:, None, None]
        keep = masks.flatten(1).any(1)
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return {"image": image, "labels": torch.tensor(labels)[keep], "masks": masks[keep]}

    def _draw(self, kind, random):
        radius = random.uniform(0.08, 0.22) * self.size
        centre = random.uniform(0.1 * self.size, 0.9 * self.size, 2)
        canvas = Image.new("1", (self.size, self.size))
        if kind == 1:
            ImageDraw.Draw(canvas).ellipse([*(centre - radius), *(centre + radius)], fill=1)
        else:
            angles = random.uniform(0, 2 * np.pi) + np.pi * np.arange(10) / 5
            reach = np.where(np.arange(10) % 2, 0.5, 1.3)[:, None] * radius
            points = centre + reach * np.stack([np.cos(angles), np.sin(angles)], -1)
            ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], fill=1)
        return np.array(canvas)


def write_images(data, directory, suffix=".png"):
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(len(data)):
        Image.fromarray(data[i]["image"].permute(1, 2, 0).numpy()).save(directory / f"{i:03}{suffix}")


def write_panoptic(data, directory):
    """COCO's panoptic format, with ids of its own: images 1000 + i, categories 10 * label + 7. JSON file and images."""
    write_images(data, directory / "images")
    (directory / "panoptic").mkdir()
    images, annotations = [], []
    for i in range(len(data)):
        labels, masks = data[i]["labels"].tolist(), data[i]["masks"].numpy()
        ids = np.zeros(masks.shape[1:], np.int64)
        segments = []
        for k, (label, mask) in enumerate(zip(labels, masks, strict=True)):
            ids[mask] = 300 + k
            box = np.array([*np.argwhere(mask).min(0)[::-1], *np.argwhere(mask).max(0)[::-1]])
            segments.append({"id": 300 + k, "category_id": 10 * label + 7, "iscrowd": 0, "area": int(mask.sum())})
            segments[-1]["bbox"] = [int(x) for x in (*box[:2], *(box[2:] - box[:2] + 1))]
        Image.fromarray(np.stack([ids & 255, ids >> 8, ids * 0], -1).astype(np.uint8)).save(
            directory / "panoptic" / f"{i:03}.png"
        )
        h, w = ids.shape
        images.append({"id": 1000 + i, "file_name": f"{i:03}.png", "height": h, "width": w})
        annotations.append({"image_id": 1000 + i, "file_name": f"{i:03}.png", "segments_info": segments})
    categories = [
        {"id": 10 * i + 7, "name": name, "isthing": int(i not in data.stuff_labels)}
        for i, name in enumerate(data.label_names)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (directory / "panoptic.json").write_text(json.dumps(content))
    return directory / "panoptic.json", directory / "images"


def write_instances(data, directory):
    """COCO's instance format of the things, with the same ids."""
    write_images(data, directory / "images")
    images, annotations = [], []
    for i in range(len(data)):
        for label, mask in zip(data[i]["labels"].tolist(), data[i]["masks"].numpy(), strict=True):
            if label in data.stuff_labels:
                continue
            found = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append({"id": len(annotations) + 1, "image_id": 1000 + i, "category_id": 10 * label + 7})
            annotations[-1] |= {"iscrowd": 0, "area": int(mask.sum()), "bbox": coco.toBbox(found).tolist()}
            annotations[-1]["segmentation"] = {"size": found["size"], "counts": found["counts"].decode()}
        h, w = data[i]["image"].shape[1:]
        images.append({"id": 1000 + i, "file_name": f"{i:03}.png", "height": h, "width": w})
    things = [(i, name) for i, name in enumerate(data.label_names) if i not in data.stuff_labels]
    categories = [{"id": 10 * i + 7, "name": name} for i, name in things]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (directory / "instances.json").write_text(json.dumps(content))
    return directory / "instances.json", directory / "images"


def label_map(sample, ignored=255):
    """int64 [H, W], the label of every pixel."""
    labels = torch.full(sample["image"].shape[1:], ignored)
    for label, mask in zip(sample["labels"].tolist(), sample["masks"], strict=True):
        labels[mask] = label
    return labels


def write_semantic(data, directory, dtype=np.uint8, offset=0, ignored=255):
    """Label maps as grey PNG files, in which `offset` is the value of the first class. Their directory, the images'."""
    write_images(data, directory / "images", ".jpg" if offset else ".png")
    (directory / "maps").mkdir()
    for i in range(len(data)):
        labels = label_map(data[i], ignored=-1).numpy()
        values = np.where(labels < 0, ignored, labels + offset).astype(dtype)
        Image.fromarray(values).save(directory / "maps" / f"{i:03}.png")
    return directory / "maps", directory / "images"
