"""CUDA graphs: when one is captured, replayed, dropped and refused; on a device that stands for CUDA."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import m2f_kernels
from m2f_kernels import CudaGraphs
from m2f_kernels._constants import ConstantCache, Held
from tests.model.peers import their_model
from tests.recorded import Device, Recorder


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x, factor=1.0):
        self.calls += 1
        y = self.linear(x) * factor
        return {"y": y, "again": y, "name": "y"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


def make(model, **options):
    device = options.pop("device", None) or Device()
    return CudaGraphs(model, device=device, **options), device


@torch.no_grad()
def test_captured_once_for_each_shape_dtype_and_argument(model):
    graphs, device = make(model)
    inputs = [torch.randn(2, 4), torch.randn(2, 4), torch.randn(5, 4), torch.randn(2, 4)]
    found = [graphs(x) for x in inputs]
    assert graphs.captures == len(graphs) == 2
    assert graphs.reason is None
    for x, out in zip(inputs, found, strict=True):  # also the first one's: it has not been overwritten
        assert torch.equal(out["y"], model(x)["y"])
        assert out["again"] is out["y"], "what outputs share is copied once"
        assert out["name"] == "y"
    assert torch.equal(graphs(inputs[0], factor=2.0)["y"], model(inputs[0], 2.0)["y"])
    graphs(inputs[0].t().contiguous().t())  # other strides
    with torch.inference_mode():
        graphs(inputs[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert graphs(inputs[0])["y"].dtype == torch.bfloat16
    assert graphs.captures == 6
    assert device.log[:5] == ["warm up", "capture", "begin", "replay", "end"]


@torch.no_grad()
def test_outputs_of_the_graph_itself(model):
    graphs, _ = make(model, clone=False)
    first = graphs(torch.zeros(1, 4))["y"]
    kept = first.clone()
    second = graphs(torch.ones(1, 4))["y"]
    assert first.data_ptr() == second.data_ptr()
    assert not torch.equal(first, kept)


@torch.no_grad()
def test_least_recently_used_go_first(model):
    graphs, _ = make(model, entries=2)
    for n in (1, 2, 1, 3, 1):
        graphs(torch.ones(n, 4))
    assert (graphs.captures, len(graphs)) == (3, 2)
    graphs(torch.ones(2, 4))
    assert graphs.captures == 4
    graphs.clear()
    assert len(graphs) == 0


@torch.no_grad()
def test_a_pool_that_is_too_large_is_begun_anew(model):
    """Memory of a dropped graph stays in the pool while another is in it."""
    graphs, device = make(model, max_bytes=25)
    for n in (1, 2, 1):
        graphs(torch.ones(n, 4))
    assert (graphs.captures, len(graphs), device.used) == (2, 2, 20)
    assert torch.equal(graphs(torch.ones(3, 4))["y"], model(torch.ones(3, 4))["y"])
    assert (graphs.captures, len(graphs), device.used) == (4, 1, 10)


@torch.no_grad()
def test_one_larger_than_the_bound_is_kept(model):
    graphs, _ = make(model, max_bytes=5)
    graphs(torch.ones(1, 4))
    graphs(torch.ones(1, 4))
    assert graphs.captures == 1


def replaced(model):
    model.linear.__class__ = type("Other", (nn.Linear,), {})


CHANGES = {
    "in place": lambda m: m.linear.weight.mul_(2),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "exchanged": lambda m: setattr(m.linear, "bias", nn.Parameter(torch.ones(3))),
    "moved": lambda m: setattr(m.linear.weight, "data", m.linear.weight.data.clone() + 1),
    "class": replaced,
    "buffer": lambda m: m.register_buffer("more", torch.ones(1)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_and_modules_are_seen(model, change):
    graphs, _ = make(model)
    x = torch.randn(2, 4)
    graphs(x)
    graphs(torch.randn(3, 4))
    CHANGES[change](model)
    assert torch.equal(graphs(x)["y"], model(x)["y"])
    assert (graphs.captures, len(graphs)) == (3, 1)


def refused(graphs, expected, *args, **kwargs):
    with pytest.warns(UserWarning, match=expected):
        out = graphs(*args, **kwargs)
    assert expected in graphs.reason
    assert graphs.captures == 0
    return out


def test_refusals(model):
    x = torch.randn(2, 4)
    graphs, device = make(model)
    assert refused(graphs, "gradients are wanted", x)["y"].requires_grad
    with torch.no_grad():
        model.train()
        refused(graphs, "training mode", x)
        model.eval()
        handle = model.linear.register_forward_hook(lambda *_: None)
        refused(graphs, "a hook is registered", x)
        handle.remove()
        refused(graphs, "subclass", nn.Parameter(x))
        with Recorder():
            refused(graphs, "looks at every operator", x)
        device.busy = True
        refused(graphs, "being captured", x)
        device.busy = False
        refused(CudaGraphs(model), "'cpu', and graphs are of 'cuda' devices", x)
        device.busy = False
        graphs(x)
    assert graphs.captures == 1
    assert graphs.reason is None


@torch.no_grad()
def test_what_decides_about_kernels_is_captured_apart(model):
    graphs, _ = make(model)
    x = torch.randn(2, 4)
    graphs(x)
    with m2f_kernels.use_backend("reference"):
        graphs(x)
    torch.use_deterministic_algorithms(True)
    try:
        graphs(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert graphs.captures == 3


class Kept(nn.Module):
    """Reads a constant, as positions of pixels are."""

    cache = ConstantCache(1)

    def forward(self, x):
        n = x.shape[0]
        return x + self.cache.get(lambda: torch.full((4,), float(n)), n, x)


@torch.no_grad()
def test_a_graph_keeps_what_it_reads_of_caches_alive():
    graphs, _ = make(Kept().eval())
    graphs(torch.zeros(2, 4))
    kept = weakref.ref(next(iter(Kept.cache._kept.values())))
    graphs(torch.zeros(3, 4))
    gc.collect()
    assert kept() is not None, "dropped by the cache, read by a graph"
    graphs.clear()
    gc.collect()
    assert kept() is None


@torch.no_grad()
def test_torch_compile_looks_through(model):
    graphs, device = make(model)
    x = torch.randn(2, 4)
    compiled = torch.compile(lambda x: graphs(x)["y"], backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x)["y"])
    assert not device.log


@torch.no_grad()
def test_said_once_and_a_failed_capture_is_not_tried_again(model, recwarn):
    graphs, device = make(model, device=Device(error="operation not permitted\nmore"))
    x = torch.randn(2, 4)
    for _ in range(3):
        assert torch.equal(graphs(x)["y"], model(x)["y"])
    assert device.log == ["warm up", "capture"]
    assert graphs.reason == "its capture failed: operation not permitted"
    assert len(recwarn) == 1


@torch.no_grad()
def test_threads_take_turns(model):
    graphs, device = make(model, entries=2)
    inputs = [torch.randn(n, 4) for n in (1, 2, 3)]
    expected = [model(x)["y"] for x in inputs]
    wrong = []

    @torch.no_grad()
    def work(order):
        for i in order * 20:
            if not torch.equal(graphs(inputs[i])["y"], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=([i % 3, (i + 1) % 3],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    turns = [x for x in device.log if x not in ("warm up", "capture")]
    assert turns == ["begin", "replay", "end"] * (len(turns) // 3)


@pytest.mark.parametrize(
    ("error", "arguments", "options"),
    [
        (TypeError, (lambda x: x,), {}),
        (ValueError, (nn.Identity(),), {"entries": 0}),
        (ValueError, (nn.Identity(),), {"warmups": 1.5}),
        (ValueError, (nn.Identity(),), {"max_bytes": -1}),
        (ValueError, (nn.Identity(),), {"entries": None}),
    ],
)
def test_bad_arguments(error, arguments, options):
    with pytest.raises(error, match=f"^{next(iter(options), 'model')}: expected"):
        CudaGraphs(*arguments, **options)


# ---------------------------------------------------------------- training
class Trained(nn.Module):
    """Shares an output, has one without a gradient, and weights that are frozen, unused and updated by the pass."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.unused = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(1, 1)
        self.norm.weight.requires_grad_(False)

    def forward(self, x):
        y = self.linear(self.norm(x)).relu()
        return {"y": y, "sums": [(y.sum(), y)], "labels": y.argmax(1), "name": 3}


