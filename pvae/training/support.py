"""Check of data against the support of a program's observed sites, before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine

from pvae.data.dataset import Dataset
from pvae.data.sources import SPLITS
from pvae.distributions.masked import MaskedDistribution
from pvae.distributions.supports import base_constraint
from pvae.errors import param, refuse_first
from pvae.runtime.pyro_params import Program


def check_support(
    model: Program, data: Dataset, remedies: Sequence[str] = ("likelihood", "binarize"), splits: Sequence[str] = SPLITS
) -> None:
    """Refuse data outside the support of the model's observed sites; missing entries are skipped.

    Arguments:
        model: the Pyro program.
        data, splits: the data, and which splits are checked.
        remedies: parameters that the message proposes to change.

    Raises:
        UserError: names the first value outside the support, with its split, row and column.
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
        for part in splits:
            if (part, data.binarize) != ("train", "dynamic"):
                _check_part(name, fn, data, part, columns, " or ".join(map(param, remedies)))


def _check_part(name: str, fn: Any, data: Dataset, part: str, columns: int, remedies: str) -> None:
    support = base_constraint(fn.support)
    message = f", outside the support of site '{name}' ({_name(fn)}, {support}); choose another {remedies}"
    for rows, index in data.iter_chunks(part):
        x = rows[:, :columns]
        inside = support.check(x)
        bad = ~(inside | x.isnan()) if isinstance(fn, MaskedDistribution) else ~inside
        refuse_first(bad, x, message, where=part, rows=index)


def _name(fn: Any) -> str:
    fn = fn.fn if isinstance(fn, MaskedDistribution) else fn
    return type(getattr(fn, "base_dist", fn)).__name__
