"""Published weights: Hugging Face's format in both directions, and the original detectron2 checkpoints.

Parameters here have short names; two tables say what they are called elsewhere. Backbones are `transformers` modules,
and `transformers` itself reads and writes its files: whatever it renames between versions is its own affair.
"""

from __future__ import annotations

import itertools
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from m2f_model.config import Mask2FormerConfig
from m2f_model.files import write_atomically
from m2f_model.hub import locate

State = dict[str, Tensor]
#: Pairs of prefixes, here and there; `*` stands for a number, equal on both sides. The first that fits is taken.
Table = Sequence[tuple[str, str]]

_PIXEL = "model.pixel_level_module.decoder."
_QUERY = "model.transformer_module."
HUGGINGFACE: Table = [
    ("backbone.body.", "model.pixel_level_module.encoder."),
    ("pixel_decoder.layers.*.attention.", f"{_PIXEL}encoder.layers.*.self_attn."),
    ("pixel_decoder.layers.*.norm.", f"{_PIXEL}encoder.layers.*.self_attn_layer_norm."),
    ("pixel_decoder.layers.*.ffn.norm.", f"{_PIXEL}encoder.layers.*.final_layer_norm."),
    ("pixel_decoder.layers.*.ffn.", f"{_PIXEL}encoder.layers.*."),
    ("pixel_decoder.lateral.", f"{_PIXEL}adapter_1."),
    ("pixel_decoder.output.", f"{_PIXEL}layer_1."),
    ("pixel_decoder.", _PIXEL),
    ("transformer_decoder.query_features.", f"{_QUERY}queries_features."),
    ("transformer_decoder.query_positions.", f"{_QUERY}queries_embedder."),
    ("transformer_decoder.layers.*.cross_attention.", f"{_QUERY}decoder.layers.*.cross_attn."),
    ("transformer_decoder.layers.*.cross_norm.", f"{_QUERY}decoder.layers.*.cross_attn_layer_norm."),
    ("transformer_decoder.layers.*.self_attention.", f"{_QUERY}decoder.layers.*.self_attn."),
    ("transformer_decoder.layers.*.self_norm.", f"{_QUERY}decoder.layers.*.self_attn_layer_norm."),
    ("transformer_decoder.layers.*.ffn.norm.", f"{_QUERY}decoder.layers.*.final_layer_norm."),
    ("transformer_decoder.layers.*.ffn.", f"{_QUERY}decoder.layers.*."),
    ("transformer_decoder.norm.", f"{_QUERY}decoder.layernorm."),
    ("transformer_decoder.mask_head.0.", f"{_QUERY}decoder.mask_predictor.mask_embedder.0.0."),
    ("transformer_decoder.mask_head.2.", f"{_QUERY}decoder.mask_predictor.mask_embedder.1.0."),
    ("transformer_decoder.mask_head.4.", f"{_QUERY}decoder.mask_predictor.mask_embedder.2.0."),
    ("transformer_decoder.class_head.", "class_predictor."),
    ("transformer_decoder.", _QUERY),
]

