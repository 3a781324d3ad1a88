"""`transformers`' Mask2Former with random weights that exercise everything, and photographs to feed it."""

import skimage.data
import skimage.transform
import torch
import transformers
from transformers.models.mask2former import modeling_mask2former as published

import m2f_kernels
from m2f_kernels.nn import hungarian_matcher, point_mask_criterion
from m2f_kernels.ops.points import loss as point_loss

STAGES = ["stage1", "stage2", "stage3", "stage4"]
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

BACKBONES = {
    "swin": {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 7},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 2, 1, 1], "layer_type": "basic"},
    "bottleneck": {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]},
}

#: Small architectures that differ in everything a configuration can say.
CONFIGS = {
    "swin": ("swin", {}),
    "resnet": ("resnet", {"num_queries": 7, "decoder_layers": 5, "encoder_layers": 3}),
    "bottleneck": ("bottleneck", {"mask_feature_size": 32, "num_attention_heads": 2, "decoder_layers": 2}),
    "projected": ("resnet", {"hidden_dim": 32, "encoder_layers": 1}),
    "enforced": ("swin", {"enforce_input_projection": True, "dim_feedforward": 48}),
}


def their_config(name):
    """`transformers`' configuration of one of CONFIGS."""
    backbone, changes = CONFIGS[name]
    model_type = "swin" if backbone == "swin" else "resnet"
    sizes = {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "num_attention_heads": 4}
    layers = {"encoder_feedforward_dim": 96, "dim_feedforward": 128, "encoder_layers": 2, "decoder_layers": 8}
    return transformers.Mask2FormerConfig(
        backbone_config=transformers.AutoConfig.for_model(model_type, **BACKBONES[backbone], out_features=STAGES),
        num_labels=5,
        **{"num_queries": 11, "train_num_points": 400, **sizes, **layers, **changes},
    )


def their_model(name, seed=0):
    """`transformers`' model of one of CONFIGS, in eval mode.

    Published initialisation has zero attention logits, and offsets that ignore the query; random ones do not.
    """
    torch.manual_seed(seed)
    model = transformers.Mask2FormerForUniversalSegmentation(their_config(name)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "sampling_offsets" in parameter_name:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "attention_weights" in parameter_name:
                parameter += 0.3 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.7, 1.3)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def photograph(name, height, width):
    """A scikit-image photograph, resized and normalised as the published models want it: [1, 3, height, width]."""
    image = skimage.transform.resize(getattr(skimage.data, name)(), (height, width), anti_aliasing=True)
    return ((torch.from_numpy(image).float().permute(2, 0, 1) - MEAN) / STD)[None]


def fix_points(set_attribute, module=None, loss="Mask2FormerLoss"):
    """Make both criteria look at the same points, whatever their random numbers: the first k of one sequence wherever
    they want k. `set_attribute` is what setattr is, for example that of pytest's monkeypatch; `loss` is the criterion
    in `module`."""
    module = module or published
    points = torch.rand(20000, 2, generator=torch.Generator().manual_seed(7))

    class Random:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def rand(*shape, **_):
            if shape == ([],):  # whether to skip a layer: asked for without dropout, too, in older versions
                return torch.rand([])
            if shape[-1] != 2:  # which queries attend everywhere
                return torch.rand(*shape)
            return points[: shape[-2]].expand(*shape)

    def ours(masks, targets, target_rows, counts, _):
        own = points[: sum(counts[1:])].expand(len(masks.rows), -1, -1)
        if isinstance(masks.masks, m2f_kernels.FactoredMasks):
            return point_loss.factored_loss(masks, targets, target_rows, own, None, (0, 0, 0))
        return point_loss.loss_of_planes(masks.planes, masks.rows, targets, target_rows, own, masks.counts)

    def theirs(self, logits, uncertainty, count, *_):
        return points[:count].expand(logits.shape[0], -1, -1)

    set_attribute(hungarian_matcher, "torch", Random())
    set_attribute(point_mask_criterion, "uncertain_loss", ours)
    set_attribute(module, "torch", Random())
    set_attribute(getattr(module, loss), "sample_points_using_uncertainty", theirs)


__all__ = ["CONFIGS", "fix_points", "photograph", "published", "their_config", "their_model"]
