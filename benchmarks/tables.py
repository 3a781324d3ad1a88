"""The tables that say what is saved, for README and for the first page of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import models
from benchmarks.cases import OURS, Row
from benchmarks.formats import error, markdown, mebibytes, number
from benchmarks.ops import attention_mask, ms_deform_attn
from benchmarks.ops import end_to_end as whole
from benchmarks.ops import masked_attention as attention
from benchmarks.ops import point_loss as loss

CPU_SETTINGS = ("default", "heap retained")


class Measured:
    """Rows by case, implementation and allocator setting."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.by_key = {(r.case, r.implementation, r.setting): r for r in rows}
        self.settings = list(dict.fromkeys(row.setting for row in rows))
        self.cases = list(dict.fromkeys(row.case for row in rows))

    @property
    def units(self) -> str:
        several = tuple(self.settings) == CPU_SETTINGS
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
        found, ours = Measured(rows), next(iter(self.columns))
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


def _amounts(cases: Iterable[str], name: str) -> list[tuple[str, str, str]]:
    return [(case, f"{name}, {case.rsplit(' ', 1)[-1]}", "memory_extra_mib") for case in cases]


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
    _amounts((f"encoder local fp32 {way}" for way in ms_deform_attn.WAYS), "peak MiB above inputs and outputs"),
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
    _amounts(
        (f"S=16384 Q=100 blobs 0.3 fp32 {way}" for way in ms_deform_attn.WAYS), "peak MiB above inputs and outputs"
    ),
)


def masked_attention(rows: Sequence[Row]) -> str:
    """Two tables: the nine layers' attention masks, and attention with them."""
    return f"{_MASKS(rows)}\n\n{_ATTENTION(rows)}"


# ---------------------------------------------------------------- whole models


def _smaller(before: Row, after: Row) -> str:
    """The factor by which memory shrank, where both were measured."""
    both = before.memory_extra_mib and after.memory_extra_mib
    return f", {number(before.memory_extra_mib / after.memory_extra_mib)}x" if both else ""


def before_and_after(rows: Sequence[Row], before: str, ways: Mapping[str, str], heads: tuple[str, str]) -> str:
    """Each case's time and peak memory before and after, and the largest difference.

    Args:
        before: the implementation that is compared with.
        ways: implementation and what its lines add to the name of the case.
        heads: what both are called.
    """
    found, lines = Measured(rows), []
    for ours, label in ways.items():
        for case in found.cases:
            old, new = found.first(case, before), found.first(case, ours)
            if old is None or new is None:
                continue
            times = [found.times(case, ours, before), found.times(case, ours, ours) if new.median_ms else new.status]
            memory = [mebibytes(old.memory_extra_mib) + _smaller(old, new), mebibytes(new.memory_extra_mib)]
            kernels = f", {old.kernels} -> {new.kernels} kernels" if old.kernels and new.kernels else ""
            lines.append([f"{case}{kernels}{label}", *times, *memory, error(new.error_output)])
    return markdown([found.units, *heads, f"peak MiB: {heads[0]}", heads[1], "largest difference"], lines)


def _label(way: whole.Way) -> str:
    """bf16 is compared with `transformers` in float32; its difference is the share of the masks that do not overlap."""
    notes = ["transformers: no graph"] if way.how == whole.GRAPH else []
    if way.precision:
        notes.append("transformers: float32; difference: 1 - IoU of the masks, random weights")
    return str(way).removeprefix("m2f") + (f" ({'; '.join(notes)})" if notes else "")


_WAYS = (whole.Way(), whole.CAPTURED, whole.BF16, whole.BF16_CAPTURED, whole.CHECKPOINTED)


def end_to_end(rows: Sequence[Row]) -> str:
    """The whole model; rows of CUDA graphs, bf16 and activation checkpointing below those of their cases."""
    return before_and_after(rows, whole.TRANSFORMERS, {str(x): _label(x) for x in _WAYS}, (whole.TRANSFORMERS, "m2f"))


def integrations(rows: Sequence[Row]) -> str:
    """The table of models of `transformers` before and after `accelerate`."""
    return before_and_after(rows, models.BEFORE, {models.AFTER: ""}, ("before", "after"))


def integrations_in_detail(rows: Sequence[Row]) -> str:
    """Markdown: a table of each model's times in every setting, and one of memory and difference."""
    found, aims = Measured(rows), {model.name: f"{model.aim}x" for model in models.MODELS}
    first, *others = found.settings
    times, rest = [], []
    for model in found.cases:
        both = [[found.by_key.get((model, name, s)) for name in (models.BEFORE, models.AFTER)] for s in found.settings]
        ratios = [f"{number(old.median_ms / new.median_ms)}x" for old, new in both if new]
        before, after = both[0]
        memory = [mebibytes(x.memory_extra_mib) for x in (before, after)]
        # Not measured: no resettable peak on this system, or the process failed.
        shown = " → ".join(memory) + smaller if (smaller := _smaller(before, after)) else "-"
        share = f"{before.stage_ms[models.ATTENTION] / before.median_ms:.0%}"
        cells = [number(before.median_ms), number(after.median_ms), f"**{ratios[0]}**", *ratios[1:]]
        times.append([model, *cells, aims.get(model, "-")])
        rest.append([model, shown, share, error(after.error_output)])
    heads = [f"{text}, ms ({first} allocator)" for text in (models.BEFORE, models.AFTER)]
    header = ["model", *heads, "ratio", *(f"ratio ({name})" for name in others), "target"]
    share = "deformable attention's share before"
    return "\n\n".join(
        [
            markdown(header, times),
            markdown(["model", "peak MiB above the weights", share, "largest relative difference"], rest),
        ]
    )
