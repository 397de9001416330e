"""Runner: diagnose every kind with every guide, and append verdicts and truths to a file, one JSON line each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pvae
from pvae.diagnostics import DIAGNOSIS_BUDGETS
from pvae.errors import UserError
from pvae.inference.guides import Guide
from pvae.runtime.torch_state import seeded
from pvae.samplers import LogJoint, hmc
from pvae.stats import r_hat

from .guides import GUIDES, applies, make_guide
from .kinds import KINDS, Kind, make_kind
from .truths import Truth, refined_truth, truth

CHAINS, CHAIN_ROWS, CONVERGED = 4, 20, 1.05  # of the chains whose R-hat a user would look at


class Case(NamedTuple):
    """One diagnosis: an instance of a kind, a guide, and a budget."""

    kind: str
    seed: int
    guide: str
    budget: str


def list_cases(kinds: list[str], guides: list[str], seeds: int, budgets: list[str]) -> Iterator[Case]:
    """Yield the cases, seed by seed, so that a run that ends early has seen every kind."""
    for budget in budgets:
        for seed in range(seeds):
            for kind in kinds:
                instance = make_kind(kind, seed)
                yield from (Case(kind, seed, guide, budget) for guide in guides if applies(instance, guide))


def run(cases: list[Case], path: Path) -> None:
    """Diagnose the cases that the file does not hold, and append them.

    Cases of one instance come one after the other, so that it is made once and its best Gaussians are remembered.
    """
    finished = {Case(**{name: line[name] for name in Case._fields}) for line in read(path)}
    instance: tuple[str, int] | None = None
    truths: dict[str, Truth] = {}
    for case in cases:
        if case in finished:
            continue
        if instance != (case.kind, case.seed):
            instance, kind, truths = (case.kind, case.seed), make_kind(case.kind, case.seed), {}
        line = {**case._asdict(), **diagnose(case, kind, truths)}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{case.kind}, {case.guide}, {case.budget}: {line['seconds']:.0f} s, {line['levels']}", flush=True)


def diagnose(case: Case, kind: Kind, truths: dict[str, Truth] | None = None) -> dict[str, Any]:
    """Return figures, verdicts, truths and rivals' conclusions of a case; truths of refined guides are remembered."""
    guide, truths = make_guide(kind, case.guide, case.seed), {} if truths is None else truths
    family = type(guide.family).__name__
    if family not in truths:
        truths[family] = refined_truth(kind, guide)
    real, refined = truth(kind, guide), truths[family]
    # Every case has noise of its own, so that errors of verdicts are independent.
    seed = 1000 * (1 + case.seed) + len(GUIDES) * list(KINDS).index(case.kind) + GUIDES.index(case.guide)
    x = kind.rows(DIAGNOSIS_BUDGETS[case.budget].rows, seed)
    torch.manual_seed(seed)
    start = time.perf_counter()
    try:
        diagnosis = pvae.diagnose(kind.model, guide, x, budget=case.budget, seed=seed)
        levels = {use: verdict.level for use, verdict in diagnosis.verdicts.items()}
        figures = {name: estimate.mean for name, estimate in diagnosis.figures.items()}
        after = {name: estimate.mean for name, estimate in diagnosis.refined.items()}
        error = ""
    except (UserError, RuntimeError, ValueError) as failure:  # a verdict that can't be had counts as none
        levels, figures, after, error = dict.fromkeys(real.trustworthy, "failed"), {}, {}, repr(failure)
    return {
        "dim": kind.dim,
        "levels": levels,
        "truth": real.trustworthy,
        "margins": real.margins,
        "refined_truth": refined.trustworthy,
        "rivals": rivals(figures, chains_from(kind, guide, x[:CHAIN_ROWS], seed)),
        "seconds": round(time.perf_counter() - start, 2),
        "figures": figures,
        "refined": after,
        "true_figures": real.figures,
        "refined_true_figures": refined.figures,
        "error": error,
    }


def rivals(figures: dict[str, float], r_hats: Tensor) -> dict[str, bool]:
    """Return whether a single diagnostic would have one trust the posterior: k-hat, SBC, or converged chains."""
    limits: dict[str, tuple[str, Callable[[float], bool]]] = {
        "k-hat": ("k_hat_above", lambda share: share <= 0.1),
        "SBC": ("sbc_p", lambda p: p > 0.01),
    }
    known = {name: bool(ok(figures[key])) for name, (key, ok) in limits.items() if key in figures}
    return known | {"R-hat": bool((r_hats < CONVERGED).double().mean() > 0.5)}


def chains_from(kind: Kind, guide: Guide, x: Tensor, seed: int = 0) -> Tensor:
    """Return R-hat of the worst dimension, [B], of short HMC chains that start at draws of the guide."""
    with seeded(seed), torch.no_grad():
        q = guide.family(guide.params(x))
        init = q.sample(torch.Size([CHAINS]))
    scale = kind.moments(x)[1].to(x.dtype)
    target = LogJoint(kind.model, x, None, kind.sites)
    chains = hmc.sample(target, init, scale=scale, draws=400, warm_up=200, seed=seed)
    return r_hat(chains.draws).amax(-1).nan_to_num(nan=torch.inf)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


__all__ = ["GUIDES", "KINDS", "Case", "diagnose", "list_cases", "read", "rivals", "run"]
