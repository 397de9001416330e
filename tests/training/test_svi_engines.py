"""Engines: each makes Pyro's step. Losses are Pyro's but for the order of their sums, gradients and rows to the bit."""

import math
from dataclasses import replace

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from pvae.data.dataset import Dataset
from pvae.errors import UserError
from pvae.generative import likelihoods, networks, priors
from pvae.generative.vae import VAE
from pvae.inference import families, guides
from pvae.inference.guides import Amortized, PerDatapoint
from pvae.recipes.build import build_model
from pvae.recipes.recipe import Recipe, resolve
from pvae.runtime.pyro_params import LocalModule, local_method
from pvae.runtime.torch_state import no_validation, seeded
from pvae.runtime.tracing import TraceError
from pvae.training import cuda_graph, loop, objectives, svi_engines
from pvae.training.loop import fit
from pvae.training.objectives import NonFiniteLoss
from pvae.training.optimizer import FusedAdam
from pvae.training.svi_engines import TracedStep, pyro_step
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
    from pvae.recipes.registry import parse_component

    return parse_component(word) if "(" in word else small(word)


def steps(case, engine, dtype=torch.float64, count=3, **options):
    """Losses, gradients, and rows after some steps on rows that come in another order each time."""
    changes = {kind: component(name) for kind, name in ({"network": "MLP"} | case).items()}
    own = resolve(Recipe(data="x.csv", latent=LATENT, **changes))
    data = data_for(getattr(likelihoods, case.get("likelihood", "Bernoulli"))())
    built = build_model(own, data)
    program, guide, objective = built.program, built.guide, built.objective
    optimizer = Seen(program.to(dtype).train(), guide.to(dtype).train(), learning_rate=1e-3)
    losses = []
    with seeded(0), no_validation():
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
    losses, gradients, rows = steps(case, TracedStep)
    expected = steps(case, pyro_step)
    assert losses == pytest.approx(expected[0], rel=1e-12)
    assert len(set(losses)) == len(losses)
    for found, others in ((gradients, expected[1]), (rows, expected[2])):
        assert all(a is b if a is None else a.equal(b) for a, b in zip(found, others, strict=True))


