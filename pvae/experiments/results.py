"""Results of a comparison as plain numbers and words, as ``results.json`` holds them."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.data.dataset import Dataset
from pvae.diagnostics.evaluation import Evaluation, RefinementCurve
from pvae.experiments import run_folder
from pvae.experiments.conclusions import EvaluatedVariant, SameDecoder, draw_conclusions, is_lower_bound
from pvae.experiments.run import TrainedVariant
from pvae.recipes import registry
from pvae.recipes.build import FittedModel
from pvae.recipes.recipe import Recipe
from pvae.stats import UNRELIABLE, Estimate, crossed_mean_se, mean_se, measure_row_influence

SCHEMA = 2
LIBRARIES = ("pvae-pyro", "torch", "pyro-ppl", "numpy", "arviz-base")
SPLITS = ("train", "test")
WORDS = ("program", "likelihood", "prior", "family", "network", "objective")
# Quantities whose means few rows may rule, and those that a lower bound of the evidence leaves open upwards.
OF_ROWS = (
    "log_joint",
    "elbo",
    "iwae",
    "best_elbo",
    "evidence",
    "inference_gap",
    "approximation_gap",
    "amortization_gap",
)
TO_EVIDENCE = ("evidence", "inference_gap", "approximation_gap")
RECORDED = ("log_joint", "elbo", "iwae", "evidence", "reconstruction")


class Group(NamedTuple):
    """Variants whose nats can be compared, of the same rows, binarization and base measure; test rows [B, C]."""

    data: Dataset
    base_measure: str
    test: Tensor
    variants: list[TrainedVariant]
    evaluated: list[EvaluatedVariant]
    spaces: Mapping[str, Mapping[str, Estimate]] = {}
    same: Sequence[SameDecoder] = ()
    curve: RefinementCurve | None = None


def collect_results(
    groups: list[dict[str, Any]], recipes: Sequence[Recipe], device: str, left_out: Mapping[str, str]
) -> dict[str, Any]:
    """Return the whole of ``results.json`` from the results of its groups; each has its own tables."""
    return {
        "schema": SCHEMA,
        "versions": library_versions(),
        "machine": {"device": device, "threads": torch.get_num_threads()},
        "recipe": common_settings(recipes),
        "left_out": dict(left_out),
        "groups": groups,
    }


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that make the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def expected_figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe file keeps of a run: test means and errors, seconds, and what made them."""
    figures: dict[str, Any] = {key: results[key] for key in ("versions", "machine")} | {"date": f"{date.today()}"}
    for group in results["groups"]:
        rows = group["data"]["evaluated_rows"]["test"]
        for row in group["rows"]:
            test = {name: row["test"][name] for name in RECORDED if name in row["test"]}
            means = {name: [round(value[key], 3) for key in ("mean", "se")] for name, value in test.items()}
            draws = next(iter(test.values()))["K"]
            figures[row["name"]] = means | {"seconds": round(row["seconds"], 1), "rows": rows, "K": draws}
    return figures


