"""OneFormer of `transformers`: attention masks, masked attention, losses. Mask logits are computed only if needed.

OneFormer always returns the predictions of all decoder outputs. The masks of the earlier ones are multiplied at first
access (:class:`AuxiliaryPrediction`). Text encoder and contrastive loss are the original's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from m2f_kernels.constants import replayable
from m2f_kernels.graphs import captured
from m2f_kernels.integrations.transformers._swap import Mixin, Replacement, observed
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
    losses_served,
    matcher_problem,
    own_weights,
    point_losses,
    project_levels,
    subclass_problem,
    unfused_layer,
    warn_unfused,
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
from m2f_kernels.nn.point_mask_criterion import apart
from m2f_kernels.ops.attention_mask import attention_mask_levels, predict_attention_mask
from m2f_kernels.ops.points import Given

_MODULE = "transformers.models.oneformer.modeling_oneformer"
_MATCHER = f"{_MODULE}.OneFormerHungarianMatcher"
_MASKS = "masks_queries_logits"


class AuxiliaryPrediction(dict[str, Any]):
    """{"class_queries_logits": [N, Q, num_labels + 1], "masks_queries_logits": [N, Q, h, w]} of a decoder output.

    A dictionary whose masks are computed at first access. Copying and pickling access them.
    """

    factors: FactoredMasks | None = None

    @classmethod
    def factored(cls, classes: Tensor, factors: FactoredMasks) -> AuxiliaryPrediction:
        made = cls(class_queries_logits=classes, masks_queries_logits=None)
        made.factors = factors
        return made

    def _multiply(self) -> None:
        if self.factors is not None and super().__getitem__(_MASKS) is None:
            self[_MASKS] = self.factors.logits()

    def __getitem__(self, key: str) -> Any:
        self._multiply()
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        # Overriding it makes dict(x) and {**x} ask for the items one by one, and not copy the table.
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        self._multiply()
        return super().get(key, default)

    def items(self) -> Any:
        self._multiply()
        return super().items()

    def values(self) -> Any:
        self._multiply()
        return super().values()

    def pop(self, *args: Any) -> Any:
        self._multiply()
        return super().pop(*args)

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __eq__(self, other: object) -> bool:
        self._multiply()
        return super().__eq__(other)

    def __repr__(self) -> str:
        return repr(self.copy())

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)


def _flatten(x: AuxiliaryPrediction) -> tuple[list[Any], Any]:
    """The values of the dictionary, and its keys; in a CUDA graph class logits and both factors."""
    if x.factors is None or not replayable():
        return list(x.values()), list(x)
    return [x["class_queries_logits"], *x.factors], None


def _unflatten(values: Any, keys: list[str] | None) -> dict[str, Any]:
    if keys is not None:
        return dict(zip(keys, values, strict=True))
    classes, embed, features = values
    return AuxiliaryPrediction.factored(classes, FactoredMasks(embed, features))


# Whatever maps over the tensors in a model's output finds those of a dictionary.
_pytree.register_pytree_node(AuxiliaryPrediction, _flatten, _unflatten)


def masks_of(prediction: dict[str, Any]) -> Masks:
    """The masks of an auxiliary prediction: factored if they have not been multiplied yet."""
    factors = prediction.factors if isinstance(prediction, AuxiliaryPrediction) else None
    masks: Masks = prediction[_MASKS] if factors is None else factors
    return masks


def _published() -> Any:
    return sys.modules[_MODULE]


class OneFormerPixelDecoder(PixelDecoder):
    # Attributes of the original class.
    lateral_convs: list[Any]
    output_convs: list[Any]

    def _m2f_shapes(self, shapes: Tensor) -> dict[str, Tensor]:
        return {"spatial_shapes": shapes}

    def _m2f_convolutions(self) -> list[tuple[Any, Any]]:
        return list(zip(self.lateral_convs, self.output_convs, strict=True))

    def _m2f_output(self, mask_features: Tensor, maps: list[Tensor], attentions: Any) -> Any:
        return _published().OneFormerPixelDecoderOutput(
            mask_features=mask_features, multi_scale_features=maps, attentions=attentions
        )


class CrossAttentionLayer(Mixin):
    """`forward` of the masked cross-attention with residual and norm."""

    # Attributes of the original class.
    multihead_attn: nn.MultiheadAttention
    norm: nn.Module
    dropout: nn.Module
    normalize_before: bool

    def forward(
        self,
        output: Tensor,
        memory: Tensor | None,
        memory_mask: Tensor | PackedMask | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        query_weight: Tensor | None = None,
        query_bias: Tensor | None = None,
        pixels: Tensor | None = None,
        pixel_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        to = Memory(key, value, query_weight, query_bias, pixels, pixel_positions)
        if to.empty:
            return super().forward(output, memory, memory_mask, memory_key_padding_mask, pos, query_pos)
        assert isinstance(memory_mask, tuple)
        query = self.norm(output) if self.normalize_before else output
        if query_pos is not None:
            query = query + query_pos
        attended = attend(self.multihead_attn, query, to, PackedMask(*memory_mask))
        output = output + self.dropout(attended)
        return output if self.normalize_before else self.norm(output), None


class DecoderLayer(Mixin):
    """`forward` of a decoder layer: masked attention from a packed mask and projected keys and values."""

    # Attributes of the original class.
    cross_attn: nn.Module
    self_attn: nn.Module
    ffn: nn.Module

    def forward(
        self,
        index: int,
        output: Tensor,
        multi_stage_features: Sequence[Tensor] | None,
        multi_stage_positional_embeddings: Sequence[Tensor] | None,
        attention_mask: Tensor | PackedMask | None = None,
        query_embeddings: Tensor | None = None,
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
            return super().forward(
                index,
                output,
                multi_stage_features,
                multi_stage_positional_embeddings,
                attention_mask=attention_mask,
                query_embeddings=query_embeddings,
                output_attentions=output_attentions,
            )
        output, _ = self.cross_attn(output, None, attention_mask, None, None, query_embeddings, *memory)
        output, _ = self.self_attn(output, query_pos=query_embeddings)
        return (self.ffn(output),)


class Decoder(Mixin):
    """`forward` of the transformer decoder: one resizing of mask features, one projection per level."""

    # Attributes of the original class.
    layers: nn.ModuleList
    query_transformer: nn.Module
    query_input_projection: nn.Module
    decoder_norm: nn.Module
    class_embed: nn.Module
    mask_embed: nn.Module
    use_task_norm: bool
    use_auxiliary_loss: bool

    def forward(
        self,
        task_token: Any = None,
        multi_stage_features: Any = None,
        multi_stage_positional_embeddings: Any = None,
        mask_features: Any = None,
        query_features: Any = None,
        query_embeddings: Any = None,
        query_embedder: Any = None,
        size_list: Any = None,
        output_attentions: bool | None = None,
    ) -> Any:
        if output_attentions or not (kernels_serve(DECODER_OPS, mask_features) and self._m2f_fusable()):
            return super().forward(
                task_token,
                multi_stage_features,
                multi_stage_positional_embeddings,
                mask_features,
                query_features,
                query_embeddings,
                query_embedder,
                size_list,
                output_attentions,
            )
        if self.use_task_norm:
            task_token = self.decoder_norm(task_token)
        object_queries = self.query_transformer(
            query_features,
            None,
            query_embedder.weight[:-1],
            self.query_input_projection(mask_features),
            task_token if self.use_task_norm else None,
        )
        queries = torch.cat([object_queries[0].permute(1, 0, 2), task_token], dim=0)
        x, classes, embeds = self._m2f_decode(
            queries, multi_stage_features, multi_stage_positional_embeddings, mask_features, query_embeddings, size_list
        )
        factors = [FactoredMasks(embed, mask_features) for embed in embeds]
        return _published().OneFormerTransformerDecoderOutput(
            object_queries=x.permute(1, 0, 2),
            contrastive_logits=queries.permute(1, 0, 2),
            prediction_masks=factors[-1].logits(),
            prediction_class=classes[-1],
            auxiliary_predictions=self._m2f_auxiliary(classes, factors) if self.use_auxiliary_loss else None,
            attentions=((),) * len(self.layers),
        )

    def _m2f_fusable(self) -> bool:
        reason = unfused_layer(
            self.layers, DecoderLayer, layer_problem, lambda layer: drops(layer.cross_attn.multihead_attn)
        )
        if reason is not None:
            warn_unfused(self, reason)
        return len(self.layers) > 0 and reason is None

    def _m2f_decode(
        self,
        x: Tensor,
        levels: Sequence[Tensor],
        level_positions: Sequence[Tensor],
        mask_features: Tensor,
        positions: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The queries [Q, N, C] after the last layer; class logits and mask embeddings before the first and of each."""
        layers: list[Any] = list(self.layers)
        attentions = [layer.cross_attn.multihead_attn for layer in layers]
        themselves = [gathers(layer, layer.cross_attn) for layer in layers]
        memory = project_levels(attentions, levels, level_positions, themselves)
        used = [(int(h), int(w)) for h, w in sizes[: len(layers)]]
        mask_levels, flags = attention_mask_levels(mask_features, used, len(layers), x.shape[0])
        states = [x]
        found: list[tuple[Tensor, Tensor]] = []
        # What is computed again for all outputs only makes masks here, which have no gradient.
        again = differentiated_at_once(self.decoder_norm, self.class_embed, self.mask_embed)

        def normalise(x: Tensor) -> Tensor:
            normalised: Tensor = self.decoder_norm(x)
            return normalised.transpose(-3, -2)

        for i, layer in enumerate(layers):
            if again:
                embed = self.mask_embed(normalise(x.detach()))
            else:
                normalised = normalise(x)
                embed = self.mask_embed(normalised)
                found.append((self.class_embed(normalised), embed))
            mask = predict_attention_mask(embed, mask_levels[i % len(levels)], flags[i])
            if observed(layer):
                # By name, as the original: hooks are given what is passed by position.
                named = {"attention_mask": mask, "query_embeddings": positions, **memory[i].named()}
                (x,) = layer(
                    index=i, output=x, multi_stage_features=None, multi_stage_positional_embeddings=None, **named
                )
            else:
                (x,) = layer(i, x, None, None, mask, positions, False, *memory[i])
            states.append(x)
        if again:
            normalised = normalise(torch.stack(states))
            return x, list(self.class_embed(normalised).unbind()), list(self.mask_embed(normalised).unbind())
        normalised = normalise(x)
        found.append((self.class_embed(normalised), self.mask_embed(normalised)))
        return x, [y for y, _ in found], [y for _, y in found]

    @staticmethod
    def _m2f_auxiliary(classes: list[Tensor], factors: list[FactoredMasks]) -> tuple[dict[str, Any], ...]:
        pairs = zip(classes[:-1], factors[:-1], strict=True)
        if torch.compiler.is_compiling():
            # A graph's outputs are tensors.
            return tuple({"class_queries_logits": c, _MASKS: f.logits()} for c, f in pairs)
        return tuple(AuxiliaryPrediction.factored(c, f) for c, f in pairs)


