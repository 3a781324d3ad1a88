"""Backbones that were classifiers: features equal to the source model's, whatever wrote its parameters."""

import pickle

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from m2f_model import Mask2Former, Mask2FormerConfig, WeightsError
from m2f_model.backbone_weights import load_backbone, read_backbone
from tests.model.command import m2f
from tests.model.generated import Beach, write_panoptic

STAGES = ["stage1", "stage2", "stage3", "stage4"]
WIDTHS, DEPTHS = (16, 32, 64, 128), (1, 2, 1, 1)


def random_state(shapes, seed=0):
    """Parameters in ranges in which features neither vanish nor explode."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith(("running_var",)):
            state[name] = torch.rand(shape, generator=g) + 0.5
        elif len(shape) == 1:
            state[name] = torch.rand(shape, generator=g) * 0.5 + (0.75 if "weight" in name else -0.25)
        else:
            state[name] = torch.randn(shape, generator=g) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
    return state


# ---------------------------------------------------------------- ResNet, by torchvision's names


def norm_shapes(name, width):
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


def resnet_shapes(bottleneck):
    shapes = {"conv1.weight": (16, 3, 7, 7), **norm_shapes("bn1", 16), "fc.weight": (10, 128), "fc.bias": (10,)}
    came = 16
    for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), 1):
        for k in range(depth):
            inner = width // 4 if bottleneck else width
            sizes = [(inner, came, 1), (inner, inner, 3), (width, inner, 1)]
            sizes = sizes if bottleneck else [(inner, came, 3), (width, inner, 3)]
            for n, (out, into, side) in enumerate(sizes, 1):
                shapes[f"layer{i}.{k}.conv{n}.weight"] = (out, into, side, side)
                shapes |= norm_shapes(f"layer{i}.{k}.bn{n}", out)
            if k == 0 and (i > 1 or came != width):
                shapes[f"layer{i}.0.downsample.0.weight"] = (width, came, 1, 1)
                shapes |= norm_shapes(f"layer{i}.0.downsample.1", width)
            came = width
    return shapes


def resnet_features(state, x, bottleneck):
    """As torchvision computes it: the stride is in the 3 x 3 convolution."""

    def norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    x = F.relu(norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), "bn1"))
    x, out = F.max_pool2d(x, 3, 2, 1), []
    for i, depth in enumerate(DEPTHS, 1):
        for k in range(depth):
            stride, block, before = (2 if i > 1 and k == 0 else 1), f"layer{i}.{k}", x
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            for n, step in enumerate(strides, 1):
                weight = state[f"{block}.conv{n}.weight"]
                x = norm(F.conv2d(x, weight, stride=step, padding=weight.shape[2] // 2), f"{block}.bn{n}")
                x = x if n == len(strides) else F.relu(x)
            if f"{block}.downsample.0.weight" in state:
                before = F.conv2d(before, state[f"{block}.downsample.0.weight"], stride=stride)
                before = norm(before, f"{block}.downsample.1")
            x = F.relu(x + before)
        out.append(x)
    return out


def detectron2_resnet(state):
    """As detectron2's converter of torchvision's files names them."""
    out = {}
    for name, value in state.items():
        name = name if "layer" in name else f"stem.{name}"
        for i in range(1, 5):
            name = name.replace(f"layer{i}", f"res{i + 1}")
        for i in range(1, 4):
            name = name.replace(f"bn{i}", f"conv{i}.norm")
        out[name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value.numpy()
    return {"model": out, "__author__": "torchvision", "matching_heuristics": True}


# ---------------------------------------------------------------- Swin, by the original's names


WINDOW, HEADS, BLOCKS = 4, (1, 2, 4, 8), (2, 2, 1, 1)


def swin_shapes():
    shapes = {"patch_embed.proj.weight": (16, 3, 4, 4), "patch_embed.proj.bias": (16,)}
    shapes |= {f"patch_embed.norm.{p}": (16,) for p in ("weight", "bias")}
    for i, (heads, depth, width) in enumerate(zip(HEADS, BLOCKS, WIDTHS, strict=True)):
        for k in range(depth):
            block = f"layers.{i}.blocks.{k}"
            linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
            linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
            for name, shape in linears.items():
                shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
            shapes |= {f"{block}.{n}.{p}": (width,) for n in ("norm1", "norm2") for p in ("weight", "bias")}
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * WINDOW - 1) ** 2, heads)
        if i < 3:
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= {f"layers.{i}.downsample.norm.{p}": (4 * width,) for p in ("weight", "bias")}
    return shapes | {"norm.weight": (128,), "norm.bias": (128,), "head.weight": (10, 128), "head.bias": (10,)}


def swin_features(state, x):
    """As the paper has it (Liu et al. 2021), with every second block's windows shifted; outputs are normalised."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    w = WINDOW
    at = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)
    apart = at[:, :, None] - at[:, None] + w - 1
    place = apart[0] * (2 * w - 1) + apart[1]

    def attention(x, name, heads, shift):
        n, h, wide, c = x.shape
        regions = torch.zeros(h, wide)
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            parts = (slice(0, -w), slice(-w, -shift), slice(-shift, None))
            for number, (a, b) in enumerate((a, b) for a in parts for b in parts):
                regions[a, b] = number

        def windows(x):
            x = x.view(-1, h // w, w, wide // w, w, x.shape[-1])
            return x.transpose(2, 3).reshape(-1, w * w, x.shape[-1])

        same = windows(regions[None, ..., None])
        same = (same == same.transpose(1, 2))[:, None].repeat(n, 1, 1, 1)
        qkv = linear(windows(x), f"{name}.qkv").view(-1, w * w, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        bias = state[f"{name}.relative_position_bias_table"][place].permute(2, 0, 1)
        scores = qkv[0] @ qkv[1].transpose(-1, -2) * (c // heads) ** -0.5 + bias
        weights = scores.masked_fill(~same, -100 if not shift else float("-inf")).softmax(-1)
        out = linear((weights @ qkv[2]).transpose(1, 2).flatten(2), f"{name}.proj")
        out = out.view(n, h // w, wide // w, w, w, c).transpose(2, 3).reshape(n, h, wide, c)
        return out.roll((shift, shift), (1, 2)) if shift else out

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4).permute(0, 2, 3, 1)
    x, out = norm(x, "patch_embed.norm"), []
    for i, (heads, depth) in enumerate(zip(HEADS, BLOCKS, strict=True)):
        for k in range(depth):
            block, shift = f"layers.{i}.blocks.{k}", WINDOW // 2 if k % 2 and min(x.shape[1:3]) > WINDOW else 0
            x = x + attention(norm(x, f"{block}.norm1"), f"{block}.attn", heads, shift)
            x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        out.append(F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2))
        if i < 3:
            parts = [x[:, a::2, b::2] for b in (0, 1) for a in (0, 1)]
            x = linear(norm(torch.cat(parts, -1), f"layers.{i}.downsample.norm"), f"layers.{i}.downsample.reduction")
    return out


def torchvision_swin(state):
    out = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            name = f"features.0.{0 if parts[1] == 'proj' else 2}.{parts[2]}"
        elif parts[0] == "layers" and parts[2] == "downsample":
            name = f"features.{2 * int(parts[1]) + 2}.{'.'.join(parts[3:])}"
        elif parts[0] == "layers":
            rest = ".".join(parts[4:]).replace("fc1", "0").replace("fc2", "3")
            name = f"features.{2 * int(parts[1]) + 1}.{parts[3]}.{rest}"
        out[name] = value
    return out | {"features.1.0.attn.relative_position_index": torch.zeros(WINDOW**4, dtype=torch.int64)}


def timm_swin(state):
    """Of recent releases: patches are merged at the beginning of a stage."""
    out = {}
    for name, value in state.items():
        if ".downsample." in name:
            name = f"layers.{int(name[7]) + 1}{name[8:]}"
        out[name.replace("head.", "head.fc.")] = value
    return out


# ---------------------------------------------------------------- the files


def model_of(source):
    """The model that starts from a file or directory, and what it says."""
    config, state = read_backbone(source)
    model = Mask2Former(Mask2FormerConfig.tiny(3, backbone=config, frozen_batch_norm=True)).eval()
    return model, load_backbone(model, state, str(source))


def check_features(model, expected, x):
    with torch.no_grad():
        found = model.backbone(x)
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert (theirs.abs() > 0.1).float().mean() > 0.1, "the features are nothing"
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("kind", ["torchvision", "torchvision basic", "DDP", "safetensors", "detectron2"])
def test_resnets(kind, tmp_path):
    bottleneck = kind != "torchvision basic"
    state = random_state(resnet_shapes(bottleneck))
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = resnet_features(state, x, bottleneck)
    path = tmp_path / {"safetensors": "model.safetensors", "detectron2": "R.pkl"}.get(kind, "resnet.pth")
    counter = {"bn1.num_batches_tracked": torch.tensor(3)}
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "detectron2":
        path.write_bytes(pickle.dumps(detectron2_resnet(state)))
    elif kind == "DDP":
        torch.save({"state_dict": {f"module.{k}": v for k, v in {**state, **counter}.items()}, "epoch": 3}, path)
    else:
        torch.save(state | counter, path)
    model, line = model_of(path)
    check_features(model, expected, x)
    assert line.startswith("backbone: 0.")
    assert f"M numbers from {path}; " in line
    assert type(model.backbone.body).__name__ == "ResNetBackbone"


@pytest.mark.parametrize("kind", ["original", "torchvision", "timm", "detectron2"])
def test_swins(kind, tmp_path):
    state = random_state(swin_shapes(), seed=2)
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    expected = swin_features(state, x)
    path = tmp_path / ("swin.pkl" if kind == "detectron2" else "swin.pth")
    index = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16), "layers.0.blocks.1.attn_mask": x[0]}
    if kind == "original":
        torch.save({"model": state | index}, path)
    elif kind == "detectron2":
        arrays = {k: v.numpy() for k, v in (state | index).items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "third_party", "matching_heuristics": True}))
    else:
        torch.save({"torchvision": torchvision_swin, "timm": timm_swin}[kind](state), path)
    model, _ = model_of(path)
    config = model.config.backbone
    assert (config["window_size"], tuple(config["depths"]), tuple(config["num_heads"])) == (WINDOW, BLOCKS, HEADS)
    check_features(model, expected, x)


