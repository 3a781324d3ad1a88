"""No family of the installed transformers is missed: its sources are searched for what deformable attention looks like."""

import ast
from pathlib import Path

import pytest
import transformers

from m2f_kernels.integrations.transformers import _swap
from tests.integrations.families import FAMILIES

#: What samples a feature map at computed positions.
SIGNS = {"grid_sample", "sampling_locations", "sampling_offsets"}

#: Name of a class or function that bears a sign and is not replaced: why.
NOT_REPLACED = {
    "multi_scale_deformable_attention": "called by the replaced attention modules alone",
    "multi_scale_deformable_attention_v2": "called by the replaced attention modules alone",
    "sample_point": "samples masks for the loss: Mask2Former's and OneFormer's criterion is replaced where it is called",
    "EfficientLoFTR*": "window of a keypoint matcher: one sample per query, no attention weights",
    "Glm*VisionEmbeddings": "resizes a table of positions once per image",
    "SuperPointDescriptorDecoder": "reads descriptors at keypoints: one sample per query, no attention weights",
    "*PreTrainedModel": "names the offsets to initialise them",
}


def found():
    """(module, name) of every top-level class and function of a model whose code bears a sign."""
    root = Path(transformers.__file__).parent
    for path in sorted((root / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if not any(sign in text for sign in SIGNS):
            continue
        module = ".".join(("transformers", *path.relative_to(root).with_suffix("").parts))
        for node in ast.parse(text).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                parts = list(ast.walk(node))
                names = {n.attr for n in parts if isinstance(n, ast.Attribute)}
                names |= {n.arg for n in parts if isinstance(n, ast.arg)} | {n.id for n in parts if isinstance(n, ast.Name)}
                if names & SIGNS:
                    yield module, node.name


for m,n in found(): print(m,n)
