"""A small model of every family of `transformers` with deformable attention: from a configuration, random weights.

Offsets and attention logits are made to depend on the query (their initial weights are zero), and offsets reach
beyond the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from skimage import data, transform

SIZE = (96, 128)
#: Of every detector: sizes that make a model small.
_ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
_DECODER = {"decoder_layers": 2, "decoder_ffn_dim": 48, "num_queries": 12}
_HEADS = {"decoder_attention_heads": 4, "d_model": 32}
_BERT = {
    "vocab_size": 1013,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_NO_HUB = {"use_pretrained_backbone": False, "use_timm_backbone": False, "backbone": None}


@dataclass(frozen=True)
class Family:
    """A family of models: makes a model and its inputs.

    Attributes:
        name: directory of transformers/models.
        model: the class.
        config: makes its configuration.
        outputs: names of the outputs to compare.
        labels: "boxes", or None where there is no loss.
        extra: further inputs.
        size: of the photographs.
        pads: whether it takes a pixel mask.
    """

    name: str
    model: str
    config: Callable[[Callable[[str], Any]], Any]
    outputs: tuple[str, ...] = ("logits", "pred_boxes")
    labels: str | None = "boxes"
    extra: Callable[[], dict[str, Any]] = field(default=dict)
    size: tuple[int, int] = SIZE
    pads: bool = False

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 2, **changes: Any) -> torch.nn.Module:
        """The model in evaluation mode; the same weights for the same seed. `changes` are set in its configuration."""
        import transformers

        def resolve(name: str) -> Any:
            return getattr(transformers, name)

        torch.manual_seed(seed)
        config = self.config(resolve)
        for name, value in changes.items():
            assert hasattr(config, name), name
            setattr(config, name, value)
        model = getattr(transformers, self.model)(config).eval()
        # The initial weights let a model this small answer to nothing: features vanish, and gradients are noise.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=(parameter.dim() / 2 / parameter[0].numel()) ** 0.5)
        for module in model.modules():
            if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                torch.nn.init.ones_(module.weight)
            if hasattr(module, "sampling_offsets"):
                torch.nn.init.normal_(module.sampling_offsets.weight, std=0.2)
                torch.nn.init.normal_(module.attention_weights.bias)
        return model.to(dtype)

    def inputs(self, labels: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Two photographs; part of the second is padding where the family knows padding."""
        pixels = torch.stack([photograph(self.size), photograph(self.size).flip(-1)])
        given: dict[str, Any] = {"pixel_values": pixels.to(dtype), **self.extra()}
        if self.pads:
            mask = torch.ones(2, *self.size, dtype=torch.long)
            mask[1, :, 90:] = 0
            given["pixel_mask"] = mask
        if labels and self.labels == "boxes":
            given["labels"] = [
                {
                    "class_labels": torch.tensor([0, 2]),
                    "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.4]]),
                },
                {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.6, 0.3, 0.3]])},
            ]
        return given

    @property
    def installed(self) -> bool:
        import transformers

        return hasattr(transformers, self.model)


@cache
def photograph(size: tuple[int, int]) -> torch.Tensor:
    """A photograph from scikit-image, [3, h, w], normalised."""
    image = transform.resize(data.astronaut()[:384, :512], size, anti_aliasing=True)
    return torch.from_numpy(image).float().permute(2, 0, 1).sub(0.45).div(0.25).contiguous()


# ---------------------------------------------------------------- backbones