@pytest.mark.parametrize("kind", ["resnet", "swin"])
def test_hugging_face(kind, tmp_path):
    """The folder of a classifier; features are those of transformers' own backbone."""
    torch.manual_seed(3)
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=list(WIDTHS), depths=list(DEPTHS))
        source = transformers.ResNetForImageClassification(config)
    else:
        sizes = {"embed_dim": 16, "depths": list(BLOCKS), "num_heads": list(HEADS), "window_size": WINDOW}
        source = transformers.SwinForImageClassification(transformers.SwinConfig(**sizes))
    source.eval().save_pretrained(tmp_path)
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        body = source.base_model(x, output_hidden_states=True)
    reader = {"resnet": transformers.ResNetBackbone, "swin": transformers.SwinBackbone}[kind]
    expected = reader.from_pretrained(tmp_path, out_features=STAGES).eval()(x).feature_maps
    if kind == "resnet":
        assert all(torch.equal(a, b) for a, b in zip(expected, body.hidden_states[1:], strict=True))
    else:  # the classifier's own maps are those after patches are merged, but for the last
        last = body.reshaped_hidden_states[-1]
        torch.testing.assert_close(
            expected[-1], F.layer_norm(last.movedim(1, -1), last.shape[1:2]).movedim(-1, 1), rtol=1e-5, atol=1e-5
        )
    model, line = model_of(tmp_path)
    check_features(model, [m.detach() for m in expected], x)
    assert str(tmp_path) in line


