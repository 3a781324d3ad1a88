"""Multi-scale deformable attention of every family in `transformers`.

Whole attention modules are replaced: softmax and sampling locations are computed inside the kernel, and the sizes of
the levels are taken as integers where the family has them, which avoids a synchronisation. The rest (projections,
position embeddings, padding) is as in the original.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_kernels import dispatch
from m2f_kernels.integrations.hub_kernels import MultiScaleDeformableAttention
from m2f_kernels.integrations.transformers._swap import Mixin, Replacement, plan, qualified_name, watched
from m2f_kernels.ops.ms_deform_attn import ms_deform_attn_from_offsets
from m2f_kernels.ops.ms_deform_attn.levels import MAX_LEVELS

#: Arguments of the attention modules' `forward` in the supported versions.
_PARAMETERS = {
    "self",
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "position_embeddings",
    "reference_points",
    "spatial_shapes",
    "spatial_shapes_list",
    "level_start_index",
    "output_attentions",
    "kwargs",
}


#: True while a module runs with `output_attentions` whose layers do not pass that flag on.
_ASKED: ContextVar[bool] = ContextVar("m2f_weights_asked", default=False)

#: The name of the hooks by which transformers 5 records outputs.
_RECORDING_HOOK = "output_capturing_hook"


class AsksForWeights(Mixin):
    """`forward` of an encoder or decoder whose layers drop the flag for the weights of deformable attention."""

    # Attributes of the original classes.
    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("output_attentions")
        if asked is None:
            asked = self.config.output_attentions
        if not asked or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        before = _ASKED.set(True)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _ASKED.reset(before)


class _Attention(Mixin):
    """`forward` of an attention module: value is projected from the encoder's states, or is those states."""

    #: Whether the family's layers use the weights without asking for them.
    _m2f_always_weights = False

    # Attributes of the original classes.
    n_heads: int
    n_levels: int
    n_points: int | Sequence[int]
    sampling_offsets: nn.Module
    attention_weights: nn.Module
    value_proj: nn.Module
    output_proj: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        # The fused operator has no weights in autograd's graph, so they would have no gradient.
        differentiated = torch.is_grad_enabled() and self._m2f_weights_asked(kwargs)
        if args or differentiated or not self._m2f_fusable(kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        position = kwargs.get("position_embeddings")
        if position is not None:
            hidden_states = hidden_states + position
        n, q, _ = hidden_states.shape
        points = self._m2f_points()
        offsets = self.sampling_offsets(hidden_states).view(n, q, self.n_heads, sum(points), 2)
        logits = self.attention_weights(hidden_states).view(n, q, self.n_heads, sum(points))
        out = ms_deform_attn_from_offsets(
            self._m2f_value(kwargs["encoder_hidden_states"], kwargs.get("attention_mask")),
            _shapes(kwargs),
            kwargs["reference_points"],
            offsets,
            logits,
            points_per_level=points,
            offset_scale=self._m2f_offset_scale(),
        )
        # The kernel does not produce the weights; they are computed only where they are seen.
        looked_at = self._m2f_always_weights or kwargs.get("output_attentions") or self._forward_hooks
        return self._m2f_project(out), self._m2f_weights(logits) if looked_at else None

    def _m2f_weights_asked(self, kwargs: dict[str, Any]) -> bool:
        """True if the caller asked for attention weights."""
        if kwargs.get("output_attentions"):
            return True
        # transformers 5 records outputs by hooks that stay registered; they are active while this is set.
        recording = sys.modules.get("transformers.utils.output_capturing")
        # By name, since the hooks are made in a function.
        own = [hook for hook in self._forward_hooks.values() if getattr(hook, "__name__", "") != _RECORDING_HOOK]
        if own or torch.compiler.is_compiling():
            return bool(own)
        recorded = () if recording is None else recording._active_collector.get() or ()
        return _ASKED.get() or any("attentions" in key for key in recorded)

    def _m2f_fusable(self, kwargs: dict[str, Any]) -> bool:
        """True if the operator takes these arguments. The original deals with all others, errors included."""
        states, points = kwargs.get("encoder_hidden_states"), kwargs.get("reference_points")
        if states is None or points is None or _shapes(kwargs) is None:
            return False
        # Where no kernel serves, the published code does, which costs no more.
        if not dispatch.serves("ms_deform_attn_from_offsets", states):
            return False
        core = getattr(self, "attn", None)
        return points.shape[-1] in (2, 4) and not (core is not None and watched(core))

    def _m2f_value(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """[N, S, H, D] of the encoder's states [N, S, C], zero at padding."""
        value = self.value_proj(states)
        if mask is not None:
            value = value.masked_fill(self._m2f_padding(mask)[..., None], 0.0)
        return value.unflatten(-1, (self.n_heads, -1))

    def _m2f_padding(self, mask: Tensor) -> Tensor:
        """The padding mask, bool [N, S], True at padding. The family's own mask is True at pixels."""
        return ~mask

    def _m2f_project(self, out: Tensor) -> Tensor:
        return self.output_proj(out)

    def _m2f_points(self) -> list[int]:
        """Number of points of each level."""
        assert isinstance(self.n_points, int)
        return [self.n_points] * self.n_levels

    def _m2f_offset_scale(self) -> float:
        return 0.5

    def _m2f_weights(self, logits: Tensor) -> Tensor:
        return F.softmax(logits, -1).unflatten(-1, (self.n_levels, -1))


class PixelDecoderAttention(_Attention):
    """Mask2Former's and OneFormer's: the mask is True at padding."""

    def _m2f_padding(self, mask: Tensor) -> Tensor:
        return mask


class DetectorAttention(_Attention):
    """Deformable DETR's and its descendants'."""


class WeightedDetectorAttention(DetectorAttention):
    """Grounding DINO's and OmDet-Turbo's: their layers return the weights, but do not pass on the flag for them."""

    _m2f_always_weights = True


class _ScaledAttention(_Attention):
    """RT-DETRv2's and its descendants': a scale for the offsets, and two methods of sampling."""

    # D-FINE's layers of 4.57 drop the flag, too; these decoders have few queries.
    _m2f_always_weights = True

    offset_scale: float

    def _m2f_method(self) -> str:
        raise NotImplementedError

    def _m2f_fusable(self, kwargs: dict[str, Any]) -> bool:
        # The original's broadcasting is meaningful for one box per query only.
        return (
            super()._m2f_fusable(kwargs)
            and self._m2f_method() == "default"
            and tuple(kwargs["reference_points"].shape[2:]) == (1, 4)
        )

    def _m2f_offset_scale(self) -> float:
        return self.offset_scale

    def _m2f_weights(self, logits: Tensor) -> Tensor:
        return F.softmax(logits, -1)


class ScaledDetectorAttention(_ScaledAttention):
    """RT-DETRv2's."""

    method: str

    def _m2f_method(self) -> str:
        return self.method


class UnprojectedAttention(_ScaledAttention):
    """D-FINE's and DEIMv2's: no projections, and each level has its own number of points."""

    decoder_method: str
    num_points_list: list[int]

    def _m2f_method(self) -> str:
        return self.decoder_method

    def _m2f_fusable(self, kwargs: dict[str, Any]) -> bool:
        # Position embeddings are not among the original's arguments; its mask would have to be [N, S, H].
        unused = kwargs.get("position_embeddings") is None and kwargs.get("attention_mask") is None
        return unused and super()._m2f_fusable(kwargs)

    def _m2f_value(self, states: Tensor, mask: Tensor | None) -> Tensor:
        return states.unflatten(-1, (self.n_heads, -1))

    def _m2f_project(self, out: Tensor) -> Tensor:
        return out

    def _m2f_points(self) -> list[int]:
        return self.num_points_list


_LAYER = MultiScaleDeformableAttention()


class Core(Mixin):
    """`MultiScaleDeformableAttention` itself, for unknown modules around it."""

    def forward(self, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not dispatch.serves("ms_deform_attn", value):
            published: Tensor = super().forward(value, *args, **kwargs)
            return published
        return _LAYER.forward(value, *args, **kwargs)

    # The signature tells which arguments are known.
    functools.update_wrapper(forward, MultiScaleDeformableAttention.forward)


def _shapes(kwargs: dict[str, Any]) -> Any:
    """(h, w) per level: integers where the family passes them, else the tensor."""
    shapes = kwargs.get("spatial_shapes_list")
    return kwargs.get("spatial_shapes") if shapes is None else shapes


# ---------------------------------------------------------------- what is left alone


def _check_parameters(module: nn.Module, known: set[str]) -> str | None:
    for cls in type(module).__mro__:
        # Past an accelerated class, whose forward takes anything.
        if "forward" in vars(cls) and cls.__module__ != __name__:
            break
    unknown = inspect.signature(vars(cls)["forward"]).parameters.keys() - known
    return f"its forward takes {', '.join(sorted(unknown))}, unknown to m2f_kernels" if unknown else None


def _check_core(module: nn.Module) -> str | None:
    """The reason why a module's core is not the one of transformers that the fused path replaces, or None."""
    core = getattr(module, "attn", None)
    if core is None:
        function: Any = getattr(module, "ms_deformable_attn_core", None)
        own = function is None or function.__module__ == type(module).__module__
        return None if own else f"its core is {function.__module__}.{function.__qualname__}, unknown to m2f_kernels"
    known = plan(core)
    if known is None or not issubclass(known.replacement.mixin, Core):
        return f"its core is {qualified_name(type(core))}, unknown to m2f_kernels"
    return None if known.reason is None else f"its core is left alone: {known.reason}"


def check_attention(module: nn.Module) -> str | None:
    """The reason why an attention module is left alone, or None."""
    if reason := _check_parameters(module, _PARAMETERS):
        return reason
    method = getattr(module, "method", getattr(module, "decoder_method", "default"))
    if method != "default":
        return f'decoder_method is "{method}", which takes the nearest pixel; the operator interpolates'
    levels = getattr(module, "n_levels", 0)
    if levels > MAX_LEVELS:
        return f"it has {levels} levels; the operator takes up to {MAX_LEVELS}"
    return _check_core(module)


def check_core(module: nn.Module) -> str | None:
    """The reason why a core (sampling and weighting alone) is left alone, or None."""
    known = set(inspect.signature(Core.forward).parameters)
    return _check_parameters(module, known)


# ---------------------------------------------------------------- every family

_OPS = ("ms_deform_attn_from_offsets",)
_FUSED = "deformable attention; softmax and sampling locations inside the kernel"

#: Family (directory of transformers/models), prefix of its classes' names, mixin.
_DETECTORS = {
    "deformable_detr": ("DeformableDetr", DetectorAttention),
    "grounding_dino": ("GroundingDino", WeightedDetectorAttention),
    "mm_grounding_dino": ("MMGroundingDino", WeightedDetectorAttention),
    "rt_detr": ("RTDetr", DetectorAttention),
    "rt_detr_v2": ("RTDetrV2", ScaledDetectorAttention),
    "d_fine": ("DFine", UnprojectedAttention),
    "deimv2": ("Deimv2", UnprojectedAttention),
    "lw_detr": ("LwDetr", DetectorAttention),
    "rf_detr": ("RfDetr", DetectorAttention),
    "omdet_turbo": ("OmDetTurbo", WeightedDetectorAttention),
    "pp_doclayout_v2": ("PPDocLayoutV2", DetectorAttention),
    "pp_doclayout_v3": ("PPDocLayoutV3", DetectorAttention),
    "pp_doclayout_v4": ("PPDocLayoutV4", DetectorAttention),
}
#: Families whose layers drop the flag for the weights, and the classes around those layers.
_DROPPING = {
    "grounding_dino": ("GroundingDinoEncoder", "GroundingDinoDecoder"),
    "mm_grounding_dino": ("MMGroundingDinoEncoder", "MMGroundingDinoDecoder"),
    "omdet_turbo": ("OmDetTurboDecoder",),
}
_WITHOUT_CORE = ("rt_detr_v2", "d_fine", "deimv2")


def _replacements() -> dict[str, Replacement]:
    table = {}
    for family, prefix in (("mask2former", "Mask2Former"), ("oneformer", "OneFormer")):
        name = f"{prefix}PixelDecoderEncoderMultiscaleDeformableAttention"
        table[f"transformers.models.{family}.modeling_{family}.{name}"] = Replacement(
            PixelDecoderAttention, _FUSED, check_attention, _OPS
        )
    for family, (prefix, mixin) in _DETECTORS.items():
        module = f"transformers.models.{family}.modeling_{family}"
        name = f"{prefix}MultiscaleDeformableAttention"
        table[f"{module}.{name}"] = Replacement(mixin, _FUSED, check_attention, _OPS)
        if family not in _WITHOUT_CORE:
            table[f"{module}.MultiScaleDeformableAttention"] = Replacement(
                Core,
                "deformable attention from sampling locations, where another module calls it",
                check_core,
                ("ms_deform_attn",),
            )
    for family, names in _DROPPING.items():
        for name in names:
            table[f"transformers.models.{family}.modeling_{family}.{name}"] = Replacement(
                AsksForWeights, "tells deformable attention whether its weights are asked for"
            )
    return table


REPLACEMENTS = _replacements()