def _resnet(resolve: Any, kind: str = "ResNetConfig") -> Any:
    return resolve(kind)(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _hgnet(resolve: Any, first: int = 2, lowest: int = 16) -> Any:
    return resolve("HGNetV2Config")(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, lowest, 16, 24],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[lowest, 16, 24, 32],
        hidden_sizes=[lowest, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        out_features=[f"stage{i}" for i in range(first, 5)],
    )


def _swin(resolve: Any, first: int = 2, **options: Any) -> Any:
    return resolve("SwinConfig")(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=4,
        drop_path_rate=0.0,
        out_features=[f"stage{i}" for i in range(first, 5)],
        **options,
    )


# ---------------------------------------------------------------- configurations


def _deformable_detr(resolve: Any) -> Any:
    return resolve("DeformableDetrConfig")(
        backbone_config=_resnet(resolve),
        **{**_NO_HUB, **_ENCODER, **_DECODER, **_HEADS},
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=12,
        auxiliary_loss=True,
        dropout=0.0,
        num_labels=3,
    )


def _grounding(resolve: Any, kind: str) -> Any:
    return resolve(kind)(
        backbone_config=_swin(resolve),
        text_config=resolve("BertConfig")(**_BERT),
        **{**_NO_HUB, **_ENCODER, **_DECODER, **_HEADS},
        max_text_len=8,
        dropout=0.0,
        fusion_droppath=0.0,
        auxiliary_loss=True,
        num_labels=3,
    )


def _text() -> dict[str, Any]:
    # Three phrases: in BERT's tokens 1012 ends one, and 101 and 102 stand at both ends.
    tokens = torch.tensor([[101, 5, 1012, 7, 1012, 9, 1012, 102]]).repeat(2, 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _rt_detr(resolve: Any, kind: str, **options: Any) -> Any:
    backbone = _resnet(resolve, "RTDetrResNetConfig") if kind.startswith("RTDetr") else _hgnet(resolve)
    channels = [16, 24, 32]
    return resolve(kind)(
        backbone_config=backbone,
        **{**_ENCODER, **_DECODER, **_HEADS, "encoder_layers": 1},
        encoder_hidden_dim=32,
        encoder_in_channels=channels,
        decoder_in_channels=[32, 32, 32],
        num_denoising=6,
        num_labels=3,
        **options,
    )


def _vit_backed(resolve: Any, kind: str, backbone: Any, **options: Any) -> Any:
    return resolve(kind)(
        backbone_config=backbone,
        **_DECODER,
        d_model=32,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        group_detr=2,
        num_labels=3,
        **options,
    )


def _lw_detr(resolve: Any) -> Any:
    backbone = resolve("LwDetrViTConfig")(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=96,
        pretrain_image_size=96,
        patch_size=8,
        window_block_indices=[0],
        out_indices=[1, 2],
        num_windows=4,
    )
    return _vit_backed(resolve, "LwDetrConfig", backbone, projector_scale_factors=[1.0, 0.5])


def _rf_detr(resolve: Any) -> Any:
    backbone = resolve("RfDetrDinov2Config")(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=96,
        patch_size=8,
        out_indices=[1, 2],
        num_windows=2,
    )
    return _vit_backed(resolve, "RfDetrConfig", backbone, dropout=0.0)


def _omdet_turbo(resolve: Any) -> Any:
    return resolve("OmDetTurboConfig")(
        backbone_config=_swin(resolve, image_size=96),
        text_config=resolve("CLIPTextConfig")(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            projection_dim=24,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=39,
        ),
        **_NO_HUB,
        apply_layernorm_after_vision_backbone=False,
        image_size=96,
        text_projection_in_dim=24,
        text_projection_out_dim=24,
        task_encoder_hidden_dim=32,
        class_embed_dim=24,
        num_queries=12,
        encoder_hidden_dim=32,
        vision_features_channels=[32, 32, 32],
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=4,
        encoder_dim_feedforward=48,
        decoder_hidden_dim=32,
        decoder_num_heads=4,
        decoder_num_layers=2,
        decoder_dim_feedforward=48,
    )


def _classes() -> dict[str, Any]:
    tokens = torch.tensor([[0, 5, 6, 39], [0, 7, 8, 39], [0, 9, 4, 39], [0, 3, 2, 39]])
    return {
        "classes_input_ids": tokens,
        "classes_attention_mask": torch.ones_like(tokens),
        "tasks_input_ids": tokens[:2],
        "tasks_attention_mask": torch.ones(2, 4, dtype=torch.long),
        "classes_structure": torch.tensor([2, 2]),
    }


def _pp_doclayout(resolve: Any, kind: str, **options: Any) -> Any:
    sizes = {**_ENCODER, **_DECODER, "decoder_attention_heads": 4, "encoder_layers": 1}
    # The third takes 128 channels of stride 4, whatever its configuration says.
    backbone = _hgnet(resolve, 1, 128) if kind == "PPDocLayoutV3Config" else _hgnet(resolve)
    return resolve(kind)(
        backbone_config=backbone,
        **sizes,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32],
        decoder_in_channels=[32, 32, 32],
        num_labels=3,
        **options,
    )


def _pp_doclayout_v2(resolve: Any) -> Any:
    order = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "coordinate_size": 5,
        "shape_size": 6,
        "num_classes": 3,
    }
    options = {"reading_order_config": order, "class_thresholds": [0.5] * 3, "class_order": [0, 1, 2]}
    return _pp_doclayout(resolve, "PPDocLayoutV2Config", d_model=32, **options)


