"""Operations and bytes of each operator's fallback in plain PyTorch, against the published code that it stands for.

    python -m benchmarks.fallbacks

Operations that are not views, bytes that they write, and bytes that autograd saves, forward and backward, in float32,
counted on the meta device by dispatch; nothing is timed, and no GPU is needed. A fallback may have 1.25 times the
operations and 1.1 times the bytes, which `tests/test_fallbacks.py` checks. One row may have more (`Row.exception`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.models.mask2former import modeling_mask2former

import m2f_kernels
from benchmarks import arguments, measure, of_operators
from benchmarks.formats import markdown
from benchmarks.ops.masked_attention import multihead_core
from m2f_kernels import FactoredMasks, PackedMask
from m2f_kernels.ops.points.fallback import most_uncertain

#: Limits, as ratios to the published form.
OPERATIONS, BYTES = 1.25, 1.1


class Count(NamedTuple):
    """Counts of one call: operations that are not views, bytes they wrote, bytes saved for backward."""

    names: list[str]
    written: int
    saved: int

    @property
    def operations(self) -> int:
        return len(self.names)


def count(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Count:
    """The counts of `function(*inputs)` and its backward pass; inputs that require a gradient get one."""
    given = {x.untyped_storage()._cdata for x in tree_leaves(inputs) if isinstance(x, Tensor)}
    saved: dict[int, Any] = {}  # holds storages, so that no other gets the same address

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in given:
            saved[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), measure.Operations() as found:
        outputs = [x for x in tree_leaves(function(*inputs)) if isinstance(x, Tensor) and x.requires_grad]
    if outputs:
        wanted = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in outputs]
        with found:
            torch.autograd.grad(outputs, wanted, grads)
    return Count(found.names, found.written, sum(storage.nbytes() for storage in saved.values()))


def meta(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that has no memory."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad and dtype.is_floating_point)


# ---------------------------------------------------------------- published forms
# Written after what they are named for, in the same operations.


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
    return modeling_mask2former.multi_scale_deformable_attention(value, sizes, locations, weights)


#: Mask2Former's decoder has 8 heads.
HEADS = 8


def _heads(x: Tensor) -> Tensor:
    """[N, L, C] -> [N, H, L, D]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def published_mask(embed: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask2Former's attention mask of one layer, bool [N*H, Q, S], True = blocked."""
    logits = torch.einsum("nqc,nchw->nqhw", embed, features)
    return published_threshold(F.interpolate(logits, size, mode="bilinear", align_corners=False))


def published_threshold(logits: Tensor) -> Tensor:
    """From logits [N, Q, h, w] at the level's size."""
    repeated = logits.sigmoid().flatten(2).unsqueeze(1).repeat(1, HEADS, 1, 1)
    return repeated.flatten(0, 1) < 0.5


def published_row_rule(blocked: Tensor) -> Tensor:
    """A query whose mask is empty attends everywhere."""
    full = blocked.sum(-1) == blocked.shape[-1]
    return blocked.masked_fill(full.unsqueeze(-1), False)


def published_attention(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> Tensor:
    """`torch.nn.MultiheadAttention` between its projections: [Q, N, C] and [S, N, C], blocked [N*H, Q, S]."""
    given = {name: _heads(x.transpose(0, 1)) for name, x in (("query", query), ("key", key), ("value", value))}
    return multihead_core(given | {"mask": published_row_rule(blocked)}).permute(2, 0, 1, 3).flatten(2)


def published_biased_attention(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """SAM-3's decoder in transformers, eager: attention [N, H, Q + 1, D] with a bias [N, Q, h, H] of rows and
    [N, Q, w, H] of columns, for all queries but the first."""
    bias = (by_row.unsqueeze(3) + by_column.unsqueeze(2)).flatten(2, 3).permute(0, 3, 1, 2).contiguous()
    scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[3] ** -0.5 + F.pad(bias, (0, 0, 1, 0))
    return torch.matmul(F.softmax(scores, -1), value)


def published_self_attention(query: Tensor, key: Tensor, value: Tensor, attend: Tensor) -> Tensor:
    """EoMT's: a mask for some queries and keys in one for all, and PyTorch's attention. [N, L, C], attend [N, R, M]."""
    n, length, _ = query.shape
    query, key, value = map(_heads, (query, key, value))
    mask = torch.ones(n, length, length, dtype=torch.bool, device=query.device)
    mask[:, : attend.shape[1], length - attend.shape[2] :] = attend
    mask = mask[:, None].expand(-1, HEADS, -1, -1)
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


published_point_sample = partial(modeling_mask2former.sample_point, align_corners=False)


def published_uncertain(logits: Tensor, candidates: Tensor, fresh: Tensor, keep: int) -> Tensor:
    """PointRend's choice among random points: logits [M, h, w], candidates [M, 3 K, 2]."""
    with torch.no_grad():
        uncertainty = -published_point_sample(logits[:, None], candidates).abs()
        chosen = torch.topk(uncertainty[:, 0], keep, 1).indices
        shift = candidates.shape[1] * torch.arange(len(logits), device=logits.device)
        chosen += shift[:, None]
        kept = candidates.view(-1, 2)[chosen.view(-1)].view(len(logits), keep, 2)
        return torch.cat([kept, fresh], 1)


def published_cost(logits: Tensor, targets: list[Tensor], points: Tensor) -> list[Tensor]:
    """The matcher's two costs for each image."""
    found = []
    with torch.no_grad():
        for image, masks in enumerate(targets):
            own, masks = points[image : image + 1], masks.to(logits)
            t = published_point_sample(masks[:, None], own.repeat(len(masks), 1, 1)).squeeze(1)
            x = published_point_sample(logits[image][:, None], own.repeat(logits.shape[1], 1, 1)).squeeze(1)
            found.append(modeling_mask2former.pair_wise_sigmoid_cross_entropy_loss(x, t))
            found.append(modeling_mask2former.pair_wise_dice_loss(x, t))
    return found


def published_loss(
    logits: Tensor, targets: list[Tensor], matches: list[tuple[Tensor, Tensor]], points: Tensor
) -> tuple[Tensor, Tensor]:
    """The criterion's two losses of each matched mask."""
    images = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(matches)])
    masks = logits[images, torch.cat([queries for queries, _ in matches])]
    chosen = torch.cat([x[own] for x, (_, own) in zip(targets, matches, strict=True)]).to(logits)
    with torch.no_grad():
        t = published_point_sample(chosen[:, None], points).squeeze(1)
    x = published_point_sample(masks[:, None], points).squeeze(1)
    cross_entropy = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1)
    s = x.sigmoid().flatten(1)
    both = s.sum(-1) + t.sum(-1)
    return cross_entropy, 1 - (2 * (s * t).sum(-1) + 1) / (both + 1)


