"""Preprocessing of data: checks of values where they come in, and binarization."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pvae.errors import UserError, param, refuse_first

# Each with what it does to the rows, for a summary.
BINARIZATIONS = {
    "none": "taken as they are",
    "threshold": "binarized at 0.5",
    "dynamic": "binarized afresh for each batch",
    "levels": "as whole numbers",
}

# Seed of everything that belongs to the data's identity and must not change with a run's seed.
FIXED_SEED = 20140410


def check_shape(where: str, x: np.ndarray) -> None:
    """Refuse an array that is not of numbers with at least 2 rows; ``where`` begins the message."""
    if x.dtype.kind not in "biuf":
        raise UserError(f"{where}: the values are of type {x.dtype}, but numbers are needed")
    if x.ndim < 2 or x.size == 0 or len(x) < 2:
        raise UserError(f"{where}: the array has shape {x.shape}, but at least 2 rows of at least 1 value are needed")


def check_values(
    where: str, x: np.ndarray, binarize: str, top_level: int, first: int | None = None, *, missing: bool = False
) -> np.ndarray:
    """Return the values [N, ...] as float32; refuse infinity, NaN unless ``missing``, and what can't be binarized.

    Arguments:
        where: begins the message.
        top_level: the highest level of a picture that was stored as whole numbers, by which intensities become levels.
        first: number of the first row, if x is a chunk of the rows.
    """
    with np.errstate(over="ignore"):
        values = x.astype(np.float32, copy=False)
    rows = range(first or 0, (first or 0) + len(x))
    counted = "in all" if first is None else f"in rows {rows[0]} to {rows[-1]}"

    def refuse(bad: np.ndarray, advice: str) -> None:
        refuse_first(torch.from_numpy(bad), x, advice, where=f"{where}:", rows=rows, counted=counted)

    fill = "; remove or fill such values"
    refuse(np.isinf(values), fill)
    if not missing:
        refuse(np.isnan(values), f"{fill}, or set {param('missing', True)} to score the observed entries only")
    if binarize == "levels":
        values = np.rint(values * top_level) if top_level > 1 else values
        fractional = (values < 0) | (abs(values - np.rint(values)) > 0)
        refuse(fractional, f", but {param('binarize', binarize)} takes whole numbers from 0")
    elif binarize != "none":
        advice = f"scale the data, or set {param('binarize', 'none')}"
        refuse((values < 0) | (values > 1), f", but {param('binarize', binarize)} takes values from 0 to 1; {advice}")
    return values


def draw_bernoulli(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw 0 or 1 with the intensities x as probabilities; NaN stays NaN."""
    return torch.bernoulli(x.nan_to_num(), generator=generator).masked_fill(x.isnan(), torch.nan)


def draw_fixed_binarization(x: Tensor) -> Tensor:
    """Draw 0 or 1 with the intensities x as probabilities, the same at each call; NaN stays NaN."""
    return draw_bernoulli(x, torch.Generator().manual_seed(FIXED_SEED))


def apply_binarization(x: dict[str, Tensor], binarize: str) -> dict[str, Tensor]:
    """Binarize the rows of each split; dynamic training rows stay intensities, NaN stays NaN."""
    if binarize in ("none", "levels"):
        return x
    if binarize == "threshold":
        return {part: (values > 0.5).float().masked_fill(values.isnan(), torch.nan) for part, values in x.items()}
    return {part: values if part == "train" else draw_fixed_binarization(values) for part, values in x.items()}
