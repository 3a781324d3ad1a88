"""CUDA graphs: when one is captured, replayed, dropped and refused; on a device that stands for CUDA."""

import copy
import gc
import inspect
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import register_pytree_node, tree_leaves

import m2f_kernels
from m2f_kernels import CudaGraphs
from m2f_kernels.constants import ConstantCache, Held
from m2f_kernels.graphs import captured
from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.criterion import losses_of, total_loss
from tests.integrations import test_eomt, test_oneformer
from tests.integrations.families import FAMILIES, modeling
from tests.model.peers import fix_points, their_model
from tests.ranks import in_processes
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
    graphs.attach()  # as its forward, too
    compiled = torch.compile(lambda x: model(x)["y"], backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), Model.forward(model, x)["y"])
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


@pytest.mark.parametrize("frozen", [True, False])
def test_validation_between_steps_of_training(frozen):
    """Gradients of two batches, an optimiser's step, a validation, and loaded weights; norms that are folded without
    gradients, or frozen only by their mode. Training is captured once."""
    torch.manual_seed(0)
    model = Mask2Former(Mask2FormerConfig.tiny(5, frozen_batch_norm=frozen, num_points=64))
    expected = copy.deepcopy(model)
    graphs, _ = make(model, training=True)
    pairs = [(m, call, torch.optim.AdamW(m.parameters(), 1e-3)) for m, call in ((model, graphs), (expected, expected))]
    targets = [{"labels": torch.tensor([0, 3]), "masks": torch.rand(2, 64, 64) > 0.5}]
    pixels = torch.randn(2, 1, 3, 64, 64)
    for i in range(3):
        for m, call, optimiser in pairs:
            m.train()
            torch.manual_seed(i)
            for x in pixels:
                total_loss(losses_of(m.criterion, call(x).predictions, targets)).backward()
            optimiser.step()
            optimiser.zero_grad()
            m.eval()
        with torch.inference_mode() if i else torch.no_grad():
            assert torch.equal(*(call(pixels[0]).masks.logits() for _, call, _ in pairs))
        if i == 1:
            changed = {k: v * 1.01 if v.is_floating_point() else v for k, v in model.state_dict().items()}
            for m, _, _ in pairs:
                m.load_state_dict(changed)
    # Three validations; training at first, and again where the constants of frozen norms were loaded.
    assert graphs.captures == 3 + 1 + frozen


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


class Labelled(nn.Module):
    """Its loss reads results on the host. `predict` is the part without targets, if it says so."""

    def __init__(self, parted=True):
        super().__init__()
        self.inner, self.parted = trained(), parted

    def forward(self, x, labels=None, scale=1.0):
        predict = captured(self.predict) if self.parted else self.predict
        y = predict(x)
        return y if labels is None else (y - labels[int(y.detach().argmax()) % 2]).square().mean() * scale

    def predict(self, x):
        return self.inner(x)["y"]


def attached(model, **options):
    graphs, device = make(model, training=True, **options)
    graphs.attach()
    return graphs, device


LABELS = [torch.ones(4), torch.zeros(4)]


def test_the_part_before_a_loss_is_captured():
    torch.manual_seed(0)
    model = Labelled().train()
    expected = copy.deepcopy(model)
    graphs, device = attached(model)
    for n in (3, 3, 5):
        x = torch.randn(n, 4)
        a, b = model(x, labels=LABELS, scale=2.0), expected(x, LABELS, 2.0)
        assert torch.equal(a, b)
        a.backward()
        b.backward()
        assert_same_gradients(model, expected)
        assert graphs.reason is None
    assert graphs.captures == 2
    # Without targets the whole model is captured; its validation loss from the part, too.
    with torch.no_grad():
        for m in (model, expected):
            m.eval()
        assert torch.equal(model(x), expected(x))
        assert torch.equal(model(x, LABELS), expected(x, LABELS))
    assert graphs.captures == 4
    assert not device.busy
    model.train()
    model(x).sum().backward()
    assert graphs.captures == 5
    graphs.detach()
    assert not {"forward", "_m2f_graphs"} & vars(model).keys()
    assert len(graphs) == 0


def test_a_model_without_such_a_part_is_not_captured_with_targets():
    model = Labelled(parted=False).train()
    graphs, device = attached(model)
    with pytest.warns(UserWarning, match="targets are given"):
        model(torch.randn(3, 4), LABELS).backward()
    model(torch.randn(3, 4), LABELS).backward()  # said once
    assert "targets are given" in graphs.reason
    assert not device.log


def test_in_eval_mode_gradients_are_not_captured_unasked():
    model = Labelled().eval()
    graphs, _ = attached(model)
    refused(graphs, "gradients are wanted; call it under torch.no_grad", torch.randn(3, 4))


