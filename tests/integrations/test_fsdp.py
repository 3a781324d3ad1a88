"""FSDP2 with decoder layers sharded one by one, on two processes: the gradients of the untouched model."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import m2f_kernels
from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.parallel import whole
from tests.integrations.families import FAMILIES
from tests.integrations.published import BEFORE_LISTS_OF_SIZES
from tests.ranks import in_processes

PROCESSES = 2


def step(call):
    call().backward()


def accumulate(call, net):
    """As gradient accumulation that keeps parameters together between backward passes."""
    net.set_requires_gradient_sync(False)
    net.set_reshard_after_backward(False)
    call().backward()
    net.set_requires_gradient_sync(True)
    call().backward()


def evaluate_first(call):
    with torch.no_grad():
        call()
    call().backward()


def evaluate_first_and_keep(call, net):
    net.set_reshard_after_backward(False)
    evaluate_first(call)


def two_forwards(call):
    (call() + call()).backward()


#: With parameters freed and kept after the forward pass; each is what someone does in training.
SCENARIOS = {
    "step": lambda call, net: step(call),
    "accumulate": accumulate,
    "evaluate first": lambda call, net: evaluate_first(call),
    "evaluate first and keep": evaluate_first_and_keep,
    "two forwards": lambda call, net: two_forwards(call),
}


def of_transformers(name):
    """Model, what of it to shard as a whole, the layers to shard before that, and how to call it."""
    family = FAMILIES[name]
    model = family.make()
    layers = model.model.transformer_module.decoder.layers
    inputs = {k: v[:1] for k, v in family.inputs().items()}

    def call():
        out = model(**inputs)
        return out.class_queries_logits.square().mean() + out.masks_queries_logits.square().mean()

    # OneFormer as a whole has a scalar parameter, which FSDP2 does not take.
    return model, model if name == "mask2former" else model.model.transformer_module, layers, call


def of_ours():
    torch.manual_seed(2)
    model = Mask2Former(Mask2FormerConfig.tiny(3, frozen_batch_norm=True)).eval()
    pixels = FAMILIES["mask2former"].inputs()["pixel_values"][:1]

    def call():
        out = model(pixels)
        return out.class_logits.square().mean() + out.masks.logits().square().mean()

    return model, model, model.transformer_decoder.layers, call


def gradients(make, accelerate, scenario, reshard):
    """Whole gradients by parameter; `accelerate` is None, "before" or "after" the sharding."""
    model, root, layers, call = make()
    if accelerate == "before":
        m2f_kernels.accelerate(model)
    if scenario is None:
        step(call)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(root, mesh=mesh, reshard_after_forward=reshard)
    if accelerate == "after":
        entries = m2f_kernels.accelerate(model).report.skipped
        left = [entry for entry in entries if entry.text not in BEFORE_LISTS_OF_SIZES]
        if left:
            raise RuntimeError(f"left alone: {left}")
    SCENARIOS[scenario](call, root)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def differences(expected, found, times):
    """Names and relative errors of gradients that differ from `times` the expected ones."""
    assert expected
    # A model this small has gradients that are rounding alone; what is lost or halved is not of their size.
    scale = max(float(g.norm()) for g in expected.values())
    wrong = []
    for name, gradient in expected.items():
        error = float((found[name] - times * gradient).norm()) if name in found else float("inf")
        if error > 1e-3 * float(gradient.norm()) + 1e-5 * scale:
            wrong.append((name, error, float(gradient.norm())))
    return wrong


def work(rank, results):
    dist.init_process_group("gloo")
    plan = [("mask2former", "before", scenario, False) for scenario in SCENARIOS]
    plan += [("mask2former", "after", scenario, False) for scenario in ("accumulate", "evaluate first", "two forwards")]
    plan += [("mask2former", "before", scenario, True) for scenario in ("accumulate", "two forwards")]
    plan += [("oneformer", "before", "accumulate", False), ("oneformer", "after", "evaluate first", False)]
    plan += [("ours", None, scenario, False) for scenario in ("accumulate", "evaluate first")]
    makers = {name: (lambda name=name: of_transformers(name)) for name in ("mask2former", "oneformer")} | {
        "ours": of_ours
    }
    wholes = {name: gradients(make, None, None, False) for name, make in makers.items()}
    found = {}
    for name, order, scenario, reshard in plan:
        times = 2 if scenario in ("accumulate", "two forwards") else 1
        try:
            wrong = differences(wholes[name], gradients(makers[name], order, scenario, reshard), times)
        except RuntimeError as error:
            wrong = [str(error)[:300]]
        found[f"{name}, accelerated {order}, {scenario}, reshard {reshard}"] = wrong[:3]
    if rank == 0:
        torch.save(found, results)


@pytest.mark.skipif(sys.platform != "linux", reason="gloo processes are started on Linux")
def test_gradients_of_layers_sharded_one_by_one(tmp_path):
    in_processes(work, str(tmp_path / "found.pt"), count=PROCESSES)
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == 14
    assert not {case: wrong for case, wrong in found.items() if wrong}
