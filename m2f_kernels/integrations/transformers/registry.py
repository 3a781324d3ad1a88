"""Tables of what `accelerate` knows in `transformers`: families, classes, measured gains, tested versions.

    python -m m2f_kernels.integrations.transformers.registry     the table of docs/integrations/transformers.md

`transformers` is not imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from m2f_kernels.integrations.transformers import SUPPORTED
from m2f_kernels.integrations.transformers._swap import replacements

#: The versions with which the tests of this integration were run as a whole: at some commit, the last one at every one.
TESTED = ("4.57.1", "4.57.6", "5.0.0", "5.12.1", "5.17.0", "5.23.0", "5.24.0")

#: The snapshot of transformers whose own tests of models were run by `python -m tests.peers --peers`, and by family how
#: many of them pass. All have the same outcome untouched and patched.
PEERS_VERSION = "5.16.0.dev0 of 22 August 2026"
PEERS = {
    "grounding_dino": 71,
    "mm_grounding_dino": 71,
    "rt_detr_v2": 95,
    "d_fine": 96,
    "rf_detr": 102,
    "eomt": 93,
    "eomt_dinov3": 94,
    "videomt": 91,
    "lw_detr": 198,
    "omdet_turbo": 68,
    "deimv2": 251,
    "pp_doclayout_v2": 88,
    "pp_doclayout_v3": 88,
}

#: By family what was measured and how many times as fast it became: committed, by `benchmarks.run --op integrations`.
GAINS: dict[str, tuple[tuple[str, float], ...]] = {
    "mask2former": (
        ("Mask2Former Swin-T, 1024²", 2.18),
        ("Mask2Former Swin-T, training step, 512², 10 targets", 1.78),
    ),
    "oneformer": (("OneFormer Swin-T, 512²", 2.02),),
    "deformable_detr": (("Deformable DETR ResNet-50, 800²", 2.30),),
    "grounding_dino": (("Grounding DINO Swin-T, 800²", 1.55),),
    "rt_detr": (("RT-DETR ResNet-50, 640²", 1.02),),
}

#: Parts of models, and the replaced classes that they consist of, without the family's prefix.
PARTS: dict[str, tuple[str, ...]] = {
    "deformable attention": (
        "MultiscaleDeformableAttention",
        "MultiScaleDeformableAttention",
        "PixelDecoderEncoderMultiscaleDeformableAttention",
        "Encoder",
        "Decoder",
    ),
    "pixel decoder": (
        "SinePositionEmbedding",
        "PixelDecoderEncoderLayer",
        "PixelDecoderEncoderOnly",
        "PixelDecoder",
    ),
    "attention masks and masked attention": (
        "MaskedAttentionDecoderLayer",
        "MaskedAttentionDecoder",
        "TransformerDecoderQueryTransformerDecoderLayer",
        "TransformerDecoderCrossAttentionLayer",
        "TransformerDecoderLayer",
        "TransformerDecoder",
        "Attention",
    ),
    "bias of boxes": ("DetrDecoder",),
    "mask logits": ("TransformerModule", "Model", "ForUniversalSegmentation"),
    "matching and losses": ("HungarianMatcher", "Loss", "ForInstanceSegmentation"),
}


class Family(NamedTuple):
    """A directory of transformers/models, names of the classes replaced in it without the family's, measured gains."""

    name: str
    classes: tuple[str, ...]
    gains: tuple[tuple[str, float], ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part, classes in PARTS.items() if set(classes) & set(self.classes))

    @property
    def measured(self) -> str:
        return "; ".join(f"{gain:.2f}x ({case})" for case, gain in self.gains) or "-"


def families() -> list[Family]:
    """The families in the order in which their replacements are registered."""
    classes: dict[str, list[str]] = {}
    for name in replacements():
        family, own = name.split(".")[2], name.rpartition(".")[2]
        classes.setdefault(family, []).append(_short(family, own))
    return [Family(name, tuple(found), GAINS.get(name, ())) for name, found in classes.items()]


def _short(family: str, cls: str) -> str:
    """The name of a class without the family's in front, which is spelled with capitals and without underscores."""
    prefix = family.replace("_", "")
    return cls[len(prefix) :] if cls.lower().startswith(prefix) else cls


def installed() -> tuple[str, set[str]] | None:
    """Version and model directories of the installed transformers; None where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    found = importlib.util.find_spec("transformers")
    try:
        number = version("transformers")
    except PackageNotFoundError:
        return None
    if found is None or not found.submodule_search_locations:
        return None
    models = Path(found.submodule_search_locations[0]) / "models"
    return number, {x.name for x in models.iterdir() if x.is_dir()} if models.is_dir() else set()


def markdown() -> str:
    """The table of the documentation, in which equal families share a line, and the list of classes by part."""
    lines = ["| family | what is replaced | times as fast, on a CPU |", "|---|---|---|"]
    rows: dict[tuple[str, str], list[str]] = {}
    for family in families():
        rows.setdefault((", ".join(family.parts), family.measured.replace("; ", "<br>")), []).append(family.name)
    lines += [f"| {', '.join(names)} | {parts} | {measured} |" for (parts, measured), names in rows.items()]
    lines += ["", "Classes by part, without the family's prefix:", ""]  # a table with such names fits no telephone
    lines += [f"- {part}: {', '.join(classes)}" for part, classes in PARTS.items()]
    return "\n".join(lines)


def versions() -> str:
    """One sentence on versions."""
    low, high = (".".join(map(str, version)) for version in SUPPORTED)
    supported = f"transformers from {low} to below {high}"
    return f"{supported}; tests have run with {', '.join(TESTED)}, the last one at every commit"


def peers() -> str:
    """One sentence on the tests of models that transformers has."""
    passed = ", ".join(f"{family} {count}" for family, count in PEERS.items())
    tests = f"transformers' own tests of models ({PEERS_VERSION})"
    return f"{tests} have the same outcome untouched and patched; passed: {passed}"


def report() -> list[str]:
    """Lines for `python -m m2f_kernels.info`."""
    here = installed()
    known = families()
    width = max(len(family.name) for family in known)
    lines = [f"Models of {versions()}"]
    lines.append("  installed: " + ("none" if here is None else here[0]))
    lines.append("  family, number of classes that accelerate replaces, times as fast on a CPU (- not measured):")
    for family in known:
        missing = here is not None and family.name not in here[1]
        count = f"{len(family.classes)} class{'es' if len(family.classes) > 1 else ''}"
        lines.append(
            f"  {family.name:<{width}}  {count:<10}  {family.measured}"
            + ("  (not in the installed version)" if missing else "")
        )
    lines.append(f"  {peers()}")
    return lines


def update(page: str, marks: Iterable[str] = ("<!-- families -->", "<!-- end of families -->")) -> str:
    """The text of the page with the table between its marks replaced."""
    first, last = marks
    before, rest = page.split(first)
    return f"{before}{first}\n\n{markdown()}\n\n{versions()}.\n\n{peers()}.\n\n{last}{rest.split(last)[1]}"


if __name__ == "__main__":
    print(markdown())
