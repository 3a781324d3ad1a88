"""Configurations: presets, translation, bad input."""

import dataclasses

import pytest
import torch
import transformers
from torch import nn

from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.labels import DATASETS, recognise
from m2f_model.parallel import synchronise_batch_norm
from tests.model.peers import CONFIGS, their_config


def test_presets_of_the_paper():
    presets = Mask2FormerConfig.presets()
    for backbone in ("r50", "r101", "swin-tiny", "swin-small", "swin-base", "swin-large"):
        for dataset in ("coco-panoptic", "coco-instance", "ade20k-semantic", "cityscapes-semantic"):
            assert f"{backbone}-{dataset}" in presets
    assert Mask2FormerConfig.preset("swin-large-coco-panoptic").num_queries == 200
    assert Mask2FormerConfig.preset("swin-large-ade20k-semantic").num_queries == 100
    assert Mask2FormerConfig.preset("r50-coco-instance").num_labels == 80
    coco = Mask2FormerConfig.preset("r50-coco-panoptic", num_points=100)
    assert (coco.num_labels, coco.num_points, coco.stuff_labels) == (133, 100, tuple(range(80, 133)))
    ade20k = Mask2FormerConfig.preset("r50-ade20k-panoptic")
    assert len(ade20k.stuff_labels) == 50
    names = [ade20k.label_names[i] for i in (0, 7, 61, 149)]
    assert names == ["wall", "bed", "bridge", "flag"]
    assert [i in ade20k.stuff_labels for i in (0, 7, 61, 149)] == [True, False, True, False]
    assert Mask2FormerConfig.preset("swin-large-mapillary-panoptic").num_queries == 200
    other = Mask2FormerConfig.preset("r50-coco-panoptic", num_labels=3)
    assert (other.label_names, other.stuff_labels) == (None, None)


def test_published_sizes_and_batch_norm():
    """As in the published configurations' INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST and MODEL.RESNETS.NORM."""
    sizes = {
        "r50-coco-instance": (800, 1333),
        "r50-ade20k-panoptic": (640, 2560),
        "swin-small-ade20k-semantic": (512, 2048),
        "swin-base-ade20k-semantic": (640, 2560),
        "swin-tiny-cityscapes-instance": (1024, 2048),
        "r50-mapillary-semantic": (2048, 2048),
    }
    assert {name: Mask2FormerConfig.preset(name).image_size for name in sizes} == sizes
    trained = {name for name in Mask2FormerConfig.presets() if not Mask2FormerConfig.preset(name).frozen_batch_norm}
    tasks = ("panoptic", "instance", "semantic")
    assert trained == {f"{b}-cityscapes-{t}" for b in ("r50", "r101") for t in tasks} | {"r101-ade20k-semantic"}
    semantic = {name for name in Mask2FormerConfig.presets() if Mask2FormerConfig.preset(name).semantic_only}
    assert semantic == {name for name in Mask2FormerConfig.presets() if name.endswith("semantic")}


def test_batch_norm_of_several_gpus_is_synchronised():
    config = Mask2FormerConfig.tiny(2)
    model = Mask2Former(config)
    before = {k: v.data_ptr() for k, v in model.state_dict().items()}
    synchronise_batch_norm(model, torch.device("cpu"))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    synchronise_batch_norm(model, torch.device("cuda"))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == before
    frozen = Mask2Former(dataclasses.replace(config, frozen_batch_norm=True))
    synchronise_batch_norm(frozen, torch.device("cuda"))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in frozen.modules())


CITYSCAPES = "road sidewalk building wall fence pole light sign vegetation terrain sky person rider car truck bus train"


def test_labels_are_recognised():
    """Names as they go in checkpoints of the hub: other words for the same, COCO's endings left out, no ending."""
    cityscapes = [*CITYSCAPES.split(), "motorcycle", "bicycle"]
    assert recognise(cityscapes, 19).stuff == tuple(range(11))
    assert recognise([n.upper() for n in cityscapes], 19) is not None
    assert recognise(cityscapes[::-1], 19) is None
    assert recognise([*cityscapes[:-1], "drone"], 19) is None
    assert recognise(cityscapes[-8:], 8).stuff == ()
    coco = DATASETS["coco-panoptic"]
    assert recognise([n.replace("-merged", "").replace("-other", "") for n in coco.names], 133) is coco
    assert recognise(coco.names[:80], 80).stuff == ()
    ade20k = list(DATASETS["ade20k-panoptic"].names)
    original = {8: "window ", 37: "tub", 38: "rail", 87: "street lamp", 89: "tv", 90: "plane", 92: "clothes"}
    original |= {109: "pool", 113: "falls", 138: "trash can", 6: "road, route", 65: "toilet, can, commode"}
    assert recognise([original.get(i, name) for i, name in enumerate(ade20k)], 150).stuff[:4] == (0, 1, 2, 3)
    assert recognise(None, 133) is coco
    assert recognise(None, 19) is None
    assert recognise(["人"] * 80, 80) is None
    for labels in DATASETS.values():
        assert len(set(labels.names)) == len(labels.names)
        assert labels.match(labels.names)


