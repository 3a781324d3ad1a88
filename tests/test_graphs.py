"""CUDA graphs: when one is captured, replayed, dropped and refused.

On a device that stands for CUDA: its graphs run again what was captured, and write to where that was written.
"""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import m2f_kernels
from m2f_kernels import CudaGraphs
from tests.model.peers import their_model


class Device:
    type = "cpu"

    def __init__(self, size=10, error=None):
        self.size, self.error, self.log, self.busy = size, error, [], False

    def capturing(self):
        return self.busy

    def capture(self, run, warmups):
        self.log.append("capture")
        if self.error:
            raise RuntimeError(self.error)
        for _ in range(warmups):
            run()
        outputs = run()

        def replay():
            self.log.append("replay")
            for kept, new in zip(tree_leaves(outputs), tree_leaves(run()), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)

        return outputs, replay, self.size

    def begin(self):
        self.log.append("begin")

    def end(self):
        self.log.append("end")


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
    assert device.log[:4] == ["capture", "begin", "replay", "end"]


@torch.no_grad()
def test_outputs_of_the_graph_itself(model):
    graphs, _ = make(model, clone=False)
    first = graphs(torch.zeros(1, 4))["y"]
    kept = first.clone()
    second = graphs(torch.ones(1, 4))["y"]
    assert first.data_ptr() == second.data_ptr()
    assert not torch.equal(first, kept)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"entries": 2}, {"max_bytes": 25}], ids=str)
def test_least_recently_used_go_first(model, options):
    graphs, _ = make(model, **options)
    for n in (1, 2, 1, 3, 1):
        graphs(torch.ones(n, 4))
    assert (graphs.captures, len(graphs)) == (3, 2)
    graphs(torch.ones(2, 4))
    assert graphs.captures == 4
    graphs.clear()
    assert len(graphs) == 0


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
        device.busy = True
        refused(graphs, "being captured", x)
        refused(CudaGraphs(model), "'cpu', and graphs are of 'cuda' devices", x)
        device.busy = False
        graphs(x)
    assert graphs.captures == 1
    assert graphs.reason is None


@torch.no_grad()
def test_said_once_and_a_failed_capture_is_not_tried_again(model, recwarn):
    graphs, device = make(model, device=Device(error="operation not permitted\nmore"))
    x = torch.randn(2, 4)
    for _ in range(3):
        assert torch.equal(graphs(x)["y"], model(x)["y"])
    assert device.log == ["capture"]
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
    turns = [x for x in device.log if x != "capture"]
    assert turns == ["begin", "replay", "end"] * (len(turns) // 3)


@pytest.mark.parametrize(
    ("error", "arguments", "options"),
    [
        (TypeError, (lambda x: x,), {}),
        (ValueError, (nn.Identity(),), {"entries": 0}),
        (ValueError, (nn.Identity(),), {"warmups": 1.5}),
        (ValueError, (nn.Identity(),), {"max_bytes": -1}),
    ],
)
def test_bad_arguments(error, arguments, options):
    with pytest.raises(error, match=f"^{next(iter(options), 'model')}: expected"):
        CudaGraphs(*arguments, **options)


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