_PIXEL = "sem_seg_head.pixel_decoder."
_QUERY = "sem_seg_head.predictor."
DETECTRON2: Table = [
    ("pixel_decoder.input_projections.", f"{_PIXEL}input_proj."),
    ("pixel_decoder.level_embed", f"{_PIXEL}transformer.level_embed"),
    ("pixel_decoder.layers.*.attention.", f"{_PIXEL}transformer.encoder.layers.*.self_attn."),
    ("pixel_decoder.layers.*.norm.", f"{_PIXEL}transformer.encoder.layers.*.norm1."),
    ("pixel_decoder.layers.*.ffn.norm.", f"{_PIXEL}transformer.encoder.layers.*.norm2."),
    ("pixel_decoder.layers.*.ffn.fc1.", f"{_PIXEL}transformer.encoder.layers.*.linear1."),
    ("pixel_decoder.layers.*.ffn.fc2.", f"{_PIXEL}transformer.encoder.layers.*.linear2."),
    ("pixel_decoder.lateral.1.", f"{_PIXEL}adapter_1.norm."),
    ("pixel_decoder.lateral.0.", f"{_PIXEL}adapter_1."),
    ("pixel_decoder.output.1.", f"{_PIXEL}layer_1.norm."),
    ("pixel_decoder.output.0.", f"{_PIXEL}layer_1."),
    ("pixel_decoder.mask_projection.", f"{_PIXEL}mask_features."),
    ("transformer_decoder.query_features.", f"{_QUERY}query_feat."),
    ("transformer_decoder.query_positions.", f"{_QUERY}query_embed."),
    ("transformer_decoder.input_projections.", f"{_QUERY}input_proj."),
    ("transformer_decoder.level_embed.", f"{_QUERY}level_embed."),
    ("transformer_decoder.layers.*.cross_attention.", f"{_QUERY}transformer_cross_attention_layers.*.multihead_attn."),
    ("transformer_decoder.layers.*.cross_norm.", f"{_QUERY}transformer_cross_attention_layers.*.norm."),
    ("transformer_decoder.layers.*.self_attention.", f"{_QUERY}transformer_self_attention_layers.*.self_attn."),
    ("transformer_decoder.layers.*.self_norm.", f"{_QUERY}transformer_self_attention_layers.*.norm."),
    ("transformer_decoder.layers.*.ffn.norm.", f"{_QUERY}transformer_ffn_layers.*.norm."),
    ("transformer_decoder.layers.*.ffn.fc1.", f"{_QUERY}transformer_ffn_layers.*.linear1."),
    ("transformer_decoder.layers.*.ffn.fc2.", f"{_QUERY}transformer_ffn_layers.*.linear2."),
    ("transformer_decoder.norm.", f"{_QUERY}decoder_norm."),
    ("transformer_decoder.class_head.", f"{_QUERY}class_embed."),
    ("transformer_decoder.mask_head.0.", f"{_QUERY}mask_embed.layers.0."),
    ("transformer_decoder.mask_head.2.", f"{_QUERY}mask_embed.layers.1."),
    ("transformer_decoder.mask_head.4.", f"{_QUERY}mask_embed.layers.2."),
    # ResNet. Its first stage is called res2, its convolutions conv1 to conv3.
    ("backbone.body.embedder.embedder.normalization.", "backbone.stem.conv1.norm."),
    ("backbone.body.embedder.embedder.convolution.", "backbone.stem.conv1."),
    *(
        (f"backbone.body.encoder.stages.{s}.layers.*.{ours}{part}", f"backbone.res{s + 2}.*.{theirs}{suffix}")
        for s in range(4)
        for ours, theirs in [("shortcut.", "shortcut."), *((f"layer.{i}.", f"conv{i + 1}.") for i in range(3))]
        for part, suffix in [("normalization.", "norm."), ("convolution.", "")]
    ),
    # Swin.
    ("backbone.body.swin.embeddings.patch_embeddings.projection.", "backbone.patch_embed.proj."),
    ("backbone.body.swin.embeddings.norm.", "backbone.patch_embed.norm."),
    *(
        (f"backbone.body.swin.encoder.layers.*.blocks.*.{ours}", f"backbone.layers.*.blocks.*.{theirs}")
        for ours, theirs in [
            ("layernorm_before.", "norm1."),
            ("layernorm_after.", "norm2."),
            ("mlp.", "mlp."),
            ("attention.o_proj.", "attn.proj."),
            ("attention.qkv.", "attn.qkv."),
            ("attention.relative_position_bias.", "attn."),
        ]
    ),
    ("backbone.body.swin.encoder.layers.*.downsample.", "backbone.layers.*.downsample."),
    *((f"backbone.body.hidden_states_norms.stage{i + 1}.", f"backbone.norm{i}.") for i in range(4)),
]

#: In detectron2 checkpoints, but no weights: derived from the configuration.
_DERIVED = re.compile(r"relative_position_index$|^criterion\.empty_weight$|^pixel_(mean|std)$")
#: Not in detectron2 checkpoints, and without influence: a counter, and a norm that no feature map passes.
_UNUSED = re.compile(r"num_batches_tracked$|^backbone\.body\.swin\.layernorm\.")


def is_unused(name: str) -> bool:
    """True if this is a parameter that detectron2 checkpoints lack; it has no influence on the outputs."""
    return _UNUSED.search(name) is not None


def rename(names: Iterable[str], table: Table, reverse: bool = False) -> dict[str, str]:
    """Each name with its counterpart; a name that no prefix fits stays as it is."""
    rules = []
    for pair in table:
        source, target = reversed(pair) if reverse else pair
        pattern = re.escape(source).replace(r"\*", r"(\d+)")
        parts = target.split("*")
        replacement = parts[0] + "".join(rf"\g<{i}>{part}" for i, part in enumerate(parts[1:], 1))
        rules.append((re.compile(pattern), replacement))
    renamed = {}
    for name in names:
        match, replacement = next(((m, to) for rule, to in rules if (m := rule.match(name))), (None, ""))
        renamed[name] = name if match is None else match.expand(replacement) + name[match.end() :]
    return renamed