def test_what_is_computed_on_access_belongs_to_the_graph():
    """OneFormer's masks are multiplied when they are read."""

    class Late(nn.Module):
        def forward(self, x):
            return Later({"x": x})

    class Later(dict):
        pass

    register_pytree_node(Later, lambda x: ([x["x"] + 1], None), lambda values, _: {"x": values[0]})
    with torch.no_grad():
        graphs, _ = make(Late().eval())
        for x in (torch.zeros(2), torch.ones(2)):
            assert torch.equal(graphs(x)["x"], x + 1)


@torch.no_grad()
def test_results_of_unknown_classes_are_not_captured():
    class Odd(nn.Module):
        def forward(self, x):
            return {"x": x, "odd": {1, 2}}

    graphs, _ = make(Odd().eval())
    refused(graphs, "its capture failed: its result contains", torch.ones(2))


def test_other_code_wraps_forward():
    """As Accelerate's autocast does: `forward` is a function around this one, which `detach` cannot take away."""
    model = Labelled().train()
    graphs, _ = attached(model)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    x = torch.randn(3, 4)
    model(x, labels=LABELS).backward()
    assert graphs.captures == 1
    graphs.detach()
    assert model(x, labels=LABELS).requires_grad
    assert len(graphs) == 0


# ---------------------------------------------------------------- accelerated models in training
def labels_of(n, seed=0, size=(64, 96)):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(3, *size, generator=generator) > 0.5 for _ in range(n)]
    return {"mask_labels": [x.float() for x in masks], "class_labels": [torch.tensor([0, 3, 1])] * n}


def accelerated_pair(monkeypatch, model=None):
    """The same model, in training mode, with graphs and without."""
    monkeypatch.setattr("m2f_kernels.graphs.CudaDevice", Device)
    model = model or their_model("resnet")
    model.train()
    expected = m2f_kernels.accelerate(copy.deepcopy(model)).model
    return m2f_kernels.accelerate(model, cuda_graphs=True).model, expected


def train_step(model, optimiser, scaler, inputs, dtype):
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(**inputs).loss
    optimiser.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimiser)
    scaler.update()
    return loss.detach()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_training_an_accelerated_model(monkeypatch, dtype):
    """Steps with clipping and scaled losses, of two shapes, an evaluation between: as without graphs."""
    fix_points(monkeypatch.setattr)
    models = accelerated_pair(monkeypatch)
    steps = [(torch.optim.AdamW(m.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=8.0)) for m in models]
    graphs = models[0].forward
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a graph cannot use it: a weight that is used twice is cast twice
    try:
        for n in (1, 1, 2, 1):
            inputs = {"pixel_values": torch.randn(n, 3, 64, 96), **labels_of(n)}
            losses = [train_step(m, *own, inputs, dtype) for m, own in zip(models, steps, strict=True)]
            assert torch.equal(*losses)
            assert graphs.reason is None
        assert_same_gradients(*models)
        assert graphs.captures == 2
        for m in models:
            m.eval()
        with torch.no_grad():
            outs = [m(inputs["pixel_values"]).masks_queries_logits for m in models]
        assert torch.equal(*outs)
        for m in models:
            m.train()
        losses = [train_step(m, *own, inputs, dtype) for m, own in zip(models, steps, strict=True)]
    finally:
        torch.set_autocast_cache_enabled(cache)
    assert torch.equal(*losses)
    assert graphs.captures == 3
    m2f_kernels.restore(models[0])
    assert "forward" not in vars(models[0])
    assert models[0](**inputs).loss.requires_grad


def test_gradients_of_several_batches_and_what_is_returned(monkeypatch):
    fix_points(monkeypatch.setattr)
    models = accelerated_pair(monkeypatch)
    for i in range(2):
        inputs = {"pixel_values": torch.randn(1, 3, 64, 96), **labels_of(1, i)}
        asked = {"output_hidden_states": True, "output_auxiliary_logits": True}
        found = [model(**inputs, **asked) for model in models]
        for name, a in found[0].items():
            for x, y in zip(tree_leaves(a), tree_leaves(found[1][name]), strict=True):
                torch.testing.assert_close(x, y, msg=name)
        for out in found:
            (out.loss + out.encoder_last_hidden_state.mean()).backward()
    assert_same_gradients(*models)
    assert models[0].forward.captures == 1


def test_accelerated_training_is_refused_for_a_reason(monkeypatch):
    model, _ = accelerated_pair(monkeypatch, their_model("swin"))
    graphs = model.forward
    inputs = {"pixel_values": torch.randn(1, 3, 64, 96), **labels_of(1)}
    backbone, name = model.model.pixel_level_module.encoder, "activation_checkpointing"
    if not hasattr(backbone, f"{name}_enable"):
        name = "gradient_checkpointing"  # in older versions
    getattr(backbone, f"{name}_enable")()
    with pytest.warns(UserWarning, match="activation checkpointing runs layers again"):
        model(**inputs).loss.backward()
    getattr(backbone, f"{name}_disable")()
    with model.class_predictor.register_forward_hook(lambda *_: None), pytest.warns(UserWarning, match="a hook is"):
        model(**inputs).loss.backward()
    assert graphs.captures == 0
    model(**inputs).loss.backward()
    assert (graphs.captures, graphs.reason) == (1, None)
    assert "mask_labels" in inspect.signature(model.forward).parameters  # a trainer keeps these columns


