"""pvae as it is measured: the same VAE, under one of ``fit``'s engines and one inference method."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import torch
from pyro.infer import SVI
from torch import Tensor

from pvae.data.dataset import Dataset
from pvae.errors import UserError
from pvae.generative.likelihoods import Bernoulli
from pvae.generative.networks import MLP
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Amortized, Guide, PerDatapoint, SemiAmortized
from pvae.runtime.torch_state import no_validation
from pvae.training.loop import Fit, fit
from pvae.training.objectives import ELBO
from pvae.training.optimizer import FusedAdam
from tests.benchmarks.contenders import HIDDEN, LATENT, LEARNING_RATE, PIXELS, Absent

AMORTIZED = "amortized"
# Local steps of per-datapoint rows; refinement steps and draws of semi-amortized ones.
LOCAL = {"per-datapoint, 1 local step": 1, "per-datapoint, 5 local steps": 5}
REFINED = {"semi-amortized, 8 steps of 1 draw": (8, 1), "semi-amortized, 5 steps of 8 draws": (5, 8)}


def binary(rows: int) -> Tensor:
    """Noise in place of pictures."""
    return (torch.rand(rows, PIXELS) < 0.3).float()


def program(latent: int = LATENT, activation: str = "ReLU") -> tuple[VAE, DiagonalNormal, MLP]:
    """A VAE with its family and encoder."""
    networks = {"hidden": (HIDDEN,), "activation": activation}
    vae = VAE(MLP(latent, PIXELS, **networks), Bernoulli(), StandardNormal(latent))
    family = DiagonalNormal(latent)
    return vae, family, MLP(PIXELS, family.num_params, **networks)


def guide_of(source: str, vae: VAE, family: DiagonalNormal, encoder: MLP, rows: int) -> Guide:
    """The guide of an inference method by its name here."""
    if source in LOCAL:
        return PerDatapoint(rows, family, model=vae.model, local_steps=LOCAL[source])
    if source in REFINED:
        steps, draws = REFINED[source]
        return SemiAmortized(encoder, family, steps, model=vae.model, draws=draws)
    return Amortized(encoder, family)


def stepper(vae: VAE, guide: Guide, x: Tensor, rows: int) -> Callable[[], None]:
    """A function that makes one training step, on other rows each time."""
    svi = SVI(vae.model, guide, FusedAdam(vae, guide), ELBO())
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        with no_validation():
            svi.step(x, torch.randint(rows, (len(x),), generator=generator))

    return step


class Engine:
    """``pvae.training.loop.fit`` under an engine; an epoch's seconds are those of the fit's own history."""

    def __init__(
        self, engine: str, rows: np.ndarray, batch: int, source: str = AMORTIZED, made: tuple | None = None
    ) -> None:
        self.engine = engine
        self.options = {"engine": engine} if "engine" in inspect.signature(fit).parameters else {}
        if not self.options and engine != "pyro":
            raise Absent(f"fit takes no engine '{engine}': skipped")
        self.x, self.batch, made = torch.from_numpy(rows), batch, made or program()
        self.vae, self.guide = made[0], guide_of(source, *made, len(rows))

    def seconds(self, count: int) -> list[float]:
        return np.diff([0, *(row["seconds"] for row in self.train(count).history)]).tolist()

    def train(self, epochs: int, held_out: Tensor | None = None) -> Fit:
        """The fit itself; its history has the ELBO of held-out rows where there are some."""
        nothing = self.x[:0]
        data = Dataset("rows", self.x, nothing if held_out is None else held_out, nothing, (28, 28))
        budget = {"epochs": epochs, "batch_size": self.batch, "learning_rate": LEARNING_RATE}
        try:
            found = fit(self.vae.model, self.guide, data, **budget, device="cpu", **self.options)
        except UserError as error:
            raise Absent(f"skipped: {error}") from error
        made = getattr(found, "engine", "") or self.engine
        if not made.startswith(self.engine):
            raise Absent(f"skipped: fit went on with {made}")
        return found
