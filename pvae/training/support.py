"""Support: data that a program's observed sites do not score are refused before any step is made."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine

from pvae.data.dataset import Dataset
from pvae.distributions.masked import MaskedDistribution
from pvae.distributions.supports import base_constraint
from pvae.errors import UserError
from pvae.runtime.pyro_params import Program


def check_support(model: Program, data: Dataset) -> None:
    """Refuse data that the model's observed sites do not score, before any step is made.

    Of sites that score the entries that are there, see :mod:`pvae.distributions.masked`, no others are looked at.
    """
    with torch.no_grad():
        trace: Any = poutine.trace(model).get_trace(
            data.train[:1], torch.zeros(1, dtype=torch.long, device=data.train.device)
        )
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or site["value"].dim() != 2:
            continue
        columns = site["value"].shape[1]
        if data.num_label_columns + columns != data.train.shape[1]:
            continue
        fn = site["fn"]
        for part in ("train", "validation", "test"):
            if (part, data.binarize) != ("train", "dynamic"):
                _check_part(name, fn, data, part, columns)


def _check_part(name: str, fn: Any, data: Dataset, part: str, columns: int) -> None:
    support = base_constraint(fn.support)
    for rows, index in data.iter_chunks(part):
        x = rows[:, :columns]
        sound = support.check(x)
        outside = (~(sound | x.isnan()) if isinstance(fn, MaskedDistribution) else ~sound).nonzero()
        if len(outside):
            row, *column = outside[0].tolist()
            raise UserError(
                f"{part} row {index[row].item()}, column {', '.join(map(str, column))} is "
                f"{x[tuple(outside[0])].item():g}, outside the support of site '{name}' "
                f"({_name(fn)}, {support}); "
                f"choose another --likelihood or --binarize ({len(outside)} such values)"
            )


def _name(fn: Any) -> str:
    fn = fn.fn if isinstance(fn, MaskedDistribution) else fn
    return type(getattr(fn, "base_dist", fn)).__name__
