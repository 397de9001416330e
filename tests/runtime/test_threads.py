"""CPU threads: small operations run on one, large ones as before; a fit's numbers do not change."""

import math

import pytest
import torch

from pvae.generative import likelihoods, networks, priors
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal
from pvae.inference.guides import Amortized
from pvae.runtime.threads import MIN_OP_SIZE, OpSizes, cpu_threads
from pvae.runtime.torch_state import seeded
from pvae.training.loop import fit
from pvae.training.svi_engines import TracedStep


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("op_size", "threads"), [(0.0, 1), (MIN_OP_SIZE - 1, 1), (MIN_OP_SIZE, 2), (math.nan, 2)])
def test_small_operations_run_on_one_thread(op_size, threads, two_threads):
    with cpu_threads(op_size):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_products_count_by_their_operations_and_views_not_at_all():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with OpSizes() as sizes:
        (a @ b).t().relu()
    assert (sizes.count, sizes.total) == (3, 2 * 3 * 4 * 5 + 15)


def trained():
    x = (torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    with seeded(0):
        vae = VAE(networks.MLP(2, 6, hidden=[4]), likelihoods.Bernoulli(), priors.StandardNormal(2))
        guide = Amortized(networks.MLP(6, 4, hidden=[4]), DiagonalNormal(2))
    fit(vae.model, guide, x, epochs=2, batch_size=8, engine="traced")
    return [*vae.parameters(), *guide.parameters()]


def test_a_small_traced_step_runs_on_one_thread_to_the_same_bits(two_threads, monkeypatch):
    torch.set_num_threads(1)
    expected = trained()
    torch.set_num_threads(2)
    threads, apply = [], TracedStep.apply
    monkeypatch.setattr(TracedStep, "apply", lambda *args: (threads.append(torch.get_num_threads()), apply(*args))[1])
    assert all(a.equal(b) for a, b in zip(trained(), expected, strict=True))
    assert threads == [1] * 10
    assert torch.get_num_threads() == 2
