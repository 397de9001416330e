"""Running totals: chunks give what the whole gives, whatever their sizes, and in memory that K does not change."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pvae.inference.importance import LogWeights
from pvae.inference.streaming import RunningMoments, StreamingWeights
from pvae.stats import effective_sample_size, k_hat, log_mean_exp, log_mean_exp_se

K, B = 1000, 6


def weights(count=K, spread=1.5, seed=0):
    random = torch.Generator().manual_seed(seed)
    log_lik, log_prior, log_q = spread * torch.randn(3, count, B, generator=random, dtype=torch.double)
    return LogWeights(log_lik, log_prior, log_q)


def tallied(w, sizes):
    found, start = StreamingWeights(len(w.log_w)), 0
    for size in sizes:
        part = slice(start, start + size)
        found.add(LogWeights(w.log_lik[part], w.log_prior[part], w.log_q[part]))
        start += size
    return found


@pytest.mark.parametrize(
    "sizes", [[K], [1] * 200 + [800], [7] * 142 + [6], [990, 10], [3, 997]], ids=lambda sizes: str(len(sizes))
)
@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_chunks_give_what_the_whole_gives(sizes, shift):
    w = weights()
    w = LogWeights(w.log_lik + shift, w.log_prior, w.log_q)
    found, log_w = tallied(w, sizes), w.log_w
    close = {"rtol": 1e-9, "atol": 1e-8}  # a shift of 1e4 takes four digits from a double
    torch.testing.assert_close(found.elbo, log_w.mean(0), **close)
    torch.testing.assert_close(found.elbo_se, log_w.std(0) / K**0.5, **close)
    torch.testing.assert_close(found.iwae, log_mean_exp(log_w), **close)
    torch.testing.assert_close(found.iwae_se, log_mean_exp_se(log_w), **close)
    torch.testing.assert_close(found.ess, effective_sample_size(log_w), **close)
    torch.testing.assert_close(found.kl, (w.log_q - w.log_prior).mean(0), **close)
    torch.testing.assert_close(found.reconstruction, w.log_lik.mean(0), **close)
    assert torch.equal(found.k_hat, k_hat(log_w))


def test_draws_of_no_weight_count_and_carry_none():
    w = weights()
    lost = w.log_lik.clone()
    lost[:700] = -math.inf  # whole chunks of them, first of all
    found = tallied(LogWeights(lost, w.log_prior, w.log_q), [100] * 10)
    torch.testing.assert_close(found.iwae, log_mean_exp(w.log_w[700:]) + math.log(0.3))
    torch.testing.assert_close(found.ess, effective_sample_size(w.log_w[700:]))
    assert (found.elbo == -math.inf).all()
    assert found.elbo_se.isnan().all()


def test_a_row_of_no_weight_at_all_has_no_evidence():
    lost = torch.full((30, 2), -math.inf)
    found = StreamingWeights(30)
    found.add(LogWeights(lost, torch.zeros(30, 2), torch.zeros(30, 2)))
    assert (found.iwae == -math.inf).all()
    assert found.k_hat.isnan().all()


def test_one_draw_tells_nothing_of_its_error():
    found = tallied(weights(1), [1])
    assert found.elbo_se.isnan().all()
    assert found.iwae_se.isnan().all()
    torch.testing.assert_close(found.iwae, found.elbo)


def test_results_are_of_the_weights_type_and_totals_in_double():
    w = weights(50_000)
    single = LogWeights(*(part.float() for part in (w.log_lik - 1e3, w.log_prior, w.log_q)))
    found = tallied(single, [500] * 100)
    assert found.iwae.dtype == found.elbo.dtype == found.k_hat.dtype == torch.float32
    # Rounding of each weight is independent: 6e-5 / sqrt(K). Totals in float32 would lose 0.01.
    torch.testing.assert_close(found.elbo.double(), w.log_w.mean(0) - 1e3, atol=1e-4, rtol=0)


def test_moments_of_nearly_equal_values_keep_their_digits():
    values = 1e6 + torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double) / 1e3
    found = RunningMoments()
    for part in values.split(13):
        found.add(part)
    torch.testing.assert_close(found.se, values.std(0) / 1000**0.5, rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that a block has made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(made) if torch.is_tensor(t)]
        self.most = max([self.most, *sizes])
        return made


def test_memory_grows_with_the_tail_alone():
    most = {}
    for count in (1000, 100_000):
        found = StreamingWeights(count)
        with Largest() as seen:
            for seed in range(count // 500):
                found.add(weights(500, seed=seed))
            found.iwae, found.ess  # noqa: B018
        most[count] = seen.most
    # The numbers of weights() itself; then the tail of 949 draws and the chunk that it waits for.
    assert most[1000] == 3 * 500 * B
    assert most[100_000] <= (2 * 949 + 500) * B
