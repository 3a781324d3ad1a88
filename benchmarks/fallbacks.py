"""What plain PyTorch does for each operator where no kernel serves, against the published form that it stands for.

    python -m benchmarks.fallbacks

Operations that are not views, bytes that they write, and bytes that autograd saves, forward and backward, in float32,
counted on the meta device by dispatch: no time, no GPU. A fallback may have 1.25 times the operations and 1.1 times the
bytes; `tests/test_fallbacks.py` holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m2f_kernels.ops.ms_deform_attn import fallback as ms_deform_attn

#: Limits, as ratios to the published form.
OPERATIONS, BYTES = 1.25, 1.1


@dataclass
class Count:
    """What was counted: operations that are not views, bytes they wrote, bytes saved for backward."""

    operations: int = 0
    written: int = 0
    saved: int = 0
    names: list[str] = field(default_factory=list, repr=False)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        changed = schema.is_mutable
        view = not changed and any(a.alias_info is not None for a in schema.arguments)
        if not view and func not in (torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default):
            self.count.operations += 1
            self.count.names.append(schema.name)
            self.count.written += sum(
                x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)
            )
        return result


def count(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Count:
    """What `function(*inputs)` and its backward do; inputs that require a gradient get one."""
    saved: dict[Any, int] = {}
    given = {x.untyped_storage()._cdata for x in tree_leaves(inputs) if isinstance(x, Tensor)}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in given:
            # Held, so that no other storage gets the same address.
            saved[storage._cdata] = storage.nbytes()
            held.append(storage)
        return x

    held: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _Counter() as counter:
        outputs = [x for x in tree_leaves(function(*inputs)) if isinstance(x, Tensor) and x.requires_grad]
    if outputs:
        wanted = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in outputs]
        with counter:
            torch.autograd.grad(outputs, wanted, grads)
    counter.count.saved = sum(saved.values())
    return counter.count


def meta(*shape: int, grad: bool = True) -> Tensor:
    """A tensor that has no memory."""
    return torch.empty(shape, device="meta", requires_grad=grad)


# ---------------------------------------------------------------- published forms
# Written after what they are named for, in the same operations.


def published_ms_deform_attn(value: Tensor, sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable DETR's `ms_deform_attn_core_pytorch`, as it is in transformers, detectron2's Mask2Former and mmcv."""
    n, _, heads, d = value.shape
    _, q, _, levels, points, _ = locations.shape
    grids = 2 * locations - 1
    sampled = []
    for level, image in enumerate(value.split([h * w for h, w in sizes], 1)):
        h, w = sizes[level]
        image = image.flatten(2).transpose(1, 2).reshape(n * heads, d, h, w)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(n * heads, 1, q, levels * points)
    out = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1).view(n, heads * d, q)
    return out.transpose(1, 2).contiguous()


def published_from_offsets(
    value: Tensor, sizes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The attention module around it: softmax, locations from reference points."""
    n, q, heads, levels, points, _ = offsets.shape
    weights = F.softmax(logits, -1).view(n, q, heads, levels, points)
    if reference_points.shape[-1] == 2:
        normalizer = torch.empty(levels, 2, dtype=torch.int64, device=value.device)
        normalizer = torch.stack([normalizer[..., 1], normalizer[..., 0]], -1)
        locations = reference_points[:, :, None, :, None, :] + offsets / normalizer[None, None, None, :, None, :]
    else:
        boxes = reference_points[:, :, None, :, None]
        locations = boxes[..., :2] + offsets / points * boxes[..., 2:] * 0.5
    return published_ms_deform_attn(value, sizes, locations, weights)


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One operator: both forms on the same inputs."""

    op: str
    case: str
    published: Callable[..., Any]
    fallback: Callable[..., Any]
    inputs: tuple[Any, ...]


def _levels(sizes: list[tuple[int, int]]) -> list[int]:
    flat, start = [], 0
    for h, w in sizes:
        flat += [h, w, start]
        start += h * w
    return flat


#: An encoder layer's: two images of 1024 x 1024 pixels, strides 32, 16, 8, 8 heads of 32 channels, 4 points.
SIZES = [(32, 32), (64, 64), (128, 128)]


def _attention_rows() -> Iterator[Row]:
    s = sum(h * w for h, w in SIZES)
    for q, sizes in ((s, SIZES), (300, SIZES), (300, [(100, 100)])):
        s = sum(h * w for h, w in sizes)
        count, levels = len(sizes), _levels(sizes)
        points = [4] * count
        value, samples = meta(2, s, 8, 32), meta(2, q, 8, count, 4, 2)

        def from_locations(v: Tensor, x: Tensor, a: Tensor, levels: Any = levels, points: Any = points) -> Tensor:
            return ms_deform_attn.ms_deform_attn(v, levels, x.flatten(3, 4), a.flatten(3), points)

        def from_offsets(
            v: Tensor, r: Tensor, o: Tensor, a: Tensor, levels: Any = levels, points: Any = points
        ) -> Tensor:
            return ms_deform_attn.ms_deform_attn_from_offsets(v, levels, r, o.flatten(3, 4), a, points, 0.5)

        yield Row(
            "ms_deform_attn", f"{count} levels, {q} queries",
            lambda v, x, a, sizes=sizes: published_ms_deform_attn(v, sizes, x, a), from_locations,
            (value, samples, meta(2, q, 8, count, 4)),
        )  # fmt: skip
        for coordinates in (2, 4):
            yield Row(
                "ms_deform_attn_from_offsets", f"{count} levels, {q} queries, {coordinates}-d",
                lambda v, r, o, a, sizes=sizes: published_from_offsets(v, sizes, r, o, a), from_offsets,
                (value, meta(2, q, count, coordinates), samples, meta(2, q, 8, 4 * count)),
            )  # fmt: skip


def rows() -> list[Row]:
    """Every operator whose fallback is something else than its reference."""
    return list(_attention_rows())


def table() -> str:
    """Markdown: both counts of every row, and their ratios."""
    lines = [
        "| operator | case | operations | ratio | MB written | ratio | MB saved | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        theirs, ours = count(row.published, row.inputs), count(row.fallback, row.inputs)
        cells = [row.op, row.case]
        for name, scale in (("operations", 1), ("written", 1e6), ("saved", 1e6)):
            a, b = getattr(theirs, name) / scale, getattr(ours, name) / scale
            digits = 0 if scale == 1 else 1
            cells += [f"{a:.{digits}f} -> {b:.{digits}f}", f"{b / a:.2f}" if a else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
