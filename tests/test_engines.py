"""Engines: each makes Pyro's step. Losses are Pyro's but for the order of their sums, gradients and rows to the bit."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from pvae import captured, engines, families, guides, likelihoods, networks, objectives, priors, training
from pvae.data import Dataset
from pvae.engines import PyroStep, RecordedStep
from pvae.errors import UserError
from pvae.generative import VAE
from pvae.guides import Amortized, PerDatapoint
from pvae.optimizer import FusedAdam
from pvae.recipe import Recipe, build, resolve
from pvae.recorded import Unrecordable
from pvae.runtime import LocalModule, local_method, seeded, unchecked
from pvae.training import fit
from tests.test_product import COLUMNS, LATENT, ROWS, data_for, reason_for, small

AXES = {
    "likelihood": likelihoods.__all__,
    "prior": priors.__all__,
    "family": families.__all__,
    "objective": [*objectives.__all__, "ELBO(warm_up=4.0)", "DReG(free_bits=100.0)", "IWAE(free_bits=1.0, K=2)"],
}
CASES = [{"guide": guide, kind: name} for guide in guides.__all__ for kind, names in AXES.items() for name in names] + [
    {"network": name} for name in networks.__all__
]
CASES = [case for case in CASES if not reason_for(case)]


class Seen(FusedAdam):
    """Keeps the gradients of each step."""

    def __init__(self, *modules, **options):
        super().__init__(*modules, **options)
        self.seen = []

    def step_parameters(self):
        self.seen += [None if p.grad is None else p.grad.clone() for p in self.parameters]
        super().step_parameters()


def component(word):
    from pvae.components import parse

    return parse(word) if "(" in word else small(word)


def steps(case, engine, dtype=torch.float64, count=3, **options):
    """Losses, gradients, and rows after some steps on rows that come in another order each time."""
    changes = {kind: component(name) for kind, name in ({"network": "MLP"} | case).items()}
    own = resolve(Recipe(data="x.csv", latent=LATENT, **changes))
    data = data_for(getattr(likelihoods, case.get("likelihood", "Bernoulli"))())
    program, guide, objective = build(own, data)
    optimizer = Seen(program.to(dtype).train(), guide.to(dtype).train(), learning_rate=1e-3)
    losses = []
    with seeded(0), unchecked():
        step = engine(program.model, guide, optimizer, objective, **options)
        for epoch in range(count):
            objective.weight = guide.kl_weight = objective.weight_at(epoch)
            losses.append(step(data.train.to(dtype).roll(epoch, 0), torch.arange(ROWS).roll(epoch)))
    rows = [b.clone() for b in guide.buffers()] if isinstance(guide, PerDatapoint) else []
    return losses, optimizer.seen, rows


def close(found, expected, relative):
    """Whether gradients agree relative to their largest entry."""
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            assert (one - other).abs().max() <= relative * other.abs().max()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_a_replayed_step_is_pyros(case):
    losses, gradients, rows = steps(case, RecordedStep)
    expected = steps(case, PyroStep)
    assert losses == pytest.approx(expected[0], rel=1e-12)
    assert len(set(losses)) == len(losses)
    for found, others in ((gradients, expected[1]), (rows, expected[2])):
        assert all(a is b if a is None else a.equal(b) for a, b in zip(found, others, strict=True))


@pytest.mark.parametrize("guide", guides.__all__)
def test_a_replayed_step_is_pyros_in_float32(guide):
    losses, gradients, rows = steps({"guide": guide}, RecordedStep, torch.float32)
    expected = steps({"guide": guide}, PyroStep, torch.float32)
    assert losses == pytest.approx(expected[0], rel=1e-6)
    close(gradients, expected[1], 1e-5)
    close(rows, expected[2], 1e-5)


COMPILED = [
    {"guide": "Amortized"},
    pytest.param({"guide": "PerDatapoint"}, marks=pytest.mark.slow),
    *(pytest.param({"guide": "SemiAmortized", "objective": name}, marks=pytest.mark.slow) for name in ("ELBO", "DReG")),
    *(pytest.param({"family": name}, marks=pytest.mark.slow) for name in families.__all__),
    *(pytest.param({"prior": name}, marks=pytest.mark.slow) for name in priors.__all__),
    *(pytest.param({"objective": name}, marks=pytest.mark.slow) for name in AXES["objective"]),
    *(pytest.param({"likelihood": name}, marks=pytest.mark.slow) for name in likelihoods.__all__),
]


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(case.values()))
def test_a_compiled_step_is_pyros_but_for_rounding(case):
    if reason_for(case):
        pytest.skip("does not go together")
    for dtype, relative in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        losses, gradients, rows = steps(case, RecordedStep, dtype, compile=True)
        expected = steps(case, PyroStep, dtype)
        assert losses == pytest.approx(expected[0], rel=relative)
        close(gradients[: len(gradients) // 3], expected[1][: len(gradients) // 3], relative)
        close(rows, expected[2], 100 * relative)


def trained(engine, seed=1, epochs=2, **options):
    """A fit whose last batch is smaller than the others."""
    rows = (torch.rand(50, COLUMNS, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    data = Dataset("dots", rows, rows[:5], rows, (COLUMNS,), binarize="dynamic")
    with seeded(0):
        vae = VAE(networks.MLP(LATENT, COLUMNS, hidden=[6]), likelihoods.Bernoulli(), priors.StandardNormal(LATENT))
        guide = Amortized(networks.MLP(COLUMNS, 2 * LATENT, hidden=[6]), families.DiagonalNormal(LATENT))
    report = fit(vae.model, guide, data, epochs=epochs, batch_size=16, seed=seed, engine=engine, **options)
    return report, [p.detach() for m in (vae, guide) for p in m.parameters()]


def test_a_fit_gives_the_same_parameters_by_any_engine():
    report, expected = trained("pyro")
    for engine in ("traced", "graph"):
        other, found = trained(engine)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
        for row, like in zip(other.history, report.history, strict=True):
            assert row["objective"] == pytest.approx(like["objective"], rel=1e-6)
            assert row["validation_elbo"] == like["validation_elbo"]
    assert not any(a.equal(b) for a, b in zip(trained("traced", seed=2)[1], expected, strict=True))


@pytest.mark.parametrize("objective", [objectives.ELBO(), objectives.IWAE(K=2, warm_up=3.0)], ids=["plain", "warm-up"])
def test_a_captured_step_makes_the_steps_in_their_order(objective, monkeypatch):
    # A stand-in for the device: what is captured is kept, what is replayed is run.
    captures, replays = [], []

    def capture(function):
        captures.append(function)
        return lambda: replays.append(1) or function()

    def everywhere(choice, engine, data, size):
        return choice._replace(step=captured.CapturedStep(choice.step, data, size))

    expected = trained("traced", epochs=4, objective=objective)[1]
    monkeypatch.setattr(captured, "capture", capture)
    monkeypatch.setattr(captured, "beside", lambda function: function())
    monkeypatch.setattr(training, "captured", everywhere)
    found = trained("traced", epochs=4, objective=objective)[1]
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    # 50 rows are 3 batches of 16 and one of 2.
    assert (len(captures), len(replays)) == (1, 4 * 3 - captured.WARM_UP)


def test_the_report_says_which_engine_and_why(capsys):
    assert trained("auto")[0].engine == "pyro: 8 steps are too few to pay for recording one"
    assert trained("traced")[0].engine == "traced: as asked"
    assert capsys.readouterr().err == ""
    if not torch.cuda.is_available():
        assert trained("graph")[0].engine == "traced: a CUDA graph needs a CUDA device"
        assert capsys.readouterr().err == "  engine traced: a CUDA graph needs a CUDA device\n"
    trained("auto", progress=True)
    assert "  engine pyro: 8 steps are too few" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown engine 'traces'; did you mean 'traced'"):
        trained("traces")


@pytest.mark.parametrize(("count", "name"), [(199, "pyro"), (200, "traced"), (100_000, "compiled")])
def test_auto_weighs_what_it_costs_against_what_it_saves(count, name, monkeypatch):
    asked = []
    monkeypatch.setattr("pvae.recorded.compiled", lambda graph, inputs: asked.append(1) or graph)
    assert trained("auto", epochs=0)[0].engine.startswith("pyro")
    vae = VAE(nn.Linear(2, 3), likelihoods.Bernoulli(), priors.StandardNormal(2))
    guide = Amortized(nn.Linear(3, 4), families.DiagonalNormal(2))
    parts = (vae.model, guide, FusedAdam(vae, guide), objectives.ELBO())
    batch = (torch.ones(4, 3), torch.arange(4))
    assert engines.choose("auto", parts, batch, batch, count).name == name
    assert bool(asked) is (name == "compiled")


class Odd(LocalModule):
    """A VAE's program that does what a recording on other rows does not show, or what the waist does not see."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls, self.decoder = kind, 0, nn.Linear(2, 3)

    @local_method
    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=2.0 if self.kind == "scaled" else 1.0):
            z = pyro.sample("z", priors.StandardNormal(2)())
            shift = 5.0 if self.kind == "looks" and x.mean() > 0.5 else 0.0
            self.calls += self.kind == "counts"
            pyro.sample("x", likelihoods.Bernoulli()(self.decoder(z) + shift + self.calls), obs=x)


