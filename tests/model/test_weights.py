"""Weights in Hugging Face's format and under detectron2's names; what does not fit is listed."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from m2f_model import Mask2Former, Mask2FormerConfig, WeightsError
from m2f_model.labels import DATASETS
from m2f_model.segment import prepare
from m2f_model.weights import from_detectron2, from_huggingface, to_detectron2, to_huggingface
from tests.model.peers import CONFIGS, photograph, their_model


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", CONFIGS)
def test_huggingface_both_ways(name, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Mask2Former.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {p.name for p in (tmp_path / "ours").iterdir()} == names
    again, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values())
    same(again.state_dict(), theirs.state_dict())
    same(from_huggingface(to_huggingface(ours.state_dict())), ours.state_dict())


def test_our_settings_survive(tmp_path):
    config = Mask2FormerConfig.tiny(2, label_names=("sky", "cat"), stuff_labels=(0,))
    Mask2Former(config).save_pretrained(tmp_path)
    loaded = Mask2Former.from_pretrained(tmp_path).config
    changed = [f.name for f in dataclasses.fields(config) if getattr(loaded, f.name) != getattr(config, f.name)]
    assert changed == ["backbone"]  # written out in full
    assert config.backbone.items() <= loaded.backbone.items()
    assert not loaded.frozen_batch_norm


# ---------------------------------------------------------------- checkpoints of the hub: without our own words


def hub(path, preprocessor=None, id2label=None, **fields):
    """A checkpoint as `transformers` writes it."""
    config = Mask2FormerConfig.tiny(**fields).to_transformers().to_dict()
    del config["m2f"]
    if id2label is not None:
        config |= {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**config)).save_pretrained(path)
    if preprocessor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path


THEIR_MEAN = {"image_mean": [0.48500001430511475, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    ("preprocessor", "expected"),
    [
        ({"size": {"shortest_edge": 640, "longest_edge": 2560}, **THEIR_MEAN}, {"image_size": (640, 2560)}),
        ({"size": 512, "max_size": 2048}, {"image_size": (512, 2048)}),
        ({"size": {"shortest_edge": 512}, "_max_size": 2048}, {"image_size": (512, 2048)}),
        ({"size": {"height": 384, "width": 320}}, {"image_size": (384, 320), "keep_aspect_ratio": False}),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, {"pixel_mean": (127.5,) * 3, "pixel_std": (63.75,) * 3}),
        ({"image_mean": [9] * 3, "image_std": [3] * 3, "rescale_factor": 1}, {"pixel_mean": (9,) * 3}),
    ],
)
def test_hub_image_preparation(preprocessor, expected, tmp_path, recwarn):
    config = Mask2Former.from_pretrained(hub(tmp_path, preprocessor, num_labels=3)).config
    default = {"image_size": (800, 1333), "keep_aspect_ratio": True, "pixel_mean": (123.675, 116.28, 103.53)}
    assert {name: getattr(config, name) for name in {**default, **expected}} == {**default, **expected}
    assert not [w for w in recwarn if w.category is UserWarning]


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        (None, r"no preprocessor_config\.json.* resized to \(800, 1333\) .*--size"),
        ({"do_resize": False, "resample": 3}, r"says do_resize=False, resample=3; here images are resized"),
        ({"size": {"longest_edge": 640}}, r"says size=\{'longest_edge': 640\}"),
    ],
)
def test_hub_image_preparation_that_is_not_known(preprocessor, message, tmp_path):
    with pytest.warns(UserWarning, match=message):
        assert Mask2Former.from_pretrained(hub(tmp_path, preprocessor, num_labels=3)).config.image_size == (800, 1333)


def test_hub_labels(tmp_path):
    """Names need not count from 0; those of a published data set say what is stuff; 133 labels are COCO's without."""
    names = {1: "cat", 2: "sky", 3: "grass"}
    config = Mask2Former.from_pretrained(hub(tmp_path / "a-semantic", {}, names, num_labels=3)).config
    assert (config.label_names, config.stuff_labels, config.semantic_only) == (("cat", "sky", "grass"), None, True)
    ade20k = dict(enumerate(DATASETS["ade20k-panoptic"].names))
    config = Mask2Former.from_pretrained(hub(tmp_path / "b", {}, ade20k, num_labels=150)).config
    assert (len(config.stuff_labels), config.semantic_only) == (50, False)
    config = Mask2Former.from_pretrained(hub(tmp_path / "c", {}, num_labels=133)).config
    assert (config.label_names[80], config.stuff_labels) == ("banner", tuple(range(80, 133)))


