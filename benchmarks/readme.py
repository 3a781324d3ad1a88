"""The tables that say what is saved: README's, the documentation's and those of a report's first page.

`python -m benchmarks.readme` writes README's from the committed results, as every run does that renews them. Those of
docs/ are put in where `[Table: NAME](...)` stands alone on a line when the site is built (docs/hooks.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import RESULTS, arguments, models
from benchmarks.cases import OURS, Row
from benchmarks.compare import read
from benchmarks.facts import SETTINGS
from benchmarks.formats import error, markdown, mebibytes, number
from benchmarks.ops import attention_mask, ms_deform_attn
from benchmarks.ops import end_to_end as whole
from benchmarks.ops import masked_attention as attention
from benchmarks.ops import point_loss as loss

README = Path(__file__).parents[1] / "README.md"
_CPU, _GPU = "cpu-intel-xeon", "nvidia-h200"


class Rows:
    """Rows of one operator by case, implementation and allocator setting, and which settings and cases there are."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.by_key = {(r.case, r.implementation, r.setting): r for r in rows}
        self.settings = list(dict.fromkeys(row.setting for row in rows))
        self.cases = list(dict.fromkeys(row.case for row in rows))

    @property
    def units(self) -> str:
        several = self.settings == list(SETTINGS["cpu"])
        return "ms, default allocator (heap retained)" if several else f"ms, {' / '.join(self.settings)}"

    def first(self, case: str, implementation: str) -> Row | None:
        """The row in the first setting."""
        return self.by_key.get((case, implementation, self.settings[0]))

    def times(self, case: str, ours: str, one: str) -> str:
        """A cell: the time in each setting, ours bold, of others with the ratio to ours."""
        texts = []
        for setting in self.settings:
            row, mine = (self.by_key.get((case, name, setting)) for name in (one, ours))
            time, own = row and row.median_ms, mine and mine.median_ms
            if time is None or own is None:
                texts.append("-")
            elif one == ours:
                texts.append(number(time) if texts else f"**{number(time)}**")
            else:
                texts.append(f"{number(time)}, {number(time / own)}x")
        return f"{texts[0]} ({texts[1]})" if len(texts) == 2 and texts[1] != "-" else texts[0]


@dataclass(frozen=True)
class Table:
    """Times by case and implementation, in every allocator setting and with the peers' ratios to ours; below them MiB.

    Attributes:
        columns: implementation and what it is called, ours first.
        cases: case and what it is called; those that were not run are left out.
        amounts: case, what the line is called, and field of `Row`; left out where nothing was measured.
        optional: implementations whose columns are left out where nothing was measured.
    """

    columns: Mapping[str, str]
    cases: Mapping[str, str]
    amounts: Sequence[tuple[str, str, str]]
    optional: Sequence[str] = ()

    def __call__(self, rows: Sequence[Row]) -> str:
        found, ours = Rows(rows), next(iter(self.columns))
        timed = {row.implementation for row in rows if row.median_ms}
        columns = [one for one in self.columns if one in timed or one not in self.optional]
        lines = [
            [name, *(found.times(case, ours, one) for one in columns)]
            for case, name in self.cases.items()
            if case in found.cases
        ]
        for case, name, field in self.amounts:
            text = mebibytes if field == "memory_extra_mib" else number
            values = [getattr(row, field) if (row := found.first(case, one)) else None for one in columns]
            if any(value is not None for value in values):
                lines.append([name, *map(text, values)])
        return markdown([found.units, *(self.columns[one] for one in columns)], lines)


