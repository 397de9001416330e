"""Quality of each application beside the standard alternatives: the tables of docs/uses.md.

``python -m tests.benchmarks.uses digits`` (two minutes) and ``... mnist`` (twelve) measure, and put their tables into
the page; names of tables after the data set measure these alone and only print them.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from pvae import applications
from pvae.applications.classification import fit_temperature
from pvae.data.dataset import Dataset
from pvae.diagnostics.latent_geometry import measure_latent_geometry
from pvae.generative.noise import GaussianNoise
from pvae.recipes import recipe
from pvae.recipes.build import FittedModel, build_model
from pvae.recipes.build import fit_recipe as fit_recipe
from pvae.recipes.recipe import Recipe
from pvae.runtime.files import write_text
from pvae.runtime.torch_state import seeded
from pvae.stats import Estimate, mean_se, number
from tests.benchmarks import uses_peers as peers

PAGE = Path(__file__).parents[2] / "docs" / "uses.md"
Line = list[str]


@dataclass
class Table:
    """A table of the page; ``command`` measures it alone, and does the same on a run."""

    title: str
    header: Line
    lines: list[Line]
    note: str = ""
    command: str = ""

    def markdown(self) -> str:
        rows = [self.header, ["---"] * len(self.header), *self.lines]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        repeat = f"\n\nAlone: {self.command}." if self.command else ""
        return f"### {self.title}\n\n{self.note}{chr(10) * 2 if self.note else ''}{table}{repeat}"


@dataclass
class Case:
    """A data set, and how its models are fitted."""

    own: Recipe
    classification: Recipe
    held_out: Recipe
    rows: int
    labels: int = 100
    draws: int = 10

    @cached_property
    def data(self) -> Dataset:
        return recipe.load_recipe_data(recipe.resolve(self.own))

    @cached_property
    def train(self) -> Tensor:
        """Training rows as the fits see them, binarized once."""
        return self.data.fixed_train(len(self.data.train)).x

    @property
    def x(self) -> Tensor:
        """Test rows for what takes long."""
        return self.data.test[: self.rows]

    @cached_property
    def vae(self) -> FittedModel:
        return fitted(self.own, self.data)[0]

    @cached_property
    def autoencoder(self) -> FittedModel:
        return fitted(replace(self.own, family="Delta", objective="ELBO(kl_weight=0)"), self.data)[0]

    @property
    def dim(self) -> int:
        return int(self.own.latent or 0)


def fitted(own: Recipe, data: Dataset) -> tuple[FittedModel, float]:
    """A recipe's programs, fitted, and the seconds that it took."""
    fit = fit_recipe(build_model(recipe.resolve(own), data), data)
    return fit, fit.fit.seconds


def reconstruction(case: Case) -> Table:
    """Squared error per value, bits, and the time of a row."""
    lines = []
    for name, built in (("VAE", case.vae), ("autoencoder", case.autoencoder)):
        begin = time.perf_counter()
        found = applications.encode(built.model, built.guide, case.data.test, K=16)
        took = time.perf_counter() - begin
        rate = "–" if found.rate.isnan().any() else number(mean_se(found.rate))
        lines.append([name, number(mean_se(found.error)), rate, number(mean_se(found.distortion)), millis(took, case)])
    begin = time.perf_counter()
    own = (peers.through_pca(case.train, case.data.test, case.dim) - case.data.test).square().mean(1)
    lines.append(
        [f"PCA, {case.dim} components", number(mean_se(own)), "–", "–", millis(time.perf_counter() - begin, case)]
    )
    header = ["", "squared error per value", "rate (bits per row)", "distortion (nats per row)", "ms per row"]
    note = (
        f"{len(case.data.test):,} test rows through {case.dim} numbers: the mean of p(x\\|z) at the code's mean. The "
        "autoencoder is the same network with point-mass codes and no KL. PCA's time includes its fit."
    )
    return Table("Reconstruction and compression", header, lines, note)


def millis(seconds: float, case: Case) -> str:
    return f"{1e3 * seconds / len(case.data.test):.2g}"


