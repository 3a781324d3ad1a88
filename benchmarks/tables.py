"""The tables that say what is saved, for README and for the first page of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks import models
from benchmarks.cases import OURS, Row
from benchmarks.formats import error, markdown, mebibytes, number
from benchmarks.ops import attention_mask, ms_deform_attn
from benchmarks.ops import end_to_end as whole
from benchmarks.ops import masked_attention as attention
from benchmarks.ops import point_loss as loss

CPU_SETTINGS = ("default", "heap retained")
Measured = dict[tuple[str, str, str], Row]


def measured(rows: Sequence[Row]) -> Measured:
    return {(r.case, r.implementation, r.setting): r for r in rows}


def settings(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.setting for row in rows))


def _units(found: Sequence[str]) -> str:
    return "ms, default allocator (heap retained)" if tuple(found) == CPU_SETTINGS else f"ms, {' / '.join(found)}"


def _times(by_key: Measured, case: str, ours: str, one: str, found: Sequence[str]) -> str:
    """A cell: the time in each setting, ours bold, of others with the ratio to ours."""
    texts = []
    for setting in found:
        row, mine = by_key.get((case, one, setting)), by_key.get((case, ours, setting))
        time, own = row and row.median_ms, mine and mine.median_ms
        if time is None or own is None:
            texts.append("-")
        elif one == ours:
            texts.append(f"**{number(time)}**" if setting == found[0] else number(time))
        else:
            texts.append(f"{number(time)}, {number(time / own)}x")
    return f"{texts[0]} ({texts[1]})" if len(texts) == 2 and texts[1] != "-" else texts[0]


def times(rows: Sequence[Row], cases: dict[str, str], columns: dict[str, str]) -> list[str]:
    """Lines of Markdown: each case's time in every allocator setting, with the peers' ratios to ours.

    Args:
        cases: case and what it is called; those that were not run are left out.
        columns: implementation and what it is called, ours first.
    """
    by_key, found = measured(rows), settings(rows)
    ours = next(iter(columns))
    lines = [f"| {_units(found)} | {' | '.join(columns.values())} |", "|" + "---|" * (1 + len(columns))]
    run = {row.case for row in rows}
    for case, name in cases.items():
        if case in run:
            cells = [_times(by_key, case, ours, one, found) for one in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _extra(row: Row) -> str:
    return mebibytes(row.memory_extra_mib)


def amounts(
    rows: Sequence[Row], case: str, columns: dict[str, str], name: str, text: Callable[[Row], str] = _extra
) -> list[str]:
    """A line of Markdown, an amount of memory of each implementation; none where nothing was measured."""
    by_key, first = measured(rows), settings(rows)[0]
    cells = [text(row) if (row := by_key.get((case, one, first))) else "-" for one in columns]
    return [f"| {name} | {' | '.join(cells)} |"] if set(cells) != {"-"} else []


# ---------------------------------------------------------------- operators


def point_loss(rows: Sequence[Row]) -> str:
    """The headline: the loss part with full masks, with points as published, and with this package."""
    columns = {
        OURS: "m2f",
        loss.TRANSFORMERS: "K = 12544 points as published",
        loss.STRIDE_4: "full masks at stride 4",
        loss.FULL: "full masks",
    }
    shown = [(size, targets) for size in (1024, 512) for targets in (10, 30, 100)]
    cases = {f"loss part {size}² T={targets}": f"time, {size}², {targets} targets" for size, targets in shown}
    lines = times(rows, cases, columns)
    for case, name in cases.items():
        lines += amounts(rows, case, columns, name.replace("time", "peak MiB", 1))
    return "\n".join(lines)


def deformable_attention(rows: Sequence[Row]) -> str:
    columns = {
        OURS: "m2f",
        "PyTorch grid_sample": "PyTorch grid_sample",
        "torch-ms-deform-attn": "torch-ms-deform-attn",
    }
    if any(row.implementation == ms_deform_attn.DEFORMOPS_TRITON and row.median_ms for row in rows):  # GPU only
        columns[ms_deform_attn.DEFORMOPS_TRITON] = ms_deform_attn.DEFORMOPS_TRITON
    cases = {
        "encoder local fp32 forward": "forward, samples near the query",
        "encoder random fp32 forward": "forward, samples anywhere",
        "encoder local fp32 forward+backward": "forward + backward, near",
        "encoder random fp32 forward+backward": "forward + backward, anywhere",
    }
    lines = times(rows, cases, columns)
    for case in ("encoder local fp32 forward", "encoder local fp32 forward+backward"):
        name = f"peak MiB above inputs and outputs, {case.rsplit(' ', 1)[-1]}"
        lines += amounts(rows, case, columns, name)
    return "\n".join(lines)


def masked_attention(rows: Sequence[Row]) -> str:
    """Two tables: the nine layers' attention masks, and attention with them."""
    names = (attention_mask.TRANSFORMERS, attention_mask.TRANSFORMERS_DROPPED, attention_mask.STRIDED)
    columns = {OURS: "m2f"} | {name: name for name in names}
    large = "9 layers 1024² fp32"
    lines = times(rows, {large: "masks of 9 layers, 1024²", "9 layers 512² fp32": "masks of 9 layers, 512²"}, columns)
    lines += amounts(rows, large, columns, "peak MiB above inputs, 1024²")
    lines += [*amounts(rows, large, columns, "MiB written, 1024²", lambda row: number(row.written_mib)), ""]

    names = (attention.SDPA, attention.SDPA_ADDITIVE, attention.MULTIHEAD)
    columns = {OURS: "m2f"} | {name: name for name in names}
    where = "S=16384 Q=100"
    cases = {
        f"{where} open 1.0 fp32 forward": "forward, every key attended",
        f"{where} blobs 0.3 fp32 forward": "forward, regions of 0.3 of the image",
        f"{where} blobs 0.05 fp32 forward": "forward, regions of 0.05",
        f"{where} random 0.05 fp32 forward": "forward, random keys, 0.05",
        f"{where} learned 1.0 fp32 forward": "forward, masks of a trained model",
        f"{where} blobs 0.3 fp32 forward+backward": "forward + backward, regions of 0.3",
    }
    lines += times(rows, cases, columns)
    for case in (f"{where} blobs 0.3 fp32 forward", f"{where} blobs 0.3 fp32 forward+backward"):
        name = f"peak MiB above inputs and outputs, {case.rsplit(' ', 1)[-1]}"
        lines += amounts(rows, case, columns, name)
    return "\n".join(lines)


