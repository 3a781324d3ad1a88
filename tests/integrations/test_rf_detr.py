"""Segmentation of RF-DETR in `transformers` before and after: outputs, loss, gradients, groups of queries, targets that
are never dense."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

import m2f_kernels
from m2f_kernels import InstanceMap, RunLengths
from m2f_kernels.integrations.transformers import rf_detr
from m2f_kernels.ops.points import check_targets
from tests.integrations.published import as_coco, assert_same, assert_same_gradients
from tests.watching import Largest

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "RfDetrForInstanceSegmentation"), reason="this transformers has no RF-DETR segmentation"
)
SIZE, QUERIES, LABELS, GROUPS = 96, 10, 4, 3


def make(**changes):
    torch.manual_seed(2)
    backbone = transformers.AutoConfig.for_model(
        "rf_detr_dinov2", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=8,
        out_indices=[1, 2], num_windows=2,
    )  # fmt: skip
    config = transformers.RfDetrConfig(
        backbone_config=backbone, d_model=32, decoder_self_attention_heads=4, decoder_cross_attention_heads=4,
        group_detr=GROUPS, num_labels=LABELS, num_queries=QUERIES, decoder_layers=2, decoder_ffn_dim=32, dropout=0.0,
        mask_point_sample_ratio=4, **changes,
    )  # fmt: skip
    model = transformers.RfDetrForInstanceSegmentation(config).eval()
    with torch.no_grad():  # masks that differ
        for parameter in model.blocks.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.query_features_proj.weight.mul_(3)
    return model


def both(**changes):
    model = make(**changes)
    return model, m2f_kernels.accelerate(copy.deepcopy(model)).model


@pytest.fixture
def fixed_points(monkeypatch):
    """Both losses look at the same points; those of the matching come from PyTorch's generator in both."""
    import transformers.loss.loss_rf_detr as published

    points = torch.rand(4000, 2, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(
        published, "sample_points_using_uncertainty", lambda x, count, *_: points[:count].expand(len(x), -1, -1)
    )
    monkeypatch.setattr(rf_detr, "uncertain_points", lambda x, count, *_: points[:count].expand(len(x), -1, -1))


def targets(generator, counts=(3, 2), size=(SIZE, SIZE), dtype=torch.float32):
    labels = []
    for count in counts:
        masks = torch.rand(count, size[0] // 8, size[1] // 8, generator=generator) > 0.5
        corner, side = (torch.rand(count, 2, generator=generator) for _ in range(2))
        labels.append(
            {
                "class_labels": torch.randint(0, LABELS, (count,), generator=generator),
                "boxes": torch.cat([corner * 0.6 + 0.2, side * 0.2 + 0.1], 1),
                "masks": masks.repeat_interleave(8, 1).repeat_interleave(8, 2).to(dtype),
            }
        )
    return labels


def train(model, labels, seed=0):
    model = copy.deepcopy(model).train()
    torch.manual_seed(seed)
    out = model(torch.randn(len(labels), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), labels=labels)
    out.loss.sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- the same
@pytest.mark.usefixtures("fixed_points")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("counts", [(3, 2), (3, 0), (25, 1)], ids=str)
def test_loss_and_gradients(counts, dtype, generator):
    """All groups of queries are matched; more targets than queries too, and an image without any."""
    model, accelerated = both()
    labels = targets(generator, counts, dtype=dtype)
    before, gradients = train(model, labels)
    after, found = train(accelerated, labels)
    assert {k for k in before.loss_dict if "mask" in k} >= {"loss_mask_ce", "loss_mask_dice_0", "loss_mask_ce_enc"}
    assert_same(dict(before.loss_dict), dict(after.loss_dict))
    assert_same(before.loss, after.loss)
    assert_same(before.pred_masks, after.pred_masks)
    assert_same_gradients(gradients, found)
    assert gradients["query_features_proj.weight"].any()


@pytest.mark.usefixtures("fixed_points")
def test_without_auxiliary_losses_and_in_evaluation(generator):
    model, accelerated = both(auxiliary_loss=False)
    labels, pixels = targets(generator), torch.randn(2, 3, SIZE, SIZE, generator=generator)
    results = []
    for one in (model, accelerated):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(one(pixels, labels=labels))
    assert_same(dict(results[0].loss_dict), dict(results[1].loss_dict))
    assert_same(results[0].loss, results[1].loss)


def test_without_labels(generator):
    model, accelerated = both()
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        assert_same(model(pixels).pred_masks, accelerated(pixels).pred_masks)


def test_nearest(generator):
    """The values of `grid_sample`, at points inside, outside, and halfway between pixels."""
    masks = torch.rand(5, 12, 7, generator=generator) > 0.5
    points = torch.rand(5, 400, 2, generator=generator) * 1.2 - 0.1
    halves = torch.stack(torch.meshgrid(torch.arange(8) / 7, torch.arange(13) / 12, indexing="xy"), -1).view(-1, 2)
    points = torch.cat([points, halves.expand(5, -1, -1)], 1)
    expected = F.grid_sample(
        masks[:, None].float(), 2 * points[:, :, None] - 1, mode="nearest", align_corners=False
    ).squeeze((1, 3))
    rows = torch.arange(5)[:, None]
    for form in (masks, masks.float(), masks.byte() * 255, RunLengths.from_masks(masks)):
        (found,) = check_targets("targets", [form], 1, points)
        labels = rf_detr.nearest(found, rows, points).float()
        # Where two pixels are as near, rounding decides within grid_sample.
        place = points * torch.tensor([7, 12])
        tied = ((place - place.round()).abs() < 1e-5).any(-1)
        assert torch.equal(labels[~tied], expected[~tied])
        assert not tied[:, :400].any()


# ---------------------------------------------------------------- targets that are never dense
def compact(form, labels):
    given = []
    for i, target in enumerate(labels):
        masks = target["masks"] != 0
        if form == "maps":
            id_map = torch.randint(0, 5, masks.shape[1:], generator=torch.Generator().manual_seed(i))
            own = InstanceMap(id_map, torch.arange(len(masks)))
            target["masks"] = own.masks().float()
        else:
            own = RunLengths.from_masks(masks) if form == "runs" else as_coco(masks)
        given.append({**target, "masks": own})
    return given


@pytest.mark.parametrize(("form", "served"), [("maps", True), ("maps", False), ("runs", True), ("COCO", False)])
def test_compact_targets(form, served, generator, monkeypatch):
    """The same loss and gradients to the last bit; where no kernel serves, the published loss is given dense masks."""
    _, accelerated = both()
    if not served:
        monkeypatch.setattr(rf_detr, "kernels_serve", lambda *_: False)
    labels = targets(generator)
    given = compact(form, labels)
    first, gradients = train(accelerated, given)
    second, expected = train(accelerated, labels)
    assert torch.equal(first.loss, second.loss)
    for name, gradient in gradients.items():
        assert gradient is None or torch.equal(gradient, expected[name]), name


def test_targets_are_not_copied(generator):
    """The published loss makes floats of them, for every group of queries; here nothing has their size."""
    model, accelerated = both()
    labels = targets(generator, (4,), (640, 640), torch.bool)
    sizes = []
    for one in (model, accelerated):
        with Largest() as seen:
            train(one, labels)
        sizes.append(seen.elements)
    assert sizes[0] >= GROUPS * 4 * 640 * 640
    assert sizes[1] < 640 * 640


# ---------------------------------------------------------------- and back
def test_report_copies_and_restores():
    model, accelerated = both()
    report = m2f_kernels.accelerate(make()).report
    assert any("RfDetrForInstanceSegmentation" in str(row) for row in report.replaced)
    original = rf_detr.import_module("transformers.loss.loss_rf_detr").RfDetrForSegmentationLoss
    assert model.loss_function is original
    for one in (accelerated, copy.deepcopy(accelerated)):
        assert one.loss_function is rf_detr.segmentation_loss
    assert list(accelerated.state_dict()) == list(model.state_dict())
    assert m2f_kernels.restore(accelerated).loss_function is original


def test_a_loss_of_ones_own_stays(generator):
    def own(*_, **__):
        return torch.zeros(()), {}, None

    model, accelerated = both()
    for one in (accelerated, model):
        one.loss_function = own
        one = m2f_kernels.accelerate(one).model
        with torch.no_grad():
            assert one(torch.randn(1, 3, SIZE, SIZE), labels=targets(generator, (1,))).loss == 0