def latent_space(case: Case) -> Table:
    """Latent geometry of the VAE and the autoencoder."""
    names = {
        "step": "RMS move of x for 0.1 sd of the codes",
        "roughness": "roughness",
        "vacuum_prior": "prior draws far from data",
        "vacuum_between": "midpoints far from data",
        "variety": "variety of prior draws",
    }
    lines = []
    for name, built in (("VAE", case.vae), ("autoencoder", case.autoencoder)):
        own = measure_latent_geometry(built.model, built.guide, case.x, case.train).summary()
        lines.append([name, *(number(own[key]) for key in names)])
    note = (
        "A point is far if its nearest training row is farther than for 95% of the test rows' reconstructions: 0.05 is "
        "expected of data. Roughness is the 95th percentile of the decoder's steepness over its median. Variety is the "
        "spread of prior draws over that of reconstructions; below 1 it reveals blur, which is far from no row."
    )
    return Table("Latent geometry", ["", *names.values()], lines, note)


def denoising(case: Case) -> Table:
    """Denoising of Gaussian noise of 0.5."""
    noise, x = GaussianNoise(scale=0.5), case.x
    with seeded(17):
        y = noise.add_to(x)
    built = case.vae
    begin = time.perf_counter()
    own = applications.denoise(built.model, built.guide, y, noise).x
    took = time.perf_counter() - begin
    plain = applications.reconstruct(built.model, built.guide, y, K=8)
    fits = {
        f"VAE, posterior mean ({1e3 * took / len(x):.3g} ms per row)": own,
        "VAE, noisy row through the encoder": plain,
        "y > 0.5": (y > 0.5).float(),
        f"PCA, {case.dim} components": peers.through_pca(case.train, y, case.dim),
        "column means": case.train.mean(0).expand_as(x),
        "the noisy row": y,
    }
    start = (y - x).square().mean()
    lines = [[n, number(mean_se(e)), number(mean_se(e / start))] for n, e in errors(fits, x).items()]
    note = f"{len(x):,} test rows with Gaussian noise of standard deviation 0.5 added."
    header = ["", "squared error per value", "share of the noise's squared error"]
    return Table("Denoising", header, lines, note)


def errors(fits: dict[str, Tensor], x: Tensor, where: Tensor | None = None) -> dict[str, Tensor]:
    """Squared errors of each row, [B], of all values or of some."""
    if where is None:
        return {name: (found - x).square().mean(1) for name, found in fits.items()}
    return {
        name: torch.where(where, (found - x).square(), 0).sum(1) / where.sum(1).clamp(min=1)
        for name, found in fits.items()
    }


def imputation(case: Case) -> Table:
    """Imputation of half of the entries."""
    x, built = case.x, case.vae
    there = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) >= 0.5
    hidden = torch.where(there, x, torch.nan)
    ways: dict[str, Callable[[], Tensor]] = {
        "VAE, posterior mean": lambda: applications.impute(built.model, built.guide, hidden).x,
        f"PCA, {case.dim} components, 50 rounds": lambda: peers.pca_imputed(case.train, x, there, case.dim),
        "KNNImputer, 5 neighbours": lambda: peers.knn_imputed(case.train, x, there),
        "column means": lambda: case.train.mean(0).expand_as(x),
    }
    if x.shape[1] < 100:
        ways["IterativeImputer, BayesianRidge"] = lambda: peers.iteratively_imputed(case.train, x, there)
    lines = []
    for name, make in ways.items():
        begin = time.perf_counter()
        made = make()
        took = time.perf_counter() - begin
        own = errors({name: made}, x, ~there)[name]
        lines.append([name, number(mean_se(own)), f"{1e3 * took / len(x):.2g}"])
    left = (
        "" if x.shape[1] < 100 else " IterativeImputer, which regresses each of 784 columns on all others, is left out."
    )
    note = (
        f"{len(x):,} test rows, each entry hidden with probability 0.5; KNNImputer uses "
        f"{min(peers.FEW, len(case.train)):,} training rows, the others all. Times include their fit.{left}"
    )
    header = ["", "squared error per hidden value", "ms per row"]
    return Table("Imputation", header, lines, note)


