"""The pictures of the documentation, computed by the operators that they show or drawn from committed results:
`make docs-figures`.

python docs/figures.py [DIRECTORY]     (default: docs/figures)
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the benchmarks, which are not installed

import m2f_kernels
from benchmarks import readme

INK, SOFT, ACCENT, SECOND = "#1a2a3a", "#9fb3c8", "#d1495b", "#00798c"
plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "figure.dpi": 100, "savefig.bbox": "tight"})


def blobs(size: int, seed: int, count: int = 4) -> torch.Tensor:
    """Smooth random logits [size, size]: a few soft discs."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    total = torch.full((size, size), -1.0)
    for cx, cy, r in torch.rand(count, 3, generator=g).tolist():
        total = torch.maximum(total, 1 - ((x - cx) ** 2 + (y - cy) ** 2) / (0.1 + 0.2 * r) ** 2)
    return total.clamp(-3, 1) * 4


def frame(axes: plt.Axes, title: str) -> None:
    axes.set_title(title, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])


def ms_deform_attn() -> Figure:
    """One query's samples on three levels, their bilinear corners, and the weight of each pixel in the output."""
    sizes = [(16, 16), (8, 8), (4, 4)]
    g = torch.Generator().manual_seed(3)
    value = torch.zeros(1, sum(h * w for h, w in sizes), 1, 1, requires_grad=True)
    reference = torch.tensor([[[[0.42, 0.55]]]])
    offsets = torch.randn(1, 1, 1, 3, 4, 2, generator=g) * 1.6
    logits = torch.randn(1, 1, 1, 3, 4, generator=g)
    out = m2f_kernels.ms_deform_attn_from_offsets(value, sizes, reference, offsets, logits)
    (weights,) = torch.autograd.grad(out.sum(), value)  # of each pixel in the output
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.6))
    start = 0
    for level, (panel, (h, w)) in enumerate(zip(axes, sizes, strict=True)):
        pixels = weights[0, start : start + h * w, 0, 0].view(h, w)
        panel.imshow(pixels.numpy(), cmap="Greys", vmin=0, vmax=float(weights.max()), extent=(0, 1, 1, 0))
        for i in range(1, h):
            panel.axhline(i / h, color=SOFT, lw=0.3)
            panel.axvline(i / w, color=SOFT, lw=0.3)
        location = reference[0, 0, 0] + offsets[0, 0, 0, level] / torch.tensor([w, h])
        panel.plot(*location.T.numpy(), "o", color=ACCENT, ms=4)
        panel.plot(*reference[0, 0, 0].numpy(), "+", color=SECOND, ms=10, mew=2)
        panel.set(xlim=(0, 1), ylim=(1, 0))
        frame(panel, f"level {level}: {h} x {w}")
        start += h * w
    return figure


def attention_mask() -> Figure:
    """Logits of a query at full size, resized to a level, and the bits of its mask."""
    features = torch.stack([blobs(64, 1), torch.ones(64, 64)])[None]
    (level,) = m2f_kernels.resize_mask_features(features, [(16, 16)])
    embed = torch.tensor([[[1.0, 0.3]]])
    mask = m2f_kernels.predict_attention_mask(embed, level)
    logits = [torch.einsum("c,chw->hw", embed[0, 0], x[0]) for x in (features, level)]
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.6))
    for panel, x, title in zip(axes, logits, ("logits, 64 x 64: never made", "at the level, 16 x 16"), strict=False):
        panel.imshow(x.numpy(), cmap="RdBu_r", vmin=-6, vmax=6)
        frame(panel, title)
    axes[2].imshow(mask.to_bool().view(16, 16).numpy(), cmap="Greys", vmin=0, vmax=1.4)
    for word in range(1, 8):
        axes[2].axhline(2 * word - 0.5, color=ACCENT, lw=1)
    frame(axes[2], f"mask: {mask.bits.shape[-1]} words of 32 keys")
    return figure