_PEAK = "peak MiB above inputs and outputs"
_LOSS = {
    f"loss part {size}² T={targets}": f"{size}², {targets} targets" for size in (1024, 512) for targets in (10, 30, 100)
}
#: The headline: the loss part with full masks, with points as published, and with this package.
point_loss = Table(
    {
        OURS: "m2f",
        loss.TRANSFORMERS: "K = 12544 points as published",
        loss.STRIDE_4: "full masks at stride 4",
        loss.FULL: "full masks",
    },
    {case: f"time, {name}" for case, name in _LOSS.items()},
    [(case, f"peak MiB, {name}", "memory_extra_mib") for case, name in _LOSS.items()],
)
_PEERS = (ms_deform_attn.GRID_SAMPLE, ms_deform_attn.TORCH_MS_DEFORM_ATTN, ms_deform_attn.DEFORMOPS_TRITON)
deformable_attention = Table(
    {OURS: "m2f", **{name: name for name in _PEERS}},
    {
        "encoder local fp32 forward": "forward, samples near the query",
        "encoder random fp32 forward": "forward, samples anywhere",
        "encoder local fp32 forward+backward": "forward + backward, near",
        "encoder random fp32 forward+backward": "forward + backward, anywhere",
    },
    [(f"encoder local fp32 {way}", f"{_PEAK}, {way}", "memory_extra_mib") for way in ms_deform_attn.WAYS],
    optional=_PEERS[2:],  # on a GPU only
)
_MASKS = Table(
    {
        OURS: "m2f",
        **{x: x for x in (attention_mask.TRANSFORMERS, attention_mask.TRANSFORMERS_DROPPED, attention_mask.STRIDED)},
    },
    {f"9 layers {size}² fp32": f"masks of 9 layers, {size}²" for size in (1024, 512)},
    [
        ("9 layers 1024² fp32", "peak MiB above inputs, 1024²", "memory_extra_mib"),
        ("9 layers 1024² fp32", "MiB written, 1024²", "written_mib"),
    ],
)
_ATTENTION = Table(
    {OURS: "m2f", **{x: x for x in (attention.SDPA, attention.SDPA_ADDITIVE, attention.MULTIHEAD)}},
    {
        f"S=16384 Q=100 {what}": name
        for what, name in (
            ("open 1.0 fp32 forward", "forward, every key attended"),
            ("blobs 0.3 fp32 forward", "forward, regions of 0.3 of the image"),
            ("blobs 0.05 fp32 forward", "forward, regions of 0.05"),
            ("random 0.05 fp32 forward", "forward, random keys, 0.05"),
            ("learned 1.0 fp32 forward", "forward, masks of a trained model"),
            ("blobs 0.3 fp32 forward+backward", "forward + backward, regions of 0.3"),
        )
    },
    [(f"S=16384 Q=100 blobs 0.3 fp32 {way}", f"{_PEAK}, {way}", "memory_extra_mib") for way in ms_deform_attn.WAYS],
)


def masked_attention(rows: Sequence[Row]) -> str:
    """Two tables: the nine layers' attention masks, and attention with them."""
    return f"{_MASKS(rows)}\n\n{_ATTENTION(rows)}"


# ---------------------------------------------------------------- whole models


def before_and_after(
    rows: Sequence[Row],
    before: str,
    ways: Mapping[str, str],
    heads: tuple[str, str],
    more: Mapping[str, Callable[[Row, Row], str]] | None = None,
) -> str:
    """Each case's time and peak memory before and after, and the largest difference.

    Args:
        before: the implementation that is compared with.
        ways: implementation and what its lines add to the name of the case.
        heads: what both are called.
        more: columns by name, of the rows before and after.
    """
    found, lines, more = Rows(rows), [], more or {}
    for ours, label in ways.items():
        for case in found.cases:
            old, new = found.first(case, before), found.first(case, ours)
            if old is None or new is None:
                continue
            times = [found.times(case, ours, before), found.times(case, ours, ours) if new.median_ms else new.status]
            memory = [mebibytes(old.memory_extra_mib), mebibytes(new.memory_extra_mib)]
            if old.memory_extra_mib and new.memory_extra_mib:
                memory[0] += f", {number(old.memory_extra_mib / new.memory_extra_mib)}x"
            kernels = f", {old.kernels} -> {new.kernels} kernels" if old.kernels and new.kernels else ""
            cells = [*times, *memory, error(new.error_output), *(text(old, new) for text in more.values())]
            lines.append([f"{case}{kernels}{label}", *cells])
    header = [found.units, *heads, f"peak MiB: {heads[0]}", heads[1], "largest difference", *more]
    return markdown(header, lines)


def _label(way: whole.Way) -> str:
    """bf16 is compared with `transformers` in float32; its difference is the share of the masks that do not overlap."""
    notes = ["transformers: no graph"] if way.how == whole.GRAPH else []
    if way.precision:
        notes.append("transformers: float32; difference: 1 - IoU of the masks, random weights")
    return str(way).removeprefix("m2f") + (f" ({'; '.join(notes)})" if notes else "")


_WAYS = (whole.Way(), whole.CAPTURED, whole.BF16, whole.BF16_CAPTURED, whole.CHECKPOINTED)
#: The whole model; rows of CUDA graphs, bf16 and activation checkpointing below those of their cases.
end_to_end = partial(
    before_and_after,
    before=whole.TRANSFORMERS,
    ways={str(way): _label(way) for way in _WAYS},
    heads=(whole.TRANSFORMERS, "m2f"),
)
#: Models of `transformers` before and after `accelerate`.
integrations = partial(before_and_after, before=models.BEFORE, ways={models.AFTER: ""}, heads=("before", "after"))
_AIMS = {model.name: f"{model.aim}x" for model in models.MODELS}
integrations_in_detail = partial(
    integrations,
    more={
        "target": lambda before, after: _AIMS.get(before.case, "-"),
        "deformable attention's share before": lambda before, after: (
            f"{before.stage_ms[models.ATTENTION] / before.median_ms:.0%}"
        ),
    },
)


# ---------------------------------------------------------------- pages


