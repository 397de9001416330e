"""Values of data: checked where they come in, and binarized."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pvae.errors import UserError

BINARIZATIONS = ("none", "threshold", "dynamic", "levels")

# Seed of everything that belongs to the data's identity and must not change with a run's seed.
FIXED_SEED = 20140410


def check_shape(where: str, x: np.ndarray) -> None:
    """Refuse what is no array of numbers with at least 2 rows; ``where`` begins the message."""
    if x.dtype.kind not in "biuf":
        raise UserError(f"{where}: the values are of type {x.dtype}, but numbers are needed")
    if x.ndim < 2 or x.size == 0 or len(x) < 2:
        raise UserError(f"{where}: the array has shape {x.shape}, but at least 2 rows of at least 1 value are needed")


def check_values(
    where: str, x: np.ndarray, binarize: str, top_level: int, first: int | None = None, *, missing: bool = False
) -> np.ndarray:
    """The values as float32, refused if they are not finite or can't be binarized.

    Arguments:
        where: begins the message.
        x: values, [N, ...].
        binarize: how they will be.
        top_level: of intensities, by which they become levels.
        first: the first row of a piece.
        missing: let NaN be, which marks what is missing.
    """
    with np.errstate(over="ignore"):
        values = x.astype(np.float32, copy=False)
    _refuse(where, x, np.isinf(values), "remove or fill such values", first)
    if not missing:
        advice = "remove or fill such values, or give --missing to score only what is there"
        _refuse(where, x, np.isnan(values), advice, first)
    if binarize == "levels":
        values = np.rint(values * top_level) if top_level > 1 else values
        advice = "--binarize levels takes whole numbers from 0"
        _refuse(where, x, (values < 0) | (abs(values - np.rint(values)) > 0), advice, first)
    elif binarize != "none":
        advice = f"but --binarize {binarize} takes values from 0 to 1; scale the data, or use --binarize none"
        _refuse(where, x, (values < 0) | (values > 1), advice, first)
    return values


def _refuse(where: str, x: np.ndarray, bad: np.ndarray, advice: str, first: int | None) -> None:
    if not bad.any():
        return
    places = np.argwhere(bad)
    row, *rest = places[0].tolist()
    column, value, start = ", ".join(map(str, rest)), f"{x[tuple(places[0])]:g}", first or 0
    among = "in all" if first is None else f"in rows {start} to {start + len(x) - 1}"
    raise UserError(f"{where}: row {start + row}, column {column} is {value}; {advice} ({len(places)} {among})")


def draw_bernoulli(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """0 or 1 with the intensities x as probabilities; NaN stays NaN."""
    return torch.bernoulli(x.nan_to_num(), generator=generator).masked_fill(x.isnan(), torch.nan)


def draw_fixed_binarization(x: Tensor) -> Tensor:
    """0 or 1 with the intensities x as probabilities, the same each time; NaN stays NaN."""
    return draw_bernoulli(x, torch.Generator().manual_seed(FIXED_SEED))


def apply_binarization(x: dict[str, Tensor], binarize: str) -> dict[str, Tensor]:
    """Rows by part as they are trained and evaluated on, NaN as it was; dynamic training rows stay intensities."""
    if binarize in ("none", "levels"):
        return x
    if binarize == "threshold":
        return {part: (values > 0.5).float().masked_fill(values.isnan(), torch.nan) for part, values in x.items()}
    return {part: values if part == "train" else draw_fixed_binarization(values) for part, values in x.items()}
