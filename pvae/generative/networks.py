"""Networks of encoders and decoders, pairs of one class and the same options, which a decoder (``decodes``) mirrors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pvae.errors import UserError, check_range, nearest

__all__ = ["MLP", "ResidualMLP", "Conv"]

ACTIVATIONS = ("ReLU", "ELU", "GELU", "SiLU", "Softplus", "Tanh", "LeakyReLU", "GLU")

HALVING: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}  # a size n becomes n / 2, rounded up


class MLP(nn.Module):
    r"""Fully connected network, :math:`h_{l+1} = a(W_l h_l + b_l)`, linear at the end.

    Arguments:
        hidden: widths of the hidden layers, from the data's side to the latent's.
        activation: of ``torch.nn``; GLU makes gated layers, :math:`h_{l+1} = (W_l h_l + b_l) \sigma(V_l h_l + c_l)`.
        decodes: make the decoder, with the hidden layers in reversed order.

    Shapes: [..., inputs] to [..., outputs].

    Raises:
        UserError: an unknown activation, or a width below 1.

    Source of the gated layers: Tomczak and Welling (2018), *VAE with a VampPrior*, arXiv:1705.07120.

    >>> MLP(64, 16, hidden=[32])(torch.zeros(5, 64)).shape
    torch.Size([5, 16])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        decodes: bool = False,
    ) -> None:
        super().__init__()
        _check("MLP", activation, hidden=hidden)
        widths = [inputs, *(hidden[::-1] if decodes else hidden)]
        self.layers = nn.Sequential(*_chain(nn.Linear, widths, activation), nn.Linear(widths[-1], outputs))

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(values)