def test_our_preparation_is_theirs(tmp_path):
    """`transformers`' processor, from the folder that we write, prepares an image as `m2f segment` does.

    Where sides are multiples of 32, that is: it stretches images to those, the published evaluation pads them.
    """
    normalisation = {"pixel_mean": (100.0, 110.0, 120.0), "pixel_std": (50.0, 60.0, 70.0)}
    config = Mask2FormerConfig.tiny(2, image_size=(64, 128), **normalisation)
    Mask2Former(config).save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 105, 3), np.uint8))
    theirs = transformers.Mask2FormerImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt")
    ours, frame = prepare(image, Mask2Former.from_pretrained(tmp_path).config)
    assert frame == ((64, 96), (64, 96), (70, 105))
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-4, rtol=0)
    fixed = dataclasses.replace(config, image_size=(64, 32), keep_aspect_ratio=False)
    assert prepare(image, fixed)[1] == ((64, 32), (64, 32), (70, 105))
    Mask2Former(fixed).save_pretrained(tmp_path)
    assert Mask2Former.from_pretrained(tmp_path).config.image_size == (64, 32)


def test_another_number_of_labels_and_queries(tmp_path):
    Mask2Former(Mask2FormerConfig.tiny(2)).save_pretrained(tmp_path)
    with pytest.raises(WeightsError) as error:
        Mask2Former.from_pretrained(tmp_path, Mask2FormerConfig.tiny(3, num_queries=21))
    assert len(error.value.mismatched) == 5  # criterion.empty_weight is the fifth
    assert "class_predictor.bias: expected [4]; got [3]" in str(error.value)
    assert "queries_features.weight: expected [21, 64]; got [20, 64]" in str(error.value)
    assert not error.value.missing
    assert not error.value.unexpected


def test_missing_and_unexpected_are_listed(tmp_path):
    Mask2Former(Mask2FormerConfig.tiny(2, decoder_layers=4)).save_pretrained(tmp_path)
    with pytest.raises(WeightsError) as error:
        Mask2Former.from_pretrained(tmp_path, Mask2FormerConfig.tiny(2, decoder_layers=3))
    assert len(error.value.unexpected) == 22
    with pytest.raises(WeightsError) as error:
        Mask2Former.from_pretrained(tmp_path, Mask2FormerConfig.tiny(2, decoder_layers=5))
    assert len(error.value.missing) == 22
    assert "model.transformer_module.decoder.layers.4.cross_attn.in_proj_weight" in str(error.value)


# ---------------------------------------------------------------- detectron2


def norm(name):
    return [f"{name}.weight", f"{name}.bias"]


def resnet_names(blocks):
    """Names of detectron2's ResNet with bottleneck blocks and frozen batch norm."""
    statistics = [*norm("norm"), "norm.running_mean", "norm.running_var"]
    convs = ["backbone.stem.conv1"]
    for stage, count in enumerate(blocks, 2):
        convs.append(f"backbone.res{stage}.0.shortcut")
        convs += [f"backbone.res{stage}.{b}.conv{i}" for b in range(count) for i in (1, 2, 3)]
    return {name for conv in convs for name in (f"{conv}.weight", *(f"{conv}.{s}" for s in statistics))}


