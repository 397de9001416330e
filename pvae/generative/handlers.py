"""generative.handlers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pvae.distributions.flows import Flow
from pvae.distributions.masked import MaskedDistribution, is_factorized, not_factorized_reason
from pvae.distributions.mixtures import DiagonalMixture
from pvae.distributions.noisy import Channel, NoiseConvolution
from pvae.distributions.supports import base_constraint
from pvae.errors import Incompatible, UserError
from pvae.runtime.pyro_params import Program


class MaskMissing(Messenger):
    r"""A block in which observed sites score the entries that are there: :math:`\log p(x_{obs}|z)` for log p(x|z).

    Arguments:
        mask: which entries are there, [B, *event] of the observed value; None for those that are not NaN.

    What stands in x where the mask is False matters neither to values nor to gradients. Rows repeated n times
    (B, then B again) take the mask repeated.

    Raises:
        Incompatible: entries are missing at an observed site that scores whole rows.
        UserError: the mask is not of truth values, or does not fit the observed site.

    >>> import pyro
    >>> x = torch.tensor([[1.0, torch.nan]])
    >>> with MaskMissing(), pyro.poutine.trace() as seen:
    ...     _ = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)
    >>> seen.trace.nodes["x"]["fn"].log_prob(x)
    tensor([-1.4189])
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        if mask is not None and mask.dtype != torch.bool:
            raise UserError(f"the mask holds {mask.dtype}; it must be bool, True where a value is there")
        self.mask = mask

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] or site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        mask = self._of(msg["name"], msg["value"])
        if is_factorized(msg["fn"]):  # whatever the mask holds: a recording can't look
            msg["fn"] = MaskedDistribution(msg["fn"], mask)
        elif not mask.all():
            raise Incompatible(
                f"entries of observed site '{msg['name']}' are missing, but {not_factorized_reason(msg['fn'])}"
            )

    def _of(self, name: str, value: Tensor) -> Tensor:
        """The mask of a site's value."""
        if self.mask is None:
            return ~value.isnan()
        times, left = divmod(len(value), max(1, len(self.mask))) if value.dim() else (0, 1)
        if left or value.shape[1:] != self.mask.shape[1:]:
            raise UserError(
                f"the mask is of shape {tuple(self.mask.shape)}, but observed site '{name}' has {tuple(value.shape)}"
            )
        return self.mask if times == 1 else self.mask.repeat(times, *(1,) * (value.dim() - 1))


def mask_missing(model: Program, mask: Tensor | None = None) -> Program:
    """The program under `MaskMissing`: the same latents and parameters, scored on the entries that are there.

    >>> program = mask_missing(lambda x: None, torch.ones(2, 3, dtype=torch.bool))
    >>> program(torch.zeros(2, 3))
    """
    MaskMissing(mask)  # refuses what is no mask, here and not at the first call
    return HandledProgram(model, partial(MaskMissing, mask))


class HandledProgram:
    """A program under a messenger, which still tells whose method it is, and so where its parameters are.

    Arguments:
        model: the program.
        block: makes the messenger of each run.
    """

    def __init__(self, model: Program, block: Callable[[], Messenger]) -> None:
        self.model, self.block = model, block
        self.__self__ = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.block():
            return self.model(*args, **kwargs)


class ObserveThroughNoise(Messenger):
    r"""A block in which observed sites are seen through noise: :math:`\log p(y|z)` for log p(x|z), where y is observed.

    Arguments:
        noise: p(y|x).
        name: of the site that is noisy; None for all that are observed.

    Raises:
        Incompatible: a site that scores whole rows, or whose values the noise does not take.

    >>> import pyro
    >>> from pvae.generative.noise import FlipNoise
    >>> with ObserveThroughNoise(FlipNoise(rate=0.5)), pyro.poutine.trace() as seen:
    ...     _ = pyro.sample("x", dist.Bernoulli(torch.tensor([0.9])).to_event(1), obs=torch.ones(1))
    >>> seen.trace.nodes["x"]["fn"].log_prob(torch.ones(1)).exp()
    tensor(0.5000)
    """

    def __init__(self, noise: Channel, name: str | None = None) -> None:
        super().__init__()
        self.noise, self.name = noise, name

    def _pyro_sample(self, msg: Any) -> None:
        aside = site_is_subsample(msg) or msg["infer"].get("_deterministic")
        if msg["is_observed"] and not aside and self.name in (None, msg["name"]):
            msg["fn"] = self._noisy(msg["name"], msg["fn"])

    def _noisy(self, name: str, fn: Any) -> Any:
        if isinstance(fn, MaskedDistribution):
            return MaskedDistribution(self._noisy(name, fn.fn), fn.observed)
        if not is_factorized(fn):
            raise Incompatible(f"noise on observed site '{name}': {not_factorized_reason(fn)}")
        takes, has = getattr(self.noise, "takes", constraints.real), base_constraint(fn.support)
        if takes is constraints.boolean and has is not constraints.boolean:
            raise Incompatible(
                f"{type(self.noise).__name__} takes binary values, but observed site '{name}' is "
                f"{type(getattr(fn, 'base_dist', fn)).__name__}, {has}; use GaussianNoise, or a binary likelihood"
            )
        return NoiseConvolution(fn, self.noise).to_event(fn.event_dim)


def with_noise(model: Program, noise: Channel, name: str | None = None) -> Program:
    """Run a program inside `ObserveThroughNoise`: the same latents and parameters, y observed in the place of x."""
    return HandledProgram(model, partial(ObserveThroughNoise, noise, name))


class TemperPrior(Messenger):
    """A block in which the noise behind each latent is multiplied by a temperature."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def _pyro_sample(self, msg: Any) -> None:
        if self.temperature == 1 or msg["is_observed"] or site_is_subsample(msg):
            return
        msg["fn"] = _temper_distribution(msg["name"], msg["fn"], max(self.temperature, 1e-6))


def _temper_distribution(name: str, fn: Any, t: float) -> Any:
    """The distribution with its noise multiplied by t."""
    if isinstance(fn, torch.distributions.Independent):
        return dist.Independent(_temper_distribution(name, fn.base_dist, t), fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.Normal | torch.distributions.Laplace):
        return type(fn)(fn.loc, fn.scale * t)
    if isinstance(fn, torch.distributions.StudentT):
        return dist.StudentT(fn.df, fn.loc, fn.scale * t)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(fn.loc, scale_tril=fn.scale_tril * t)
    if isinstance(fn, DiagonalMixture):
        return DiagonalMixture(fn.log_weights, fn.means, fn.scales * t, fn.batch_shape)
    if isinstance(fn, Flow):
        return Flow(fn.shift, fn.scale, fn.transform, temperature=t)
    raise Incompatible(f"latent '{name}' is {type(fn).__name__}, which has no scale for a temperature; draw it at 1")
