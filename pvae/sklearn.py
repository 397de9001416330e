"""Scikit-learn's interface: a variational autoencoder as a transformer and density of tables."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from pvae.errors import Incompatible, UserError, check_range, param, params_rendered_by
from pvae.inference.batching import RowBatch, map_batches
from pvae.inference.posterior import importance_draws, posterior_moments
from pvae.recipes import registry
from pvae.recipes.build import build_model, fit_recipe
from pvae.recipes.recipe import Recipe, check_value, resolve
from pvae.runtime.pyro_params import Program
from pvae.runtime.signals import TrainingInterrupt
from pvae.runtime.torch_state import seeded
from pvae.training.support_check import check_support

__all__ = ["VAE"]

# The estimator's names of a recipe's parameters, if they are others.
NAMES = {
    **{"guide": "inference", "latent": "n_components", "epochs": "max_iter"},
    **{"patience": "n_iter_no_change", "validation_size": "validation_fraction"},
}
# Parameters of a recipe that the estimator has, by the recipe's names.
SHARED = (
    *("likelihood", "prior", "family", "network", "guide", "objective", "latent", "epochs", "batch_size"),
    *("learning_rate", "patience", "engine", "missing"),
)


class VAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    r"""Variational autoencoder of rows x [N, M]: :math:`z \sim p(z)`, :math:`x \sim p(x | \eta(z))`, :math:`q(z|x)`.

    Components are named as in recipes, ``"GaussianMixture(components=5)"``; ``pvae list`` names them. A fitted
    estimator can be pickled and copied; it keeps no rows.

    Arguments:
        n_components: D, the number of latent dimensions.
        likelihood, prior: p(x|z), p(z). The Gaussian has one scale for all columns: put a ``StandardScaler`` before it.
        family, objective: variational family of q(z|x), and the bound that is trained.
        network, hidden: of decoder and encoder, and its widths unless ``network`` states them.
        shape: of a row that is a picture, H, W or H, W, C, for ``Conv``.
        inference: inference method. Only under ``Amortized`` a row's results don't depend on the other rows;
            ``PerDatapoint`` maximizes the ELBO of each new row.
        max_iter, batch_size, learning_rate, engine, device: epochs and other options of `fit`.
        n_iter_no_change: stop after so many epochs without a better ELBO of held-out rows, and go back to the best;
            None trains to the end.
        validation_fraction: share of the rows held out for that.
        missing: NaN marks missing entries; observed entries are scored.
        n_draws: K of `score_samples`.
        random_state, verbose: of initial parameters, batches and draws; show a progress bar.

    Attributes:
        model_, guide_: program and guide, on the CPU and in double precision, in which a row's results don't depend
            on the size of its batch; ``model_.model`` and ``guide_`` go into all functions of pvae.
        recipe_: the `Recipe`, with all defaults filled in.
        history_, n_iter_: a row for each epoch, see `Fit`, and their number.
        n_features_in_, feature_names_in_: columns, and their names where X has any.

    Raises:
        ValueError: a parameter or a value of X that is refused, in one line.

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
        self.n_components, self.likelihood, self.prior, self.family = n_components, likelihood, prior, family
        self.network, self.hidden, self.shape, self.inference = network, hidden, shape, inference
        self.objective, self.max_iter, self.batch_size = objective, max_iter, batch_size
        self.learning_rate, self.n_iter_no_change = learning_rate, n_iter_no_change
        self.validation_fraction, self.missing, self.n_draws = validation_fraction, missing, n_draws
        self.device, self.engine, self.random_state, self.verbose = device, engine, random_state, verbose

    def fit(self, X: Any, y: Any = None) -> VAE:
        """Fit decoder and encoder to the rows X [N, M]; y is ignored."""
        X = self._validate(X, ensure_min_samples=2)
        with _errors_for_sklearn():
            recipe, rows = self._recipe(_seed(self.random_state)), _as_dataset(X, self.shape, self.missing)
            data = rows if recipe.patience is None else _hold_out(rows, self.validation_fraction, recipe.seed)
            untrained = build_model(recipe, data)
            _check_support(untrained.model, rows)
            fitted = fit_recipe(untrained, data, device=self.device, progress=bool(self.verbose), check_data=False)
        self.model_, self.guide_, self.recipe_ = fitted.program.cpu().double(), fitted.guide.cpu().double(), recipe
        self.history_, self.n_iter_ = fitted.fit.history, len(fitted.fit.history)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Compute the codes of rows X [N, M]: means of q(z|x), [N, D], by draws for a family that states none."""
        return self._map_rows(X, lambda rows, q_params: posterior_moments(self.guide_.family, q_params)[0])

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Decode codes [N, D] to rows: the mean of p(x|z), [N, M]."""
        check_is_fitted(self)
        codes = torch.tensor(check_array(X, dtype=np.float64))
        with _errors_for_sklearn():
            given = codes.new_zeros(len(codes), self.n_features_in_)
            return coding.decode(self.model_.model, self.guide_, codes, given).numpy()

    def score_samples(self, X: Any) -> np.ndarray:
        r"""Compute each row's log evidence (IWAE-K) in nats, :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k|x)`, [N].

        A row's noise depends on its values and the estimator's seed alone. In expectation this is a lower bound of
        log p(x), which K = ``n_draws`` tightens. Nats of densities and of probabilities can't be compared.
        """
        check_is_fitted(self)
        with _errors_for_sklearn():
            if self.guide_.family.point_mass:
                problem = "family Delta has no density, so that there is no evidence"
                raise Incompatible(problem, f"use another {param('family')}")
            check_range("VAE", n_draws=self.n_draws)

        def evidence(rows: RowBatch, q_params: Tensor) -> Tensor:
            # A row's values seed its draws, so that they don't depend on other rows; + 0.0 makes 0 of -0.
            digests = [hashlib.sha256((x + 0.0).tobytes()).digest() for x in rows.x.numpy()]
            seeds = [self.recipe_.seed + int.from_bytes(digest[:7]) for digest in digests]
            draws = importance_draws(self.model_.model, self.guide_, q_params, rows.x, K=self.n_draws, seeds=seeds)
            return draws.log_evidence

        return self._map_rows(X, evidence)

    def score(self, X: Any, y: Any = None) -> float:
        """Compute the mean of `score_samples`: nats per row, higher is better."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draw new rows [n_samples, M] from p(z) and p(x|z); ``random_state`` is the estimator's unless given."""
        check_is_fitted(self)
        seed = _seed(self.random_state if random_state is None else random_state)
        with _errors_for_sklearn():
            check_range("sample", n_samples=n_samples)
            like = torch.zeros(n_samples, self.n_features_in_)
            return coding.sample(self.model_.model, like, draw=True, seed=seed).numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = bool(self.missing)
        return tags

    @property
    def _n_features_out(self) -> int:
        return self.guide_.family.dim

    def _validate(self, X: Any, **options: Any) -> np.ndarray:
        finite = "allow-nan" if self.missing else True
        return validate_data(self, X, dtype=np.float64, order="C", ensure_all_finite=finite, **options)

    def _recipe(self, seed: int) -> Recipe:
        """Return the parameters as a resolved recipe."""
        keys = {key: _plain(getattr(self, NAMES.get(key, key))) for key in SHARED}
        for key, value in keys.items():
            check_value(key, value)
        network = registry.as_table(keys["network"])
        if registry.accepts_argument("network", network, "hidden"):
            network.setdefault("hidden", _plain(self.hidden))
        return resolve(Recipe(data="X", seed=seed, **(keys | {"network": network})))

    def _map_rows(self, X: Any, compute: Callable[[RowBatch, Tensor], Tensor]) -> np.ndarray:
        """Map batches of the rows of X and their variational parameters [B, P] to an array."""
        check_is_fitted(self)
        x, model = torch.tensor(self._validate(X, reset=False)), self.model_.model

        def compute_batch(rows: RowBatch) -> dict[str, Tensor]:
            return {"result": compute(rows, self.guide_.params(rows.x).detach())}

        with _errors_for_sklearn():
            _check_support(model, Dataset("X", x, x[:0], x[:0], x.shape[1:]))
            return map_batches(model, self.guide_, compute_batch, x, seed=self.recipe_.seed)["result"].numpy()


