"""What PyTorch and Pyro keep for the whole process, made local: random streams, devices, parameters, validation."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pvae.errors import UserError, nearest

__all__ = ["LocalModule", "local_method", "mark", "module_of", "pick_device", "seeded", "unchecked"]

DEVICES = ("auto", "cpu", "cuda")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block on its own random stream; the stream outside goes on as if the block had not been.

    >>> _ = torch.manual_seed(0); a = torch.rand(1)
    >>> _ = torch.manual_seed(0)
    >>> with seeded(7): _ = torch.rand(100)
    >>> bool(a == torch.rand(1))
    True
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def unchecked() -> Iterator[None]:
    """Run a block without Pyro's and PyTorch's argument checks: data are checked once, at the door."""
    with pyro.validation_enabled(False):
        yield


def pick_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` names here; ``auto`` is CUDA where there is CUDA.

    Raises:
        UserError: the name is unknown, or CUDA is asked for where there is none.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name.split(":")[0] not in DEVICES:
        raise UserError(f"unknown device '{name}'{nearest(name, DEVICES)}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device on this machine; use --device auto or cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


@contextmanager
def own_parameters() -> Iterator[None]:
    """Run a block of Pyro code with a parameter store of its own."""
    store = pyro.get_param_store()
    outside = store.get_state()["params"]
    with store.scope() as own:
        yield
    # A scope strips the mark by which SVI finds a parameter behind a param statement, from those outside as well.
    for parameter in (*own["params"].values(), *outside.values()):
        mark(parameter)


def mark(parameter: Tensor) -> Tensor:
    """Put on a tensor the mark by which ``SVI.step`` finds what to train behind a param statement."""
    parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    return parameter


class LocalModule(PyroModule):
    """A PyroModule whose parameters live on itself, never in the process-wide store that two models would share.

    Pyro keys that store by name, so that a second model in one process would silently train the first one's
    decoder. Each call here sees a store of its own. (Pyro's switch ``module_local_params`` does not go with ``SVI``.)
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with own_parameters():
            return super().__call__(*args, **kwargs)


def local_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """``pyro.nn.module.pyro_method`` for a :class:`LocalModule`: the method may stand alone as a Pyro program."""

    @functools.wraps(method)
    def traced(self: LocalModule, *args: Any, **kwargs: Any) -> Any:
        with own_parameters(), self._pyro_context:
            return method(self, *args, **kwargs)

    return traced


def module_of(program: Callable[..., Any]) -> nn.Module:
    """The module that holds a Pyro program's parameters: the program itself, or what it is a method of.

    Raises:
        UserError: the program is neither, so that its parameters can't be found.
    """
    owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    if not isinstance(owner, nn.Module):
        raise UserError(f"{program!r} is not a module nor a module's method: its parameters can't be found")
    return owner
