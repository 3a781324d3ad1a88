"""The loss part of Mask2Former: matching, losses and gradients of ten predictions, from embeddings and features.

Peers: `transformers`' own functions, with points and with full masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import m2f_kernels
from benchmarks import inputs
from benchmarks.cases import (
    OURS,
    Benchmark,
    Case,
    Data,
    Implementation,
    Row,
    Scale,
    Tensors,
    Verdict,
    Work,
    as_given,
    check_relative_l2,
    ratio,
    reference,
    relative_l2,
)  # fmt: skip
from benchmarks.measure import bytes_of

CHANNELS, QUERIES, OUTPUTS, POINTS, NUM_LABELS = 256, 100, 10, 12544, 80
COST_CLASS, COST_MASK, COST_DICE = 2.0, 5.0, 5.0
#: Shares of the image that targets cover, in turn.
DENSITIES = (0.01, 0.04, 0.15)
FRESH, FROM_LOGITS = "m2f_kernels, fresh points", "m2f_kernels, from logits"
TRANSFORMERS, FULL = "transformers, points", "full masks at ground-truth resolution"
STRIDE_4 = "full masks at stride 4"
#: Points of the picture's curve beside `POINTS`; the last with `--full` only.
CURVE = (784, 3136, 50176)
#: The loss at random points may differ this much, relatively, from its mean over several draws; its gradient, more.
LOSS_NOISE, GRADIENT_NOISE, DRAWS = 0.03, 0.5, 3
LOSS, MATCHING, SAMPLE = "loss part", "matching", "point_sample"

# ---------------------------------------------------------------- this package


def _predictions(a: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"class_logits": c, "masks": m2f_kernels.FactoredMasks(embed, a["mask_features"])}
        for c, embed in zip(a["class_logits"], a["mask_embed"], strict=True)
    ]


def _targets(a: dict[str, Any]) -> list[dict[str, Tensor]]:
    return [{"labels": x, "masks": m} for x, m in zip(a["labels"], a["targets"], strict=True)]


def _loss(a: dict[str, Any], num_points: int = POINTS, fresh: bool = False) -> Tensor:
    criterion = m2f_kernels.nn.PointMaskCriterion(NUM_LABELS, num_points=num_points, fresh_points=fresh)
    criterion.to(a["labels"].device)
    return torch.stack(list(criterion(_predictions(a), _targets(a)).values())).sum()


def _matching(a: dict[str, Any], from_logits: bool) -> list[Tensor]:
    predictions = _predictions(a)
    if from_logits:
        predictions = [p | {"masks": logits} for p, logits in zip(predictions, a["mask_logits"], strict=True)]
    matcher = m2f_kernels.nn.HungarianMatcher(num_points=POINTS)
    return [torch.stack(pair) for pairs in matcher(predictions, _targets(a)) for pair in pairs]


def _sample(a: dict[str, Any]) -> Tensor:
    return m2f_kernels.point_sample(a["mask_features"], a["points"])


# ---------------------------------------------------------------- peers


def _published() -> Any:
    from transformers.models.mask2former import modeling_mask2former

    return modeling_mask2former


def published_loss(num_points: int, device: torch.device) -> Any:
    """`Mask2FormerLoss` with the published options, its class weights on `device`."""
    config = SimpleNamespace(
        num_labels=NUM_LABELS, no_object_weight=0.1, train_num_points=num_points, oversample_ratio=3.0,
        importance_sample_ratio=0.75, class_weight=COST_CLASS, dice_weight=COST_DICE, mask_weight=COST_MASK,
    )  # fmt: skip
    return _published().Mask2FormerLoss(config, {}).to(device)


def logits_of(a: dict[str, Any]) -> list[Tensor]:
    """Every output's mask logits [N, Q, h, w], as a published decoder makes them."""
    return [torch.einsum("nqc,nchw->nqhw", embed, a["mask_features"]) for embed in a["mask_embed"]]


def points_loss(a: dict[str, Any], num_points: int = POINTS) -> Tensor:
    """The loss part of `transformers`: targets as float, a matching and a loss for each output."""
    *auxiliary, last = [
        {"masks_queries_logits": m, "class_queries_logits": c}
        for m, c in zip(logits_of(a), a["class_logits"], strict=True)
    ]
    targets, labels = [t.float() for t in a["targets"]], list(a["labels"])
    found = published_loss(num_points, a["labels"].device)(*last.values(), targets, labels, auxiliary)
    weights = {"loss_cross_entropy": COST_CLASS, "loss_mask": COST_MASK, "loss_dice": COST_DICE}
    return torch.stack([weights[name.rstrip("_0123456789")] * x for name, x in found.items()]).sum()


