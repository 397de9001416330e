"""Error of posterior draws against their seconds: the guide, its weights, refinement, `pvae.posterior`, and HMC.

``python -m tests.benchmarks.posterior`` measures and writes docs/posterior-draws.md; ``--keep FILE`` keeps figures and
goes on from those it has; a case's name, given once or more, measures these alone and prints them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pvae
from pvae.diagnostics.reference_posterior import run_long_chains
from pvae.inference.batching import inference_mode
from pvae.inference.guides import Guide
from pvae.runtime.pyro_params import Program
from pvae.samplers.adaptive_importance import JointDensity
from pvae.samplers.log_joint import LogJoint
from pvae.samplers.posterior_draws import PosteriorDraws, pool_chains
from pvae.samplers.row_posterior import ACCURACIES
from pvae.stats import pareto_smooth
from tests.benchmarks.posterior_page import write
from tests.benchmarks.rows import mnist
from tests.zoo import make_guide, make_kind

ZOO = {"ridge": 50, "two equal modes": 50, "banana": 50, "linear, D = 50": 50}  # rows of each kind
RUNS = {"digits": (100, ()), "mnist": (16, ("--epochs", "3"))}  # rows, and options of `pvae fit`
WEIGHED, STEPS, HMC_DRAWS, REFERENCE_DRAWS, TURNS = 2000, 100, (100, 300, 1000), 10_000, 3
# More effective draws than the presets ask for, so that rows leave the guide's weights for the Gaussian fit.
FINER = {"K = 10,000, half effective": ACCURACIES["high"]._replace(ess=5000)}
FINER |= {f"K = {K:,}": ACCURACIES["high"]._replace(K=K, ess=K // 4) for K in (20_000, 40_000)}

Moments = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """Rows of a program and guide, with the true posterior moments [B, D] and their own errors, medians over rows."""

    name: str
    model: Program
    guide: Guide
    x: Tensor
    moments: Moments
    errors: tuple[float, float] = (0.0, 0.0)


class Line(NamedTuple):
    """A contender on a case: median and 95% quantile of errors over rows, seconds of a row, and rows by method.

    Errors are roots of the mean square over dimensions, of the mean in posterior sds and of log sd. ``within`` is the
    share of rows within 0.02 sds and 1%.
    """

    case: str
    contender: str
    mean: tuple[float, float]
    sd: tuple[float, float]
    within: float
    seconds: float
    ways: dict[str, int]


def of_run(name: str) -> Case:
    """Return test rows of a run of `pvae fit`, with the moments of long HMC chains."""
    rows, options = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, name))
        command = [sys.executable, "-m", "pvae", "fit", "--data", name, "--out", out, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        run = pvae.open_run(out)
    model, guide, x = run.variant.model, run.variant.guide, run.data.test[:rows]
    chains = run_long_chains(model, x, sites=guide.sites, draws=REFERENCE_DRAWS, seed=99)
    return Case(name, model, guide, x, *_with_errors(chains.draws.double()))


def _with_errors(draws: Tensor) -> tuple[Moments, tuple[float, float]]:
    """Return moments of chains [S, C, B, D], and their standard errors by the spread of each chain's own."""
    every, C = draws.flatten(0, 1), draws.shape[1]
    mean, sd = every.mean(0), every.std(0)
    of_mean = (draws.mean(0).std(0) / C**0.5 / sd).square().mean(-1).sqrt()
    of_sd = (draws.std(0).log().std(0) / C**0.5).square().mean(-1).sqrt()
    return (mean, sd), (of_mean.median().item(), of_sd.median().item())


def of_kind(name: str) -> Case:
    """Return rows of a kind of the zoo under a trained diagonal normal, with exact moments."""
    kind = make_kind(name)
    x = kind.rows(ZOO[name], seed=7)
    return Case(name, kind.model, make_guide(kind, "trained"), x, kind.moments(x))


def guide_alone(model: Program, guide: Guide, x: Tensor, seed: int) -> PosteriorDraws | Moments:
    with inference_mode(model, guide, seed=seed):
        u = guide.family(guide.params(x)).sample((WEIGHED,)).double()
    return u.mean(0), u.std(0)