#: So large that windows are shifted in the last stage, too: in smaller maps the published backbone shifts them, where
#: classifiers do not.
SIDE = 448


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "swin_t"])
def test_torchvision_itself(name, tmp_path):
    models = pytest.importorskip("torchvision.models", reason="not installed: pip install torchvision")
    torch.manual_seed(0)
    source = getattr(models, name)(weights=None).eval()
    torch.save(source.state_dict(), tmp_path / "model.pth")
    x, expected = torch.randn(1, 3, SIDE, SIDE), []
    with torch.no_grad():
        if name == "swin_t":
            y = x
            for i, layer in enumerate(source.features):
                y = layer(y)
                if i % 2:
                    expected.append(F.layer_norm(y, y.shape[-1:]).permute(0, 3, 1, 2))
        else:
            y = source.maxpool(source.relu(source.bn1(source.conv1(x))))
            for i in range(1, 5):
                y = getattr(source, f"layer{i}")(y)
                expected.append(y)
    check_features(model_of(tmp_path / "model.pth")[0], expected, x)


@pytest.mark.parametrize("name", ["resnet26", "swin_tiny_patch4_window7_224"])
def test_timm_itself(name, tmp_path):
    timm = pytest.importorskip("timm", reason="not installed: pip install timm")
    torch.manual_seed(0)
    source = timm.create_model(name, pretrained=False, **({"img_size": SIDE} if "swin" in name else {})).eval()
    torch.save(source.state_dict(), tmp_path / "model.pth")
    x = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        found = source.forward_intermediates(x, intermediates_only=True)[-4:]
    if "swin" in name:
        found = [F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2]).permute(0, 3, 1, 2) for y in found]
    check_features(model_of(tmp_path / "model.pth")[0], found, x)


