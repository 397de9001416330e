"""Commands that use a run: rows in, files out, a few sentences on the screen, and a section on the page of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pvae.cli.options import Flag, Number, Option, Text, UseOptions, Whole, with_options

Rows = Annotated[str, typer.Argument(help="test, train or validation rows, or a .npy, .npz, .csv or .parquet file.")]
Select = Annotated[Text, Option(help="Which rows, counted from 0, as 0:20 or 3,17,5 (default all).")]
Samples = Annotated[int, Option(help="K, draws of each row's code.")]
Steps = Annotated[int, Option(help="Largest number of refinement steps of a row.")]
DrawX = Annotated[bool, Option("--draw", help="Draw x from p(x|z) instead of taking its mean.")]


@with_options
def reconstruct(use: UseOptions, rows: Rows = "test", select: Select = None, samples: Samples = 8) -> None:
    """Encode rows and decode them again, beside principal components."""
    use.apply("run_coding:reconstruct", rows, select, K=samples)


@with_options
def sample(
    use: UseOptions,
    count: Annotated[int, Option(help="Number of rows.")] = 64,
    temperature: Annotated[float, Option(help="Scale of the prior's noise; below 1 draws are closer to its mean.")] = 1,
    draw: DrawX = False,
    label: Annotated[Text, Option(help="Of all rows, for a program that takes labels.")] = None,
) -> None:
    """Generate rows from the prior."""
    use.apply("run_coding:sample", count=count, total=count, temperature=temperature, draw=draw, label=label)


@with_options
def interpolate(
    use: UseOptions,
    rows: Rows = "test",
    select: Annotated[str, Option(help="The rows of the path, in their order.")] = "0:4",
    steps: Annotated[int, Option(help="Steps from one row to the next.")] = 9,
    how: Annotated[str, Option(help="linear or spherical.")] = "linear",
) -> None:
    """Decode a path from row to row through the latent space."""
    use.apply("run_coding:interpolate", rows, select, total=None, steps=steps, how=how)


@with_options
def latent_map(
    use: UseOptions,
    rows: Rows = "test",
    select: Select = None,
    projection: Annotated[str, Option(help="plane (of two dimensions), pca, tsne, or auto: plane or pca.")] = "auto",
    size: Annotated[int, Option(help="Columns and rows of the grid that is decoded.")] = 20,
) -> None:
    """Map codes on a plane, with a page on which the pointer shows what each place decodes to."""
    use.apply("run_coding:latent_map", rows, select, total=None, page=True, projection=projection, size=size)


@with_options
def encode(use: UseOptions, rows: Rows = "test", select: Select = None, samples: Samples = 64) -> None:
    """Encode rows: mean and standard deviation of each code, rate in bits, distortion."""
    use.apply("run_coding:encode", rows, select, K=samples)


@with_options
def decode(
    use: UseOptions,
    codes: Annotated[Path, typer.Argument(help="Codes: a file of encode, or a table.")],
    draw: DrawX = False,
) -> None:
    """Decode codes to rows."""
    use.apply("run_coding:decode", total=None, path=codes, draw=draw)


@with_options
def posterior(
    use: UseOptions,
    rows: Rows = "test",
    select: Select = None,
    accuracy: Annotated[str, Option(help="quick, standard or high: 100, 400 or 2500 effective draws.")] = "standard",
    draws: Annotated[int, Option(help="Equally weighted draws of each row to write.")] = 100,
) -> None:
    """Draw from each row's posterior by the cheapest method whose checks pass for that row."""
    use.apply("run_posterior:draw_posterior", rows, select, accuracy=accuracy, draws=draws)


@with_options
def denoise(
    use: UseOptions,
    rows: Rows = "test",
    select: Select = None,
    noise: Annotated[str, Option(help="GaussianNoise(scale=...) or FlipNoise(rate=...).")] = "GaussianNoise(scale=0.5)",
    add: Annotated[Flag, Option("--add/--as-is", help="Add the noise first (default for the run's rows).")] = None,
    samples: Samples = 100,
    steps: Steps = 100,
) -> None:
    """Remove noise from rows: the posterior mean of x given the noisy rows."""
    use.apply("run_restoration:denoise", rows, select, raw=not add, noise=noise, add=add, K=samples, steps=steps)


@with_options
def impute(
    use: UseOptions,
    rows: Rows = "test",
    select: Select = None,
    hide: Annotated[Number, Option(help="Hide this share of the entries, to measure the error.")] = None,
    draws: Annotated[int, Option(help="Draws of each missing entry.")] = 5,
    samples: Samples = 100,
    steps: Steps = 100,
) -> None:
    """Impute missing entries (NaN) from the observed ones: mean, standard deviation, draws."""
    use.apply("run_restoration:impute", rows, select, missing=True, hide=hide, draws=draws, K=samples, steps=steps)


@with_options
def anomalies(
    use: UseOptions,
    rows: Rows = "test",
    select: Select = None,
    anomalous: Annotated[Text, Option(help="Anomalous labels (default those of no training row; 1 in a file).")] = None,
    score: Annotated[Text, Option(help="Scores, by commas (default all).")] = None,
    false_alarm: Annotated[float, Option(help="Share of normal rows that may be flagged.")] = 0.05,
    samples: Samples = 16,
) -> None:
    """Score how unlike held-out rows the rows are: thresholds for a false-alarm rate, AUROC if labels are known."""
    labels = None if anomalous is None else [word.strip() for word in anomalous.split(",")]
    options = {"anomalous": labels, "scores": None if score is None else score.split(","), "false_alarm": false_alarm}
    choose = "run_anomalies:select_all_labels" if rows == "test" and select is None else None
    use.apply("run_anomalies:anomalies", rows, select, total=None, choose=choose, K=samples, **options)


@with_options
def augment(
    use: UseOptions,
    rows: Rows = "train",
    select: Select = None,
    per_row: Annotated[int, Option(help="New rows around each.")] = 4,
    spread: Annotated[float, Option(help="Width in standard deviations of q; 0 reconstructs.")] = 1.0,
    draw: DrawX = False,
) -> None:
    """Generate rows around given ones, and count how many keep their label."""
    use.apply("run_coding:augment", rows, select, per_row=per_row, spread=spread, draw=draw)


@with_options
def classify(
    use: UseOptions,
    rows: Rows = "test",
    select: Select = None,
    epochs: Annotated[Whole, Option(help="Of each class's model (default the run's).")] = None,
    samples: Samples = 16,
) -> None:
    """Classify rows by Bayes' rule on a model of each class, fitted at the first use, with calibrated probabilities."""
    use.apply("run_classification:fit_and_classify", rows, select, total=None, epochs=epochs, K=samples)


COMMANDS: dict[str, Callable[..., None]] = {
    **{"reconstruct": reconstruct, "sample": sample, "interpolate": interpolate, "map": latent_map, "encode": encode},
    **{
        "decode": decode,
        "posterior": posterior,
        "denoise": denoise,
        "impute": impute,
        "anomalies": anomalies,
        "augment": augment,
    },
    "classify": classify,
}
