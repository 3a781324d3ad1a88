"""Real inputs: photographs through a backbone, sampling locations and masks, each in two distributions.

No download: the photographs are scikit-image's, the backbone a ResNet-50 of `transformers` built from its
configuration with seeded random weights, followed by the 1x1 projection and group norm of Mask2Former's pixel decoder.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Levels

SEED = 0
#: The tiny model trained on synthetic shapes.
SHAPES_MODEL = Path(__file__).parent / "models" / "shapes"
#: The photographs that masks are cut from.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
#: Weight of the squared distance, in sides of the image, against the squared difference of colours of unit variance.
DISTANCE_WEIGHT = 8.0
#: Coordinates keep this distance, in pixels, from pixel centres: there the gradient jumps, and rounding alone would
#: decide which side an implementation takes.
CENTRE_MARGIN = 1 / 64


def generator(offset: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + offset)


def photograph(height: int, width: int, name: str = "astronaut") -> Tensor:
    """One of scikit-image's photographs, [1, 3, height, width], normalised."""
    from skimage import data  # an optional dependency, and slow to import

    image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() / 255
    image = F.interpolate(image, size=(height, width), mode="bilinear", antialias=True)
    return (image - 0.45) / 0.225


@torch.no_grad()
def projected_levels(
    height: int, width: int, channels: int, stride_64: bool = False, stages: tuple[int, ...] = (2, 3, 4)
) -> list[Tensor]:
    """Feature maps [1, channels, h, w] of the photograph at strides 8, 16, 32 (and 64), each of about unit variance."""
    from transformers import ResNetBackbone, ResNetConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        backbone = ResNetBackbone(ResNetConfig(out_features=[f"stage{i}" for i in stages])).eval()
        features = backbone(photograph(height, width)).feature_maps
        levels = [torch.nn.Conv2d(feature.shape[1], channels, 1)(feature) for feature in features]
        if stride_64:
            down = torch.nn.Conv2d(features[-1].shape[1], channels, 3, stride=2, padding=1)
            levels.append(down(features[-1]))
    return [F.group_norm(level, 32) for level in levels]


def mask_features(height: int, width: int, channels: int) -> Tensor:
    """Features [1, channels, height / 4, width / 4] of the photograph, of about unit variance."""
    return projected_levels(height, width, channels, stages=(1,))[0]


def flatten_levels(levels: list[Tensor], heads: int, batch: int) -> tuple[Tensor, Levels]:
    """value [batch, S, heads, D] of the levels in the given order, and their sizes; odd images are mirrored."""
    flat = torch.cat([level.flatten(2) for level in levels], dim=2)
    mirrored = torch.cat([level.flip(-1).flatten(2) for level in levels], dim=2)
    both = torch.cat([mirrored if i % 2 else flat for i in range(batch)])
    value = both.transpose(1, 2).unflatten(2, (heads, -1)).contiguous()
    return value, [(level.shape[2], level.shape[3]) for level in levels]


def _sizes(levels: Levels) -> Tensor:
    """(w, h) of each level, [L, 1, 2]."""
    return torch.tensor([[w, h] for h, w in levels], dtype=torch.float32)[:, None]


def away_from_centres(locations: Tensor, levels: Levels) -> Tensor:
    """Move coordinates that lie within `CENTRE_MARGIN` of a pixel centre, [..., L, P, 2]."""
    pixel = locations * _sizes(levels) - 0.5
    whole = pixel.floor()
    fraction = (pixel - whole).clamp(CENTRE_MARGIN, 1 - CENTRE_MARGIN)
    return (whole + fraction + 0.5) / _sizes(levels)


def reference_grid(levels: Levels, batch: int) -> Tensor:
    """Each position's own centre, on every level: reference points [batch, S, L, 2] of an encoder."""
    centres = []
    for h, w in levels:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        centres.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(centres)[None, :, None].expand(batch, -1, len(levels), -1).contiguous()