def full_loss(a: dict[str, Any], stride_4: bool) -> Tensor:
    """The same with every pixel: predictions upsampled to the targets' size, or targets shrunk to the predictions'."""
    from scipy.optimize import linear_sum_assignment

    published, criterion, targets = _published(), published_loss(1, a["labels"].device), a["targets"].float()
    resized: Callable[[Tensor], Tensor] = partial(F.interpolate, size=targets.shape[-2:], mode="bilinear")
    if stride_4:
        size, resized = a["mask_features"].shape[-2:], lambda x: x
        targets = F.interpolate(targets, size=size, mode="bilinear", antialias=True)
    total, count = [], a["labels"].numel()
    for logits, classes in zip(logits_of(a), a["class_logits"], strict=True):
        indices = []
        for logit, scores, target, labels in zip(logits, classes, targets, a["labels"], strict=True):
            with torch.no_grad():
                x, t = resized(logit[None])[0].flatten(1), target.flatten(1)
                cost = COST_MASK * published.pair_wise_sigmoid_cross_entropy_loss(x, t)
                cost += COST_DICE * published.pair_wise_dice_loss(x, t)
                cost -= COST_CLASS * scores.softmax(-1)[:, labels]
                queries, chosen = (torch.as_tensor(j) for j in linear_sum_assignment(cost.cpu()))
            indices.append([queries, chosen])
            x, t = resized(logit[None, queries])[0].flatten(1), target[chosen].flatten(1)
            total.append(COST_MASK * published.sigmoid_cross_entropy_loss(x, t, count))
            total.append(COST_DICE * published.dice_loss(x, t, count))
        found = criterion.loss_labels(classes, list(a["labels"]), indices)
        total.append(COST_CLASS * found["loss_cross_entropy"])
    return torch.stack(total).sum()


def _published_matching(a: dict[str, Any], from_logits: bool) -> list[Tensor]:
    """`transformers`' matcher for every output, from mask logits that exist already or from their factors."""
    matcher = published_loss(POINTS, a["labels"].device).matcher
    masks = a["mask_logits"] if from_logits else logits_of(a)
    targets, labels = [t.float() for t in a["targets"]], list(a["labels"])
    found = [matcher(m, c, targets, labels) for m, c in zip(masks, a["class_logits"], strict=True)]
    return [torch.stack([torch.as_tensor(x) for x in pair]) for pairs in found for pair in pairs]


def _lacks(gib: float) -> str | None:
    """The reason why so much memory cannot be had."""
    meminfo = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else "MemAvailable: inf kB"
    free = float(meminfo.partition("MemAvailable:")[2].split()[0]) / 2**20
    return None if gib < free else f"needs about {gib:.0f} GiB of memory, {free:.0f} are free"


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Shape:
    """The part that is measured, the image's side, numbers of targets, of points and of images."""

    what: str
    size: int
    targets: int = 0
    points: int = POINTS
    images: int = 1

    def __str__(self) -> str:
        if self.what == SAMPLE:
            return f"{SAMPLE} {self.size}² C={CHANNELS}"
        text = f"{self.what} {self.size}²{f' N={self.images}' if self.images > 1 else ''} T={self.targets}"
        return text if self.points == POINTS else f"{text} K={self.points}"


