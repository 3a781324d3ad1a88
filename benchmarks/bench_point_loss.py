"""The loss part of Mask2Former: matching, losses and gradients of ten predictions, from embeddings and features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import m2f_kernels
from benchmarks import inputs, peers_points
from benchmarks.cases import (
    OUTPUT_TOLERANCE,
    PEER_SLACK,
    Benchmark,
    Case,
    Data,
    Figure,
    Implementation,
    Levels,
    Row,
    Scale,
    Tensors,
    Verdict,
    Work,
    relative_l2,
)
from benchmarks.memory import bytes_of
from benchmarks.peers_points import FULL, NUM_LABELS, STRIDE_4, TRANSFORMERS

CHANNELS, QUERIES, OUTPUTS, POINTS = 256, 100, 10, 12544
#: Shares of the image that targets cover, in turn.
DENSITIES = (0.01, 0.04, 0.15)
OURS, FRESH, FROM_LOGITS = "m2f_kernels", "m2f_kernels, fresh points", "m2f_kernels, from logits"
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


def _loss(num_points: int, fresh: bool) -> Callable[[dict[str, Any]], Tensor]:
    def call(a: dict[str, Any]) -> Tensor:
        criterion = m2f_kernels.nn.PointMaskCriterion(NUM_LABELS, num_points=num_points, fresh_points=fresh)
        criterion.to(a["labels"].device)
        return torch.stack(list(criterion(_predictions(a), _targets(a)).values())).sum()

    return call


def _matching(from_logits: bool) -> Callable[[dict[str, Any]], Any]:
    def call(a: dict[str, Any]) -> list[Tensor]:
        predictions = _predictions(a)
        if from_logits:
            for prediction, logits in zip(predictions, a["mask_logits"], strict=True):
                prediction["masks"] = logits
        matcher = m2f_kernels.nn.HungarianMatcher(num_points=POINTS)
        return [torch.stack(pair) for pairs in matcher(predictions, _targets(a)) for pair in pairs]

    return call


# ---------------------------------------------------------------- data


@cache
def _tensors(size: int, count: int) -> Tensors:
    """One photograph's mask features; embeddings and classes of every output; regions of photographs as targets."""
    source = inputs.generator(11)
    parts = [-(-count // len(DENSITIES))] * len(DENSITIES)
    regions = [inputs.blob_masks((size, size), 1, n, d) for n, d in zip(parts, DENSITIES, strict=True)]
    targets = torch.stack(regions, 2).flatten(1, 2)[:, :count].unflatten(2, (size, size)).contiguous()
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


def _batch(tensors: Tensors) -> Tensors:
    """Two images: the given one and its mirror image, with the same predictions."""
    mirrored = {name: tensors[name].flip(-1) for name in ("mask_features", "targets")}
    images = {"mask_embed": 1, "class_logits": 1}
    return {name: torch.cat([x, mirrored.get(name, x)], images.get(name, 0)) for name, x in tensors.items()}


def _loss_data(scale: Scale, size: int, count: int, images: int) -> Data:
    """The truth is the mean of several draws of `transformers`' loss and gradients."""
    tensors = _tensors(size, count) if images == 1 else _batch(_tensors(size, count))
    there = {name: tensor.to(scale.device) for name, tensor in tensors.items()}
    differentiable = ("mask_features", "mask_embed", "class_logits")
    truth: Tensors = {}
    for _ in range(DRAWS):
        leaves = {name: there[name].detach().requires_grad_() for name in differentiable}
        loss = peers_points.points_loss(POINTS)(there | leaves)
        found = dict(zip(differentiable, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for name, x in {"loss": loss.detach(), **found}.items():
            truth[name] = truth.get(name, torch.zeros(())) + x.cpu() / DRAWS
    return Data(tensors, truth, [], ("loss",), (torch.ones(()),), differentiable)


def _matching_data(size: int, count: int) -> Data:
    tensors = dict(_tensors(size, count))
    tensors["mask_logits"] = torch.stack(peers_points.logits_of(tensors))
    return Data(tensors, {}, [], ("indices",))


def _sample_data(size: int) -> Data:
    tensors = {
        "mask_features": inputs.mask_features(size, size, CHANNELS),
        "points": torch.rand(1, POINTS, 2, generator=inputs.generator(12)),
    }
    exact = tensors["mask_features"].double().requires_grad_()
    with m2f_kernels.use_backend("reference"):
        samples = m2f_kernels.point_sample(exact, tensors["points"].double())
    upstream = torch.randn(samples.shape, generator=inputs.generator(13))
    (gradient,) = torch.autograd.grad(samples, exact, upstream.double())
    truth = {"samples": samples.detach(), "mask_features": gradient}
    return Data(tensors, truth, [], ("samples",), (upstream,), ("mask_features",))


def data(scale: Scale) -> dict[str, Callable[[], Data]]:
    found: dict[str, Callable[[], Data]] = {}
    for case in cases(scale):
        what, size, count, _, images = _parts(case.data)
        if what == LOSS:
            found[case.data] = partial(_loss_data, scale, size, count, images)
        elif what == MATCHING:
            found[case.data] = partial(_matching_data, size, count)
        else:
            found[case.data] = partial(_sample_data, size)
    return found


def shrink(data: Data) -> Data:
    """A sixteenth of the image."""
    few = dict(data.inputs)
    h, w = few["mask_features"].shape[2:]
    few["mask_features"] = few["mask_features"][:, :, : h // 4, : w // 4].contiguous()
    for name in ("targets", "mask_logits"):
        if name in few:
            few[name] = few[name][..., : few[name].shape[-2] // 4, : few[name].shape[-1] // 4].contiguous()
    if data.outputs == ("samples",):
        few["points"] = few["points"][:, : POINTS // 4]
        return replace(data, inputs=few, grad_outputs=(data.grad_outputs[0][..., : POINTS // 4],))
    return replace(data, inputs=few)


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
    more = max(1.0, (POINTS / _parts(case.name)[3]) ** 0.5)
    return Verdict(errors[0] <= LOSS_NOISE * more and errors[1] <= GRADIENT_NOISE * more, errors[0], errors[1])


# ---------------------------------------------------------------- cases


def _parts(name: str) -> tuple[str, int, int, int, int]:
    """The parts of a case's name: the part measured, the image's size, numbers of targets, of points and of images."""
    what, rest = next((w, name[len(w) + 1 :]) for w in (LOSS, MATCHING, SAMPLE) if name.startswith(w))
    words = dict(word.split("=") for word in rest.split()[1:] if "=" in word)
    count, num_points, images = (int(words.get(*default)) for default in (("T", 0), ("K", POINTS), ("N", 1)))
    return what, int(rest.split("²")[0]), count, num_points, images


def _sizes(scale: Scale) -> tuple[int, int]:
    return (128, 256) if scale.quick else (512, 1024)


def as_given(tensors: Tensors, levels: Levels) -> dict[str, Any]:
    return dict(tensors)


def _implementation(name: str, call: Callable[[dict[str, Any]], Any], **options: Any) -> Implementation:
    ours = name in (OURS, FRESH, FROM_LOGITS)
    return Implementation(name, call, as_given, ours=ours, counts_writes=False, **options)


def _loss_case(size: int, count: int, headline: bool, images: int = 1) -> Case:
    """All implementations at K = 12544."""
    found = [
        _implementation(OURS, _loss(POINTS, False)),
        _implementation(FRESH, _loss(POINTS, True)),
        _implementation(TRANSFORMERS, peers_points.points_loss(POINTS)),
        _implementation(STRIDE_4, peers_points.full_loss(True)),
        _implementation(FULL, peers_points.full_loss(False), unavailable=peers_points.needs_gib(size, images * count)),
    ]
    name = f"{LOSS} {size}²{f' N={images}' if images > 1 else ''} T={count}"
    # At the small size one case is enough for memory.
    memory = headline or size >= 1024
    return Case(name, name, "forward+backward", found, memory=memory, headline=headline, full=not headline)


def _curve_case(size: int, count: int, num_points: int, full: bool) -> Case:
    """Points as published and this package at another K. The expected loss is the same, and so is the truth."""
    found = [
        _implementation(OURS, _loss(num_points, False)),
        _implementation(TRANSFORMERS, peers_points.points_loss(num_points)),
    ]
    name = f"{LOSS} {size}² T={count}"
    return Case(f"{name} K={num_points}", name, "forward+backward", found, memory=True, full=full, one_setting=True)


def cases(scale: Scale) -> list[Case]:
    small, large = _sizes(scale)
    counts = (3, 10) if scale.quick else (10, 30, 100)
    found = [
        _loss_case(size, count, (size, count) in ((large, counts[1]), (small, counts[0])))
        for size in (large, small)
        for count in counts
    ]
    if scale.device == "cuda":
        found.append(_loss_case(large, counts[1] * 2 // 3, headline=True, images=2))
    curve = CURVE[:1] if scale.quick else CURVE
    found += [_curve_case(large, counts[1], k, k == CURVE[-1]) for k in curve if k != POINTS]  # K = 12544 is above
    name = f"{MATCHING} {large}² T={counts[1]}"
    found.append(
        Case(
            name,
            name,
            "forward",
            [
                _implementation(OURS, _matching(False)),
                _implementation(FROM_LOGITS, _matching(True)),
                _implementation("transformers", peers_points.matching(POINTS, False)),
                _implementation("transformers, from logits", peers_points.matching(POINTS, True)),
            ],
        )
    )
    name = f"{SAMPLE} {large}² C={CHANNELS}"
    samplers = [
        _implementation(OURS, lambda a: m2f_kernels.point_sample(a["mask_features"], a["points"])),
        _implementation("grid_sample", peers_points.grid_sample),
    ]
    for direction in ("forward", "forward+backward"):
        memory = direction == "forward"
        found.append(Case(f"{name} {direction}", name, direction, samplers, memory=memory))
    return found


def work(case: Case, data: Data) -> Work:
    """Every input read once and gradients written once; the products that need the matched masks: logits once, and the
    gradients of both factors; and the sampled features with every query."""
    read = bytes_of(x for name, x in data.inputs.items() if name != "mask_logits")
    what, _, count, num_points, images = _parts(case.name)
    if what == SAMPLE:
        features = bytes_of([data.inputs["mask_features"]])
        samples = CHANNELS * POINTS * 4
        return Work(features + samples if not case.backward else 2 * (features + samples))
    pixels = data.inputs["mask_features"].shape[2:].numel()
    flops = 2 * OUTPUTS * images * QUERIES * CHANNELS * num_points
    if case.backward:
        read += bytes_of(data.inputs[name] for name in data.differentiable)
        flops += 3 * 2 * OUTPUTS * images * count * CHANNELS * pixels
    return Work(read, flops=flops)


# ---------------------------------------------------------------- required figures


def figures(scale: Scale) -> list[Figure]:
    small, large = _sizes(scale)
    few, some = (3, 10) if scale.quick else (10, 30)
    settings = ("cuda",) if scale.device == "cuda" else ("default", "heap retained")

    def ratio(
        case: str, field: str, above: str, below: str, cpu: float | None, label: str, gpu: float | None = None
    ) -> Figure:
        where = settings[:1] if field.startswith("memory") else settings
        target = dict.fromkeys(where, gpu if scale.device == "cuda" else cpu)
        return Figure(f"{case}: {label}", (case, (above,), field), (case, (below,), field), target)

    at_large, at_small = f"{LOSS} {large}² T={some}", f"{LOSS} {small}² T={few}"
    memory, time = "memory_extra_mib", "median_ms"
    matching, sample = f"{MATCHING} {large}² T={some}", f"{SAMPLE} {large}² C={CHANNELS}"
    found = [
        ratio(at_large, memory, FULL, TRANSFORMERS, None, "peak memory of full masks over points, both published"),
        ratio(at_large, memory, STRIDE_4, TRANSFORMERS, None, "peak memory of masks at stride 4 over points"),
        ratio(at_large, memory, TRANSFORMERS, OURS, 7.0, "less peak memory than transformers' points"),
        ratio(at_large, memory, FULL, OURS, None, "less peak memory than full masks"),
        ratio(at_large, time, TRANSFORMERS, OURS, 4.0, "faster than transformers' points"),
        ratio(at_small, time, TRANSFORMERS, OURS, 3.0, "faster than transformers' points"),
        ratio(at_large, time, FULL, OURS, None, "faster than full masks"),
        ratio(matching, time, "transformers", OURS, 5.0, "faster than transformers, both from the factors"),
        ratio(matching, time, "transformers, from logits", FROM_LOGITS, None, "faster, both from given logits"),
        ratio(f"{sample} forward", time, "grid_sample", OURS, 3.0, "faster than grid_sample"),
        ratio(f"{sample} forward+backward", time, "grid_sample", OURS, None, "faster than grid_sample"),
    ]
    if scale.device == "cuda":
        batch = f"{LOSS} {large}² N=2 T={some * 2 // 3}"
        found += [
            ratio(batch, time, TRANSFORMERS, OURS, None, "faster than transformers' points", 8.0),
            ratio(batch, memory, TRANSFORMERS, OURS, None, "less peak memory than transformers' points", 8.0),
        ]
    return found


def draw_curve(directory: Path, rows: Sequence[Row]) -> list[str]:
    """Time and peak memory over the number of points; returns the pictures written."""
    from benchmarks import plot

    return plot.draw_points(directory, rows, POINTS)


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
    data=data,
    work=work,
    shrink=shrink,
    figures=figures,
    check=check,
    operators=("point_sample", "uncertain_points", "mask_matching_cost", "point_mask_loss"),
    budget_s=1.0,
    long_ms=5_000.0,
    pictures=draw_curve,
)
