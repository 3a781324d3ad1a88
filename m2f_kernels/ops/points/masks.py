"""Selected masks of a batch, as operators on points take them: planes of logits, or factors multiplied in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2f_kernels._checks import check_indices, describe, readable
from m2f_kernels._dtypes import accumulation_dtype, without_autocast
from m2f_kernels.masks import FactoredMasks
from m2f_kernels.ops._autograd import transformed

#: Approximate bytes of a chunk of factored masks: their logits, and the values computed at their points.
CHUNK_BYTES = 32 * 2**20


@dataclass
class Chunk:
    """Logits of a few masks of one image."""

    image: int
    first: int  # the number of the first of them among all
    embed: Tensor  # [m, C]
    logits: Tensor  # [m, h, w]

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.embed.shape[0])

    def arange(self) -> Tensor:
        return torch.arange(self.embed.shape[0], device=self.embed.device)


def chunk_bounds(counts: Sequence[int], mask_bytes: int, bound: int = CHUNK_BYTES) -> Iterator[tuple[int, int, int]]:
    """(image, first, last) of chunks of bounded size that divide each image's masks evenly."""
    start = 0
    for image, count in enumerate(counts):
        if count == 0:
            continue
        parts = min(count, -(-count * mask_bytes // bound))
        for part in range(parts):
            yield image, start + count * part // parts, start + count * (part + 1) // parts
        start += count


def multiply(embed: Tensor, features: Tensor, out: Tensor | None = None) -> Tensor:
    """embed [m, C] times features [C, S] in the accumulation dtype, that of both, also under autocast."""
    with without_autocast(embed.device):
        return torch.mm(embed, features, out=None if transformed() else out)  # torch.vmap knows no out=


def in_accumulation_dtype(features: Tensor) -> Tensor:
    """One image's features [C, h, w] as [C, h*w] in the accumulation dtype: a view where they have it already."""
    return features.flatten(1).to(accumulation_dtype(features.dtype))


@dataclass
class MaskRows:
    """M masks out of a batch, as row numbers of the flattened batch, image after image."""

    masks: Tensor | FactoredMasks
    rows: Tensor  # int64 [M]
    counts: list[int]  # masks of each image; their sum is M

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def planes(self) -> Tensor:
        """Logits as [P, h, w]."""
        assert isinstance(self.masks, Tensor)
        return self.masks.flatten(0, -3)

    def chunks(self) -> Iterator[Chunk]:
        """Yields the logits of factored masks in chunks, in the accumulation dtype. Each chunk reuses the memory."""
        assert isinstance(self.masks, FactoredMasks)
        needed = mask_bytes(self.masks.mask_features, 0, accumulation_dtype(self.masks.mask_embed.dtype))
        yield from product_chunks(*self.masks, self.rows, self.counts, needed)


def mask_bytes(mask_features: Tensor, points: int, dtype: torch.dtype) -> int:
    """The bytes of one mask in a chunk: its plane, and (x, y), probability and label at each of its points."""
    return int((mask_features.shape[2] * mask_features.shape[3] + 4 * points) * dtype.itemsize)


def product_chunks(
    mask_embed: Tensor,
    mask_features: Tensor,
    rows: Tensor,
    counts: Sequence[int],
    mask_bytes: int,
    bound: int = CHUNK_BYTES,
) -> Iterator[Chunk]:
    """Yields the logits of the masks in `rows` in chunks; each mask takes `mask_bytes` while its chunk exists."""
    dtype = accumulation_dtype(mask_embed.dtype)
    h, w = mask_features.shape[2:]
    embed = mask_embed.flatten(0, 1)[rows].to(dtype)
    bounds = list(chunk_bounds(counts, mask_bytes, bound))
    largest = max([0, *(last - first for _, first, last in bounds)])
    buffer = embed.new_empty(largest, h * w)
    features, held = None, -1
    for image, first, last in bounds:
        if features is None or image != held:
            features, held = in_accumulation_dtype(mask_features[image]).to(dtype), image
        logits = multiply(embed[first:last], features, out=buffer[: last - first])
        yield Chunk(image, first, embed[first:last], logits.view(-1, h, w))


def select_rows(masks: Tensor | FactoredMasks, queries: Sequence[Tensor] | None, name: str = "queries") -> MaskRows:
    """The masks that `queries` selects for each image; all of them for None. [M, h, w] counts as one image.

    `name` is the name of that argument, for messages."""
    n, q = (1, masks.shape[0]) if isinstance(masks, Tensor) and masks.dim() == 3 else masks.shape[:2]
    device = masks.device if isinstance(masks, Tensor) else masks.mask_embed.device
    if queries is None:
        return MaskRows(masks, torch.arange(n * q, device=device), [q] * n)
    if not isinstance(queries, Sequence):
        raise TypeError(f"{name}: expected {n} int64 tensors [M], one per image; got {describe(queries)}")
    if len(queries) != n:
        raise ValueError(f"{name}: expected {n} tensors, one per image; got {len(queries)}")
    for i, chosen in enumerate(queries):
        check_indices(f"{name}[{i}]", chosen, device)
        if readable(chosen) and chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < q:
            raise ValueError(f"{name}[{i}]: expected queries from 0 to {q - 1}; got {chosen.tolist()}")
    shifted = [chosen + i * q for i, chosen in enumerate(queries)]
    rows = torch.cat(shifted) if shifted else torch.zeros(0, dtype=torch.int64, device="cpu")
    return MaskRows(masks, rows.to(device, non_blocking=True), [chosen.shape[0] for chosen in queries])