def _split(state: State, fused: str, parts: tuple[str, str, str]) -> State:
    """`fused` is a suffix without weight or bias; its thirds along the rows get the suffixes `parts`."""
    out: State = {}
    for name, tensor in state.items():
        for kind in ("weight", "bias"):
            if name.endswith(fused + kind):
                stem = name[: -len(fused + kind)]
                out |= {stem + p + kind: t for p, t in zip(parts, tensor.chunk(3), strict=True)}
                break
        else:
            out[name] = tensor
    return out


def _fuse(state: State, fused: str, parts: tuple[str, str, str], within: str) -> State:
    """The inverse of `_split`, for names that start with `within`. Incomplete triples stay as they are."""
    out: State = {}
    first, *_ = parts
    for name, tensor in state.items():
        kind = name.rpartition(".")[2]
        part = next((p for p in parts if name.startswith(within) and name.endswith(p + kind)), None)
        stem = "" if part is None else name[: -len(part + kind)]
        if part is None or not all(stem + p + kind in state for p in parts):
            out[name] = tensor
        elif part == first:
            out[stem + fused + kind] = torch.cat([state[stem + p + kind] for p in parts])
    return out


_SELF_ATTENTION = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
_SWIN_ATTENTION = ("attention.q_proj.", "attention.k_proj.", "attention.v_proj.")


def to_huggingface(state: State) -> State:
    """Parameters of this package under the names of `transformers`' model."""
    names = rename(state, HUGGINGFACE)
    return _split({names[k]: v for k, v in state.items()}, "self_attn.in_proj_", _SELF_ATTENTION)


def from_huggingface(state: State) -> State:
    """The inverse of :func:`to_huggingface`."""
    state = _fuse(state, "self_attn.in_proj_", _SELF_ATTENTION, within="model.transformer_module.")
    names = rename(state, HUGGINGFACE, reverse=True)
    return {names[k]: v for k, v in state.items() if k != "criterion.empty_weight"}


def to_detectron2(state: State) -> State:
    """Parameters of this package under the names of the original checkpoints; what those lack is left out."""
    state = {k: v for k, v in state.items() if not is_unused(k)}
    state = _fuse(state, "attention.qkv.", _SWIN_ATTENTION, within="backbone.")
    names = rename(state, DETECTRON2)
    return {names[k]: v for k, v in state.items()}


def from_detectron2(state: State) -> State:
    """The inverse of :func:`to_detectron2`; understands the names of early releases too."""
    current = {}
    for name, tensor in state.items():
        # Early releases: no pixel_decoder in the names, and query features called static.
        name = re.sub(r"^sem_seg_head\.(?!predictor\.|pixel_decoder\.)", "sem_seg_head.pixel_decoder.", name)
        name = name.replace(".predictor.static_query.", ".predictor.query_feat.")
        if not _DERIVED.search(name):
            current[name] = tensor
    names = rename(current, DETECTRON2, reverse=True)
    return _split({names[k]: v for k, v in current.items()}, "attention.qkv.", _SWIN_ATTENTION)


# ---------------------------------------------------------------- loading


class WeightsError(ValueError):
    """A checkpoint that does not fit the model.

    Attributes:
        missing, unexpected, mismatched: names, all of them; those of another shape with both shapes.
        hint: presets that the checkpoint fits, if it is an original one.
    """

    def __init__(self, source: str, missing: list[str], unexpected: list[str], mismatched: list[str]) -> None:
        super().__init__(source)
        self.source, self.missing, self.unexpected, self.mismatched = source, missing, unexpected, mismatched
        self.hint: list[str] = []

    @property
    def _lists(self) -> dict[str, list[str]]:
        lists = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.mismatched}
        return {kind: names for kind, names in lists.items() if names}

    def __str__(self) -> str:
        found = [f"{len(names)} {kind}:\n  " + "\n  ".join(names) for kind, names in self._lists.items()]
        return f"{self.source}: expected the weights of this model; " + "\n".join(found) + self._fits("\n")

    @property
    def summary(self) -> str:
        """The same in one line."""
        found = [f"{len(names)} {kind} ({names[0]}{', ...' * (len(names) > 1)})" for kind, names in self._lists.items()]
        return f"{self.source}: expected the weights of this model; " + ", ".join(found) + self._fits("; ")

    def _fits(self, separator: str) -> str:
        return f"{separator}they fit {' or '.join(self.hint)}" if self.hint else ""


