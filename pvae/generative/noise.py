"""Noise: what an observation says of a row when noise came between, and programs of which only that is seen.

A noise model is a function of x that returns p(y|x), entry by entry; ``__all__`` has those that have a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_type_hints

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.errors import UserError, check_range, fits, nearest

__all__ = ["FlipNoise", "GaussianNoise"]


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
        check_range("GaussianNoise", scale=scale)
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
