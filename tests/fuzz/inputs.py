"""Random good arguments of every public operator: shapes, dtypes and layouts drawn by Hypothesis, numbers by a seed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import m2f_kernels
from m2f_kernels import FactoredMasks, dispatch
from tests.ops import ms_deform_attn_cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "permuted", "stepped", "offset", "expanded")

Arguments = dict[str, Any]


def lay_out(x: Tensor, layout: str, g: torch.Generator) -> Tensor:
    """`x` (of which "expanded" keeps the first image only) with other strides; memory in between is poisoned."""
    if layout == "permuted" and x.dim() > 1:
        order = torch.randperm(x.dim(), generator=g).tolist()
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
    if layout == "expanded" and x.dim() > 1 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    poison = torch.nan if x.is_floating_point() else 1
    if layout == "stepped" and x.dim() > 0:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), poison, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "offset":
        wide = torch.full((x.numel() + 7,), poison, dtype=x.dtype)
        wide[3 : 3 + x.numel()] = x.flatten()
        return wide[3 : 3 + x.numel()].view(x.shape)
    return x


class Source:
    """Draws structure from Hypothesis and numbers from a seed."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.seed = draw(st.integers(0, 2**32 - 1))
        self.g = torch.Generator().manual_seed(self.seed)

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def choice(self, values: Any) -> Any:
        return self.draw(st.sampled_from(list(values)))

    def laid(self, x: Tensor) -> Tensor:
        return lay_out(x, self.choice(LAYOUTS), self.g)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.laid(torch.randn(shape, generator=self.g).to(dtype))

    def small_integers(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Whose products and sums are exact in every dtype: results have no rounding to argue about."""
        return self.laid(torch.randint(-3, 4, shape, generator=self.g).to(dtype))

    def coordinates(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some of them outside [0, 1]."""
        return self.laid((torch.rand(*shape, 2, generator=self.g) * 1.4 - 0.2).to(dtype))

    def labels(self, *shape: int) -> Tensor:
        dtype = self.choice((torch.bool, torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64))
        x = torch.rand(shape, generator=self.g)
        return self.laid((x if dtype.is_floating_point else x > 0.5).to(dtype))

    def masks(self, n: int, q: int, dtype: torch.dtype) -> Tensor | FactoredMasks:
        h, w, c = self.integer(1, 12), self.integer(1, 12), self.integer(1, 9)
        if self.choice((False, True)):
            return self.normal(n, q, h, w, dtype=dtype)
        return FactoredMasks(self.normal(n, q, c, dtype=dtype), self.normal(n, c, h, w, dtype=dtype))


def resize_mask_features(s: Source) -> Arguments:
    n, c = s.integer(0, 2), s.integer(0, 20)
    features = s.normal(n, c, s.integer(1, 24), s.integer(1, 24), dtype=s.choice(DTYPES))
    sizes = [(s.integer(1, 13), s.integer(1, 13)) for _ in range(s.integer(1, 4))]
    return {"mask_features": features, "sizes": sizes}


def predict_attention_mask(s: Source) -> Arguments:
    n, q, c, dtype = s.integer(0, 2), s.integer(0, 20), s.integer(0, 40), s.choice(DTYPES)
    size = (s.integer(1, 9), s.integer(1, 40)) if s.choice((False, True)) else (s.integer(1, 300),)
    return {
        "mask_embed": s.small_integers(n, q, c, dtype=dtype),
        "level_features": s.small_integers(n, c, *size, dtype=dtype),
    }


def pack_attention_mask(s: Source) -> Arguments:
    shape = (s.integer(0, 2), s.integer(0, 20), *[s.integer(1, 40) for _ in range(s.choice((1, 2)))])
    if s.choice((False, True)):
        return {"mask": s.laid(torch.rand(shape, generator=s.g) > s.choice((0.0, 0.5, 1.0)))}
    return {"mask": s.normal(*shape, dtype=s.choice(DTYPES))}


def masked_attention(s: Source) -> Arguments:
    n, h, q, d = s.integer(0, 2), s.integer(0, 3), s.integer(0, 20), s.integer(1, 70)
    sides = (s.integer(1, 12), s.integer(1, 70)) if s.choice((False, True)) else None
    keys, dtype = sides[0] * sides[1] if sides else s.integer(1, 150), s.choice(DTYPES)
    density = s.choice((0.0, 0.02, 0.5, 1.0))
    mask: Any = s.laid(torch.rand(n, q, keys, generator=s.g) < density)
    form = s.choice(("bool", "heads", "packed"))
    if form == "heads":
        mask = mask[:, None]
    elif form == "packed":
        mask = m2f_kernels.pack_attention_mask(mask)
    tensors = {
        name: s.normal(n, h, rows, d, dtype=dtype) for name, rows in (("query", q), ("key", keys), ("value", keys))
    }
    named = {**tensors, "mask": mask, "scale": s.choice((None, 0.3, -1, 0.0))}
    if sides:
        named["bias"] = tuple(s.normal(n, h, q, side, dtype=dtype) for side in sides)
        named["mask"] = s.choice((mask, mask, None))
    return named


def _deformable(s: Source, mode: str) -> Arguments:
    levels = s.integer(1, 4)
    sizes = [(s.integer(1, 8), s.integer(1, 8)) for _ in range(levels)]
    dtype = s.choice(DTYPES)
    case = ms_deform_attn_cases.make_case(
        mode,
        sizes,
        [s.integer(1, 4) for _ in range(levels)],
        n=s.integer(0, 2),
        q=s.integer(0, 9),
        heads=s.integer(1, 3),
        d=s.integer(1, 40),
        dtype=dtype,
        # 16-bit locations would have to be drawn again and again to stay off the pixel centres.
        samples_dtype=s.choice((torch.float32, torch.float64)),
        weights_dtype=s.choice(DTYPES),
        reference_dtype=s.choice((torch.float32, torch.float64)),
        margin=1e-3,
        seed=s.seed,
    )
    names = {"samples": "sampling_locations", "weights": "attention_weights"}
    if mode != "locations":
        names = {"samples": "sampling_offsets", "weights": "attention_logits"}
    tensors = {names.get(name, name): x for name, x in case.tensors.items()}
    # Expanding would let samples of another image lie on pixel centres: only value is.
    tensors = {
        name: s.laid(x) if name == "value" else lay_out(x, s.choice(LAYOUTS[:-1]), s.g) for name, x in tensors.items()
    }
    shapes = s.choice((sizes, torch.tensor(sizes), torch.tensor(sizes).int()))
    starts = [0]
    for h, w in sizes[:-1]:
        starts.append(starts[-1] + h * w)
    index = s.choice((None, starts, torch.tensor(starts)))
    return {**tensors, "spatial_shapes": shapes, "level_start_index": index, "points_per_level": case.points}


def ms_deform_attn(s: Source) -> Arguments:
    return _deformable(s, "locations")


def ms_deform_attn_from_offsets(s: Source) -> Arguments:
    return {**_deformable(s, s.choice(("offsets2", "offsets4"))), "offset_scale": s.choice((0.5, 1, 0.25))}


def point_sample(s: Source) -> Arguments:
    n = s.integer(0, 2)
    form, c = s.choice(("pixels", "labels", "factored")), s.integer(0, 20)
    h, w = s.integer(1, 14), s.integer(1, 14)
    if form == "pixels":
        source: Any = s.normal(n, c, h, w, dtype=s.choice(DTYPES))
    elif form == "labels":
        source = s.labels(n, c, h, w)
    else:
        dtype = s.choice(DTYPES)
        source = FactoredMasks(s.normal(n, s.integer(0, 9), c, dtype=dtype), s.normal(n, c, h, w, dtype=dtype))
    return {"input": source, "points": s.coordinates(n, s.integer(1, 70))}


def uncertain_points(s: Source) -> Arguments:
    n, q = s.integer(0, 2), s.integer(0, 6)
    masks = s.masks(n, q, s.choice(DTYPES))
    queries = None
    if q and s.choice((False, True)):
        queries = [torch.randint(0, q, (s.integer(0, 4),), generator=s.g) for _ in range(n)]
    ratios = (s.choice((1, 1.5, 3.0)), s.choice((0, 0.3, 0.75, 1.0)))
    return {
        "mask_logits": masks,
        "num_points": s.integer(1, 60),
        "oversample_ratio": ratios[0],
        "importance_sample_ratio": ratios[1],
        "queries": queries,
        "generator": torch.Generator().manual_seed(s.seed),
    }


def mask_matching_cost(s: Source) -> Arguments:
    n, q = s.integer(0, 2), s.integer(0, 20)
    targets: Any = [s.labels(s.integer(0, 6), s.integer(1, 14), s.integer(1, 14)) for _ in range(n)]
    if s.choice((False, True)):
        targets = s.labels(n, s.integer(0, 6), s.integer(1, 14), s.integer(1, 14))
    return {
        "mask_logits": s.masks(n, q, s.choice(DTYPES)),
        "target_masks": targets,
        "points": s.coordinates(n, s.integer(1, 70)),
    }


def point_mask_loss(s: Source) -> Arguments:
    n, q = s.integer(0, 2), s.integer(1, 6)
    targets = [s.labels(s.integer(1, 6), s.integer(1, 14), s.integer(1, 14)) for _ in range(n)]
    matches = []
    for target in targets:
        count = s.integer(0, 5)
        matches.append(tuple(torch.randint(0, high, (count,), generator=s.g) for high in (q, target.shape[0])))
    pairs = sum(len(queries) for queries, _ in matches)
    return {
        "mask_logits": s.masks(n, q, s.choice(DTYPES)),
        "target_masks": targets,
        "points": s.coordinates(pairs, s.integer(1, 70)),
        "matches": matches,
    }


#: By public name: the functions of this file, and `random_arguments` of `tests/ops/test_<op>.py`.
OPERATORS = {
    op: globals().get(op) or import_module(f"tests.ops.test_{op}").random_arguments for op in sorted(dispatch.OPERATORS)
}


@st.composite
def arguments(draw: Any, op: str) -> Arguments:
    """Good arguments of `op`, by name."""
    return OPERATORS[op](Source(draw))
