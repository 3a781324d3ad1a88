"""The run lengths that :class:`m2f_kernels.RunLengths` holds: reading COCO's forms, encoding and decoding masks.

COCO counts pixels column by column, in runs that alternate between background and foreground, background first. This
module stores the end of each run, so that a pixel is foreground if an odd number of runs end at it or before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._checks import describe

#: The fields of a `RunLengths`.
Fields = tuple[Tensor, int, int, int]


def from_coco(encoded: Sequence[Mapping[str, Any]], size: tuple[int, int] | None, name: str) -> Fields:
    """See :meth:`m2f_kernels.RunLengths.from_coco`."""
    if not isinstance(encoded, Sequence) or isinstance(encoded, (str, bytes)):
        raise TypeError(f"{name}: expected a list of {{'size': [H, W], 'counts': ...}}; got {describe(encoded)}")
    if size is None and not encoded:
        raise ValueError(f"{name}: expected at least one target, or size=(H, W) where there is none")
    expected = None if size is None else _size("size", size)
    ends = []
    for i, one in enumerate(encoded):
        name_here = f"{name}[{i}]"
        if not isinstance(one, Mapping) or "size" not in one or "counts" not in one:
            got = str(sorted(map(str, one))) if isinstance(one, Mapping) else describe(one)
            raise ValueError(f"{name_here}: expected a mapping with 'size' and 'counts'; got {got}")
        own = _size(f"{name_here}['size']", one["size"])
        expected = own if expected is None else expected
        if own != expected:
            raise ValueError(f"{name_here}['size']: expected {list(expected)}, one size per image; got {list(own)}")
        ends.append(_ends(_counts(f"{name_here}['counts']", one["counts"]), own, f"{name_here}['counts']"))
    assert expected is not None
    firsts = np.cumsum([0, *map(len, ends)])
    runs = np.concatenate([[expected[0]], firsts, *ends]).astype(np.int32)
    return torch.from_numpy(runs), len(ends), *expected


def _size(name: str, value: Any) -> tuple[int, int]:
    try:
        height, width = (int(x) for x in value)
        exact = all(int(x) == x for x in value)
    except (TypeError, ValueError):
        exact = False
    if not exact:
        raise ValueError(f"{name}: expected [H, W]; got {describe(value)}")
    if height < 1 or width < 1 or height * width >= 2**31:
        raise ValueError(f"{name}: expected at least one and fewer than 2^31 pixels; got {[height, width]}")
    return height, width


def _counts(name: str, counts: Any) -> np.ndarray[Any, Any]:
    """int64 [R], the lengths."""
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError:
            raise ValueError(f"{name}: expected compressed counts, characters from '0' to 'o'; got others") from None
    if isinstance(counts, bytes):
        return _decompress(name, counts)
    try:
        found = np.asarray(counts)
    except (TypeError, ValueError):
        found = np.empty(1, dtype=object)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise TypeError(f"{name}: expected a list of integers, or their compressed form; got {describe(counts)}")
    return found.astype(np.int64)


def _decompress(name: str, text: bytes) -> np.ndarray[Any, Any]:
    """Lengths of COCO's compressed form.

    A number is written in groups of five bits, the lowest first, each a character from '0' on; bit 5 is set if another
    one follows, and bit 4 of the last one is the sign. From the fourth number on, each is a difference to the number
    two before.
    """
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - ord("0")
    if not len(groups):
        return np.zeros(0, np.int64)
    if groups.min() < 0 or groups.max() > 63:
        raise ValueError(f"{name}: expected compressed counts, characters from '0' to 'o'; got others")
    lasts = np.flatnonzero(groups & 32 == 0)
    if not len(lasts) or lasts[-1] != len(groups) - 1:
        raise ValueError(f"{name}: expected compressed counts; got some that end within a number")
    firsts = np.concatenate([[0], lasts[:-1] + 1])
    lengths = lasts - firsts + 1
    if lengths.max() > 8:
        raise ValueError(f"{name}: expected compressed counts below 2^31; got a number of {lengths.max()} groups")
    shift = 5 * (np.arange(len(groups)) - np.repeat(firsts, lengths))
    numbers = np.add.reduceat((groups & 31) << shift, firsts)
    numbers = np.where(groups[lasts] & 16 != 0, numbers - (1 << 5 * lengths), numbers)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers


def _ends(counts: np.ndarray[Any, Any], size: tuple[int, int], name: str) -> np.ndarray[Any, Any]:
    """The ends of runs, without empty runs between others."""
    pixels = size[0] * size[1]
    if len(counts) and counts.min() < 0:
        raise ValueError(f"{name}: expected lengths of at least 0; got {counts.min()}")
    if counts.sum() != pixels:
        raise ValueError(f"{name}: expected lengths that sum to {pixels}, {size[0]} * {size[1]}; got {counts.sum()}")
    ends, times = np.unique(np.cumsum(counts), return_counts=True)
    ends = ends[(times % 2 == 1) & (ends < pixels)]  # two ends at one pixel cancel each other
    return np.concatenate([ends, [pixels] * (2 - len(ends) % 2)])


def from_masks(masks: Tensor | Iterable[Tensor], size: tuple[int, int] | None) -> Fields:
    """See :meth:`m2f_kernels.RunLengths.from_masks`."""
    expected = None if size is None else _size("size", size)
    if isinstance(masks, Tensor):
        if masks.dim() != 3 or masks.shape[1] * masks.shape[2] < 1:
            raise ValueError(f"masks: expected [T, H, W] with at least one pixel; got {describe(masks)}")
        expected = expected or (masks.shape[1], masks.shape[2])
    elif not isinstance(masks, Iterable) or isinstance(masks, (str, bytes)):
        raise TypeError(f"masks: expected a tensor [T, H, W] or an iterable of [H, W]; got {describe(masks)}")
    ends: list[Tensor] = []
    # Mask after mask: nothing of the size of all of them is made.
    for i, mask in enumerate(masks):
        if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"masks[{i}]: expected a bool or uint8 tensor [H, W]; got {describe(mask)}")
        if mask.dim() != 2 or not mask.numel() or (expected is not None and tuple(mask.shape) != expected):
            wanted = "[H, W]" if expected is None else f"{list(expected)}, one size for all"
            raise ValueError(f"masks[{i}]: expected {wanted}; got {describe(mask)}")
        expected = (mask.shape[0], mask.shape[1])
        ends.append(_ends_of_mask(mask))
    if expected is None:
        raise ValueError("masks: expected at least one mask, or size=(H, W) where there is none")
    device = masks.device if isinstance(masks, Tensor) else ends[0].device if ends else "cpu"
    firsts = np.cumsum([0, *map(len, ends)])
    head = torch.from_numpy(np.array([expected[0], *firsts], np.int32)).to(device)
    return torch.cat([head, *ends]), len(ends), *expected


def _ends_of_mask(mask: Tensor) -> Tensor:
    height, width = mask.shape
    columns = mask.any(0).nonzero()[:, 0]
    changes = columns.new_zeros(0, dtype=torch.int32)
    if len(columns):
        left, right = int(columns[0]), int(columns[-1]) + 1
        pixels = (mask[:, left:right] != 0).T.flatten()
        # Outside of these columns is background.
        around = F.pad(pixels, (1, 1))
        changes = (around[1:] != around[:-1]).nonzero()[:, 0].int() + left * height
        changes = changes[: len(changes) - int(right == width and bool(pixels[-1]))]
    last = changes.new_full((2 - len(changes) % 2,), height * width)
    return torch.cat([changes, last])


def decode(runs: Tensor, count: int, height: int, width: int) -> Tensor:
    """bool [T, H, W]."""
    masks = torch.zeros(count, height, width, dtype=torch.bool, device=runs.device)
    firsts, ends = runs[1 : count + 2].tolist(), runs[count + 2 :]
    column = int(runs[0])
    for i, (first, end) in enumerate(itertools.pairwise(firsts)):
        own = ends[first:end]
        pixels = torch.arange(int(own[-1]), dtype=torch.int32, device=runs.device)
        before = torch.searchsorted(own, pixels, right=True, out_int32=True)
        foreground = (before % 2 == 1).view(-1, column).T
        masks[i, :column, : foreground.shape[1]] = foreground
    return masks


def look_up(runs: Tensor, count: int, targets: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """True for pixels (row, column), none of them negative, that are foreground of `targets`; False outside the masks.

    Args:
        runs, count: of a `RunLengths`.
        targets, row, column: integers, of shapes that broadcast.
    """
    height, firsts, ends = runs[0].long(), runs[1 : count + 2].long(), runs[count + 2 :].long()
    # One ascending sequence for all targets, each of which has an even number of ends.
    stride = ends.amax() + 1 if ends.numel() else height
    owner = torch.searchsorted(firsts[1:], torch.arange(len(ends), device=runs.device), right=True)
    pixel = torch.minimum(column * height + row, stride - 1)
    before = torch.searchsorted(ends + owner * stride, (pixel + targets * stride).contiguous(), right=True)
    return (before % 2 == 1) & (row < height)


def problem(runs: Tensor, count: int, height: int, width: int) -> str | None:
    """The fault of a `RunLengths`' runs on the CPU, in words; None if kernels can rely on them."""
    numbers = runs.numpy()
    column, firsts, ends = int(numbers[0]), numbers[1 : count + 2], numbers[count + 2 :]
    if not 1 <= column <= height:
        return f"columns of 1 to {height} pixels"
    lengths = np.diff(firsts)
    if firsts[0] != 0 or firsts[-1] != len(ends) or (lengths < 2).any() or (lengths % 2).any():
        return "where each target begins, with an even number of ends, at least 2, for each"
    last = int(ends[-1]) if count else column
    whole = last % column == 0 and column <= last <= column * width
    if not whole or (ends[firsts[1:] - 1] != last).any() or (ends < 0).any():
        return f"ends from 0 to that of the last column, of at most {width}, which is each target's last"
    grows = np.diff(ends) > 0
    grows[firsts[1:-1] - 1] = True  # from one target to the next
    twice = firsts[1:] - 2
    grows[twice[ends[twice] == last]] = True
    return None if grows.all() else "ends that grow"