def swin_names(depths):
    """Names of the original Swin backbone, with its derived buffer."""
    names = [*norm("backbone.patch_embed.proj"), *norm("backbone.patch_embed.norm")]
    for i, depth in enumerate(depths):
        names += norm(f"backbone.norm{i}")
        if i < len(depths) - 1:
            names += [f"backbone.layers.{i}.downsample.reduction.weight", *norm(f"backbone.layers.{i}.downsample.norm")]
        for b in range(depth):
            block = f"backbone.layers.{i}.blocks.{b}"
            names += [f"{block}.attn.relative_position_bias_table", f"{block}.attn.relative_position_index"]
            for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
                names += norm(f"{block}.{part}")
    return set(names)


def head_names(encoder_layers, decoder_layers, old=False):
    """Names of the original pixel decoder and transformer decoder; `old`: of their first release."""
    pixel = "sem_seg_head" if old else "sem_seg_head.pixel_decoder"
    names = [f"{pixel}.transformer.level_embed", *norm(f"{pixel}.mask_features")]
    for part in ("adapter_1", "layer_1"):
        names += [f"{pixel}.{part}.weight", *norm(f"{pixel}.{part}.norm")]
    for i in range(3):
        names += [*norm(f"{pixel}.input_proj.{i}.0"), *norm(f"{pixel}.input_proj.{i}.1")]
    for i in range(encoder_layers):
        attention = [f"self_attn.{p}" for p in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")]
        for part in (*attention, "norm1", "linear1", "linear2", "norm2"):
            names += norm(f"{pixel}.transformer.encoder.layers.{i}.{part}")
    predictor = "sem_seg_head.predictor"
    queries = "static_query" if old else "query_feat"
    names += [f"{predictor}.{p}.weight" for p in (queries, "query_embed", "level_embed")]
    for part in ("decoder_norm", "class_embed", *(f"mask_embed.layers.{i}" for i in range(3))):
        names += norm(f"{predictor}.{part}")
    for i in range(decoder_layers):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            layer = f"{predictor}.transformer_{kind}_attention_layers.{i}"
            names += [f"{layer}.{attention}.in_proj_weight", f"{layer}.{attention}.in_proj_bias"]
            names += [*norm(f"{layer}.{attention}.out_proj"), *norm(f"{layer}.norm")]
        for part in ("linear1", "linear2", "norm"):
            names += norm(f"{predictor}.transformer_ffn_layers.{i}.{part}")
    return set(names)


VARIANTS = {
    "r50-coco-panoptic": resnet_names([3, 4, 6, 3]),
    "swin-tiny-ade20k-semantic": swin_names([2, 2, 6, 2]),
}


@pytest.mark.parametrize("preset", VARIANTS)
def test_detectron2_names_are_the_published_ones(preset):
    with torch.device("meta"):
        model = Mask2Former(Mask2FormerConfig.preset(preset))
    derived = {n for n in VARIANTS[preset] if n.endswith("relative_position_index")}
    assert set(to_detectron2(model.state_dict())) == (VARIANTS[preset] - derived) | head_names(6, 9)


def small(backbone):
    blocks = {"r50-coco-instance": {"depths": [1, 2, 1, 1]}, "swin-tiny-coco-instance": {"depths": [1, 1, 2, 1]}}
    config = Mask2FormerConfig.preset(backbone)
    return dataclasses.replace(
        config, backbone={**config.backbone, **blocks[backbone]}, encoder_layers=1, decoder_layers=2, feature_size=64
    )


@pytest.mark.parametrize("preset", ["r50-coco-instance", "swin-tiny-coco-instance"])
@pytest.mark.parametrize("kind", ["pkl", "pth", "old"])
def test_detectron2_files(preset, kind, tmp_path):
    config = small(preset)
    model = Mask2Former(config).eval()
    state = to_detectron2(model.state_dict())
    state["criterion.empty_weight"] = torch.ones(81)
    if "swin" in preset:
        state["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    if kind == "old":
        state = {
            k.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): v
            for k, v in state.items()
        }
        assert head_names(1, 2, old=True) <= state.keys()
    path = tmp_path / ("model.pkl" if kind == "pkl" else "model.pth")
    if kind == "pkl":
        content = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "third_party"}
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save({"model": state, "iteration": 7}, path)
    loaded = Mask2Former.load_detectron2(path, config)
    pixels = photograph("coffee", 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).masks.logits(), model(pixels).masks.logits())


