"""The rule by which `benchmarks.launches` counts kernels without a GPU, and bounds on what is launched."""

import shutil
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import launches
from benchmarks.launches import Launches
from m2f_kernels import attention_mask_levels, predict_attention_mask
from m2f_model import backbone
from tests.ranks import in_processes

#: Such a test runs in a process of its own, whose tensors on a GPU it fakes.
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="fake CUDA needs a device guard, built by g++")


def counted(run):
    with launches._meta_as_device(), Launches().counting() as found:
        run()
    return found.kernels.get("other", Counter())


X = torch.empty(2, 8, 4, 4, device="meta")


def below(run):
    with torch._C._AutoDispatchBelowAutograd():
        return run()


@pytest.mark.parametrize(
    ("run", "kernels"),
    [
        (lambda: X.permute(0, 2, 3, 1)[:, 1:].unflatten(1, (3, 1)).expand(2, 3, 1, 4, 8), {}),
        (lambda: X.new_empty(3), {}),
        (lambda: torch.relu(X) + 1, {"relu": 1, "add": 1}),
        (lambda: X.contiguous().reshape(2, 128), {}),
        (lambda: X.transpose(1, 2).reshape(2, 128), {"clone": 1}),
        # Below autograd, as in an operator's own code, these are operators themselves.
        (lambda: below(lambda: X.to(torch.float64)), {"to": 1}),
        (lambda: below(lambda: X.to(torch.float32)), {}),
        (lambda: torch.conv2d(X, X[:, :, :1, :1]), {"convolution": 1}),
        (lambda: torch.conv2d(X, X[:, :, :1, :1], X[0, :2, 0, 0]), {"convolution": 2}),
        (lambda: torch.cat([X[:0], X[:0]]) * 2, {}),
        (lambda: torch.nn.functional.scaled_dot_product_attention(X, X, X), {"scaled_dot_product_attention": 1}),
        (lambda: torch.ones(3).mul_(2), {}),
    ],
    ids=[
        *("views", "allocation", "two", "no copy", "copy", "conversion", "no conversion", "convolution", "and bias"),
        *("empty", "attention", "host"),
    ],
)
def test_operators(run, kernels):
    assert counted(run) == kernels


def test_operators_of_this_package_are_opened():
    """The kernel that Triton launches and what its Python code calls beside it."""
    embed, features = torch.empty(1, 100, 256, device="meta"), torch.empty(1, 256, 8, 8, device="meta")
    found = counted(lambda: predict_attention_mask(embed, features))
    assert found["_predict_kernel"] == 1
    assert set(found) <= {"_predict_kernel", "zeros"}


def test_nine_masks():
    """One launch for each mask and one that resizes: none fills flags."""
    features, sizes = torch.empty(1, 256, 256, 256, device="meta"), [(32, 32), (64, 64), (128, 128)]

    def masks():
        levels, flags = attention_mask_levels(features, sizes, 9, 100)
        for i in range(9):
            predict_attention_mask(torch.empty(1, 100, 256, device="meta"), levels[i % 3], flags[i])

    assert counted(masks) == {"_shrink_kernel": 1, "_predict_kernel": 9}


def test_copies_and_waits():
    host = torch.ones(4)
    with launches._meta_as_device(), Launches().counting() as found:
        x = host.to("meta")
        host.pin_memory().to("meta", non_blocking=True)
        x.cpu()
        assert bool(x.isfinite().all())
        x.sum().item()
        torch.tensor([1.0], device="meta")
        torch.as_tensor(3, device="meta")
        torch.full((), 3.0, device="meta")
    assert found.copies == {"up": 3, "up, pinned": 1, "down": 1}
    assert sum(found.waits.values()) == 6


def test_stages():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())).to("meta")
    with Launches().counting() as found:
        found.watch(model, "all of it")
        found.watch(model[1], "inner")
        model(torch.empty(2, 4, device="meta"))
        torch.empty(2, device="meta").exp()
    assert {stage: sum(names.values()) for stage, names in found.kernels.items()} == {
        "all of it": 1,
        "inner": 2,
        "other": 1,
    }


def follow_autocast(rank):
    """The parameters are cast once, the input once, and the last result for softmax, as CUDA's autocast does."""
    launches.fake_cuda()
    with FakeTensorMode():
        layer = torch.nn.Linear(4, 4, device="cuda:0")
        with Launches(layer.parameters()).counting() as found, launches.cuda_autocast(torch.bfloat16):
            layer(layer(torch.empty(2, 4, device="cuda:0"))).softmax(-1)
    assert found.kernels["other"] == {"_to_copy": 4, "addmm": 2, "_softmax": 1}
    assert found.casts == {"other": 2}
    assert not torch.is_autocast_enabled("cuda")


@needs_compiler
def test_fake_cuda_tensors_follow_autocast():
    in_processes(follow_autocast, count=1)


#: Kernels of matching, loss and gradients, over outputs and images at once; one by one they were 339, 507, 686.
LOSS = {
    "separate": {(512, 1, 10): 60, (1024, 1, 30): 74, (1024, 2, 20): 106},
    "fused": {(512, 1, 10): 38, (1024, 1, 30): 53, (1024, 2, 20): 75},
}


@pytest.mark.parametrize("case", LOSS["fused"], ids=str)
@pytest.mark.parametrize("how", LOSS)
def test_loss(how, case, monkeypatch):
    """Not more launches than when this was written; one copy each way, and no wait but for the costs."""
    monkeypatch.setattr("m2f_kernels._tuning.CRITERION", how)
    found = launches.loss(*case)
    assert found.total <= LOSS[how][case]
    assert found.copies == {"down": 1, "up, pinned": 1}
    assert found.waits == {"copy to the host": 1}


#: Of a training step at 512 x 512 without the optimiser. With predictions differentiated one by one, and slices of
#: parameters each with a gradient of its whole size, they were 2152 and 2271.
TRAINING = {"m2f": 1734, "accelerated": 1794}


@pytest.mark.parametrize("implementation", TRAINING)
def test_training_step(implementation):
    found = launches.training(implementation)
    assert found.total <= TRAINING[implementation]
    assert found.copies == {"down": 1, "up, pinned": 1}
    assert found.waits == {"copy to the host": 1}
    backward = found.kernels["backward"]
    assert not backward["slice_backward"]
    layer_norms = 3 * (6 * 2 + 9 * 3 + 1)  # three kernels each; that before the predictions once
    assert backward["native_layer_norm_backward"] == layer_norms


#: Of R50 at 512 x 512.
INFERENCE = {
    "separate": {
        "ours, fp32": 530,
        "ours, weights in bf16": 530,
        "ours, bf16 autocast": 878,
        "accelerated, fp32": 551,
    },
    "fused": {"ours, fp32": 416, "ours, weights in bf16": 416, "ours, bf16 autocast": 764},
}


def infer(rank, how):
    backbone.CONVOLUTION = how
    for what, most in INFERENCE[how].items():
        found = launches.inference(what)
        assert found.total <= most, what
        assert (found.copies, found.waits) == ({}, {}), what


@needs_compiler
@pytest.mark.parametrize("how", INFERENCE)
def test_inference(how):
    """Not more launches than when this was written, no copy and no wait."""
    in_processes(infer, how, count=1)