def common_settings(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Return the settings that all recipes share."""
    first, *others = [asdict(recipe) for recipe in recipes]
    return {name: value for name, value in first.items() if all(other[name] == value for other in others)}


def group_results(group: Group) -> dict[str, Any]:
    """Return the results of variants that can be compared, as an entry of ``results.json``."""
    data, first = group.data, group.evaluated[0]
    results: dict[str, Any] = {
        "data": {
            "name": data.name,
            "identity": data.identity,
            "binarize": data.binarize,
            "base_measure": group.base_measure,
            "digest": data.digest,
            "training_rows": len(data.train),
            "test_rows": len(data.test),
            "evaluated_rows": {split: len(getattr(first, split).values["reconstruction"]) for split in SPLITS},
            "shape": list(data.shape),
            "summary": data.summary(),
        },
        "rows": [
            _row(variant.fits, evaluated, group.spaces.get(variant.name, {}))
            for variant, evaluated in zip(group.variants, group.evaluated, strict=True)
        ],
        "verdicts": draw_conclusions(group.evaluated, group.same, group.curve, dynamic=data.binarize == "dynamic"),
    }
    if group.same and group.curve is not None:
        results["same_decoder"] = _same_decoder(group.evaluated, group.same)
        elbo = group.curve.elbo
        results["refinement"] = {
            "steps": list(group.curve.steps),
            "elbo": [mean_se(values)._asdict() for values in elbo],
            "gain": [mean_se(values - elbo[0])._asdict() for values in elbo],
            "seconds_per_step": group.curve.seconds_per_step,
        }
    return results


def _row(fits: list[FittedModel], evaluated: EvaluatedVariant, space: Mapping[str, Estimate]) -> dict[str, Any]:
    first, recipe, every = fits[0], fits[0].recipe, evaluated.seeds
    row = {
        "name": evaluated.name,
        "guide": evaluated.inference.rpartition(":")[2],
        "settings": {name: value for name, value in registry.as_table(recipe.guide).items() if name != "type"},
        **{kind: recipe.name(kind) for kind in WORDS},
        "latent": first.guide.sites.dim,
        "parameters": run_folder.count_parameters(first),
        "epochs": len(first.fit.history),
        "seconds": sum(fitted.fit.seconds for fitted in fits) / len(fits),
        "evaluation_seconds": sum(one.train.seconds + one.test.seconds for one in every) / len(every),
        "history": first.fit.history,
        "seeds": [fitted.recipe.seed for fitted in fits],
        "fitted": [run_folder.fingerprint(fitted) for fitted in fits],
        **{split: _quantities([getattr(one, split) for one in every]) for split in SPLITS},
    }
    if len(fits) > 1:
        row["seconds_by_seed"] = [fitted.fit.seconds for fitted in fits]
    if space:
        row["latent_space"] = {key: value._asdict() for key, value in space.items()}
    return row


def _quantities(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Return each quantity's mean and error over rows, and over seeds if there are several."""
    K, seeds = evaluations[0].K, len(evaluations)
    named = {"iwae": f"IWAE-{K}", "evidence": evaluations[0].estimator}
    summaries, intervals = [_summary(evaluation) for evaluation in evaluations], evaluations[0].intervals()
    over = "draws and rows" if seeds == 1 else f"draws, rows and {seeds} seeds; the error is over seeds and rows"
    quantities = {}
    for name, first in summaries[0].items():
        means = [summary[name].mean for summary in summaries]
        values = [evaluation.named_values().get(name) for evaluation in evaluations]
        estimate = first if seeds == 1 else _over_seeds(values, means)
        quantities[name] = estimate._asdict() | {"K": K, "estimator": named.get(name, f"mean over {over}")}
        if name in OF_ROWS and values[0] is not None and (influence := measure_row_influence(values[0])).dominates:
            quantities[name] |= {"median": influence.median, "few_rows": influence.rows}
        if name in TO_EVIDENCE and is_lower_bound(evaluations[0]):
            quantities[name]["at_least"] = True
        if seeds > 1:
            quantities[name]["by_seed"] = means
        elif name in intervals:
            quantities[name]["interval"] = intervals[name]
    return quantities


def _over_seeds(values: Sequence[Tensor | None], means: Sequence[float]) -> Estimate:
    """Return mean and error over seeds and rows or, of a quantity without values of rows, over the seeds' means."""
    rows = [value for value in values if value is not None and value.isfinite().all()]
    if len(rows) == len(means) and len({len(value) for value in rows}) == 1:
        return Estimate(*crossed_mean_se(torch.stack(rows))[:2])
    return mean_se(torch.tensor(means))


def _summary(evaluation: Evaluation) -> dict[str, Estimate]:
    """Return means and errors, and the share of rows with unreliable weights; the mean k-hat is of finite ones."""
    summary = evaluation.summary()
    if "k_hat" in summary:
        k_hat = evaluation.values["k_hat"]
        summary["k_hat"] = mean_se(k_hat[k_hat.isfinite()]) if k_hat.isfinite().any() else Estimate(math.nan, math.nan)
        summary["k_hat_above"] = mean_se((~(k_hat <= UNRELIABLE)).double())
    return summary


def _same_decoder(evaluated: list[EvaluatedVariant], same: Sequence[SameDecoder]) -> dict[str, Any]:
    values = next(one for one in evaluated if one.inference == "Amortized").test.values
    encoder = same[0].elbo
    return {
        "decoder": "Amortized",
        "split": "test",
        "evidence": mean_se(values["evidence"])._asdict(),
        "best_elbo": mean_se(values["best_elbo"])._asdict(),
        "rows": [
            {
                "guide": one.guide,
                "elbo": mean_se(one.elbo)._asdict(),
                "gain": (mean_se(one.elbo - encoder) if one is not same[0] else Estimate(0.0, 0.0))._asdict(),
                "left": mean_se(values["best_elbo"] - one.elbo)._asdict(),
                "seconds_per_row": one.seconds_per_row,
            }
            for one in same
        ],
    }