# ---------------------------------------------------------------- the command, and mistakes


def test_the_command(tmp_path):
    """Batch norm is frozen where it is pre-trained; the backbone that the run writes is the classifier's."""
    state = random_state(resnet_shapes(True))
    torch.save(state, tmp_path / "resnet.pth")
    annotations, images = write_panoptic(Beach(length=1, size=64), tmp_path / "data")
    data = ("--data", "panoptic", "--annotations", annotations, "--images", images, "--device", "cpu")
    options = ("--steps", 1, "--batch-size", 1, "--size", 64, "--workers", 0)
    arguments = ("train", "-o", tmp_path / "run", *data, *options, "--backbone-weights", tmp_path / "resnet.pth")
    code, output = m2f(*arguments)
    assert code == 0, output
    assert "backbone: 0." in output
    trained = Mask2Former.from_pretrained(tmp_path / "run")
    assert trained.config.frozen_batch_norm
    norm = trained.state_dict()["backbone.body.embedder.embedder.normalization.running_mean"]
    assert torch.equal(norm, state["bn1.running_mean"])
    for extra in (("--backbone", "r50"), ("--weights", tmp_path / "run")):
        code, output = m2f(*arguments, *extra)
        assert (code, output.count("\n")) == (2, 1)
        assert "error: --backbone-weights: expected none with --backbone, --weights or --data shapes" in output


def test_what_is_no_backbone(tmp_path):
    state = random_state(resnet_shapes(True))
    for content, message in [
        ({"conv_stem.weight": torch.zeros(1)}, "expected a ResNet or Swin of four stages; neither a ResNet's first"),
        ({k: v for k, v in state.items() if "layer4" not in k}, "expected a ResNet or Swin of four stages; 3 stages"),
        ([1, 2], "expected parameters by name, names with arrays under 'model'"),
    ]:
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(ValueError, match=rf"model\.pth: {message}"):
            read_backbone(tmp_path / "model.pth")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected parameters by name, \.pth, \.pkl or"):
        read_backbone(tmp_path / "model.safetensors")
    del state["layer2.1.bn2.bias"]
    torch.save(state | {"layer1.0.se.weight": torch.zeros(3)}, tmp_path / "model.pth")
    with pytest.raises(WeightsError) as error:
        model_of(tmp_path / "model.pth")
    assert [len(x) for x in (error.value.missing, error.value.unexpected)] == [1, 1]
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="vit: expected a ResNet or Swin; got 'vit'"):
        read_backbone(tmp_path / "vit")
    base = ("train", "-o", tmp_path / "x", "--data", "panoptic")
    code, output = m2f(*base, "--backbone-weights", "gone.pth", "--annotations", "a", "--images", "i")
    assert (code, output.count("\n")) == (2, 1)
