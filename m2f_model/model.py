"""Mask2Former: backbone, pixel decoder, transformer decoder (Cheng et al. 2022, figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from m2f_kernels import FactoredMasks
from m2f_model.backbone import Backbone, FrozenBatchNorm2d
from m2f_model.config import Mask2FormerConfig
from m2f_model.criterion import Targets, build_criterion, losses_of
from m2f_model.files import give_mode_of_umask
from m2f_model.finetune import Relabelling, new_head
from m2f_model.layers import CheckpointedLayer
from m2f_model.pixel_decoder import PixelDecoder
from m2f_model.samples import describe
from m2f_model.transformer_decoder import Prediction, TransformerDecoder
from m2f_model.weights import (
    WeightsError,
    fitting_presets,
    is_unused,
    load_exactly,
    read_checkpoint,
    read_detectron2,
    read_huggingface,
    write_huggingface,
)


class Mask2FormerOutput(NamedTuple):
    """The last prediction, and the ones before it.

    Attributes:
        class_logits: [N, Q, num_labels + 1], "no object" last.
        masks: mask logits [N, Q, h, w] at stride 4 of the input, as their two factors; `.logits()` multiplies them.
        auxiliary: the earlier predictions, that of the learned queries first.
        losses: weighted, by name, where targets were given: their sum is the training loss.
    """

    class_logits: Tensor
    masks: FactoredMasks
    auxiliary: list[Prediction]
    losses: dict[str, Tensor] | None = None

    @property
    def predictions(self) -> list[Prediction]:
        """All predictions, the last one last, as the criterion takes them."""
        return [*self.auxiliary, Prediction(self.class_logits, self.masks)]


class Mask2Former(nn.Module):
    """Masked-attention mask transformer (Cheng et al. 2022).

    Args:
        config: the architecture; `Mask2FormerConfig.preset(name)` for a published one.
        backbone: a module to use in place of the one that `config.backbone` describes: its call gives four maps at
            strides 4, 8, 16 and 32, finest first, and its `channels` are their channels.
    """

    def __init__(self, config: Mask2FormerConfig, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        if backbone is None:
            self.backbone = Backbone.from_config(config)
        else:
            self.backbone = Backbone(backbone, config.frozen_batch_norm)
        self.pixel_decoder = PixelDecoder(config, self.backbone.channels)
        self.transformer_decoder = TransformerDecoder(config)
        self.criterion = build_criterion(config)

    def forward(self, pixel_values: Tensor, targets: Targets | None = None) -> Mask2FormerOutput:
        """Predict masks and classes, and compare them with `targets`.

        Args:
            pixel_values: normalised images [N, 3, H, W], any size. Sizes that are multiples of 32 have masks whose
                pixels cover exactly 4 x 4 of theirs.
            targets: for each image "labels", int64 [T], and "masks" [T, h, w], bool, uint8 (not 0 is foreground) or
                floating point with values in [0, 1]; of any resolution, but of the extent of the input, padding
                included.

        Raises:
            ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
        """
        got = describe(pixel_values)
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values: expected a floating point tensor [N, 3, H, W]; got {got}")
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or 0 in pixel_values.shape:
            raise ValueError(f"pixel_values: expected [N, 3, H, W], not empty; got {got}")
        mask_features, levels = self.pixel_decoder(self.backbone(pixel_values))
        predictions = self.transformer_decoder(mask_features, levels)
        losses = None if targets is None else losses_of(self.criterion, predictions, targets)
        *auxiliary, last = predictions
        return Mask2FormerOutput(last.class_logits, last.masks, auxiliary, losses)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        config: Mask2FormerConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        labels: Sequence[str] | None = None,
        stuff_labels: Sequence[int] | None = None,
    ) -> Mask2Former:
        """A model in Hugging Face's format: a directory, or a name that `transformers` downloads.

        Args:
            name_or_path: where it is.
            dtype: of the weights, for inference, see :meth:`hold_in`; float32 by default.
            config: the expected configuration; by default that of the checkpoint's config.json and
                preprocessor_config.json. If the labels are those of a published data set (COCO, Cityscapes, ADE20K,
                Mapillary), its stuff labels are known, too.
            labels: names of other classes, to fine-tune to, see :meth:`relabel`.
            stuff_labels: the stuff among them.

        Warns:
            UserWarning: if the checkpoint does not state how images are prepared.

        Raises:
            WeightsError: listing all missing, unexpected and differently shaped parameters.
        """
        config, backbone, state = read_huggingface(name_or_path, config)
        model = cls(config, backbone)
        load_exactly(model, state, str(name_or_path))
        if labels is not None:
            model.relabel(labels, stuff_labels)
        elif stuff_labels is not None:
            raise ValueError("stuff_labels: expected none without labels, whose places they are")
        return model.hold_in(dtype).eval()

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, dtype: torch.dtype | None = None) -> Mask2Former:
        """A model from the `checkpoint.pth` of a run of `m2f train`, finished or not.

        Args:
            path: the file.
            dtype: what to hold the weights in for inference, see :meth:`hold_in`; float32 by default.

        Raises:
            ValueError: the file is damaged, of another kind, or of a run with the user's own backbone.
        """
        state = read_checkpoint(path)
        config = Mask2FormerConfig(**state["config"])
        if config.backbone is None:
            raise ValueError(f"{path}: expected a run with a backbone of transformers; this one has its own")
        model = cls(config)
        load_exactly(model, state["model"], str(path))
        return model.hold_in(dtype).eval()

    def relabel(self, labels: Sequence[str], stuff_labels: Sequence[int] | None = None) -> Relabelling:
        """Gives this model other classes, in place, for fine-tuning, and returns which were kept and which are new.

        The class head is replaced. Rows of classes with the same name are kept, and that of "no object"; names are
        compared without case and the words "merged", "other" and "stuff". All other weights stay: masks do not depend
        on classes. A model without class names keeps its rows if the number of classes is the same.

        Args:
            labels: names of the new classes, in the order of their numbers.
            stuff_labels: numbers of those that are stuff; None if not known.

            Raises:
                ValueError: there are no names, or a number of stuff is not one of theirs.
        """
        names = tuple(labels)
        if isinstance(labels, str) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"labels: expected the names of classes; got {labels!r}")
        stuff = None if stuff_labels is None else tuple(stuff_labels)
        config = replace(self.config, num_labels=len(names), label_names=names, stuff_labels=stuff, semantic_only=False)
        head, report = new_head(self.transformer_decoder.class_head, names, self.config.label_names)
        self.transformer_decoder.class_head = head
        self.criterion = build_criterion(config).to(head.weight.device).train(self.training)
        self.config = config
        return report

    def save_pretrained(self, path: str | Path) -> None:
        """Write the directory `path` in Hugging Face's format: weights, config.json and preprocessor_config.json.

        Raises:
            ValueError, WeightsError: the backbone is not the one that the configuration describes.
        """
        write_huggingface(self, self.config, path)
        for file in Path(path).glob("*.safetensors"):
            give_mode_of_umask(file)

    @classmethod
    def load_detectron2(
        cls, path: str | Path, config: Mask2FormerConfig, *, dtype: torch.dtype | None = None
    ) -> Mask2Former:
        """A model from an original checkpoint, which does not contain its configuration.

        Args:
            path: `.pkl` or `.pth`, as published. Read without running code from it.
            config: of the model, for example `Mask2FormerConfig.preset("r50-coco-panoptic")`.
            dtype: what to hold the weights in for inference, see :meth:`hold_in`; float32 by default.

        Raises:
            WeightsError: listing all missing, unexpected and differently shaped parameters.
        """
        model = cls(config)
        state = read_detectron2(path)
        kept = {k: v for k, v in model.state_dict().items() if k not in state and is_unused(k)}
        try:
            load_exactly(model, {**kept, **state}, str(path))
        except WeightsError as error:
            error.hint = fitting_presets(state)
            raise
        return model.hold_in(dtype).eval()

    def hold_in(self, dtype: torch.dtype | None) -> Mask2Former:
        """This model with its weights in `dtype`, for inference on pixels of that dtype; None leaves them.

        Autocast converts the float32 weights in every call; this converts them once. Frozen batch norm stays in
        float32, which its statistics need. To train, use autocast.

        Raises:
            TypeError: not float32, bfloat16, float16 or float64.
        """
        if dtype is None:
            return self
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64; got {dtype!r}")
        for module in self.modules():
            if not isinstance(module, FrozenBatchNorm2d) or dtype.itemsize > 2:
                module._apply(lambda x: x.to(dtype) if x.is_floating_point() else x, recurse=False)
        return self

    def set_activation_checkpointing(self, on: bool = True) -> None:
        """Turns activation checkpointing of both decoders on or off: layers keep only their inputs for backward."""
        for module in self.modules():
            if isinstance(module, CheckpointedLayer):
                module.activation_checkpointing = on