@pytest.mark.parametrize("guide", guides.__all__)
def test_a_replayed_step_is_pyros_in_float32(guide):
    losses, gradients, rows = steps({"guide": guide}, TracedStep, torch.float32)
    expected = steps({"guide": guide}, pyro_step, torch.float32)
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
        losses, gradients, rows = steps(case, TracedStep, dtype, compile=True)
        expected = steps(case, pyro_step, dtype)
        assert losses == pytest.approx(expected[0], rel=relative)
        close(gradients[: len(gradients) // 3], expected[1][: len(gradients) // 3], relative)
        close(rows, expected[2], 100 * relative)


def test_a_loss_that_is_not_finite_moves_nothing():
    vae = VAE(nn.Linear(2, 3), likelihoods.Bernoulli(), priors.StandardNormal(2))
    guide = Amortized(nn.Linear(3, 4), families.DiagonalNormal(2))
    optimizer = FusedAdam(vae, guide)
    step = TracedStep(vae.model, guide, optimizer, objectives.ELBO())
    x, index = torch.ones(4, 3), torch.arange(4)
    with no_validation():
        step(x, index)
        names = {id(p): str(place) for place, p in enumerate(optimizer.parameters)}
        before = [t.detach().clone() for t in (*optimizer.parameters, *optimizer.state_tensors(names).values())]
        with pytest.raises(NonFiniteLoss):
            step(x * math.nan, index)
    after = [*optimizer.parameters, *optimizer.state_tensors(names).values()]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def trained(engine, seed=1, epochs=2, **options):
    """A fit whose last batch is smaller than the others."""
    rows = (torch.rand(50, COLUMNS, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    data = Dataset("dots", rows, rows[:5], rows, (COLUMNS,), binarize="dynamic")
    with seeded(0):
        vae = VAE(networks.MLP(LATENT, COLUMNS, hidden=[6]), likelihoods.Bernoulli(), priors.StandardNormal(LATENT))
        guide = Amortized(networks.MLP(COLUMNS, 2 * LATENT, hidden=[6]), families.DiagonalNormal(LATENT))
    report = fit(vae.model, guide, data, epochs=epochs, batch_size=16, seed=seed, engine=engine, **options)
    return report, [p.detach() for m in (vae, guide) for p in m.parameters()]


def reported(report):
    """Engine and reason, as the screen shows them."""
    return f"{report.engine}: {report.engine_reason}"


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
        step = cuda_graph.CudaGraphStep(choice.traced, data, size)
        return replace(choice, step=step, batches=step.batches, traced=None)

    expected = trained("traced", epochs=4, objective=objective)[1]
    monkeypatch.setattr(cuda_graph, "capture_graph", capture)
    monkeypatch.setattr(cuda_graph, "on_side_stream", lambda function: function())
    monkeypatch.setattr(loop, "with_cuda_graph", everywhere)
    found = trained("traced", epochs=4, objective=objective)[1]
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    # 50 rows are 3 batches of 16 and one of 2.
    assert (len(captures), len(replays)) == (1, 4 * 3 - cuda_graph.WARM_UP)


def test_the_report_says_which_engine_and_why(capsys):
    assert reported(trained("auto")[0]) == "pyro: 8 steps are too few to pay for tracing one"
    assert reported(trained("traced")[0]) == "traced: as asked"
    assert capsys.readouterr().err == ""
    if not torch.cuda.is_available():
        assert reported(trained("graph")[0]) == "traced: a CUDA graph needs a CUDA device"
        assert capsys.readouterr().err == "  engine traced: a CUDA graph needs a CUDA device\n"
    trained("auto", progress=True)
    assert "  engine pyro: 8 steps are too few" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown engine 'traces'; did you mean 'traced'"):
        trained("traces")


@pytest.mark.parametrize(("count", "name"), [(199, "pyro"), (200, "traced"), (100_000, "compiled")])
def test_auto_weighs_what_it_costs_against_what_it_saves(count, name, monkeypatch):
    asked = []
    monkeypatch.setattr("pvae.runtime.tracing.compile_graph", lambda graph, inputs: asked.append(1) or graph)
    assert trained("auto", epochs=0)[0].engine == ""
    vae = VAE(nn.Linear(2, 3), likelihoods.Bernoulli(), priors.StandardNormal(2))
    guide = Amortized(nn.Linear(3, 4), families.DiagonalNormal(2))
    parts = (vae.model, guide, FusedAdam(vae, guide), objectives.ELBO())
    batch = (torch.ones(4, 3), torch.arange(4))
    assert svi_engines.choose_engine("auto", parts, (batch, batch), count).name == name
    assert bool(asked) is (name == "compiled")


def test_a_users_own_course_of_the_weight_is_followed():
    class Growing(objectives.ELBO):
        def weight_at(self, epoch):
            return 0.1 + 0.2 * epoch

    found, expected = (trained(engine, epochs=4, objective=Growing(K=2)) for engine in ("traced", "pyro"))
    assert all(a.equal(b) for a, b in zip(found[1], expected[1], strict=True))
    assert isinstance(found[0].history[-1]["objective"], float)


class Normed(networks.MLP):
    """An encoder with batch norm."""

    def __init__(self, replaces=False):
        super().__init__(COLUMNS, 2 * LATENT, hidden=[6])
        self.norm, self.replaces = nn.BatchNorm1d(COLUMNS), replaces
        self.register_buffer("mean", torch.zeros(COLUMNS))

    def forward(self, x):
        if self.replaces and self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return super().forward(self.norm(x) - self.mean)


def normed(engine, folder=None, epochs=3, resume=False, **options):
    rows = (torch.rand(50, COLUMNS, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    with seeded(0):
        vae = VAE(networks.MLP(LATENT, COLUMNS, hidden=[6]), likelihoods.Bernoulli(), priors.StandardNormal(LATENT))
        guide = Amortized(Normed(**options), families.DiagonalNormal(LATENT))
    report = fit(vae.model, guide, rows, epochs=epochs, batch_size=16, engine=engine, folder=folder, resume=resume)
    return report, [*vae.state_dict().values(), *guide.state_dict().values()]


def test_buffers_move_with_the_steps_alone_and_a_run_goes_on_to_the_same_bits(tmp_path):
    expected = normed("pyro")[1]
    assert guide_steps(expected) == 3 * 4
    normed("traced", tmp_path, epochs=2)
    for found in (normed("traced")[1], normed("traced", tmp_path, resume=True)[1]):
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def guide_steps(state):
    """num_batches_tracked, the only whole number of the state."""
    return next(value.item() for value in state if value.dtype == torch.long)


def test_buffers_that_are_replaced_go_by_pyro():
    report, found = normed("traced", replaces=True)
    assert "buffer 'mean' is replaced" in report.engine_reason
    assert all(a.equal(b) for a, b in zip(found, normed("pyro", replaces=True)[1], strict=True))


class Odd(LocalModule):
    """A VAE's program that does what a recording on other rows does not show, or what the waist does not see."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls, self.seen, self.decoder = kind, 0, 0, nn.Linear(2, 3)

    @local_method
    def model(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=2.0 if self.kind == "scaled" else 1.0):
            z = pyro.sample("z", priors.StandardNormal(2)())
            shift = 5.0 if self.kind == "looks" and x.mean() > 0.5 else 0.0
            shift = 5.0 if self.kind == "small" and len(x) < 4 and x.mean() > 0.1 else shift
            self.seen += 1
            shift = 1.0 if self.kind == "late" and self.seen > 4 else shift
            self.calls += self.kind == "counts"
            shift = self.decoder.bias.tolist()[0] if self.kind == "reads" else shift
            shift = x.detach().numpy().mean() if self.kind == "converts" else shift
            pyro.sample("x", likelihoods.Bernoulli()(self.decoder(z) + shift + self.calls), obs=x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("scaled", "Pyro's is"),
        ("looks", "tracing tensor"),
        ("counts", "Pyro's is"),
        ("reads", "tolist"),
        ("converts", "numpy"),
    ],
)
def test_programs_that_can_not_be_recorded_go_by_pyro_in_one_line(kind, reason):
    program, x = Odd(kind), torch.ones(8, 3).triu()
    guide = Amortized(nn.Linear(3, 4), families.DiagonalNormal(2))
    report = fit(program.model, guide, x, epochs=2, batch_size=4, engine="traced")
    assert reported(report).startswith("pyro: the step can't be traced (")
    assert reason in report.engine_reason
    assert "\n" not in report.engine_reason


def test_a_recording_that_falls_away_from_the_program_is_left_after_an_epoch(capsys):
    # The program's fifth pass is another: data are checked in the first, the step is traced and checked in three.
    program, guide = Odd("late"), Amortized(nn.Linear(3, 4), families.DiagonalNormal(2))
    report = fit(program.model, guide, torch.ones(48, 3).tril(), epochs=2, batch_size=4, engine="traced")
    assert reported(report).startswith("pyro: the traced step no longer holds (replayed, the loss is")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_last_batch_that_can_not_be_recorded_goes_by_pyro():
    program = Odd("small")
    guide = Amortized(nn.Linear(3, 4), families.DiagonalNormal(2))
    report = fit(program.model, guide, torch.ones(18, 3).tril(), epochs=2, batch_size=4, engine="traced")
    assert reported(report) == "traced: as asked"
    assert math.isfinite(report.history[-1]["objective"])


@pytest.mark.parametrize("engine", ["pyro", "traced"])
def test_a_loss_that_is_not_finite_is_told_in_a_line(engine):
    vae = VAE(nn.Linear(2, 3), likelihoods.Bernoulli(), priors.StandardNormal(2))
    with torch.no_grad():
        vae.decoder.bias.fill_(math.nan)
    guide = Amortized(nn.Linear(3, 4), families.DiagonalNormal(2))
    with pytest.raises(UserError, match=r"training diverged in epoch 1: .* is not finite"):
        fit(vae.model, guide, torch.ones(8, 3), epochs=2, batch_size=4, engine=engine)


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
    assert reported(report).startswith("pyro: the step can't be traced (")
    assert "not reparametrized" in report.engine_reason
    assert math.isfinite(report.history[0]["objective"])


def test_without_a_compiler_the_recording_is_replayed(monkeypatch):
    def none(graph, inputs):
        raise TraceError("InvalidCxxCompiler: no C++ compiler")

    monkeypatch.setattr("pvae.runtime.tracing.compile_graph", none)
    report, found = trained("compiled")
    assert reported(report) == "traced: the step can't be compiled (InvalidCxxCompiler: no C++ compiler)"
    assert all(a.equal(b) for a, b in zip(found, trained("pyro")[1], strict=True))
