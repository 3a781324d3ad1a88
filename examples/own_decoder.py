"""Use the operators in a decoder of your own: it learns to segment discs in half a minute on a CPU.

    python examples/own_decoder.py [--steps 300] [--picture discs.png]

It has the parts of Mask2Former's decoder, in fifty lines: queries, masks that are predicted from them, attention inside
these masks, and a loss at points.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import m2f_kernels

SIZE, QUERIES, WIDTH, LAYERS = 64, 12, 32, 3


def images(count: int, generator: torch.Generator) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Pictures [count, 3, SIZE, SIZE] of one to four discs, the front ones whole, and their targets."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    pixels = 0.1 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    targets = []
    for i in range(count):
        number = int(torch.randint(1, 5, (), generator=generator))
        cx, cy = torch.randint(8, SIZE - 8, (2, number, 1, 1), generator=generator)
        radius = torch.randint(5, 13, (number, 1, 1), generator=generator)
        discs = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        for j in range(number):  # a later disc hides an earlier one
            discs[:j] &= ~discs[j]
            pixels[i][:, discs[j]] += torch.rand(3, 1, generator=generator) + 0.3 - pixels[i][:, discs[j]]
        discs = discs[discs.flatten(1).any(1)]
        targets.append({"labels": torch.zeros(len(discs), dtype=torch.int64), "masks": discs})
    return pixels, targets


class Layer(nn.Module):
    """A decoder layer: queries attend to the pixels of their own mask, then to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = m2f_kernels.nn.MaskedCrossAttention(WIDTH, num_heads=4)
        self.self_attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, queries: Tensor, pixels: Tensor, mask: m2f_kernels.PackedMask, positions: Tensor) -> Tensor:
        queries = self.norms[0](queries + self.cross(queries, pixels, mask, key_pos=positions))
        attended, _ = self.self_attention(queries, queries, queries, need_weights=False)
        queries = self.norms[1](queries + attended)
        return self.norms[2](queries + self.feed_forward(queries))


class Decoder(nn.Module):
    """A small segmenter with masked attention."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, WIDTH, WIDTH, WIDTH]
        self.stem = nn.Sequential(
            *(
                layer
                for i in range(3)
                for layer in (
                    nn.Conv2d(widths[i], widths[i + 1], 3, stride=2 if i == 1 else 1, padding=1),
                    nn.GroupNorm(4, WIDTH),
                    nn.ReLU(),
                )
            )
        )
        self.level = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.positions = nn.Parameter(torch.randn((SIZE // 4) ** 2, WIDTH))
        self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.classify = nn.Linear(WIDTH, 2)  # disc, nothing

    def forward(self, pixels: Tensor) -> list[dict[str, Tensor | m2f_kernels.FactoredMasks]]:
        """Predictions of the queries and of each layer, in the form that the criterion takes."""
        features = self.stem(pixels)  # stride 2
        level = self.level(features)  # stride 4
        size = level.shape[-2:]
        keys = level.flatten(2).transpose(1, 2)
        # Once per image; masks at full size are never computed.
        (resized,) = m2f_kernels.resize_mask_features(features, [tuple(size)])
        queries = self.queries.expand(len(pixels), -1, -1)
        outputs = [self.predict(queries, features)]
        for layer in self.layers:
            mask = m2f_kernels.predict_attention_mask(outputs[-1]["masks"].mask_embed, resized)
            queries = layer(queries, keys, mask, self.positions)
            outputs.append(self.predict(queries, features))
        return outputs

    def predict(self, queries: Tensor, features: Tensor) -> dict[str, Tensor | m2f_kernels.FactoredMasks]:
        masks = m2f_kernels.FactoredMasks(self.embed(queries), features)
        return {"class_logits": self.classify(queries), "masks": masks}


@torch.no_grad()
def mean_iou(model: Decoder, pixels: Tensor, targets: list[dict[str, Tensor]]) -> float:
    """The mean over all discs of the best intersection over union with a predicted disc."""
    last = model(pixels)[-1]
    logits = nn.functional.interpolate(last["masks"].logits(), (SIZE, SIZE), mode="bilinear")
    found = []
    for i, target in enumerate(targets):
        kept = logits[i][last["class_logits"][i].argmax(-1) == 0] > 0
        for disc in target["masks"]:
            union = (kept | disc).flatten(1).sum(1).clamp(min=1)
            found.append(((kept & disc).flatten(1).sum(1) / union).max().item() if len(kept) else 0.0)
    return sum(found) / len(found)


def train(steps: int) -> tuple[Decoder, float, float]:
    """A trained model, and its mean IoU on unseen pictures before and after."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    unseen = images(32, torch.Generator().manual_seed(1))
    model = Decoder()
    criterion = m2f_kernels.nn.PointMaskCriterion(num_labels=1, num_points=256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = mean_iou(model, *unseen)
    for step in range(steps):
        pixels, targets = images(8, generator)
        loss = sum(criterion(model(pixels), targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.2f}")
    return model, before, mean_iou(model, *unseen)


def draw(model: Decoder, path: Path) -> None:
    """A picture: four images, and the masks that each layer predicts for them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pixels, _ = images(4, torch.Generator().manual_seed(5))
    with torch.no_grad():
        outputs = model(pixels)
    colours = torch.tensor([plt.cm.tab20(i)[:3] for i in range(QUERIES)])
    figure, axes = plt.subplots(4, 1 + len(outputs), figsize=(6.5, 5.2))
    for row, image in zip(axes, range(4), strict=True):
        row[0].imshow(pixels[image].permute(1, 2, 0).clamp(0, 1).numpy())
        for axis, output in zip(row[1:], outputs, strict=True):
            shown = (output["class_logits"][image].argmax(-1) == 0)[:, None, None] & (
                output["masks"].logits()[image] > 0
            )
            painted = torch.where(shown[..., None], colours[:, None, None], torch.zeros(3)).amax(0)
            axis.imshow(painted.numpy())
    titles = ["image", "queries", *(f"layer {i + 1}" for i in range(LAYERS))]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """The mean IoU before and after training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--picture", type=Path, help="write the masks of every layer to this file")
    options = parser.parse_args(arguments)
    model, before, after = train(options.steps)
    print(f"mean IoU on unseen pictures: {before:.2f} before, {after:.2f} after")
    if options.picture:
        draw(model, options.picture)
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
