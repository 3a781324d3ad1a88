"""Classes of other projects that derive from the losses and matchers of `transformers`, or copy them.

What they have left as published is fused, and what they have of their own still runs.
"""

import copy
import importlib
import inspect
import pickle
import sys

import pytest
import torch
import transformers
from torch import nn

import m2f_kernels
from m2f_kernels.integrations.transformers import _copies, patch, unpatch
from tests.integrations.published import assert_same, targets
from tests.model import peers
from tests.model.peers import published
from tests.watching import Operators

LABELS, POINTS = 5, 60
#: What may be fused of a loss.
MASKS, MATCHING = "masks", "matching"


class Losses(Operators):
    """The parts of a loss that run, by whom."""

    @property
    def sampled_by_pytorch(self):
        return "aten::grid_sampler_2d" in self.names

    @property
    def matched(self):
        return any("mask_matching_cost" in name for name in self.names)

    @property
    def lost(self):
        return any("point_mask_loss" in name or "point_loss" in name for name in self.names)


@pytest.fixture
def copied_module(tmp_path, monkeypatch):
    """Makes another project's module, with copies of the criterion, its matcher and the functions that they call."""

    def make(changes=()):
        names = [x for x in vars(published) if "\n" not in x and not x.startswith("__")]
        functions = ("sample_point", "dice_loss", "sigmoid_cross_entropy_loss", "pair_wise_dice_loss")
        functions += ("pair_wise_sigmoid_cross_entropy_loss", "Mask2FormerHungarianMatcher", "Mask2FormerLoss")
        taken = sorted(set(names) - set(functions))
        source = f"from __future__ import annotations\nfrom {published.__name__} import {', '.join(taken)}\n"
        source += "\n".join(f"# ours\n{inspect.getsource(getattr(published, x))}" for x in functions)
        for before, after in changes:
            assert source.count(before) == 1, before
            source = source.replace(before, after)
        (tmp_path / "own_criterion.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "own_criterion", raising=False)
        return importlib.import_module("own_criterion")

    return make


@pytest.fixture
def fixed_points(monkeypatch):
    peers.fix_points(monkeypatch.setattr)


def config():
    return transformers.Mask2FormerConfig(num_labels=LABELS, train_num_points=POINTS)


def make(cls=None):
    torch.manual_seed(0)
    return (cls or published.Mask2FormerLoss)(config(), {"loss_mask": 1.0})


@pytest.fixture
def given(generator):
    """A criterion's arguments: logits of masks and classes, targets of two sizes, one auxiliary output."""
    masks = [torch.randn(2, 9, 12, 16, generator=generator, requires_grad=True) for _ in range(2)]
    classes = [torch.randn(2, 9, LABELS + 1, generator=generator, requires_grad=True) for _ in range(2)]
    labels = targets((3, 2), [(48, 64), (40, 60)], generator, LABELS)
    auxiliary = [{"masks_queries_logits": masks[1], "class_queries_logits": classes[1]}]
    return {
        "masks_queries_logits": masks[0],
        "class_queries_logits": classes[0],
        **labels,
        "auxiliary_predictions": auxiliary,
    }


def run(criterion, given):
    """The losses, their gradients, and the operators that ran."""
    with Losses() as seen:
        losses = criterion(**given)
    total = sum(losses.values())
    leaves = [x for x in given.values() if isinstance(x, torch.Tensor)]
    return losses, torch.autograd.grad(total, leaves), seen


def compare(criterion, given, fused):
    """The same losses and gradients accelerated, from the parts that can be fused; returns the report."""
    accelerated, report = m2f_kernels.accelerate(copy.deepcopy(criterion))
    before, gradients, seen = run(criterion, given)
    assert seen.sampled_by_pytorch
    assert not seen.matched
    after, found, seen = run(accelerated, given)
    assert_same(before, after)
    for x, y in zip(gradients, found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)
    assert seen.matched == (MATCHING in fused)
    assert seen.lost == (MASKS in fused)
    if fused == {MATCHING, MASKS}:
        assert not seen.sampled_by_pytorch
    return report


# ---------------------------------------------------------------- derived from the published loss


class TaskLoss(published.Mask2FormerLoss):
    """As training frameworks have it: other arguments, the published parts, weights of its own."""

    def __init__(self, matcher=None):
        nn.Module.__init__(self)
        self.num_points, self.oversample_ratio, self.importance_sample_ratio = POINTS, 3.0, 0.75
        self.num_labels = LABELS
        weight = torch.ones(LABELS + 1)
        weight[-1] = 0.2
        self.register_buffer("empty_weight", weight)
        self.matcher = matcher or published.Mask2FormerHungarianMatcher(1.5, 4.0, 3.0, POINTS)

    @torch.compiler.disable
    def forward(self, masks_queries_logits, class_queries_logits, mask_labels, class_labels, **_):
        indices = self.matcher(masks_queries_logits, class_queries_logits, mask_labels, class_labels)
        classes = self.loss_labels(class_queries_logits, class_labels, indices)
        return {**self.loss_masks(masks_queries_logits, mask_labels, indices), **classes}

    def loss_masks(self, masks_queries_logits, mask_labels, indices):
        losses = super().loss_masks(masks_queries_logits, mask_labels, indices, 1)
        count = sum(len(chosen) for _, chosen in indices)
        return {name: loss / max(count, 1) for name, loss in losses.items()}


class Calls(published.Mask2FormerLoss):
    """Overrides `forward`, and calls it."""

    def forward(self, masks_queries_logits, *args, **kwargs):
        return {f"own_{k}": 2 * v for k, v in super().forward(masks_queries_logits * 0.5, *args, **kwargs).items()}


class OwnClasses(published.Mask2FormerLoss):
    """Overrides one part."""

    def loss_labels(self, class_queries_logits, class_labels, indices):
        return {"loss_cross_entropy": class_queries_logits.square().mean()}


class OwnMasks(published.Mask2FormerLoss):
    def loss_masks(self, masks_queries_logits, mask_labels, indices, num_masks):
        rows = self._get_predictions_permutation_indices(indices)
        chosen = masks_queries_logits[rows]
        return {"loss_mask": chosen.square().mean() / num_masks, "loss_dice": chosen.mean()}


class OwnPoints(published.Mask2FormerLoss):
    def calculate_uncertainty(self, logits):
        return logits


class OwnMatcher(published.Mask2FormerHungarianMatcher):
    def forward(self, masks_queries_logits, class_queries_logits, mask_labels, class_labels):
        return [(torch.arange(len(x)), torch.arange(len(x)).flip(0)) for x in class_labels]


class OwnWeights(published.Mask2FormerHungarianMatcher):
    def __init__(self):
        super().__init__(cost_class=0.5, cost_mask=2.0, cost_dice=7.0, num_points=POINTS)


def with_matcher(criterion, matcher):
    criterion.matcher = matcher
    return criterion


@pytest.mark.usefixtures("fixed_points")
@pytest.mark.parametrize(
    ("build", "fused"),
    [
        (TaskLoss, {MATCHING, MASKS}),
        (lambda: make(Calls), {MATCHING, MASKS}),
        (lambda: make(OwnClasses), {MATCHING, MASKS}),
        (lambda: make(OwnMasks), {MATCHING}),
        (lambda: make(OwnPoints), {MATCHING}),
        (lambda: with_matcher(make(), OwnWeights()), {MATCHING, MASKS}),
        (lambda: TaskLoss(OwnWeights()), {MATCHING, MASKS}),
    ],
    ids=["task", "calls", "classes", "masks", "points", "weights", "task_weights"],
)
def test_subclasses(build, fused, given):
    compare(build(), given, fused)


@pytest.mark.usefixtures("fixed_points")
def test_a_matcher_of_its_own(given):
    """The losses of masks are fused; the matcher's pairs are used."""
    criterion = with_matcher(make(), OwnMatcher(num_points=POINTS))
    with pytest.warns(RuntimeWarning, match="its matcher is"):
        report = compare(criterion, given, {MASKS})
    assert "losses of masks at sampled points alone: its matcher is" in report.replaced[0].text
    assert "OwnMatcher has its own forward" in report.skipped[0].text


@pytest.mark.usefixtures("fixed_points")
def test_hooks_on_the_matcher_see_its_calls(given):
    calls = []
    criterion = make()
    criterion.matcher.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(RuntimeWarning, match="its matcher has hooks"):
        compare(criterion, given, {MATCHING, MASKS})
    assert len(calls) == 4, "two outputs, before and after"


def test_reports():
    texts = {}
    for build in (TaskLoss, lambda: make(OwnClasses), lambda: make(OwnPoints), make):
        report = m2f_kernels.accelerate(build()).report
        texts |= {entry.cls: entry.text for entry in (*report.skipped, *report.replaced)}
    assert texts["TaskLoss"].startswith("losses of masks at sampled points alone: ")
    assert texts["TaskLoss"].endswith("TaskLoss has its own forward, loss_masks")
    assert texts["OwnClasses"].endswith("OwnClasses has its own loss_labels")
    assert texts["OwnPoints"].endswith("OwnPoints has its own calculate_uncertainty")
    assert texts["Mask2FormerLoss"].startswith("matching and losses")
    assert texts["Mask2FormerHungarianMatcher"].startswith("matching at sampled points")


@pytest.mark.usefixtures("fixed_points")
@pytest.mark.parametrize("cls", [Calls, OwnClasses, OwnMasks, OwnPoints])
def test_subclasses_of_patched_classes(cls, given):
    """Methods that a class derived after `patch()` overrides are still called."""
    before = run(make(cls), given)[0]
    patch("mask2former")
    try:
        source = f"class {cls.__name__}(Mask2FormerLoss):\n" + inspect.getsource(cls).partition("\n")[2]
        scope = {**globals(), "Mask2FormerLoss": published.Mask2FormerLoss}
        exec(source, scope)
        made = make(scope[cls.__name__])
    finally:
        unpatch()
    after, _, seen = run(made, given)
    assert_same(before, after)
    assert seen.matched


def test_a_model_with_a_loss_of_its_own(generator, monkeypatch):
    """The user's own loss gets logits, and its gradients reach the model."""
    peers.fix_points(monkeypatch.setattr)
    model = peers.their_model("resnet")
    model.criterion = Calls(model.config, model.weight_dict)
    accelerated = m2f_kernels.accelerate(copy.deepcopy(model)).model
    labels = targets((3, 2), [(96, 128)] * 2, generator, LABELS)
    pixels = torch.randn(2, 3, 96, 128, generator=generator)
    before, after = (x(pixel_values=pixels, **labels).loss for x in (model, accelerated))
    assert_same(before, after)


def test_there_and_back(given):
    criterion = make(OwnClasses)
    cls = type(criterion)
    m2f_kernels.accelerate(criterion)
    assert isinstance(criterion, cls)
    assert type(criterion) is not cls
    assert len(m2f_kernels.accelerate(criterion).report.already_accelerated) == 2
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert type(other) is type(criterion)
        with Losses() as seen:
            other(**given)
        assert seen.matched
        assert seen.lost
    m2f_kernels.restore(criterion)
    assert type(criterion) is cls
    assert type(criterion.matcher) is published.Mask2FormerHungarianMatcher


# ---------------------------------------------------------------- copies in other modules
@pytest.mark.filterwarnings("ignore:.*its matcher is:RuntimeWarning")
@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ((), {MATCHING, MASKS}),
        ([("Compute the losses related to the masks using", "Ours by")], {MATCHING, MASKS}),
        ([("numerator = 2 * (probs * labels)", "numerator = 1.9 * (probs * labels)")], {MATCHING}),
        ([("loss = 1 - (numerator + 1) / (denominator + 1)\n    return loss\n", "return denominator\n")], {MASKS}),
        ([("self.cost_dice * cost_dice", "2 * self.cost_dice * cost_dice")], {MASKS}),
        ([("loss_ce = criterion(", "loss_ce = 2 * criterion(")], {MATCHING, MASKS}),
        ([("return num_masks\n", "return 2 * num_masks\n")], {MATCHING, MASKS}),
    ],
    ids=["verbatim", "docstring", "dice", "pairs", "matcher", "classes", "number"],
)
def test_copies(changes, fused, given, monkeypatch, copied_module):
    module = copied_module(changes)
    peers.fix_points(monkeypatch.setattr)
    # One source of points for the copy and what it is compared with.
    monkeypatch.setattr(module, "torch", published.torch)
    sample = published.Mask2FormerLoss.sample_points_using_uncertainty
    monkeypatch.setattr(module.Mask2FormerLoss, "sample_points_using_uncertainty", sample)
    compare(make(module.Mask2FormerLoss), given, fused)


