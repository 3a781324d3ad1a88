"""Other people's models and modules before and after: `python -m benchmarks.run --op integrations`, `--op eomt`, `--op
mmcv`, `--op id_maps`, `--op row_column_bias`.

Models of `transformers` come from configurations, with random weights. Sizes are those of the published models; no
checkpoint is downloaded, so masks and selected queries mean nothing, while the work is the same, but for masked
attention, whose time depends on the masks a little.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import m2f_kernels
from benchmarks.cases import (
    Benchmark,
    Case,
    Data,
    Implementation,
    Scale,
    Verdict,
    missing,
    ratio,
    relative_l2,
)  # fmt: skip
from benchmarks.inputs import photograph
from benchmarks.measure import MIB, bytes_of
from m2f_model import bench

BEFORE, AFTER = "before", "after"
#: Calls by name, of which the last is the published one.
Calls = dict[str, Callable[[], Sequence[Tensor]]]


def twins(model: nn.Module) -> dict[str, nn.Module]:
    """A model before and after `accelerate`, with the same weights."""
    return {AFTER: m2f_kernels.accelerate(copy.deepcopy(model)).model, BEFORE: model}


# ---------------------------------------------------------------- models of transformers

#: Side of the image in a quick run, and in the call that warms a process up before its memory is measured; Grounding
#: DINO chooses 900 queries among that many positions.
SMALL = 256


@dataclass(frozen=True)
class Model:
    """One row of the table.

    Attributes:
        name: what the row is called.
        build: makes the model.
        size: side of the image.
        aim: the ratio of times before/after that is aimed at.
        targets: number of targets of a training step; None for inference.
        more: inputs beside an image [1, 3, s, s].
    """

    name: str
    build: Callable[[], nn.Module]
    size: int
    aim: float
    targets: int | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict, hash=False)

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build()
        _spread(model)
        return model.train(self.targets is not None)

    def arguments(self, quick: bool) -> dict[str, Any]:
        size = SMALL if quick else self.size
        arguments = {"pixel_values": photograph(size, size)} | {name: x.clone() for name, x in self.more.items()}
        if self.targets is not None:
            generator = torch.Generator().manual_seed(1)
            corners = torch.randint(0, size // 2, (self.targets, 2), generator=generator)
            masks = torch.zeros(self.targets, size, size)
            for mask, (y, x) in zip(masks, corners.tolist(), strict=True):
                mask[y : y + size // 3, x : x + size // 4] = 1
            arguments["mask_labels"] = [masks]
            arguments["class_labels"] = [torch.randint(0, 80, (self.targets,), generator=generator)]
        return arguments


def _spread(model: nn.Module) -> None:
    """Weights with which signals neither vanish nor grow, and sampling points that lie apart."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=(parameter.dim() / 2 / parameter[0].numel()) ** 0.5)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter):
            nn.init.ones_(weight)
        offsets = getattr(module, "sampling_offsets", None)
        if isinstance(offsets, nn.Linear):
            nn.init.normal_(offsets.weight, std=2 * offsets.in_features**-0.5)


def _model(name: str, **options: Any) -> nn.Module:
    """A model of `transformers` with these options of its configuration, and random weights."""
    kind = getattr(transformers, name)
    return kind(kind.config_class(**options))


def _swin(first: int) -> Any:
    return transformers.SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.0,
        out_features=[f"stage{i}" for i in range(first, 5)],
    )


def _mask2former() -> nn.Module:
    return _model("Mask2FormerForUniversalSegmentation", backbone_config=_swin(1), num_labels=80)


_RESNET = {"out_features": ["stage2", "stage3", "stage4"]}
_NO_TIMM = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
#: "a cat. a remote control." in BERT's tokens; a task of OneFormer.
_TEXT = torch.tensor([[101, 1037, 4937, 1012, 1037, 6556, 2491, 1012, 102]])
_TASK = torch.arange(77)[None]