def fitting_presets(state: State) -> list[str]:
    """Presets that `state`, under this package's names, has the backbone, labels and queries of."""
    try:
        labels = state["transformer_decoder.class_head.bias"].shape[0] - 1
        queries = state["transformer_decoder.query_features.weight"].shape[0]
    except KeyError:
        return []

    def fits(config: Mask2FormerConfig) -> bool:
        backbone: Any = config.backbone
        if backbone["model_type"] == "swin":
            blocks, first = "backbone.body.swin.encoder.layers.{}.blocks.{}.", "patch_embeddings.projection.weight"
            first, width = f"backbone.body.swin.embeddings.{first}", backbone["embed_dim"]
        else:
            blocks, first = "backbone.body.encoder.stages.{}.layers.{}.", "backbone.body.embedder.embedder."
            first, width = f"{first}convolution.weight", 64
        if (config.num_labels, config.num_queries) != (labels, queries):
            return False
        if first not in state or state[first].shape[0] != width:
            return False
        return [counts(blocks, i) for i in range(4)] == list(backbone["depths"])

    def counts(blocks: str, stage: int) -> int:
        """Blocks of a stage."""
        numbers = itertools.count()
        return next(n for n in numbers if not any(name.startswith(blocks.format(stage, n)) for name in state))

    return [name for name in Mask2FormerConfig.presets() if fits(Mask2FormerConfig.preset(name))]


def load_exactly(model: nn.Module, state: State, source: str) -> None:
    """Load `state`, or raise WeightsError and change nothing."""
    own = model.state_dict()
    mismatched = [
        f"{k}: expected {list(own[k].shape)}; got {list(v.shape)}"
        for k, v in state.items()
        if k in own and own[k].shape != v.shape
    ]
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or unexpected or mismatched:
        raise WeightsError(source, missing, unexpected, mismatched)
    model.load_state_dict(state)


def read_huggingface(
    name_or_path: str | Path, config: Mask2FormerConfig | None
) -> tuple[Mask2FormerConfig, nn.Module, State]:
    """Configuration, backbone and parameters (under this package's names) of a checkpoint in Hugging Face's format."""
    name_or_path = locate(name_or_path)
    reader: Any = transformers.Mask2FormerForUniversalSegmentation
    theirs, info = reader.from_pretrained(
        name_or_path,
        config=None if config is None else config.to_transformers(),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that all of them are listed, below
    )
    mismatched = [f"{k}: expected {list(own)}; got {list(found)}" for k, found, own in info["mismatched_keys"]]
    missing = [k for k in info["missing_keys"] if k != "criterion.empty_weight"]
    if missing or info["unexpected_keys"] or mismatched:
        raise WeightsError(str(name_or_path), sorted(missing), sorted(info["unexpected_keys"]), sorted(mismatched))
    if config is None:
        config = replace(
            Mask2FormerConfig.from_transformers(theirs.config), **_hub_settings(name_or_path, theirs.config)
        )
    return config, theirs.model.pixel_level_module.encoder, from_huggingface(theirs.state_dict())


def _hub_settings(name_or_path: str | Path, config: Any) -> dict[str, Any]:
    """Fields of a configuration that config.json has no words for: how images are prepared, and the task.

    Warns:
        UserWarning: where neither preprocessor_config.json nor this package says how, or what it says is not done here.
    """
    fields: dict[str, Any] = {}
    ours = getattr(config, "m2f", None) or {}
    if "semantic_only" not in ours and str(name_or_path).rstrip("/").endswith("-semantic"):
        fields["semantic_only"] = True  # as the published checkpoints are called
    try:
        reader: Any = transformers.Mask2FormerImageProcessorPil
        found, _ = reader.get_image_processor_dict(name_or_path)
    except OSError:
        if "image_size" not in ours:
            warnings.warn(
                f"{name_or_path}: no preprocessor_config.json says how to prepare images: they are resized to "
                f"{Mask2FormerConfig.image_size} (another: m2f segment --size) and normalised as ImageNet's",
                stacklevel=4,
            )
        return fields
    odd = [f"{k}={found[k]}" for k in ("do_resize", "do_rescale", "do_normalize") if not found.get(k, True)]
    if found.get("resample", Image.Resampling.BILINEAR) != Image.Resampling.BILINEAR:
        odd.append(f"resample={found['resample']}")
    size, longest = found.get("size"), found.get("max_size", found.get("_max_size"))
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": longest}
    size = dict(size or {})
    if size.get("shortest_edge") and size.get("longest_edge", longest):
        fields["image_size"] = (int(size["shortest_edge"]), int(size.get("longest_edge") or longest))
    elif size.get("height") and size.get("width"):
        fields |= {"image_size": (int(size["height"]), int(size["width"])), "keep_aspect_ratio": False}
    elif size:
        odd.append(f"size={size}")
    if found.get("image_mean") and found.get("image_std"):
        factor = found.get("rescale_factor") or 1 / 255
        for name, values in (("pixel_mean", found["image_mean"]), ("pixel_std", found["image_std"])):
            fields[name] = tuple(round(float(x) / factor, 3) for x in values)
    if odd:
        warnings.warn(
            f"{name_or_path}: preprocessor_config.json says {', '.join(odd)}; here images are resized (bilinear) and "
            "normalised all the same",
            stacklevel=4,
        )
    return fields