def plain(x: int, *, times: float = 2.0):
    """Doubles."""
    y: float = x * times
    return helper(y)


def helper(x):
    return x + 1


VARIANTS = {
    "other words": (
        "def plain(x, *, times=2.0):\n    # ours\n    y = (x\n        * times)\n    return helper(y)\n",
        True,
    ),
    "a number": ("def plain(x, *, times=3.0):\n    y = x * times\n    return helper(y)\n", False),
    "an argument": ("def plain(x, times=2.0):\n    y = x * times\n    return helper(y)\n", False),
    "a call": ("def plain(x, *, times=2.0):\n    y = x * times\n    return -helper(y)\n", False),
    "what it calls": (
        "def plain(x, *, times=2.0):\n    y = x * times\n    return helper(y)\ndef helper(x):\n    return x + 2\n",
        False,
    ),
    "a decorator": (
        "import torch\n@torch.no_grad()\ndef plain(x, *, times=2.0):\n    y = x * times\n    return helper(y)\n",
        False,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_function(variant, tmp_path, monkeypatch):
    source, same = VARIANTS[variant]
    if "def helper" not in source:
        source += "\n\n\ndef helper(x):\n    return x + 1\n"
    (tmp_path / "own_function.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_function", raising=False)
    other = importlib.import_module("own_function").plain
    assert _copies.same_function(plain, other) is same
    assert _copies.same_function(other, plain) is same
    assert _copies.same_function(plain, plain)
    assert not _copies.same_function(plain, None)