def _mask2former(resolve: Any) -> Any:
    return resolve("Mask2FormerConfig")(
        backbone_config=_swin(resolve, 1),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=48,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=4,
        dim_feedforward=48,
        num_queries=12,
        num_labels=3,
    )


def _oneformer(resolve: Any) -> Any:
    return resolve("OneFormerConfig")(
        backbone_config=_swin(resolve, 1),
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=48,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=4,
        dim_feedforward=48,
        num_queries=12,
        task_seq_len=8,
        text_encoder_width=32,
        text_encoder_context_length=8,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=40,
        text_encoder_n_ctx=4,
        query_dec_layers=1,
        dropout=0.0,
        num_labels=3,
    )


def _scaled(kind: str, **options: Any) -> Callable[[Any], Any]:
    return lambda resolve: _rt_detr(resolve, kind, **options)


def _task() -> dict[str, Any]:
    return {"task_inputs": torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]).repeat(2, 1)}


_DECODER_BOXES = ("decoder_class_logits", "decoder_coord_logits")
_MASKS = ("class_queries_logits", "masks_queries_logits")

FAMILIES = {
    family.name: family
    for family in (
        Family("deformable_detr", "DeformableDetrForObjectDetection", _deformable_detr, pads=True),
        Family(
            "grounding_dino",
            "GroundingDinoForObjectDetection",
            lambda resolve: _grounding(resolve, "GroundingDinoConfig"),
            extra=_text,
            pads=True,
        ),
        Family(
            "mm_grounding_dino",
            "MMGroundingDinoForObjectDetection",
            lambda resolve: _grounding(resolve, "MMGroundingDinoConfig"),
            extra=_text,
            pads=True,
        ),
        Family("rt_detr", "RTDetrForObjectDetection", _scaled("RTDetrConfig")),
        Family("rt_detr_v2", "RTDetrV2ForObjectDetection", _scaled("RTDetrV2Config")),
        Family("d_fine", "DFineForObjectDetection", _scaled("DFineConfig", decoder_n_points=[3, 6, 3])),
        Family("deimv2", "Deimv2ForObjectDetection", _scaled("Deimv2Config", decoder_n_points=[3, 6, 3])),
        Family("lw_detr", "LwDetrForObjectDetection", _lw_detr, size=(96, 96)),
        Family("rf_detr", "RfDetrForObjectDetection", _rf_detr, size=(96, 96)),
        Family(
            "omdet_turbo",
            "OmDetTurboForObjectDetection",
            _omdet_turbo,
            outputs=_DECODER_BOXES,
            labels=None,
            extra=_classes,
            size=(96, 96),
        ),
        Family("pp_doclayout_v2", "PPDocLayoutV2ForObjectDetection", _pp_doclayout_v2, labels=None),
        Family(
            "pp_doclayout_v3",
            "PPDocLayoutV3ForObjectDetection",
            lambda resolve: _pp_doclayout(resolve, "PPDocLayoutV3Config", d_model=32),
            labels=None,
        ),
        Family(
            "pp_doclayout_v4",
            "PPDocLayoutV4ForObjectDetection",
            lambda resolve: _pp_doclayout(resolve, "PPDocLayoutV4Config", hidden_size=32),
            labels=None,
        ),
        Family("mask2former", "Mask2FormerForUniversalSegmentation", _mask2former, outputs=_MASKS, labels=None),
        Family("oneformer", "OneFormerForUniversalSegmentation", _oneformer, outputs=_MASKS, labels=None, extra=_task),
    )
}


#: Families whose models differ most in what is replaced; the others are alike.
_QUICK = ("deformable_detr", "grounding_dino", "d_fine", "mask2former", "oneformer")


def quick(families: list[Family], names: tuple[str, ...] = _QUICK) -> list[Any]:
    """Families as parameters of a test; all but a few only run with `make test-slow`."""
    return [f if f.name in names else pytest.param(f, marks=pytest.mark.slow) for f in families]


def modeling(family: str) -> Any:
    """The module with a family's classes."""
    return import_module(f"transformers.models.{family}.modeling_{family}")