def masked_attention() -> Figure:
    """Weights of one query over the keys: everywhere, inside its mask, and which tiles are visited."""
    size, d = 32, 16
    g = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, size * size, d, generator=g)
    query = torch.randn(1, 1, 1, d, generator=g) * 2
    attend = (blobs(size, 5, 2) > 0).view(1, 1, -1)
    # With the identity as values the output is the weights.
    identity = torch.eye(size * size)[None, None]
    wide = torch.zeros(1, 1, size * size, size * size)
    wide[..., :d] = key
    padded = torch.nn.functional.pad(query, (0, size * size - d))

    def weights(mask: torch.Tensor) -> torch.Tensor:
        return m2f_kernels.masked_attention(padded, wide, identity, mask, scale=0.12).view(size, size)

    tiles = attend.view(-1, 64).any(-1, keepdim=True).expand(-1, 64).reshape(size, size)
    figure, axes = plt.subplots(1, 3, figsize=(7.6, 2.6), layout="constrained")
    top = float(weights(attend).max())
    # Weights spread over orders of magnitude: without a mask they are small.
    scale = matplotlib.colors.PowerNorm(0.35, vmin=0, vmax=top)
    for panel, x, title in (
        (axes[0], weights(torch.ones_like(attend)), "weights without a mask"),
        (axes[1], weights(attend), "inside the query's mask"),
    ):
        shown = panel.imshow(x.numpy(), cmap="viridis", norm=scale)
        frame(panel, title)
    bar = figure.colorbar(shown, ax=axes[:2], shrink=0.75, pad=0.02)
    bar.set_ticks([0, top / 50, top / 5, top], labels=["0", f"{top / 50:.3f}", f"{top / 5:.2f}", f"{top:.2f}"])
    axes[2].imshow((tiles.float() + attend.view(size, size)).numpy(), cmap="Greys", vmin=0, vmax=2.6)
    frame(axes[2], f"tiles of 64 keys read: {int(tiles.sum()) // 64} of {size * size // 64}")
    return figure


def points() -> Figure:
    """Uniform and uncertain points on a mask, and their samples."""
    logits = blobs(48, 1)[None]
    uncertain = m2f_kernels.uncertain_points(logits, 300, generator=torch.Generator().manual_seed(0))[0]
    uniform = torch.rand(300, 2, generator=torch.Generator().manual_seed(1))
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.6))
    for panel, where, title in ((axes[0], uniform, "uniform: matching"), (axes[1], uncertain, "uncertain: loss")):
        panel.imshow(logits[0].numpy(), cmap="RdBu_r", vmin=-8, vmax=8, extent=(0, 1, 1, 0))
        panel.plot(*where.T.numpy(), ".", color=INK, ms=2)
        frame(panel, f"300 points, {title}")
    bins = np.linspace(-4.5, 4.5, 25)
    for where, name, color in ((uniform, "uniform", SOFT), (uncertain, "uncertain", ACCENT)):
        sampled = m2f_kernels.point_sample(logits[None], where[None])[0, 0]
        axes[2].hist(sampled.numpy(), bins=bins, label=name, color=color, alpha=0.8)
    axes[2].set(title="logits at the points", xlabel="logit", ylabel="points")
    axes[2].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def before_after() -> Figure:
    """Time and peak memory of this package as shares of those of `transformers`: README's table as bars."""
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.2), sharey=True)
    found = readme.headlines()
    rows = [(old, new) for _, old, new in found]
    places = np.arange(len(rows))[::-1]
    for panel, title, unit, column in (
        (panels[0], "time", "ms", "median_ms"),
        (panels[1], "peak memory", "MiB", "memory_extra_mib"),
    ):
        old, new = (np.array([getattr(pair[i], column) for pair in rows], dtype=float) for i in (0, 1))
        panel.barh(places, np.ones(len(rows)), height=0.7, color=SOFT, label="transformers")
        panel.barh(places, new / old, height=0.7, color=SECOND, label="m2f")
        for place, a, b in zip(places, old, new, strict=True):
            panel.text(
                b / a - 0.01, place, f"{b:.3g}" if b < 1000 else f"{b:.0f}", ha="right", va="center", color="white"
            )
            panel.text(0.99, place, f"{a:.3g} {unit}" if a < 1000 else f"{a:.0f} {unit}", ha="right", va="center")
        panel.set(xlim=(0, 1), xlabel=f"{title} / transformers'")
        panel.set_yticks(places, [label.replace("`", "") for label, *_ in found])
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


FIGURES = (before_after, ms_deform_attn, attention_mask, masked_attention, points)


def main(directory: Path) -> None:
    """Write every figure into `directory`, as PNG without a date: the same bytes at every run."""
    directory.mkdir(parents=True, exist_ok=True)
    for make in FIGURES:
        figure = make()
        figure.savefig(directory / f"{make.__name__}.png", metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures")
