"""Launch configurations of masked attention: heuristic defaults and what the tuner tries."""

from __future__ import annotations

import os
from itertools import product
from typing import TYPE_CHECKING

from m2f_kernels import _tuning
from m2f_kernels._tuning import Configuration

if TYPE_CHECKING:
    from m2f_kernels._triton import Architecture

FORWARD, LEAN_FORWARD = "masked_attention", "masked_attention_lean"
BACKWARD = "masked_attention_backward"

#: The forward kernel: "general", or "lean", its successor, for half precision, positive scales and queries as rows. No
#: GPU has run the latter, so it has to be asked for before the import.
KERNEL = os.environ.get("M2F_ATTENTION", "general")
if KERNEL not in ("general", "lean"):
    raise ValueError(f"M2F_ATTENTION: expected 'general' or 'lean'; got {KERNEL!r}")

#: Tiles of keys that one program may own: their flags are the bits of one scalar.
MAX_TILES = 16


def padded(size: int, smallest: int = 16) -> int:
    """The power of two that holds `size`; matrix instructions want 16 at least."""
    return max(1 << max(size - 1, 0).bit_length(), smallest)


def key(element_size: int, num_queries: int, d: int) -> str:
    """The key of a configuration: the arguments on which it depends, sizes padded."""
    return f"{_tuning.bits(element_size)}, Q {min(padded(num_queries), 256)}, D {padded(d)}"


def default_forward(element_size: int, num_queries: int, d: int) -> Configuration:
    """Heuristic.

    With 64 queries or more they are the rows of both products, and softmax stays inside a warp; with fewer the keys
    are the rows (KEYS_FIRST), so that the scores still fill the matrix instructions of sm_90, 64 rows each. float32 is
    multiplied without tensor cores and holds its operands in registers: smaller tiles.
    """
    queries, channels = min(padded(num_queries), 128), padded(d)
    if element_size == 4:
        queries = min(queries, {16: 64, 32: 64, 64: 16}.get(channels, 32))
        few = {16: 8, 32: 4 if queries == 64 else 8, 64: 4}
        warps = few.get(channels, 4 if queries == 32 else 8)
        if _tuning.TF32X3 and queries == 64 and channels == 32:
            tile = {"BLOCK_Q": 64, "BLOCK_K": 64, "KEYS_FIRST": 0}
            return {**tile, "num_warps": 4, "num_stages": 1, "waves": 2}
        shape = {"BLOCK_Q": queries, "BLOCK_K": 32, "KEYS_FIRST": int(channels >= 128)}
        return {**shape, "num_warps": warps, "num_stages": 1, "waves": 4}
    if channels >= 128 or channels == 32:
        queries = min(queries, 64)
    return {
        "BLOCK_Q": queries,
        "BLOCK_K": 64 if channels <= 128 else 32,
        "KEYS_FIRST": int(queries < 64),
        "num_warps": 8 if channels >= 128 or (channels == 64 and queries == 128) else 4,
        "num_stages": 3 if channels == 32 and queries == 64 else 2,
        "waves": 2,
    }


def default_backward(element_size: int, num_queries: int, d: int) -> Configuration:
    """Heuristic. Keys are the rows of every product but dQ's.

    With 32 channels two blocks of 64 queries are faster than one of 128, which spills with most versions of Triton.
    """
    queries, channels = min(padded(num_queries), 128), padded(d)
    if element_size == 4:
        tile = {"BLOCK_Q": min(queries, 16 if channels == 16 else 32), "BLOCK_K": 32}
        return {**tile, "num_warps": 8, "num_stages": 1, "waves": 4}
    if channels >= 32 or num_queries > 128:
        queries = min(queries, 64)
    return {
        "BLOCK_Q": queries,
        "BLOCK_K": 128 if channels == 32 and num_queries > 64 else 64 if channels <= 32 else 32,
        "num_warps": 4 if channels == 16 and queries <= 64 else 8,
        "num_stages": 1,
        "waves": 2,
    }


