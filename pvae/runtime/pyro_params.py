"""Parameters of Pyro programs kept on their modules, out of Pyro's global parameter store."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.nn.module import pyro_method
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.errors import UserError

Program = Callable[..., Any]  # a Pyro model or guide


@contextmanager
def local_param_store() -> Iterator[None]:
    """Run a block of Pyro code with a parameter store of its own, as a `LocalModule` does at each call."""
    store = pyro.get_param_store()
    outside = store.get_state()["params"]
    with store.scope() as inside:
        yield
    # A scope strips the mark by which SVI finds a parameter behind a param statement, from those outside as well.
    for parameter in (*inside["params"].values(), *outside.values()):
        mark_as_parameter(parameter)


class _ParameterRef(weakref.ref[Tensor]):
    """Weak reference that pickles, as one to nothing: the next param statement sets the parameter's mark anew."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _ParameterRef, (set(),)


def mark_as_parameter(parameter: Tensor) -> Tensor:
    """Mark a tensor as the unconstrained parameter by which ``SVI.step`` finds what to train."""
    parameter.unconstrained = _ParameterRef(parameter)  # type: ignore[attr-defined]
    return parameter


def declare_param(name: str, parameter: Tensor) -> Tensor:
    """Let the handlers around, such as the trace of ``SVI.step``, see a tensor as the value of a param statement."""
    mark_as_parameter(parameter)
    statement = effectful(type="param")(lambda *_, **__: parameter)
    return statement(name, parameter, constraint=constraints.real, name=name)


class LocalModule(PyroModule):
    """PyroModule whose parameters live on itself, never in the process-wide store that two models would share.

    Pyro keys that store by name, so that a second model in one process would silently train the first one's
    decoder. Each call sees a store of its own. (Pyro's switch ``module_local_params`` does not work with ``SVI``.)
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with local_param_store():
            return super().__call__(*args, **kwargs)


def local_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of a `LocalModule` be a Pyro program of its own, as ``pyro.nn.module.pyro_method`` does."""
    return local_param_store()(pyro_method(method))


def module_of(program: Callable[..., Any]) -> nn.Module:
    """Return the module that holds a Pyro program's parameters: the program itself, or the object it is a method of."""
    owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    if not isinstance(owner, nn.Module):
        raise UserError(f"{program!r} is not a module nor a module's method: its parameters can't be found")
    if program is owner and type(owner).forward is nn.Module.forward:
        raise UserError(f"{type(owner).__name__} is no Pyro program itself", "give its method, as vae.model")
    return owner
