"""Build: a resolved recipe and its data become generative program, guide and objective; and their fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from pvae.data.dataset import Dataset
from pvae.errors import Incompatible, param
from pvae.generative.effect_handlers import mask_missing
from pvae.generative.networks import ImputeMeans, Standardize
from pvae.inference.families import Family
from pvae.inference.guides import Guide
from pvae.inference.latents import find_latent_sites
from pvae.recipes.recipe import Recipe
from pvae.recipes.registry import accepts_argument, make
from pvae.runtime import distributed
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded
from pvae.stats import impute_column_means
from pvae.training.loop import Fit, fit
from pvae.training.objectives import Objective


@dataclass(frozen=True)
class FittedModel:
    """A resolved recipe's program, guide (the approximate posterior) and objective, and the report of their fit.

    Attributes:
        program: the module whose method ``model`` is the generative program.
        fit: history and time of the fit; an empty history before it.
    """

    recipe: Recipe
    program: Any
    guide: Guide
    objective: Objective
    fit: Fit = field(default_factory=lambda: Fit([], 0.0, ""))

    @property
    def model(self) -> Program:
        """The generative program, a function of the signature ``model(x, index=None)``."""
        return self.program.model

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that hold the parameters, by their names in a checkpoint."""
        return {"model": self.program, "guide": self.guide}


@dataclass(frozen=True)
class EncoderPosterior:
    """The amortized posterior q(z|x): a variational family over an encoder, x [B, columns] to a distribution."""

    family: Family
    encoder: nn.Module

    def __call__(self, x: Tensor) -> Any:
        return self.family(self.encoder(x))


def build_model(recipe: Recipe, dataset: Dataset) -> FittedModel:
    """Build the program, guide and objective of a resolved recipe, sized from the data.

    Recipes that differ in the guide alone start from the same decoder and, if they have one, the same encoder. If
    entries may be missing, the program's ``model`` scores the observed ones.

    Raises:
        UserError: a component refuses its arguments.
        Incompatible: two components do not go together.
    """
    with seeded(recipe.seed):  # one stream: family, decoder, encoder, prior, in this order
        family = make("family", recipe.family, dim=recipe.latent)
        likelihood = make("likelihood", recipe.likelihood)
        decoder = make_decoder(recipe, dataset, likelihood)
        encoder = make_encoder(recipe, dataset, family)
        prior = make_prior(recipe, dataset, EncoderPosterior(family, encoder))
        parts = {"likelihood": likelihood, "decoder": decoder, "prior": prior, "latent": recipe.latent}
        classes = dataset.num_label_columns
        program = make("program", recipe.program, **parts, columns=dataset.train.shape[1] - classes, classes=classes)
        if dataset.missing:  # the program's own attribute, so that every reader of ``program.model`` sees this one
            program.model = mask_missing(program.model)
        sites = find_latent_sites(program.model, dataset.train[:3])
        if sites.dim != family.dim:  # the program's latents are not the recipe's D dimensions
            if prior is not None and accepts_argument("prior", recipe.prior, "posterior"):
                raise Incompatible(f"prior {recipe.name('prior')} needs z to be the program's only latent")
            family = make("family", recipe.family, dim=sites.dim)
            encoder = make_encoder(recipe, dataset, family)
    num_data = len(distributed.shard(len(dataset.train)))
    supplied = {"encoder": encoder, "family": family, "num_data": num_data, "model": program.model, "sites": sites}
    guide = make("guide", recipe.guide, **supplied)
    return FittedModel(recipe, program, guide, make("objective", recipe.objective))


def make_decoder(recipe: Recipe, dataset: Dataset, likelihood: Any) -> nn.Module | None:
    """Make the decoder, z to the likelihood's parameters; None if the program takes none."""
    if not accepts_argument("program", recipe.program, "decoder"):
        return None
    outputs = likelihood.params_per_value * (dataset.train.shape[1] - dataset.num_label_columns)
    return make("network", recipe.network, inputs=recipe.latent, outputs=outputs, shape=dataset.shape, decodes=True)


def make_encoder(recipe: Recipe, dataset: Dataset, family: Family) -> nn.Module:
    """Make the encoder, x to the variational parameters; standardization and mean imputation go before it if needed."""
    sizes = {"inputs": dataset.train.shape[1], "outputs": family.num_params, "shape": dataset.shape}
    encoder = make("network", recipe.network, **sizes, labels=dataset.num_label_columns, decodes=False)
    rows = _example_rows(dataset)
    if rows.min() < 0 or rows.max() > 1:  # intensities are fit for a network as they are
        encoder = Standardize(encoder, rows)
    return encoder if dataset.means is None else ImputeMeans(encoder, dataset.means.to(rows))


def make_prior(recipe: Recipe, dataset: Dataset, posterior: EncoderPosterior) -> nn.Module | None:
    """Make the prior p(z), a VampPrior of the amortized posterior; None if the program takes none."""
    if not accepts_argument("program", recipe.program, "prior"):
        return None
    if accepts_argument("prior", recipe.prior, "posterior"):
        prior, guide, family = (recipe.type_name(kind) for kind in ("prior", "guide", "family"))
        if not accepts_argument("guide", recipe.guide, "encoder"):
            problem = f"prior {prior} needs an encoder, and guide {guide} has none"
            raise Incompatible(problem, f"use {param('guide', 'Amortized')}")
        if posterior.family.point_mass:
            problem = f"prior {prior} needs a density, and family {family} has none"
            raise Incompatible(problem, f"use another {param('family')}")
    return make("prior", recipe.prior, dim=recipe.latent, posterior=posterior, data=_example_rows(dataset))


def _example_rows(dataset: Dataset) -> Tensor:
    """Return training rows for the start of encoder and prior, after mean imputation."""
    rows, means = dataset.sample, dataset.means
    return rows if means is None else impute_column_means(rows, means=means)


def fit_recipe(untrained: FittedModel, data: Dataset, **options: Any) -> FittedModel:
    """Fit a model of `build_model` or `check_recipe` by its recipe's budget; ``options`` are those of `fit`."""
    names = ("epochs", "batch_size", "learning_rate", "patience", "engine", "precision", "seed")
    budget = {name: getattr(untrained.recipe, name) for name in names}
    report = fit(untrained.model, untrained.guide, data, objective=untrained.objective, **budget, **options)
    return replace(untrained, fit=report)