MODELS = (
    Model("Mask2Former Swin-T, 1024²", _mask2former, 1024, aim=1.7),
    Model("Mask2Former Swin-T, training step, 512², 10 targets", _mask2former, 512, aim=1.6, targets=10),
    Model(
        "OneFormer Swin-T, 512²",
        lambda: _model("OneFormerForUniversalSegmentation", backbone_config=_swin(1), num_labels=150),
        512, aim=1.4, more={"task_inputs": _TASK},
    ),
    Model(
        "Deformable DETR ResNet-50, 800²",
        lambda: _model("DeformableDetrForObjectDetection", backbone_config=transformers.ResNetConfig(**_RESNET),
                       num_labels=91, **_NO_TIMM),
        800, aim=1.3,
    ),
    Model(
        "Grounding DINO Swin-T, 800²",
        lambda: _model("GroundingDinoForObjectDetection", backbone_config=_swin(2),
                       text_config=transformers.BertConfig(), **_NO_TIMM),
        800, aim=1.3, more={"input_ids": _TEXT},
    ),
    Model(
        "RT-DETR ResNet-50, 640²",
        lambda: _model("RTDetrForObjectDetection", backbone_config=transformers.RTDetrResNetConfig(**_RESNET),
                       num_labels=80),
        640, aim=1.3,
    ),
)  # fmt: skip

#: The part of a call that deformable attention takes, among the stages of a row before.
ATTENTION = "deformable attention"
#: Largest difference of outputs, relative to the largest output, of a result that is timed; and of the loss of a
#: training step, whose points are drawn anew.
TOLERANCE, SAMPLED = 1e-3, 1e-2
#: Least times by which peak memory shrinks.
MEMORY_AIMS = {MODELS[0].name: 2.0}


