"""What a PyTorch user would write by hand, and the least that any PyTorch program of a step must do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from tests.benchmarks.clock import Peer
from tests.benchmarks.contenders import HIDDEN, LATENT, LEARNING_RATE, PIXELS


def networks() -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder, initialized as PyTorch does."""
    return (
        nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT)),
        nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS)),
    )


def weights_of(*modules: nn.Module) -> list[np.ndarray]:
    """Copies of all parameters, in order."""
    return [p.detach().numpy().copy() for module in modules for p in module.parameters()]


class Eager(Peer):
    """Resident rows, one reparametrized draw, KL in closed form, fused Adam: nothing that a step doesn't need."""

    def __init__(self, rows: np.ndarray, batch: int) -> None:
        self.rows, self.batch = torch.from_numpy(rows), batch
        self.encoder, self.decoder = networks()
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.adam = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
        self.loss: Callable[[Tensor], Tensor] = self.negative_elbo

    def negative_elbo(self, x: Tensor) -> Tensor:
        mean, log_scale = self.encoder(x).chunk(2, -1)
        z = mean + log_scale.exp() * torch.randn_like(mean)
        kl = 0.5 * (mean**2 + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
        return binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") + kl

    def epoch(self) -> None:
        for index in torch.randperm(len(self.rows)).split(self.batch):
            self.adam.zero_grad(set_to_none=True)
            self.loss(self.rows[index]).backward()
            self.adam.step()

    def weights(self) -> list[np.ndarray]:
        return weights_of(self.encoder, self.decoder)


class Compiled(Eager):
    """The same with its loss, and thereby the backward pass, under ``torch.compile``."""

    def __init__(self, rows: np.ndarray, batch: int) -> None:
        super().__init__(rows, batch)
        self.loss = torch.compile(self.negative_elbo)


class Products(Peer):
    """The matrix products of a step and nothing else: four forward, four for weights, three for inputs."""

    def __init__(self, rows: np.ndarray, batch: int) -> None:
        self.steps, sizes = len(rows) // batch, (PIXELS, HIDDEN, 2 * LATENT, LATENT, HIDDEN, PIXELS)
        pairs = [(sizes[i], sizes[i + 1]) for i in (0, 1, 3, 4)]
        self.layers = [(torch.randn(batch, a), torch.randn(b, a), torch.randn(batch, b)) for a, b in pairs]

    def epoch(self) -> None:
        for _ in range(self.steps):
            for layer, (inputs, weight, outputs) in enumerate(self.layers):
                inputs @ weight.T
                outputs.T @ inputs
                if layer:
                    outputs @ weight
