"""The compact forms in which masks travel between operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Keys per word of a packed mask.
WORD = 32


def pack(attend: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of a bool tensor [N, Q, S] (True = attend).

    Returns:
        int32 [N, Q, ceil(S/32)], key `s` in bit `s % 32` of word `s // 32`, zero beyond S; and bool [N, Q],
        whether a row has any bit.
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
        # What leaves the last word of `bits` enters one more; where there is none, it was zero.
        moved = moved << shift | before
    return moved | around


class PackedMask(NamedTuple):
    """An attention mask with one bit for each query and key, shared by all heads.

    A tuple of its three fields, so it passes through `torch.compile`, checkpointing and anything else that
    takes pytrees. Made by :func:`predict_attention_mask` and :func:`pack_attention_mask`.

    Attributes:
        bits: int32 [N, Q, ceil(S/32)]; key `s` is bit `s % 32` of word `s // 32`, 1 means attend. Bits beyond S are 0.
        row_any: bool [N, Q], whether a query has any bit. One that has none attends everywhere (the row rule of
            Mask2Former); its bits stay 0.
        num_keys: S.
    """

    bits: Tensor
    row_any: Tensor
    num_keys: int

    def to_bool(self) -> Tensor:
        """bool [N, Q, S], True = attend, with the row rule applied: no row is all False."""
        return unpack(self.bits, self.row_any, self.num_keys)


class InstanceMap(NamedTuple):
    """Target masks of one image that do not overlap, as one map of ids: 4 bytes per pixel for any number of targets.

    Taken in place of [T, H, W] by :func:`mask_matching_cost`, :func:`point_mask_loss`, the matcher and the criterion,
    which sample the map where it lies: costs, losses and gradients have the bits that the dense masks give.

    Attributes:
        id_map: [H, W] of int64, int32, int16 or uint8.
        ids: [T], the id of each target, all different. Pixels of any other id belong to none.
    """

    id_map: Tensor
    ids: Tensor

    def masks(self) -> Tensor:
        """bool [T, H, W], the dense masks."""
        return self.id_map == self.ids.to(self.id_map)[:, None, None]


#: Pixels of an id map that are looked up at once.
_PIXELS_AT_ONCE = 1 << 18


def numbered_planes(id_map: Tensor, ids: Tensor) -> Tensor:
    """int32 [T, H, W], a view of one map of the targets' numbers: plane t is 1 where it holds t, else 0.

    That is how the operators on points take an :class:`InstanceMap`: as the only targets of this dtype, whose planes
    are one and the same memory.
    """
    height, width = id_map.shape
    numbers = torch.full((height * width,), -1, dtype=torch.int32, device=id_map.device)
    if len(ids):
        known, order = ids.long().sort()
        pixels = id_map.flatten()
        for part, out in zip(pixels.split(_PIXELS_AT_ONCE), numbers.split(_PIXELS_AT_ONCE), strict=True):
            wide = part.long()
            place = torch.bucketize(wide, known).clamp_(max=len(ids) - 1)
            out.copy_(torch.where(known[place] == wide, order[place], -1))
    return numbers.view(1, height, width).expand(len(ids), -1, -1)


class FactoredMasks(NamedTuple):
    """Mask logits as the two factors whose product they are; Q + h*w vectors of C numbers instead of Q * h*w logits.

    A tuple of its two fields, so it passes through `torch.compile`, checkpointing and anything else that takes
    pytrees. The operators on points take it wherever they take logits.

    Attributes:
        mask_embed: [N, Q, C], one embedding per query.
        mask_features: [N, C, h, w], the pixel decoder's features.
    """

    mask_embed: Tensor
    mask_features: Tensor

    @property
    def shape(self) -> torch.Size:
        """[N, Q, h, w], that of the logits."""
        return torch.Size((*self.mask_embed.shape[:2], *self.mask_features.shape[2:]))

    def logits(self) -> Tensor:
        """[N, Q, h, w], differentiable in both factors."""
        return torch.einsum("nqc,nchw->nqhw", self.mask_embed, self.mask_features)

    def select(self, queries: Tensor | slice) -> FactoredMasks:
        """The masks of some queries: a slice, or indices or a bool mask [Q], the same for every image."""
        return FactoredMasks(self.mask_embed[:, queries], self.mask_features)