class Block(NamedTuple):
    """A table of a page, and pictures below it."""

    ops: tuple[str, ...]
    table: Callable[[Sequence[Row]], str]
    pictures: tuple[str, ...] = ()
    device: str = _CPU

    def text(self, up: str) -> str:
        """Markdown; `up` leads from the page to the repository's root."""
        rows = [r for r in read(RESULTS / f"{self.device}.csv") if r.run == "default" and r.op in self.ops]
        folder = f"{up}benchmarks/results/{self.device}"
        links = ", ".join(f"[{op.replace('_', ' ')}]({folder}/{op}.md)" for op in self.ops)
        parts = [self.table(rows)] if rows else []
        shown = [f"![{picture}]({folder}/{picture}.png)" for picture in self.pictures]
        return "\n\n".join([*parts, f"Measured on {self.device}: {links}.", *shown])


_MODELS = (models.BEFORE, models.AFTER)
_WHOLE = (whole.TRANSFORMERS, whole.OURS)
_POINTS = (loss.TRANSFORMERS, OURS)
#: Device, operator and case of a run, and what is before and after; the row of the table.
HEADLINES = {
    (_CPU, "integrations", "Mask2Former Swin-T, 1024²", *_MODELS): "CPU, Mask2Former Swin-T 1024², `accelerate`",
    (_CPU, "integrations", "Deformable DETR ResNet-50, 800²", *_MODELS): "CPU, Deformable DETR 800², `accelerate`",
    (_CPU, "end_to_end", "R50 inference 1024²", *_WHOLE): "CPU, Mask2Former R50 1024², `m2f_model`",
    (_CPU, "end_to_end", "R50 training step 512²", *_WHOLE): "CPU, training step R50 512², `m2f_model`",
    (_CPU, "point_loss", "loss part 1024² T=30", *_POINTS): "CPU, matching and loss at 12544 points, 1024²",
    (_GPU, "end_to_end", "R50 inference 1024²", *_WHOLE): "GPU, Mask2Former R50 1024², `m2f_model`",
    (_GPU, "end_to_end", "R50 training step 1024² N=2", *_WHOLE): "GPU, training step R50 1024², batch 2, `m2f_model`",
    (_GPU, "point_loss", "loss part 1024² T=30", *_POINTS): "GPU, matching and loss at 12544 points, 1024²",
}


def headlines() -> list[tuple[str, Row, Row]]:
    """The rows of the headline table: its label, and what was measured before and after."""
    rows = {(device, r.op, r.case, r.implementation): r
            for device in (_CPU, _GPU) for r in read(RESULTS / f"{device}.csv")
            if r.run == "default" and r.setting in ("default", "cuda")}  # fmt: skip
    return [(label, rows[(*case, x)], rows[(*case, y)]) for (*case, x, y), label in HEADLINES.items()]


def headline() -> str:
    """The README's table of results: `transformers` before, this package after."""

    def pair(old: float, new: float) -> list[str]:
        return [number(old), number(new), f"**{number(old / new)}x**"]

    lines = [
        [label, *pair(old.median_ms, new.median_ms), *pair(old.memory_extra_mib, new.memory_extra_mib)]
        for label, old, new in headlines()
    ]
    head = ["", "`transformers`, ms", "m2f, ms", "faster", "`transformers`, peak MiB", "m2f, peak MiB", "smaller"]
    return markdown(head, lines)


BLOCKS = {
    "the loss": Block(("point_loss",), point_loss, ("point_loss_curve",)),
    "the whole model": Block(("end_to_end",), end_to_end, ("end_to_end_stages",)),
    "other people's models": Block(("integrations",), integrations),
    "other people's models in detail": Block(("integrations",), integrations_in_detail),
    "deformable attention": Block(("ms_deform_attn",), deformable_attention, ("ms_deform_attn",)),
    "masked attention": Block(("attention_mask", "masked_attention"), masked_attention),
    "training": Block(("learning",), lambda rows: "", ("learning",)),
    "deformable attention on a GPU": Block(("ms_deform_attn",), deformable_attention, (), _GPU),
    "the loss on a GPU": Block(("point_loss",), point_loss, (), _GPU),
    "the whole model on a GPU": Block(("end_to_end",), end_to_end, (), _GPU),
}
MARKER = re.compile(r"^\[Table: (.*)\]\(.*\)$", re.MULTILINE)
_HEADLINE = ("<!-- headline: python -m benchmarks.readme -->", "<!-- end of headline -->")


def fill(page: str, up: str) -> str:
    """A page of the documentation with its tables; `up` leads from it to the repository's root."""
    return MARKER.sub(lambda found: BLOCKS[found[1]].text(up), page)


def update(readme: str) -> str:
    """README with its table replaced."""
    before, rest = readme.split(_HEADLINE[0])
    return f"{before}{_HEADLINE[0]}\n\n{headline()}\n\n{_HEADLINE[1]}{rest.split(_HEADLINE[1])[1]}"


def main() -> None:
    README.write_text(update(README.read_text()))


if __name__ == "__main__":
    arguments(__doc__, {})
    main()
