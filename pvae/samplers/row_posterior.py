"""Posterior draws of each row by the cheapest means whose checks pass for that row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.errors import AllChainsDiverged, UserError, nearest, param
from pvae.inference.batching import ROWS, Progress, RowBatch, Values, as_rows, map_batches, silent
from pvae.inference.families import Family
from pvae.inference.guides import Guide
from pvae.inference.latents import find_latent_sites
from pvae.inference.posterior import posterior_moments
from pvae.runtime.pyro_params import Program
from pvae.runtime.torch_state import seeded
from pvae.samplers import hmc
from pvae.samplers.adaptive_importance import (
    DEFENSIVE,
    JointDensity,
    Proposals,
    StudentMixture,
    draw_defensively,
    fit_mixture,
    initial_mixture,
)
from pvae.samplers.ais import AISEstimate, anneal
from pvae.samplers.gaussian_vi import fit_gaussian
from pvae.samplers.log_joint import LogJoint
from pvae.samplers.posterior_draws import (
    GAUSSIAN,
    GUIDE,
    IMPORTANCE,
    MIXTURE,
    NONE,
    SECONDS,
    PosteriorDraws,
    pool_chains,
    resample,
)
from pvae.stats import effective_sample_size, k_hat_threshold, log_mean_exp, pareto_smooth

OFTEN, MORE = 0.02, 8  # share of rows with a missed mode from which on all get so many times the particles again
FLAT = 0.95  # of K: an effective sample size above which the guide's draws are called right as they are
# Nats of a particle's weight above the mean beyond which a method hardly reaches it; a guide's tails may be as light.
HEAVIEST = {IMPORTANCE: math.inf, GAUSSIAN: 3.0, MIXTURE: 6.0}
MISSED_MASS = 0.005  # share of the posterior at a particle from which on a mode counts as missed
ADAPT_DRAWS = (2000, 5000)  # of each round of a mixture's adaptation, and once more for rows whose checks fail
MIXTURE_ROWS = 50  # that are adapted together
NUM_CHAINS, WARM_UP, LEAPFROGS = 8, 200, 5
HELD = 20_000_000  # numbers of a batch's draws that are held together
STREAM = 3_000_017  # offset of seeds, clear of those of searches and references


class Accuracy(NamedTuple):
    """What posterior draws must reach: K draws of a row with an effective sample size; particles that look for modes.

    Attributes:
        K, ess: draws of each row, and the least effective sample size among them.
        chains, temperatures: annealed particles of each row, see `anneal`.
        most_chains, most_temperatures: of the rows that need a mixture.
        length: draws of each of eight HMC chains for rows that need them; 0 for no chains.
    """

    K: int
    ess: int
    chains: int
    temperatures: int
    most_chains: int
    most_temperatures: int
    length: int


ACCURACIES = {
    "quick": Accuracy(500, 100, 8, 20, 32, 50, 1000),
    "standard": Accuracy(2000, 400, 8, 20, 32, 50, 1500),
    "high": Accuracy(10_000, 5000, 16, 50, 64, 100, 2500),
}


def posterior(
    model: Program,
    guide: Guide | None,
    x: Values,
    index: Tensor | None = None,
    *,
    accuracy: str | Accuracy = "standard",
    seed: int = 0,
    progress: Progress = silent,
) -> PosteriorDraws:
    r"""Draw from the posterior of each row's latents by the cheapest method whose checks pass for that row.

    The methods, from cheap to dear: draws of the guide as they are; the same with Pareto-smoothed importance weights;
    a Gaussian fitted to the row (full rank), weighted; a mixture of t distributions fitted by adaptive importance
    sampling from many annealed particles, weighted; HMC chains started from it. A row moves on unless its weights have
    k-hat below 0.7 and enough effective draws, and no particle annealed from the prior lies where the method has hardly
    any mass and the posterior has some: the check for modes that a guide's own draws can't make.

    Arguments:
        model: a fitted Pyro program.
        guide: its approximate posterior; None to begin at the Gaussian fit, without any guide's help.
        x, index: rows [B, ...], and which training datapoints they are; None for new rows.
        accuracy: ``quick``, ``standard`` or ``high`` (100, 400 or 5000 effective draws), or numbers of your own.
        seed: of all noise; the random stream outside is left alone.
        progress: called with the number of rows done.

    Returns:
        Weighted draws. Rows on which every method's checks failed have method "none" and ``reliable`` False.

    Raises:
        UserError: an unknown accuracy, or rows with entries that are infinite.

    See also: `evaluate` for what a guide loses; `diagnose` for whether to trust it.

    Source: the order of methods after Li, Vehtari, Buerkner, Radev, Acerbi, Schmitt (2024), *Amortized Bayesian
    Workflow*, arXiv:2409.04332.

    >>> import pvae
    >>> vae = pvae.VAE(torch.nn.Linear(2, 5), pvae.likelihoods.Bernoulli(), pvae.priors.StandardNormal(2))
    >>> guide = pvae.Amortized(torch.nn.Linear(5, 4), pvae.families.DiagonalNormal(2))
    >>> draws = posterior(vae.model, guide, torch.zeros(3, 5), accuracy="quick")
    >>> draws.u.shape, bool(draws.reliable.all())
    (torch.Size([500, 3, 2]), True)
    """
    if not isinstance(accuracy, Accuracy) and accuracy not in ACCURACIES:
        raise UserError(f"{param('accuracy')} is '{accuracy}'{nearest(accuracy, ACCURACIES)}")
    plan = accuracy if isinstance(accuracy, Accuracy) else ACCURACIES[accuracy]
    rows = as_rows(x, model)
    sites = guide.sites if guide else find_latent_sites(model, rows)

    def compute(batch: RowBatch) -> dict[str, Tensor]:
        q = (guide.family, guide.params(batch.x, batch.index)) if guide else None
        draws = draw_rows(LogJoint(model, batch.x, batch.index, sites), q, plan, seed=batch.seed)
        values = {name: getattr(draws, name).movedim(1, 0) for name in ("u", "log_weights")}
        values |= {name: getattr(draws, name) for name in ("log_evidence", "method", "ess", "k_hat")}
        return values | {f"seconds of {name}": torch.tensor(spent) for name, spent in draws.seconds.items()}

    size = max(1, min(ROWS, HELD // (plan.K * sites.dim)))
    options: Any = {"seed": seed + STREAM, "batch_size": size, "progress": progress}
    values = map_batches(model, guide, compute, rows, index, **options)
    seconds = {name: values.pop(f"seconds of {name}").sum().item() for name in SECONDS}
    draws = {name: values.pop(name).movedim(0, 1) for name in ("u", "log_weights")}
    return PosteriorDraws(**draws, **values, seconds=seconds)


def anneal_particles(target: LogJoint, chains: int, temperatures: int) -> AISEstimate:
    """Anneal particles of rows from the prior; they are draws of it, without weights, where HMC diverges everywhere."""
    try:
        return anneal(target, chains=chains, temperatures=temperatures, seed=_new_seed())
    except AllChainsDiverged:
        u = target.prior(chains)
        unknown = torch.full_like(u[..., 0], torch.nan)
        return AISEstimate(unknown, u, unknown[0], unknown[0])


@torch.no_grad()
def draw_rows(
    target: LogJoint,
    q: tuple[Family, Tensor] | None,
    accuracy: Accuracy,
    *,
    scouts: AISEstimate | None = None,
    seed: int = 0,
) -> PosteriorDraws:
    """Draw from the posteriors of a batch of rows as `posterior` does.

    Arguments:
        target: log joint density of the rows.
        q: family and q_params [B, P] of an approximate posterior to begin with; None for none.
        accuracy: what the draws must reach.
        scouts: particles to check every method's draws against; annealed unless given.
        seed: of all noise; the random stream outside is left alone.
    """
    methods = _Methods(target, accuracy, q, scouts)
    work = [methods.send_scouts, methods.weigh_guide, methods.fit_gaussian, methods.fit_mixture, methods.run_chains]
    with seeded(seed):
        for name, method in zip(SECONDS, work, strict=True):
            start = time.perf_counter()
            if len(methods.todo) and (accuracy.length or method != methods.run_chains):
                method()
            methods.seconds[name] = time.perf_counter() - start
    return methods.draws


def _new_seed() -> int:
    return int(torch.randint(2**31, ()))


class _Methods:
    """The methods, each for the rows ``todo`` that no method before has passed on, and every row's draws so far."""

    scouts: AISEstimate

    def __init__(
        self, target: LogJoint, accuracy: Accuracy, q: tuple[Family, Tensor] | None, scouts: AISEstimate | None
    ) -> None:
        self.target, self.accuracy, self.q, self.given_scouts, self.more = target, accuracy, q, scouts, False
        self.seconds = dict[str, float]()
        B, K, D = len(target.x), accuracy.K, target.latents.dim
        like = target.x.new_zeros((), dtype=torch.double)
        self.todo = torch.arange(B, device=like.device)
        self.draws = PosteriorDraws(
            u=like.new_zeros(K, B, D),
            log_weights=like.new_full((K, B), -math.log(K)),
            log_evidence=like.new_full((B,), torch.nan),
            method=torch.full((B,), NONE, device=like.device),
            ess=like.new_zeros(B),
            k_hat=like.new_full((B,), torch.nan),
            seconds=self.seconds,
        )

    def send_scouts(self) -> None:
        """Anneal the few particles that every method's draws are checked against, unless they are given."""
        size = self.accuracy.chains, self.accuracy.temperatures
        self.scouts = self.given_scouts or anneal_particles(self.target, *size)

    def _send_more_scouts(self) -> None:
        """Anneal more particles of every row, since modes that some rows' particles found may be in all rows."""
        more = anneal_particles(self.target, MORE * self.accuracy.chains, self.accuracy.temperatures)
        values = ((getattr(self.scouts, name), getattr(more, name)) for name in ("log_w", "position"))
        log_w, position = (torch.cat(pair) for pair in values)
        self.scouts, self.more = replace(self.scouts, log_w=log_w, position=position), True

    def weigh_guide(self) -> None:
        if self.q and not self.q[0].point_mass:
            family, q_params = self.q
            q = family(q_params)
            u = q.sample(torch.Size([self.accuracy.K]))
            log_lik, log_prior = JointDensity(self.target)(u)
            proposals = Proposals(u.double(), log_lik + log_prior, q.log_prob(u).double())
            self._offer(IMPORTANCE, proposals, lambda u: q.log_prob(u.to(q_params)).double())

    def fit_gaussian(self) -> None:
        start, log_scale = self._starts()
        mean, covariance = fit_gaussian(self.target.rows(self.todo), start, log_scale)
        root, _ = torch.linalg.cholesky_ex(covariance)
        self._draw_from(GAUSSIAN, StudentMixture(mean.new_zeros(1, len(mean)), mean.unsqueeze(0), root.unsqueeze(0)))

    def fit_mixture(self) -> None:
        """Fit mixtures to few rows at a time, whose draws times components stay near the cache."""
        every, left, accuracy = self.todo, [], self.accuracy
        particles = anneal_particles(self.target.rows(every), accuracy.most_chains, accuracy.most_temperatures)
        both = [(getattr(particles, name), getattr(self.scouts, name)[:, every]) for name in ("position", "log_w")]
        parts = (torch.cat(pair).split(MIXTURE_ROWS, 1) for pair in both)
        for self.todo, position, log_w in zip(every.split(MIXTURE_ROWS), *parts, strict=True):
            starts = self._starts()[0].unsqueeze(0)
            mixture = initial_mixture(self.target.rows(self.todo), position, log_w, starts, seed=_new_seed())
            for draws in ADAPT_DRAWS:
                rows = self.todo
                density = JointDensity(self.target.rows(rows))
                mixture = fit_mixture(density, mixture, draws=draws, seed=_new_seed())
                self._draw_from(MIXTURE, mixture)
                if not len(self.todo):
                    break
                mixture = mixture.rows(torch.isin(rows, self.todo))
            left.append(self.todo)
        self.todo = torch.cat(left)

    def run_chains(self) -> None:
        """Run HMC chains from draws of the mixture by their weights, thinned to K draws.

        None are run where rows often have modes apart: chains that agree on some modes say nothing of the others.
        """
        rows, K = self.todo, self.accuracy.K
        if self.more:
            return
        u = resample(self.draws.u[:, rows], self.draws.log_weights[:, rows], NUM_CHAINS)
        scale = self.draws.moments[1][rows].clamp(min=1e-6)
        length: Any = {"draws": max(self.accuracy.length, -(-K // NUM_CHAINS)), "warm_up": WARM_UP}
        options: Any = length | {"num_integration_steps": LEAPFROGS, "seed": _new_seed()}
        with suppress(AllChainsDiverged):
            chains = hmc.sample(self.target.rows(rows), u.to(self.target.x), scale=scale.to(self.target.x), **options)
            pooled = pool_chains(chains, K, least_ess=self.accuracy.ess)
            sound = pooled.reliable
            values = {name: getattr(pooled, name)[sound] for name in ("method", "ess", "k_hat")}
            self._keep(rows[sound], u=pooled.u[:, sound], log_weights=-math.log(K), **values)
            self.todo = rows[~sound]

    def _starts(self) -> tuple[Tensor, Tensor]:
        """Return mean and log scale [b, D] from which Gaussians are fitted: the guide's, or the best particle's."""
        best = self.scouts.log_w.nan_to_num(nan=-torch.inf).argmax(0)
        position, every = self.scouts.position, torch.arange(len(best), device=best.device)
        mean, sd = position[best, every], 0.1 * position.std(0)
        if self.q:
            values = posterior_moments(*self.q)
            usable = torch.stack([v.isfinite().all(-1) for v in values]).all(0) & (values[1] > 0).all(-1)
            mean, sd = (v.where(usable[:, None], other) for v, other in zip(values, (mean, sd), strict=True))
        return mean[self.todo], sd.clamp(min=1e-6).log()[self.todo]

    def _draw_from(self, method: int, mixture: StudentMixture) -> None:
        target = self.target.rows(self.todo)
        proposals = draw_defensively(JointDensity(target), mixture, self.accuracy.K)

        def log_q(u: Tensor) -> Tensor:
            parts = torch.stack([target.log_lik_and_prior(u)[1].double(), mixture.log_prob(u.double())])
            return (parts + parts.new_tensor([DEFENSIVE, 1 - DEFENSIVE]).log().view(2, 1, 1)).logsumexp(0)

        self._offer(method, proposals, log_q)

    def _offer(self, method: int, proposals: Proposals, log_q: Callable[[Tensor], Tensor]) -> None:
        """Store the rows' weighted draws, and pass on those whose checks pass."""
        rows, K, log_w = self.todo, self.accuracy.K, proposals.log_w
        log_weights, k_hat = pareto_smooth(log_w)
        ess = effective_sample_size(log_weights)
        flat = (ess >= FLAT * K) & (method == IMPORTANCE)
        passed = (k_hat < k_hat_threshold(K)) & (ess >= self.accuracy.ess)
        missed = self._misses_mode(method, proposals, log_weights, log_q)
        if method == GAUSSIAN and not self.more and missed.double().mean() > OFTEN:
            self._send_more_scouts()
            missed = self._misses_mode(method, proposals, log_weights, log_q)
        passed &= ~missed
        self._keep(rows, u=proposals.u, log_weights=log_weights, log_evidence=log_mean_exp(log_w), ess=ess, k_hat=k_hat)
        self._keep(rows[passed], method=torch.where(flat, GUIDE, method)[passed])
        self.todo = rows[~passed]

    def _misses_mode(
        self, method: int, proposals: Proposals, log_weights: Tensor, log_q: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Whether an annealed particle lies where q hardly reaches and the posterior has mass, [b]."""
        u, log_w, weights = self.scouts.position[:, self.todo], proposals.log_w, log_weights.exp()
        log_joint = self.target.rows(self.todo)(u).double()
        evidence, heaviest = log_mean_exp(log_w), HEAVIEST[method]
        # One of many draws may have met the mode by chance, from the prior: the largest weight is not all.
        outlying = log_joint - log_q(u) > torch.minimum(log_w.amax(0) + 1, evidence + heaviest)
        # Mass by the particle's own weight or, since short annealing understates it, by its density among q's draws.
        finite = proposals.log_joint.nan_to_num(neginf=-1e300)
        mean = (weights * finite).sum(0)
        sd = (weights * (finite - mean) ** 2).sum(0).sqrt()
        dense = log_joint > mean - 3 * sd + math.log(MISSED_MASS)
        share = self.scouts.log_w[:, self.todo].double() - math.log(len(u)) - evidence
        return (outlying & (dense | (share > math.log(MISSED_MASS)))).any(0)

    def _keep(self, rows: Tensor, **values: Tensor | float) -> None:
        for name, value in values.items():
            tensor = getattr(self.draws, name)
            place = (slice(None), rows) if name in ("u", "log_weights") else rows
            tensor[place] = value