def trained():
    torch.manual_seed(1)
    return Trained()


def step(call, x, weight=1.0):
    out = call(x)
    (out["y"].square().sum() * weight + out["sums"][0][0]).backward()
    return out


def assert_same_gradients(model, expected):
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_training_is_eager_training():
    """Steps of an optimiser, another shape, gradients added up, an evaluation between; two captures in all."""
    model, expected = trained(), trained()
    graphs, _ = make(model, training=True)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, expected)]
    for i, n in enumerate((3, 3, 5, 3)):
        x = torch.randn(n, 4)
        out, truth = step(graphs, x), step(expected, x)
        assert torch.equal(out["y"], truth["y"])
        assert out["sums"][0][1] is out["y"]
        assert not out["labels"].requires_grad
        assert out["name"] == 3
        step(graphs, 2 * x, 0.5)
        step(expected, 2 * x, 0.5)
        assert_same_gradients(model, expected)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=i % 2 == 0)
    assert graphs.captures == len(graphs) == 2
    assert graphs.reason is None
    for m in (model, expected):
        m.eval()
    with torch.no_grad():
        assert torch.equal(graphs(x)["y"], expected(x)["y"])
    assert graphs.captures == 3
    for m in (model, expected):
        m.train()
    step(graphs, x)
    step(expected, x)
    assert_same_gradients(model, expected)
    assert graphs.captures == 3


