"""Noise models p(y|x): functions of x that return the distribution of y, entry by entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_type_hints

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.errors import UserError, check_range, fits, nearest, refuse_first

__all__ = ["FlipNoise", "GaussianNoise"]


class Noise:
    """Base class of noise models. Calling one with x returns p(y|x), independent by entry; ``support`` is that of x.

    A function will do as well. If x has infinitely many values, E[y|x] must be x.
    """

    support: ClassVar[constraints.Constraint] = constraints.real

    def __call__(self, x: Tensor) -> dist.TorchDistribution:
        """Return p(y|x) with the batch shape of x."""
        raise NotImplementedError

    def add_to(self, x: Tensor) -> Tensor:
        """Draw y from p(y|x) for rows x [B, C]; missing values (NaN) stay missing."""
        missing, who = x.isnan(), type(self).__name__
        message = f", which {who} does not take ({self.support}); use another noise, or binarize the rows"
        refuse_first(~self.support.check(x) & ~missing, x, message)
        return self(torch.where(missing, 0, x)).sample().masked_fill(missing, torch.nan)


class GaussianNoise(Noise):
    r"""Additive Gaussian noise, :math:`y_d = x_d + s \epsilon_d` with standard normal epsilon.

    Arguments:
        scale: s, in the data's units.

    Raises:
        UserError: the scale is not positive.

    >>> GaussianNoise(scale=0.5)(torch.zeros(3)).stddev
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, *, scale: float = 0.5) -> None:
        check_range("GaussianNoise", scale=scale)
        self.scale = scale

    def __call__(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Normal(x, x.new_tensor(self.scale))


class FlipNoise(Noise):
    """Bit-flip noise on binary values (binary symmetric channel).

    Arguments:
        rate: the probability that a value is flipped.

    Raises:
        UserError: the rate is not between 0 and 1.

    >>> FlipNoise(rate=0.25)(torch.tensor([0.0, 1.0])).mean
    tensor([0.2500, 0.7500])
    """

    support = constraints.boolean

    def __init__(self, *, rate: float = 0.1) -> None:
        if not 0 < rate < 1:
            raise UserError(f"FlipNoise: rate is {rate}, but it must be between 0 and 1")
        self.rate = rate

    def __call__(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(x + self.rate - 2 * self.rate * x)


def make_noise(component: Mapping[str, Any]) -> Noise:
    """Return a noise model from a table of its class (``type``) and arguments.

    >>> make_noise({"type": "FlipNoise", "rate": 0.2}).rate
    0.2
    """
    arguments = dict(component)
    word = str(arguments.pop("type", ""))
    if word not in __all__:
        raise UserError(f"unknown noise '{word}'{nearest(word, __all__)}")
    hints = get_type_hints(globals()[word].__init__)
    del hints["return"]
    for name, value in arguments.items():
        if name not in hints:
            raise UserError(f"noise {word} takes no argument '{name}'{nearest(name, hints)}")
        if not fits(value, hints[name]):
            raise UserError(f"noise {word}: {name} is {value!r}, but it takes a number")
    return globals()[word](**arguments)
