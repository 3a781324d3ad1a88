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
    OUTPUT_TOLERANCE,
    PEER_SLACK,
    Benchmark,
    Case,
    Data,
    Figure,
    Implementation,
    Row,
    Scale,
    Tensors,
    Verdict,
    Work,
    as_given,
    ratio,
    relative_l2,
)  # fmt: skip
from benchmarks.memory import bytes_of

CHANNELS, QUERIES, OUTPUTS, POINTS, NUM_LABELS = 256, 100, 10, 12544, 80
COST_CLASS, COST_MASK, COST_DICE = 2.0, 5.0, 5.0
#: Shares of the image that targets cover, in turn.
DENSITIES = (0.01, 0.04, 0.15)
FRESH, FROM_LOGITS = "m2f_kernels, fresh points", "m2f_kernels, from logits"
TRANSFORMERS, FULL = "transformers, points", "full masks at ground-truth resolution"
STRIDE_4 = "full masks at stride 4"
#: Points of the picture's curve; without `--full`, every other one.
CURVE = (784, 3136, 12544, 50176)
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

    published, criterion = _published(), published_loss(1, a["labels"].device)
    targets = [t.float() for t in a["targets"]]
    if stride_4:
        size = a["mask_features"].shape[-2:]
        targets = [F.interpolate(t[None], size=size, mode="bilinear", antialias=True)[0] for t in targets]

    def resized(logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape[-2:] == target.shape[-2:]:
            return logits
        return F.interpolate(logits[None], size=target.shape[-2:], mode="bilinear", align_corners=False)[0]

    total, count = [], max(sum(len(t) for t in targets), 1)
    for logits, classes in zip(logits_of(a), a["class_logits"], strict=True):
        indices = []
        with torch.no_grad():
            for i, target in enumerate(targets):
                x, t = resized(logits[i], target).flatten(1), target.flatten(1)
                cost = COST_MASK * published.pair_wise_sigmoid_cross_entropy_loss(x, t)
                cost += COST_DICE * published.pair_wise_dice_loss(x, t)
                cost -= COST_CLASS * classes[i].softmax(-1)[:, a["labels"][i]]
                indices.append([torch.as_tensor(j) for j in linear_sum_assignment(cost.cpu())])
        for i, ((queries, chosen), target) in enumerate(zip(indices, targets, strict=True)):
            x, t = resized(logits[i, queries], target).flatten(1), target[chosen].flatten(1)
            total.append(COST_MASK * published.sigmoid_cross_entropy_loss(x, t, count))
            total.append(COST_DICE * published.dice_loss(x, t, count))
        labels = criterion.loss_labels(classes, list(a["labels"]), indices)
        total.append(COST_CLASS * labels["loss_cross_entropy"])
    return torch.stack(total).sum()


def _published_matching(a: dict[str, Any], from_logits: bool) -> list[Tensor]:
    """`transformers`' matcher for every output, from mask logits that exist already or from their factors."""
    matcher = published_loss(POINTS, a["labels"].device).matcher
    masks = a["mask_logits"] if from_logits else logits_of(a)
    targets, labels = [t.float() for t in a["targets"]], list(a["labels"])
    found = [matcher(m, c, targets, labels) for m, c in zip(masks, a["class_logits"], strict=True)]
    return [torch.stack([torch.as_tensor(x) for x in pair]) for pairs in found for pair in pairs]


def needs_gib(size: int, targets: int) -> Callable[[], str | None]:
    """Refuses full masks where they would not fit: about 6 float planes of each matched mask and output, and 6 of
    each of 100 queries while matching."""
    needed = size * size * 4 * (10 * targets * 6 + 100 * 6) / 2**30

    def reason() -> str | None:
        meminfo = Path("/proc/meminfo")
        lines = meminfo.read_text().splitlines() if meminfo.exists() else []
        here = next((int(x.split()[1]) / 2**20 for x in lines if x.startswith("MemAvailable")), float("inf"))
        return None if needed < here else f"needs about {needed:.0f} GiB of memory, {here:.0f} are free"

    return reason


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
    exact = tensors["mask_features"].double().requires_grad_()
    with m2f_kernels.use_backend("reference"):
        samples = m2f_kernels.point_sample(exact, points.double())
    upstream = torch.randn(samples.shape, generator=inputs.generator(13))
    (gradient,) = torch.autograd.grad(samples, exact, upstream.double())
    truth = {"samples": samples.detach(), "mask_features": gradient}
    return Data(tensors, truth, [], ("samples",), (upstream,), ("mask_features",))


def shrink(data: Data) -> Data:
    """A sixteenth of the image."""
    few = {
        name: x[..., : x.shape[-2] // 4, : x.shape[-1] // 4].contiguous()
        for name, x in data.inputs.items()
        if name in ("mask_features", "targets", "mask_logits")
    }
    if data.outputs == ("samples",):
        few["points"] = data.inputs["points"][:, : POINTS // 4]
        data = replace(data, grad_outputs=(data.grad_outputs[0][..., : POINTS // 4],))
    return replace(data, inputs=data.inputs | few)


def check(case: Case, implementation: Implementation, data: Data, results: Sequence[Tensor]) -> Verdict:
    """Samples against float64. Losses at random points against the mean of several draws of the published one: the
    exact comparison, with the same points, is a test. Losses of full masks are another quantity: finite."""
    if data.outputs == ("indices",):
        matched = [len(set(x[1].tolist())) == x.shape[1] == data.inputs["labels"].shape[1] for x in results]
        return Verdict(len(matched) == OUTPUTS and all(matched), 0.0)
    errors = [relative_l2(x, data.truth[name]) for x, name in zip(results, data.truth, strict=False)]
    if data.outputs == ("samples",):
        slack = 1 if implementation.ours else PEER_SLACK
        right = errors[0] <= slack * OUTPUT_TOLERANCE and all(e <= slack * 1e-4 for e in errors[1:])
        return Verdict(right, errors[0], max(errors[1:], default=None))
    if implementation.name in (FULL, STRIDE_4):
        return Verdict(all(bool(x.isfinite().all()) for x in results), errors[0], errors[1])
    more = max(1.0, (POINTS / case.spec.points) ** 0.5)
    return Verdict(errors[0] <= LOSS_NOISE * more and errors[1] <= GRADIENT_NOISE * more, errors[0], errors[1])


# ---------------------------------------------------------------- cases


def _sizes(scale: Scale) -> tuple[int, int]:
    return (128, 256) if scale.quick else (512, 1024)


def _implementation(name: str, call: Callable[[dict[str, Any]], Any], **options: Any) -> Implementation:
    ours = name in (OURS, FRESH, FROM_LOGITS)
    return Implementation(name, call, as_given, ours=ours, counts_writes=False, **options)


def cases(scale: Scale) -> list[Case]:
    small, large = _sizes(scale)
    few, some, *more = (3, 10) if scale.quick else (10, 30, 100)

    def case(shape: Shape, found: list[Implementation], way: str = "forward+backward", **options: Any) -> Case:
        # The expected loss is the same at another K, and so is the truth.
        data = replace(shape, points=POINTS)
        made = partial(build, scale.device, data)
        name = f"{shape} {way}" if shape.what == SAMPLE else str(shape)
        return Case(name, str(data), way, found, build=made, spec=shape, **options)

    def loss(size: int, count: int, headline: bool, images: int = 1) -> Case:
        """All implementations at K = 12544. At the small size one case is enough for memory."""
        found = [
            _implementation(OURS, _loss),
            _implementation(FRESH, partial(_loss, fresh=True)),
            _implementation(TRANSFORMERS, points_loss),
            _implementation(STRIDE_4, partial(full_loss, stride_4=True)),
            _implementation(FULL, partial(full_loss, stride_4=False), unavailable=needs_gib(size, images * count)),
        ]
        flags = {"memory": headline or size >= 1024, "headline": headline, "full": not headline}
        return case(Shape(LOSS, size, count, images=images), found, **flags)

    found = [
        loss(size, count, (size, count) in ((large, some), (small, few)))
        for size in (large, small)
        for count in (few, some, *more)
    ]
    if scale.device == "cuda":
        found.append(loss(large, some * 2 // 3, headline=True, images=2))
    for k in CURVE[:1] if scale.quick else CURVE:
        if k != POINTS:  # which is above
            two = [_implementation(OURS, partial(_loss, num_points=k)),
                   _implementation(TRANSFORMERS, partial(points_loss, num_points=k))]  # fmt: skip
            shape = Shape(LOSS, large, some, k)
            found.append(case(shape, two, memory=True, full=k == CURVE[-1], one_setting=True))
    matchers = [
        _implementation(OURS, partial(_matching, from_logits=False)),
        _implementation(FROM_LOGITS, partial(_matching, from_logits=True)),
        _implementation("transformers", partial(_published_matching, from_logits=False)),
        _implementation("transformers, from logits", partial(_published_matching, from_logits=True)),
    ]
    samplers = [
        _implementation(OURS, lambda a: m2f_kernels.point_sample(a["mask_features"], a["points"])),
        _implementation(
            "grid_sample", lambda a: _published().sample_point(a["mask_features"], a["points"], align_corners=False)
        ),
    ]
    found.append(case(Shape(MATCHING, large, some), matchers, "forward"))
    found += [
        case(Shape(SAMPLE, large), samplers, way, memory=way == "forward") for way in ("forward", "forward+backward")
    ]
    return found


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


def _on_cpu(case: object, field: str, above: str, below: str, label: str, target: float | None) -> Figure:
    """Times have a target in both allocator settings, memory in the first."""
    targets = (target,) if field.startswith("memory") else (target, target)
    return ratio(str(case), field, above, below, label, *targets)


FIGURES = {
    "cpu": [_on_cpu(*row) for row in _ROWS],
    "cuda": [
        *(ratio(str(case), *row, None) for case, *row, _ in _ROWS),
        ratio(str(_BATCH), "median_ms", TRANSFORMERS, OURS, "faster than transformers' points", 8.0),
        ratio(str(_BATCH), "memory_extra_mib", TRANSFORMERS, OURS, "less peak memory than transformers' points", 8.0),
    ],
}


def draw_curve(directory: Path, rows: Sequence[Row]) -> list[str]:
    """Time and peak memory over the number of points; returns the pictures written."""
    from benchmarks import plot

    specs = {name: case.spec for name, case in BENCHMARK.named().items()}
    rows = [row for row in rows if row.case in specs]
    curve = [row for row in rows if row.median_ms is not None and specs[row.case].points != POINTS]
    if not curve:
        return []
    whole = replace(specs[curve[0].case], points=POINTS)
    same = [row for row in rows if specs[row.case] == whole and row.setting == curve[0].setting]
    return plot.draw_points(directory, curve, same, lambda row: specs[row.case].points, str(whole))


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
    shrink=shrink,
    figures=FIGURES,
    check=check,
    operators=("point_sample", "uncertain_points", "mask_matching_cost", "point_mask_loss"),
    budget_s=1.0,
    long_ms=5_000.0,
    pictures=draw_curve,
)
