"""Networks: tensors to parameters, no probability. Each class takes (inputs, outputs) and its own options."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pvae.errors import UserError, nearest

__all__ = ["MLP"]

ACTIVATIONS = ("ReLU", "ELU", "GELU", "SiLU", "Softplus", "Tanh", "LeakyReLU")


class MLP(nn.Module):
    r"""Fully connected network, :math:`h_{l+1} = a(W_l h_l + b_l)`, linear at the end.

    Arguments:
        inputs: number of input values.
        outputs: number of output values.
        hidden: widths of the hidden layers, from the data's side to the latent's; a decoder gives them reversed.
        activation: name of a ``torch.nn`` activation.

    Shapes: [..., inputs] to [..., outputs].

    Raises:
        UserError: an unknown activation, or a width below 1.

    >>> import torch
    >>> MLP(64, 16, hidden=[32])(torch.zeros(5, 64)).shape
    torch.Size([5, 16])
    """

    def __init__(self, inputs: int, outputs: int, *, hidden: Sequence[int] = (400,), activation: str = "ReLU") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"MLP: unknown activation '{activation}'{nearest(activation, ACTIVATIONS)}")
        if any(width < 1 for width in hidden):
            raise UserError(f"MLP: hidden is {list(hidden)}, but every width must be at least 1")
        layers: list[nn.Module] = []
        for before, after in pairwise([inputs, *hidden]):
            layers += [nn.Linear(before, after), getattr(nn, activation)()]
        self.layers = nn.Sequential(*layers, nn.Linear([inputs, *hidden][-1], outputs))

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(values)