def _as_dataset(X: np.ndarray, shape: Sequence[int] | None, missing: bool) -> Dataset:
    rows = torch.tensor(check_values("X", X, "none", 1, missing=missing), dtype=torch.get_default_dtype())
    if shape is not None and math.prod(shape) != rows.shape[1]:
        raise UserError(f"shape {tuple(shape)} holds {math.prod(shape)} values, but X has {rows.shape[1]} columns")
    means = rows.nanmean(0) if missing else None
    if means is not None and means.isnan().any():
        raise UserError(f"X: column {int(means.isnan().nonzero()[0])} has no value in any row; drop it")
    return Dataset("X", rows, rows[:0], rows[:0], tuple(shape or rows.shape[1:]), means=means)


def _hold_out(data: Dataset, fraction: float, seed: int) -> Dataset:
    rows, count = torch.as_tensor(data.train), round(len(data.train) * fraction)
    if not 0 < count <= len(rows) - 2:
        size = param("validation_size", fraction)
        raise UserError(f"{size} of {len(rows)} rows is {count}; hold out at least 1, and leave 2")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return replace(data, train=rows[order[count:]], validation=rows[order[:count]])


def _check_support(model: Program, data: Dataset) -> None:
    with seeded(0):  # it draws latents
        check_support(model, data, remedies=("likelihood",))


def _seed(random_state: Any) -> int:
    return int(check_random_state(random_state).randint(2**31 - 1))


def _plain(value: Any) -> Any:
    """Return a number or sequence of NumPy as Python's own."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _errors_for_sklearn() -> Iterator[None]:
    """Raise users' mistakes as scikit-learn does, in the estimator's names of parameters."""
    try:
        with params_rendered_by(lambda name, value: NAMES.get(name, name) + ("" if value is None else f"={value}")):
            yield
    except UserError as error:
        raise ValueError(str(error)) from None
    except TrainingInterrupt as error:
        raise KeyboardInterrupt(str(error)) from None
