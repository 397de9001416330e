"""Training: Pyro's own numbers, step by step; stopped anywhere and gone on with, the same bits."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import SOURCES, LinearGaussian
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from pvae.data.dataset import Dataset
from pvae.errors import UserError
from pvae.generative.likelihoods import Bernoulli
from pvae.generative.networks import MLP
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import DiagonalNormal, positive_scale
from pvae.inference.guides import Amortized
from pvae.inference.importance import log_weights
from pvae.runtime.pyro_params import local_method
from pvae.runtime.signals import TrainingInterrupt
from pvae.runtime.torch_state import seeded
from pvae.training import checkpoints, loop
from pvae.training.loop import fit
from pvae.training.objectives import ELBO
from pvae.training.optimizer import FusedAdam

ROWS, COLUMNS = 24, 6
EPOCHS, BATCH = 6, 8  # 3 batches an epoch

every_source = pytest.mark.parametrize("source", SOURCES)


def tiny(validation=0):
    """Intensities to be binarized afresh for each batch."""
    random = torch.Generator().manual_seed(0)
    train = torch.rand(ROWS, COLUMNS, generator=random)
    held_out = torch.bernoulli(torch.full((validation, COLUMNS), 0.5), generator=random)
    return Dataset("tiny", train, held_out, held_out[:0], (COLUMNS,), "dynamic")


def binary():
    """The same rows, binarized once."""
    with seeded(1):
        return torch.bernoulli(tiny().train)


class Eventful(VAE):
    """A VAE to which something happens at the call ``at`` of its program: what ``event`` does, or else NaN."""

    at, calls, event = 0, 0, None

    @local_method
    def model(self, x, index=None):
        self.calls += 1
        due = self.calls == self.at
        if due and self.event:
            self.event()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            eta = self.decoder(z)
            pyro.sample("x", self.likelihood(eta * torch.nan if due and not self.event else eta), obs=x)


def modules(source="Amortized", seed=0):
    with seeded(seed):
        vae = Eventful(MLP(2, COLUMNS, hidden=[4]), Bernoulli(), StandardNormal(2))
        return vae, SOURCES[source](vae.model, 2, COLUMNS, ROWS)


def bits(*owners):
    return [tensor.clone() for owner in owners for tensor in owner.state_dict().values()]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def untimed(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def trained(source="Amortized", data=None, *, seed=0, **options):
    """Bits of model and guide after a fit, and its report; ``seed`` is that of the parameters' start."""
    vae, guide = modules(source, seed)
    data = tiny() if data is None else data
    report = fit(vae.model, guide, data, **{"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 0.01} | options)
    return bits(vae, guide), report


# Objective and optimizer


@every_source
@pytest.mark.parametrize("K", [1, 3])
def test_objective_is_pyros_in_value_and_gradient(source, K):
    x, index = binary(), torch.arange(ROWS)
    found = []
    for objective in (ELBO(K=K), Trace_ELBO(K, vectorize_particles=True, max_plate_nesting=1)):
        vae, guide = modules(source)
        with seeded(1), pyro.validation_enabled(False):
            value = objective.loss_and_grads(vae.model, guide, x, index)
        found.append((value, [p.grad for owner in (vae, guide) for p in owner.parameters()]))
    (ours, gradients), (theirs, expected) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    for mine, pyros in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, pyros)
    assert all(g.abs().sum() > 0 for g in gradients)


def test_fused_adam_steps_like_torch_and_pyro():
    x, rate = binary(), 0.01
    runs = {name: modules() for name in ("fused", "pyro", "torch")}
    plain = torch.optim.Adam([p for owner in runs["torch"] for p in owner.parameters()], lr=rate)
    optimizers = {"fused": FusedAdam(*runs["fused"], learning_rate=rate), "pyro": pyro.optim.Adam({"lr": rate})}
    loops = {name: SVI(runs[name][0].model, runs[name][1], how, Trace_ELBO()) for name, how in optimizers.items()}
    for step in range(12):
        for svi in loops.values():
            with seeded(step):
                svi.step(x)
        with seeded(step):
            plain.zero_grad()
            Trace_ELBO().differentiable_loss(runs["torch"][0].model, runs["torch"][1], x).backward()
            plain.step()
        fused, *others = (bits(*owners) for owners in runs.values())
        for other in others:
            for a, b in zip(fused, other, strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


# History, seeds, early stopping


def test_history_reports_nats_per_datapoint():
    oracle = LinearGaussian(2, 5)
    x, held_out = oracle.sample(50), oracle.sample(20, seed=1)
    data = Dataset("linear", x, held_out, held_out[:0], (5,))
    report = fit(oracle.model, oracle.posterior, data, epochs=4, batch_size=16)
    assert [row["epoch"] for row in report.history] == [1, 2, 3, 4]
    seconds = [row["seconds"] for row in report.history]
    assert seconds[0] > 0
    assert seconds == sorted(set(seconds))
    assert report.seconds == seconds[-1]
    assert report.stopped == "finished"
    for row in report.history:  # the exact posterior's ELBO is the evidence, whatever the draws
        assert row["objective"] == pytest.approx(oracle.evidence(x).mean().item(), abs=1e-4)
        assert row["validation_elbo"] == pytest.approx(oracle.evidence(held_out).mean().item(), abs=1e-4)
    assert all("validation_elbo" not in row for row in trained()[1].history)


def test_an_epoch_visits_every_row_once():
    vae, guide = modules("PerDatapoint")
    fit(vae.model, guide, tiny(), epochs=EPOCHS, batch_size=BATCH - 1)
    assert (guide.row_steps == EPOCHS * guide.local_steps).all()


@every_source
def test_a_seed_fixes_everything_and_the_stream_outside_goes_on(source):
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    first, report = trained(source)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not pyro.get_param_store().keys()
    torch.manual_seed(6)
    again, repeated = trained(source)
    assert same(first, again)
    assert untimed(report.history) == untimed(repeated.history)
    vae, guide = modules(source)
    fit(vae.model, guide, tiny(), epochs=EPOCHS, batch_size=BATCH, learning_rate=0.01, seed=1)
    assert not same(first, bits(vae, guide))


class Plain(PyroModule):
    """An amortized guide as it is written in Pyro alone."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, index=None):
        with pyro.plate("data", len(x), dim=-1):
            mean, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, positive_scale(log_scale)).to_event(1))


def test_a_plain_pyro_guide_trains_alike_and_leaves_nothing_in_pyros_store():
    expected, report = trained()
    for _ in range(2):  # a second fit meets nothing of the first
        vae, guide = modules()
        plain = Plain(guide.encoder)
        found = fit(vae.model, plain, tiny(), epochs=EPOCHS, batch_size=BATCH, learning_rate=0.01)
        assert same(bits(vae, plain), expected)
        assert untimed(found.history) == untimed(report.history)
        assert not pyro.get_param_store().keys()


@every_source
def test_validation_does_not_disturb_training(source):
    with_rows, report = trained(source, tiny(validation=5), epochs=2)
    without, _ = trained(source, tiny(), epochs=2)
    assert same(with_rows, without)
    assert all("validation_elbo" in row for row in report.history)


def overfitted(**options):
    """A fit of too large a network to too few rows, on whose validation rows the ELBO soon falls."""
    with seeded(0):
        vae = VAE(MLP(2, COLUMNS, hidden=[32]), Bernoulli(), StandardNormal(2))
        guide = Amortized(MLP(COLUMNS, 4, hidden=[32]), DiagonalNormal(2))
    data = replace(tiny(validation=40), train=binary(), binarize="none")
    options = {"epochs": 200, "batch_size": BATCH, "learning_rate": 0.02, "patience": 8, "engine": "traced"} | options
    return vae, guide, fit(vae.model, guide, data, **options), data


def validation_elbo(vae, guide, data):
    with torch.no_grad(), seeded(0):
        return log_weights(vae.model, guide, data.validation, K=8).log_w.mean().item()


@pytest.mark.parametrize(("epochs", "stopped"), [(200, "early"), (20, "finished")])
def test_early_stopping_goes_back_to_the_best_epoch(epochs, stopped):
    vae, guide, report, data = overfitted(epochs=epochs, patience=8 if stopped == "early" else 100)
    values = [row["validation_elbo"] for row in report.history]
    top = values.index(max(values))
    assert report.stopped == stopped
    assert top < len(values) - 1
    assert len(values) == (top + 1 + 8 if stopped == "early" else epochs)
    assert validation_elbo(vae, guide, data) == pytest.approx(values[top], abs=1e-5)
    assert not vae.training
    assert not guide.training


# Stop and go on


def resumed(source, folder, data=None, **options):
    """What a run's folder leads to when modules of another start go on from it."""
    return trained(source, data, seed=9, folder=folder, resume=True, **options)


@every_source
@pytest.mark.parametrize("at", [0, 1, 3, EPOCHS])
def test_half_a_run_and_the_rest_are_the_whole_bit_for_bit(source, at, tmp_path):
    whole, report = trained(source)
    trained(source, epochs=at, folder=tmp_path)
    rest, after = resumed(source, tmp_path)
    assert same(rest, whole)
    assert untimed(after.history) == untimed(report.history)
    seconds = [row["seconds"] for row in after.history]
    assert seconds == sorted(set(seconds))


def test_going_on_with_early_stopping_is_the_whole_bit_for_bit(tmp_path):
    vae, guide, report, _ = overfitted()
    best = max(range(len(report.history)), key=lambda i: report.history[i]["validation_elbo"])
    overfitted(epochs=best + 4, folder=tmp_path)
    again = overfitted(folder=tmp_path, resume=True)
    assert untimed(again[2].history) == untimed(report.history)
    assert again[2].stopped == "early"
    assert same(bits(*again[:2]), bits(vae, guide))


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.append("tests")
import tests.training.test_loop as test_training
test_training.loop.CHECKPOINT_SECONDS = 0
test_training.die(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
"""


def die(source, folder, how):
    """Train in a process to which a signal is sent in the third epoch's second step, or while it is being saved."""
    vae, guide = modules(source)
    if how == "saving":
        checkpoints.save_file = half_saved(checkpoints.save_file)
    else:
        per_step = {"Amortized": 1, "SemiAmortized": 4, "PerDatapoint": 5}[source]
        vae.at, vae.event = 1 + 7 * per_step + 1, lambda: signal.raise_signal(signal.Signals[how])
    fit(vae.model, guide, tiny(), epochs=EPOCHS, batch_size=BATCH, learning_rate=0.01, folder=folder)


def half_saved(save):
    """What saves as ``save`` does, but at the third time writes half a file and is killed."""
    times = itertools.count(1)

    def saved(tensors, path, metadata):
        save(tensors, path, metadata=metadata)
        if next(times) == 3:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return saved


def check_the_rest(source, folder, batch):
    """What was kept in the third epoch after some batches goes on to the end of a training that nothing ended."""
    state = json.loads((folder / "state.json").read_text())
    assert (state["epoch"], state["batch"]) == (2, batch)
    whole, report = trained(source)
    rest, after = resumed(source, folder)
    assert same(rest, whole)
    assert untimed(after.history) == untimed(report.history)


@pytest.mark.parametrize(("source", "how"), [*((source, "SIGKILL") for source in SOURCES), ("Amortized", "saving")])
def test_a_killed_process_is_gone_on_with_bit_for_bit(source, how, tmp_path):
    child = [sys.executable, "-c", CHILD, source, str(tmp_path), how]
    done = subprocess.run(child, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_the_rest(source, tmp_path, batch=0)


@pytest.mark.parametrize(("source", "how"), [("SemiAmortized", "SIGINT"), ("PerDatapoint", "SIGTERM")])
def test_a_stopped_training_is_gone_on_with_bit_for_bit(source, how, tmp_path):
    with pytest.raises(TrainingInterrupt, match=f"stopped in epoch 3 by {how}; saved in") as stop:
        die(source, tmp_path, how)
    assert stop.value.signal == signal.Signals[how]
    check_the_rest(source, tmp_path, batch=2)


def test_signals_have_their_usual_effect_after_training():
    numbers = (signal.SIGINT, signal.SIGTERM)
    usual = [signal.getsignal(number) for number in numbers]
    trained(epochs=1)
    assert [signal.getsignal(number) for number in numbers] == usual
    vae, guide = modules()
    vae.at, vae.event = 3, lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(TrainingInterrupt, match="stopped in epoch 1 by SIGINT; nothing was kept") as stop:
        fit(vae.model, guide, tiny(), epochs=2, batch_size=BATCH)
    assert stop.value.signal == signal.SIGINT
    assert [signal.getsignal(number) for number in numbers] == usual


# Mistakes and accidents


def test_nan_names_epoch_and_site_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    whole, _ = trained()
    vae, guide = modules()
    vae.at = 1 + 3 * 3 + 2  # the fourth epoch's second step
    with pytest.raises(UserError, match="diverged in epoch 4: the log-density of site 'x' is not finite") as error:
        fit(vae.model, guide, tiny(), epochs=EPOCHS, batch_size=BATCH, learning_rate=0.01, folder=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert all(tensor.isfinite().all() for tensor in bits(vae, guide))
    assert checkpoints.read(tmp_path)[1]["epoch"] == 3
    assert same(resumed("Amortized", tmp_path)[0], whole)


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    trained(epochs=1, folder=tmp_path)
    good = (tmp_path / checkpoints.FILE).read_bytes()
    vae, guide = modules()
    vae.decoder.layers[0].weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(UserError, match=r"diverged in epoch 2: .*'model.decoder.layers.0.weight' is not finite"):
        fit(vae.model, guide, tiny(), epochs=2, batch_size=ROWS, folder=tmp_path, resume=True)
    assert (tmp_path / checkpoints.FILE).read_bytes() == good


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(keep, tmp_path):
    trained(epochs=1, folder=tmp_path)
    path = tmp_path / checkpoints.FILE
    os.truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(UserError, match="is truncated or not a checkpoint"):
        resumed("Amortized", tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        resumed("Amortized", tmp_path)
    with pytest.raises(UserError, match="resume=True needs the folder"):
        resumed("Amortized", None)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trained(epochs=1, folder=tmp_path)
    vae = VAE(MLP(2, COLUMNS, hidden=[5]), Bernoulli(), StandardNormal(2))
    guide = Amortized(nn.Linear(COLUMNS, 4), DiagonalNormal(2))
    with pytest.raises(UserError, match=r"model.decoder.layers.0.bias is \(4,\) in it, but \(5,\)"):
        fit(vae.model, guide, tiny(), epochs=2, folder=tmp_path, resume=True)
    with pytest.raises(UserError, match=r"guide.encoder.bias is .* in it, but absent"):
        resumed("PerDatapoint", tmp_path)


def test_a_checkpoint_of_other_rows_is_refused(tmp_path):
    trained(epochs=1, folder=tmp_path)
    with pytest.raises(UserError, match="other rows"):
        resumed("Amortized", tmp_path, replace(tiny(), train=tiny().train.flip(0)))


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_data_outside_the_support_are_refused_by_place_and_value(part):
    x, grey = binary(), binary()
    grey[3, 2], grey[4, 0] = 0.25, 7.0
    data = replace(Dataset("grey", x, x, x, (COLUMNS,)), **{part: grey})
    before = bits(*modules())
    vae, guide = modules()
    with pytest.raises(UserError, match=rf"{part} row 3, column 2 is 0.25, outside .* 'x' \(Bernoulli.*\(2 such"):
        fit(vae.model, guide, data, epochs=1)
    assert same(bits(vae, guide), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs is -1, but it must be at least 0"),
        ({"batch_size": 0}, "batch_size is 0, but it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, but it must be positive"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, but it must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, but it must be positive"),
        ({"learning_rate": float("inf")}, "learning_rate is inf, but it must be positive"),
        ({"epochs": 1.5}, "epochs is 1.5, but it must be a whole number"),
        ({"patience": -1}, "patience is -1, but it must be at least 1"),
        ({"patience": 0}, "patience is 0, but it must be at least 1"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ],
    ids=str,
)
def test_budgets_out_of_range_are_refused(options, message):
    with pytest.raises(UserError) as error:
        trained(data=tiny(validation=5), **options)
    assert message in str(error.value)


def test_patience_needs_validation_rows():
    with pytest.raises(UserError, match="early stopping needs validation rows"):
        trained(patience=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(UserError, match="device=cuda: PyTorch sees no CUDA device"):
        trained(device="cuda")


def test_programs_without_a_module_are_refused():
    _, guide = modules()
    with pytest.raises(UserError, match="not a module nor a module's method"):
        fit(lambda x, index: None, guide, tiny(), epochs=1)


def test_a_module_in_the_place_of_its_method_is_refused():
    vae, guide = modules()
    with pytest.raises(UserError, match=r"Eventful is no Pyro program itself; give its method, as vae\.model"):
        fit(vae, guide, tiny(), epochs=1)


@pytest.mark.parametrize("source", ["PerDatapoint", "SemiAmortized"])
def test_a_guide_of_another_model_is_refused_and_a_copied_pair_is_not(source):
    vae, guide = modules(source)
    with pytest.raises(UserError, match="another model than the one that is trained"):
        fit(vae.model, copy.deepcopy(guide), tiny(), epochs=1)
    vae, guide = copy.deepcopy((vae, guide))
    fit(vae.model, guide, tiny(), epochs=1)