def local_locations(levels: Levels, batch: int, heads: int, points: int) -> Tensor:
    """Locations a few pixels around each position of the levels: [batch, S, heads, L, points, 2].

    The published initialisation (head h looks in direction 2 pi h / heads, point p at distance p + 1) plus unit normal
    noise in pixels.
    """
    reference = reference_grid(levels, batch)
    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    fixed = direction[:, None, None] * (torch.arange(points) + 1.0)[:, None]
    noise = torch.randn(batch, reference.shape[1], heads, len(levels), points, 2, generator=generator(1))
    return away_from_centres(reference[:, :, None, :, None] + (fixed + noise) / _sizes(levels), levels)


def random_locations(levels: Levels, batch: int, queries: int, heads: int, points: int) -> Tensor:
    """Locations uniform over the image: [batch, queries, heads, L, points, 2]."""
    locations = torch.rand(batch, queries, heads, len(levels), points, 2, generator=generator(2))
    return away_from_centres(locations, levels)


def attention_logits(batch: int, queries: int, heads: int, levels: int, points: int) -> Tensor:
    """Unit normal logits [batch, queries, heads, levels, points]."""
    return torch.randn(batch, queries, heads, levels, points, generator=generator(3))


def offsets_of(locations: Tensor, reference: Tensor, levels: Levels) -> Tensor:
    """The offsets in pixels that lead from `reference` [N, Q, L, 2] to `locations`."""
    return (locations - reference[:, :, None, :, None]) * _sizes(levels)


def blob_masks(size: tuple[int, int], batch: int, queries: int, density: float) -> Tensor:
    """Regions of photographs: bool [batch, queries, h*w], of which each row has the share `density` of True.

    Like a predicted mask, a region is what resembles a place: the pixels nearest in colour and position to an anchor
    pixel, in a photograph at half the level's size (a mask is smoother than its pixels). Every query has its own
    anchor, in one of the photographs in turn.
    """
    h, w = size
    source = generator(5)
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    position = torch.stack([x, y]).flatten(1) * DISTANCE_WEIGHT**0.5
    descriptions = []
    for name in PHOTOGRAPHS:
        image = F.interpolate(photograph(max(1, h // 2), max(1, w // 2), name), size=size, mode="bilinear")[0]
        colour = image.flatten(1)
        colour = (colour - colour.mean(1, keepdim=True)) / colour.std(1, keepdim=True)
        descriptions.append(torch.cat([colour, position]))
    attend = torch.zeros(batch * queries, h * w, dtype=torch.bool)
    for i, row in enumerate(attend):
        description = descriptions[i % len(descriptions)]
        anchor = description[:, torch.randint(h * w, (1,), generator=source)]
        distance = (description - anchor).square().sum(0)
        row[distance.topk(max(1, round(density * h * w)), largest=False).indices] = True
    return attend.view(batch, queries, h * w)


@torch.no_grad()
def learned_masks(size: tuple[int, int], batch: int, queries: int) -> Tensor:
    """Masks that a trained model attends with: bool [batch, queries, h*w].

    Those of the last decoder layer of the tiny model in models/shapes (`python -m benchmarks.learning` makes it), on as
    many images of synthetic shapes as it takes. A mask without a pixel attends everywhere, as in the decoder.
    """
    from m2f_model import Mask2Former
    from m2f_model.data import Shapes, collate

    model = Mask2Former.from_pretrained(SHAPES_MODEL)
    images = -(-batch * queries // model.config.num_queries)
    pixels, _ = collate([Shapes(images, seed=2)[i] for i in range(images)])
    logits = model(pixels).auxiliary[-1].masks.logits()
    resized = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    attend = resized.flatten(2).flatten(0, 1)[: batch * queries] >= 0
    attend |= ~attend.any(-1, keepdim=True)
    return attend.view(batch, queries, -1)


def random_masks(keys: int, batch: int, queries: int, density: float) -> Tensor:
    """Independent bits, bool [batch, queries, keys], at least one in each row."""
    attend = torch.rand(batch, queries, keys, generator=generator(6)) < density
    attend[..., 0] |= ~attend.any(-1)
    return attend
