"""EoMT, EoMT-DINOv3 and VidEoMT of `transformers`: attention under packed masks, losses from factored masks.

In the last blocks of these encoders queries are tokens among others; in training they attend to patches under the mask
that they predict, and all other pairs are open. The published model writes that mask for all pairs of tokens and every
head, in floating point; here the mask is one bit per query and patch.

VidEoMT has the same blocks and loss, but its `forward` neither masks nor trains: only the loss is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from m2f_kernels import dispatch
from m2f_kernels._checks import traced_for_onnx
from m2f_kernels.constants import cacheable, replayable
from m2f_kernels.graphs import captured
from m2f_kernels.integrations.transformers import mask2former
from m2f_kernels.integrations.transformers._swap import Mixin, Replacement, observed, qualified_name
from m2f_kernels.integrations.transformers.mask_classification import (
    CRITERION_OPS,
    DECODER_OPS,
    DROPPED,
    LOSSES,
    MATCHER_OPS,
    MATCHING,
    MaskLosses,
    Matcher,
    check_matcher,
    criterion_left,
    criterion_partly,
    dense_masks,
    kernels_serve,
    subclass_problem,
    warn_unfused,
    weighted_total,
)
from m2f_kernels.masks import WORD, FactoredMasks, PackedMask
from m2f_kernels.ops.attention_mask import predict_attention_mask, resize_mask_features
from m2f_kernels.ops.masked_attention import fallback, masked_attention

_MODULES = {
    name: f"transformers.models.{family}.modeling_{family}"
    for name, family in (("Eomt", "eomt"), ("EomtDinov3", "eomt_dinov3"), ("Videomt", "videomt"))
}


#: Probabilities of masks on the host, each with the stamp of the buffer that it was copied from.
_PROBABILITIES: MutableMapping[Tensor, tuple[Any, list[float]]] = WeakTensorKeyDictionary()


class QueryMask(NamedTuple):
    """The mask of a block: its rows are the first tokens, its keys the tokens from `first_key` on."""

    packed: PackedMask
    first_key: int


# ---------------------------------------------------------------- attention


class Attention(Mixin):
    """`forward` of a block's attention: with a :class:`QueryMask`, fused."""

    # Attributes of the original class.
    num_heads: int
    scale: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        attention_mask = _published_if_unserved(attention_mask, hidden_states)
        if not isinstance(attention_mask, QueryMask):
            return super().forward(hidden_states, attention_mask, **kwargs)
        out = _attend(self, hidden_states, attention_mask, self.scale)
        return self.out_proj(out), None


class RotaryAttention(Mixin):
    """The same with rotary position embeddings."""

    # Attributes of the original class.
    num_heads: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None, **kwargs: Any
    ) -> Any:
        attention_mask = _published_if_unserved(attention_mask, hidden_states)
        if not isinstance(attention_mask, QueryMask):
            return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)
        out = _attend(self, hidden_states, attention_mask, self.scaling, position_embeddings)
        return self.o_proj(out), None


def _published_if_unserved(mask: Any, tokens: Tensor) -> Any:
    """A :class:`QueryMask` as the published attention takes it, of all pairs and added to the scores, where no kernel
    serves the tokens' device and dtype, which may be others than those that the model asked about; else `mask`."""
    if not isinstance(mask, QueryMask) or dispatch.serves("masked_attention", tokens):
        return mask
    blocked = fallback.blocked(mask.packed, mask.first_key, tokens.shape[1], tokens.shape[1])
    scores = tokens.new_zeros(blocked.shape).masked_fill_(blocked, torch.finfo(tokens.dtype).min)
    return scores.unsqueeze(1)


def _attend(attention: Any, tokens: Tensor, mask: QueryMask, scale: float, positions: Any = None) -> Tensor:
    """[N, T, C] of the tokens [N, T, C], before the last projection."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (p(tokens).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p in projections)
    if positions is not None:
        query, key = sys.modules[_MODULES["EomtDinov3"]].apply_rotary_pos_emb(query, key, *positions)
    out = masked_attention(query, key, value, mask.packed, scale=scale, first_key=mask.first_key)
    return out.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------- losses


def _matcher(name: str) -> str:
    """The qualified name of a family's matcher."""
    return f"{_MODULES[name]}.{name}HungarianMatcher"


