"""pvae: which approximate posterior to trust, and what it costs, for latent-variable models on Pyro."""

__version__ = "0.1.0"