@cache
def _tensors(size: int, count: int) -> Tensors:
    """One photograph's mask features; embeddings and classes of every output; regions of photographs as targets."""
    source = inputs.generator(11)
    each = -(-count // len(DENSITIES))
    regions = torch.stack([inputs.blob_masks((size, size), 1, each, density) for density in DENSITIES], 2)
    targets = regions.flatten(1, 2)[:, :count].unflatten(2, (size, size)).contiguous()
    features = inputs.mask_features(size, size, CHANNELS)
    embed = torch.randn(OUTPUTS, 1, QUERIES, CHANNELS, generator=source) * (3 / 16)
    # The first queries predict the targets as well as a linear map of the features can, and a little differently in
    # each output: matching is then not random, and most of a mask is certain.
    wanted = F.adaptive_avg_pool2d(targets.float(), features.shape[2:]).flatten(2)[0] * 8 - 4
    pixels = features[0].flatten(1)
    gram = pixels @ pixels.T + pixels.shape[1] * 1e-3 * torch.eye(CHANNELS)
    fitted = torch.linalg.solve(gram, pixels @ wanted.T).T
    embed[:, :, :count] = fitted[:QUERIES] + 0.1 * embed[:, :, :count]
    return {
        "mask_features": features,
        "mask_embed": embed,
        "class_logits": torch.randn(OUTPUTS, 1, QUERIES, NUM_LABELS + 1, generator=source),
        "labels": torch.randint(0, NUM_LABELS, (1, count), generator=source),
        "targets": targets,
    }


def build(device: str, shape: Shape) -> Data:
    """The truth of losses is the mean of several draws of `transformers`' loss and gradients."""
    if shape.what == SAMPLE:
        return _sample_data(shape.size)
    tensors = dict(_tensors(shape.size, shape.targets))
    if shape.what == MATCHING:
        return Data(tensors | {"mask_logits": torch.stack(logits_of(tensors))}, {}, [], ("indices",))
    if shape.images > 1:  # the given image and its mirror image, with the same predictions
        mirrored = {name: tensors[name].flip(-1) for name in ("mask_features", "targets")}
        along = {"mask_embed": 1, "class_logits": 1}
        tensors = {name: torch.cat([x, mirrored.get(name, x)], along.get(name, 0)) for name, x in tensors.items()}
    there = {name: tensor.to(device) for name, tensor in tensors.items()}
    differentiable = ("mask_features", "mask_embed", "class_logits")
    truth: Tensors = {}
    for _ in range(DRAWS):
        leaves = {name: there[name].detach().requires_grad_() for name in differentiable}
        loss = points_loss(there | leaves)
        found = dict(zip(differentiable, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for name, x in {"loss": loss.detach(), **found}.items():
            truth[name] = truth.get(name, torch.zeros(())) + x.cpu() / DRAWS
    return Data(tensors, truth, [], ("loss",), (torch.ones(()),), differentiable)


def _sample_data(size: int) -> Data:
    points = torch.rand(1, POINTS, 2, generator=inputs.generator(12))
    tensors = {"mask_features": inputs.mask_features(size, size, CHANNELS), "points": points}
    upstream = torch.randn(1, CHANNELS, POINTS, generator=inputs.generator(13))
    truth = reference(_sample, tensors, "cpu", ["mask_features"], upstream)
    return Data(tensors, truth, grad_outputs=(upstream,), differentiable=("mask_features",))


def check(case: Case, implementation: Implementation, data: Data, results: Sequence[Tensor]) -> Verdict:
    """Samples against float64. Losses at random points against the mean of several draws of the published one: the
    exact comparison, with the same points, is a test. Losses of full masks are another quantity: finite."""
    if case.spec.what == SAMPLE:
        return check_relative_l2(case, implementation, data, results)
    if case.spec.what == MATCHING:
        matched = [len(set(x[1].tolist())) == x.shape[1] == data.inputs["labels"].shape[1] for x in results]
        return Verdict(len(matched) == OUTPUTS and all(matched), 0.0)
    output, gradients = (relative_l2(results[i], truth) for i, truth in enumerate(list(data.truth.values())[:2]))
    more = max(1.0, (POINTS / case.spec.points) ** 0.5)
    right = output <= LOSS_NOISE * more and gradients <= GRADIENT_NOISE * more
    if implementation.name in (FULL, STRIDE_4):
        right = all(bool(x.isfinite().all()) for x in results)
    return Verdict(right, output, gradients)


# ---------------------------------------------------------------- cases

#: What passes PyTorch's dispatcher is not all that these write.
_implementation = partial(Implementation, adapt=as_given, counts_writes=False)
MATCHERS = [
    _implementation(OURS, partial(_matching, from_logits=False), ours=True),
    _implementation(FROM_LOGITS, partial(_matching, from_logits=True), ours=True),
    _implementation("transformers", partial(_published_matching, from_logits=False)),
    _implementation("transformers, from logits", partial(_published_matching, from_logits=True)),
]
SAMPLERS = [
    _implementation(OURS, _sample, ours=True),
    _implementation(
        "grid_sample", lambda a: _published().sample_point(a["mask_features"], a["points"], align_corners=False)
    ),
]


def cases(scale: Scale) -> list[Case]:
    small, large = (128, 256) if scale.quick else (512, 1024)
    few, some, *more = (3, 10) if scale.quick else (10, 30, 100)

    def case(shape: Shape, found: list[Implementation], way: str = "forward+backward", **options: Any) -> Case:
        # The expected loss is the same at another K, and so is the truth.
        data = replace(shape, points=POINTS)
        name = f"{shape} {way}" if shape.what == SAMPLE else str(shape)
        made = partial(build, scale.device, data)
        return Case(name, str(data), way, found, build=made, spec=shape, **options)

    def loss(size: int, count: int, images: int = 1) -> Case:
        """All implementations at K = 12544. At the small size one case is enough for memory."""
        # About 6 float planes of each matched mask and output, and 6 of each query while matching.
        gib = size * size * 4 * (OUTPUTS * images * count * 6 + QUERIES * 6) / 2**30
        found = [
            _implementation(OURS, _loss, ours=True),
            _implementation(FRESH, partial(_loss, fresh=True), ours=True),
            _implementation(TRANSFORMERS, points_loss),
            _implementation(STRIDE_4, partial(full_loss, stride_4=True)),
            _implementation(FULL, partial(full_loss, stride_4=False), unavailable=partial(_lacks, gib)),
        ]
        headline = images > 1 or (size, count) in ((large, some), (small, few))
        flags = {"memory": headline or size >= 1024, "headline": headline, "full": not headline}
        return case(Shape(LOSS, size, count, images=images), found, **flags)

    def fewer(points: int) -> Case:
        two = [_implementation(OURS, partial(_loss, num_points=points), ours=True),
               _implementation(TRANSFORMERS, partial(points_loss, num_points=points))]  # fmt: skip
        last = {"full": points == CURVE[-1], "one_setting": True, "memory": True}
        return case(Shape(LOSS, large, some, points), two, **last)

    return [
        *(loss(size, count) for size in (large, small) for count in (few, some, *more)),
        *([loss(large, some * 2 // 3, images=2)] if scale.device == "cuda" else []),
        *map(fewer, CURVE[:1] if scale.quick else CURVE),
        case(Shape(MATCHING, large, some), MATCHERS, "forward"),
        case(Shape(SAMPLE, large), SAMPLERS, "forward", memory=True),
        case(Shape(SAMPLE, large), SAMPLERS),
    ]


def touched_sectors(points: Tensor, size: Sequence[int]) -> int:
    """Sectors of 32 bytes of a float32 map of `size` that bilinear samples at points [K, 2] read."""
    h, w = size
    corner = (points * torch.tensor([w, h]) - 0.5).floor().long()
    pixels = (corner[:, None] + torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])).flatten(0, 1)
    inside = ((pixels >= 0) & (pixels < torch.tensor([w, h]))).all(-1)
    return int(torch.unique((pixels[:, 1] * w + pixels[:, 0])[inside] // 8).numel())


def work(case: Case, data: Data) -> Work:
    """Every input read once and gradients written once; the products that need the matched masks: logits once, and the
    gradients of both factors; and the sampled features with every query. On a GPU, of a logit that matching samples an
    exponential, a logarithm and a reciprocal; and of sampled features the sectors that points touch, in lines that L1
    delivers one a cycle."""
    read, shape = bytes_of(x for name, x in data.inputs.items() if name != "mask_logits"), case.spec
    if shape.what == SAMPLE:
        features, points = data.inputs["mask_features"], data.inputs["points"]
        passes, samples = 2 if case.backward else 1, CHANNELS * POINTS * 4
        if features.device.type == "cpu":
            return {"bandwidth": (features.nbytes + samples) * passes}
        read = CHANNELS * touched_sectors(points[0].cpu(), features.shape[2:]) * 32
        moved = read + samples + (features.nbytes + samples if case.backward else 0)
        cycles = passes * POINTS * 4 * CHANNELS * features.element_size() // 128
        return {"bandwidth": moved, "l2 bytes": moved, "l1 cycles": cycles}
    pixels = data.inputs["mask_features"].shape[2:].numel()
    flops = 2 * OUTPUTS * shape.images * QUERIES * CHANNELS * shape.points
    if case.backward:
        read += bytes_of(data.inputs[name] for name in data.differentiable)
        flops += 3 * 2 * OUTPUTS * shape.images * shape.targets * CHANNELS * pixels
    special = 3 * OUTPUTS * shape.images * QUERIES * shape.points
    return {"bandwidth": read, "special functions": special, "float32 matmul": flops}


_LARGE, _SMALL, _BATCH = Shape(LOSS, 1024, 30), Shape(LOSS, 512, 10), Shape(LOSS, 1024, 20, images=2)
_ROWS = (
    (_LARGE, "memory_extra_mib", FULL, TRANSFORMERS, "peak memory of full masks over points, both published", None),
    (_LARGE, "memory_extra_mib", STRIDE_4, TRANSFORMERS, "peak memory of masks at stride 4 over points", None),
    (_LARGE, "memory_extra_mib", TRANSFORMERS, OURS, "less peak memory than transformers' points", 7.0),
    (_LARGE, "memory_extra_mib", FULL, OURS, "less peak memory than full masks", None),
    (_LARGE, "median_ms", TRANSFORMERS, OURS, "faster than transformers' points", 4.0),
    (_SMALL, "median_ms", TRANSFORMERS, OURS, "faster than transformers' points", 3.0),
    (_LARGE, "median_ms", FULL, OURS, "faster than full masks", None),
    (f"{MATCHING} 1024² T=30", "median_ms", "transformers", OURS, "faster than transformers, both from the factors",
     5.0),
    (f"{MATCHING} 1024² T=30", "median_ms", "transformers, from logits", FROM_LOGITS, "faster, both from given logits",
     None),
    (f"{SAMPLE} 1024² C=256 forward", "median_ms", "grid_sample", OURS, "faster than grid_sample", 3.0),
    (f"{SAMPLE} 1024² C=256 forward+backward", "median_ms", "grid_sample", OURS, "faster than grid_sample", None),
)  # fmt: skip


FIGURES = {
    # Times have a target in both allocator settings, memory in the first.
    "cpu": [ratio(str(case), *row, *[aim] * (1 if "memory" in row[0] else 2)) for case, *row, aim in _ROWS],
    "cuda": [
        *(ratio(str(case), *row, None) for case, *row, _ in _ROWS),
        ratio(str(_BATCH), "median_ms", TRANSFORMERS, OURS, "faster than transformers' points", 8.0),
        ratio(str(_BATCH), "memory_extra_mib", TRANSFORMERS, OURS, "less peak memory than transformers' points", 8.0),
    ],
}


def draw_curve(directory: Path, rows: Sequence[Row]) -> list[str]:
    """Time and peak memory over the number of points; returns the pictures written."""
    from benchmarks import plot

    points = {str(replace(_LARGE, points=k)): k for k in (*CURVE, POINTS)}
    timed = [row for row in rows if row.case in points and row.median_ms is not None]
    curves = {row.implementation for row in timed if points[row.case] != POINTS}
    curve = [row for row in timed if row.implementation in curves]
    others = [row for row in timed if row.implementation not in curves and not row.ours]
    title = f"{str(_LARGE)[0].upper()}{str(_LARGE)[1:]}, forward + backward"
    titles = {"median_ms": title, "memory_extra_mib": "Peak memory above inputs and outputs"}
    return plot.draw_curves(
        directory / "point_loss_curve.png", curve, lambda row: points[row.case], "points K", titles, others, log=True
    )


BENCHMARK = Benchmark(
    op="point_loss",
    title="Loss with full masks, with points as published, and with this package",
    description=(
        "The loss part of a training step, forward and backward, matching included: one photograph, on a GPU also "
        "two, ten predictions of Q = 100 queries, C = 256, K = 12544 points, T targets cut out of photographs. Every "
        "implementation starts from mask embeddings and mask features and ends with their gradients. *Full masks* "
        "upsamples predictions to the ground truth and takes cross-entropy and dice over every pixel, which is what "
        "the published comparison means by it; *at stride 4* shrinks the ground truth instead. Published, for a whole "
        "training step of an R50 model: 18 GB against 6 GB per image (Cheng et al. 2022); the rows here are of the "
        "loss part alone. *Fresh points* draws points for each output, as published; by default the outputs of an "
        "image share them while matching. Error: losses and gradients at random points against the mean of three "
        "draws of `transformers`, so it is the noise of sampling; of full masks, the difference between the two "
        "quantities. With the same points, tests hold this package to 1e-5 (losses) and 1e-4 (gradients)."
    ),
    cases=cases,
    work=work,
    quarters=dict.fromkeys(("mask_features", "targets", "mask_logits"), (-2, -1)),
    figures=FIGURES,
    check=check,
    operators=("point_sample", "uncertain_points", "mask_matching_cost", "point_mask_loss"),
    budget_s=1.0,
    long_ms=5_000.0,
    pictures=draw_curve,
)
