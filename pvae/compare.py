"""The main job: inference variants side by side, judged by what they give and what they cost."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae import export, recipe, runs
from pvae.console import bar
from pvae.data import Batch, Dataset
from pvae.evaluation import (
    Budget,
    Evaluation,
    RefinementCurve,
    bounds,
    evaluate,
    reconstruct,
    refinement_curve,
    sample,
)
from pvae.files import write_json
from pvae.guides import given, local_bound
from pvae.recipe import Component, Recipe
from pvae.runs import Variant
from pvae.runtime import pick_device, seeded, unchecked
from pvae.stats import Estimate, mean_se
from pvae.verdicts import Judged, SameDecoder, verdicts
from pvae.weights import log_weights

__all__ = ["SOURCES", "Job", "compare", "judge", "load"]

SOURCES = ("Amortized", "PerDatapoint", "SemiAmortized")
SCHEMA = 1
EXPORTED_DRAWS, PRIOR_SAMPLES = 20, 32
LIBRARIES = ("pvae-pyro", "torch", "pyro-ppl", "numpy", "arviz-base")


@dataclass(frozen=True)
class Job:
    """How a comparison is carried out, beside the recipe that fixes its numbers.

    Attributes:
        folder: of the run.
        device: ``auto``, ``cpu`` or ``cuda``.
        rows: how many rows of each split are evaluated.
        budget: of the evaluation.
        progress: show progress bars.
        say: takes lines for the user.
    """

    folder: Path
    device: str = "auto"
    rows: int = 300
    budget: Budget = field(default_factory=Budget)
    progress: bool = False
    say: Callable[[str], None] = lambda line: None


def compare(
    own: Recipe,
    job: Job,
    *,
    sources: Sequence[Component] = SOURCES,
    data_folder: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Train one variant for each source of lam from one seed and budget, evaluate them, and write the run folder.

    Arguments:
        own: the recipe; its guide is replaced by each source in turn.
        job: where and how.
        sources: guides, by name or as tables.
        data_folder: where torchvision's data sets are.
        overwrite: replace a run that the folder holds.
        resume: go on with it; what is trained is not trained again.

    Returns:
        The results, as in ``results.json``.

    Raises:
        UserError: anything that the user can mend; nothing has been overwritten if it could be known before.
    """
    recipes = {_name(source): recipe.resolve(replace(own, guide=source)) for source in sources}
    first = next(iter(recipes.values()))
    pick_device(job.device)
    data = recipe.load_data(first, data_folder)
    job.say(data.summary())
    for mine in recipes.values():
        runs.check(mine, data)
    runs.prepare(job.folder, first, overwrite=overwrite, resume=resume)
    variants = {}
    for name, mine in recipes.items():
        inner = job.folder / name
        known = resume and (inner / "recipe.toml").is_file()
        runs.prepare(inner, mine, overwrite=overwrite, resume=known)
        job.say(f"training {name}{_settings(mine)}: {mine.epochs} epochs, batches of {mine.batch_size}")
        variants[name] = runs.train(mine, data, inner, device=job.device, resume=known, progress=job.progress)
    return judge(variants, data, job)


def judge(variants: dict[str, Variant], data: Dataset, job: Job) -> dict[str, Any]:
    """Evaluate fitted variants on rows of both splits and write ``results.json`` and ``idata.nc``."""
    device = pick_device(job.device)
    data = data.to(device)
    splits = {
        "train": data.fixed_train(job.rows),
        "test": Batch(data.test[: job.rows], torch.empty(0)),
    }
    job.say(
        f"evaluating on {len(splits['train'].x)} training and {len(splits['test'].x)} test rows, K = {job.budget.K}, "
        f"at most {job.budget.steps} refinement steps"
    )
    judged = [_judged(name, variant, splits, job) for name, variant in variants.items()]
    test, seed = splits["test"].x, next(iter(variants.values())).recipe.seed
    same: list[SameDecoder] = []
    curve = None
    if "Amortized" in variants and "evidence" in judged[0].test.values:
        job.say("evaluating every source on the amortized variant's decoder")
        same = _same_decoder(variants, test, job.budget.K)
        base = variants["Amortized"].built
        curve = refinement_curve(base.vae.model, base.guide, test, seed=seed)
    sentences = verdicts(judged, same, curve, dynamic=data.binarize == "dynamic")
    results = _results(variants, judged, same, curve, sentences, data, job)
    draws = {j.guide: _draws(variants[j.guide], j, test) for j in judged}
    labels = None if data.test_labels is None else data.test_labels[: job.rows]
    attributes = {"recipe": results["recipe"], "versions": results["versions"], "data": results["data"], "seed": seed}
    export.save(export.tree(draws, test, labels, attributes), job.folder)
    write_json(job.folder / "results.json", results)
    return results


def load(job: Job, data_folder: str | Path | None = None) -> tuple[dict[str, Variant], Dataset]:
    """The variants of a run that ``fit`` (one) or ``compare`` (several) has trained, and their data.

    Raises:
        UserError: no run, a broken one, or one whose data have changed.
    """
    folder = job.folder
    own = recipe.read(folder)
    data = recipe.load_data(own, data_folder)
    inner = sorted(path.parent for path in folder.glob("*/recipe.toml"))
    return {
        path.name if inner else own.name("guide"): runs.load(path, data, device=job.device)
        for path in inner or [folder]
    }, data