def weighted(model: Program, guide: Guide, x: Tensor, seed: int) -> PosteriorDraws | Moments:
    """Weigh draws of the guide with Pareto-smoothed importance weights, without any check."""
    with inference_mode(model, guide, seed=seed):
        q = guide.family(guide.params(x))
        u = q.sample((WEIGHED,))
        log_w = sum(JointDensity(LogJoint(model, x, None, guide.sites))(u)) - q.log_prob(u).double()
    shares = pareto_smooth(log_w)[0].exp().unsqueeze(-1)
    mean = (shares * u).sum(0)
    return mean, (shares * (u - mean) ** 2).sum(0).sqrt()


def refined(model: Program, guide: Guide, x: Tensor, seed: int) -> PosteriorDraws | Moments:
    return weighted(model, pvae.RefinedGuide(guide, model, steps=STEPS).eval(), x, seed)


def chosen(accuracy: Any, model: Program, guide: Guide, x: Tensor, seed: int) -> PosteriorDraws | Moments:
    return pvae.posterior(model, guide, x, accuracy=accuracy, seed=seed)


def chains_alone(draws: int, model: Program, guide: Guide, x: Tensor, seed: int) -> PosteriorDraws | Moments:
    """Run 8 chains, annealed over as few temperatures as `posterior` takes."""
    return pool_chains(run_long_chains(model, x, sites=guide.sites, draws=draws, temperatures=20, seed=seed))


CONTENDERS: dict[str, Callable[[Program, Guide, Tensor, int], PosteriorDraws | Moments]] = {
    "guide alone": guide_alone,
    "guide + PSIS": weighted,
    "refine + PSIS": refined,
    **{f"posterior, {word}": partial(chosen, plan) for word, plan in (ACCURACIES | FINER).items()},
    **{f"HMC, 8 x {draws:,}": partial(chains_alone, draws) for draws in HMC_DRAWS},
}


def measure(case: Case, contender: str) -> Line:
    """Measure a contender on all rows of a case: errors of every turn together, the median turn's CPU seconds."""
    seconds, errors, ways = [], [], dict[str, int]()
    for turn in range(TURNS):
        start = time.process_time()
        result = CONTENDERS[contender](case.model, case.guide, case.x, turn)
        seconds.append((time.process_time() - start) / len(case.x))
        (mean, sd), (true_mean, true_sd) = _moments(result), case.moments
        off = torch.stack([(mean - true_mean) / true_sd, (sd / true_sd).log()])
        errors.append(off.square().mean(-1).sqrt())
        ways = result.counts() if isinstance(result, PosteriorDraws) else ways
    mean, sd = torch.cat(errors, 1)
    within = ((mean <= 0.02) & (sd <= 0.01)).double().mean().item()
    both = [(off.median().item(), off.quantile(0.95).item()) for off in (mean, sd)]
    return Line(case.name, contender, *both, within, statistics.median(seconds), ways)


def _moments(result: PosteriorDraws | Moments) -> Moments:
    return result.moments if isinstance(result, PosteriorDraws) else result


def lines(name: str, before: list[Line]) -> Iterator[tuple[Line, Case]]:
    """Measure the contenders of a case that were not measured before."""
    missing = [c for c in CONTENDERS if not any((line.case, line.contender) == (name, c) for line in before)]
    if missing:
        case = of_run(name) if name in RUNS else of_kind(name)
        for contender in missing:
            yield measure(case, contender), case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", choices=[*RUNS, *ZOO, []], help="all unless given")
    parser.add_argument("--keep", type=Path, help="JSON lines of the figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = given.keep.read_text().splitlines() if given.keep and given.keep.exists() else []
    found = [json.loads(line) for line in known]
    for name in given.case or [*RUNS, *ZOO]:
        if name == "mnist" and mnist() is None:
            continue
        for line, case in lines(name, [Line(*one["line"]) for one in found]):
            found.append({"line": line, "errors": case.errors})
            print(json.dumps(found[-1]), flush=True)
            if given.keep:
                with given.keep.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    if not given.case:
        absent = [name for name in [*RUNS, *ZOO] if name not in {one["line"][0] for one in found}]
        write([Line(*one["line"]) for one in found], absent, {one["line"][0]: one["errors"] for one in found})


if __name__ == "__main__":
    main()