def test_detectron2_fuses_in_the_order_query_key_value():
    state = to_detectron2(Mask2Former(small("swin-tiny-coco-instance")).state_dict())
    fused = state["backbone.layers.0.blocks.0.attn.qkv.weight"]
    ours = from_detectron2({"backbone.layers.0.blocks.0.attn.qkv.weight": fused})
    prefix = "backbone.body.swin.encoder.layers.0.blocks.0.attention"
    assert torch.equal(ours[f"{prefix}.q_proj.weight"], fused[:96])
    assert torch.equal(ours[f"{prefix}.k_proj.weight"], fused[96:192])
    assert torch.equal(ours[f"{prefix}.v_proj.weight"], fused[192:])


def test_detectron2_that_does_not_fit(tmp_path):
    config = small("r50-coco-instance")
    state = to_detectron2(Mask2Former(config).state_dict())
    state["sem_seg_head.predictor.surprise"] = torch.zeros(1)
    del state["backbone.res2.0.conv1.weight"]
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(WeightsError) as error:
        Mask2Former.load_detectron2(tmp_path / "model.pth", dataclasses.replace(config, num_labels=7, label_names=None))
    assert error.value.missing == ["backbone.body.encoder.stages.0.layers.0.layer.0.convolution.weight"]
    assert error.value.unexpected == ["sem_seg_head.predictor.surprise"]
    assert error.value.mismatched == [
        "transformer_decoder.class_head.weight: expected [8, 256]; got [81, 256]",
        "transformer_decoder.class_head.bias: expected [8]; got [81]",
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "fits"),
    [
        ("r50-ade20k-semantic", "r101-ade20k-semantic", ["r50-ade20k-panoptic", "r50-ade20k-semantic"]),
        ("swin-tiny-coco-instance", "swin-small-coco-panoptic", ["swin-tiny-coco-instance"]),
    ],
)
def test_detectron2_under_a_wrong_preset(right, wrong, fits, tmp_path):
    """One line that names the presets that would do."""
    with torch.device("meta"):
        state = to_detectron2(Mask2Former(Mask2FormerConfig.preset(right)).state_dict())
    # Shapes are all that counts: every tensor is one number, repeated.
    torch.save({k: torch.zeros(()).expand(v.shape) for k, v in state.items()}, tmp_path / "model.pth")
    with torch.device("meta"), pytest.raises(WeightsError) as error:
        Mask2Former.load_detectron2(tmp_path / "model.pth", Mask2FormerConfig.preset(wrong))
    assert error.value.hint == fits
    assert str(error.value).endswith(f"they fit {' or '.join(fits)}")
    assert error.value.summary.startswith(f"{tmp_path}/model.pth: expected the weights of this model; ")
    assert "\n" not in error.value.summary
    assert len(error.value.summary) < 500


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("name", ["model.pkl", "model.pth"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"model": Evil()}), pickle.dumps([1])])
def test_files_that_are_no_checkpoint(name, content, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a detectron2 checkpoint") as error:
        Mask2Former.load_detectron2(path, Mask2FormerConfig.tiny(2))
    assert str(path) in str(error.value)
    assert capsys.readouterr().out == ""


def test_detectron2_values_that_are_no_arrays(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": {"a": "b", "c": np.zeros(2)}}))
    with pytest.raises(ValueError, match="names with arrays under 'model'"):
        Mask2Former.load_detectron2(tmp_path / "model.pkl", Mask2FormerConfig.tiny(2))