class QueryLayer(Mixin):
    """`forward` of a layer that makes the queries from the pixels at stride 4, without its attention weights."""

    # Attributes of the original class.
    self_attn: nn.Module
    multihead_attn: nn.Module
    linear1: nn.Module
    linear2: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    dropout: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module
    dropout3: nn.Module
    activation: Any
    normalize_before: bool

    def forward(
        self,
        output: Tensor,
        memory: Tensor,
        output_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        output_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        # Attention here is nearly uniform. The gradients of its scores are small differences, of which a backward pass
        # that has only the output and not the weights loses most digits.
        def weights(attention: nn.Module) -> bool:
            return torch.is_grad_enabled() or observed(attention)

        def placed(x: Tensor, position: Tensor | None) -> Tensor:
            return x if position is None else x + position

        def attend_queries(x: Tensor) -> Tensor:
            q = placed(x, query_pos)
            out = self.self_attn(
                q,
                q,
                value=x,
                attn_mask=output_mask,
                key_padding_mask=output_key_padding_mask,
                need_weights=weights(self.self_attn),
            )
            return self.dropout1(out[0])

        def attend_pixels(x: Tensor) -> Tensor:
            out = self.multihead_attn(
                query=placed(x, query_pos),
                key=placed(memory, pos),
                value=memory,
                attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask,
                need_weights=weights(self.multihead_attn),
            )
            return self.dropout2(out[0])

        def feed_forward(x: Tensor) -> Tensor:
            out = self.linear2(self.dropout(self.activation(self.linear1(x))))
            return self.dropout3(out)

        for block, norm in ((attend_queries, self.norm1), (attend_pixels, self.norm2), (feed_forward, self.norm3)):
            output = output + block(norm(output)) if self.normalize_before else norm(output + block(output))
        return output


class Model(Mixin):
    """`forward` of `OneFormerModel`, which can be replayed as a CUDA graph: it needs no targets."""

    def forward(
        self,
        pixel_values: Tensor,
        task_inputs: Tensor,
        text_inputs: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        inputs = (pixel_values, task_inputs, text_inputs, pixel_mask)
        return captured(self._m2f_forward)(*inputs, output_hidden_states, output_attentions, return_dict, **kwargs)

    def _m2f_forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Criterion(MaskLosses):
    """`forward` of the loss, and `loss_masks`: masks may be factored, and may be of any floating dtype."""

    # Attributes of the original class.
    num_classes: int
    loss_contrastive: Any

    def forward(
        self,
        masks_queries_logits: Masks,
        class_queries_logits: Tensor,
        contrastive_queries_logits: Tensor | None,
        mask_labels: Sequence[Given],
        class_labels: Sequence[Tensor],
        text_queries: Tensor | None,
        auxiliary_predictions: Sequence[dict[str, Any]] | None = None,
        calculate_contrastive_loss: bool = True,
    ) -> dict[str, Tensor]:
        reason = matcher_problem(self, _MATCHER)
        if reason is not None:
            warn_unfused(self, reason)
        if (
            reason is not None
            or has_own_losses(self, bool(auxiliary_predictions))
            or not losses_served(masks_queries_logits)
        ):
            return super().forward(
                masks_queries_logits,
                class_queries_logits,
                contrastive_queries_logits,
                dense_masks(mask_labels, class_queries_logits.device),
                class_labels,
                text_queries,
                auxiliary_predictions,
                calculate_contrastive_loss,
            )
        outputs = [(x["class_queries_logits"], masks_of(x)) for x in auxiliary_predictions or ()]
        outputs.append((class_queries_logits, masks_queries_logits))
        *earlier, last = point_losses(self, self.num_classes, outputs, mask_labels, class_labels)
        if calculate_contrastive_loss:
            # The original takes the queries in float32 and the texts as they are: two dtypes in low precision.
            texts = text_queries if text_queries is None else text_queries.float()
            last.update(self.loss_contrastive(contrastive_queries_logits, texts))
        for i, losses in enumerate(earlier):
            last.update({f"{name}_{i}": loss for name, loss in losses.items()})
        return last


class ForUniversalSegmentation(Mixin):
    """The weighted losses and their sum in a few kernels, where the original launches three for each loss."""

    # Attributes of the original class.
    criterion: Any
    weight_dict: Mapping[str, float]

    def get_loss_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.criterion(*args, **kwargs)
        weights = own_weights(losses, self.weight_dict)
        if any(x.numel() != 1 for x in losses.values()):  # of a criterion of the user's
            return {name: loss * weight for (name, loss), weight in zip(losses.items(), weights, strict=True)}
        weighted = apart(*(x.reshape(1) for x in losses.values()), weights=weights)
        return {name: x.view_as(loss) for (name, loss), x in zip(losses.items(), weighted, strict=True)}

    def get_loss(self, loss_dict: dict[str, Tensor]) -> Tensor:
        losses = list(loss_dict.values())
        if any(x.numel() != 1 for x in losses):
            return sum(losses, start=torch.zeros((), device=losses[0].device))
        shape = torch.broadcast_shapes(*(x.shape for x in losses))
        return torch.stack([x.reshape(()) for x in losses]).sum().reshape(shape)


# ---------------------------------------------------------------- what is left alone


def layer_problem(layer: Any) -> str | None:
    """The reason why a decoder layer cannot be fused, or None."""
    if not isinstance(layer.cross_attn, CrossAttentionLayer):
        reason = layers_problem([layer.cross_attn], CrossAttentionLayer)
        return reason or "its cross-attention layer is left alone"
    if observed(layer.cross_attn):
        return "its cross-attention layer has hooks, which see attention weights"
    gathered = not gathers(layer, layer.cross_attn)
    return attention_problem(layer.cross_attn.multihead_attn, gathered)


def check_layer(layer: Any) -> str | None:
    return layers_problem([layer.cross_attn], CrossAttentionLayer)


def check_cross_attention(layer: Any) -> str | None:
    # A sharded layer's weights are checked when it runs.
    return attention_problem(layer.multihead_attn, gathered=False)


def check_decoder(decoder: Any) -> str | None:
    methods = ("forward_prediction_heads", "_get_aux_predictions")
    reason = subclass_problem(decoder, f"{_MODULE}.OneFormerTransformerDecoder", methods)
    return reason or layers_problem(decoder.layers, DecoderLayer)


def check_criterion(criterion: Any) -> str | None:
    return criterion_left(criterion, _MATCHER)


def partly_criterion(criterion: Any) -> str | None:
    return criterion_partly(criterion, _MATCHER)


def check_segmentation(model: Any) -> str | None:
    methods = ("get_loss_dict", "get_loss")
    return subclass_problem(model, f"{_MODULE}.OneFormerForUniversalSegmentation", methods)


def check_query_layer(layer: Any) -> str | None:
    return subclass_problem(
        layer, f"{_MODULE}.OneFormerTransformerDecoderQueryTransformerDecoderLayer", ("forward_pre", "forward_post")
    )


REPLACEMENTS = {
    f"{_MODULE}.OneFormer{name}": replacement
    for name, replacement in {
        "SinePositionEmbedding": Replacement(PositionEmbedding, POSITIONS),
        "PixelDecoderEncoderLayer": Replacement(EncoderLayer, ENCODER_LAYER),
        "PixelDecoderEncoderOnly": Replacement(Encoder, ENCODER, check_encoder),
        "PixelDecoder": Replacement(OneFormerPixelDecoder, PIXEL_DECODER, check_pixel_decoder),
        "TransformerDecoderQueryTransformerDecoderLayer": Replacement(
            QueryLayer, "attention without its weights, where there are no gradients", check_query_layer
        ),
        "TransformerDecoderCrossAttentionLayer": Replacement(CrossAttentionLayer, ATTENTION, check_cross_attention),
        "TransformerDecoderLayer": Replacement(DecoderLayer, "hands on what masked attention needs", check_layer),
        "TransformerDecoder": Replacement(Decoder, MASKS, check_decoder, DECODER_OPS),
        "Model": Replacement(Model, "the part that CUDA graphs replay where targets are given"),
        "ForUniversalSegmentation": Replacement(
            ForUniversalSegmentation, "losses weighted and added up at once", check_segmentation
        ),
        "HungarianMatcher": Replacement(Matcher, MATCHING, check_matcher, MATCHER_OPS, (Matcher,)),
        "Loss": Replacement(
            Criterion, LOSSES, check_criterion, CRITERION_OPS, (Criterion, MaskLosses), partly_criterion
        ),
    }.items()
}
