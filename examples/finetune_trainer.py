"""Fine-tune an accelerated Hugging Face Mask2Former under `transformers.Trainer`.

    python examples/finetune_trainer.py run        # a small model with random weights learns synthetic shapes
    python examples/finetune_trainer.py run --checkpoint facebook/mask2former-swin-tiny-coco-panoptic --steps 2000

One line, `m2f_kernels.accelerate(model)`, is all that differs from training without it; the weights that Trainer
saves have the same names. Needs transformers and accelerate (the package that Trainer wants).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
    Trainer,
    TrainingArguments,
)

import m2f_kernels
from m2f_model.data import Shapes

NAMES = dict(enumerate(Shapes.label_names))


def small_model() -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former that is built in a second, with seeded weights."""
    backbone = SwinConfig(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 6), window_size=7)
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=128,
        dim_feedforward=128,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=4,
        num_queries=20,
        train_num_points=1024,
        id2label=NAMES,
    )
    return Mask2FormerForUniversalSegmentation(config)


class Collate:
    """Images and maps of segment ids become what the model takes, by Hugging Face's own image processor."""

    def __init__(self, size: int) -> None:
        self.processor = Mask2FormerImageProcessorPil(size={"height": size, "width": size}, ignore_index=255)

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, object]:
        images, maps, classes = [], [], []
        for sample in samples:
            images.append(sample["image"].permute(1, 2, 0).numpy())
            maps.append(sample["masks"].int().argmax(0).numpy().astype(np.int32))  # shapes cover every pixel once
            classes.append(dict(enumerate(sample["labels"].tolist())))
        batch = self.processor(images, segmentation_maps=maps, instance_id_to_semantic_id=classes, return_tensors="pt")
        return {k: batch[k] for k in ("pixel_values", "pixel_mask", "mask_labels", "class_labels")}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """The mean losses of the first and of the last fifth of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the run")
    parser.add_argument("--checkpoint", help="start from this model, a directory or a name on the hub")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=96, help="side of the inputs")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    if given.checkpoint is None:
        model = small_model()
    else:  # other classes: a new class head
        model = Mask2FormerForUniversalSegmentation.from_pretrained(
            given.checkpoint, id2label=NAMES, label2id={v: k for k, v in NAMES.items()}, ignore_mismatched_sizes=True
        )
    model, report = m2f_kernels.accelerate(model)
    print(report)

    options = TrainingArguments(
        str(given.out),
        max_steps=given.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-4 if given.checkpoint is None else 5e-5,
        max_grad_norm=0.01,
        weight_decay=0.05,
        lr_scheduler_type="constant",
        logging_steps=max(1, given.steps // 10),
        remove_unused_columns=False,  # the collator needs them
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    data = Shapes(length=4 * given.steps, size=given.size)
    trainer = Trainer(model, options, train_dataset=data, data_collator=Collate(given.size))
    trainer.train()
    trainer.save_model(given.out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    part = max(1, len(losses) // 5)
    found = {"first": sum(losses[:part]) / part, "last": sum(losses[-part:]) / part}
    print(f"loss {found['first']:.1f} at first, {found['last']:.1f} at last; the model is in {given.out}")
    return found


if __name__ == "__main__":
    main()