@pytest.mark.parametrize(
    ("kind", "reason"), [("scaled", "Pyro's is"), ("looks", "tracing tensor"), ("counts", "Pyro's is")]
)
def test_programs_that_can_not_be_recorded_go_by_pyro_in_one_line(kind, reason):
    program, x = Odd(kind), torch.ones(8, 3).triu()
    guide = Amortized(nn.Linear(3, 4), families.DiagonalNormal(2))
    report = fit(program.model, guide, x, epochs=2, batch_size=4, engine="traced")
    assert report.engine.startswith("pyro: the step can't be recorded (")
    assert reason in report.engine
    assert "\n" not in report.engine


def test_latents_without_reparametrization_go_by_pyro():
    class Discrete(LocalModule):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(2))

        def forward(self, x, index=None):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", pyro.distributions.Bernoulli(logits=self.logits[0]))

        @local_method
        def model(self, x, index=None):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", pyro.distributions.Bernoulli(0.5))
                pyro.sample("x", pyro.distributions.Normal(z + self.logits[1], 1.0), obs=x[:, 0])

    program, guide = Discrete(), Discrete()
    report = fit(program.model, guide, torch.randn(8, 3), epochs=1, batch_size=4, engine="traced")
    assert report.engine.startswith("pyro: the step can't be recorded (")
    assert "not reparametrized" in report.engine
    assert math.isfinite(report.history[0]["objective"])


def test_without_a_compiler_the_recording_is_replayed(monkeypatch):
    def none(graph, inputs):
        raise Unrecordable("InvalidCxxCompiler: no C++ compiler")

    monkeypatch.setattr("pvae.recorded.compiled", none)
    report, found = trained("compiled")
    assert report.engine == "traced: the step can't be compiled (InvalidCxxCompiler: no C++ compiler)"
    assert all(a.equal(b) for a, b in zip(found, trained("pyro")[1], strict=True))
