"""Scikit-learn's interface: a variational autoencoder as a transformer and density of tables."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pvae.applications import coding
from pvae.data.dataset import Dataset
from pvae.data.preprocessing import check_values
from pvae.errors import Incompatible, UserError, check_range
from pvae.inference.batching import RowBatch, map_batches
from pvae.inference.families import Delta
from pvae.inference.importance import ROWS_PER_PASS, log_weights
from pvae.inference.latents import find_latent_sites
from pvae.inference.posterior import posterior_moments
from pvae.inference.refinement import fixed_guide
from pvae.recipes import registry
from pvae.recipes.build import build_model, fit_recipe
from pvae.recipes.recipe import Recipe, check_value, resolve
from pvae.runtime.pyro_params import Program
from pvae.runtime.signals import TrainingInterrupt
from pvae.runtime.torch_state import seeded
from pvae.training.support import check_support

__all__ = ["VAE"]

# What a recipe calls a parameter, where that is another name.
NAMES = {
    "guide": "inference",
    "latent": "n_components",
    "epochs": "max_iter",
    "patience": "n_iter_no_change",
    "validation_size": "validation_fraction",
}
# Parameters that a recipe has, by its name for them.
SHARED = (
    *("likelihood", "prior", "family", "network", "guide", "objective", "latent", "epochs", "batch_size"),
    *("learning_rate", "patience", "engine", "missing"),
)


class VAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    r"""A variational autoencoder of rows x [N, M]: :math:`z \sim p(z)`, :math:`x \sim p(x | \eta(z))`, :math:`q(z|x)`.

    Components are named as in recipes, ``"GaussianMixture(components=5)"``; ``pvae list`` names them.

    Arguments:
        n_components: D, the number of latent dimensions.
        likelihood: p(x|z). The Gaussian has one scale for all columns, so that these should be of like scale:
            put a ``StandardScaler`` before it.
        prior: p(z).
        family: q(z|x).
        network: of decoder and encoder.
        hidden: its widths, unless its own word has them.
        shape: of a row that is a picture, H, W or H, W, C, for ``Conv``.
        inference: where the family's parameters come from. Only under ``Amortized`` a row's results don't depend on the
            other rows; ``PerDatapoint`` seeks each new row's own q.
        objective: the bound that is trained.
        max_iter: epochs.
        batch_size, learning_rate, engine, device: see `fit`.
        n_iter_no_change: stop when the ELBO of held-out rows has not risen for so many epochs, and go back to the
            best; None trains to the end.
        validation_fraction: of the rows, held out for that.
        missing: NaN marks entries that are missing; those that are there are scored.
        n_draws: K of `score_samples`.
        random_state: of weights, batches and draws.
        verbose: show a progress bar.

    Attributes:
        model_, guide_: program and guide, on the CPU and in double precision, in which a row's results don't depend
            on the size of its batch; ``model_.model`` and ``guide_`` go into all functions of pvae.
        recipe_: all that was chosen, as `Recipe`.
        history_: a row for each epoch, see `Fit`.
        n_iter_: epochs made.
        n_features_in_, feature_names_in_: columns, and their names where X has any.

    Raises:
        ValueError: a parameter, or values of X, that don't do; one line that says which.

    >>> X = np.random.default_rng(0).normal(size=(50, 4))
    >>> VAE(n_components=2, max_iter=1, random_state=0).fit_transform(X).shape
    (50, 2)
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        likelihood: str = "Gaussian",
        prior: str = "StandardNormal",
        family: str = "DiagonalNormal",
        network: str = "MLP",
        hidden: Sequence[int] = (128,),
        shape: Sequence[int] | None = None,
        inference: str = "Amortized",
        objective: str = "ELBO",
        max_iter: int = 100,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        n_iter_no_change: int | None = None,
        validation_fraction: float = 0.1,
        missing: bool = False,
        n_draws: int = 100,
        device: str = "auto",
        engine: str = "auto",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.likelihood = likelihood
        self.prior = prior
        self.family = family
        self.network = network
        self.hidden = hidden
        self.shape = shape
        self.inference = inference
        self.objective = objective
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.n_iter_no_change = n_iter_no_change
        self.validation_fraction = validation_fraction
        self.missing = missing
        self.n_draws = n_draws
        self.device = device
        self.engine = engine
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> VAE:
        """Train decoder and encoder on the rows X [N, M]; y is ignored."""
        X = validate_data(self, X, dtype=np.float64, order="C", ensure_min_samples=2, ensure_all_finite=self._finite())
        with _door():
            recipe = self._recipe(_seed(self.random_state))
            whole = _dataset(X, self.shape, self.missing)
            data = whole if recipe.patience is None else _held_out(whole, self.validation_fraction, recipe.seed)
            built = build_model(recipe, data)
            _check_values(built.model, whole)
            found = fit_recipe(built, data, device=self.device, progress=bool(self.verbose))
        self.model_, self.guide_, self.recipe_ = built.program.cpu().double(), built.guide.cpu().double(), recipe
        self.history_, self.n_iter_ = found.fit.history, len(found.fit.history)
        self._tie()
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Codes of the rows X [N, M]: means of q(z|x), [N, D]; those of draws for a family that states none."""
        return self._by_rows(X, lambda rows, q_params: posterior_moments(self.guide_.family, q_params)[0])

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Codes [N, D] to rows: the mean of p(x|z), [N, M]."""
        check_is_fitted(self)
        codes = torch.tensor(check_array(X, dtype=np.float64))
        with _door():
            given = codes.new_zeros(len(codes), self.n_features_in_)
            return coding.decode(self.model_.model, self.guide_, codes, given).numpy()

    def score_samples(self, X: Any) -> np.ndarray:
        r"""Log evidence of each row of X [N, M] in nats, :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k|x)`, [N].

        A row's noise is decided by its values and the estimator's seed. On average over noise this is a lower bound of
        log p(x), which K = ``n_draws`` tightens. Nats of density and of mass are not to be compared.
        """
        check_is_fitted(self)
        with _door():
            if self.guide_.family.point_mass:
                raise Incompatible("family Delta has no density, so that there is no evidence; use another --family")
        return self._by_rows(X, self._evidence)

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of `score_samples`: nats per row, higher is better."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """New rows [n_samples, M], drawn from p(z) and p(x|z).

        Arguments:
            n_samples: how many.
            random_state: of the draws; the estimator's unless given.
        """
        check_is_fitted(self)
        seed = _seed(self.random_state if random_state is None else random_state)
        with _door():
            check_range("sample", n_samples=n_samples)
            like = torch.zeros(n_samples, self.n_features_in_)
            return coding.sample(self.model_.model, like, draw=True, seed=seed).numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = bool(self.missing)
        return tags

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "guide_" in state:
            self._tie()

    @property
    def _n_features_out(self) -> int:
        return self.guide_.family.dim

    def _tie(self) -> None:
        """Let guide and prior know of each other's parts in a way that can be pickled, and without the rows."""
        guide: Any = self.guide_
        guide.sites = find_latent_sites(self.model_.model, torch.zeros(2, self.n_features_in_, dtype=torch.double))
        if hasattr(self.model_.prior, "posterior"):
            self.model_.prior.posterior = partial(_encoded, guide)

    def _finite(self) -> bool | str:
        return "allow-nan" if self.missing else True

    def _recipe(self, seed: int) -> Recipe:
        """The parameters as a recipe, everything filled in."""
        keys = {key: _plain(getattr(self, NAMES.get(key, key))) for key in SHARED}
        for key, value in keys.items():
            check_value(key, value, "--")
        network = registry.as_table(keys["network"])
        if registry.accepts_argument("network", network, "hidden"):
            network.setdefault("hidden", _plain(self.hidden))
        return resolve(Recipe(data="X", seed=seed, **(keys | {"network": network})))

    def _by_rows(self, X: Any, compute: Any) -> np.ndarray:
        """What a function of rows and their q_params [B, P] gives for the rows of X."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, order="C", reset=False, ensure_all_finite=self._finite())
        x = torch.tensor(X)

        def computed(rows: RowBatch) -> dict[str, Tensor]:
            return {"found": compute(rows, self.guide_.params(rows.x).detach())}

        with _door():
            _check_values(self.model_.model, Dataset("X", x, x[:0], x[:0], x.shape[1:]))
            return map_batches(self.model_.model, self.guide_, computed, x, seed=self.recipe_.seed)["found"].numpy()

    def _draws(self, rows: RowBatch, q_params: Tensor) -> Tensor:
        """K draws of each row's q, [K, B, D]. Its values decide its noise, so that no row feels its neighbours."""
        check_range("VAE", n_draws=self.n_draws)
        draws = []
        for own, x in zip(q_params.split(1), rows.x.numpy() + 0.0, strict=True):  # + 0.0 makes 0 of -0
            torch.manual_seed(self.recipe_.seed + int.from_bytes(hashlib.sha256(x.tobytes()).digest()[:7]))
            draws.append(self.guide_.family(own).sample(torch.Size([self.n_draws])))
        return torch.cat(draws, 1)

    def _evidence(self, rows: RowBatch, q_params: Tensor) -> Tensor:
        guide, sites = self.guide_, self.guide_.sites
        z, q = self._draws(rows, q_params), guide.family(q_params)
        joint = []
        for some in z.split(max(1, ROWS_PER_PASS // len(q_params))):
            at = fixed_guide(Delta(sites.dim), some.flatten(0, 1), sites)
            found = log_weights(self.model_.model, at, rows.x.repeat(len(some), 1)).log_w
            joint.append(found.view(some.shape[:2]))
        return (torch.cat(joint) - q.log_prob(z)).logsumexp(0) - math.log(len(z))


def _encoded(guide: Any, x: Tensor) -> Any:
    """q(z|x) by the encoder alone."""
    return guide.family(guide.encoder(x))


def _dataset(X: np.ndarray, shape: Sequence[int] | None, missing: bool) -> Dataset:
    """The rows as training data."""
    rows = torch.tensor(check_values("X", X, "none", 1, missing=missing), dtype=torch.get_default_dtype())
    if shape is not None and math.prod(shape) != rows.shape[1]:
        raise UserError(f"shape {tuple(shape)} holds {math.prod(shape)} values, but X has {rows.shape[1]} columns")
    means = rows.nanmean(0) if missing else None
    if means is not None and means.isnan().any():
        raise UserError(f"X: column {int(means.isnan().nonzero()[0])} has no value in any row; drop it")
    return Dataset("X", rows, rows[:0], rows[:0], tuple(shape or rows.shape[1:]), means=means)


def _held_out(data: Dataset, fraction: float, seed: int) -> Dataset:
    """The data with a part of its rows, taken at random, for validation."""
    count = round(len(data.train) * fraction)
    if not 0 < count <= len(data.train) - 2:
        raise UserError(f"--validation-size {fraction} of {len(data.train)} rows is {count}; hold out others")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    return replace(data, train=data.train[order[count:]], validation=data.train[order[:count]])


def _check_values(model: Program, data: Dataset) -> None:
    """Refuse rows that the program does not score; running it draws latents."""
    with seeded(0):
        check_support(model, data)


def _seed(random_state: Any) -> int:
    return int(check_random_state(random_state).randint(2**31 - 1))


def _plain(value: Any) -> Any:
    """A number or sequence as Python's own, such as a grid made by NumPy holds."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _door() -> Iterator[None]:
    """Let mistakes leave as scikit-learn's users expect them, in the words of the estimator's parameters."""
    try:
        yield
    except UserError as error:
        raise ValueError(_translated(str(error))) from None
    except TrainingInterrupt as error:
        raise KeyboardInterrupt(str(error)) from None


def _translated(line: str) -> str:
    """A line about flags as one about parameters.

    >>> _translated("--latent is 0, but it must be at least 1")
    'n_components is 0, but it must be at least 1'
    """

    def parameter(flag: re.Match[str]) -> str:
        name = flag[1].replace("-", "_")
        return NAMES.get(name, name)

    return re.sub(r"--(\w[\w-]*)", parameter, line.replace(" or --binarize", "")).removeprefix("train ")
