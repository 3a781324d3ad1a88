"""The compact forms of masks that operators take and return."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels import run_lengths

#: Keys per word of a packed mask.
WORD = 32


def empty_flags(like: Tensor, num_masks: int, n: int, q: int) -> Tensor:
    """Uninitialised bool [num_masks, n, q], each mask's flags contiguous and at a multiple of 16 bytes.

    For other addresses a Triton kernel is compiled once more.
    """
    return like.new_empty_strided((num_masks, n, q), (-(-n * q // 16) * 16, q, 1), dtype=torch.bool)


def pack(attend: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of a bool tensor [N, Q, S] (True = attend).

    Returns:
        int32 [N, Q, ceil(S/32)], key `s` in bit `s % 32` of word `s // 32`, zero beyond S; and bool [N, Q],
        True for a row that has any bit.
    """
    n, q, s = attend.shape
    words = (s + WORD - 1) // WORD
    padded = F.pad(attend, (0, words * WORD - s)).view(n, q, words, WORD)
    bits = (padded.long() << torch.arange(WORD, device=attend.device)).sum(-1)
    return torch.where(bits >= 2**31, bits - 2**32, bits).int(), attend.any(-1)


def unpack(bits: Tensor, row_any: Tensor, num_keys: int) -> Tensor:
    """The inverse, with the row rule applied: bool [N, Q, S], True = attend."""
    attend = (bits.unsqueeze(-1) >> torch.arange(WORD, device=bits.device, dtype=bits.dtype)) & 1
    return attend.bool().flatten(-2)[..., :num_keys] | ~row_any.unsqueeze(-1)


def widen(bits: Tensor, first_key: int, num_keys: int, all_keys: int) -> Tensor:
    """Bits for `all_keys` keys of bits for keys [first_key, first_key + num_keys); all others are attended to.

    Args:
        bits: int32 [N, R, ceil(num_keys/32)], zero beyond num_keys.
        first_key, num_keys, all_keys: first_key + num_keys <= all_keys.

    Returns:
        int32 [N, R, ceil(all_keys/32)].
    """
    outside = torch.ones(1, 1, all_keys, dtype=torch.bool, device=bits.device)
    outside[..., first_key : first_key + num_keys] = False
    around = pack(outside)[0]
    skipped, shift = divmod(first_key, WORD)
    words = around.shape[2]
    moved = F.pad(bits, (skipped, words - skipped - bits.shape[2]))
    if shift:
        before = F.pad(moved, (1, -1)) >> (WORD - shift) & ((1 << shift) - 1)
        # Bits shifted out of the last word of `bits` go into one more word; if there is none, they are zero.
        moved = moved << shift | before
    return moved | around


class PackedMask(NamedTuple):
    """An attention mask with one bit for each query and key, shared by all heads.

    A tuple of its three fields, so it passes through `torch.compile`, checkpointing and anything else that
    takes pytrees. Made by :func:`predict_attention_mask` and :func:`pack_attention_mask`.

    Attributes:
        bits: int32 [N, Q, ceil(S/32)]; key `s` is bit `s % 32` of word `s // 32`, 1 means attend. Bits beyond S are 0.
        row_any: bool [N, Q], True for a query that has any bit. A query without one attends everywhere (Mask2Former's
            row rule); its bits stay 0.
        num_keys: S, the number of keys.
    """

    bits: Tensor
    row_any: Tensor
    num_keys: int

    def to_bool(self) -> Tensor:
        """bool [N, Q, S], True = attend, with the row rule applied: no row is all False."""
        return unpack(self.bits, self.row_any, self.num_keys)


_Tuple = TypeVar("_Tuple", bound=type[tuple[Any, ...]])


def _also_from_an_iterator(cls: _Tuple) -> _Tuple:
    """`cls`, which then takes its fields from one iterator, too: so trainers rebuild tuples whose tensors they move."""
    made = cls.__new__

    def new(cls: type, *fields: Any, **named: Any) -> Any:
        if len(fields) == 1 and not named and isinstance(fields[0], Iterator):
            fields = tuple(fields[0])
        return made(cls, *fields, **named)

    cls.__new__ = new  # type: ignore[method-assign]
    return cls


@_also_from_an_iterator
class InstanceMap(NamedTuple):
    """Target masks of one image that do not overlap, as one map of ids, whatever their number.

    :func:`mask_matching_cost`, :func:`point_mask_loss`, the matcher and the criterion take it in place of dense masks
    [T, H, W] and sample the map itself: costs, losses and gradients are bitwise those of the dense masks.

    Attributes:
        id_map: [H, W] of int64, int32, int16 or uint8.
        ids: [T], the id of each target, all different. Pixels of any other id belong to none.
    """

    id_map: Tensor
    ids: Tensor

    def masks(self) -> Tensor:
        """bool [T, H, W], the dense masks."""
        return self.id_map == self.ids.long()[:, None, None]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> InstanceMap:
        """The same on a device."""
        return InstanceMap(*(x.to(device, non_blocking=non_blocking) for x in self))


