"""Optimizer: one fused Adam over all global parameters, and the local steps of per-datapoint rows."""

from __future__ import annotations

from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pvae.inference.guides import PerDatapoint


class FusedAdam(PyroOptim):
    """Fused Adam over all global parameters, as an optimizer for Pyro's ``SVI``.

    Pyro's own optimizers keep a torch optimizer for each parameter. After the global step this one updates the
    visited rows of `PerDatapoint` guides.

    Arguments:
        modules: modules whose parameters are trained.
        learning_rate: of Adam.

    Attributes:
        parameters: the global parameters.
        tables: the `PerDatapoint` guides among the modules.
    """

    def __init__(self, *modules: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__(torch.optim.Adam, {"lr": learning_rate})
        self.tables = [m for module in modules for m in module.modules() if isinstance(m, PerDatapoint)]
        unique = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        self.parameters = list(unique.values())
        self.adam = torch.optim.Adam(self.parameters, lr=learning_rate, fused=True) if unique else None

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.step_parameters()
        for table in self.tables:
            table.step_local_params()

    def row_tables(self) -> set[int]:
        """Return the ids of the buffers that have a row for each datapoint."""
        return {id(values) for table in self.tables for values in table.buffers(recurse=False)}

    def step_parameters(self) -> None:
        """Take Adam's step on the parameters' gradients and clear them."""
        if self.adam:
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)

    def allow_capture(self) -> None:
        """Allow a CUDA graph to capture the step; steps outside the graph raise no warning."""
        if self.adam:
            self.adam._warned_capturable_if_run_uncaptured = True
            for group in self.adam.param_groups:
                group["capturable"] = True

    def state_tensors(self, names: dict[int, str]) -> dict[str, Tensor]:
        """Return Adam's state by parameter name; ``names`` maps id(parameter) to it."""
        state: dict[Any, Any] = self.adam.state if self.adam else {}
        return {f"{names[id(p)]}.{key}": value for p, entry in state.items() for key, value in entry.items()}

    def load_tensors(self, names: dict[int, str], tensors: dict[str, Tensor]) -> None:
        """Load Adam's state as `state_tensors` returns it."""
        for p in self.parameters if self.adam else ():
            keys = {key: f"{names[id(p)]}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
            state = {key: tensors[name].clone().to(p.device) for key, name in keys.items() if name in tensors}
            if state and self.adam:
                self.adam.state[p] = state