# ---------------------------------------------------------------- whole models


def before_and_after(rows: Sequence[Row], before: str, ours: str, heads: tuple[str, str]) -> list[str]:
    """Lines of Markdown: each case's time and peak memory before and after, and the largest difference."""
    by_key, found = measured(rows), settings(rows)
    units = _units(found)
    lines = [f"| {units} | {heads[0]} | {heads[1]} | peak MiB: {heads[0]} | {heads[1]} | largest difference |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for case in dict.fromkeys(row.case for row in rows):
        old, new = by_key.get((case, before, found[0])), by_key.get((case, ours, found[0]))
        if old is None or new is None:
            continue
        cells = [_times(by_key, case, ours, one, found) for one in (before, ours)]
        if new.median_ms is None:
            cells[1] = new.status
        ratio = ""
        if old.memory_extra_mib and new.memory_extra_mib:
            ratio = f", {number(old.memory_extra_mib / new.memory_extra_mib)}x"
        memory = [f"{mebibytes(old.memory_extra_mib)}{ratio}", mebibytes(new.memory_extra_mib)]
        kernels = f", {old.kernels} -> {new.kernels} kernels" if old.kernels and new.kernels else ""
        lines.append(f"| {case}{kernels} | {' | '.join([*cells, *memory])} | {error(new.error_output)} |")
    return lines


def end_to_end(rows: Sequence[Row]) -> str:
    """The whole model; rows of CUDA graphs, bf16 and activation checkpointing below those of their cases.

    bf16 is compared with `transformers` in float32; its difference is the share of the masks that do not overlap.
    """
    ours, theirs = whole.OURS, whole.TRANSFORMERS
    lines = before_and_after(rows, theirs, ours, ("transformers", "m2f"))
    for way in (whole.CAPTURED, whole.BF16, whole.BF16_CAPTURED, whole.CHECKPOINTED):
        notes = ["transformers: no graph"] if way.how == whole.GRAPH else []
        if way.precision:
            notes.append("transformers: float32; difference: 1 - IoU of the masks, random weights")
        label = str(way).removeprefix("m2f, ") + (f" ({'; '.join(notes)})" if notes else "")
        here = before_and_after(rows, theirs, str(way), ("transformers", "m2f"))[2:]
        lines += [line.replace(" |", f", {label} |", 1) for line in here]
    return "\n".join(lines)


def integrations(rows: Sequence[Row]) -> str:
    """The table of models of `transformers` before and after `accelerate`."""
    return "\n".join(before_and_after(rows, models.BEFORE, models.AFTER, ("before", "after")))


def integrations_in_detail(rows: Sequence[Row]) -> str:
    """Markdown: a table of each model's times in every setting, and one of memory and difference."""
    by_key, found = measured(rows), settings(rows)
    aims = {model.name: f"{model.aim}x" for model in models.MODELS}
    times = [f"{text}, ms ({found[0]} allocator)" for text in (models.BEFORE, models.AFTER)]
    header = ["model", *times, "ratio", *(f"ratio ({name})" for name in found[1:]), "target"]
    others = [
        "model",
        "peak MiB above the weights",
        "deformable attention's share before",
        "largest relative difference",
    ]
    lines, other_lines = [], []
    for model in dict.fromkeys(row.case for row in rows):
        pairs = [
            (by_key[model, models.BEFORE, s], by_key[model, models.AFTER, s])
            for s in found
            if (model, models.AFTER, s) in by_key
        ]
        before, after = pairs[0]
        ratios = [f"{number(old.median_ms / new.median_ms)}x" for old, new in pairs]
        memories = "-"  # not measured: no resettable peak on this system, or the process failed
        if before.memory_extra_mib and after.memory_extra_mib:
            ratio = number(before.memory_extra_mib / after.memory_extra_mib)
            memories = f"{mebibytes(before.memory_extra_mib)} → {mebibytes(after.memory_extra_mib)}, {ratio}x"
        share = f"{before.stage_ms[models.ATTENTION] / before.median_ms:.0%}"
        cells = [
            number(before.median_ms),
            number(after.median_ms),
            f"**{ratios[0]}**",
            *ratios[1:],
            aims.get(model, "-"),
        ]
        lines.append([model, *cells])
        other_lines.append([model, memories, share, error(after.error_output)])
    return f"{markdown(header, lines)}\n\n{markdown(others, other_lines)}"