def difference_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Largest absolute difference of two lists of outputs, and their largest finite value."""
    difference = largest = 0.0
    for x, y in zip(before, after, strict=True):
        first, second = x.float(), y.float()
        # Grounding DINO's logits of absent tokens are -inf; a NaN is infinitely wrong.
        apart = torch.where(first == second, 0, (first - second).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        difference = max(difference, float(apart.max()))
        largest = max(largest, float(first[first.isfinite()].abs().max()))
    return difference, largest


@contextmanager
def choices(recorded: list[Tensor], replay: bool = False) -> Iterator[None]:
    """Record which positions `torch.topk` chooses inside a `with` block, or choose those again.

    Detectors choose their queries by score. Two of almost the same score may change places, and everything that
    follows depends on their order: to compare outputs, the second call takes the first's choices, which have to be
    choices by its own scores as well.
    """
    topk = torch.topk

    def choose(input: Tensor, k: int, dim: int = -1, **options: Any) -> tuple[Tensor, Tensor]:
        values, indices = topk(input, k, dim=dim, **options)
        if not replay:
            recorded.append(indices)
            return values, indices
        again = recorded.pop(0)
        chosen = input.gather(dim, again)
        error, largest = difference_of([values], [chosen])
        if error > TOLERANCE * largest:
            raise RuntimeError(f"wrong result: other queries are chosen, by scores that differ by {error:.3g}")
        return chosen, again

    with mock.patch.object(torch, "topk", choose):
        yield


class Subject:
    """A model that is called before and after, as a user calls it."""

    def __init__(self, case: Model, scale: Scale) -> None:
        self.training, self.models = case.targets is not None, twins(case.make().to(scale.device))
        self.arguments, self.small = (
            tree_map_only(Tensor, lambda x: x.to(scale.device), case.arguments(quick)) for quick in (scale.quick, True)
        )

    def call(self, name: str, arguments: dict[str, Any]) -> list[Tensor]:
        """The outputs that are compared: predictions, or the loss of a training step."""
        torch.manual_seed(0)
        with torch.set_grad_enabled(self.training):
            found = self.models[name](**arguments)
            if self.training:
                found.loss.backward()
                self.models[name].zero_grad()
                return [found.loss.detach().reshape(1)]
        names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
        return [found[name] for name in names if name in found]


_subject = cache(Subject)


def _integration(model: Model, scale: Scale) -> Case:
    def calls() -> Calls:
        subject = _subject(model, scale)
        return {name: partial(subject.call, name, subject.arguments) for name in (AFTER, BEFORE)}

    training = model.targets is not None
    return pair(model.name, calls, None, training, replay=not training, threads=None, spec=(model, scale))


def _compared(case: Case, implementation: Implementation, data: Data, results: Sequence[Tensor]) -> Verdict:
    difference, largest = difference_of([x.to(results[0].device) for x in data.truth.values()], results)
    return Verdict(difference <= (SAMPLED if case.backward else TOLERANCE) * largest, difference / largest)


def _stages(case: Case, implementation: Implementation) -> dict[str, float]:
    if implementation.name == AFTER:
        return {}
    subject = _subject(*case.spec)
    modules = subject.models[BEFORE].modules()
    parts = [(ATTENTION, x) for x in modules if type(x).__name__.endswith("MultiscaleDeformableAttention")]
    with bench.watched(parts, case.spec[1].device) as taken:
        subject.call(BEFORE, subject.arguments)
    return {ATTENTION: sum(taken.get(ATTENTION, ())) * 1e3}


def _peak(case: Case, implementation: Implementation) -> float:
    """Peak MiB above the weights and what is there before the call, outputs included."""
    subject, name = _subject(*case.spec), implementation.name
    subject.call(name, subject.small)
    return bench.peak_mib(lambda: subject.call(name, subject.arguments), case.spec[1].device)[0]


#: They are for the first allocator setting.
FIGURES = [
    ratio(model.name, field, BEFORE, AFTER, label, aim)
    for model in MODELS
    for field, aim, label in (
        ("median_ms", model.aim, "faster than before"),
        ("memory_extra_mib", MEMORY_AIMS.get(model.name), "less peak memory above weights"),
    )
]

INTEGRATIONS = Benchmark(
    op="integrations",
    title="Models of `transformers` before and after `accelerate`",
    description=(
        "Batch 1, float32, eager, the same random weights. Peak memory is above the weights and what was there before "
        "the call, outputs included. Stage: what the forward of the deformable attention modules takes of a call "
        "before; where nothing else is replaced, a ratio cannot exceed 1 / (1 - its share). Error: largest difference "
        "of predictions relative to the largest, with the original's choice of queries where a detector chooses; of "
        "the loss for a training step, whose points are drawn anew."
    ),
    cases=lambda scale: [_integration(model, scale) for model in MODELS],
    figures={"cpu": FIGURES, "cuda": FIGURES},
    check=_compared,
    operators=("ms_deform_attn_from_offsets",),
    long_ms=60_000.0,
    stages=_stages,
    peak=_peak,
)

# ---------------------------------------------------------------- parts of models


def pair(
    name: str,
    make: Callable[[], Calls],
    tolerance: float | None,
    backward: bool = True,
    names: Sequence[str] = (AFTER, BEFORE),
    ours: Sequence[str] = (AFTER,),
    unavailable: Callable[[], str | None] = lambda: None,
    replay: bool = False,
    **options: Any,
) -> Case:
    """A case of calls. Results may differ by `tolerance` from the last one's; with None they only have to be finite.
    With `replay` the first call, which is checked, takes the queries that the last one's chose."""
    made = cache(make)

    def call(arguments: dict[str, Any], which: str) -> list[Tensor]:
        chosen = arguments["chosen"]
        with torch.enable_grad(), choices(chosen, replay=True) if chosen else nullcontext():
            return [x.detach() for x in made()[which]()]

    def build() -> Data:
        chosen: list[Tensor] = []
        with choices(chosen):
            results = [] if unavailable() else call({"chosen": []}, list(made())[-1])
        truth = {str(i): x for i, x in enumerate(results)}
        kept = {f"choice {i}": x for i, x in enumerate(chosen) if replay}
        return Data(kept, truth, [], tuple(truth))

    implementations = [
        Implementation(which, partial(call, which=which), lambda inputs, levels: {"chosen": list(inputs.values())},
                       which in ours, unavailable, counts_writes=False)
        for which in names
    ]  # fmt: skip
    way = "forward+backward" if backward else "forward"
    options = {"threads": 1, "spec": tolerance} | options
    return Case(name, name, way, implementations, memory=True, headline=True, build=build, **options)