# ---------------------------------------------------------------- rows


class Row(NamedTuple):
    """One operator: both forms, each with its inputs.

    `exception`: the ratios of operations and of bytes written that a row may have beyond the limits, with the reason.
    """

    op: str
    case: str
    published: Callable[..., Any]
    fallback: Callable[..., Any]
    inputs: tuple[Any, ...]
    own_inputs: tuple[Any, ...] | None = None
    exception: tuple[float, float] | None = None

    def counts(self) -> tuple[Count, Count]:
        """The counts of the published code and of the fallback."""
        own = self.inputs if self.own_inputs is None else self.own_inputs
        return count(self.published, self.inputs), count(m2f_kernels.use_backend("fallback")(self.fallback), own)


#: An encoder layer's: two images of 1024 x 1024 pixels, strides 32, 16, 8, 8 heads of 32 channels, 4 points.
SIZES = [(32, 32), (64, 64), (128, 128)]


def _attention_rows() -> Iterator[Row]:
    for q, sizes in ((21504, SIZES), (300, SIZES), (300, [(100, 100)])):
        s, levels = sum(h * w for h, w in sizes), len(sizes)
        value, samples = meta(2, s, 8, 32), meta(2, q, 8, levels, 4, 2)
        yield Row(
            "ms_deform_attn", f"{levels} levels, {q} queries",
            lambda v, x, a, sizes=sizes: modeling_mask2former.multi_scale_deformable_attention(v, sizes, x, a),
            lambda v, x, a, sizes=sizes: m2f_kernels.ms_deform_attn(v, sizes, None, x, a),
            (value, samples, meta(2, q, 8, levels, 4)),
        )  # fmt: skip
        for coordinates in (2, 4):
            yield Row(
                "ms_deform_attn_from_offsets", f"{levels} levels, {q} queries, {coordinates}-d",
                lambda v, r, o, a, sizes=sizes: published_from_offsets(v, sizes, r, o, a),
                lambda v, r, o, a, sizes=sizes: m2f_kernels.ms_deform_attn_from_offsets(v, sizes, r, o, a),
                (value, meta(2, q, levels, coordinates), samples, meta(2, q, 8, 4 * levels)),
            )  # fmt: skip


