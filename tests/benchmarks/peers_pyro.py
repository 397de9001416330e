"""What pvae is measured against: the same model as a Pyro user would write and train it without pvae."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from PIL import Image
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

from tests.benchmarks.clock import Peer
from tests.benchmarks.contenders import HIDDEN, LATENT, LEARNING_RATE
from tests.benchmarks.peers_torch import weights_of


class PlainVAE(nn.Module):
    """784-hidden-latent in plain Pyro: ``pyro.module``, a data plate, sites "latent" and "obs"."""

    def __init__(self, latent: int, hidden: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(784, hidden), activation(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), activation(), nn.Linear(hidden, 784))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), self.latent)
            z = pyro.sample("latent", dist.Normal(zeros, zeros + 1).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            mean, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(mean, log_scale.exp()).to_event(1))


class ExampleVAE(PlainVAE):
    """The same as Pyro's example has it: probabilities for log-odds, two heads, grey pixels as they are."""

    def __init__(self) -> None:
        super().__init__(50, 400, nn.Softplus)
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.Softplus())
        self.mean, self.log_scale = nn.Linear(400, 50), nn.Linear(400, 50)
        self.decoder.append(nn.Sigmoid())

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), self.latent)
            z = pyro.sample("latent", dist.Normal(zeros, zeros + 1).to_event(1))
            pixels = dist.Bernoulli(self.decoder(z), validate_args=False).to_event(1)
            pyro.sample("obs", pixels, obs=x)

    def guide(self, x: Tensor) -> None:
        for name in ("encoder", "mean", "log_scale"):
            pyro.module(name, getattr(self, name))
        with pyro.plate("data", len(x)):
            hidden = self.encoder(x)
            pyro.sample("latent", dist.Normal(self.mean(hidden), self.log_scale(hidden).exp()).to_event(1))


def pyro_svi(vae: PlainVAE) -> SVI:
    """Pyro's own training of it, at its defaults: one Adam for each parameter, validation on."""
    pyro.clear_param_store()
    return SVI(vae.model, vae.guide, Adam({"lr": LEARNING_RATE}), Trace_ELBO())


class Resident(Peer):
    """``SVI.step`` on resident rows."""

    def __init__(self, rows: np.ndarray, batch: int) -> None:
        self.rows, self.batch, self.vae = torch.from_numpy(rows), batch, PlainVAE(LATENT, HIDDEN)
        self.svi = pyro_svi(self.vae)

    def epoch(self) -> None:
        for index in torch.randperm(len(self.rows)).split(self.batch):
            self.svi.step(self.rows[index])

    def weights(self) -> list[np.ndarray]:
        return weights_of(self.vae.encoder, self.vae.decoder)


class Pictures(Dataset[Tensor]):
    """Images as torchvision's MNIST serves them: one PIL image at a time, turned into a tensor."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.turn = images, ToTensor()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        return self.turn(Image.fromarray(self.images[row].numpy()))


class Example(Peer):
    """Pyro's VAE example: a shuffling DataLoader, ``svi.step`` for each batch, 784-400-50, softplus."""

    def __init__(self, images: Tensor, batch: int) -> None:
        self.svi = pyro_svi(ExampleVAE())
        self.loader = DataLoader(Pictures(images), batch_size=batch, shuffle=True, num_workers=1)

    def epoch(self) -> None:
        for x in self.loader:
            self.svi.step(x.flatten(1))
