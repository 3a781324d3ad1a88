"""Models of transformers before and after `use_kernels`; run as a program, in a process of its own.

`--any-version` lifts transformers' check of the version of `kernels`, which is done while it is imported.
"""

import copy
import sys

import torch
import transformers
import transformers.utils
from transformers.utils import import_utils

if "--any-version" in sys.argv:
    transformers.utils.is_kernels_available = import_utils.is_kernels_available = lambda *_, **__: True

from kernels.layer import repos
from transformers.integrations import hub_kernels as theirs

from m2f_kernels.integrations import hub_kernels

LAYER = "MultiScaleDeformableAttention"


def backbone():
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def deformable_detr():
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone(),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=7,
        dropout=0.0,
        with_box_refine=True,
    )
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr():
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 32, 64],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=[16, 32, 64],
        encoder_hidden_dim=32,
        d_model=32,
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=10,
        num_denoising=0,
        num_labels=5,
    )
    return transformers.RTDetrForObjectDetection(config)


def attentions(model):
    return [m for m in model.modules() if type(m).__name__ == LAYER]


def is_ours(layer):
    return layer.forward.__func__ is hub_kernels.MultiScaleDeformableAttention.forward


def outputs_and_gradients(model, pixels):
    model.zero_grad()
    out = model(pixels)
    (out.logits.square().sum() + out.pred_boxes.square().sum()).backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, build, pixels):
    original = build()
    original.load_state_dict(model.state_dict())
    original.train(model.training)
    expected, expected_gradients = outputs_and_gradients(original, pixels)
    out, gradients = outputs_and_gradients(model, pixels)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    assert any("sampling_offsets" in name and g.abs().max() > 0 for name, g in gradients.items())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-3, msg=name)


def check(build):
    torch.manual_seed(0)
    model, pixels = build().eval(), torch.rand(2, 3, 96, 64)
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert attentions(model)
    assert not any(is_ours(layer) for layer in attentions(model))

    model.set_use_kernels(True)
    assert all(is_ours(layer) for layer in attentions(model))
    assert_same(model, build, pixels)
    model.train()  # kernelizes again
    assert all(is_ours(layer) for layer in attentions(model))
    for module in model.modules():  # batch statistics of two tiny images amplify rounding
        if "BatchNorm" in type(module).__name__:
            module.eval()
    assert all(is_ours(layer) for layer in attentions(copy.deepcopy(model)))

    # On CUDA transformers has an entry of its own, which it registers on every use: ours must have taken its place.
    repos._find_capability = lambda: 90
    layers = torch.nn.ModuleList(attentions(build()))  # alone: other layers would be fetched from the Hub
    for mode in (theirs.Mode.INFERENCE, theirs.Mode.TRAINING, theirs.Mode.TRAINING | theirs.Mode.TORCH_COMPILE):
        theirs._kernels_kernelize(layers, device="cuda", mode=mode, use_fallback=False)
        assert all(is_ours(layer) for layer in layers)


hub_kernels.patch()
hub_kernels.patch()
for build in (deformable_detr, rt_detr):
    check(build)
hub_kernels.unpatch()

model = deformable_detr().eval()
model.set_use_kernels(True)
assert not any(is_ours(layer) for layer in attentions(model))
assert list(theirs.get_kernel_mapping_transformers()[LAYER]) == ["cuda"]
print(f"transformers {transformers.__version__}: passed")
