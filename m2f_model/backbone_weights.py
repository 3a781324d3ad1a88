"""Backbones that were trained as classifiers: from transformers, detectron2, torchvision and timm.

Whatever the names in a file, they become those of detectron2's backbones, which :mod:`m2f_model.weights` reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from m2f_model.config import BACKBONES
from m2f_model.hub import locate
from m2f_model.model import Mask2Former
from m2f_model.weights import WeightsError, from_detectron2, read_state

State = dict[str, Tensor]
#: What classifiers have and backbones do not: heads, counters, what follows from the configuration.
_HEADS = re.compile(
    r"^(fc|stem\.fc|head|classifier|norm|layernorm)\.|num_batches_tracked$|attn_mask$|relative_position_index$"
)
#: Of a Mask2Former's backbone, what no classifier has, or has only of another meaning.
_NEW = re.compile(r"hidden_states_norms\.|swin\.layernorm\.|num_batches_tracked$")

#: torchvision's and timm's ResNets, by detectron2's names.
_RESNET = [
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    *((rf"^layer{i}\.(\d+)\.downsample\.0\.", rf"res{i + 1}.\1.shortcut.") for i in range(1, 5)),
    *((rf"^layer{i}\.(\d+)\.downsample\.1\.", rf"res{i + 1}.\1.shortcut.norm.") for i in range(1, 5)),
    *((rf"^layer{i}\.(\d+)\.conv(\d)\.", rf"res{i + 1}.\1.conv\2.") for i in range(1, 5)),
    *((rf"^layer{i}\.(\d+)\.bn(\d)\.", rf"res{i + 1}.\1.conv\2.norm.") for i in range(1, 5)),
]
#: torchvision's Swin, by those of the original, which detectron2 has too.
_SWIN = [
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    *((rf"^features\.{2 * i + 1}\.(\d+)\.mlp\.0\.", rf"layers.{i}.blocks.\1.mlp.fc1.") for i in range(4)),
    *((rf"^features\.{2 * i + 1}\.(\d+)\.mlp\.3\.", rf"layers.{i}.blocks.\1.mlp.fc2.") for i in range(4)),
    *((rf"^features\.{2 * i + 1}\.(\d+)\.", rf"layers.{i}.blocks.\1.") for i in range(4)),
    *((rf"^features\.{2 * i + 2}\.", f"layers.{i}.downsample.") for i in range(3)),
]


def _rename(state: State, rules: list[tuple[str, str]]) -> State:
    out: State = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            new, count = re.subn(pattern, replacement, name, count=1)
            if count:
                name = new
                break
        out[name] = tensor
    return out


def to_detectron2_names(state: Mapping[str, Tensor]) -> State:
    """A classifier's parameters under the names of detectron2's backbones, without its head.

    Args:
        state: of torchvision's or timm's ResNet or Swin, the original Swin, or a backbone or model of detectron2's.
    """
    found = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in state.items()}
    if "features.0.0.weight" in found:
        found = _rename(found, _SWIN)
    elif "conv1.weight" in found:
        found = _rename(found, _RESNET)
    elif "layers.3.downsample.reduction.weight" in found:  # timm's recent Swins merge patches before a stage, not after
        pattern = re.compile(r"^layers\.(\d)\.downsample\.")
        found = {pattern.sub(lambda m: f"layers.{int(m[1]) - 1}.downsample.", k): v for k, v in found.items()}
    return {k: v for k, v in found.items() if not _HEADS.search(k) and not k.startswith("sem_seg_head.")}


def _describe(state: State) -> dict[str, Any]:
    """The configuration of a backbone with these parameters, under detectron2's names."""

    def counts(pattern: str) -> list[int]:
        numbers: dict[int, set[int]] = {}
        for name in state:
            match = re.match(pattern, name)
            if match:
                numbers.setdefault(int(match[1]), set()).add(int(match[2]))
        return [len(numbers[stage]) for stage in sorted(numbers)]

    if "stem.conv1.weight" in state:
        depths = counts(r"res(\d)\.(\d+)\.")
        bottleneck = "res2.0.conv3.weight" in state
        last = "conv3" if bottleneck else "conv2"
        widths = [state[f"res{i}.0.{last}.weight"].shape[0] for i in range(2, 2 + len(depths))]
        kind = "bottleneck" if bottleneck else "basic"
        sizes = {"embedding_size": state["stem.conv1.weight"].shape[0], "hidden_sizes": widths}
        found = {**BACKBONES["r50"], "depths": depths, "layer_type": kind, **sizes}
    elif "patch_embed.proj.weight" in state:
        depths = counts(r"layers\.(\d)\.blocks\.(\d+)\.")
        tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(len(depths))]
        found = {
            **BACKBONES["swin-tiny"],
            "embed_dim": state["patch_embed.proj.weight"].shape[0],
            "depths": depths,
            "num_heads": [table.shape[1] for table in tables],
            "window_size": (round(tables[0].shape[0] ** 0.5) + 1) // 2,
        }
    else:
        raise KeyError("neither a ResNet's first convolution nor a Swin's first projection")
    if len(depths) != 4:
        raise KeyError(f"{len(depths)} stages in place of four")
    return found


