"""Each error of the mask and attention operators names the argument, what was expected and what came."""

import re

import pytest
import torch

import m2f_kernels
from m2f_kernels import PackedMask
from tests.ops.masked_attention_cases import make_case


def changed(**changes):
    """A good call of masked_attention with some arguments replaced."""
    case = make_case(n=2, h=2, q=3, s=40, d=8)
    arguments = {**case.tensors, "mask": case.mask} | changes
    scale = arguments.pop("scale", None)
    return m2f_kernels.masked_attention(**arguments, scale=scale)


def packed(n=2, q=3, words=2, keys=40, **fields):
    mask = PackedMask(torch.zeros(n, q, words, dtype=torch.int32), torch.ones(n, q, dtype=torch.bool), keys)
    return mask._replace(**fields)


KEY = torch.zeros(2, 2, 40, 8)
BAD_ATTENTION = {
    "query is no tensor": ({"query": [1.0]}, TypeError, "query: expected a tensor [N, H, Q, D]; got [1.0] (list)"),
    "query of integers": (
        {"query": torch.zeros(2, 2, 3, 8, dtype=torch.int64)},
        TypeError,
        "query: expected float64, float32, bfloat16 or float16; got a int64 tensor of shape [2, 2, 3, 8] on cpu",
    ),
    "query of rank 3": ({"query": torch.zeros(2, 3, 16)}, ValueError, "query: expected [N, H, Q, D]; got"),
    "key of rank 3": ({"key": torch.zeros(2, 40, 16)}, ValueError, "key: expected [N, H, S, D]; got"),
    "value of another length": (
        {"value": torch.zeros(2, 2, 39, 8)},
        ValueError,
        "value: expected [N, H, S, D] = [2, 2, 40, 8]; got a float32 tensor of shape [2, 2, 39, 8]",
    ),
    "key of other heads": ({"key": torch.zeros(2, 4, 40, 8)}, ValueError, "key: expected [N, H, S, D] = [2, 2, 40, 8]"),
    "no keys": (
        {"key": KEY[:, :, :0], "value": KEY[:, :, :0], "mask": packed(words=0, keys=0)},
        ValueError,
        "key: expected at least one key and one channel per head; got",
    ),
    "key in another dtype": (
        {"key": KEY.bfloat16()},
        TypeError,
        "key: expected query's dtype float32; got a bfloat16 tensor",
    ),
    "value in another dtype": (
        {"value": KEY.double()},
        TypeError,
        "value: expected query's dtype float32; got a float64",
    ),
    "key elsewhere": ({"key": KEY.to("meta")}, ValueError, "key: expected it on cpu, where query is; got"),
    "scale is no number": ({"scale": "1"}, TypeError, "scale: expected a number; got '1' (str)"),
    "mask is missing": ({"mask": None}, TypeError, "mask: expected a PackedMask or a bool tensor [N, Q, S]"),
    "mask of logits": (
        {"mask": torch.zeros(2, 3, 40)},
        TypeError,
        "mask: expected a PackedMask or a bool tensor [N, Q, S], True = attend; got a float32 tensor of shape "
        "[2, 3, 40] on cpu; pack_attention_mask takes logits",
    ),
    "bool mask of the wrong S": (
        {"mask": torch.zeros(2, 3, 39, dtype=torch.bool)},
        ValueError,
        "mask: expected [N, Q, S] = [2, 3, 40]; got a bool tensor of shape [2, 3, 39]",
    ),
    "bool mask repeated over heads": (
        {"mask": torch.zeros(2, 2, 3, 40, dtype=torch.bool)},
        ValueError,
        "mask: expected [N, 1, Q, S] = [2, 1, 3, 40]; got",
    ),
    "packed mask of the wrong S": (
        {"mask": packed(keys=39)},
        ValueError,
        "mask: expected S = 40, key's; got a PackedMask of num_keys = 39",
    ),
    "packed mask of other queries": (
        {"mask": packed(q=4)},
        ValueError,
        "mask.bits: expected [N, Q, ceil(S/32)] = [2, 3, 2]; got",
    ),
    "packed mask with other flags": (
        {"mask": packed(row_any=torch.ones(2, 4, dtype=torch.bool))},
        ValueError,
        "mask.row_any: expected [N, Q] = [2, 3]; got",
    ),
    "packed mask of long integers": (
        {"mask": packed(bits=torch.zeros(2, 3, 2, dtype=torch.int64))},
        TypeError,
        "mask: expected bits in int32 and row_any in bool; got a int64 tensor",
    ),
    "packed mask elsewhere": (
        {"mask": packed(bits=torch.zeros(2, 3, 2, dtype=torch.int32, device="meta"))},
        ValueError,
        "mask.bits: expected it on cpu, where query is; got",
    ),
}