def _name(source: Component) -> str:
    return source if isinstance(source, str) else str(source["type"])


def _settings(own: Recipe) -> str:
    table = own.guide if isinstance(own.guide, dict) else {}
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in table.items() if name != "type")
    return f" ({words})" if words else ""


def _judged(name: str, variant: Variant, splits: dict[str, Batch], job: Job) -> Judged:
    model, guide, seed = variant.built.vae.model, variant.built.guide, variant.recipe.seed
    total, done, found = sum(len(batch.x) for batch in splits.values()), 0, {}
    with bar("rows", total, wanted=job.progress) as show:

        def count(rows: int) -> None:
            nonlocal done
            done += rows
            show(done, name)

        for split, (x, index) in splits.items():
            which = index if split == "train" else None
            found[split] = evaluate(model, guide, x, which, budget=job.budget, seed=seed, progress=count)
    return Judged(name, variant.fit.seconds, **found)


def _same_decoder(variants: dict[str, Variant], x: Tensor, K: int) -> list[SameDecoder]:
    """Each source's lam for the test rows on the amortized decoder, semi-amortized steps from its encoder's lam."""
    base = variants["Amortized"]
    model, family, encoder = base.built.vae.model, base.built.guide.family, base.built.guide.encoder
    bound, found = local_bound(model, family), []
    for source in SOURCES:
        component = variants[source].recipe.guide if source in variants else source
        supplied = {"encoder": encoder, "family": family, "num_data": 1, "bound": bound}
        guide = recipe.make("guide", component, **supplied).to(x.device).eval()
        start = time.perf_counter()
        with unchecked(), torch.no_grad(), seeded(base.recipe.seed):
            guide.params(x)
        seconds = time.perf_counter() - start
        elbo = bounds(model, guide, x, K=K, seed=base.recipe.seed).values["elbo"]
        found.append(SameDecoder(source, elbo, seconds / len(x)))
    return found


def _draws(variant: Variant, judged: Judged, x: Tensor) -> export.Draws:
    """What the export and the page show of a variant, for the test rows x."""
    model, guide, seed = variant.built.vae.model, variant.built.guide, variant.recipe.seed
    with unchecked(), torch.no_grad(), seeded(seed):
        q = given(guide.family, guide.params(x))
        weights = log_weights(model, q, x, K=EXPORTED_DRAWS, keep_latents=True)
        pictures = reconstruct(model, q, x, seed=seed)
    prior = sample(model, x[:1].expand(PRIOR_SAMPLES, -1), seed=seed)
    values = {split: {n: v.cpu() for n, v in getattr(judged, split).values.items()} for split in ("train", "test")}
    return export.Draws(weights, pictures, prior, values)


def _results(
    variants: dict[str, Variant],
    judged: list[Judged],
    same: list[SameDecoder],
    curve: RefinementCurve | None,
    sentences: list[str],
    data: Dataset,
    job: Job,
) -> dict[str, Any]:
    base = next(iter(variants.values()))
    results = {
        "schema": SCHEMA,
        "data": {
            "name": data.name,
            "binarize": data.binarize,
            "base_measure": base.built.vae.likelihood.base_measure,
            "digest": data.digest,
            "training_rows": len(data.train),
            "test_rows": len(data.test),
            "evaluated_rows": min(job.rows, len(data.test)),
            "shape": list(data.shape),
            "summary": data.summary(),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "machine": {"device": str(data.train.device), "threads": torch.get_num_threads()},
        "recipe": {name: value for name, value in asdict(base.recipe).items() if name != "guide"},
        "rows": [_row(variants[j.guide], j) for j in judged],
        "verdicts": sentences,
    }
    if same and curve is not None:
        results["same_decoder"] = _same_decoder_results(judged, same)
        results["refinement"] = _curve_results(curve)
    return results


def _row(variant: Variant, judged: Judged) -> dict[str, Any]:
    own = variant.recipe
    return {
        "guide": own.name("guide"),
        "settings": {name: value for name, value in recipe.table(own.guide).items() if name != "type"},
        "family": own.name("family"),
        "likelihood": own.name("likelihood"),
        "prior": own.name("prior"),
        "objective": "ELBO",
        "parameters": runs.parameters(variant),
        "epochs": len(variant.fit.history),
        "seconds": variant.fit.seconds,
        "evaluation_seconds": judged.train.seconds + judged.test.seconds,
        "history": variant.fit.history,
        "train": _quantities(judged.train),
        "test": _quantities(judged.test),
    }


def _quantities(found: Evaluation) -> dict[str, Any]:
    estimators = {"iwae": f"IWAE-{found.K}", "evidence": f"IWAE-{found.K} from the best lam of the family"}
    return {
        name: estimate._asdict() | {"K": found.K, "estimator": estimators.get(name, "mean over draws and rows")}
        for name, estimate in found.summary().items()
    }


def _same_decoder_results(judged: list[Judged], same: list[SameDecoder]) -> dict[str, Any]:
    values = next(j for j in judged if j.guide == "Amortized").test.values
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


def _curve_results(curve: RefinementCurve) -> dict[str, Any]:
    return {
        "steps": list(curve.steps),
        "elbo": [mean_se(elbo)._asdict() for elbo in curve.elbo],
        "gain": [mean_se(elbo - curve.elbo[0])._asdict() for elbo in curve.elbo],
        "seconds_per_step": curve.seconds_per_step,
    }