@_also_from_an_iterator
class RunLengths(NamedTuple):
    """Target masks of one image as COCO's run lengths: they may overlap, and take 4 bytes per run.

    Taken wherever :class:`InstanceMap` is, and sampled without decoding: a pixel is looked up by bisection. Made by
    :meth:`from_coco` and :meth:`from_masks`.

    Attributes:
        runs: int32, three parts in a row. The height h of a column; then T + 1 offsets into the last part, one where
            the ends of each target begin and one for the end of all; then for each target the ends of its runs, in
            pixels counted column by column, background first. Ends increase up to h * w, which is repeated if their
            number would be odd.
        num_targets, height, width: T, H, W. What H and W have beyond h and w, below and to the right, is background.
    """

    runs: Tensor
    num_targets: int
    height: int
    width: int

    @classmethod
    def from_coco(
        cls, encoded: Sequence[Mapping[str, Any]], size: tuple[int, int] | None = None, name: str = "encoded"
    ) -> RunLengths:
        """Run lengths from the form of `pycocotools` and COCO's files, on the CPU.

        Args:
            encoded: for each target `{"size": [H, W], "counts": c}`, all of one size; c is a list of lengths,
                background first, or their compressed form, str or bytes.
            size: (H, W), needed where there is no target.
            name: of the argument, in messages.

        Raises:
            ValueError, TypeError: bad input; the message names the target, what was expected and what came.
        """
        return cls(*run_lengths.from_coco(encoded, size, name))

    @classmethod
    def from_masks(cls, masks: Tensor | Iterable[Tensor], size: tuple[int, int] | None = None) -> RunLengths:
        """Run lengths of masks, on their device.

        Args:
            masks: [T, H, W] or any iterable of [H, W], of which one at a time is held; bool or uint8 (any value but 0
                is foreground).
            size: (H, W), needed where there is no target and `masks` is no tensor.

        Raises:
            ValueError, TypeError: what was expected and what came.
        """
        return cls(*run_lengths.from_masks(masks, size))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the dense masks, (T, H, W)."""
        return self.num_targets, self.height, self.width

    def padded(self, height: int, width: int) -> RunLengths:
        """The same masks padded with background below and to the right, up to a size. They share the runs."""
        if height < self.height or width < self.width or height * width >= 2**31:
            raise ValueError(
                f"height, width: expected at least {self.height}, {self.width}, and fewer than 2^31 pixels; "
                f"got {height}, {width}"
            )
        return self._replace(height=height, width=width)

    def masks(self) -> Tensor:
        """bool [T, H, W], the dense masks."""
        return run_lengths.decode(self.runs, *self.shape)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RunLengths:
        """The same on a device."""
        return self._replace(runs=self.runs.to(device, non_blocking=non_blocking))


class Targets(NamedTuple):
    """Checked targets of one image, as the operators on points take them; see :func:`listed`.

    Attributes:
        pixels: [T, H, W]: dense masks; or one map of ids, the same for all targets (stride 0); or, for run lengths, a
            tensor of which only the shape is used.
        marks: for a map the ids, int64 [T]; for run lengths :attr:`RunLengths.runs`, int32; for dense masks None.
    """

    pixels: Tensor
    marks: Tensor | None = None

    def at(self, rows: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Pixels (row, column) of some targets, int64 that broadcast: bool, or floating point where the masks are."""
        pixels, marks = self
        if marks is None:
            found = pixels[rows, row, column]
            return found if found.is_floating_point() else found != 0
        if marks.dtype == torch.int32:
            return run_lengths.look_up(marks, len(pixels), rows, row, column)
        # Not pixels[0], which is not there without targets.
        return pixels[rows * 0, row, column] == marks[rows]

    def dense(self, rows: Tensor) -> Tensor:
        """The dense masks [R, H, W] of the targets `rows`, int64 [R]."""
        pixels, marks = self
        if marks is None:
            return pixels[rows]
        if marks.dtype == torch.int64:
            return pixels[:1].expand(len(rows), -1, -1) == marks[rows, None, None]
        row, column = (torch.arange(side, device=marks.device) for side in pixels.shape[1:])
        return run_lengths.look_up(marks, pixels.shape[0], rows[:, None, None], row[:, None], column)


def listed(targets: Iterable[Targets]) -> list[Tensor]:
    """The list of tensors that operators take: for each image its pixels [T, H, W], then its marks, of rank 1."""
    return [x for target in targets for x in target if x is not None]


def grouped(tensors: Sequence[Tensor]) -> list[Targets]:
    """The inverse of :func:`listed`."""
    found: list[Targets] = []
    for x in tensors:
        if x.dim() == 1 and found:
            found[-1] = Targets(found[-1].pixels, x)
        else:
            found.append(Targets(x))
    return found


class FactoredMasks(NamedTuple):
    """Low-rank mask logits: embeddings [N, Q, C] and features [N, C, h, w], multiplied on demand.

    They take Q + h*w vectors of C numbers instead of Q * h*w logits. A tuple of its two fields, so it passes through
    `torch.compile`, checkpointing and anything else that takes pytrees. The operators on points take it wherever they
    take logits.

    Attributes:
        mask_embed: [N, Q, C], one embedding per query.
        mask_features: [N, C, h, w], the pixel decoder's features.
    """

    mask_embed: Tensor
    mask_features: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits, [N, Q, h, w]."""
        return torch.Size((*self.mask_embed.shape[:2], *self.mask_features.shape[2:]))

    def logits(self) -> Tensor:
        """The logits [N, Q, h, w], differentiable in both factors."""
        return torch.einsum("nqc,nchw->nqhw", self.mask_embed, self.mask_features)

    def select(self, queries: Tensor | slice) -> FactoredMasks:
        """The masks of some queries: a slice, or indices or a bool mask [Q], the same for every image."""
        return FactoredMasks(self.mask_embed[:, queries], self.mask_features)
