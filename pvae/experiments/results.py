"""Results: what was trained and judged as plain numbers and words, as they stand in ``results.json``."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from pvae.data.dataset import Batch, Dataset
from pvae.diagnostics.evaluation import Evaluation, RefinementCurve
from pvae.experiments import run_folder
from pvae.experiments.conclusions import EvaluatedVariant, SameDecoder, draw_conclusions
from pvae.recipes import registry
from pvae.recipes.build import FittedModel
from pvae.recipes.recipe import Recipe
from pvae.stats import UNRELIABLE, Estimate, mean_se

SCHEMA = 2
LIBRARIES = ("pvae-pyro", "torch", "pyro-ppl", "numpy", "arviz-base")
WORDS = ("program", "likelihood", "prior", "family", "network", "objective")


class Group(NamedTuple):
    """Variants whose nats can be compared: of the same rows, binarization and base measure."""

    data: Dataset
    base_measure: str
    test: Batch
    variants: list[list[FittedModel]]
    judged: list[EvaluatedVariant]
    spaces: Mapping[str, Mapping[str, Estimate]] = {}
    same: Sequence[SameDecoder] = ()
    curve: RefinementCurve | None = None


def collect_results(groups: list[Group], left_out: Mapping[str, str]) -> dict[str, Any]:
    """The whole of ``results.json``; each group of variants that can be compared has its own tables."""
    recipes = [variant.recipe for group in groups for variants in group.variants for variant in variants]
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "machine": {"device": str(groups[0].data.train.device), "threads": torch.get_num_threads()},
        "recipe": _common(recipes),
        "left_out": dict(left_out),
        "groups": [_group(group) for group in groups],
    }
    return results


def expected_figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe file keeps of a run: each variant's test means and errors, seconds, and what made them."""
    found: dict[str, Any] = {"versions": results["versions"], "machine": results["machine"], "date": f"{date.today()}"}
    for group in results["groups"]:
        for row in group["rows"]:
            names = [
                name for name in ("log_joint", "elbo", "iwae", "evidence", "reconstruction") if name in row["test"]
            ]
            kept = {name: row["test"][name] for name in names}
            means = {name: [round(v[key], 3) for key in ("mean", "se")] for name, v in kept.items()}
            draws = next(iter(kept.values()))["K"]
            rows = group["data"]["evaluated_rows"]["test"]
            found[row["name"]] = means | {"seconds": round(row["seconds"], 1), "rows": rows, "K": draws}
    return found


def _common(recipes: list[Recipe]) -> dict[str, Any]:
    """What all recipes share."""
    first, *others = [asdict(own) for own in recipes]
    return {name: value for name, value in first.items() if all(other[name] == value for other in others)}


def _group(group: Group) -> dict[str, Any]:
    data = group.data
    found: dict[str, Any] = {
        "data": {
            "name": data.name,
            "identity": data.identity,
            "binarize": data.binarize,
            "base_measure": group.base_measure,
            "digest": data.digest,
            "training_rows": len(data.train),
            "test_rows": len(data.test),
            "evaluated_rows": {
                split: len(getattr(group.judged[0], split).values["reconstruction"]) for split in SPLITS
            },
            "shape": list(data.shape),
            "summary": data.summary(),
        },
        "rows": [
            _row(variants, judged) | _space(group, judged.name)
            for variants, judged in zip(group.variants, group.judged, strict=True)
        ],
        "verdicts": draw_conclusions(group.judged, list(group.same), group.curve, dynamic=data.binarize == "dynamic"),
    }
    if group.same and group.curve is not None:
        found["same_decoder"] = _same_decoder(group.judged, group.same)
        found["refinement"] = _curve(group.curve)
    return found


SPLITS = ("train", "test")


def _row(variants: list[FittedModel], judged: EvaluatedVariant) -> dict[str, Any]:
    first, own = variants[0], variants[0].recipe
    every = [judged, *judged.further]
    row = {
        "name": judged.name,
        "guide": judged.source.rpartition(":")[2],
        "settings": {name: value for name, value in registry.as_table(own.guide).items() if name != "type"},
        **{word: own.name(word) for word in WORDS},
        "latent": first.guide.sites.dim,
        "parameters": run_folder.count_parameters(first),
        "epochs": len(first.fit.history),
        "seconds": sum(v.fit.seconds for v in variants) / len(variants),
        "evaluation_seconds": sum(j.train.seconds + j.test.seconds for j in every) / len(every),
        "history": first.fit.history,
        "seeds": [v.recipe.seed for v in variants],
        "fitted": [run_folder.fingerprint(v) for v in variants],
        **{split: _quantities([getattr(j, split) for j in every]) for split in SPLITS},
    }
    if len(variants) > 1:
        row["seconds_by_seed"] = [v.fit.seconds for v in variants]
    return row


def _space(group: Group, name: str) -> dict[str, Any]:
    """The figures of a variant's latent space, of its first seed, where there are any."""
    found = group.spaces.get(name, {})
    return {"latent_space": {figure: value._asdict() for figure, value in found.items()}} if found else {}


def _quantities(found: list[Evaluation]) -> dict[str, Any]:
    """Each quantity's mean and error: over rows for one seed, over the seeds' means for several."""
    K = found[0].K
    named = {"iwae": f"IWAE-{K}", "evidence": found[0].estimator}
    summaries, intervals = [_summary(one) for one in found], found[0].intervals()
    over = "draws and rows" if len(found) == 1 else f"draws, rows and {len(found)} seeds; the error is over seeds"
    quantities = {}
    for name, first in summaries[0].items():
        means = [summary[name].mean for summary in summaries]
        estimate = first if len(found) == 1 else mean_se(torch.tensor(means))
        quantities[name] = estimate._asdict() | {"K": K, "estimator": named.get(name, f"mean over {over}")}
        if len(found) > 1:
            quantities[name]["by_seed"] = means
        elif name in intervals:
            quantities[name]["interval"] = intervals[name]
    return quantities


def _summary(found: Evaluation) -> dict[str, Estimate]:
    """Means and errors, and the share of rows whose weights are unreliable; the mean k-hat is of finite ones."""
    summary = found.summary()
    if "k_hat" in summary:
        k_hat = found.values["k_hat"]
        summary["k_hat"] = mean_se(k_hat[k_hat.isfinite()]) if k_hat.isfinite().any() else Estimate(math.nan, math.nan)
        summary["k_hat_above"] = mean_se((~(k_hat <= UNRELIABLE)).double())
    return summary


def _same_decoder(judged: list[EvaluatedVariant], same: Sequence[SameDecoder]) -> dict[str, Any]:
    values = next(j for j in judged if j.source == "Amortized").test.values
    own = same[0].elbo
    return {
        "decoder": "Amortized",
        "split": "test",
        "evidence": mean_se(values["evidence"])._asdict(),
        "best_elbo": mean_se(values["best_elbo"])._asdict(),
        "rows": [
            {
                "guide": s.guide,
                "elbo": mean_se(s.elbo)._asdict(),
                "gain": (mean_se(s.elbo - own) if s is not same[0] else Estimate(0.0, 0.0))._asdict(),
                "left": mean_se(values["best_elbo"] - s.elbo)._asdict(),
                "seconds_per_row": s.seconds_per_row,
            }
            for s in same
        ],
    }


def _curve(curve: RefinementCurve) -> dict[str, Any]:
    return {
        "steps": list(curve.steps),
        "elbo": [mean_se(elbo)._asdict() for elbo in curve.elbo],
        "gain": [mean_se(elbo - curve.elbo[0])._asdict() for elbo in curve.elbo],
        "seconds_per_step": curve.seconds_per_step,
    }