def anomaly(case: Case) -> Table:
    """Each label held out in turn: AUROC of test rows of that label among all."""
    whole = recipe.load_recipe_data(recipe.resolve(replace(case.held_out, only=None)))
    assert whole.test_labels is not None
    kinds, found = whole.test_labels.unique().tolist(), dict[str, list[float]]()
    for kind in kinds:
        only = [other for other in kinds if other != kind]
        own = replace(case.held_out, only=only)
        data = recipe.load_recipe_data(recipe.resolve(own))
        built, _ = fitted(own, data)
        truth = whole.test_labels == kind
        train = data.fixed_train(len(data.train)).x
        mine = applications.detect_anomalies(built.model, built.guide, whole.test, reference=data.validation).scores
        named = {f"VAE, {name}": score for name, score in mine.items()}
        for name, score in (named | peers.anomaly_scores(train, whole.test, int(own.latent or 0))).items():
            found.setdefault(name, []).append(uses_auroc(score, truth))
        print(f"  without {kind}: " + ", ".join(f"{n} {v[-1]:.3f}" for n, v in found.items()), file=sys.stderr)
    lines = [[n, f"{sum(v) / len(v):.3f}", *(f"{each:.2f}" for each in v)] for n, v in found.items()]
    note = (
        "AUROC of the rows of one digit among all test rows, under a fit to the other nine: 0.5 is chance. For one "
        f"digit its standard error is about {0.29 / (len(whole.test) / 10) ** 0.5:.2f}. Fits: "
        f"{describe(case.held_out)}; K = 16."
    )
    return Table("Anomalies: a digit that was not trained on", ["", "mean", *map(str, kinds)], lines, note)


def uses_auroc(score: Tensor, truth: Tensor) -> float:
    from pvae.applications.anomalies import auroc

    return auroc(score, truth).mean


def classification(case: Case) -> Table:
    """A model for each class against classifiers."""
    own = case.classes
    data = recipe.load_recipe_data(recipe.resolve(own))
    assert data.train_labels is not None
    assert data.test_labels is not None
    assert data.validation_labels is not None
    kinds, models, took = data.train_labels.unique().tolist(), [], 0.0
    for kind in kinds:
        each = replace(own, only=[kind])
        built, seconds = fitted(each, recipe.load_recipe_data(recipe.resolve(each)))
        models.append((built.model, built.guide))
        took += seconds
    held = applications.classify(models, data.validation[:2000], seed=1).log_evidence
    temperature = fit_temperature(held, data.validation_labels[:2000]).mean
    begin = time.perf_counter()
    found = applications.classify(models, data.test, temperature=temperature)
    asked = time.perf_counter() - begin
    mine = found.summary(data.test_labels)
    name = f"one VAE per class, calibrated at {temperature:.2g}"
    lines = [[name, percent(mine["accuracy"]), number(mine["log_loss"]), f"{took:.2g} s, {asked:.2g} s"]]
    train, labels = data.fixed_train(len(data.train)).x, data.train_labels
    for name, classifier in peers.classifiers().items():
        begin = time.perf_counter()
        hit = peers.right(classifier, train, labels, data.test, data.test_labels)
        p = torch.from_numpy(classifier.predict_proba(data.test.numpy()))  # type: ignore[attr-defined]
        loss = -p.clamp(min=1e-12).log().gather(1, data.test_labels.unsqueeze(1)).squeeze(1)
        lines.append(
            [name, percent(mean_se(hit)), number(mean_se(loss)), f"{time.perf_counter() - begin:.2g} s in all"]
        )
    note = (
        f"{len(data.test):,} test rows, {len(train):,} training rows, {len(data.validation):,} more for calibration. "
        f"Class models: {describe(own)}."
    )
    header = ["", "accuracy (%)", "log loss (nats)", "training, test"]
    return Table("Classification", header, lines, note)


def percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.2f} ± {100 * estimate.se:.2f}"


BINARIZED = {
    "none": "grey levels",
    "threshold": "binarized at 0.5",
    "dynamic": "binarized anew for each batch",
    "levels": "integer grey levels",
}


def describe(own: Recipe) -> str:
    known = recipe.resolve(own)
    hidden = known.network["hidden"] if isinstance(known.network, dict) else ""
    how = BINARIZED[known.binarize or "none"]
    return f"{known.latent} latent dimensions, hidden {hidden}, {known.epochs} epochs, {how}"