@pytest.mark.parametrize("name", BAD_ATTENTION)
def test_masked_attention(name):
    changes, error, message = BAD_ATTENTION[name]
    with pytest.raises(error, match=re.escape(message)):
        changed(**changes)


FEATURES = torch.zeros(2, 8, 16, 16)
EMBED = torch.zeros(2, 3, 8)
BAD_MASKS = {
    "features are no tensor": (
        lambda: m2f_kernels.resize_mask_features(None, [(4, 4)]),
        TypeError,
        "mask_features: expected a tensor [N, C, H, W]; got None",
    ),
    "features of rank 3": (
        lambda: m2f_kernels.resize_mask_features(EMBED, [(4, 4)]),
        ValueError,
        "mask_features: expected [N, C, H, W]; got",
    ),
    "features without pixels": (
        lambda: m2f_kernels.resize_mask_features(FEATURES[:, :, :0], [(4, 4)]),
        ValueError,
        "mask_features: expected at least one pixel; got",
    ),
    "no sizes": (
        lambda: m2f_kernels.resize_mask_features(FEATURES, []),
        ValueError,
        "sizes: expected at least one pair (h, w); got none",
    ),
    "one pair instead of a list": (
        lambda: m2f_kernels.resize_mask_features(FEATURES, (4, 4)),
        TypeError,
        "sizes: expected pairs (h, w) of integers of at least 1; got (4, 4) (tuple)",
    ),
    "sizes of floats": (
        lambda: m2f_kernels.resize_mask_features(FEATURES, [(4.0, 4)]),
        TypeError,
        "sizes: expected pairs (h, w) of integers of at least 1; got [(4.0, 4)]",
    ),
    "a size of 0": (
        lambda: m2f_kernels.resize_mask_features(FEATURES, [(4, 0)]),
        ValueError,
        "sizes: expected pairs (h, w) of integers of at least 1; got [(4, 0)]",
    ),
    "embeddings of rank 2": (
        lambda: m2f_kernels.predict_attention_mask(EMBED[0], FEATURES),
        ValueError,
        "mask_embed: expected [N, Q, C]; got",
    ),
    "features of other channels": (
        lambda: m2f_kernels.predict_attention_mask(EMBED, FEATURES[:, :7]),
        ValueError,
        "level_features: expected [N, C, h, w] = [2, 8, 16, 16]; got a float32 tensor of shape [2, 7, 16, 16]",
    ),
    "flat features of another batch": (
        lambda: m2f_kernels.predict_attention_mask(EMBED, FEATURES.flatten(2)[:1]),
        ValueError,
        "level_features: expected [N, C, S] = [2, 8, 256]; got",
    ),
    "features in another dtype": (
        lambda: m2f_kernels.predict_attention_mask(EMBED, FEATURES.half()),
        TypeError,
        "level_features: expected mask_embed's dtype float32; got a float16 tensor",
    ),
    "features elsewhere": (
        lambda: m2f_kernels.predict_attention_mask(EMBED, FEATURES.to("meta")),
        ValueError,
        "level_features: expected it on cpu, where mask_embed is; got",
    ),
    "no pixels": (
        lambda: m2f_kernels.predict_attention_mask(EMBED, FEATURES[..., :0]),
        ValueError,
        "level_features: expected at least one key (pixel); got",
    ),
    "a negative number of masks": (
        lambda: m2f_kernels.attention_mask_levels(FEATURES, [(4, 4)], -1, 3),
        ValueError,
        "num_masks: expected at least 0; got -1",
    ),
    "queries that are no number": (
        lambda: m2f_kernels.attention_mask_levels(FEATURES, [(4, 4)], 9, 3.0),
        TypeError,
        "num_queries: expected an integer; got 3.0",
    ),
    "no features to resize": (
        lambda: m2f_kernels.attention_mask_levels(None, [(4, 4)], 9, 3),
        TypeError,
        "mask_features: expected a tensor [N, C, H, W]; got None",
    ),
    "flags of integers": (
        lambda: m2f_kernels.predict_attention_mask(EMBED, FEATURES, torch.zeros(2, 3)),
        TypeError,
        "row_any: expected bool [N, Q] or None; got a float32 tensor",
    ),
    "flags of other queries": (
        lambda: m2f_kernels.predict_attention_mask(EMBED, FEATURES, torch.zeros(2, 4, dtype=torch.bool)),
        ValueError,
        "row_any: expected [N, Q] = [2, 3]; got",
    ),
    "flags with gaps": (
        lambda: m2f_kernels.predict_attention_mask(EMBED, FEATURES, torch.zeros(2, 3, 2, dtype=torch.bool)[..., 0]),
        ValueError,
        "row_any: expected a contiguous tensor; got strides (6, 2)",
    ),
    "a mask of integers": (
        lambda: m2f_kernels.pack_attention_mask(torch.zeros(2, 3, 4, dtype=torch.uint8)),
        TypeError,
        "mask: expected bool (True = attend) or floating point logits; got a uint8 tensor",
    ),
    "a mask of rank 2": (
        lambda: m2f_kernels.pack_attention_mask(torch.zeros(3, 4, dtype=torch.bool)),
        ValueError,
        "mask: expected [N, Q, S] or [N, Q, h, w]; got",
    ),
    "logits of rank 2": (
        lambda: m2f_kernels.pack_attention_mask(torch.zeros(3, 4)),
        ValueError,
        "mask: expected [N, Q",
    ),
    "a mask without keys": (
        lambda: m2f_kernels.pack_attention_mask(torch.zeros(2, 3, 0, dtype=torch.bool)),
        ValueError,
        "mask: expected at least one key (pixel); got",
    ),
    "a mask that is none": (lambda: m2f_kernels.pack_attention_mask([True]), TypeError, "mask: expected a tensor"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_masks(name):
    call, error, message = BAD_MASKS[name]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_the_operators_guard_memory():
    """torch.ops.m2f called directly, without Python's checks, raises instead of reading elsewhere."""
    case = make_case(n=2, h=2, q=3, s=40, d=8)
    query, key, value = case.tensors.values()
    mask = case.mask
    for arguments in (
        (query, key[:, :, :30], value, mask.bits, mask.row_any),
        (query, key, value[:1], mask.bits, mask.row_any),
        (query, key, value, mask.bits[:, :, :1], mask.row_any),
        (query, key, value, mask.bits, mask.row_any[:, :2]),
        (query, key.double(), value, mask.bits, mask.row_any),
        (query, key, value, mask.bits.long(), mask.row_any),
        (query.double(), key.double(), value.double(), mask.bits, mask.row_any),
    ):
        with pytest.raises(RuntimeError, match=r"expected|shape"):
            torch.ops.m2f.masked_attention(*arguments, 1.0)
    with pytest.raises(RuntimeError, match="shape"):
        torch.ops.m2f.predict_attention_mask(torch.zeros(1, 2, 3), torch.zeros(1, 4, 5))
    with pytest.raises(RuntimeError, match="at least 1"):
        torch.ops.m2f.resize_mask_features(torch.zeros(1, 2, 3, 4), [0, 1])
