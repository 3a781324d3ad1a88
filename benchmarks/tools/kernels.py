"""Each operator alone on this GPU, in under a minute: microseconds of forward and backward for a 1024 x 1024 image.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --output benchmarks/results/<device>/kernels.md

Run this after changing a kernel. It has no peers, reference, memory or floors, for which there is
`python -m benchmarks.run`. Timing is the same: the L2 cache is overwritten before every call, and launches are queued
before the clock starts. On CPU it runs at a small size, as a check that it works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import m2f_kernels
from benchmarks import arguments, facts, inputs, measure, static
from m2f_kernels import _library

HEADS, CHANNELS, POINTS, QUERIES = 8, 256, 12544, 100
_ROUNDS = 20
#: The name of a timed operator, and a call of it.
Call = tuple[str, Callable[[], object]]


def _both(name: str, call: Callable[..., Tensor], leaves: list[Tensor]) -> Iterator[Call]:
    """The call forward, and its backward pass."""
    yield name, lambda: call(*(x.detach() for x in leaves))
    output = call(*leaves)
    gradient = torch.randn_like(output)
    yield f"{name} backward", lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)


@contextmanager
def _compiled(direction: str, kernel: str) -> Iterator[None]:
    """Deformable attention by another compiled kernel than the default's."""
    choose = getattr(_library, f"set_cuda_{direction}")
    choose(kernel)
    yield
    choose("general")