def write_preprocessor(config: Mask2FormerConfig, path: str | Path) -> None:
    """Write preprocessor_config.json, by which `transformers` prepares images as this package does."""
    sides = ("shortest_edge", "longest_edge") if config.keep_aspect_ratio else ("height", "width")
    content = {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": True,
        "size": dict(zip(sides, config.image_size, strict=True)),
        "size_divisor": 32,
        "resample": int(Image.Resampling.BILINEAR),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [x / 255 for x in config.pixel_mean],
        "image_std": [x / 255 for x in config.pixel_std],
        "do_reduce_labels": False,
        "ignore_index": 255,
    }
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(Path(path) / "preprocessor_config.json", lambda file: file.write(text.encode()))


def write_huggingface(model: nn.Module, config: Mask2FormerConfig, path: str | Path) -> None:
    """Write `model`'s parameters as safetensors, config.json and preprocessor_config.json into the directory `path`."""
    with torch.device("meta"):
        theirs = transformers.Mask2FormerForUniversalSegmentation(config.to_transformers())
    state = to_huggingface(model.state_dict())
    empty_weight = torch.ones(config.num_labels + 1, device="cpu")
    empty_weight[-1] = config.no_object_weight
    missing, unexpected = theirs.load_state_dict({**state, "criterion.empty_weight": empty_weight}, False, True)
    if missing or unexpected:
        raise WeightsError("config.backbone", list(missing), list(unexpected), [])
    theirs.save_pretrained(path)
    write_preprocessor(config, path)


#: What the checkpoint of a run has; "config" is missing from those of the first releases.
_CHECKPOINT = ("recipe", "step", "model", "optimizer", "scaler", "random")


def read_checkpoint(path: str | Path, where: Any = "cpu", *, needs_config: bool = True) -> dict[str, Any]:
    """The content of the `checkpoint.pth` of a training run.

    Args:
        path: the file.
        where: device of its tensors.
        needs_config: whether the model is to be made from it alone.

    Raises:
        ValueError: where it is damaged or something else.
    """
    try:
        state = torch.load(path, map_location=where, weights_only=True)
        missing = {*_CHECKPOINT, *(["config"] if needs_config else [])} - set(state)
        if missing:
            raise KeyError(f"{', '.join(sorted(missing))} missing")
    except (PermissionError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of many types, from what was taken for a zip file or a pickle
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise ValueError(
            f"{path}: expected a checkpoint of `m2f train`; it is damaged or something else "
            f"({type(error).__name__}: {reason})"
        ) from error
    return dict(state)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers and numpy arrays; anything else in a file could run code."""

    _ALLOWED = re.compile(
        r"collections\.OrderedDict|_codecs\.encode|numpy\.(ndarray|dtype)|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    )

    def find_class(self, module: str, name: str) -> Any:
        if not self._ALLOWED.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"expected arrays and containers alone; found {module}.{name}")
        return super().find_class(module, name)


def _unpickle(file: IO[bytes]) -> Any:
    return _ArraysOnly(file, encoding="latin1").load()


def read_detectron2(path: str | Path) -> State:
    """Parameters, under this package's names, of an original checkpoint: `.pkl` of arrays, or `.pth`.

    Raises:
        ValueError: naming the file, where it is neither.
    """
    return from_detectron2(read_state(path, "a detectron2 checkpoint"))


def read_state(path: str | Path, what: str = "parameters by name") -> State:
    """Parameters under the names of a file: `.pkl` of arrays, `.safetensors`, or what `torch.save` writes. No code in
    it is run.

    Raises:
        ValueError: naming the file, where it is none of them; `what` says what was expected.
    """
    path = Path(path)
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                content = _unpickle(file)
        elif path.suffix == ".safetensors":
            path.stat()
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        kinds = ".pkl or .pth" if "detectron2" in what else ".pth, .pkl or .safetensors"
        raise ValueError(f"{path}: expected {what}, {kinds}; {error}") from error
    weights = content
    for key in ("model", "state_dict"):
        weights = weights.get(key, weights) if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, (np.ndarray, Tensor)) for v in weights.values()):
        raise ValueError(f"{path}: expected {what}, names with arrays under 'model'")
    return {k: torch.as_tensor(v, device="cpu") for k, v in weights.items()}