def _close(case: Case, implementation: Implementation, data: Data, results: Sequence[Tensor]) -> Verdict:
    """Of all together: some gradients are zero but for rounding."""
    if case.spec is None or implementation.name == WITHOUT:
        return Verdict(all(bool(x.isfinite().all()) for x in results), math.nan)
    found, truth = (torch.cat([x.flatten() for x in tensors]) for tensors in (results, data.truth.values()))
    error = relative_l2(found, truth)
    return Verdict(error <= case.spec, error)


QUERIES, PREFIX, SIDE, CHANNELS, HEADS = 200, 5, 40, 1024, 16


def _block(what: str) -> Calls:
    """Before and after of a block ("block") or of its attention ("attention")."""
    from transformers.models.eomt.modeling_eomt import EomtLayer

    from m2f_kernels.integrations.transformers import eomt as integration

    torch.manual_seed(0)
    config = transformers.EomtConfig(hidden_size=CHANNELS, num_attention_heads=HEADS, attn_implementation="sdpa")
    blocks = twins(EomtLayer(config).train())
    tokens = torch.randn(1, QUERIES + PREFIX + SIDE**2, CHANNELS)
    grad = torch.randn_like(tokens)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centre = torch.rand(2, QUERIES, 1, 1) * SIDE
    attend = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 64).flatten(1)[None]

    def published_mask() -> Tensor:
        mask = torch.ones(1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
        mask[:, :QUERIES, QUERIES + PREFIX :] = attend
        mask = mask[:, None].expand(-1, HEADS, -1, -1)
        return mask.float().masked_fill(~mask, -1e9)

    def packed() -> integration.QueryMask:
        return integration.QueryMask(m2f_kernels.pack_attention_mask(attend), QUERIES + PREFIX)

    def call(name: str, mask: Callable[[], Any]) -> tuple[Tensor, ...]:
        leaf = tokens.detach().requires_grad_()
        part = blocks[name] if what == "block" else blocks[name].attention
        out = part(leaf, mask())
        out = out if isinstance(out, Tensor) else out[0]
        return out, *torch.autograd.grad(out, [leaf, *part.parameters()], grad)

    return {AFTER: partial(call, AFTER, packed), BEFORE: partial(call, BEFORE, published_mask)}


def _step(size: int) -> Calls:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
    if size > 640:
        sizes = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 6}
    options = {"image_size": size, "patch_size": 16, "num_labels": 133}
    models = twins(_model("EomtForUniversalSegmentation", **sizes, **options).train())
    pixels = torch.randn(1, 3, size, size)
    masks = (torch.rand(10, size // 32, size // 32) > 0.7).repeat_interleave(32, 1).repeat_interleave(32, 2)
    labels = {"mask_labels": [masks.float()], "class_labels": [torch.arange(10)]}

    def call(model: nn.Module) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        loss = model(pixels, **labels).loss
        used = [p for p in model.parameters() if p.requires_grad]
        return loss, *(g for g in torch.autograd.grad(loss, used, allow_unused=True) if g is not None)

    return {name: partial(call, model) for name, model in models.items()}


EOMT = Benchmark(
    op="eomt",
    title="EoMT before and after `accelerate`",
    description=(
        "A block of EoMT-L at 640 x 640, forward and backward, and its attention alone: tokens [1, 1805, 1024] (200 "
        "queries, 5 prefix tokens, 40 x 40 patches) and the bool mask of queries and patches in, the output and the "
        "gradients of tokens and weights out. Before: the mask as `transformers` makes it of all pairs for each head, "
        "and its block with SDPA; after: the bits, and the accelerated block. A step: the whole model of ViT-S's size "
        "(at 1280 x 1280 with 3 heads and 6 layers), one image with 10 targets, whose losses draw other points. CPU "
        "time of one thread."
    ),
    cases=lambda scale: [
        *(pair(what, partial(_block, what), 1e-4) for what in ("attention", "block")),
        *(pair(f"step, {size}", partial(_step, size), None) for size in (640, 1280)),
    ],
    check=_close,
    operators=("masked_attention",),
    cpu_time=True,
)

# ---------------------------------------------------------------- mmcv and mmdet


def provide_extension() -> None:
    """mmcv imports its extension for every operator; where it was not built, something that only looks like it."""
    if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = mock.MagicMock()


#: A module, and the inputs of a call by name.
Call = tuple[nn.Module, dict[str, Any]]


def attention(side: int) -> Call:
    """One encoder layer's attention of a `side`² image: strides 32, 16 and 8, every position a query."""
    from mmcv.ops import MultiScaleDeformableAttention

    sizes = [(side // s, side // s) for s in (32, 16, 8)]
    length = sum(h * w for h, w in sizes)
    module = MultiScaleDeformableAttention(256, 8, 3, 4, dropout=0.0, batch_first=True)
    query, points = torch.randn(1, length, 256), torch.rand(1, length, 3, 2)
    shapes = torch.tensor(sizes)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    given = {"query": query, "reference_points": points, "spatial_shapes": shapes, "level_start_index": starts}
    return module, given


def pixel_decoder(side: int) -> Call:
    """MSDeformAttnPixelDecoder as mmdet's Mask2Former with a ResNet-50 configures it."""
    from mmdet.models.layers import MSDeformAttnPixelDecoder
    from mmengine.config import ConfigDict

    attention_config = {"embed_dims": 256, "num_heads": 8, "num_levels": 3, "num_points": 4, "batch_first": True}
    ffn = {"embed_dims": 256, "feedforward_channels": 1024}
    channels, strides = [256, 512, 1024, 2048], [4, 8, 16, 32]
    decoder = MSDeformAttnPixelDecoder(
        in_channels=channels,
        strides=strides,
        feat_channels=256,
        out_channels=256,
        num_outs=3,
        norm_cfg=ConfigDict(type="GN", num_groups=32),
        act_cfg=ConfigDict(type="ReLU"),
        encoder=ConfigDict(num_layers=6, layer_cfg={"self_attn_cfg": attention_config, "ffn_cfg": ffn}),
        positional_encoding=ConfigDict(num_feats=128, normalize=True),
    )
    decoder.init_weights()
    features = [torch.randn(1, c, side // s, side // s) for c, s in zip(channels, strides, strict=True)]
    return decoder, {"feats": features}


def _mmcv(build: Callable[[int], Call], side: int, backward: bool) -> Calls:
    """The same call before and after. What patch() does to the class is done in front of each; patch() itself searches
    all modules, which is not to be timed."""
    provide_extension()
    from mmcv.ops import MultiScaleDeformableAttention

    from m2f_kernels.integrations import mmcv as integration

    torch.manual_seed(0)
    module, given = build(side)
    module.eval()
    original = MultiScaleDeformableAttention.forward

    def call(forward: Any) -> list[Tensor]:
        module.zero_grad()
        with (
            mock.patch.object(MultiScaleDeformableAttention, "forward", forward),
            torch.set_grad_enabled(backward),
        ):
            outputs = tree_leaves(module(**given))
            if backward:
                sum(x.mean() for x in outputs).backward()
        return outputs

    return {AFTER: partial(call, integration._attention_forward(original)), BEFORE: partial(call, original)}


def _mmcv_cases(scale: Scale) -> list[Case]:
    parts = (("attention", attention, 1024, "mmcv"), ("attention", attention, 512, "mmcv"),
             ("pixel decoder", pixel_decoder, 512, "mmdet"))  # fmt: skip
    return [
        pair(f"{name}, {side}², {'forward + backward' if backward else 'forward'}",
             partial(_mmcv, build, side, backward), 1e-4, backward, unavailable=missing(package))
        for name, build, side, package in parts
        for backward in (False, True)
    ]  # fmt: skip


MMCV = Benchmark(
    op="mmcv",
    title="mmcv and mmdet before and after `m2f_kernels.integrations.mmcv.patch()`",
    description=(
        "*Attention*: `MultiScaleDeformableAttention` of one encoder layer, with projections (levels at strides 32, "
        "16 and 8, every position a query). *Pixel decoder*: mmdet's `MSDeformAttnPixelDecoder`. mmcv's compiled "
        "extension, which has no CPU kernel, may be missing."
    ),
    cases=_mmcv_cases,
    check=_close,
    operators=("ms_deform_attn",),
)

# ---------------------------------------------------------------- targets as maps of ids and run lengths


def _id_maps(count: int = 200, size: int = 1024, outputs: int = 3, labels: int = 80) -> Calls:
    """Matching, losses and gradients of the criterion; targets are Voronoi cells: connected, and every pixel belongs to
    one."""
    torch.manual_seed(0)
    side = -(-size // 8)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centres = torch.rand(2, count, 1, 1) * side
    nearest = ((y - centres[0]) ** 2 + (x - centres[1]) ** 2).argmin(0).int()
    id_map = nearest.repeat_interleave(8, 0).repeat_interleave(8, 1)[:size, :size].contiguous()
    instances = m2f_kernels.InstanceMap(id_map, torch.arange(count))
    features = torch.randn(1, 256, size // 4, size // 4, requires_grad=True)
    embeds = [torch.randn(1, 100, 256, requires_grad=True) for _ in range(outputs)]
    predictions = [
        {"class_logits": torch.randn(1, 100, labels + 1), "masks": m2f_kernels.FactoredMasks(embed, features)}
        for embed in embeds
    ]
    chosen, criterion = torch.randint(0, labels, (count,)), m2f_kernels.nn.PointMaskCriterion(labels)

    def run(masks: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        total = sum(criterion(predictions, [{"labels": chosen, "masks": masks}]).values(), torch.zeros(()))
        return total, *torch.autograd.grad(total, [features, *embeds])

    dense = instances.masks()
    forms = {"id map": instances, "run lengths": m2f_kernels.RunLengths.from_masks(dense), "dense": dense}
    return {name: partial(run, masks) for name, masks in forms.items()}


def _held(case: Case, implementation: Implementation) -> float:
    """MiB of the targets."""
    calls = _id_maps()
    return bytes_of(tree_leaves(calls[implementation.name].args)) / MIB


FORMS = ("id map", "run lengths", "dense")
ID_MAPS = Benchmark(
    op="id_maps",
    title="Targets as a map of ids and as run lengths against dense masks",
    description=(
        "200 targets of one image of 1024 x 1024, 100 queries at stride 4, 3 outputs, K = 12544: matching, losses and "
        "gradients of the criterion, of equal bits. CPU time of one thread. Memory is what the targets hold; the "
        "criterion makes no copy of them."
    ),
    cases=lambda scale: [pair("loss part, 200 targets", _id_maps, 0.0, names=FORMS, ours=FORMS[:2])],
    check=_close,
    operators=("mask_matching_cost", "point_mask_loss"),
    peak=_held,
    cpu_time=True,
)

# ---------------------------------------------------------------- a bias of rows and columns

BIASED, PUBLISHED, WITHOUT = "masked_attention", "published", "without a bias"
BIAS_QUERIES, BIAS_SIDE, BIAS_HEADS, BIAS_DIM = 200, 72, 8, 32


def published(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attention [N, H, Q + 1, D]; `by_row` [N, Q, h, H] and `by_column` [N, Q, w, H], for all queries but the first."""
    bias = (by_row.unsqueeze(3) + by_column.unsqueeze(2)).flatten(2, 3).permute(0, 3, 1, 2).contiguous()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=F.pad(bias, (0, 0, 1, 0)))


def fused(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """The same; the first query has zeros."""
    by_row, by_column = (F.pad(x.permute(0, 3, 1, 2), (0, 0, 1, 0)) for x in (by_row, by_column))
    return m2f_kernels.masked_attention(query, key, value, bias=(by_row, by_column))


def _biased(backward: bool) -> Calls:
    torch.manual_seed(0)
    lengths = (BIAS_QUERIES + 1, BIAS_SIDE**2, BIAS_SIDE**2)
    inputs = [torch.randn(1, length, BIAS_HEADS, BIAS_DIM).transpose(1, 2) for length in lengths]
    inputs += [torch.randn(1, BIAS_QUERIES, BIAS_SIDE, BIAS_HEADS) for _ in range(2)]
    for x in inputs:
        x.requires_grad_(backward)
    mask = m2f_kernels.pack_attention_mask(torch.ones(1, BIAS_QUERIES + 1, BIAS_SIDE**2, dtype=torch.bool))

    def call(function: Callable[..., Tensor], used: list[Tensor]) -> tuple[Tensor, ...]:
        out = function(*inputs)
        return (out, *torch.autograd.grad(out, used, torch.ones_like(out))) if backward else (out,)

    def plain(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
        return m2f_kernels.masked_attention(query, key, value, mask)

    return {
        BIASED: partial(call, fused, inputs), WITHOUT: partial(call, plain, inputs[:3]),
        PUBLISHED: partial(call, published, inputs),
    }  # fmt: skip


def _sam3_decoder(backward: bool) -> Calls:
    """Six layers, 32 words of text, the same random weights."""
    from transformers.models.sam3.modeling_sam3 import Sam3DetrDecoder, Sam3DETRDecoderConfig

    torch.manual_seed(0)
    models = twins(Sam3DetrDecoder(Sam3DETRDecoderConfig(dropout=0.0)).eval())
    image, positions, text = (torch.randn(1, length, 256) for length in (BIAS_SIDE**2, BIAS_SIDE**2, 32))
    given = {"vision_features": image, "vision_pos_encoding": positions, "text_features": text}

    def call(model: Any) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            out = model(**given, spatial_shapes=torch.tensor([[BIAS_SIDE, BIAS_SIDE]]))
        found = out.intermediate_hidden_states, out.reference_boxes
        if not backward:
            return found
        total = found[0].square().mean() + found[1].mean()
        # Those that the loss reaches.
        parts = (model.box_rpb_embed_x, model.box_rpb_embed_y, model.layers)
        return *found, *torch.autograd.grad(total, [p for part in parts for p in part.parameters()])

    return {name: partial(call, model) for name, model in models.items()}


ROW_COLUMN_BIAS = Benchmark(
    op="row_column_bias",
    title="Cross-attention with a bias of rows and columns",
    description=(
        "As SAM-3's decoder has it: 200 box queries and one more attend to 72 x 72 keys in 8 heads of 32, with "
        "a bias of each query for the row and one for the column of a key (`transformers`' `Sam3DetrDecoder`, image "
        "1008 x 1008). *Published*: both parts are added up to [N, H, Q, S], made contiguous, padded, and go to SDPA "
        "as a float mask. *Without a bias*: the same operator with a mask that blocks nothing, to show what the bias "
        "costs. *Decoder*: all of `Sam3DetrDecoder`, before and after `accelerate`. CPU time of one thread."
    ),
    cases=lambda scale: [
        pair(f"decoder, {way}", partial(_sam3_decoder, way != "forward"), 1e-4, way != "forward",
             unavailable=lambda: missing("transformers")() or missing("transformers.models.sam3")())
        for way in ("forward", "forward + backward")
    ] + [
        pair(way, partial(_biased, way != "forward"), 1e-4, way != "forward", names=(BIASED, WITHOUT, PUBLISHED),
             ours=(BIASED, WITHOUT))
        for way in ("forward", "forward + backward")
    ],
    figures={
        "cpu": [
            ratio(way, field, PUBLISHED, BIASED, label, aim)
            for way in ("forward", "forward + backward")
            for field, aim, label in (("median_ms", 1.3, "faster"), ("memory_extra_mib", 2.0, "less peak extra memory"))
        ]
    },
    check=_close,
    operators=("masked_attention",),
    cpu_time=True,
)  # fmt: skip
