"""The matcher and the criterion against `transformers`' with the same points, and on input that is unusual or wrong."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers.models.mask2former import modeling_mask2former as published

import m2f_kernels
from m2f_kernels import FactoredMasks, _transfer
from m2f_kernels.nn import HungarianMatcher, PointMaskCriterion, point_mask_criterion
from tests.numerics import FORWARD, GRADIENT, relative_error
from tests.watching import Operators

F32 = torch.float32
LABELS, K = 7, 60


class Scene:
    """L outputs of N images; targets of their own size and count per image."""

    def __init__(self, generator, counts=(3, 1), layers=3, q=12, dtype=torch.bool, sizes=None):
        n = len(counts)
        self.features = torch.randn(n, 8, 16, 12, generator=generator, requires_grad=True)
        self.embeds = [torch.randn(n, q, 8, generator=generator, requires_grad=True) for _ in range(layers)]
        self.classes = [torch.randn(n, q, LABELS + 1, generator=generator, requires_grad=True) for _ in range(layers)]
        sizes = sizes or [(40 + 8 * i, 30) for i in range(n)]
        self.targets = [
            {
                "labels": torch.randint(0, LABELS, (t,), generator=generator),
                "masks": (torch.rand(t, *size, generator=generator) > 0.6).to(dtype),
            }
            for t, size in zip(counts, sizes, strict=True)
        ]

    @property
    def leaves(self):
        return [self.features, *self.embeds, *self.classes]

    def predictions(self, factored=True):
        masks = [FactoredMasks(embed, self.features) for embed in self.embeds]
        return [
            {"class_logits": c, "masks": m if factored else m.logits()}
            for c, m in zip(self.classes, masks, strict=True)
        ]


def run(scene, criterion, factored=True):
    """The losses, and the gradients of their sum; the same points in every call."""
    criterion.matcher.generator = torch.Generator().manual_seed(3)
    losses = criterion(scene.predictions(factored), scene.targets)
    return losses, torch.autograd.grad(sum(losses.values()), scene.leaves)


# ---------------------------------------------------------------- equality with the published loss
class Published(published.Mask2FormerLoss):
    """`transformers`' loss in float64 with given points: `matching` [N, K, 2] and, for each output in its order of
    calls, `uncertain` [M, K, 2]."""

    def __init__(self, matching, uncertain, monkeypatch):
        config = SimpleNamespace(
            num_labels=LABELS, no_object_weight=0.1, train_num_points=K, oversample_ratio=3.0,
            importance_sample_ratio=0.75, class_weight=2.0, dice_weight=5.0, mask_weight=5.0,
        )  # fmt: skip
        super().__init__(config, {})
        self.double()
        self.uncertain = iter(uncertain)
        points = iter(matching)
        monkeypatch.setattr(published.torch, "rand", lambda *_, **__: next(points)[None])

    def sample_points_using_uncertainty(self, *_):
        return next(self.uncertain)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16], ids=str)
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("factored", [True, False])
def test_equals_the_published_loss(generator, monkeypatch, factored, fresh, dtype):
    """Matching, all three losses of every output, and the gradients; equal target sizes, which is all that
    `transformers` normalises as we do (it pads targets to the largest)."""
    layers, counts = 3, (3, 1, 5)
    scene = Scene(generator, counts, layers, sizes=[(40, 30)] * 3, dtype=dtype)
    drawn, chosen = [], []
    original = HungarianMatcher._points
    monkeypatch.setattr(HungarianMatcher, "_points", lambda self, d: drawn.append(original(self, d)) or drawn[-1])
    draw = torch.ops.m2f.uncertain_points

    criterion = PointMaskCriterion(LABELS, num_points=K, fresh_points=fresh)
    seeds = []
    seed_of = torch.randint

    def randint(*args, **kwargs):
        seeds.append(seed_of(*args, **kwargs))
        return seeds[-1]

    monkeypatch.setattr(torch, "randint", randint)
    losses, gradients = run(scene, criterion, factored)
    monkeypatch.undo()

    # The points of the matching: per image, or per image and output; `transformers` asks per output and image.
    if fresh:
        matching = [[drawn[image * layers + layer] for image in range(3)] for layer in range(layers)]
    else:
        matching = [drawn] * layers
    order = [layers - 1, *range(layers - 1)]
    exact = [x.detach().double().requires_grad_() for x in scene.leaves]
    logits = [FactoredMasks(embed, exact[0]).logits() for embed in exact[1 : 1 + layers]]

    # The uncertain points, drawn again from the recorded seeds: masks in order of images, then of outputs.
    criterion.matcher.generator.manual_seed(3)
    pairs = criterion.matcher(scene.predictions(factored), scene.targets)
    for layer in range(layers):
        rows = torch.cat([q + 12 * i for i, (q, _) in enumerate(pairs[layer])])
        if factored:
            streams, offset = [], 0
            for count in counts:
                streams += [offset + layer * count + j for j in range(count)]
                offset += layers * count
            planes = FactoredMasks(scene.embeds[layer], scene.features).logits().flatten(0, 1)
            own = [
                draw(planes, row[None], seeds[0], s, 3 * K, K * 3 // 4, K // 4)
                for row, s in zip(rows, streams, strict=True)
            ]
            chosen.append(torch.cat(own).double())
        else:
            planes = scene.predictions(False)[layer]["masks"].flatten(0, 1)
            chosen.append(draw(planes, rows, seeds[layer], 0, 3 * K, K * 3 // 4, K // 4).double())

    points = [p.double() for layer in order for p in matching[layer]]
    theirs = Published(points, [chosen[layer] for layer in order], monkeypatch)
    classes = exact[1 + layers :]
    expected = theirs(
        logits[-1],
        classes[-1],
        [t["masks"].double() for t in scene.targets],
        [t["labels"] for t in scene.targets],
        [
            {"masks_queries_logits": m, "class_queries_logits": c}
            for m, c in zip(logits[:-1], classes[:-1], strict=True)
        ],
    )
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    expected = {name: weights[name.rstrip("_012")] * x for name, x in expected.items()}
    assert set(losses) == set(expected)
    for name, x in expected.items():
        assert losses[name].dtype == F32
        assert relative_error(losses[name], x) < FORWARD[F32], name
    for a, b in zip(gradients, torch.autograd.grad(sum(expected.values()), exact), strict=True):
        assert relative_error(a, b) < GRADIENT[F32]


def test_expected_loss_is_the_published_one(generator):
    """With points drawn freely: means over many draws agree within their own standard errors."""
    scene = Scene(generator, (3, 2), layers=1, q=5, sizes=[(16, 12)] * 2)
    scene.features = scene.features.detach() * 0.5
    config = SimpleNamespace(
        num_labels=LABELS, no_object_weight=0.1, train_num_points=40, oversample_ratio=3.0,
        importance_sample_ratio=0.75, class_weight=2.0, dice_weight=5.0, mask_weight=5.0,
    )  # fmt: skip
    theirs = published.Mask2FormerLoss(config, {})
    ours = PointMaskCriterion(LABELS, num_points=40, generator=generator)
    torch.manual_seed(0)
    prediction = scene.predictions()[0]
    logits = prediction["masks"].logits().detach()
    draws: dict[str, list[list[float]]] = {"loss_mask": [[], []], "loss_dice": [[], []]}
    with torch.no_grad():
        for _ in range(400):
            a = ours([prediction], scene.targets)
            b = theirs(
                logits, scene.classes[0], [t["masks"].float() for t in scene.targets],
                [t["labels"] for t in scene.targets],
            )  # fmt: skip
            for name, (mine, other) in draws.items():
                mine.append(float(a[name]) / 5)
                other.append(float(b[name]))
    for name, pair in draws.items():
        mine, other = torch.tensor(pair, dtype=torch.float64)
        error = (mine.var() / 400 + other.var() / 400).sqrt()
        assert (mine.mean() - other.mean()).abs() < 4 * error, name
        assert error / other.mean() < 0.01, "too noisy to show anything"
        assert 0.8 < mine.std() / other.std() < 1.25, name


# ---------------------------------------------------------------- matcher
def test_matcher_finds_the_masks_that_are_there(generator):
    """Queries that predict the targets, in another order, are given to them, in every output."""
    targets = torch.zeros(4, 32, 32, dtype=torch.bool)
    for i in range(4):
        targets[i, 8 * i : 8 * i + 8] = True
    order = [2, 0, 3, 1]
    logits = torch.full((1, 6, 32, 32), -5.0)
    logits[0, [5, 1, 0, 4]] = targets[order].float() * 10 - 5
    outputs = [{"class_logits": torch.zeros(1, 6, 3), "masks": logits}] * 2
    matcher = HungarianMatcher(num_points=500, generator=generator)
    for pairs in matcher(outputs, [{"labels": torch.zeros(4, dtype=torch.int64), "masks": targets}]):
        ((queries, chosen),) = pairs
        assert queries.tolist() == [0, 1, 4, 5]
        assert chosen.tolist() == [3, 0, 1, 2]
        assert queries.dtype == chosen.dtype == torch.int64


def test_class_cost_alone_decides(generator):
    scene = Scene(generator, (1,), layers=1, q=4)
    scene.classes[0] = torch.zeros(1, 4, LABELS + 1)
    scene.classes[0][0, 2, scene.targets[0]["labels"][0]] = 9.0
    matcher = HungarianMatcher(1.0, 0.0, 0.0, 10)
    ((pair,),) = matcher(scene.predictions(), scene.targets)
    assert [x.tolist() for x in pair] == [[2], [0]]


def test_outputs_of_different_masks_go_together(generator, monkeypatch):
    """Factored outputs that share features, one that has its own, one of logits."""
    scene = Scene(generator, layers=4)
    predictions = scene.predictions()
    predictions[1]["masks"] = predictions[1]["masks"].logits()
    predictions[2]["masks"] = FactoredMasks(scene.embeds[2], scene.features.clone())
    points = torch.rand(K, 2, generator=generator)
    monkeypatch.setattr(HungarianMatcher, "_points", lambda self, device: points)
    criterion = PointMaskCriterion(LABELS, num_points=4000, generator=generator)
    mixed, plain = criterion(predictions, scene.targets), criterion(scene.predictions(), scene.targets)
    assert list(mixed) == list(plain)
    for name, x in plain.items():
        assert torch.allclose(mixed[name], x, rtol=0.1), name


# ---------------------------------------------------------------- names, weights, normalisation
def test_names_and_weights(generator):
    scene = Scene(generator)
    losses, _ = run(scene, PointMaskCriterion(LABELS, num_points=K))
    assert list(losses) == [f"loss_{kind}{s}" for s in ("", "_0", "_1") for kind in ("cross_entropy", "mask", "dice")]
    doubled, _ = run(
        scene, PointMaskCriterion(LABELS, num_points=K, class_weight=4.0, mask_weight=10.0, dice_weight=0.0)
    )
    assert torch.allclose(doubled["loss_mask_1"], 2 * losses["loss_mask_1"])
    assert torch.allclose(doubled["loss_cross_entropy"], 2 * losses["loss_cross_entropy"])
    assert doubled["loss_dice_0"] == 0


def test_generator_makes_it_reproducible(generator):
    scene = Scene(generator)
    criterion = PointMaskCriterion(LABELS, num_points=K)
    first, second = run(scene, criterion), run(scene, criterion)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    other = criterion(scene.predictions(), scene.targets)
    assert not torch.equal(other["loss_mask"], first[0]["loss_mask"])


def test_autocast_changes_nothing(generator):
    scene = Scene(generator)
    criterion = PointMaskCriterion(LABELS, num_points=K)
    plain, _ = run(scene, criterion)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = run(scene, criterion)
    assert all(torch.equal(cast[name], x) for name, x in plain.items())


def test_low_precision_predictions(generator):
    """bfloat16 class logits, embeddings and features, as autocast makes them; losses in float32."""
    scene = Scene(generator)
    criterion = PointMaskCriterion(LABELS, num_points=K)
    exact, _ = run(scene, criterion)
    scene.features, scene.embeds, scene.classes = (
        scene.features.detach().bfloat16().requires_grad_(),
        [x.detach().bfloat16().requires_grad_() for x in scene.embeds],
        [x.detach().bfloat16().requires_grad_() for x in scene.classes],
    )
    losses, gradients = run(scene, criterion)
    for name, x in exact.items():
        assert losses[name].dtype == F32
        assert torch.allclose(losses[name], x, rtol=0.1)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


# ---------------------------------------------------------------- edges
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("counts", [(0, 2), (0, 0), (2, 0)], ids=str)
def test_images_without_targets(generator, counts, factored):
    """Losses are finite, and every input has a gradient, of zeros where nothing was matched (DDP wants one)."""
    scene = Scene(generator, counts)
    losses, gradients = run(scene, PointMaskCriterion(LABELS, num_points=K), factored)
    assert all(x.isfinite() for x in losses.values())
    assert all(g.isfinite().all() for g in gradients)
    if counts == (0, 0):
        assert losses["loss_mask"] == losses["loss_dice_0"] == 0
        assert torch.count_nonzero(gradients[0]) == 0
    for image, count in enumerate(counts):
        assert bool(torch.count_nonzero(gradients[0][image])) == (count > 0)


@pytest.mark.parametrize("factored", [True, False])
def test_more_targets_than_queries(generator, factored):
    scene = Scene(generator, (9, 2), q=4)
    matches = HungarianMatcher(num_points=K)(scene.predictions(factored), scene.targets)
    assert [[len(queries) for queries, _ in pairs] for pairs in matches] == [[4, 2]] * 3
    assert all(len(set(chosen.tolist())) == len(chosen) for pairs in matches for _, chosen in pairs)
    losses, _ = run(scene, PointMaskCriterion(LABELS, num_points=K), factored)
    assert all(x.isfinite() for x in losses.values())


def test_one_point(generator):
    losses, gradients = run(Scene(generator), PointMaskCriterion(LABELS, num_points=1))
    assert all(x.isfinite() for x in [*losses.values(), *(g.sum() for g in gradients)])


@pytest.mark.parametrize("factored", [True, False])
def test_empty_batch(generator, factored):
    scene = Scene(generator, ())
    losses, gradients = run(scene, PointMaskCriterion(LABELS, num_points=K), factored)
    assert losses["loss_mask"] == losses["loss_dice"] == losses["loss_cross_entropy"] == 0
    assert all(g.numel() == 0 or torch.count_nonzero(g) == 0 for g in gradients)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_of_targets(generator, dtype):
    state = generator.get_state()
    expected, _ = run(Scene(generator), PointMaskCriterion(LABELS, num_points=K))
    generator.set_state(state)
    losses, _ = run(Scene(generator, dtype=dtype), PointMaskCriterion(LABELS, num_points=K))
    assert all(torch.allclose(losses[name], x, rtol=1e-5) for name, x in expected.items())


@pytest.mark.parametrize("value", [2, 255])
def test_targets_of_zero_and_another_byte(generator, value):
    """Masks as PNG files hold them: the loss of bool masks."""
    state = generator.get_state()
    expected, _ = run(Scene(generator), PointMaskCriterion(LABELS, num_points=K))
    generator.set_state(state)
    scene = Scene(generator, dtype=torch.uint8)
    for target in scene.targets:
        target["masks"] = target["masks"] * value
    losses, _ = run(scene, PointMaskCriterion(LABELS, num_points=K))
    assert all(torch.equal(losses[name], x) for name, x in expected.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factored", [True, False])
def test_non_finite_costs(generator, value, factored):
    """Replaced and counted; matched last. Or an error, where that is asked for."""
    scene = Scene(generator, (3, 1), q=6)
    with torch.no_grad():
        scene.embeds[1][0, 2] = value
    matcher = HungarianMatcher(num_points=K)
    matches = matcher(scene.predictions(factored), scene.targets)
    assert matcher.non_finite_costs == 3
    assert 2 not in matches[1][0][0].tolist()
    matcher(scene.predictions(factored)[:1], scene.targets)
    assert matcher.non_finite_costs == 0
    with pytest.raises(ValueError, match=r"^predictions: expected finite costs.*got 3 of .*image 0"):
        HungarianMatcher(num_points=K, non_finite="raise")(scene.predictions(factored), scene.targets)


def test_all_costs_non_finite(generator):
    scene = Scene(generator)
    with torch.no_grad():
        scene.features.fill_(float("nan"))
    matches = HungarianMatcher(num_points=K)(scene.predictions(), scene.targets)
    assert [len(queries) for queries, _ in matches[0]] == [3, 1]


# ---------------------------------------------------------------- bad input
def changed(scene, **changes):
    """Arguments with one thing changed: prediction_<key> of output 1, target_<key> of image 1."""
    predictions, targets = scene.predictions(), [dict(t) for t in scene.targets]
    for name, value in changes.items():
        kind, _, key = name.partition("_")
        where = predictions if kind == "prediction" else targets
        if value is None:
            del where[1][key]
        else:
            where[1][key] = value
    return predictions, targets


@pytest.mark.parametrize("bad", [-1, LABELS, 1000])
def test_labels_out_of_range(generator, bad):
    scene = Scene(generator, (2, 3))
    arguments = changed(scene, target_labels=torch.tensor([0, bad, 1]))
    for module in (PointMaskCriterion(LABELS, num_points=K), HungarianMatcher(num_points=K)):
        with pytest.raises(
            ValueError, match=rf"^targets\[1\]\['labels'\]\[1\]: expected a label from 0 to 6; got {bad}"
        ):
            module(*arguments)


BAD = {
    "prediction_masks": [
        (ValueError, r"predictions\[1\]: expected a mapping", None),
        (TypeError, r"predictions\[1\]\['masks'\]: expected", torch.zeros(2, 12, 4, 4, dtype=torch.int64)),
        (ValueError, r"predictions\[1\]\['masks'\]: expected", torch.zeros(12, 4, 4)),
        (ValueError, r"predictions\[1\]\['masks'\]: expected", torch.zeros(2, 11, 4, 4)),
        (ValueError, r"predictions\[1\]\['masks'\]: expected", torch.zeros(2, 12, 0, 4)),
        (
            ValueError,
            r"predictions\[1\]\['masks'\].mask_features: expected",
            FactoredMasks(torch.zeros(2, 12, 8), torch.zeros(2, 7, 4, 4)),
        ),
        (ValueError, r"predictions\[1\]\['masks'\]: expected", torch.zeros(2, 12, 4, 4, device="meta")),
    ],
    "prediction_class_logits": [
        (ValueError, r"predictions\[1\]: expected a mapping", None),
        (ValueError, r"predictions\[1\]\['class_logits'\]: expected", torch.zeros(2, 12, 5)),
        (ValueError, r"predictions\[1\]\['class_logits'\]: expected", torch.zeros(12, 8)),
        (TypeError, r"predictions\[1\]\['class_logits'\]: expected", torch.zeros(2, 12, 8, dtype=torch.int64)),
    ],
    "target_masks": [
        (ValueError, r"targets\[1\]: expected a mapping", None),
        (TypeError, r"targets\['masks'\]\[1\]: expected", torch.zeros(1, 4, 4, dtype=torch.int64)),
        (ValueError, r"targets\['masks'\]\[1\]: expected", torch.zeros(4, 4)),
        (ValueError, r"targets\['masks'\]\[1\]: expected", torch.zeros(1, 4, 0)),
        (ValueError, r"targets\[1\]\['labels'\]: expected", torch.zeros(2, 4, 4)),
        (ValueError, r"targets\['masks'\]\[1\]: expected", torch.zeros(1, 4, 4, requires_grad=True)),
    ],
    "target_labels": [
        (ValueError, r"targets\[1\]: expected a mapping", None),
        (TypeError, r"targets\[1\]\['labels'\]: expected", torch.zeros(1)),
        (TypeError, r"targets\[1\]\['labels'\]: expected", [1]),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "error", "message", "value"), [(n, *row) for n, rows in BAD.items() for row in rows])
def test_bad_arguments(generator, name, error, message, value):
    arguments = changed(Scene(generator), **{name: value})
    with pytest.raises(error, match=f"^{message}"):
        PointMaskCriterion(LABELS, num_points=K)(*arguments)


def test_bad_lists(generator):
    scene = Scene(generator)
    criterion = PointMaskCriterion(LABELS, num_points=K)
    for predictions in ([], None, {}):
        with pytest.raises(ValueError, match=r"^predictions: expected"):
            criterion(predictions, scene.targets)
    for targets in (scene.targets[:1], None, [1, 2]):
        with pytest.raises(ValueError, match=r"^targets(\[0\])?: expected"):
            criterion(scene.predictions(), targets)
    with pytest.raises(ValueError, match=r"^predictions\[0\]\['class_logits'\]: expected .*num_labels"):
        PointMaskCriterion(3)(scene.predictions(), scene.targets)


@pytest.mark.parametrize(("options", "error"), [
    ({"num_labels": 0}, ValueError), ({"num_labels": 2.0}, ValueError), ({"num_points": 0}, ValueError),
    ({"num_points": 1.5}, TypeError), ({"oversample_ratio": 0.5}, ValueError), ({"oversample_ratio": "a"}, TypeError),
    ({"importance_sample_ratio": 1.5}, ValueError), ({"non_finite": "ignore"}, ValueError),
    ({"cost_class": 0, "cost_mask": 0, "cost_dice": 0}, ValueError),
])  # fmt: skip
def test_bad_options(options, error):
    with pytest.raises(error, match=r"^(" + "|".join(options) + ")"):
        PointMaskCriterion(**{"num_labels": LABELS, **options})


# ---------------------------------------------------------------- one synchronisation
class OnDevice(torch.Tensor):
    """A tensor that stands for one on a device: what leaves it for the host is counted."""

    transfers: ClassVar[list[str]] = []
    LEAVING: ClassVar[set[str]] = {
        "cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "is_nonzero",
        "unique", "masked_select", "equal", "allclose", "__contains__",
    }  # fmt: skip

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        result = super().__torch_function__(function, types, args, kwargs or {})
        index = args[1] if name in ("__getitem__", "__setitem__", "index_put_") else ()
        by_mask = any(
            isinstance(x, cls) and x.dtype == torch.bool for x in (index if isinstance(index, tuple) else (index,))
        )
        if name in cls.LEAVING or by_mask:
            cls.transfers.append("mask index" if by_mask else name)
            return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result
        return result


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("factored", [True, False])
def test_one_transfer_to_the_host(generator, factored, fresh):
    """Whatever the number of outputs and images, forward and backward; counted on tensors that stand for a device's."""
    scene = Scene(generator, (3, 2, 0, 4), layers=5)
    for name in ("embeds", "classes"):
        setattr(scene, name, [x.detach().as_subclass(OnDevice).requires_grad_() for x in getattr(scene, name)])
    scene.features = scene.features.detach().as_subclass(OnDevice).requires_grad_()
    scene.targets = [{name: x.as_subclass(OnDevice) for name, x in t.items()} for t in scene.targets]
    criterion = PointMaskCriterion(LABELS, num_points=K, fresh_points=fresh)
    OnDevice.transfers.clear()
    losses = criterion(scene.predictions(factored), scene.targets)
    sum(losses.values()).backward()
    assert OnDevice.transfers == ["cpu"]
    assert float(losses["loss_mask"].detach()) > 0
    assert OnDevice.transfers == ["cpu", "__float__"], "what is counted is counted"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("factored", [True, False])