def _deformable(device: str, size: int, dtype: torch.dtype) -> Iterator[Call]:
    """An encoder of two images: samples around each position, and all over the image; from offsets of the latter."""
    maps = inputs.projected_levels(size, size, CHANNELS)[::-1]
    value, levels = inputs.flatten_levels(maps, HEADS, 2)
    logits = inputs.attention_logits(2, value.shape[1], HEADS, 3, 4)
    weights, reference = logits.flatten(3).softmax(-1).view_as(logits), inputs.reference_grid(levels, 2)
    near = inputs.local_locations(levels, 2, HEADS, 4)
    far = inputs.random_locations(levels, 2, value.shape[1], HEADS, 4)
    offsets, centres = inputs.offsets_of(far, reference, levels), reference.to(device)

    def sampled(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return m2f_kernels.ms_deform_attn(value, levels, None, locations, weights)

    def from_offsets(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return m2f_kernels.ms_deform_attn_from_offsets(value, levels, centres, offsets, logits)

    for name, call, *tensors in (
        ("ms_deform_attn, local", sampled, near, weights),
        ("ms_deform_attn, random", sampled, far, weights),
        ("ms_deform_attn_from_offsets", from_offsets, offsets.to(dtype), logits.to(dtype)),
    ):
        leaves = [x.to(device).requires_grad_() for x in (value.to(dtype), *tensors)]
        kernels = ("forward", "lean"), ("backward", "gathered")
        for (direction, successor), (title, run) in zip(kernels, _both(name, call, leaves), strict=True):
            yield title, run
            if hasattr(_library.LIBRARIES["cuda"].handle, f"m2f_cuda_set_{direction}"):
                yield f"{title}, {successor} kernel", _compiled(direction, successor)(run)


def _masks(device: str, size: int, dtype: torch.dtype) -> Iterator[Call]:
    features = torch.randn(1, CHANNELS, size // 4, size // 4, device=device).to(dtype)
    embed = torch.randn(1, QUERIES, CHANNELS, device=device).to(dtype)
    levels = [(size // stride, size // stride) for stride in (32, 16, 8)]
    yield "resize_mask_features", lambda: m2f_kernels.resize_mask_features(features, levels)
    finest = m2f_kernels.resize_mask_features(features, levels)[-1]
    yield "predict_attention_mask, stride 8", lambda: m2f_kernels.predict_attention_mask(embed, finest)

    def nine(resized: list[Tensor], flags: Iterable[Tensor | None]) -> None:
        for i, row_any in enumerate(flags):
            m2f_kernels.predict_attention_mask(embed, resized[i % 3], row_any)

    yield "masks of 9 layers", lambda: nine(m2f_kernels.resize_mask_features(features, levels), [None] * 9)
    at_once = partial(m2f_kernels.attention_mask_levels, features, levels, 9, QUERIES)
    yield "masks of 9 layers, flags at once", lambda: nine(*at_once())


def _attention(device: str, size: int, dtype: torch.dtype) -> Iterator[Call]:
    side, generator = size // 8, inputs.generator(8)
    for batch, density in ((1, 0.3), (1, 0.05), (2, 0.3)):
        query, key, value = (
            torch.randn(batch, rows, CHANNELS, generator=generator).to(device, dtype).unflatten(-1, (HEADS, -1))
            .transpose(1, 2).requires_grad_()
            for rows in (QUERIES, side * side, side * side)
        )  # fmt: skip
        leaves = [query, key, value]
        attend = inputs.blob_masks((side, side), batch, QUERIES, density).to(device)
        mask, boolean = m2f_kernels.pack_attention_mask(attend), attend[:, None]
        case = f"N={batch}, {density:.0%} attended"
        for name, call in (
            ("masked_attention", lambda *x, m=mask: m2f_kernels.masked_attention(*x, m)),
            ("PyTorch's SDPA", lambda *x, m=boolean: F.scaled_dot_product_attention(*x, attn_mask=m)),
        ):
            yield from _both(f"{name}, {case}", call, leaves)


def _points(device: str, size: int, dtype: torch.dtype) -> Iterator[Call]:
    features = torch.randn(1, CHANNELS, size // 4, size // 4, device=device).to(dtype).requires_grad_()
    points = torch.rand(1, POINTS, 2, device=device)
    forward, backward = _both("point_sample", lambda x: m2f_kernels.point_sample(x, points), [features])
    yield from (forward, backward)
    chosen = partial(static.choosing, "points.triton_sampling")
    if m2f_kernels.explain("point_sample", features, points).backend == "triton":
        yield "point_sample backward, tiles", chosen("GATHER", "tiles")(backward[1])
    logits = torch.randn(1, 100, size // 4, size // 4, device=device)
    uncertain = "uncertain_points, 100 masks", lambda: m2f_kernels.uncertain_points(logits, POINTS)
    yield uncertain
    if m2f_kernels.explain("uncertain_points", logits).backend == "triton":
        yield f"{uncertain[0]}, by digits", chosen("SELECTION", "digits")(uncertain[1])


PARTS = {"deformable": _deformable, "masks": _masks, "attention": _attention, "points": _points}


def microseconds(run: Callable[[], object], device: str) -> float:
    """Median of interleaved rounds."""
    return measure.interleaved([run], device, measure.Plan(0.0, _ROUNDS if device == "cuda" else 3))[0].median_ms * 1e3


def main() -> None:
    options = arguments(
        __doc__,
        {
            "--part": {"action": "append", "choices": list(PARTS), "help": "repeatable; default: all"},
            "--output": {"type": Path, "help": "write the table there, as Markdown, besides printing it"},
        },
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    lines = ["| operator | bfloat16, µs | float32, µs |", "|---|---:|---:|"]
    print("\n".join(lines))
    for part in options.part or PARTS:
        columns = [
            list(PARTS[part](device, 1024 if device == "cuda" else 128, d)) for d in (torch.bfloat16, torch.float32)
        ]
        for (name, low), (_, single) in zip(*columns, strict=True):
            lines.append(f"| {name} | {microseconds(low, device):.1f} | {microseconds(single, device):.1f} |")
            print(lines[-1], flush=True)
    if options.output is not None:
        stated = "\n".join(f"- {name}: {value}" for name, value in facts.gather(device, []).items())
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(
            f"# Kernels alone\n\n`python -m benchmarks.kernels`\n\n{stated}\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
