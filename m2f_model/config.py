"""The configuration of a Mask2Former, and the published variants by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from m2f_model.labels import DATASETS, recognise

_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _resnet(depths: list[int]) -> dict[str, Any]:
    return {"model_type": "resnet", "depths": depths, "layer_type": "bottleneck", "out_features": _STAGES}


def _swin(embed_dim: int, depths: list[int], num_heads: list[int], window_size: int) -> dict[str, Any]:
    sizes = {"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads, "window_size": window_size}
    return {"model_type": "swin", **sizes, "drop_path_rate": 0.3, "out_features": _STAGES}


#: The paper's backbones, as `transformers` describes them. Swin-B and Swin-L: pre-trained at 384² with windows of 12.
BACKBONES: dict[str, dict[str, Any]] = {
    "r50": _resnet([3, 4, 6, 3]),
    "r101": _resnet([3, 4, 23, 3]),
    "swin-tiny": _swin(96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "swin-small": _swin(96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
    "swin-base": _swin(128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
    "swin-large": _swin(192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
    # Not the paper's: small enough to train in minutes on a CPU.
    "tiny": {
        **_resnet([1, 1, 1, 1]),
        "layer_type": "basic",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64, 128],
    },
}

#: Mean and standard deviation of the pixels that backbones were pre-trained with, of values from 0 to 255.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Mask2FormerConfig:
    """Architecture and loss of a Mask2Former (Cheng et al. 2022, sections 3 and 4.1). Defaults are the paper's.

    Attributes:
        num_labels: classes, without "no object".
        backbone: a `transformers` backbone configuration as a dict with its `model_type`; None where the model is
            given a module instead.
        num_queries: 100; 200 for Swin-L on instance and panoptic data.
        feature_size: channels of the pixel decoder; a multiple of 32 (group norm) and of `num_heads`.
        mask_feature_size: channels of mask features and mask embeddings.
        hidden_dim: channels of the transformer decoder.
        num_heads: attention heads, of both decoders.
        encoder_layers, encoder_ffn_dim: deformable attention layers of the pixel decoder, and their FFN.
        decoder_layers, decoder_ffn_dim: layers of the transformer decoder, which makes one prediction more than that.
        enforce_input_projection: project the pixel decoder's levels even where the channels fit already.
        class_weight, mask_weight, dice_weight: of the three losses, and of the same terms of the matching cost.
        no_object_weight: weight of "no object" in the class loss.
        num_points, oversample_ratio, importance_sample_ratio: where the mask losses are evaluated (section 3.3).
        frozen_batch_norm: keep a backbone's batch norm as it was pre-trained, as published for most data sets. Else it
            is trained, on several GPUs with the statistics of all of them (SyncBN).
        label_names: one per label, or None.
        stuff_labels: labels of which a panoptic output has one segment per image; None where not known.
        semantic_only: trained for semantic segmentation alone. The published evaluation of such models resizes the sums
            of the masks, that of all others the masks.
        image_size: (short, long): images are resized until their short side is this, or their long side that.
        keep_aspect_ratio: if not, `image_size` is (height, width) and every image is stretched to it.
        pixel_mean, pixel_std: of each channel, of values from 0 to 255; pixels are normalised by them.

    Raises:
        ValueError, TypeError: naming the field.
    """

    num_labels: int
    backbone: Mapping[str, Any] | None = field(default_factory=lambda: BACKBONES["r50"])
    num_queries: int = 100
    feature_size: int = 256
    mask_feature_size: int = 256
    hidden_dim: int = 256
    num_heads: int = 8
    encoder_layers: int = 6
    encoder_ffn_dim: int = 1024
    decoder_layers: int = 9
    decoder_ffn_dim: int = 2048
    enforce_input_projection: bool = False
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    frozen_batch_norm: bool = True
    label_names: tuple[str, ...] | None = None
    stuff_labels: tuple[int, ...] | None = None
    semantic_only: bool = False
    image_size: tuple[int, int] = (800, 1333)
    keep_aspect_ratio: bool = True
    pixel_mean: tuple[float, float, float] = PIXEL_MEAN
    pixel_std: tuple[float, float, float] = PIXEL_STD

    def __post_init__(self) -> None:
        for name in (
            *("num_labels", "num_queries", "feature_size", "mask_feature_size", "hidden_dim", "num_heads"),
            *("encoder_layers", "encoder_ffn_dim", "decoder_layers", "decoder_ffn_dim", "num_points"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer; got {value!r} ({type(value).__name__})")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1; got {value}")
        if self.feature_size % 32:
            raise ValueError(f"feature_size: expected a multiple of 32 (group norm); got {self.feature_size}")
        for name in ("feature_size", "hidden_dim"):
            value = getattr(self, name)
            if value % self.num_heads or value % 4:
                expected = f"a multiple of num_heads = {self.num_heads} and of 4 (sine positions)"
                raise ValueError(f"{name}: expected {expected}; got {value}")
        for name in ("class_weight", "mask_weight", "dice_weight", "no_object_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number of at least 0; got {getattr(self, name)!r}")
        if not self.oversample_ratio >= 1:
            raise ValueError(f"oversample_ratio: expected a number of at least 1; got {self.oversample_ratio!r}")
        if not 0 <= self.importance_sample_ratio <= 1:
            raise ValueError(f"importance_sample_ratio: expected 0 to 1; got {self.importance_sample_ratio!r}")
        if self.backbone is not None and "model_type" not in self.backbone:
            raise ValueError(f"backbone: expected a backbone configuration with a model_type; got {self.backbone!r}")
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise ValueError(f"label_names: expected {self.num_labels} names; got {len(self.label_names)}")
        short_and_long = sorted(self.image_size) == list(self.image_size) or not self.keep_aspect_ratio
        if len(self.image_size) != 2 or min(self.image_size) < 1 or not short_and_long:
            raise ValueError(f"image_size: expected (short, long) sides of at least 1; got {self.image_size!r}")
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) != 3 or not all(math.isfinite(x) for x in getattr(self, name)):
                raise ValueError(f"{name}: expected a number for each of three channels; got {getattr(self, name)!r}")
        if not all(x > 0 for x in self.pixel_std):
            raise ValueError(f"pixel_std: expected positive numbers; got {self.pixel_std!r}")
        if any(not 0 <= label < self.num_labels for label in self.stuff_labels or ()):
            raise ValueError(f"stuff_labels: expected labels in [0, {self.num_labels}); got {self.stuff_labels}")

    @staticmethod
    def presets() -> list[str]:
        """The names that :meth:`preset` takes."""
        return [f"{backbone}-{dataset}" for backbone in BACKBONES if backbone != "tiny" for dataset in DATASETS]

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Mask2FormerConfig:
        """A published variant: a backbone of `BACKBONES` and a data set of `DATASETS`, as in "swin-tiny-coco-panoptic".

        Args:
            name: one of :meth:`presets`.
            changes: fields that differ from it.
        """
        if name not in cls.presets():
            nearest = ", ".join(difflib.get_close_matches(str(name), cls.presets(), 3, 0.0))
            raise ValueError(f"name: expected BACKBONE-DATASET, as in {nearest}; got {name!r}")
        backbone, dataset = next((b, d) for b in BACKBONES for d in DATASETS if f"{b}-{d}" == name)
        labels, semantic = DATASETS[dataset], dataset.endswith("semantic")
        queries = 200 if backbone == "swin-large" and not semantic else 100
        # The published configurations of these use SyncBN; all others keep detectron2's default, frozen.
        resnet = backbone in ("r50", "r101")
        trained = (resnet and dataset.startswith("cityscapes")) or name == "r101-ade20k-semantic"
        size = (800, 1333)
        if dataset.startswith("cityscapes"):
            size = (1024, 2048)
        elif dataset.startswith("mapillary"):
            size = (2048, 2048)
        elif dataset.startswith("ade20k"):
            size = (512, 2048) if semantic and backbone not in ("swin-base", "swin-large") else (640, 2560)
        fields: dict[str, Any] = {
            "num_labels": len(labels.names),
            "backbone": BACKBONES[backbone],
            "num_queries": queries,
            "frozen_batch_norm": not trained,
            "label_names": labels.names,
            "stuff_labels": labels.stuff,
            "semantic_only": semantic,
            "image_size": size,
        }
        if "num_labels" in changes:  # those of other data
            fields |= {"label_names": None, "stuff_labels": None}
        return cls(**{**fields, **changes})

    @classmethod
    def tiny(cls, num_labels: int, **changes: Any) -> Mask2FormerConfig:
        """A model of under 10 MB that trains in minutes on a CPU; no published variant.

        Its batch norm is not pre-trained and therefore not frozen.
        """
        sizes = {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "num_queries": 20}
        layers = {"encoder_layers": 2, "encoder_ffn_dim": 128, "decoder_layers": 3, "decoder_ffn_dim": 128}
        fields = {"num_labels": num_labels, "backbone": BACKBONES["tiny"], "num_heads": 4, "num_points": 1024}
        fields["image_size"] = (128, 256)
        return cls(**{**fields, **sizes, **layers, "frozen_batch_norm": False, **changes})

    def to_transformers(self) -> Any:
        """The configuration as `transformers` has it; fields that it lacks are under `m2f`."""
        if self.backbone is None:
            raise ValueError("backbone: expected a `transformers` backbone configuration, to be written down; got None")
        import transformers  # takes seconds, and the names of backbones are wanted without it

        names = self.label_names or tuple(f"LABEL_{i}" for i in range(self.num_labels))
        values = asdict(self)
        backbone = transformers.AutoConfig.for_model(**values["backbone"])
        theirs: Any = transformers.Mask2FormerConfig  # accepts unknown fields
        return theirs(
            backbone_config=backbone,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            **{theirs: values[ours] for ours, theirs in _SAME.items()},
            decoder_layers=self.decoder_layers + 1,
            m2f={name: values[name] for name in _OURS},
        )

    @classmethod
    def from_transformers(cls, config: Any) -> Mask2FormerConfig:
        """From `transformers`' configuration; stuff labels, if missing there, from the names of the labels.

        Raises:
            ValueError: naming a setting that this package does not implement, and no published checkpoint has.
        """
        for name, wanted in _ASSUMED.items():
            found = getattr(config, name)
            if (tuple(found) if isinstance(found, (list, tuple)) else found) != wanted:
                raise ValueError(f"{name}: expected {wanted!r}, as in every published checkpoint; got {found!r}")
        extra = getattr(config, "m2f", None) or {}
        # In order; not every checkpoint counts from 0.
        names: tuple[str, ...] | None = tuple(str(config.id2label[i]) for i in sorted(config.id2label))
        if names == tuple(f"LABEL_{i}" for i in range(config.num_labels)):
            names = None
        known = recognise(names, config.num_labels)
        fields: dict[str, Any] = {ours: getattr(config, theirs) for ours, theirs in _SAME.items()}
        fields |= {k: tuple(v) if isinstance(v, list) else v for k, v in extra.items() if k in _OURS}
        if known is not None and fields.get("stuff_labels") is None:
            fields["stuff_labels"] = known.stuff
        return cls(
            num_labels=config.num_labels,
            backbone=config.backbone_config.to_dict(),
            decoder_layers=config.decoder_layers - 1,
            **fields,
            label_names=known.names if names is None and known is not None else names,
        )


#: Fields that mean the same in `transformers`' configuration, and their names there.
_SAME = {
    **{name: name for name in ("num_queries", "feature_size", "mask_feature_size", "hidden_dim", "encoder_layers")},
    **{name: name for name in ("enforce_input_projection", "class_weight", "mask_weight", "dice_weight")},
    **{name: name for name in ("no_object_weight", "oversample_ratio", "importance_sample_ratio")},
    "num_heads": "num_attention_heads",
    "encoder_ffn_dim": "encoder_feedforward_dim",
    "decoder_ffn_dim": "dim_feedforward",
    "num_points": "train_num_points",
}

#: Fields that `transformers`' configuration lacks.
_OURS = (
    *("frozen_batch_norm", "stuff_labels", "semantic_only"),
    *("image_size", "keep_aspect_ratio", "pixel_mean", "pixel_std"),
)

#: Settings of `transformers` that are architecture here.
_ASSUMED: dict[str, Any] = {
    "pre_norm": False,
    "dropout": 0.0,
    "activation_function": "relu",
    "common_stride": 4,
    "feature_strides": (4, 8, 16, 32),
}