class EomtCriterion(mask2former.Criterion):
    _m2f_matcher = _matcher("Eomt")


class EomtDinov3Criterion(mask2former.Criterion):
    _m2f_matcher = _matcher("EomtDinov3")


class VideomtCriterion(mask2former.Criterion):
    _m2f_matcher = _matcher("Videomt")


# ---------------------------------------------------------------- the model


class ForUniversalSegmentation(Mixin):
    """`forward` of the model: no mask of all pairs of tokens, and logits of the last output alone."""

    _m2f_family = "Eomt"

    # Attributes of the original class.
    config: Any
    training: bool
    num_hidden_layers: int
    grid_size: tuple[int, int]
    embeddings: Any
    layers: nn.ModuleList
    layernorm: nn.Module
    query: nn.Embedding
    mask_head: nn.Module
    upscale_block: nn.Module
    class_predictor: nn.Module
    criterion: nn.Module
    attn_mask_probs: Tensor
    get_loss_dict: Any
    get_loss: Any

    def forward(
        self,
        pixel_values: Any,
        mask_labels: Any = None,
        class_labels: Any = None,
        patch_offsets: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = (pixel_values, mask_labels, class_labels, patch_offsets)
        served = kernels_serve(DECODER_OPS, next(self.parameters()))
        # Here masks are made from words of bits by operations that ONNX lacks for integers.
        if pixel_values is None or not served or traced_for_onnx() or not self._m2f_fusable(kwargs):
            return super().forward(*given, **kwargs)
        # The original's decorator, which collects hidden states and returns a tuple if asked to.
        captured = sys.modules[_MODULES[self._m2f_family]].capture_outputs(_forward)
        return captured(self, *given, **kwargs)

    def _m2f_fusable(self, kwargs: dict[str, Any]) -> bool:
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            return False
        # Of a class derived from a patched one; `accelerate` leaves such a model alone.
        reason = check_model(self)
        for layer in self._m2f_masked_layers():
            attention: Any = layer.attention
            dropped = attention.training and attention.dropout > 0
            if not isinstance(attention, (Attention, RotaryAttention)):
                reason = f"its attention is {qualified_name(type(attention))}, which is left alone"
            elif dropped:
                reason = DROPPED
            elif _weights_seen(attention):
                reason = "its attention has hooks, which see the weights and the mask of all pairs"
        if reason is not None:
            warn_unfused(self, reason)
        return reason is None

    def _m2f_outputs(self, pixel_values: Tensor) -> tuple[list[tuple[Tensor, FactoredMasks]], Tensor]:
        """Class logits and masks of every prediction, and the last tokens, normalised. Nothing in it needs targets."""
        tokens, given = self._m2f_embed(pixel_values)
        first_block = self.num_hidden_layers - self.config.num_blocks
        probabilities = self._m2f_probabilities()
        outputs: list[tuple[Tensor, FactoredMasks]] = []
        mask: QueryMask | None = None
        for i, layer in enumerate(self.layers):
            if i == first_block:
                query = self.query.weight[None].expand(tokens.shape[0], -1, -1).to(tokens.device)
                tokens = torch.cat((query, tokens), 1)
            if i >= first_block and (self.training or probabilities[i - first_block] > 0):
                outputs.append(self._m2f_predict(self.layernorm(tokens)))
                mask = self._m2f_mask(outputs[-1][1], i - first_block, probabilities)
            # A block without a mask of its own has that of the block before it, as published.
            tokens = layer(tokens, mask, **given)
        last = self.layernorm(tokens)
        outputs.append(self._m2f_predict(last))
        return outputs, last

    def _m2f_probabilities(self) -> Any:
        """The probabilities of masks, on the host: copied once, and again after a change of the buffer."""
        given = self.attn_mask_probs
        if not cacheable(given) or given.is_inference() or isinstance(given, FakeTensor) or given.is_meta:
            return given
        stamp = (id(given), given._version, given.data_ptr())
        found = _PROBABILITIES.get(given)
        if found is None or found[0] != stamp:
            found = _PROBABILITIES[given] = stamp, given.tolist()
        return found[1]

    def _m2f_masked_layers(self) -> list[Any]:
        return list(self.layers)[self.num_hidden_layers - self.config.num_blocks :]

    def _m2f_embed(self, pixel_values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The tokens before the first block, and the further arguments of every block."""
        return self.embeddings(pixel_values), {}

    def _m2f_predict(self, tokens: Tensor) -> tuple[Tensor, FactoredMasks]:
        """Class logits and masks from normalised tokens."""
        queries = tokens[:, : self.config.num_queries]
        patches = tokens[:, self.config.num_queries + self.embeddings.num_prefix_tokens :].transpose(1, 2)
        features = self.upscale_block(patches.reshape(*patches.shape[:2], *self.grid_size))
        return self.class_predictor(queries), FactoredMasks(self.mask_head(queries), features)

    def _m2f_mask(self, masks: FactoredMasks, block: int, probabilities: Any) -> QueryMask:
        """The mask of a block; each query keeps its own with some probability, and attends everywhere without it."""
        (features,) = resize_mask_features(masks.mask_features, [self.grid_size])
        # A logit of 0 is blocked in these models, and attended to by the operator: it is asked for what is blocked.
        blocked = predict_attention_mask(-masks.mask_embed, features)
        bits = _every_key(blocked) & ~blocked.bits
        packed = PackedMask(bits, bits.any(-1), blocked.num_keys)
        # A graph serves all probabilities: training lowers them step by step.
        if (self.training and replayable()) or probabilities[block] < 1:
            n, q = packed.row_any.shape
            freed = torch.rand(n, q, device=packed.bits.device) > self.attn_mask_probs[block]
            packed = packed._replace(bits=torch.where(freed[..., None], _every_key(packed), packed.bits))
        return QueryMask(packed, self.config.num_queries + self.embeddings.num_prefix_tokens)


class RotaryForUniversalSegmentation(ForUniversalSegmentation):
    """The same of EoMT-DINOv3."""

    _m2f_family = "EomtDinov3"

    # Attributes of the original class.
    dropout: nn.Module
    rope_embeddings: nn.Module

    def _m2f_embed(self, pixel_values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        tokens = self.dropout(self.embeddings(pixel_values))
        return tokens, {"position_embeddings": self.rope_embeddings(pixel_values.to(tokens.dtype))}


def _weights_seen(attention: nn.Module) -> bool:
    """True if hooks see an attention's results. The collectors of `transformers` do not count: once hidden states or
    weights were asked for they stay registered, idle."""
    hooks = (*attention._forward_hooks.values(), *attention._forward_pre_hooks.values())
    foreign = any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
    return foreign and observed(attention)


def _every_key(packed: PackedMask) -> Tensor:
    """The bits of a row that attends to all keys, [words]."""
    bits = packed.bits.new_full(packed.bits.shape[-1:], -1)
    if used := packed.num_keys % WORD:
        bits[-1] = (1 << used) - 1
    return bits


def _forward(
    model: Any, pixel_values: Tensor, mask_labels: Any, class_labels: Any, patch_offsets: Any, **kwargs: Any
) -> Any:
    supervised = mask_labels is not None and class_labels is not None
    outputs, last = captured(model._m2f_outputs)(pixel_values)
    classes, masks = outputs[-1]
    logits = masks.logits()
    loss = _loss(model, outputs, logits, mask_labels, class_labels) if supervised else None
    published = sys.modules[_MODULES[model._m2f_family]]
    return getattr(published, f"{model._m2f_family}ForUniversalSegmentationOutput")(
        loss=loss,
        masks_queries_logits=logits,
        class_queries_logits=classes,
        last_hidden_state=last,
        patch_offsets=patch_offsets,
    )


def _loss(
    model: Any, outputs: list[tuple[Tensor, FactoredMasks]], logits: Tensor, mask_labels: Any, class_labels: Any
) -> Tensor:
    """The loss, summed over all outputs: in one call if the criterion takes factored masks, else one by one."""
    # Hooks of the criterion see one call per output, with logits.
    takes_factors = mask2former.takes_factored_masks(model.criterion)
    fused = takes_factors and not observed(model.criterion)
    predictions: list[dict[str, Any]] = [
        {"masks_queries_logits": masks if fused else masks.logits(), "class_queries_logits": classes}
        for classes, masks in outputs[:-1]
    ]
    last = {"masks_queries_logits": outputs[-1][1] if fused else logits, "class_queries_logits": outputs[-1][0]}
    if not takes_factors:
        mask_labels = dense_masks(mask_labels, logits.device)
    labels = {"mask_labels": mask_labels, "class_labels": class_labels}
    if fused:
        return weighted_total(model.criterion(**last, **labels, auxiliary_predictions=predictions), model.weight_dict)
    losses = (model.get_loss_dict(**x, **labels, auxiliary_predictions=None) for x in (*predictions, last))
    return sum((model.get_loss(x) for x in losses), torch.zeros((), device=logits.device))


# ---------------------------------------------------------------- what is left alone


def check_model(model: Any) -> str | None:
    derived = (
        "EomtDinov3" if _derives(model, f"{_MODULES['EomtDinov3']}.EomtDinov3ForUniversalSegmentation") else "Eomt"
    )
    if not hasattr(sys.modules[_MODULES[derived]], "capture_outputs"):
        return "its forward is not the one that m2f_kernels knows from transformers 5"
    methods = ("get_loss_dict", "get_loss", "predict", "_disable_attention_mask")
    return subclass_problem(model, f"{_MODULES[derived]}.{derived}ForUniversalSegmentation", methods)


def _derives(module: nn.Module, name: str) -> bool:
    return any(qualified_name(cls) == name for cls in type(module).__mro__)


_ATTENTION = "attention under the packed mask of the queries' patches, no mask of all pairs"
_ATTENTION_OPS = ("masked_attention",)
_MODEL = "masks of blocks from resized features; masks stay two factors, multiplied only where they are returned"

#: Family's prefix, mixin of its loss.
_CRITERIA = {"Eomt": EomtCriterion, "EomtDinov3": EomtDinov3Criterion, "Videomt": VideomtCriterion}


def _criterion(mixin: type[mask2former.Criterion]) -> Replacement:
    matcher = mixin._m2f_matcher
    return Replacement(
        mixin,
        LOSSES,
        lambda criterion: criterion_left(criterion, matcher),
        CRITERION_OPS,
        (mixin, MaskLosses),
        lambda criterion: criterion_partly(criterion, matcher),
    )


REPLACEMENTS = {
    f"{_MODULES['Eomt']}.EomtAttention": Replacement(Attention, _ATTENTION, ops=_ATTENTION_OPS),
    f"{_MODULES['Eomt']}.EomtForUniversalSegmentation": Replacement(
        ForUniversalSegmentation, _MODEL, check_model, DECODER_OPS
    ),
    f"{_MODULES['EomtDinov3']}.EomtDinov3Attention": Replacement(RotaryAttention, _ATTENTION, ops=_ATTENTION_OPS),
    f"{_MODULES['EomtDinov3']}.EomtDinov3ForUniversalSegmentation": Replacement(
        RotaryForUniversalSegmentation, _MODEL, check_model, DECODER_OPS
    ),
    **{f"{_MODULES[name]}.{name}Loss": _criterion(mixin) for name, mixin in _CRITERIA.items()},
    **{_matcher(name): Replacement(Matcher, MATCHING, check_matcher, MATCHER_OPS, (Matcher,)) for name in _CRITERIA},
}