def _fitted(
    device: Architecture, version: tuple[int, int], config: Configuration, element_size: int, channels: int
) -> Configuration:
    """A heuristic of sm_80, sm_90 and sm_100 in pieces that other parts hold; no such part has timed them.

    - sm_75 and gfx11 multiply with operands in registers (Triton has no matrix instructions there, or wide ones only).
    - sm_86, sm_89 and sm_120 have less shared memory for stages.
    - gfx9 spills wide rows in half precision with more warps.
    - Before 3.8 Triton fails on the expanded mask words in the tensor memory of sm_100, with an internal error.
      Products of fewer than 64 rows do not use that memory.
    - Before 3.9 it spills wide rows of float32 in fewer warps, and on sm_100 fails on them.
    """
    wide = element_size == 4 and channels >= 128 and "KEYS_FIRST" in config
    if wide and version < (3, 9) and device.capability >= 80:
        queries = 32 if device.capability in (80, 90) else 16
        warps = 8 if device.capability in (86, 89) else 16
        config = {**config, "BLOCK_Q": min(config["BLOCK_Q"], queries), "num_warps": warps}
    if device.capability == 75 or device.gfx.startswith("gfx11"):
        queries = min(config["BLOCK_Q"], 32 if channels <= 32 else 16)
        many = channels >= 128 and (element_size == 4 or "KEYS_FIRST" not in config)
        warps = 16 if device.gfx and many else 8
        shape = {"BLOCK_Q": queries, "BLOCK_K": 32, "num_warps": warps, "num_stages": 1}
        if "KEYS_FIRST" in config:
            shape["KEYS_FIRST"] = int(channels >= 128)
        return {**config, **shape}
    if device.capability in (86, 89, 120):
        most = 64 if version < (3, 9) else 128  # Triton before 3.9 spills more
        return {**config, "BLOCK_Q": min(config["BLOCK_Q"], most), "num_stages": min(config["num_stages"], 2)}
    if device.gfx.startswith("gfx9") and channels >= 128 and element_size == 2 and "KEYS_FIRST" in config:
        return {**config, "num_warps": 4}
    if device.capability // 10 == 10 and version < (3, 8):
        tile = {name: min(config[name], 32) for name in ("BLOCK_Q", "BLOCK_K")}
        if element_size == 2 and channels >= 64 and "KEYS_FIRST" in config:  # channels would be rows
            tile["KEYS_FIRST"] = 0
        return {**config, **tile}
    return config


def forward(
    device: Architecture, version: tuple[int, int], element_size: int, num_queries: int, d: int
) -> Configuration:
    """The configuration to launch with; `version` is Triton's."""
    default = _fitted(device, version, default_forward(element_size, num_queries, d), element_size, padded(d))
    if KERNEL == "lean" and device.capability == 90 and (element_size, padded(d)) == (2, 32) and num_queries > 64:
        # All queries of a decoder in one program: keys, values and the list of tiles are read once.
        default = {**default, "BLOCK_Q": 128, "num_warps": 8}
    return _tuning.configuration(device.capability, forward_name(), key(element_size, num_queries, d), default)


def forward_name() -> str:
    """The name of the forward kernel in tables."""
    return LEAN_FORWARD if KERNEL == "lean" else FORWARD


def backward(
    device: Architecture, version: tuple[int, int], element_size: int, num_queries: int, d: int
) -> Configuration:
    """The configuration to launch with; `version` is Triton's."""
    default = default_backward(element_size, num_queries, d)
    default = _fitted(device, version, default, element_size, padded(d))
    return _tuning.configuration(device.capability, BACKWARD, key(element_size, num_queries, d), default)


def _in_float32(channels: int) -> Configuration:
    """Forward without tensor cores: queries, and the output of wide rows, are held in registers."""
    queries = 64 if channels <= 32 else 32 if channels < 128 else 16
    return {"BLOCK_Q": queries, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1}