def test_gradient_of_the_input_under_autocast():
    model, expected = trained(), trained()
    graphs, _ = make(model, training=True)
    x = torch.randn(3, 4, requires_grad=True)
    found = []
    for m, call in ((model, graphs), (expected, expected)):
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = call(x)
        assert out["y"].dtype == torch.bfloat16
        (out["y"].float().square().sum() * 1024).backward()  # as a scaled loss
        nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        found.append(x.grad)
    assert torch.equal(*found)
    assert_same_gradients(model, expected)
    assert graphs.captures == 1


def test_gradients_are_tensors_of_their_own():
    model = trained()
    graphs, _ = make(model, training=True)
    step(graphs, torch.ones(3, 4))
    held = model.linear.weight.grad
    before = held.clone()
    model.zero_grad(set_to_none=True)
    step(graphs, torch.randn(3, 4))
    assert torch.equal(held, before)


def test_nothing_is_replayed_between_forward_and_backward():
    model, expected = trained(), trained()
    graphs, _ = make(model, training=True)
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    first = graphs(a)["y"]
    with pytest.warns(UserWarning, match="the backward pass of the last replay is still to come"):
        second = graphs(b)["y"]
    (second.sum() + first.square().sum()).backward()
    one, two = expected(a)["y"], expected(b)["y"]
    (two.sum() + one.square().sum()).backward()
    assert_same_gradients(model, expected)
    del first, second
    graphs(a)  # whose backward pass nobody wants
    graphs(b)
    assert graphs.reason is None


def test_one_backward_pass_for_a_forward_pass():
    graphs, _ = make(trained(), training=True)
    loss = graphs(torch.randn(3, 4))["y"].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="expected one backward pass"):
        loss.backward()
    loss = graphs(torch.randn(3, 4))["y"].sum()
    graphs.clear()
    with pytest.raises(RuntimeError, match="expected one backward pass"):
        loss.backward()


@pytest.mark.parametrize("change", ["frozen", "exchanged", "cached"])
def test_in_training_too_changes_are_seen(change):
    model = trained()
    graphs, _ = make(model, training=True)
    step(graphs, torch.randn(3, 4))
    if change == "frozen":
        model.linear.bias.requires_grad_(False)
    elif change == "exchanged":
        model.linear.weight = nn.Parameter(torch.zeros(4, 4))
    else:
        next(iter(graphs._kept.values())).held.append(Held(torch.ones(1), lambda: False))
    model.zero_grad()
    x = torch.randn(3, 4)
    expected = copy.deepcopy(model)
    step(graphs, x)
    step(expected, x)
    assert_same_gradients(model, expected)
    assert graphs.captures == 2


class Checkpointed(nn.Module):
    activation_checkpointing = False


def checkpointing(model):
    model.layer = Checkpointed()
    model.layer.activation_checkpointing = True


def layerdrop(model):
    model.layerdrop = 0.1


REFUSED = {
    "backward pass of a module": lambda m: m.linear.register_full_backward_hook(lambda *_: None),
    "gradient of a weight": lambda m: m.linear.weight.register_hook(lambda g: None),
    "activation checkpointing": checkpointing,
    "skipped at random": layerdrop,
    "synchronised between processes": lambda m: m.add_module("sync", nn.SyncBatchNorm(4)),
    "a weight is a UninitializedParameter": lambda m: m.add_module("lazy", nn.LazyLinear(3)),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("why", REFUSED)
def test_training_is_refused_for_a_reason(why):
    model = trained()
    REFUSED[why](model)
    graphs, _ = make(model, training=True)
    assert refused(graphs, why, torch.randn(3, 4))["y"].requires_grad


def test_saved_tensors_hooks_are_not_captured():
    graphs, _ = make(trained(), training=True)
    with torch.autograd.graph.save_on_cpu():
        refused(graphs, "what the forward pass saves", torch.randn(3, 4))


# ---------------------------------------------------------------- accelerated models
@torch.no_grad()
def test_accelerate_with_graphs(monkeypatch):
    monkeypatch.setattr("m2f_kernels.graphs.CudaDevice", Device)
    model, pixels = their_model("resnet"), torch.randn(1, 3, 64, 96)
    before = model(pixels).class_queries_logits
    with m2f_kernels.accelerate(model, cuda_graphs=True) as (fast, report):
        assert report.replaced
        outs = [fast(pixels) for _ in range(2)]
        assert fast.forward.captures == 1
        for x in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
            assert x.forward.model is x
            assert torch.equal(x(pixels).class_queries_logits, outs[0].class_queries_logits)
        m2f_kernels.restore(copy.deepcopy(fast))
        assert fast.forward.captures == 1
    assert "forward" not in vars(model)
    torch.testing.assert_close(outs[1].class_queries_logits, before, rtol=1e-3, atol=1e-3)
    m2f_kernels.accelerate(model, cuda_graphs=True)
    m2f_kernels.restore(model)
    assert "forward" not in vars(model)
    assert torch.equal(model(pixels).class_queries_logits, before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu(model):
    graphs = CudaGraphs(model.cuda())
    for n in (1, 2, 1):
        x = torch.randn(n, 4, device="cuda")
        assert torch.equal(graphs(x)["y"], model(x)["y"])
    assert graphs.captures == 2
