"""Building: a resolved recipe and its data become program, guide and objective."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pvae.data.dataset import Dataset
from pvae.errors import Incompatible
from pvae.generative.handlers import mask_missing
from pvae.generative.networks import ImputeMeans, Standardize
from pvae.inference import guides
from pvae.inference.families import Family
from pvae.inference.latents import LatentSites, find_latent_sites
from pvae.recipes import registry
from pvae.recipes.recipe import Recipe
from pvae.recipes.registry import as_table, make
from pvae.runtime import distributed
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded
from pvae.training.loop import Fit, fit
from pvae.training.objectives import Objective


@dataclass(frozen=True)
class FittedModel:
    """A recipe's generative program, guide and objective, and how their fit went.

    Attributes:
        recipe: resolved.
        program: the module whose method ``model`` is the generative program.
        guide: the approximate posterior.
        objective: what training maximizes.
        fit: history and time of the fit; an empty history before it.
    """

    recipe: Recipe
    program: Any
    guide: guides.Guide
    objective: Objective
    fit: Fit = field(default_factory=lambda: Fit([], 0.0, ""))

    @property
    def model(self) -> Program:
        """The generative program, a function of the signature ``model(x, index=None)``."""
        return self.program.model

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that hold the parameters, by the names that a checkpoint has for them."""
        return {"model": self.program, "guide": self.guide}


def build_model(recipe: Recipe, dataset: Dataset) -> FittedModel:
    """Program, guide and objective of a resolved recipe, sized from the data.

    Recipes that differ in the guide alone start from the same decoder and, where they have one, the same encoder.
    Where entries may be missing, the program's ``model`` scores those that are there, and the encoder and what starts
    from rows see the means of the training values in the place of the others.

    Raises:
        UserError: a component refuses its arguments, or two of them do not go together.
    """
    with seeded(recipe.seed):
        posterior = _Posterior(recipe, dataset)
        program = _program(recipe, dataset, posterior)
        if dataset.missing:  # the program's own, so that all who name it see this one
            program.model = mask_missing(program.model)
        sites = find_latent_sites(program.model, dataset.train[:3])
        posterior.fit_to(sites)
    family, encoder = posterior.family, posterior.encoder
    own = len(distributed.shard(len(dataset.train)))
    supplied = {"encoder": encoder, "family": family, "num_data": own, "model": program.model, "sites": sites}
    guide = make("guide", recipe.guide, **supplied)
    return FittedModel(recipe, program, guide, make("objective", recipe.objective))


def _program(recipe: Recipe, dataset: Dataset, posterior: _Posterior) -> Any:
    columns = dataset.train.shape[1] - dataset.num_label_columns
    likelihood = make("likelihood", recipe.likelihood)
    supplied = {
        "columns": columns,
        "latent": recipe.latent,
        "likelihood": likelihood,
        "classes": dataset.num_label_columns,
    }
    if registry.accepts_argument("program", recipe.program, "decoder"):
        outputs = likelihood.params_per_value * columns
        sizes = {"inputs": recipe.latent, "outputs": outputs, "shape": dataset.shape, "decodes": True}
        supplied["decoder"] = make("network", recipe.network, **sizes)
    posterior.make_encoder()
    if registry.accepts_argument("program", recipe.program, "prior"):
        if registry.accepts_argument("prior", recipe.prior, "posterior"):
            posterior.check_has_encoder()
        known = {"dim": recipe.latent, "posterior": posterior, "data": posterior.rows}
        supplied["prior"] = make("prior", recipe.prior, **known)
    return make("program", recipe.program, **supplied)


class _Posterior:
    """The guide's family over its encoder, x [B, columns] to q(z|x): what a prior may be made of."""

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.recipe, self.dataset = recipe, dataset
        self.family: Family = make("family", recipe.family, dim=recipe.latent)
        self.encoder: nn.Module = nn.Identity()

    @property
    def rows(self) -> Tensor:
        """The rows that networks and priors start from, as the encoder sees them."""
        rows, means = self.dataset.sample, self.dataset.means
        return rows if means is None else torch.where(rows.isnan(), means.to(rows), rows)

    def __call__(self, x: Tensor) -> Any:
        return self.family(self.encoder(x))

    def make_encoder(self) -> None:
        """The encoder of the recipe's network for the family as it is."""
        sizes = {"inputs": self.dataset.train.shape[1], "outputs": self.family.size, "shape": self.dataset.shape}
        self.encoder = make(
            "network", self.recipe.network, **sizes, labels=self.dataset.num_label_columns, decodes=False
        )
        rows, means = self.rows, self.dataset.means
        if rows.min() < 0 or rows.max() > 1:  # intensities are fit for a network as they are
            self.encoder = Standardize(self.encoder, rows)
        if means is not None:
            self.encoder = ImputeMeans(self.encoder, means.to(rows))

    def fit_to(self, sites: LatentSites) -> None:
        """Size family and encoder anew where the program's latents are not the recipe's D dimensions."""
        if sites.dim != self.family.dim:
            if registry.accepts_argument("prior", self.recipe.prior, "posterior") and registry.accepts_argument(
                "program", self.recipe.program, "prior"
            ):
                raise Incompatible(f"prior {self.recipe.name('prior')} needs z to be the program's only latent")
            self.family = make("family", self.recipe.family, dim=sites.dim)
            self.make_encoder()

    def check_has_encoder(self) -> None:
        """Refuse a prior that is made of the guide's posterior where the guide or its family has none to give."""
        prior, guide, family = (str(as_table(getattr(self.recipe, k))["type"]) for k in ("prior", "guide", "family"))
        if not registry.accepts_argument("guide", self.recipe.guide, "encoder"):
            raise Incompatible(f"prior {prior} needs an encoder, and guide {guide} has none; use --guide Amortized")
        if self.family.point_mass:
            raise Incompatible(f"prior {prior} needs a density, and family {family} has none; use another --family")


def fit_recipe(untrained: FittedModel, data: Dataset, **options: Any) -> FittedModel:
    """Fit a built model by its recipe's budget; ``options`` are those of `fit`."""
    recipe = untrained.recipe
    report = fit(
        untrained.model,
        untrained.guide,
        data,
        epochs=recipe.epochs or 0,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate or 0.0,
        objective=untrained.objective,
        patience=recipe.patience,
        engine=recipe.engine,
        precision=recipe.precision,
        seed=recipe.seed,
        **options,
    )
    return replace(untrained, fit=report)
