"""Accelerate a Hugging Face Mask2Former: the same predictions, less time, less memory.

    python examples/accelerate_hugging_face.py                         # a small model with random weights, no download
    python examples/accelerate_hugging_face.py --checkpoint facebook/mask2former-swin-tiny-coco-panoptic

Needs transformers; an image needs scikit-image or `--image FILE`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

import m2f_kernels


def small_model() -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former that is built in a second, with seeded weights."""
    torch.manual_seed(0)
    backbone = SwinConfig(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 6), window_size=7)
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=128,
        dim_feedforward=128,
        encoder_layers=3,
        decoder_layers=6,
        num_attention_heads=4,
        num_queries=50,
    )
    return Mask2FormerForUniversalSegmentation(config)


def read_image(path: str | None, size: int) -> torch.Tensor:
    """A photograph as the model takes it, [1, 3, size, size]."""
    import skimage.data
    import skimage.io
    import skimage.transform

    image = skimage.io.imread(path)[..., :3] if path else skimage.data.astronaut()
    image = skimage.transform.resize(image, (size, size), anti_aliasing=True)
    pixels = torch.from_numpy(image).float().permute(2, 0, 1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return ((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None]


@torch.no_grad()
def milliseconds(model: torch.nn.Module, pixels: torch.Tensor, rounds: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(rounds + 1):  # the first is a warm-up
        start = time.perf_counter()
        model(pixel_values=pixels).masks_queries_logits.sum().item()  # .item() waits for a GPU
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Times before and after in milliseconds, and the largest difference of the mask logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a name on the hub or a directory (default: a small random model)")
    parser.add_argument("--image", help="a picture (default: a photograph of scikit-image)")
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = options.checkpoint
    model = Mask2FormerForUniversalSegmentation.from_pretrained(named) if named else small_model()
    model = model.eval().to(device)
    pixels = read_image(options.image, options.size).to(device)

    with torch.no_grad():
        expected = model(pixel_values=pixels).masks_queries_logits
    before = milliseconds(model, pixels, options.rounds)

    model, report = m2f_kernels.accelerate(model)
    print(report)

    with torch.no_grad():
        difference = (model(pixel_values=pixels).masks_queries_logits - expected).abs().max().item()
    after = milliseconds(model, pixels, options.rounds)
    print(f"{before:.1f} ms before, {after:.1f} ms after; mask logits differ by at most {difference:.1e}")

    m2f_kernels.restore(model)  # the model is as it was
    return {"before_ms": before, "after_ms": after, "difference": difference}


if __name__ == "__main__":
    main()