def augmentation(case: Case) -> Table:
    """A small classifier with few labels, with and without new rows around these; the VAE has seen no label."""
    built, y = case.vae, case.data.test_labels
    assert y is not None
    assert case.data.train_labels is not None
    spreads, kept = (0.5, 1.0, 2.0), dict[str, list[float]]()
    for draw in range(case.draws):
        few = torch.randperm(len(case.train), generator=torch.Generator().manual_seed(draw))[: case.labels]
        rows, labels = case.train[few], case.data.train_labels[few]
        if len(labels.unique()) < len(case.data.train_labels.unique()):
            continue
        sets = {"the labelled rows alone": (rows, labels)}
        for spread in spreads:
            new = applications.augment(built.model, built.guide, rows, per_row=10, spread=spread, seed=draw)
            sets[f"and 10 around each, spread {spread:g}"] = (
                torch.cat([rows, new.x]),
                torch.cat([labels, labels[new.row]]),
            )
        for name, classifier in peers.classifiers().items():
            for what, (x, own) in sets.items():
                hit = peers.right(classifier, x, own, case.data.test, y).mean().item()
                kept.setdefault(f"{name}, {what}", []).append(hit)
        codes = [applications.encode(built.model, built.guide, each, K=1).mean for each in (rows, case.data.test)]
        classifier = peers.classifiers()["LogisticRegression"]
        hit = peers.right(classifier, codes[0], labels, codes[1], y).mean().item()
        kept.setdefault("LogisticRegression on the VAE's codes instead", []).append(hit)
    lines = [[name, percent(mean_se(torch.tensor(values)))] for name, values in kept.items()]
    note = f"{case.labels} labelled training rows, drawn {case.draws} times; the VAE was fitted to all, without labels."
    return Table("Augmentation", ["", "accuracy (%)"], lines, note)


TABLES: dict[str, Callable[[Case], Table]] = {
    "reconstruction": reconstruction,
    "latent_space": latent_space,
    "denoising": denoising,
    "imputation": imputation,
    "anomaly": anomaly,
    "classification": classification,
    "augmentation": augmentation,
}
MODELS = Path(__file__).parents[2] / "models"


def read(name: str) -> Recipe:
    """A recipe of models/."""
    return recipe.read_recipe_file(MODELS / f"{name}.toml").recipe


CASES = {
    "digits": Case(Recipe(data="digits", latent=8), read("classify-digits"), read("anomalies-digits"), rows=359),
    "mnist": Case(read("mnist-vae"), read("classify-mnist"), read("anomalies-mnist"), rows=1000),
}


# The command that does the same on a run, for each table.
BY_HAND = {
    "reconstruction": "pvae encode RUN",
    "latent_space": "pvae compare models/autoencoder.toml (grey levels)",
    "denoising": "pvae denoise RUN",
    "imputation": "pvae impute RUN --hide 0.5",
    "anomaly": "pvae fit models/anomalies-{name}.toml --out RUN; pvae anomalies RUN (one digit)",
    "classification": "pvae fit models/classify-{name}.toml --out RUN; pvae classify RUN",
    "augmentation": "pvae augment RUN train --select 0:100 (the rows, without a classifier)",
}


def measured(name: str, wanted: list[str]) -> Iterator[Table]:
    for each in wanted or TABLES:
        begin = time.perf_counter()
        found = TABLES[each](CASES[name])
        found.command = (
            f"`python -m tests.benchmarks.uses {name} {each}`; on a run: `{BY_HAND[each].format(name=name)}`"
        )
        print(found.markdown(), f"({each}: {time.perf_counter() - begin:.0f} s)", sep="\n\n", flush=True)
        yield found


def machine() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "scikit-learn"))
    return f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {libraries}"


def main() -> None:
    name, *wanted = sys.argv[1:]
    tables = list(measured(name, wanted))
    if wanted:
        return
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(begin)[0], text.split(end)[1]
    own = f"Fits: {describe(CASES[name].own)}. Machine: {machine()}.\n\n" + "\n\n".join(t.markdown() for t in tables)
    write_text(PAGE, f"{before}{begin}\n\n{own}\n\n{end}{after}")


if __name__ == "__main__":
    main()
