"""Check of data against the support of a program's observed sites, before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine

from pvae.data.dataset import Dataset
from pvae.data.sources import SPLITS
from pvae.distributions.masked_likelihood import MaskedDistribution
from pvae.distributions.supports import base_constraint
from pvae.errors import param, refuse_first
from pvae.runtime.pyro_params import Program


def check_support(
    model: Program, data: Dataset, remedies: Sequence[str] = ("likelihood", "binarize"), splits: Sequence[str] = SPLITS
) -> None:
    """Refuse data outside the support of the model's observed sites; missing entries are skipped.

    Arguments:
        remedies: parameters that the message proposes to change.
        splits: the splits to check.

    Raises:
        UserError: names the first value outside the support, with its split, row and column.
    """
    index = torch.zeros(1, dtype=torch.long, device=data.train.device)
    with torch.no_grad():
        trace: Any = poutine.trace(model).get_trace(data.train[:1], index)
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or site["value"].dim() != 2:
            continue
        columns = site["value"].shape[1]
        if data.num_label_columns + columns != data.train.shape[1]:
            continue
        for part in splits:
            if (part, data.binarize) != ("train", "dynamic"):
                _check_part(name, site["fn"], data, part, columns, " or ".join(map(param, remedies)))


def _check_part(name: str, fn: Any, data: Dataset, part: str, columns: int, remedies: str) -> None:
    support, masked = base_constraint(fn.support), isinstance(fn, MaskedDistribution)
    base = fn.fn if masked else fn
    family = type(getattr(base, "base_dist", base)).__name__
    message = f", outside the support of site '{name}' ({family}, {support}); choose another {remedies}"
    for rows, index in data.iter_chunks(part):
        x = rows[:, :columns]
        inside = support.check(x)
        refuse_first(~(inside | x.isnan()) if masked else ~inside, x, message, where=part, rows=index)
