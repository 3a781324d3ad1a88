"""Other classes for a trained model: a new class head that keeps the rows of known classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from m2f_model.labels import rows_of


class Relabelling(NamedTuple):
    """The changes of a model's classes for fine-tuning: names `kept` with their learned rows, `new` ones, `gone` ones.

    `in_order` is true where the model's classes had no names and were as many, and so were taken for the same.
    """

    kept: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]
    in_order: bool = False

    def __str__(self) -> str:
        """One line."""
        if self.in_order:
            return f"classes: the checkpoint does not name its {len(self.kept)}, which are taken for these, in order"
        parts = (("kept", self.kept), ("new", self.new), ("no longer there", self.gone))
        return "classes: " + "; ".join(f"{len(n)} {what}{_listed(n)}" for what, n in parts if n or what != parts[2][0])


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f" ({shown})" if names else ""


def new_head(head: nn.Linear, names: Sequence[str], known: Sequence[str] | None) -> tuple[nn.Linear, Relabelling]:
    """A class head for `names`: rows of known names and of "no object" are `head`'s, the others freshly initialised.

    Args:
        head: of the classes `known`, "no object" last.
        names: of the new classes, in order.
        known: names of the old ones; None where they are not known.
    """
    count = head.out_features - 1
    in_order = known is None and len(names) == count
    rows = list(range(count)) if in_order else rows_of(names, known or ())
    fresh = nn.Linear(head.in_features, len(names) + 1).to(head.weight.device, head.weight.dtype)
    pairs = [(i, row) for i, row in enumerate(rows) if row is not None] + [(len(names), count)]
    to, of = (torch.tensor(x, device=head.weight.device) for x in zip(*pairs, strict=True))
    with torch.no_grad():
        fresh.weight[to], fresh.bias[to] = head.weight[of], head.bias[of]
    kept = tuple(name for name, row in zip(names, rows, strict=True) if row is not None)
    new = tuple(name for name, row in zip(names, rows, strict=True) if row is None)
    gone = tuple(name for i, name in enumerate(known or ()) if i not in rows)
    return fresh, Relabelling(kept, new, gone, in_order)