def test_one_device_to_host_copy(generator, factored):
    """The same in a trace of the GPU."""
    from torch.profiler import ProfilerActivity, profile

    scene = Scene(generator, (3, 2, 0, 4), layers=5)
    for name in ("embeds", "classes"):
        setattr(scene, name, [x.detach().cuda().requires_grad_() for x in getattr(scene, name)])
    scene.features = scene.features.detach().cuda().requires_grad_()
    scene.targets = [{name: x.cuda() for name, x in t.items()} for t in scene.targets]
    criterion = PointMaskCriterion(LABELS, num_points=K).cuda()

    def step():
        sum(criterion(scene.predictions(factored), scene.targets).values()).backward()

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    assert sum("DtoH" in event.name for event in trace.events()) == 1


@pytest.mark.parametrize("factored", [True, False])
def test_fused_bookkeeping_changes_nothing(generator, monkeypatch, factored):
    """The operators of `M2F_CRITERION=fused`, with outputs that share features and outputs that do not."""
    scene = Scene(generator, (3, 0, 5))
    found = []
    for how in ("separate", "fused"):
        monkeypatch.setattr("m2f_kernels._tuning.CRITERION", how)
        with Operators() as seen:
            found.append(run(scene, PointMaskCriterion(LABELS, num_points=K), factored))
        assert {f"m2f::{x}" in seen.names for x in ("matching_costs", "criterion_losses")} == {how == "fused"}
    (losses, gradients), (own, own_gradients) = found
    for name, loss in losses.items():
        torch.testing.assert_close(own[name], loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, own_gradients, strict=True):
        assert relative_error(b, a.double()) < 1e-6


