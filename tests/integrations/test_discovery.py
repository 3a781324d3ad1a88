"""No family of the installed transformers is missed: its sources are searched for the signs of deformable attention."""

import ast
from fnmatch import fnmatchcase
from pathlib import Path

import transformers

from m2f_kernels.integrations.transformers import _swap
from tests.integrations.families import FAMILIES

#: Names in the code of whatever samples a feature map at computed positions.
SIGNS = {"grid_sample", "sampling_locations", "sampling_offsets"}

#: Class or function that bears a sign and is not replaced: why.
NOT_REPLACED = {
    "multi_scale_deformable_attention": "called by the replaced attention modules alone",
    "multi_scale_deformable_attention_v2": "called by the replaced attention modules alone",
    "sample_point": "samples masks for a loss, not an attention",
    "Glm*VisionEmbeddings": "resizes a table of positions once per image",
    "SuperPointDescriptorDecoder": "reads descriptors at keypoints: one sample per query, no attention weights",
    "*PreTrainedModel": "names the offsets to initialise them",
}


def found():
    """Qualified names of the top-level classes and functions of models whose code bears a sign."""
    root = Path(transformers.__file__).parent
    for path in sorted((root / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if not any(sign in text for sign in SIGNS):
            continue
        module = ".".join(("transformers", *path.relative_to(root).with_suffix("").parts))
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and _names(node) & SIGNS:
                yield f"{module}.{node.name}"


def _names(node):
    """Names that the code itself uses; comments and docstrings do not count."""
    kinds = ((ast.Attribute, "attr"), (ast.arg, "arg"), (ast.Name, "id"))
    return {getattr(n, field) for n in ast.walk(node) for kind, field in kinds if isinstance(n, kind)}


def test_every_deformable_attention_is_known():
    names = list(found())
    assert len(names) > 25, "the search finds nothing any more"
    unknown = [
        name
        for name in names
        if name not in _swap.replacements()
        and not any(fnmatchcase(name.rpartition(".")[2], pattern) for pattern in NOT_REPLACED)
    ]
    assert not unknown, "replace these, or say in NOT_REPLACED why not"


def test_every_known_family_is_compared():
    """A family with a replacement has a model in families.py, which the other tests hold against the original."""
    known = {name.split(".")[2] for name in found() if name in _swap.replacements()}
    assert known == {name for name, family in FAMILIES.items() if family.installed}
    assert known >= {"mask2former", "oneformer", "deformable_detr", "grounding_dino", "mm_grounding_dino", "rt_detr"}


def test_known_classes_are_what_is_found():
    """The other way round: what is replaced is there, under the names that the search finds."""
    attention = {name for name, _, _ in _swap.known_classes() if "eformableAttention" in name}
    assert attention == {name for name in found() if name in _swap.replacements()}
