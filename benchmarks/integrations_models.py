"""Models of `transformers` for the benchmark of the integration: from configurations, with random weights.

Sizes are those of the published models; no checkpoint is downloaded, so masks and selected queries mean nothing, while
the work is the same, but for masked attention, whose time depends on the masks a little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: Side of the image in a quick run, and in the call that warms a process up before its memory is measured; Grounding
#: DINO chooses 900 queries among that many positions.
SMALL = 256


@dataclass(frozen=True)
class Model:
    """One row of the table.

    Attributes:
        name: what the row is called.
        build: makes the model.
        inputs: what it takes, for an image [1, 3, s, s].
        size: side of the image.
        targets: number of targets of a training step; None for inference.
        aim: the ratio of times before/after that is aimed at.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Tensor], dict[str, Any]]
    size: int
    aim: float
    targets: int | None = None

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build()
        _spread(model)
        return model.train(self.targets is not None)

    def arguments(self, quick: bool) -> dict[str, Any]:
        size = SMALL if quick else self.size
        arguments = self.inputs(photograph(size))
        if self.targets is not None:
            generator = torch.Generator().manual_seed(1)
            corners = torch.randint(0, size // 2, (self.targets, 2), generator=generator)
            masks = torch.zeros(self.targets, size, size)
            for mask, (y, x) in zip(masks, corners.tolist(), strict=True):
                mask[y : y + size // 3, x : x + size // 4] = 1
            arguments["mask_labels"] = [masks]
            arguments["class_labels"] = [torch.randint(0, 80, (self.targets,), generator=generator)]
        return arguments


def _spread(model: nn.Module) -> None:
    """Weights with which signals neither vanish nor grow, and sampling points that lie apart."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=(parameter.dim() / 2 / parameter[0].numel()) ** 0.5)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter):
            nn.init.ones_(weight)
        offsets = getattr(module, "sampling_offsets", None)
        if isinstance(offsets, nn.Linear):
            nn.init.normal_(offsets.weight, std=2 * offsets.in_features**-0.5)


def photograph(size: int) -> Tensor:
    """A photograph from scikit-image, [1, 3, size, size], normalised."""
    from skimage import data, transform

    image = transform.resize(data.astronaut(), (size, size), anti_aliasing=size < 512)
    return torch.from_numpy(image).float().permute(2, 0, 1).sub(0.45).div(0.25)[None].contiguous()


# ---------------------------------------------------------------- models


def _swin(first: int) -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.0,
        out_features=[f"stage{i}" for i in range(first, 5)],
    )


def _mask2former() -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=_swin(1), num_labels=80))


def _oneformer() -> nn.Module:
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation

    return OneFormerForUniversalSegmentation(OneFormerConfig(backbone_config=_swin(1), num_labels=150))


def _deformable_detr() -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(
        backbone_config=backbone, backbone=None, use_timm_backbone=False, use_pretrained_backbone=False, num_labels=91
    )
    return DeformableDetrForObjectDetection(config)


def _grounding_dino() -> nn.Module:
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection

    config = GroundingDinoConfig(
        backbone_config=_swin(2),
        text_config=BertConfig(),
        backbone=None,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
    )
    return GroundingDinoForObjectDetection(config)


def _rt_detr() -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(out_features=["stage2", "stage3", "stage4"])
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, num_labels=80))


def _inputs(image: Tensor, **others: Any) -> dict[str, Any]:
    return {"pixel_values": image, **{name: value.clone() for name, value in others.items()}}


#: "a cat. a remote control." in BERT's tokens; a task of OneFormer.
_TEXT = torch.tensor([[101, 1037, 4937, 1012, 1037, 6556, 2491, 1012, 102]])
_TASK = torch.arange(77)[None]

MODELS = (
    Model("Mask2Former Swin-T, 1024²", _mask2former, _inputs, 1024, aim=1.7),
    Model("Mask2Former Swin-T, training step, 512², 10 targets", _mask2former, _inputs, 512, aim=1.6, targets=10),
    Model("OneFormer Swin-T, 512²", _oneformer, partial(_inputs, task_inputs=_TASK), 512, aim=1.4),
    Model("Deformable DETR ResNet-50, 800²", _deformable_detr, _inputs, 800, aim=1.3),
    Model("Grounding DINO Swin-T, 800²", _grounding_dino, partial(_inputs, input_ids=_TEXT), 800, aim=1.3),
    Model("RT-DETR ResNet-50, 640²", _rt_detr, _inputs, 640, aim=1.3),
)