def test_one_copy_to_the_device(generator, monkeypatch):
    """Everything that the matching decides, in one piece: labels; rows of masks, targets and outputs, by group."""
    sent = []
    monkeypatch.setattr(point_mask_criterion, "to_device", lambda host, device: sent.append(host) or host)
    scene = Scene(generator, (3, 2, 0, 4), layers=5)
    for factored in (True, False):
        sent.clear()
        PointMaskCriterion(LABELS, num_points=K)(scene.predictions(factored), scene.targets)
        assert [x.numel() for x in sent] == [5 * 4 * 12 + 3 * 5 * 9]


@pytest.mark.parametrize(("type", "pinned"), [("cuda", 1), ("cpu", 0), ("meta", 0)])
def test_copies_to_a_gpu_are_pinned(monkeypatch, type, pinned):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: calls.append(kwargs) or self)
    _transfer.to_device(torch.ones(3), torch.device(type))
    assert len(calls) == 1 + pinned
    assert calls[-1] == {"non_blocking": True}


def test_losses_may_be_changed_in_place(generator):
    """As detectron2's training loop does; bitwise the weighted elements, and so are their gradients."""
    vectors = [torch.randn(3, generator=generator, requires_grad=True) for _ in range(2)]
    found = point_mask_criterion.apart(*vectors, weights=(2.0, 0.3))
    expected = [x * w for v, w in zip(vectors, (2.0, 0.3), strict=True) for x in v.unbind()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for losses in (found, expected):
        for i, x in enumerate(losses):
            x *= i
    gradients = [torch.autograd.grad(sum(x), vectors) for x in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---------------------------------------------------------------- several processes
TWO_RANKS = """
import os, sys, torch, torch.distributed as dist
from m2f_kernels import FactoredMasks
from m2f_kernels.nn import PointMaskCriterion
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
g = torch.Generator().manual_seed(rank)
counts = [1, 4][rank]
embed, features = torch.randn(1, 9, 4, generator=g), torch.randn(1, 4, 8, 8, generator=g)
targets = [{"labels": torch.zeros(counts, dtype=torch.int64), "masks": torch.rand(counts, 16, 16, generator=g) > 0.5}]
prediction = [{"class_logits": torch.randn(1, 9, 3, generator=g), "masks": FactoredMasks(embed, features)}]
criterion = PointMaskCriterion(2, num_points=30, generator=torch.Generator().manual_seed(5))
both = criterion(prediction, targets)
dist.destroy_process_group()
criterion.matcher.generator.manual_seed(5)
alone = criterion(prediction, targets)
# Alone a rank divides by its own targets; together by (1 + 4) / 2.
for name in ("loss_mask", "loss_dice"):
    assert torch.allclose(both[name] * 2.5, alone[name] * counts), (rank, name)
assert torch.equal(both["loss_cross_entropy"], alone["loss_cross_entropy"])
print("equal")
"""


def test_two_ranks(tmp_path):
    """`num_masks` is the number of targets of both ranks over two, so that averaged gradients are those of one rank
    with all images."""
    command = [sys.executable, "-c", TWO_RANKS]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output
        assert "equal" in output


# ---------------------------------------------------------------- memory
MANY_TARGETS = """
import torch, sys
from pathlib import Path
import m2f_kernels
from m2f_kernels import FactoredMasks
from m2f_kernels.nn import PointMaskCriterion
torch.set_num_threads(1)
def status(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
def run(size, count):
    features = torch.randn(1, 16, size // 4, size // 4, requires_grad=True)
    embed = torch.randn(1, 300, 16, requires_grad=True)
    classes = torch.randn(1, 300, 4)
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    masks[:, : size // 2] = True
    targets = [{"labels": torch.zeros(count, dtype=torch.int64), "masks": masks}]
    criterion = PointMaskCriterion(3, num_points=1000)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    sum(criterion([{"class_logits": classes, "masks": FactoredMasks(embed, features)}], targets).values()).backward()
    return (status("VmHWM") - before) / 1024
run(64, 2)
print(run(1024, 300))
"""


def test_three_hundred_targets_are_not_cast():
    """300 bool masks at 1024 x 1024 are 300 MiB; as float32 they would be 1200. The criterion needs far less than
    either: two chunks of logits of 32 MiB and what grows with the number of points."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", MANY_TARGETS], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 110


def test_modules_are_exported():
    assert m2f_kernels.nn.PointMaskCriterion is PointMaskCriterion
    assert "num_points=60" in repr(HungarianMatcher(num_points=K))
