"""The examples run: briefly here, to their ends under `slow`."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load(name):
    pytest.importorskip("transformers", reason="the examples use transformers' models")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accelerate_hugging_face(capsys):
    found = load("accelerate_hugging_face").main(["--size", "128", "--rounds", "1"])
    assert found["difference"] < 1e-4
    assert "masked attention from a packed mask" in capsys.readouterr().out


def test_own_decoder(tmp_path):
    module = load("own_decoder")
    _, targets = module.images(2, module.torch.Generator().manual_seed(0))
    assert all(target["masks"].sum(0).max() == 1 for target in targets)
    found = module.main(["--steps", "40", "--picture", str(tmp_path / "x.png")])
    assert found["after"] > found["before"] + 0.1
    assert (tmp_path / "x.png").stat().st_size > 5000


@pytest.mark.slow
def test_own_decoder_to_its_end():
    assert load("own_decoder").main([])["after"] > 0.7


def test_finetune_coco(tmp_path):
    folder = load("finetune_coco").main([str(tmp_path), "--steps", "1", "--picture", str(tmp_path / "x.png")])
    assert len(list(folder.glob("*.overlay.png"))) == 6
    assert (tmp_path / "x.png").exists()
    assert isinstance(json.loads((folder / "instance.json").read_text()), list)


@pytest.mark.slow
def test_finetune_coco_to_its_end(tmp_path):
    """Most of the objects of unseen pictures are found, with their classes."""
    from pycocotools import mask as coco_mask

    folder = load("finetune_coco").main([str(tmp_path)])
    annotations = json.loads((tmp_path / "unseen" / "instances.json").read_text())["annotations"]
    results = [r for r in json.loads((folder / "instance.json").read_text()) if r["score"] > 0.5]
    found = 0
    for one in annotations:
        same = [r["segmentation"] for r in results if int(r["image_id"]) == one["image_id"]]
        found += bool(same) and coco_mask.iou([one["segmentation"]], same, [0] * len(same)).max() > 0.5
    assert found >= 0.7 * len(annotations)


def test_finetune_trainer(tmp_path):
    """It learns on the operators, and `transformers` reads what Trainer saved."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it: pip install accelerate")
    module = load("finetune_trainer")
    found = module.main([str(tmp_path), "--steps", "20", "--size", "64"])
    assert found["last"] < 0.9 * found["first"]
    model, info = module.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == module.NAMES


def test_notebook():
    """Its cells run, and every operator agrees with what it replaces."""
    cells = json.loads((EXAMPLES / "operators.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "clear the notebook's outputs"
    names, printed = {}, []
    names["print"] = lambda *values: printed.extend(str(v) for v in values)
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    differences = [float(m[1]) for m in (re.match(r"tensor\(([\d.e+-]+)", text) for text in printed) if m]
    assert len(differences) == 3
    assert max(differences) < 1e-4


def test_every_example_stands_in_the_docs_and_has_a_test():
    page, tests = (ROOT / "docs" / "examples.md").read_text(), Path(__file__).read_text()
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(names) >= 4
    for name in names:
        assert f"`{name}`" in page
        assert f'load("{Path(name).stem}")' in tests or f'"{name}"' in tests
