"""The same VAE in pythae: its model, its trainer, its estimate of the log-likelihood."""

from __future__ import annotations

import logging
import tempfile

import numpy as np
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import CallbackHandler, TrainingCallback
from torch import Tensor, nn

from tests.benchmarks.clock import Peer
from tests.benchmarks.contenders import LATENT, LEARNING_RATE, PIXELS
from tests.benchmarks.peers_torch import networks, weights_of


class Encoder(BaseEncoder):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> ModelOutput:
        mean, log_variance = self.layers(x).chunk(2, -1)
        return ModelOutput(embedding=mean, log_covariance=log_variance)


class Decoder(BaseDecoder):
    """pythae's Bernoulli takes probabilities."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.layers(z).sigmoid())


def vae() -> VAE:
    encoder, decoder = networks()
    config = VAEConfig(input_dim=(PIXELS,), latent_dim=LATENT, reconstruction_loss="bce")
    return VAE(config, encoder=Encoder(encoder), decoder=Decoder(decoder))


class Pythae(Peer):
    """An epoch is ``BaseTrainer.train_step`` on a resident tensor, without progress bar, checkpoints and copies."""

    def __init__(self, rows: np.ndarray, batch: int) -> None:
        logging.getLogger("pythae").setLevel(logging.ERROR)
        logging.getLogger("pythae.trainers.base_trainer.base_trainer").setLevel(logging.ERROR)
        x = torch.from_numpy(rows)
        with tempfile.TemporaryDirectory() as folder:
            budget = {"per_device_train_batch_size": batch, "learning_rate": LEARNING_RATE, "no_cuda": True}
            config = BaseTrainerConfig(output_dir=folder, num_epochs=1, **budget)
            self.trainer = BaseTrainer(vae(), BaseDataset(x, torch.zeros(len(x))), training_config=config)
            self.trainer.prepare_training()
        self.trainer.callback_handler = CallbackHandler([TrainingCallback()], self.trainer.model)
        self.done = 0

    def epoch(self) -> None:
        self.done += 1
        self.trainer.train_step(self.done)

    def weights(self) -> list[np.ndarray]:
        found = weights_of(self.trainer.model.encoder, self.trainer.model.decoder)
        for part in found[2:4]:
            part[LATENT:] /= 2  # log variances to log scales
        return found
