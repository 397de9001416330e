"""Noise: what an observation says of a row when noise came between, and programs of which only that is seen.

A noise model is a function of x that returns p(y|x), entry by entry; ``__all__`` has those that have a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, get_type_hints

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pvae.densities import Categorical
from pvae.errors import Refused, UserError, fits, nearest, positive
from pvae.missing import Present, Under, separable, whole
from pvae.sites import innermost
from pvae.weights import Program

__all__ = ["FlipNoise", "GaussianNoise"]

# From x [..., *event] to p(y|x) of the same batch shape: every entry on its own.
Channel = Callable[[Tensor], Any]


class Noise:
    """What every noise model states. Calling one with x gives p(y|x), each entry's own.

    A function will do as well. Where x has infinitely many values, E[y|x] must be x.

    Attributes:
        takes: the values that x may have.
    """

    takes: ClassVar[constraints.Constraint] = constraints.real

    def __call__(self, x: Tensor) -> dist.TorchDistribution:
        """p(y|x) with the batch shape of x."""
        raise NotImplementedError

    def added(self, x: Tensor) -> Tensor:
        """y drawn from p(y|x) for rows x [B, C]; what is missing stays so.

        Raises:
            UserError: a value that the noise does not take.
        """
        missing = x.isnan()
        outside = (~self.takes.check(x) & ~missing).nonzero().tolist()
        if outside:
            where = tuple(outside[0])
            raise UserError(
                f"row {where[0]}, column {', '.join(map(str, where[1:]))} is {x[where].item():g}, which "
                f"{type(self).__name__} does not take ({self.takes}); use another noise, or binarize the rows"
            )
        return self(torch.where(missing, 0, x)).sample().masked_fill(missing, torch.nan)


class GaussianNoise(Noise):
    r"""Added noise, :math:`y_d = x_d + s \epsilon_d` with standard normal epsilon.

    Arguments:
        scale: s, in the data's units.

    Raises:
        UserError: the scale is not positive.

    >>> GaussianNoise(scale=0.5)(torch.zeros(3)).stddev
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, *, scale: float = 0.5) -> None:
        positive("GaussianNoise", scale=scale)
        self.scale = scale

    def __call__(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Normal(x, x.new_tensor(self.scale))


class FlipNoise(Noise):
    """Binary values of which each is turned into the other with some probability.

    Arguments:
        rate: this probability.

    Raises:
        UserError: the rate is not between 0 and 1.

    >>> FlipNoise(rate=0.25)(torch.tensor([0.0, 1.0])).mean
    tensor([0.2500, 0.7500])
    """

    takes = constraints.boolean

    def __init__(self, *, rate: float = 0.1) -> None:
        if not 0 < rate < 1:
            raise UserError(f"FlipNoise: rate is {rate}, but it must be between 0 and 1")
        self.rate = rate

    def __call__(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(x + self.rate - 2 * self.rate * x)


def make_noise(component: Mapping[str, Any]) -> Noise:
    """A noise model from its word and its arguments, a table with ``type``.

    Raises:
        UserError: an unknown word or argument, or a value that the noise model refuses.

    >>> make_noise({"type": "FlipNoise", "rate": 0.2}).rate
    0.2
    """
    own = dict(component)
    word = str(own.pop("type", ""))
    if word not in __all__:
        raise UserError(f"unknown noise '{word}'{nearest(word, __all__)}")
    takes = {name: hint for name, hint in get_type_hints(globals()[word].__init__).items() if name != "return"}
    for name, value in own.items():
        if name not in takes:
            raise UserError(f"noise {word} takes no argument '{name}'{nearest(name, takes)}")
        if not fits(value, takes[name]):
            raise UserError(f"noise {word}: {name} is {value!r}, but it takes a number")
    noise: Noise = globals()[word](**own)
    return noise


class Moments(NamedTuple):
    """Mean and variance of each entry."""

    mean: Tensor
    variance: Tensor


class Noisy(dist.TorchDistribution):
    r"""p(y|z) of each entry of a row that is seen through noise, :math:`\int p(y_d|x_d)\, p(x_d|z)\, dx_d`.

    Exact where x has finitely many values, which are summed over, and for Gaussian x and noise. Elsewhere p(y|z) is
    taken for a Gaussian of the same mean and variance, and x for jointly Gaussian with y, so that E[x|y, z] is the
    best linear estimate.

    Arguments:
        clean: p(x|z) with event shape [*event], whose entries are independent.
        noise: p(y|x).

    >>> p = Noisy(dist.Normal(torch.zeros(2), 1.0).to_event(1), GaussianNoise(scale=1.0))
    >>> p.clean_moments(torch.tensor([0.0, 3.0])).mean
    tensor([0.0000, 1.5000])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, clean: Any, noise: Channel) -> None:
        self.clean, self.noise = clean, noise
        super().__init__(clean.batch_shape + clean.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.noise(torch.zeros(())).support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Noisy:
        return Noisy(self.clean.expand(torch.Size(batch_shape)[: -self.clean.event_dim]), self.noise)

    def log_prob(self, value: Tensor) -> Tensor:
        if levels(self.clean):
            return self._joint(value)[1].logsumexp(0)
        mean, variance = moments(self.clean)
        return dist.Normal(mean, (variance + self.noise(mean).variance).sqrt()).log_prob(value)

    def clean_moments(self, value: Tensor) -> Moments:
        """Mean and variance of p(x|y, z) at y, [..., *event]."""
        if levels(self.clean):
            x, joint = self._joint(value)
            return _weighed(x, joint.softmax(0))
        mean, variance = moments(self.clean)
        other = self.noise(mean).variance
        share = variance / (variance + other)
        return Moments(bounded(self.clean, mean + share * (value - mean)), share * other)

    def _joint(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The values of x, [L, 1, ...], and log p(x, y|z) at each, [L, ..., *event]."""
        x, log_p = _enumerated(self.clean, value.dim())
        return x, log_p + self.noise(x).log_prob(value)


def levels(fn: Any) -> int:
    """How many values an entry of x has, from 0 on; 0 where there are infinitely many."""
    support = innermost(fn.support)
    if support is constraints.boolean:
        return 2
    return support.upper_bound + 1 if isinstance(support, constraints.integer_interval) else 0


def bounded(fn: Any, values: Tensor) -> Tensor:
    """Values [..., *event] no lower and no higher than p(x|z) has them."""
    support = innermost(fn.support)
    if support is constraints.boolean:
        return values.clamp(0, 1)
    for name, within in (("lower_bound", torch.maximum), ("upper_bound", torch.minimum)):
        if (bound := getattr(support, name, None)) is not None:
            values = within(values, torch.as_tensor(bound).to(values))
    return values


def _enumerated(fn: Any, dims: int = 0) -> tuple[Tensor, Tensor]:
    """The values of x, [L, 1, ...], and log p(x|z) of each entry, [L, ..., *event], of so many dimensions after L."""
    if isinstance(fn, Categorical):
        log_p = fn.logits.movedim(-2, 0)
        x = torch.arange(len(log_p), dtype=log_p.dtype, device=log_p.device).view(-1, *(1,) * (log_p.dim() - 1))
    else:
        like = fn.mean
        x = torch.arange(levels(fn), dtype=like.dtype, device=like.device).view(-1, *(1,) * like.dim())
        log_p = fn.base_dist.log_prob(x)
    more = (1,) * (dims + 1 - log_p.dim())
    return x.view(len(x), *more, *x.shape[1:]), log_p.view(len(x), *more, *log_p.shape[1:])


def moments(fn: Any) -> Moments:
    """Mean and variance of each entry of p(x|z), [..., *event]."""
    if levels(fn):
        x, log_p = _enumerated(fn)
        return _weighed(x, log_p.exp())
    return Moments(fn.mean, fn.variance)


def _weighed(x: Tensor, weights: Tensor) -> Moments:
    mean = (weights * x).sum(0)
    return Moments(mean, (weights * (x - mean) ** 2).sum(0))


class Through(Messenger):
    r"""A block in which observed sites are seen through noise: :math:`\log p(y|z)` for log p(x|z), where y is observed.

    Arguments:
        noise: p(y|x).
        name: of the site that is noisy; None for all that are observed.

    Raises:
        Refused: a site that scores whole rows, or whose values the noise does not take.

    >>> import pyro
    >>> with Through(FlipNoise(rate=0.5)), pyro.poutine.trace() as seen:
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
        if isinstance(fn, Present):
            return Present(self._noisy(name, fn.fn), fn.there)
        if not separable(fn):
            raise Refused(f"noise on observed site '{name}': {whole(fn)}")
        takes, has = getattr(self.noise, "takes", constraints.real), innermost(fn.support)
        if takes is constraints.boolean and has is not constraints.boolean:
            raise Refused(
                f"{type(self.noise).__name__} takes binary values, but observed site '{name}' is "
                f"{type(getattr(fn, 'base_dist', fn)).__name__}, {has}; use GaussianNoise, or a binary likelihood"
            )
        return Noisy(fn, self.noise).to_event(fn.event_dim)


def noisy(model: Program, noise: Channel, name: str | None = None) -> Program:
    """The program under :class:`Through`: the same latents and parameters, and y observed in the place of x."""
    return Under(model, partial(Through, noise, name))
