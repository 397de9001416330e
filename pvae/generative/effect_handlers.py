"""Effect handlers that change a program's sites: masked and noisy observations, tempered priors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pvae.distributions.flows import Flow
from pvae.distributions.masked_likelihood import MaskedDistribution, is_factorized, not_factorized_reason
from pvae.distributions.mixtures import DiagonalMixture
from pvae.distributions.noise_convolution import Channel, NoiseConvolution
from pvae.distributions.supports import base_constraint
from pvae.errors import Incompatible, UserError
from pvae.runtime.pyro_params import Program


class MaskMissing(Messenger):
    r"""Effect handler that scores observed entries alone: :math:`\log p(x_{obs}|z)` in place of log p(x|z).

    Arguments:
        mask: True for observed entries, [B, *event] of the observed value; None: those that are not NaN.

    Values of x where the mask is False matter neither to densities nor to gradients. If rows are repeated n times (B,
    then B again), so is the mask.

    Raises:
        Incompatible: entries are missing at an observed site that scores whole rows.
        UserError: the mask is not boolean, or does not fit the observed site.

    >>> import pyro
    >>> x = torch.tensor([[1.0, torch.nan]])
    >>> with MaskMissing(), pyro.poutine.trace() as tracer:
    ...     _ = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)
    >>> tracer.trace.nodes["x"]["fn"].log_prob(x)
    tensor([-1.4189])
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        if mask is not None and mask.dtype != torch.bool:
            raise UserError(f"the mask holds {mask.dtype}; it must be bool, True where a value is observed")
        self.mask = mask

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_data_site(msg):
            return
        observed = self._mask_of(msg["name"], msg["value"])
        if is_factorized(msg["fn"]):  # whatever the mask holds: a traced step must not depend on its values
            msg["fn"] = MaskedDistribution(msg["fn"], observed)
        elif not observed.all():
            reason = not_factorized_reason(msg["fn"])
            raise Incompatible(f"entries of observed site '{msg['name']}' are missing, but {reason}")

    def _mask_of(self, name: str, value: Tensor) -> Tensor:
        if self.mask is None:
            return ~value.isnan()
        times, left = divmod(len(value), max(1, len(self.mask))) if value.dim() else (0, 1)
        if left or value.shape[1:] != self.mask.shape[1:]:
            shapes = tuple(self.mask.shape), tuple(value.shape)
            raise UserError(f"the mask is of shape {shapes[0]}, but observed site '{name}' has {shapes[1]}")
        return self.mask if times == 1 else self.mask.repeat(times, *(1,) * (value.dim() - 1))


def _is_data_site(msg: Any) -> bool:
    return msg["is_observed"] and not site_is_subsample(msg) and not msg["infer"].get("_deterministic")


def mask_missing(model: Program, mask: Tensor | None = None) -> Program:
    """Run a program inside `MaskMissing`: the same latents and parameters, scored on the observed entries.

    >>> program = mask_missing(lambda x: None, torch.ones(2, 3, dtype=torch.bool))
    >>> program(torch.zeros(2, 3))
    """
    MaskMissing(mask)  # refuses a wrong mask here, not at the first call
    return HandledProgram(model, partial(MaskMissing, mask))


class HandledProgram:
    """Program inside an effect handler made for each run; `module_of` finds the parameters by ``__self__``."""

    def __init__(self, model: Program, handler: Callable[[], Messenger]) -> None:
        self.model, self.handler = model, handler
        self.__self__ = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.handler():
            return self.model(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A method goes by its class: a module that has this program in the method's place would give this program.
        method = isinstance(self.model, MethodType)
        return vars(self) | {"model": self.model.__name__ if method else self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self.model, str):
            self.model = MethodType(getattr(type(self.__self__), self.model), self.__self__)


class ObserveThroughNoise(Messenger):
    r"""Effect handler that observes sites through noise: :math:`\log p(y|z)` in place of log p(x|z), y observed.

    Arguments:
        noise: p(y|x).
        name: of the site that is noisy; None for all that are observed.

    Raises:
        Incompatible: a site that scores whole rows, or whose values are outside the noise's support.

    >>> import pvae, pyro
    >>> with ObserveThroughNoise(pvae.noise.FlipNoise(rate=0.5)), pyro.poutine.trace() as tracer:
    ...     _ = pyro.sample("x", dist.Bernoulli(torch.tensor([0.9])).to_event(1), obs=torch.ones(1))
    >>> tracer.trace.nodes["x"]["fn"].log_prob(torch.ones(1)).exp()
    tensor(0.5000)
    """

    def __init__(self, noise: Channel, name: str | None = None) -> None:
        super().__init__()
        self.noise, self.name = noise, name

    def _pyro_sample(self, msg: Any) -> None:
        if _is_data_site(msg) and self.name in (None, msg["name"]):
            msg["fn"] = self._convolve(msg["name"], msg["fn"])

    def _convolve(self, name: str, fn: Any) -> Any:
        if isinstance(fn, MaskedDistribution):
            return MaskedDistribution(self._convolve(name, fn.fn), fn.observed)
        if not is_factorized(fn):
            raise Incompatible(f"noise on observed site '{name}': {not_factorized_reason(fn)}")
        support, values = getattr(self.noise, "support", constraints.real), base_constraint(fn.support)
        if support is constraints.boolean and values is not constraints.boolean:
            raise Incompatible(
                f"{type(self.noise).__name__} takes binary values, but observed site '{name}' is "
                f"{type(getattr(fn, 'base_dist', fn)).__name__}, {values}; use GaussianNoise, or a binary likelihood"
            )
        return NoiseConvolution(fn, self.noise).to_event(fn.event_dim)


def with_noise(model: Program, noise: Channel, name: str | None = None) -> Program:
    """Run a program inside `ObserveThroughNoise`: the same latents and parameters, y observed in place of x."""
    return HandledProgram(model, partial(ObserveThroughNoise, noise, name))


class TemperPrior(Messenger):
    """Effect handler that multiplies the noise behind each latent by a temperature."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def _pyro_sample(self, msg: Any) -> None:
        if self.temperature != 1 and not msg["is_observed"] and not site_is_subsample(msg):
            msg["fn"] = _temper_distribution(msg["name"], msg["fn"], max(self.temperature, 1e-6))


def _temper_distribution(name: str, fn: Any, t: float) -> Any:
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
