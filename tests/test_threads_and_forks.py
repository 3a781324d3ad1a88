"""Operators called from several Python threads at once, and in processes forked after their use."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import m2f_kernels
from m2f_kernels import FactoredMasks

THREADS = 8
ROOT = Path(__file__).parents[1]


def _deformable(backward: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    sizes = [(24, 20), (12, 10)]
    value = torch.randn(2, 600, 4, 16, generator=g).requires_grad_()
    points = torch.rand(2, 50, 1, 2, generator=g)
    offsets = torch.randn(2, 50, 4, 2, 4, 2, generator=g).requires_grad_()
    logits = torch.randn(2, 50, 4, 2, 4, generator=g).requires_grad_()
    out = m2f_kernels.ms_deform_attn_from_offsets(value, sizes, points, offsets, logits)
    return [out, *(torch.autograd.grad(out.square().sum(), (value, offsets, logits)) if backward else ())]


def _attention(backward: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    features = torch.randn(1, 16, 40, 40, generator=g)
    (level,) = m2f_kernels.resize_mask_features(features, [(20, 20)])
    mask = m2f_kernels.predict_attention_mask(torch.randn(1, 30, 16, generator=g), level)
    q, k, v = (torch.randn(1, 4, n, 32, generator=g).requires_grad_() for n in (30, 400, 400))
    out = m2f_kernels.masked_attention(q, k, v, mask)
    return [mask.bits, out, *(torch.autograd.grad(out.square().sum(), (q, k, v)) if backward else ())]


def _points(backward: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    embed = torch.randn(1, 10, 8, generator=g).requires_grad_()
    features = torch.randn(1, 8, 32, 32, generator=g).requires_grad_()
    masks = FactoredMasks(embed, features)
    targets = [torch.rand(10, 64, 64, generator=g) > 0.5]
    uniform = torch.rand(1, 300, 2, generator=g)
    costs = m2f_kernels.mask_matching_cost(masks, targets, uniform)
    points = m2f_kernels.uncertain_points(masks, 200, generator=g)
    cross_entropy, dice = m2f_kernels.point_mask_loss(masks, targets, points)
    samples = m2f_kernels.point_sample(features, uniform)
    return [
        *costs[0],
        points,
        cross_entropy,
        dice,
        samples,
        *(torch.autograd.grad((cross_entropy + dice).sum(), (embed, features)) if backward else ()),
    ]


WORK = {"deformable attention": _deformable, "masked attention": _attention, "points": _points}


def _all(backward: bool) -> list[Tensor]:
    return [x.detach() for work in WORK.values() for x in work(backward)]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_threads(work: Callable[[bool], list[Tensor]], inner: int, set_threads: Callable[[int], None]) -> None:
    """Eight threads, all started at once, some calls each, with one and two threads inside an operator: the bits of a
    single thread."""
    set_threads(inner)
    expected = work(True)
    start, problems = threading.Barrier(THREADS), []

    def call() -> None:
        try:
            torch.set_num_threads(inner)  # OpenMP counts threads per calling thread
            start.wait()
            for _ in range(5):
                if not _same(work(True), expected):
                    problems.append("the bits differ")
        except Exception as error:  # a thread's own would be lost: the test fails with it
            problems.append(repr(error))

    threads = [threading.Thread(target=call) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []


def _child(results: multiprocessing.Queue, backward: bool) -> None:  # type: ignore[type-arg]
    torch.set_num_threads(1)
    try:
        results.put([x.numpy() for x in _all(backward)])
    except Exception as error:  # the parent would wait for a result in vain
        results.put(repr(error))


@pytest.mark.parametrize("threads", [1, 2])
def test_fork_after_use(threads: int) -> None:
    """A child of a process that has used the operators uses them too, with one thread as a data loader's worker.

    Its bits are the parent's with one thread: a matrix product may depend on the number of threads (MKL's does on AMD).
    With more it would wait for ever, in PyTorch's own operators as well: GNU OpenMP does not survive a fork. And where
    there is a GPU PyTorch refuses every backward pass in the child of a process that has had one."""
    code = f"""
import multiprocessing, torch
torch.set_num_threads({threads})
from tests.test_threads_and_forks import _all, _child
_all(True)
torch.set_num_threads(1)
backward = not torch.accelerator.is_available()
expected = _all(backward)
context = multiprocessing.get_context("fork")
results = context.Queue()
child = context.Process(target=_child, args=(results, backward), daemon=True)
child.start()
found = results.get(timeout=60)
child.join(10)
assert child.exitcode == 0, child.exitcode
assert not isinstance(found, str), found
assert all((a.numpy() == b).all() for a, b in zip(expected, found, strict=True))
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "same", done.stdout + done.stderr