def packed(n: int, q: int, s: int) -> PackedMask:
    return PackedMask(meta(n, q, -(-s // 32), dtype=torch.int32), meta(n, q, dtype=torch.bool), s)


def _mask_rows() -> list[Row]:
    n, q, c = 2, 100, 256
    features, embed = meta(n, c, 256, 256, grad=False), meta(n, q, c, grad=False)
    predicted = [
        row
        for h, w in (*SIZES, (25, 25))
        for row in (
            Row(
                "predict_attention_mask", f"{h * w} keys", partial(published_mask, size=(h, w)),
                m2f_kernels.predict_attention_mask, (embed, features), (embed, meta(n, c, h, w, grad=False)),
            ),
            Row(
                "pack_attention_mask", f"logits, {h * w} keys, row rule",
                lambda x: published_row_rule(published_threshold(x)), m2f_kernels.pack_attention_mask,
                (meta(n, q, h, w, grad=False),),
            ),
        )
    ]  # fmt: skip
    return [
        Row(
            "resize_mask_features", "3 levels",
            lambda x: [F.interpolate(x, size, mode="bilinear", align_corners=False) for size in SIZES],
            lambda x: m2f_kernels.resize_mask_features(x, SIZES), (features,),
        ),
        *predicted,
        Row(
            "pack_attention_mask", "bool, row rule",
            lambda x: published_row_rule(~x.unsqueeze(1).repeat(1, HEADS, 1, 1)), m2f_kernels.pack_attention_mask,
            (meta(n, q, 625, dtype=torch.bool),),
        ),
    ]  # fmt: skip


def _masked_attention_rows() -> list[Row]:
    q, c = 100, 256

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        heads = (_heads(x.transpose(0, 1)) for x in (query, key, value))
        return m2f_kernels.masked_attention(*heads, mask).permute(2, 0, 1, 3).flatten(2)

    def attend_all(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        heads = map(_heads, (query, key, value))
        return m2f_kernels.masked_attention(*heads, mask, first_key=205).transpose(1, 2).flatten(2)

    def inputs(n: int, s: int) -> tuple[Tensor, ...]:
        return meta(q, n, c), meta(s, n, c), meta(s, n, c)

    return [
        *(
            Row(
                "masked_attention", f"{n} images, {s} keys", published_attention, attend,
                (*inputs(n, s), meta(n * HEADS, q, s, dtype=torch.bool)), (*inputs(n, s), packed(n, q, s)),
            )
            for n, s in ((1, 16384), (2, 16384), (2, 1024), (2, 625))
        ),
        Row(
            "masked_attention", "2 images, 625 keys, bool",
            lambda q, k, v, m: published_attention(q, k, v, ~m.repeat_interleave(HEADS, 0)), attend,
            (*inputs(2, 625), meta(2, q, 625, dtype=torch.bool)),
        ),
        Row(
            "masked_attention", "bias of 72 rows and columns", published_biased_attention,
            lambda q, k, v, *bias: m2f_kernels.masked_attention(
                q, k, v, bias=tuple(F.pad(x.permute(0, 3, 1, 2), (0, 0, 1, 0)) for x in bias)
            ),
            (
                *(meta(1, length, HEADS, 32).transpose(1, 2) for length in (201, 5184, 5184)),
                *(meta(1, 200, 72, HEADS) for _ in range(2)),
            ),
        ),
        Row(
            "masked_attention", "encoder-only, 1805 keys", published_self_attention, attend_all,
            (*(meta(2, 1805, c) for _ in range(3)), meta(2, 200, 1600, dtype=torch.bool)),
            (*(meta(2, 1805, c) for _ in range(3)), packed(2, 200, 1600)),
        ),
    ]  # fmt: skip


#: Mask2Former's, in training: points of a mask, of which so many are the most uncertain of three times as many.
POINTS, KEPT = 12544, 9408


def _point_rows() -> list[Row]:
    points, logits = meta(2, POINTS, 2, grad=False), meta(30, 256, 256, grad=False)
    drawn = 3 * POINTS, POINTS - KEPT

    def published(x: Tensor) -> Tensor:
        return published_uncertain(x, *(torch.rand(30, k, 2, device=x.device) for k in drawn), KEPT)

    return [
        Row(
            "point_sample", "features", published_point_sample, m2f_kernels.point_sample,
            (meta(2, 256, 256, 256), points),
        ),
        *(
            Row(
                "point_sample", f"{dtype} masks".removeprefix("torch."),
                lambda x, p: published_point_sample(x.float(), p), m2f_kernels.point_sample,
                (meta(2, 20, 1024, 1024, dtype=dtype), points),
            )
            for dtype in (torch.bool, torch.uint8)
        ),
        Row(
            "uncertain_points", "of given random points",
            lambda x, drawn, fresh, rows: published_uncertain(x[rows], drawn, fresh, KEPT),
            lambda x, drawn, fresh, rows: most_uncertain(x, rows, drawn, fresh, KEPT),
            (logits, *(meta(30, k, 2, grad=False) for k in drawn), meta(30, dtype=torch.int64)),
        ),
        Row(
            "uncertain_points", "with its random points", published, m2f_kernels.uncertain_points, (logits,),
            exception=(14.1, 11.1),
        ),
    ]  # fmt: skip


def _loss_rows() -> list[Row]:
    n, q, c, counts = 2, 100, 256, (20, 12)
    factors, logits = (meta(n, q, c), meta(n, c, 256, 256)), meta(n, q, 256, 256)
    points, own = meta(n, POINTS, 2, grad=False), meta(sum(counts), POINTS, 2, grad=False)
    matches = [(meta(m, dtype=torch.int64), meta(m, dtype=torch.int64)) for m in counts]
    same = [meta(m, 1024, 1024, dtype=torch.bool) for m in counts]

    def loss(x: Any, t: Any, m: Any, p: Tensor) -> Any:
        return m2f_kernels.point_mask_loss(x, t, p, matches=m)

    return [
        Row("mask_matching_cost", "logits", published_cost, m2f_kernels.mask_matching_cost, (logits, same, points)),
        Row("point_mask_loss", "logits", published_loss, loss, (logits, same, matches, own)),
        Row(
            "mask_matching_cost", "factored masks",
            lambda x, *rest: published_cost(FactoredMasks(*x).logits(), *rest),
            lambda x, *rest: m2f_kernels.mask_matching_cost(FactoredMasks(*x), *rest), (factors, same, points),
        ),
        Row(
            "point_mask_loss", "factored masks",
            lambda x, *rest: published_loss(FactoredMasks(*x).logits(), *rest),
            lambda x, *rest: loss(FactoredMasks(*x), *rest), (factors, same, matches, own),
        ),
    ]  # fmt: skip


def rows() -> list[Row]:
    """Every operator; those of a new one are `fallback_rows()` of `benchmarks/ops/<op>.py`."""
    here = (*_attention_rows(), *_mask_rows(), *_masked_attention_rows(), *_point_rows(), *_loss_rows())
    return [*here, *of_operators("fallback_rows")]


def table(of: Iterable[Row]) -> str:
    """Markdown: both counts of each row, and their ratios."""
    lines = []
    for row in of:
        theirs, ours = row.counts()
        cells = [row.op, row.case]
        for name, scale, digits in (("operations", 1, 0), ("written", 1e6, 1), ("saved", 1e6, 1)):
            a, b = getattr(theirs, name) / scale, getattr(ours, name) / scale
            cells += [f"{a:.{digits}f} -> {b:.{digits}f}", f"{b / a:.2f}" if a else "-"]
        lines.append(cells)
    return markdown(["operator", "case", "operations", "ratio", "MB written", "ratio", "MB saved", "ratio"], lines)


if __name__ == "__main__":
    arguments(__doc__, {})
    print(table(rows()))
