"""Positions and centres of pixels, kept between calls: the same numbers, and no tensor that cannot be used again."""

import contextlib
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from m2f_kernels.constants import ConstantCache, derived
from m2f_kernels.nn.linear import linear_relu
from m2f_model import layers
from m2f_model.layers import pixel_centres, sine_positions

LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def fresh():
    layers._CONSTANTS.clear()
    yield
    layers._CONSTANTS.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_kept_numbers_are_the_same_bits(dtype):
    like = LIKE.to(dtype)
    for make in (lambda: sine_positions((5, 7), 8, like), lambda: pixel_centres([(3, 4), (6, 8)], like)):
        layers._CONSTANTS.clear()
        first, second = make(), make()
        assert torch.equal(first, second)
    assert sine_positions((5, 7), 8, like).dtype == dtype


def test_bounded_and_least_recently_used_first():
    cache, made = ConstantCache(2), []

    def get(key):
        return cache.get(lambda: made.append(key) or torch.ones(1), key, LIKE)

    for key in "abacab":
        get(key)
    assert made == ["a", "b", "c", "b"]
    assert len(cache) == 2


def test_kinds_of_tensors_are_kept_apart():
    cache = ConstantCache(10)
    found = [
        cache.get(lambda x=x: torch.ones(1, dtype=x.dtype, device=x.device), "k", x)
        for x in (LIKE, LIKE.double(), LIKE.to("meta"))
    ]
    assert [(x.dtype, x.device.type) for x in found] == [
        (torch.float32, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta"),
    ]  # fmt: skip


def test_made_in_inference_mode_saved_in_training():
    with torch.inference_mode():
        sine_positions((4, 4), 8, LIKE)
    weight = torch.ones(8, requires_grad=True)
    (sine_positions((4, 4), 8, LIKE) * weight).sum().backward()
    assert weight.grad is not None


def test_fake_tensors_stay_in_their_mode():
    for _ in range(2):
        with FakeTensorMode():
            assert isinstance(sine_positions((4, 4), 8, torch.zeros(1)), FakeTensor)
        assert type(sine_positions((4, 4), 8, LIKE)) is torch.Tensor


def test_nothing_is_kept_of_real_tensors_in_a_fake_mode():
    module = nn.Linear(2, 2)
    for real in (False, True):
        with contextlib.nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
            sine_positions((4, 4), 8, LIKE)
            scale = derived(module, "scale", [module.weight], lambda: module.weight * 2)
    assert type(sine_positions((4, 4), 8, LIKE)) is torch.Tensor
    assert type(scale) is torch.Tensor


def test_tracing_and_transforms_keep_nothing():
    class Positions(nn.Module):
        def forward(self, x):
            return x + sine_positions((x.shape[0], 4), 8, x)[0, 0]

    exported = torch.export.export(Positions(), (torch.ones(3),)).module()
    torch.jit.trace(Positions(), torch.ones(3), check_trace=False)
    torch.func.grad(lambda x: Positions()(x).sum())(torch.ones(3))
    assert len(layers._CONSTANTS) == 0
    assert torch.equal(exported(torch.ones(3)), Positions()(torch.ones(3)))


def test_nothing_is_kept_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr("m2f_kernels.constants.capturing", lambda device: True)
    sine_positions((4, 4), 8, LIKE)
    assert len(layers._CONSTANTS) == 0


def test_threads():
    """Many sizes from many threads: every answer right, the bound kept."""
    expected = {n: sine_positions((n, 3), 8, LIKE) for n in range(2, 90)}
    wrong = []

    def work(order):
        wrong.extend(n for n in order if not torch.equal(sine_positions((n, 3), 8, LIKE), expected[n]))

    threads = [threading.Thread(target=work, args=(list(expected)[::step],)) for step in (1, -1, 2, -3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(layers._CONSTANTS) == layers._CONSTANTS.entries


class OnCuda(torch.Tensor):
    """Says that it is on a GPU; the kernel that is called exists on a CPU, too."""

    is_cuda = True


def test_linear_relu():
    """The fused kernel, which CUDA alone takes, gives what the two give."""
    linear, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    expected = linear(x).relu()
    assert torch.equal(linear_relu(linear, x), expected)
    with torch.no_grad():
        for given in (x, x[0, 0], x[:0]):
            torch.testing.assert_close(
                linear_relu(linear, given.as_subclass(OnCuda)).as_subclass(torch.Tensor), linear(given).relu()
            )
    seen = []
    with linear.register_forward_hook(lambda *args: seen.append(args[2])):
        assert torch.equal(linear_relu(linear, x), expected)
    assert (seen[0] < 0).any(), "a hook sees what comes before the activation"
