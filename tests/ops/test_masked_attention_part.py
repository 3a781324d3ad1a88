"""Masked attention with a mask for some queries and some keys, against the same attention with the whole mask."""

import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import m2f_kernels
from m2f_kernels import masks
from tests.ops.masked_attention_cases import Case, assert_matches, make_case, truth, value_and_gradients

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass
class Part(Case):
    """`attend` is the whole mask, which `call` does not see: it gets `part`."""

    part: torch.Tensor | None = None
    first_key: int = 0

    def call(self, *tensors):
        return m2f_kernels.masked_attention(*tensors, self.part, scale=self.scale, first_key=self.first_key)


def make_part(r, q, first_key, m, s, density=0.4, **sizes):
    """R queries and M keys from `first_key` on have a mask; all other pairs are open."""
    case = make_case(q=q, s=s, density=density, **sizes)
    part = case.attend[:, :r, first_key : first_key + m].clone()
    case.attend = torch.ones_like(case.attend)
    case.attend[:, :r, first_key : first_key + m] = part
    return Part(**vars(case), part=part, first_key=first_key)


def on(device, case):
    case.part = case.part.to(device)
    return case.to(device)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_self_attention(implementation, dtype, density):
    """As an encoder-only model has it: queries, prefix, patches."""
    assert_matches(on(implementation, make_part(10, 95, 15, 80, 95, density, dtype=dtype)))


@pytest.mark.parametrize(
    ("r", "q", "first_key", "m", "s"),
    [
        (0, 7, 3, 20, 70),  # no masked query
        (7, 7, 0, 70, 70),  # everything: the other form
        (3, 7, 0, 70, 70),  # all keys: an empty row attends everywhere
        (3, 7, 0, 1, 70),
        (3, 7, 69, 1, 70),
        (3, 7, 32, 38, 70),
        (3, 7, 31, 33, 64),
        (3, 7, 1, 63, 64),
        (4, 300, 205, 95, 300),
    ],
)
def test_places(implementation, r, q, first_key, m, s):
    for density in (0.0, 0.3):
        assert_matches(on(implementation, make_part(r, q, first_key, m, s, density)))


def test_keys_split_into_parts(implementation, set_threads):
    set_threads(2)
    assert_matches(on(implementation, make_part(9, 30, 39, 2600, 2639, 0.001, n=1, h=2)))


@given(
    st.integers(1, 6), st.integers(0, 6), st.integers(0, 70), st.integers(1, 100), st.integers(0, 40), st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_any_place(r, more, first_key, m, after, seed):
    assert_matches(make_part(r, r + more, first_key, m, first_key + m + after, d=8, seed=seed))


@given(first=st.integers(0, 100), keys=st.integers(1, 100), after=st.integers(0, 70), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_widened_bits(first, keys, after, seed):
    """Every bit lies where it should, and none beyond the last key."""
    part = torch.rand(2, 3, keys, generator=torch.Generator().manual_seed(seed)) < 0.5
    whole = torch.ones(2, 3, first + keys + after, dtype=torch.bool)
    whole[:, :, first : first + keys] = part
    assert torch.equal(masks.widen(masks.pack(part)[0], first, keys, whole.shape[2]), masks.pack(whole)[0])


def test_packed_and_bool_are_the_same(device):
    case = on(device, make_part(4, 9, 5, 60, 70))
    other = Part(**{**vars(case), "part": m2f_kernels.pack_attention_mask(case.part)})
    assert torch.equal(case.call(*case.tensors.values()), other.call(*case.tensors.values()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["key", "value"])
def test_blocked_keys_contribute_nothing(implementation, name, bad):
    """A key that is blocked for all masked queries: they are untouched by what it holds, though others attend to it."""
    case = on(implementation, make_part(4, 20, 24, 46, 70))
    case.part[:, :, 10:13] = False
    case.attend[:, :4, 34:37] = False
    case.grad_output[:, :, 4:] = 0
    clean = truth(case)
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 34:37] = bad
    found = value_and_gradients(case.call, case)
    for result in ("output", "query"):
        torch.testing.assert_close(
            found[result][:, :, :4].cpu().double(), clean[result][:, :, :4], atol=1e-5, rtol=1e-4
        )
    assert not found["output"][:, :, 4:].isfinite().all()


def test_the_same_bits_for_any_number_of_threads(set_threads):
    results = []
    for threads in (1, 2):
        set_threads(threads)
        case = make_part(20, 260, 25, 2100, 2125, 0.1, n=1, h=3)
        results.append(value_and_gradients(case.call, case))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


def test_gradcheck():
    case = make_part(2, 4, 1, 3, 5, n=1, h=2, d=4, dtype=F64)
    assert torch.autograd.gradcheck(case.call, [x.requires_grad_() for x in case.tensors.values()])


def test_opcheck():
    case = make_part(3, 7, 4, 60, 70)
    mask = m2f_kernels.pack_attention_mask(case.attend[:, :3])
    tensors = [x.requires_grad_() for x in case.tensors.values()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.m2f.masked_attention.default, (*tensors, mask.bits, mask.row_any, 0.3), test_utils=checks
    )


def test_compiles(device):
    case = on(device, make_part(3, 7, 4, 60, 70))
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case.tensors.values()), case.call(*case.tensors.values()))


BAD = {
    "first_key is a float": ({"first_key": 1.0}, TypeError, "first_key: expected an integer or None; got 1.0 (float)"),
    "first_key is negative": ({"first_key": -1}, ValueError, "first_key: expected an integer in [0, 10]"),
    "first_key is too large": ({"first_key": 11}, ValueError, "so that the mask's 60 keys lie within key's 70; got 11"),
    "too many queries": ({"part": torch.ones(2, 8, 60).bool()}, ValueError, "mask: expected R of at most 7 queries"),
    "mask of logits": ({"part": torch.ones(2, 3, 60)}, TypeError, "mask: expected a PackedMask or a bool tensor"),
    "mask of another batch": ({"part": torch.ones(1, 3, 60).bool()}, ValueError, "mask: expected"),
    "mask of rank 2": ({"part": torch.ones(3, 60).bool()}, TypeError, "mask: expected"),
}


@pytest.mark.parametrize(("change", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input(change, error, words):
    case = Part(**{**vars(make_part(3, 7, 4, 60, 70)), **change})
    with pytest.raises(error, match=re.escape(words)):
        case.call(*case.tensors.values())
