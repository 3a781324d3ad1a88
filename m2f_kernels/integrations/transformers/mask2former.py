"""Mask2Former of `transformers`: attention masks, masked attention, losses. Mask logits are computed only if needed.

The decoder predicts masks as their two factors. With `factored=True`, an argument that only these classes have, it
returns the factors, so that only masks that are returned or supervised are multiplied.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_kernels.graphs import captured
from m2f_kernels.integrations.transformers._swap import Mixin, Replacement, observed, qualified_name, runs, watched
from m2f_kernels.integrations.transformers.mask_classification import (
    ATTENTION,
    CRITERION_OPS,
    DECODER_OPS,
    LOSSES,
    MASKS,
    MATCHER_OPS,
    MATCHING,
    MaskLosses,
    Masks,
    Matcher,
    Memory,
    attend,
    attention_problem,
    check_matcher,
    criterion_left,
    criterion_partly,
    dense_masks,
    differentiated_at_once,
    drops,
    gathers,
    has_own_losses,
    kernels_serve,
    layers_problem,
    logits_of,
    losses_served,
    matcher_problem,
    point_losses,
    project_levels,
    subclass_problem,
    unfused_layer,
    warn_unfused,
    weighted_total,
)
from m2f_kernels.integrations.transformers.pixel_decoder import (
    ENCODER,
    ENCODER_LAYER,
    PIXEL_DECODER,
    POSITIONS,
    Encoder,
    EncoderLayer,
    PixelDecoder,
    PositionEmbedding,
    check_encoder,
    check_pixel_decoder,
)
from m2f_kernels.masks import FactoredMasks, PackedMask
from m2f_kernels.nn.linear import linear_relu
from m2f_kernels.ops.attention_mask import attention_mask_levels, predict_attention_mask
from m2f_kernels.ops.points import Given

_MODULE = "transformers.models.mask2former.modeling_mask2former"
_MATCHER = f"{_MODULE}.Mask2FormerHungarianMatcher"


def _published() -> Any:
    return sys.modules[_MODULE]


class Mask2FormerPixelDecoder(PixelDecoder):
    # Attributes of the original class.
    lateral_convolutions: list[Any]
    output_convolutions: list[Any]

    def _m2f_convolutions(self) -> list[tuple[Any, Any]]:
        return list(zip(self.lateral_convolutions, self.output_convolutions, strict=True))

    def _m2f_output(self, mask_features: Tensor, maps: list[Tensor], attentions: Any) -> Any:
        return _published().Mask2FormerPixelDecoderOutput(
            mask_features=mask_features, multi_scale_features=tuple(maps), attentions=attentions
        )


class DecoderLayer(Mixin):
    """`forward` of a decoder layer: masked attention from a packed mask and projected keys and values."""

    # Attributes of the original class.
    pre_norm: bool
    cross_attn: nn.MultiheadAttention
    cross_attn_layer_norm: nn.Module
    self_attn: nn.Module
    self_attn_layer_norm: nn.Module
    activation_fn: nn.Module
    fc1: nn.Module
    fc2: nn.Module
    final_layer_norm: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        level_index: int | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        query_position_embeddings: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | PackedMask | None = None,
        output_attentions: bool | None = False,
        key: Tensor | None = None,
        value: Tensor | None = None,
        query_weight: Tensor | None = None,
        query_bias: Tensor | None = None,
        pixels: Tensor | None = None,
        pixel_positions: Tensor | None = None,
    ) -> tuple[Any, ...]:
        memory = Memory(key, value, query_weight, query_bias, pixels, pixel_positions)
        if memory.empty:
            found: tuple[Any, ...] = super().forward(
                hidden_states,
                level_index,
                attention_mask,
                position_embeddings,
                query_position_embeddings,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                output_attentions=output_attentions,
            )
            return found
        assert isinstance(encoder_attention_mask, tuple)
        mask = PackedMask(*encoder_attention_mask)

        def cross_attend(x: Tensor) -> Tensor:
            query = x if query_position_embeddings is None else x + query_position_embeddings
            return attend(self.cross_attn, query, memory, mask)

        def self_attend(x: Tensor) -> Tensor:
            if _without_weights(self.self_attn):
                return attend_each_other(self.self_attn, x, query_position_embeddings)
            out: Tensor = self.self_attn(
                hidden_states=x,
                position_embeddings=query_position_embeddings,
                attention_mask=None,
                output_attentions=observed(self.self_attn),
            )[0]
            return out

        def feed_forward(x: Tensor) -> Tensor:
            relu = type(self.activation_fn) is nn.ReLU and not watched(self.activation_fn)
            out: Tensor = self.fc2(linear_relu(self.fc1, x) if relu else self.activation_fn(self.fc1(x)))
            return out

        x = hidden_states
        for block, norm in (
            (cross_attend, self.cross_attn_layer_norm),
            (self_attend, self.self_attn_layer_norm),
            (feed_forward, self.final_layer_norm),
        ):
            x = x + block(norm(x)) if self.pre_norm else norm(x + block(x))
        return (x,)


def _without_weights(attention: Any) -> bool:
    """True if the queries' attention among themselves can be computed without its weights."""
    published = qualified_name(type(attention)) == f"{_MODULE}.Mask2FormerAttention"
    drops = attention.training and attention.dropout > 0 if published else False
    return published and not (drops or watched(attention) or "forward" in vars(attention))