@pytest.mark.parametrize("family", ["oneformer", "Eomt", "EomtDinov3"])
def test_other_families_train_by_parts(monkeypatch, family):
    """The text encoder of OneFormer is in the captured part; of EoMT the masks of its blocks."""
    if family == "oneformer":
        model, module, loss, size = test_oneformer.make(is_training=True), test_oneformer.published, "OneFormerLoss", 96
        more = {"task_inputs": torch.rand(1, test_oneformer.TASK)}
        more["text_inputs"] = torch.randint(0, 90, (1, test_oneformer.QUERIES - 4, test_oneformer.TASK))
    else:
        model, size, more = test_eomt.make(family), test_eomt.SIZE, {}
        module, loss = modeling({"Eomt": "eomt"}.get(family, "eomt_dinov3")), f"{family}Loss"
    fix_points(monkeypatch.setattr, module, loss)
    models = accelerated_pair(monkeypatch, model)
    for i in range(2):
        inputs = {"pixel_values": torch.randn(1, 3, size, size), **labels_of(1, i, (size, size)), **more}
        found = []
        for m in models:
            torch.manual_seed(i)  # EoMT-DINOv3 shifts its positions at random
            found.append(m(**inputs).loss)
        torch.testing.assert_close(*found)
        for x in found:
            x.sum().backward()
        assert_same_gradients(*models)
    assert (models[0].forward.captures, models[0].forward.reason) == (1, None)
    with torch.no_grad():
        del inputs["mask_labels"], inputs["class_labels"]
        for _ in range(2):
            inputs["pixel_values"] = torch.randn(1, 3, size, size)
            a, b = (m.eval()(**inputs) for m in models)
            for name in a:
                for x, y in zip(tree_leaves(a[name]), tree_leaves(b[name]), strict=True):
                    torch.testing.assert_close(x, y, msg=name)
    assert models[0].forward.captures == 2


def in_a_process(rank, directory):
    torch.distributed.init_process_group("gloo")
    fix_points(setattr)
    models = accelerated_pair(pytest.MonkeyPatch())
    wrapped = [DistributedDataParallel(m, find_unused_parameters=True) for m in models]
    for seed in (rank, 2 + rank):
        torch.manual_seed(seed)
        inputs = {"pixel_values": torch.randn(1, 3, 64, 96), **labels_of(1, seed)}
        for m in wrapped:
            m.zero_grad(set_to_none=True)
            m(**inputs).loss.backward()
        assert_same_gradients(*models)
    assert (models[0].forward.captures, models[0].forward.reason) == (1, None)
    torch.save([p.grad for p in models[0].parameters()], directory / f"{rank}.pt")
    torch.distributed.barrier()  # see Process.joined


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_data_parallel_training_of_an_accelerated_model(tmp_path):
    """Both processes have the gradients that they have without graphs, which are those of both batches."""
    in_processes(in_a_process, tmp_path)
    for a, b in zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_a_detector_with_targets_runs_eagerly(monkeypatch):
    family = FAMILIES["deformable_detr"]
    if not family.installed:
        pytest.skip("this transformers does not have it")
    model, expected = accelerated_pair(monkeypatch, family.make())
    inputs = family.inputs(labels=True)
    with pytest.warns(UserWarning, match="targets are given"):
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, expected(**inputs).loss)
    with torch.no_grad():
        a, b = (m.eval()(pixel_values=inputs["pixel_values"]).logits for m in (model, expected))
    torch.testing.assert_close(a, b)
    assert model.forward.captures == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu(model):
    graphs = CudaGraphs(model.cuda())
    for n in (1, 2, 1):
        x = torch.randn(n, 4, device="cuda")
        assert torch.equal(graphs(x)["y"], model(x)["y"])
    assert graphs.captures == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_threads_with_streams_of_their_own(model):
    """Graphs share their memory, so that a replay waits for the one before it, on whatever stream that was."""
    graphs = CudaGraphs(model.cuda(), entries=2)
    inputs = [torch.randn(n, 4, device="cuda") for n in (1, 2, 3)]
    with torch.no_grad():
        expected = [model(x)["y"] for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    @torch.no_grad()
    def work(order):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [(i, graphs(inputs[i])["y"]) for i in order * 20]
        torch.cuda.synchronize()
        wrong.extend(i for i, y in found if not torch.equal(y, expected[i]))

    threads = [threading.Thread(target=work, args=([i % 3, (i + 1) % 3],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert graphs.reason is None
