"""Weights held once in the dtype of inference."""

import pytest
import torch
from PIL import Image

from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.backbone import FrozenBatchNorm2d
from m2f_model.cli import main
from m2f_model.segment import Segmenter
from tests.model.peers import photograph


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    Mask2Former(Mask2FormerConfig.tiny(5)).save_pretrained(path)
    return path


def logits(output):
    return output.class_logits.double(), output.masks.mask_embed.double(), output.masks.mask_features.double()


@torch.no_grad()
def test_no_worse_than_autocast(checkpoint):
    exact, held = Mask2Former.from_pretrained(checkpoint), Mask2Former.from_pretrained(checkpoint, dtype=torch.bfloat16)
    pixels = photograph("coffee", 64, 96)
    with torch.autocast("cpu", torch.bfloat16):
        cast = logits(exact(pixels))
    found = held(pixels.bfloat16())
    assert found.class_logits.dtype == found.masks.mask_features.dtype == torch.bfloat16
    for a, b, truth in zip(logits(found), cast, logits(exact(pixels)), strict=True):
        error, autocasts = (float((x - truth).norm() / truth.norm()) for x in (a, b))
        assert error <= 2 * autocasts + 2**-7


def test_what_is_converted(checkpoint):
    model = Mask2Former.from_pretrained(checkpoint, dtype=torch.float16)
    frozen = {id(p) for m in model.modules() if isinstance(m, FrozenBatchNorm2d) for p in m.parameters()}
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if id(p) in frozen else torch.float16), name
    with pytest.raises(TypeError, match=r"^dtype: expected .*bfloat16.*; got torch.int8"):
        model.hold_in(torch.int8)


def test_segmenter_follows_the_weights(checkpoint):
    image = Image.new("RGB", (96, 64), (90, 120, 30))
    model = Mask2Former.from_pretrained(checkpoint, dtype=torch.bfloat16)
    segmenter = Segmenter(model, "semantic", image_size=(64, 96))
    assert segmenter(image).shape == (64, 96)
    with pytest.warns(UserWarning, match="runs without a graph: a tensor is on 'cpu'"):
        eager = Segmenter(model, "semantic", image_size=(64, 96), cuda_graphs=True)(image)
    assert torch.equal(eager, segmenter(image))


def test_command(checkpoint, tmp_path, capsys):
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    given = ["segment", str(tmp_path / "image.png"), "--weights", str(checkpoint), "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as done:
        main([*given, "--task", "semantic", "--dtype", "bf16", "--size", "64", "96"])
    assert not done.value.code
    with pytest.raises(SystemExit) as done:
        main([*given, "--dtype", "int8"])
    assert done.value.code == 2
    assert "--dtype: expected fp32, bf16, fp16; got 'int8'" in capsys.readouterr().err