def read_backbone(source: str | Path) -> tuple[dict[str, Any], State]:
    """Configuration, and parameters under this package's names, of a backbone that was trained as a classifier.

    Args:
        source: a directory in Hugging Face's format or its name on the hub, with a ResNet or Swin; or a file of
            parameters by name: `.pth` and `.pt` of torchvision, timm, the original Swin or detectron2, `.pkl` of
            detectron2, `.safetensors`.

    Raises:
        ValueError: naming the file, where it is none of these.
    """
    path = Path(source)
    if path.suffix in (".pth", ".pt", ".pkl", ".safetensors", ".bin"):
        state = to_detectron2_names(read_state(path))
        try:
            config = _describe(state)
        except (KeyError, IndexError) as error:
            reason = error.args[0] if error.args else ""
            raise ValueError(f"{path}: expected a ResNet or Swin of four stages; {reason} not there") from error
        return config, from_detectron2({f"backbone.{k}": v for k, v in state.items()})
    name = locate(source)
    theirs: Any = transformers.AutoConfig.from_pretrained(name)
    # AutoBackbone asks the hub about directories, too.
    readers: dict[str, Any] = {"resnet": transformers.ResNetBackbone, "swin": transformers.SwinBackbone}
    if theirs.model_type not in readers:
        raise ValueError(f"{source}: expected a ResNet or Swin; got {theirs.model_type!r}")
    body = readers[theirs.model_type].from_pretrained(name, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = body.config.to_dict()
    return config, {f"backbone.body.{k}": v for k, v in body.state_dict().items() if not _NEW.search(k)}


def load_backbone(model: Mask2Former, state: State, source: str) -> str:
    """Loads the parameters of a backbone into `model`, and returns one line on what was loaded.

    Args:
        model: with the backbone that :func:`read_backbone` describes.
        state: its parameters.
        source: their name in errors.

    Raises:
        WeightsError: parameters are missing, of another shape, or not the model's.
    """
    own = {f"backbone.{k}": v for k, v in model.backbone.state_dict().items()}
    state = {k: v for k, v in state.items() if not _NEW.search(k)}
    missing = [k for k in own if k not in state and not _NEW.search(k)]
    unexpected = [k for k in state if k not in own]
    mismatched = [
        f"{k}: expected {list(own[k].shape)}; got {list(v.shape)}"
        for k, v in state.items()
        if k in own and own[k].shape != v.shape
    ]
    if missing or unexpected or mismatched:
        raise WeightsError(source, missing, unexpected, mismatched)
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    count = sum(v.numel() for v in state.values())
    new = sum(v.numel() for k, v in model.state_dict().items() if k not in state)
    return f"backbone: {count / 1e6:.1f} M numbers from {source}; {new / 1e6:.1f} M new ones in the rest"
