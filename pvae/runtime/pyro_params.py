"""runtime.pyro_params."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pvae.errors import UserError


@contextmanager
def local_param_store() -> Iterator[None]:
    """Run a block of Pyro code with a parameter store of its own."""
    store = pyro.get_param_store()
    outside = store.get_state()["params"]
    with store.scope() as own:
        yield
    # A scope strips the mark by which SVI finds a parameter behind a param statement, from those outside as well.
    for parameter in (*own["params"].values(), *outside.values()):
        mark_as_parameter(parameter)


def mark_as_parameter(parameter: Tensor) -> Tensor:
    """Put on a tensor the mark by which ``SVI.step`` finds what to train behind a param statement."""
    parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    return parameter


class LocalModule(PyroModule):
    """A PyroModule whose parameters live on itself, never in the process-wide store that two models would share.

    Pyro keys that store by name, so that a second model in one process would silently train the first one's
    decoder. Each call here sees a store of its own. (Pyro's switch ``module_local_params`` does not go with ``SVI``.)
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with local_param_store():
            return super().__call__(*args, **kwargs)


def local_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """``pyro.nn.module.pyro_method`` for a `LocalModule`: the method may stand alone as a Pyro program."""

    @functools.wraps(method)
    def traced(self: LocalModule, *args: Any, **kwargs: Any) -> Any:
        with local_param_store(), self._pyro_context:
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


Program = Callable[..., Any]