def open_forward(device: Architecture, version: tuple[int, int], element_size: int, d: int) -> Configuration:
    """The configuration of the forward kernel of queries without a mask. Heuristic: no GPU has tuned it."""
    channels = padded(d)
    if element_size == 4:
        config = _in_float32(channels)
        if channels == 32 and device.capability >= 100:  # more warps spill there
            config = {**config, "num_warps": 4}
    else:
        config = {"BLOCK_Q": 128 if channels <= 64 else 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
        if channels >= 128:
            config = {**config, "BLOCK_K": 32, "num_warps": 4}
    return _fitted(device, version, config, element_size, channels)


def open_backward(device: Architecture, version: tuple[int, int], element_size: int, d: int) -> Configuration:
    """The same of the two backward kernels."""
    channels = padded(d)
    if element_size == 4:
        queries = 32 if channels < 128 else 16
        warps = 8 if channels < 128 or device.capability // 10 == 8 else 16
        config = {"BLOCK_Q": queries, "BLOCK_K": 32, "num_warps": warps, "num_stages": 1}
    else:
        # On sm_100 fewer queries of wide rows spill.
        large = channels <= 32 or (channels >= 128 and device.capability // 10 == 10)
        config = {"BLOCK_Q": 64 if large else 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1}
    config = _fitted(device, version, config, element_size, channels)
    if device.gfx.startswith("gfx11") and element_size == 4:  # larger pieces spill
        config = {**config, "BLOCK_Q": 16, "num_warps": 16}
    return config


def _columns(width: int, most: int) -> int:
    """Keys of a tile, all in one row of `width`: a power of two from 32 to `most`. A tile costs like 8 more keys."""
    sizes = [size for size in (128, 64, 32) if size <= most]
    return min(sizes, key=lambda size: -(-width // size) * (size + 8))


def biased_forward(
    device: Architecture, version: tuple[int, int], element_size: int, num_queries: int, d: int, width: int
) -> Configuration:
    """The configuration of the forward kernel with a bias of rows of `width` keys. Heuristic: no GPU has tuned it."""
    channels = padded(d)
    wide = channels >= 128
    if element_size == 4:
        warps = 16 if wide and not device.gfx.startswith("gfx9") else 8
        if device.capability == 120 and version < (3, 9):  # more warps spill with it
            warps = 8
        config = {**_in_float32(channels), "num_warps": warps}
        if device.capability // 10 == 8:  # larger tiles spill there
            config = {**config, "BLOCK_Q": 32 if channels == 32 else 16}
        if version < (3, 9) and device.capability >= 80 and channels in (32, 64):  # and with it here, too
            config = {**config, "BLOCK_Q": 16, "num_warps": 8 if device.capability == 80 else 4}
    else:
        queries = 32 if device.capability == 120 and not wide else 64  # larger tiles spill there
        warps = 8 if wide or (channels == 64 and device.capability // 10 == 10 and version < (3, 9)) else 4
        config = {"BLOCK_Q": queries, "BLOCK_K": 32 if wide else 64, "num_warps": warps, "num_stages": 2}
    # gfx11 spills wide rows in half precision, not in float32.
    config["IN_FLOAT"] = int(wide and element_size == 2 and device.gfx.startswith("gfx11"))
    return _biased(device, version, config, element_size, num_queries, channels, width)


def biased_backward(
    device: Architecture, version: tuple[int, int], element_size: int, num_queries: int, d: int, width: int
) -> Configuration:
    """The same of the two backward kernels. Larger tiles spill in the one of queries, on AMD in both."""
    channels = padded(d)
    if element_size == 4:
        # Each spills with another number of warps.
        few = device.capability in (86, 89, 120) or (device.capability >= 90 and channels == 32)
        warps = 4 if few else 8
        config = {"BLOCK_Q": 16, "BLOCK_K": 32, "num_warps": warps, "num_stages": 1}
    else:
        queries = 64 if channels <= 32 and device.capability // 10 != 10 else 32
        config = {"BLOCK_Q": 16 if device.gfx else queries, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1}
    config = _biased(device, version, config, element_size, num_queries, channels, width)
    if device.gfx.startswith("gfx11"):
        config = {**config, "BLOCK_Q": 16, "num_warps": 16}
    return config


def _biased(
    device: Architecture,
    version: tuple[int, int],
    config: Configuration,
    element_size: int,
    num_queries: int,
    channels: int,
    width: int,
) -> Configuration:
    config["BLOCK_Q"] = min(config["BLOCK_Q"], padded(num_queries))
    config = _fitted(device, version, config, element_size, channels)
    if device.capability == 75:
        many = channels >= 128 and (element_size == 4 or version < (3, 9))
        config = {**config, "BLOCK_Q": 16, "num_warps": 16 if many else 8}
    return {**config, "BLOCK_K": _columns(width, config["BLOCK_K"])}


def candidates(default: Configuration) -> list[Configuration]:
    """The configurations that the tuner measures for a kernel, `default` (its heuristic's) first."""
    found = [default]
    queries = sorted({default["BLOCK_Q"], max(default["BLOCK_Q"] // 2, 16)})
    for q, k, warps, stages, waves in product(queries, (32, 64, 128), (2, 4, 8), (1, 2, 3), (2, 4)):
        if warps == 2 and q * k > 32 * 64:  # which spills
            continue
        one = {**default, "BLOCK_Q": q, "BLOCK_K": k, "num_warps": warps, "num_stages": stages, "waves": waves}
        if one not in found:
            found.append(one)
    return found


def tiles_per_program(tiles: int, programs: int, multiprocessors: int, waves: int) -> int:
    """Tiles of keys that one program takes.

    Args:
        tiles: all tiles of keys.
        programs: how many programs there are for each of them (images x heads x blocks of queries).
        multiprocessors: of the device.
        waves: programs wanted per multiprocessor.

    Returns:
        a power of two, at most `MAX_TILES`: the nearest to what gives `waves` programs to each multiprocessor.
    """
    wanted = tiles * programs / max(multiprocessors * waves, 1)
    power = 1
    while power < MAX_TILES and power < tiles and wanted > power * 2**0.5:
        power *= 2
    return power