class ResidualMLP(nn.Module):
    r"""Fully connected network of residual blocks, :math:`h_{l+1} = h_l + V_l\, a(W_l\, \mathrm{norm}(h_l))`.

    Arguments:
        width: of every hidden layer.
        blocks: number of residual blocks.
        activation: as in `MLP`.
        decodes: make the decoder, which is built like the encoder.

    A linear layer comes before the blocks, a norm and a linear layer after them. Each block starts as the identity.

    Shapes: [..., inputs] to [..., outputs].

    Raises:
        UserError: an unknown activation, a width below 2 (a norm makes one value a constant), or no block.

    Source: He, Zhang, Ren, Sun (2016), *Identity Mappings in Deep Residual Networks*, arXiv:1603.05027.

    >>> ResidualMLP(64, 16, width=32)(torch.zeros(5, 64)).shape
    torch.Size([5, 16])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 256,
        blocks: int = 2,
        activation: str = "GELU",
        decodes: bool = False,
    ) -> None:
        super().__init__()
        _check("ResidualMLP", activation, blocks=blocks)
        check_range("ResidualMLP", least=2, width=width)
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(_block(width, activation) for _ in range(blocks))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, values: Tensor) -> Tensor:
        values = self.first(values)
        for block in self.blocks:
            values = values + block(values)
        return self.last(values)


class Conv(nn.Module):
    r"""Convolutional network for images, :math:`h_{l+1} = a(W_l * h_l + b_l)` at half the size each, then dense.

    Arguments:
        shape: (H, W) or (H, W, C) of the image that a row of data is, channels last; any size from 1 on.
        channels: of the convolutions, from the data's side to the latent's; each halves H and W, rounding up.
        hidden: widths of the dense layers between the convolutions and the latent, from the data's side on.
        activation: as in `MLP`.
        labels: columns after the image, such as a label, that join at the dense layers of an encoder.
        decodes: make the decoder, with transposed convolutions from the latent back to outputs [P, H, W, C], P
            parameters of each value.

    Shapes: [..., inputs] to [..., outputs].

    Raises:
        UserError: an unknown activation, an option below 1, or a shape that does not fit the row.

    Source: Radford, Metz, Chintala (2016), *Deep Convolutional Generative Adversarial Networks*, arXiv:1511.06434;
    initial weights: He, Zhang, Ren, Sun (2015), *Delving Deep into Rectifiers*, arXiv:1502.01852.

    >>> Conv(64, 16, shape=(8, 8))(torch.zeros(5, 64)).shape
    torch.Size([5, 16])
    >>> Conv(8, 2 * 64, shape=(8, 8), decodes=True)(torch.zeros(5, 8)).shape
    torch.Size([5, 128])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (256,),
        activation: str = "ReLU",
        labels: int = 0,
        decodes: bool = False,
    ) -> None:
        super().__init__()
        _check("Conv", activation, shape=shape, channels=channels, hidden=hidden)
        _check_image(shape, channels, outputs if decodes else inputs - labels, decodes)
        self.shape, self.outputs, self.decodes = (*shape, 1)[:3], outputs, decodes
        sizes = [tuple(-(-n // 2**level) for n in shape[:2]) for level in range(len(channels) + 1)]
        features = channels[-1] * math.prod(sizes[-1])
        if decodes:
            self.layers = nn.Sequential(
                *_chain(nn.Linear, [inputs, *hidden[::-1], features], activation),
                nn.Unflatten(1, (channels[-1], *sizes[-1])),
                *_doublings([*channels[::-1], outputs // math.prod(sizes[0])], sizes[-2::-1], activation),
            )
        else:
            maps, widths = [self.shape[2], *channels], [features + labels, *hidden]
            self.maps = nn.Sequential(*_chain(nn.Conv2d, maps, activation, **HALVING), nn.Flatten())
            self.layers = nn.Sequential(*_chain(nn.Linear, widths, activation), nn.Linear(widths[-1], outputs))
            _init_weights(self.maps, last=False)
        _init_weights(self.layers)

    def forward(self, values: Tensor) -> Tensor:
        rows = values.reshape(-1, values.shape[-1])
        if self.decodes:
            outputs = self.layers(rows).unflatten(1, (-1, self.shape[2])).movedim(2, -1)
        else:
            pixels = math.prod(self.shape)
            maps = self.maps(rows[:, :pixels].unflatten(1, self.shape).movedim(-1, 1))
            outputs = self.layers(torch.cat([maps, rows[:, pixels:]], 1))
        return outputs.reshape(*values.shape[:-1], self.outputs)


class Standardize(nn.Module):
    r"""Network behind standardization by column of training rows, :math:`f((x - m) / s)`, for data of any units."""

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.network = network
        # A tenth of the standard deviation of all values, so that a column that hardly varies does not dominate.
        least = max(0.1 * rows.std(correction=0).item(), 1e-6)
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("scale", rows.std(0, correction=0).clamp_min(least))

    def forward(self, values: Tensor) -> Tensor:
        return self.network((values - self.mean) / self.scale)


class ImputeMeans(nn.Module):
    r"""Network behind mean imputation, :math:`f(x)` with :math:`x_d = m_d` for NaN, m [columns] being ``values``.

    >>> ImputeMeans(nn.Identity(), torch.tensor([1.0, 2.0]))(torch.tensor([[torch.nan, 5.0]]))
    tensor([[1., 5.]])
    """

    values: Tensor

    def __init__(self, network: nn.Module, values: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("values", values)

    def forward(self, values: Tensor) -> Tensor:
        return self.network(torch.where(values.isnan(), self.values, values))


def _activated(layer: Any, before: int, after: int, activation: str, **options: Any) -> list[nn.Module]:
    """Return a layer and its activation; a gate (GLU) takes half of the layer's outputs, dimension 1 of maps."""
    if activation == "GLU":
        return [layer(before, 2 * after, **options), nn.GLU(-1 if layer is nn.Linear else 1)]
    return [layer(before, after, **options), getattr(nn, activation)()]


def _block(width: int, activation: str) -> nn.Sequential:
    """Return a residual block that starts as the identity (V = 0), so that depth does not hinder training."""
    last = nn.Linear(width, width)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.LayerNorm(width), *_activated(nn.Linear, width, width, activation), last)


def _chain(layer: Any, widths: Sequence[int], activation: str, **options: Any) -> list[nn.Module]:
    pairs = pairwise(widths)
    return [module for pair in pairs for module in _activated(layer, *pair, activation, **options)]


def _doublings(channels: Sequence[int], sizes: Sequence[tuple[int, ...]], activation: str) -> list[nn.Module]:
    """Return transposed convolutions back to these sizes; the last is linear."""
    layers: list[nn.Module] = []
    kinds = [activation] * (len(sizes) - 1) + ["Identity"]
    for pair, size, kind in zip(pairwise(channels), sizes, kinds, strict=True):
        padding = tuple(1 - n % 2 for n in size)
        layers += _activated(nn.ConvTranspose2d, *pair, kind, output_padding=padding, **HALVING)
    return layers


def _init_weights(layers: nn.Sequential, last: bool = True) -> None:
    """Draw He's weights, which keep a signal's size through rectified layers; smaller ones in the linear last layer."""
    weighted: list[Any] = [layer for layer in layers if hasattr(layer, "weight")]
    for layer in weighted:
        # A transposed convolution of stride 2 spreads its kernel over 2 x 2 neighbours.
        feeds = layer.weight[:, 0].numel() / 4 if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=math.sqrt((1 / 3 if last and layer is weighted[-1] else 2) / feeds))
        nn.init.zeros_(layer.bias)


def _check(who: str, activation: str, **counts: int | Sequence[int]) -> None:
    if activation not in ACTIVATIONS:
        raise UserError(f"{who}: unknown activation '{activation}'{nearest(activation, ACTIVATIONS)}")
    check_range(who, least=1, **counts)


def _check_image(shape: Sequence[int], channels: Sequence[int], row: int, decodes: bool) -> None:
    if not channels:
        raise UserError("Conv: channels is empty, but at least one convolution is needed; use MLP for none")
    if len(shape) not in (2, 3):
        raise UserError(f"Conv: shape is {list(shape)}, but an image has H, W or H, W, C")
    values = math.prod(shape)
    if row % values if decodes else row != values:
        raise UserError(f"Conv: shape {list(shape)} holds {values} values, but the row has {row}; give the data's own")