def _mask_embeds(embedder: Any, x: Tensor) -> Tensor:
    """The mask predictor's embedder, each linear layer with its activation."""
    published = qualified_name(type(embedder)) == f"{_MODULE}.Mask2FormerMLPPredictionHead"
    if not published or any(watched(part) or "forward" in vars(part) for part in embedder.modules()):
        found: Tensor = embedder(x)
        return found
    for block in embedder.layers:
        linear, activation = block.layers
        x = linear_relu(linear, x) if type(activation) is nn.ReLU else activation(linear(x))
    return x


def attend_each_other(attention: Any, x: Tensor, positions: Tensor | None) -> Tensor:
    """The queries' attention among themselves, [Q, N, C], without its weights."""
    placed = (x if positions is None else x + positions).transpose(0, 1)
    pairs = ((attention.q_proj, placed), (attention.k_proj, placed), (attention.v_proj, x.transpose(0, 1)))
    heads = (p(y).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p, y in pairs)
    out = F.scaled_dot_product_attention(*heads)
    attended: Tensor = attention.out_proj(out.transpose(1, 2).flatten(2))
    return attended.transpose(0, 1)


class Decoder(Mixin):
    """`forward` of the transformer decoder: one resizing of mask features, one projection per level."""

    # Attributes of the original class.
    config: Any
    layers: nn.ModuleList
    layernorm: nn.Module
    mask_predictor: Any
    layerdrop: float
    training: bool

    def forward(
        self,
        inputs_embeds: Tensor | None = None,
        multi_stage_positional_embeddings: Any = None,
        pixel_embeddings: Tensor | None = None,
        encoder_hidden_states: Any = None,
        query_position_embeddings: Tensor | None = None,
        feature_size_list: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        factored: bool = False,
    ) -> Any:
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if (
            inputs_embeds is None
            or pixel_embeddings is None
            or output_attentions
            or not self._m2f_fusable(pixel_embeddings)
        ):
            return super().forward(
                inputs_embeds,
                multi_stage_positional_embeddings,
                pixel_embeddings,
                encoder_hidden_states,
                query_position_embeddings,
                feature_size_list,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden, intermediate, embeds = self._m2f_decode(
            inputs_embeds,
            multi_stage_positional_embeddings,
            pixel_embeddings,
            encoder_hidden_states,
            query_position_embeddings,
            feature_size_list,
        )
        factors = [FactoredMasks(embed, pixel_embeddings) for embed in embeds]
        # Hooks see the masks that the original returns.
        factored = factored and not observed(self)
        masks: tuple[Masks, ...] = tuple(factors) if factored else tuple(x.logits() for x in factors)
        last = hidden[-1].transpose(1, 0)
        states = tuple(hidden) if output_hidden_states else None
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(x for x in (last, states, None, tuple(intermediate), masks) if x is not None)
        return _published().Mask2FormerMaskedAttentionDecoderOutput(
            last_hidden_state=last,
            hidden_states=states,
            attentions=None,
            intermediate_hidden_states=tuple(intermediate),
            masks_queries_logits=masks,
        )

    def _m2f_fusable(self, mask_features: Tensor) -> bool:
        if not kernels_serve(DECODER_OPS, mask_features):
            return False
        reason = predictor_problem(self.mask_predictor) or unfused_layer(
            self.layers, DecoderLayer, layer_problem, lambda x: drops(x.cross_attn) or (x.training and x.dropout > 0)
        )
        if self.training and self.layerdrop > 0:
            reason = "with dropout, training skips layers at random"
        if reason is not None:
            warn_unfused(self, reason)
        return reason is None

    def _m2f_decode(
        self,
        x: Tensor,
        level_positions: Sequence[Tensor],
        mask_features: Tensor,
        levels: Sequence[Tensor],
        positions: Tensor | None,
        sizes: Sequence[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The queries [Q, N, C] before the first layer and after each, those normalised, and the mask embeddings."""
        layers: list[Any] = list(self.layers)
        themselves = [gathers(layer) for layer in layers]
        memory = project_levels([layer.cross_attn for layer in layers], levels, level_positions, themselves)
        used = [(int(h), int(w)) for h, w in sizes[: len(layers)]]
        if used:
            mask_levels, flags = attention_mask_levels(mask_features, used, len(layers), x.shape[0])
        embedder = self.mask_predictor.mask_embedder

        def predict(x: Tensor) -> tuple[Tensor, Tensor]:
            normalised = self.layernorm(x)
            return normalised, _mask_embeds(embedder, normalised.transpose(-3, -2))

        hidden = [x]
        found: list[tuple[Tensor, Tensor]] = []
        # What is computed again for all outputs only makes masks here, which have no gradient.
        again = differentiated_at_once(self.layernorm, embedder)
        for i, layer in enumerate(layers):
            level = i % len(levels)
            predicted = predict(hidden[-1].detach() if again else hidden[-1])
            if not again:
                found.append(predicted)
            mask = predict_attention_mask(predicted[1], mask_levels[level], flags[i])
            # By position, so that a checkpointed layer sees which of them have gradients.
            (x,) = layer(hidden[-1], level, None, None, positions, None, mask, False, *memory[i])
            hidden.append(x)
        if again:
            normalised, embeds = predict(torch.stack(hidden))
            return hidden, list(normalised.unbind()), list(embeds.unbind())
        found.append(predict(hidden[-1]))
        return hidden, [x for x, _ in found], [x for _, x in found]


class TransformerModule(Mixin):
    """`forward` of the module around the decoder, which passes `factored` on."""

    # Attributes of the original class.
    num_feature_levels: int
    position_embedder: nn.Module
    queries_embedder: nn.Embedding
    queries_features: nn.Embedding
    input_projections: Any
    decoder: nn.Module
    level_embed: nn.Embedding

    def forward(
        self,
        multi_scale_features: Sequence[Tensor],
        mask_features: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        *,
        factored: bool = False,
    ) -> Any:
        if not factored or not isinstance(self.decoder, Decoder):
            return super().forward(multi_scale_features, mask_features, output_hidden_states, output_attentions)
        features, positions = [], []
        for i, x in enumerate(multi_scale_features[: self.num_feature_levels]):
            position = self.position_embedder(x.shape, x.device, x.dtype, None)
            projected = self.input_projections[i](x).flatten(2) + self.level_embed.weight[i][None, :, None]
            positions.append(position.flatten(2).permute(2, 0, 1))
            features.append(projected.permute(2, 0, 1))
        n = mask_features.shape[0]
        return self.decoder(
            inputs_embeds=self.queries_features.weight.unsqueeze(1).repeat(1, n, 1),
            multi_stage_positional_embeddings=positions,
            pixel_embeddings=mask_features,
            encoder_hidden_states=features,
            query_position_embeddings=self.queries_embedder.weight.unsqueeze(1).repeat(1, n, 1),
            feature_size_list=[x.shape[-2:] for x in multi_scale_features],
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            factored=not observed(self),
        )


class Model(Mixin):
    """`forward` of `Mask2FormerModel`: with `factored`, masks_queries_logits may hold :class:`FactoredMasks`."""

    # Attributes of the original class.
    config: Any
    pixel_level_module: nn.Module
    transformer_module: nn.Module

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        *,
        factored: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not factored or not isinstance(self.transformer_module, TransformerModule):
            return super().forward(
                pixel_values=pixel_values,
                pixel_mask=pixel_mask,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                return_dict=return_dict,
                **kwargs,
            )
        pixels = self.pixel_level_module(pixel_values=pixel_values, output_hidden_states=output_hidden_states)
        decoded = self.transformer_module(
            multi_scale_features=pixels.decoder_hidden_states,
            mask_features=pixels.decoder_last_hidden_state,
            output_hidden_states=True,
            output_attentions=output_attentions,
            factored=not observed(self),
        )

        def where_asked(x: Any) -> Any:
            return x if output_hidden_states else None

        return _published().Mask2FormerModelOutput(
            encoder_last_hidden_state=pixels.encoder_last_hidden_state,
            pixel_decoder_last_hidden_state=pixels.decoder_last_hidden_state,
            transformer_decoder_last_hidden_state=decoded.last_hidden_state,
            encoder_hidden_states=where_asked(pixels.encoder_hidden_states),
            pixel_decoder_hidden_states=where_asked(pixels.decoder_hidden_states),
            transformer_decoder_hidden_states=where_asked(decoded.hidden_states),
            transformer_decoder_intermediate_states=where_asked(decoded.intermediate_hidden_states),
            attentions=decoded.attentions,
            masks_queries_logits=decoded.masks_queries_logits,
        )


class Criterion(MaskLosses):
    """`forward` of the loss, and `loss_masks`: masks may be factored, and may be of any floating dtype."""

    #: The matcher that this class replaces, too.
    _m2f_matcher = _MATCHER

    # Attributes of the original class.
    num_labels: int

    def forward(
        self,
        masks_queries_logits: Masks,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Given],
        class_labels: Sequence[Tensor],
        auxiliary_predictions: Sequence[dict[str, Any]] | None = None,
    ) -> dict[str, Tensor]:
        auxiliary = list(auxiliary_predictions or ())
        reason = matcher_problem(self, self._m2f_matcher)
        if reason is not None:
            warn_unfused(self, reason)
        if reason is not None or has_own_losses(self, bool(auxiliary)) or not losses_served(masks_queries_logits):
            unfused: dict[str, Tensor] = super().forward(
                logits_of(masks_queries_logits),
                class_queries_logits,
                dense_masks(mask_labels, class_queries_logits.device),
                class_labels,
                [{**x, "masks_queries_logits": logits_of(x["masks_queries_logits"])} for x in auxiliary],
            )
            return unfused
        outputs = [(x["class_queries_logits"], x["masks_queries_logits"]) for x in auxiliary]
        outputs.append((class_queries_logits, masks_queries_logits))
        *earlier, last = point_losses(self, self.num_labels, outputs, mask_labels, class_labels)
        for i, losses in enumerate(earlier):
            last.update({f"{name}_{i}": loss for name, loss in losses.items()})
        return last


#: Fields of the model's output that are returned where hidden states are asked for.
_HIDDEN = ("encoder_hidden_states", "pixel_decoder_hidden_states", "transformer_decoder_hidden_states")


class ForUniversalSegmentation(Mixin):
    """`forward` of the model with heads: mask logits of the last output, and of the others on request."""

    # Attributes of the original class.
    config: Any
    model: nn.Module
    criterion: nn.Module
    class_predictor: nn.Module
    weight_dict: dict[str, float]
    get_auxiliary_logits: Any
    get_loss_dict: Any
    get_loss: Any

    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: Sequence[Given] | None = None,
        class_labels: list[Tensor] | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        config = self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        # Without either of the two the original finds no intermediate states and fails.
        states_exist = hidden or config.use_auxiliary_loss
        if attentions or not states_exist or not isinstance(self.model, Model):
            return super().forward(
                pixel_values=pixel_values,
                mask_labels=mask_labels,
                class_labels=class_labels,
                pixel_mask=pixel_mask,
                output_hidden_states=output_hidden_states,
                output_auxiliary_logits=output_auxiliary_logits,
                output_attentions=output_attentions,
                return_dict=return_dict,
                **kwargs,
            )
        auxiliary = config.output_auxiliary_logits if output_auxiliary_logits is None else output_auxiliary_logits
        supervised = mask_labels is not None and class_labels is not None
        takes_factors = takes_factored_masks(self.criterion) and check_model(self) is None
        # Hooks see every call.
        first = 0 if supervised or auxiliary or watched(self.class_predictor) else -1
        outputs, classes = captured(self._m2f_predict)(pixel_values, pixel_mask, first, bool(hidden))
        masks: tuple[Masks, ...] = outputs.masks_queries_logits
        last = logits_of(masks[-1])
        logits: tuple[Tensor, ...] = ()
        if auxiliary or (supervised and not takes_factors):
            logits = (*(logits_of(x) for x in masks[:-1]), last)
        loss = None
        if supervised:
            given = masks if takes_factors else logits
            if not takes_factors:
                assert mask_labels is not None
                mask_labels = dense_masks(mask_labels, last.device)
            predicted = {
                "masks_queries_logits": given[-1],
                "class_queries_logits": classes[-1],
                "mask_labels": mask_labels,
                "class_labels": class_labels,
                "auxiliary_predictions": self.get_auxiliary_logits(classes, given),
            }
            if takes_factors:
                loss = weighted_total(self.criterion(**predicted), self.weight_dict)
            else:
                loss = self.get_loss(self.get_loss_dict(**predicted))
        output = _published().Mask2FormerForUniversalSegmentationOutput(
            loss=loss,
            class_queries_logits=classes[-1],
            masks_queries_logits=last,
            auxiliary_logits=self.get_auxiliary_logits(classes, logits) if auxiliary else None,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            pixel_decoder_last_hidden_state=outputs.pixel_decoder_last_hidden_state,
            transformer_decoder_last_hidden_state=outputs.transformer_decoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            pixel_decoder_hidden_states=outputs.pixel_decoder_hidden_states,
            transformer_decoder_hidden_states=outputs.transformer_decoder_hidden_states,
            attentions=outputs.attentions,
        )
        if config.return_dict if return_dict is None else return_dict:
            return output
        return tuple(x for x in output.values() if x is not None)

    def _m2f_predict(
        self, pixel_values: Tensor, pixel_mask: Tensor | None, first: int, hidden: bool
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """The model's output with the masks, and the class logits, of the predictions from number `first` on.

        Nothing in it needs targets: it can be replayed as a CUDA graph.
        """
        outputs = self.model(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            output_hidden_states=True,
            output_attentions=False,
            return_dict=True,
            factored=True,
        )
        states = outputs.transformer_decoder_intermediate_states[first:]
        if len(states) > 1 and not watched(self.class_predictor):
            classes = self.class_predictor(torch.stack(states).transpose(1, 2)).unbind()
        else:
            classes = tuple(self.class_predictor(state.transpose(0, 1)) for state in states)
        kept = {
            "masks_queries_logits": outputs.masks_queries_logits[first:],
            **({} if hidden else dict.fromkeys(_HIDDEN)),
            "transformer_decoder_intermediate_states": None,
        }
        return replace(outputs, **kept), classes


# ---------------------------------------------------------------- what is left alone


def layer_problem(layer: Any) -> str | None:
    """The reason why a decoder layer cannot be fused, or None."""
    return attention_problem(layer.cross_attn, gathered=not gathers(layer))


def predictor_problem(predictor: nn.Module) -> str | None:
    """The reason why the mask predictor cannot be replaced by its embedder, or None."""
    if qualified_name(type(predictor)) != f"{_MODULE}.Mask2FormerMaskPredictor":
        return f"its mask predictor is {qualified_name(type(predictor))}, unknown to m2f_kernels"
    return "its mask predictor has hooks, which are only served by calling it" if watched(predictor) else None


def check_decoder(decoder: Any) -> str | None:
    return predictor_problem(decoder.mask_predictor) or layers_problem(decoder.layers, DecoderLayer)


def takes_factored_masks(criterion: nn.Module) -> bool:
    """True if a criterion's `forward` is the one here, and not one of a class derived from it."""
    return isinstance(criterion, Criterion) and runs(criterion, Criterion.forward)


def check_criterion(criterion: Any) -> str | None:
    return criterion_left(criterion, _MATCHER)


def partly_criterion(criterion: Any) -> str | None:
    return criterion_partly(criterion, _MATCHER)


def check_model(model: Any) -> str | None:
    methods = ("get_loss_dict", "get_loss", "get_auxiliary_logits")
    return subclass_problem(model, f"{_MODULE}.Mask2FormerForUniversalSegmentation", methods)


_FACTORED = "masks stay two factors, multiplied only where they are returned"

REPLACEMENTS = {
    f"{_MODULE}.Mask2Former{name}": replacement
    for name, replacement in {
        "SinePositionEmbedding": Replacement(PositionEmbedding, POSITIONS),
        "PixelDecoderEncoderLayer": Replacement(EncoderLayer, ENCODER_LAYER),
        "PixelDecoderEncoderOnly": Replacement(Encoder, ENCODER, check_encoder),
        "PixelDecoder": Replacement(Mask2FormerPixelDecoder, PIXEL_DECODER, check_pixel_decoder),
        "MaskedAttentionDecoderLayer": Replacement(DecoderLayer, ATTENTION, layer_problem),
        "MaskedAttentionDecoder": Replacement(Decoder, MASKS, check_decoder, DECODER_OPS),
        "TransformerModule": Replacement(TransformerModule, _FACTORED),
        "Model": Replacement(Model, _FACTORED),
        "HungarianMatcher": Replacement(Matcher, MATCHING, check_matcher, MATCHER_OPS, (Matcher,)),
        "Loss": Replacement(
            Criterion, LOSSES, check_criterion, CRITERION_OPS, (Criterion, MaskLosses), partly_criterion
        ),
        "ForUniversalSegmentation": Replacement(ForUniversalSegmentation, _FACTORED, check_model),
    }.items()
}
