"""Open a run folder: its fitted variants, and one of them with its data, ready for use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pvae import applications
from pvae.applications.anomalies import AnomalyScores
from pvae.applications.classification import Classification, classify_conditional
from pvae.applications.coding import Encoding
from pvae.data.dataset import Dataset
from pvae.diagnostics.diagnosis import Diagnosis, diagnose
from pvae.diagnostics.evaluation import Evaluation, evaluate
from pvae.errors import UserError, check_range, nearest, param
from pvae.experiments.class_models import class_labels, fit_class_models
from pvae.experiments.row_selection import check_rows, select_rows
from pvae.experiments.run_folder import RECIPE, is_trained, load_fit, unfinished_note
from pvae.experiments.sweep import DatasetCache, sweep_points
from pvae.inference.batching import Values
from pvae.inference.guides import Guide
from pvae.recipes.build import FittedModel
from pvae.recipes.recipe import Recipe, read_recipe, read_recipe_file
from pvae.runtime.pyro_params import Program
from pvae.samplers.posterior_draws import PosteriorDraws
from pvae.samplers.row_posterior import posterior

if TYPE_CHECKING:
    from pandas import DataFrame

# Rows to use a run on: a table, a split of its data (test, train, validation) or the path of a file; its test rows.
Rows = Values | str | Path | None


class TrainedVariant(NamedTuple):
    """A variant of a run: its fitted models, one for each seed, and its data."""

    name: str
    fits: list[FittedModel]
    data: Dataset


@dataclass(frozen=True, repr=False)
class Run:
    """A fitted variant of a run folder, and its applications and diagnostics by name.

    Methods that take rows x take a table [B, C], ``"test"``, ``"train"`` or ``"validation"`` rows of the run's data, or
    the path of a file, as `select_rows`; the test rows unless given. Further arguments are those of the function of the
    same name in ``pvae.applications``, of `evaluate`, `diagnose` and `posterior`.

    Attributes:
        name, others: of the variant, and of the run's other variants.
        variant: its fitted model: program, guide and recipe.
        data: that it was fitted to, on the CPU.
        device: ``auto``, ``cpu`` or ``cuda``, as it was asked for.

    See also: `open_run`.
    """

    folder: Path
    name: str
    variant: FittedModel
    data: Dataset
    others: Sequence[str] = ()
    device: str = "auto"

    def __repr__(self) -> str:
        recipe, data = self.recipe, self.data
        model = ", ".join(recipe.name(kind) for kind in ("program", "likelihood", "prior", "family", "guide"))
        others = f"; other variants: {', '.join(self.others)}" if self.others else ""
        return (
            f"Run {self.folder}, variant {self.name}: {model}; {len(self.variant.fit.history)} epochs on "
            f"{len(data.train)} rows of {data.identity}, {len(data.test)} test rows{others}"
        )

    @property
    def model(self) -> Program:
        """The generative program."""
        return self.variant.model

    @property
    def guide(self) -> Guide:
        """The approximate posterior."""
        return self.variant.guide

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.variant.recipe

    @property
    def columns(self) -> int:
        """Number of a row's own values, without those of its label."""
        return self.data.train.shape[1] - self.data.num_label_columns

    def encode(self, x: Rows = None, **options: Any) -> Encoding:
        """Encode rows: mean and standard deviation of q(z|x), with rate and distortion."""
        return applications.encode(self.model, self.guide, *self._rows(x), **options)

    def decode(self, z: Values, **options: Any) -> Tensor:
        """Decode codes z [B, D] to rows: the mean of p(x|z), or a draw."""
        return applications.decode(self.model, self.guide, z, **options)

    def reconstruct(self, x: Rows = None, **options: Any) -> Tensor:
        """Reconstruct rows through their codes."""
        return applications.reconstruct(self.model, self.guide, *self._rows(x), **options)

    def sample(self, n: int = 64, **options: Any) -> Tensor:
        """Generate n rows from the prior; what a program is given beside latents, as labels, is that of test rows."""
        check_range(least=1, n=n)
        like = self._rows(None)[0]
        return applications.sample(self.model, like[torch.arange(n) % len(like)], **options)

    def interpolate(self, x: Rows = None, **options: Any) -> Any:
        """Interpolate between rows in latent space; between the first two test rows unless given."""
        rows, index = (self._rows(None)[0][:2], None) if x is None else self._rows(x)
        return applications.interpolate(self.model, self.guide, rows, index, **options)

    def map_latents(self, x: Rows = None, **options: Any) -> Any:
        """Map codes onto a plane, and decode the points of its grid."""
        return applications.map_latents(self.model, self.guide, *self._rows(x), **options)

    def augment(self, x: Rows = None, **options: Any) -> Any:
        """Generate rows around given ones (data augmentation)."""
        return applications.augment(self.model, self.guide, *self._rows(x), **options)

    def impute(self, x: Rows = None, **options: Any) -> Any:
        """Impute missing entries, which are NaN."""
        return applications.impute(self.model, self.guide, *self._rows(x, missing=True), **options)

    def denoise(self, y: Rows, noise: Any, **options: Any) -> Any:
        """Denoise rows, given a noise model of ``pvae.noise``."""
        rows, index = self._rows(y, raw=True, missing=True)
        return applications.denoise(self.model, self.guide, rows, noise, index, **options)

    def detect_anomalies(self, x: Rows, *, reference: Rows = None, **options: Any) -> AnomalyScores:
        """Score how anomalous rows are against reference rows, the test rows unless given."""
        options = {"reference": self._rows(reference)[0]} | options
        return applications.detect_anomalies(self.model, self.guide, *self._rows(x), **options)

    def classify(self, x: Rows = None, *, epochs: int | None = None, **options: Any) -> Classification:
        """Classify rows by evidence, with a model of each label's rows, fitted at first use for ``epochs``."""
        models, data = fit_class_models(self, epochs=epochs)
        rows = self._rows(x)[0][:, : self.columns]
        assert data.train_labels is not None  # fit_class_models asks for them
        options = {"prior": (data.train_labels == class_labels(data).unsqueeze(1)).sum(1).double()} | options
        if models is not None:
            return applications.classify(models, rows, **options)
        return classify_conditional(self.model, self.guide, rows, data.num_label_columns, **options)

    def posterior(self, x: Rows = None, **options: Any) -> PosteriorDraws:
        """Draw from each row's posterior by the cheapest method whose checks pass for that row, with the run's seed."""
        return posterior(self.model, self.guide, *self._rows(x), **{"seed": self.recipe.seed} | options)

    def evaluate(self, x: Rows = None, **options: Any) -> Evaluation:
        """Evaluate the guide: bounds, evidence and gaps of rows, with the run's seed."""
        return evaluate(self.model, self.guide, *self._rows(x), **{"seed": self.recipe.seed} | options)

    def diagnose(self, x: Rows = None, **options: Any) -> Diagnosis:
        """Diagnose the posterior of rows, with the run's seed: figures and how far each use may be trusted."""
        return diagnose(self.model, self.guide, *self._rows(x), **{"seed": self.recipe.seed} | options)

    def summarize_latents(self, x: Rows = None, *, K: int = 100, **options: Any) -> DataFrame:
        """Summarize K draws of each row's latents by ``arviz_stats.summary``: mean, standard deviation, interval."""
        from pvae.experiments.arviz_export import summarize_latents

        return summarize_latents(self.model, self.guide, *self._rows(x), K=K, **{"seed": self.recipe.seed} | options)

    def label_name(self, label: float) -> str:
        """Return a label as the run's data write it: a word, or a number."""
        names = self.data.label_names
        return f"{label:g}" if names is None else names[int(label)]

    def label_of(self, word: str) -> float:
        """Return the number of a label, which the run's data must have."""
        labels = [] if self.data.labels is None else self.data.labels.tolist()
        known = {self.label_name(label): label for label in labels}
        if word not in known:
            raise UserError(f"the run's data have no label '{word}'{nearest(word, known)}")
        return known[word]

    def labelled(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return rows with their labels' one-hot columns, [B, columns + classes], for a program that takes labels."""
        assert self.data.labels is not None  # the columns are theirs
        numbers = torch.searchsorted(self.data.labels, labels)
        return torch.cat([rows, one_hot(numbers, self.data.num_label_columns).to(rows)], 1)

    def _rows(self, x: Rows, **reading: Any) -> tuple[Any, Tensor | None]:
        """Rows, and which training datapoints they are."""
        if x is None or isinstance(x, str | Path):
            rows = select_rows(self, str(x or "test"), **reading)
            return rows.x, rows.index
        check_rows(self, x, **reading)
        return x, None


def open_run(
    folder: str | Path,
    variant: str | None = None,
    *,
    device: str = "auto",
    data_folder: str | Path | None = None,
    trust: bool = False,
) -> Run:
    """Open a run folder of ``pvae fit`` or ``pvae compare``.

    Arguments:
        variant: name of one of a comparison's variants; the first that is trained unless given.
        device: ``auto``, ``cpu`` or ``cuda``.
        data_folder: where torchvision's data sets are.
        trust: run the code of files that the run's recipe names.

    Raises:
        UserError: no run, a broken one, data that have changed, or no variant of this name.

    >>> run = pvae.open_run("runs/compare-digits")  # doctest: +SKIP
    >>> run.encode().mean.shape  # doctest: +SKIP
    torch.Size([359, 8])
    """
    folder = Path(folder)
    trained = {name: (recipe, path) for name, recipe, path in reversed(_list_fits(folder, trust=trust))}
    names = list(reversed(trained))
    name = names[0] if variant is None else variant
    if name not in trained:
        raise UserError(f"{folder} has no variant '{name}'{nearest(name, names)}")
    recipe, path = trained[name]
    data = DatasetCache(data_folder)[recipe]
    fitted = load_fit(path, data, device=device, trust=trust)
    return Run(folder, name, fitted, data, [other for other in names if other != name], device)


def open_variants(
    folder: Path,
    *,
    device: str = "auto",
    data_folder: str | Path | None = None,
    trust: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[TrainedVariant]:
    """Open all trained variants of a run folder, each with the fits of all its seeds.

    Arguments and errors are those of `open_run`; ``say`` takes warnings of what is not trained, or not to its end.
    """
    datasets, variants = DatasetCache(data_folder), dict[str, TrainedVariant]()
    for name, recipe, path in _list_fits(folder, trust=trust, say=say):
        fitted = load_fit(path, datasets[recipe], device=device, trust=trust)
        if note := unfinished_note(fitted):
            say(f"warning: {path if path == folder else path.name} {note}")
        variants.setdefault(name, TrainedVariant(name, [], datasets[recipe])).fits.append(fitted)
    return list(variants.values())


def _list_fits(
    folder: Path, *, trust: bool, say: Callable[[str], None] = lambda line: None
) -> list[tuple[str, Recipe, Path]]:
    """Name, recipe and folder of each fit of a run, in the order of the sweep."""
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is not a run: it has no {RECIPE}; pvae fit --out {folder} makes one")
    recipe, axes, _ = read_recipe_file(folder / RECIPE, trust=trust)
    if not axes:
        return [(recipe.name("guide"), recipe, folder)]
    points = [(point.name, folder / point.folder_name) for point in sweep_points(recipe, axes)]
    begun = [(name, path) for name, path in points if (path / RECIPE).is_file()]
    trained, resume = [(name, path) for name, path in begun if is_trained(path)], param("resume", True)
    if not trained:
        raise UserError(f"{folder} holds no trained variant; the command that began it with {resume} goes on")
    for _, path in begun:
        if not is_trained(path):
            say(f"warning: {path.name} is not trained and stays out; the first command with {resume} trains it")
    return [(name, read_recipe(path, trust=trust), path) for name, path in trained]