@pytest.mark.parametrize("name", Mask2FormerConfig.presets())
def test_every_preset_builds_and_translates(name):
    config = Mask2FormerConfig.preset(name)
    with torch.device("meta"):
        model = Mask2Former(config)
    assert [c // model.backbone.channels[0] for c in model.backbone.channels] == [1, 2, 4, 8]
    again = Mask2FormerConfig.from_transformers(config.to_transformers())
    assert again.to_transformers().to_dict() == config.to_transformers().to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_translation_of_theirs(name):
    theirs = their_config(name)
    ours = Mask2FormerConfig.from_transformers(theirs)
    assert ours.decoder_layers == theirs.decoder_layers - 1
    back = ours.to_transformers().to_dict()
    changed = {k for k, v in theirs.to_dict().items() if back[k] != v}
    assert changed <= {"architectures"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 0}, "num_labels: expected at least 1; got 0"),
        ({"num_queries": 2.0}, "num_queries: expected an integer; got 2.0"),
        ({"feature_size": 48}, "feature_size: expected a multiple of 32"),
        ({"hidden_dim": 100}, "hidden_dim: expected a multiple of num_heads = 8"),
        ({"mask_weight": -1.0}, "mask_weight: expected a number of at least 0; got -1.0"),
        ({"no_object_weight": float("nan")}, "no_object_weight: expected a number of at least 0; got nan"),
        ({"oversample_ratio": 0.5}, "oversample_ratio: expected a number of at least 1; got 0.5"),
        ({"importance_sample_ratio": 1.5}, "importance_sample_ratio: expected 0 to 1; got 1.5"),
        ({"backbone": {"depths": [1]}}, "backbone: expected a backbone configuration with a model_type"),
        ({"label_names": ("a",)}, "label_names: expected 5 names; got 1"),
        ({"image_size": (640, 480)}, "image_size: expected (short, long) sides of at least 1; got (640, 480)"),
        ({"pixel_std": (1.0, 0.0, 1.0)}, "pixel_std: expected positive numbers"),
        ({"pixel_mean": (1.0, 1.0)}, "pixel_mean: expected a number for each of three channels"),
        ({"stuff_labels": (5,)}, "stuff_labels: expected labels in [0, 5); got (5,)"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises((ValueError, TypeError)) as error:
        Mask2FormerConfig(**{"num_labels": 5, **changes})
    assert message in str(error.value)


def test_unknown_preset():
    with pytest.raises(
        ValueError, match=r"name: expected BACKBONE-DATASET, as in r50-coco-panoptic, .*; got 'r50-coco'"
    ):
        Mask2FormerConfig.preset("r50-coco")
    with pytest.raises(ValueError, match=r"name: expected BACKBONE-DATASET, as in .*swin-tiny-ade20k-semantic"):
        Mask2FormerConfig.preset("swin-t-ade-semantic")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pre_norm": True}, "pre_norm: expected False"), ({"dropout": 0.1}, "dropout: expected 0.0")],
)
def test_theirs_that_is_not_implemented(changes, message):
    with pytest.raises(ValueError, match=message):
        Mask2FormerConfig.from_transformers(transformers.Mask2FormerConfig(**changes))


class Pyramid(nn.Module):
    """A backbone that is no `transformers` module."""

    channels = (8, 16, 24, 32)

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, c, 1) for c in self.channels)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, pixels):
        maps = [conv(nn.functional.avg_pool2d(pixels, 4 * 2**i)) for i, conv in enumerate(self.convs)]
        return [self.norm(maps[0]), *maps[1:]]


def test_any_backbone(tmp_path):
    config = Mask2FormerConfig.tiny(3, backbone=None, frozen_batch_norm=True)
    model = Mask2Former(config, Pyramid()).train()
    out = model(torch.rand(2, 3, 64, 96))
    assert out.masks.shape == (2, 20, 16, 24)
    out.masks.logits().sum().backward()
    norm = model.backbone.body.norm
    assert norm.weight.grad is None
    assert norm.num_batches_tracked == 0
    assert (norm.running_mean == 0).all()
    with pytest.raises(ValueError, match=r"backbone: expected a `transformers` backbone configuration"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.backbone: expected a configuration where no backbone module"):
        Mask2Former(config)
    with pytest.raises(TypeError, match="backbone: expected a module with four `channels`; got Linear"):
        Mask2Former(config, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ([1], r"pixel_values: expected a floating point tensor \[N, 3, H, W\]; got \[1\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "pixel_values: expected a floating point .*; got a uint8 tensor"),
        (torch.zeros(3, 8, 8), r"pixel_values: expected \[N, 3, H, W\], not empty; got .* \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), r"pixel_values: expected \[N, 3, H, W\]"),
        (torch.zeros(1, 3, 0, 8), r"pixel_values: expected \[N, 3, H, W\], not empty"),
    ],
)
def test_bad_pixels(pixels, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Mask2Former(Mask2FormerConfig.tiny(2))(pixels)


@pytest.mark.parametrize("size", [(1, 1), (33, 31), (5, 200)])
def test_sizes_that_divide_nothing(size):
    model = Mask2Former(Mask2FormerConfig.tiny(2)).eval()
    out = model(torch.rand(1, 3, *size))
    assert out.masks.shape == (1, 20, -(-size[0] // 4), -(-size[1] // 4))
    assert out.masks.logits().isfinite().all()
