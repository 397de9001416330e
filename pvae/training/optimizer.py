"""The optimizer: one fused Adam over everything that the datapoints share, and the rows' own steps."""

from __future__ import annotations

from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pvae.inference.guides import PerDatapoint


class FusedAdam(PyroOptim):
    """One fused Adam over all global parameters, in the shape that Pyro's ``SVI`` takes.

    Pyro's own optimizers keep a torch optimizer for each parameter. After the global step this one lets the rows of
    a `PerDatapoint` guide take theirs.

    Arguments:
        modules: whose parameters are trained.
        learning_rate: of Adam.

    Attributes:
        parameters: the global ones.
        tables: the guides whose rows take their own steps.
    """

    def __init__(self, *modules: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__(torch.optim.Adam, {"lr": learning_rate})
        self.tables = [m for module in modules for m in module.modules() if isinstance(m, PerDatapoint)]
        own = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        self.parameters = list(own.values())
        self.adam = torch.optim.Adam(self.parameters, lr=learning_rate, fused=True) if own else None

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.step_parameters()
        for table in self.tables:
            table.step_local_params()

    def step_parameters(self) -> None:
        """Adam's step on the parameters' gradients, which are then gone."""
        if self.adam:
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)

    def allow_capture(self) -> None:
        """Let a CUDA graph hold the step; steps that are not captured go on without a warning."""
        if self.adam:
            self.adam._warned_capturable_if_run_uncaptured = True
            for group in self.adam.param_groups:
                group["capturable"] = True

    def state_tensors(self, names: dict[int, str]) -> dict[str, Tensor]:
        """Adam's memory by parameter name; ``names`` maps id(parameter) to it."""
        state: dict[Any, Any] = self.adam.state if self.adam else {}
        return {f"{names[id(p)]}.{key}": value for p, entry in state.items() for key, value in entry.items()}

    def load_tensors(self, names: dict[int, str], tensors: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave."""
        if self.adam is None:
            return
        for group in self.adam.param_groups:
            for p in group["params"]:
                found = {k: tensors.get(f"{names[id(p)]}.{k}") for k in ("step", "exp_avg", "exp_avg_sq")}
                if any(value is not None for value in found.values()):
                    device = {
                        k: torch.device("cpu") if k == "step" and p.device.type == "cpu" else p.device for k in found
                    }
                    self.adam.state[p] = {k: v.clone().to(device[k]) for k, v in found.items() if v is not None}
