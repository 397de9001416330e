"""Several processes: what they find together is what one process finds that adds their gradients itself."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import SOURCES
from torch import nn

from pvae.cli import app
from pvae.data.dataset import Dataset
from pvae.data.memmap import MemmapRows
from pvae.diagnostics.evaluation import bounds
from pvae.errors import UserError
from pvae.experiments import run_folder
from pvae.generative.likelihoods import Bernoulli
from pvae.generative.networks import MLP
from pvae.generative.priors import StandardNormal
from pvae.generative.vae import VAE
from pvae.inference.families import Delta, DiagonalNormal
from pvae.inference.guides import Amortized, PerDatapoint
from pvae.recipes import recipe
from pvae.runtime import distributed
from pvae.runtime.pyro_params import local_method
from pvae.runtime.signals import TrainingInterrupt
from pvae.runtime.torch_state import RandomState, seeded
from pvae.runtime.torchrun import PeerFailed, RankInfo
from pvae.stats import number
from pvae.training import checkpoints, data_parallel, loop
from pvae.training.loop import fit
from pvae.training.objectives import ELBO
from pvae.training.optimizer import FusedAdam
from pvae.training.support_check import check_support

ROWS, COLUMNS, BATCH, EPOCHS, SEED = 25, 6, 8, 2, 3
SHARDS = [range(12), range(12, 25)]  # of two processes: 3 batches of 4 each, the last of the second one has 5
NAMED = {
    "Amortized": SOURCES["Amortized"],
    "PerDatapoint": lambda model, D, M, N: PerDatapoint(N, DiagonalNormal(D), model=model, local_steps=2),
    "Delta": lambda model, D, M, N: Amortized(nn.Linear(M, D), Delta(D)),
}


def tiny(binarize="dynamic"):
    """Intensities to be binarized afresh for each batch, and validation rows."""
    random = torch.Generator().manual_seed(0)
    train, held_out = (torch.rand(rows, COLUMNS, generator=random) for rows in (ROWS, 5))
    return Dataset(
        "tiny", train if binarize == "dynamic" else train.round(), held_out.round(), held_out[:0], (COLUMNS,), binarize
    )


class Eventful(VAE):
    """A VAE to which something happens at the call ``at`` of its program."""

    at, calls, event = 0, 0, None

    @local_method
    def model(self, x, index=None):
        self.calls += 1
        if self.calls == self.at:
            self.event()
        super().model(x, index)


def modules(source, rows=ROWS):
    with seeded(0):
        vae = Eventful(MLP(2, COLUMNS, hidden=[4]), Bernoulli(), StandardNormal(2))
        return vae, NAMED[source](vae.model, 2, COLUMNS, rows)


def trained(source, folder, data=None, *, event=None, **options):
    """A fit of the rows that this process owns, kept in a folder."""
    vae, guide = modules(source, len(distributed.shard(ROWS)))
    if event:
        vae.at, vae.event = event
    given = {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 0.01, "seed": SEED, "engine": "pyro"} | options
    # Rows of new data take a second to fit, and the law is the amortized guide's.
    data = data or replace(tiny(), validation=tiny().validation[: 5 if source == "Amortized" else 0])
    return fit(vae.model, guide, data, folder=folder, **given)


# What two processes do: everything in one pair, since starting one takes longer than all of it.


def child(folder):
    """All that two processes are to do, in one of them."""
    distributed.init_process_group()
    told = {"sent": [], "size": sum(p.numel() for m in modules("PerDatapoint") for p in m.parameters())}
    add = data_parallel.all_reduce_flat
    data_parallel.all_reduce_flat = lambda terms: (told["sent"].append(sum(t.nbytes for t in terms)), add(terms))[1]
    for engine in ("pyro", "traced"):
        for source in ("Amortized", "PerDatapoint"):
            report = trained(source, folder / f"{source}-{engine}", engine=engine)
            told[f"{source}-{engine}"] = report.history
    data_parallel.all_reduce_flat = add
    trained("Delta", folder / "Delta", tiny("none"), batch_size=26)
    trained("PerDatapoint", folder / "resumed", epochs=1)
    trained("PerDatapoint", folder / "resumed", resume=True)
    trained("PerDatapoint", folder / "of one", epochs=1, resume=True)  # which one process has written
    told["stop"] = stopped(folder / "stopped")
    trained("PerDatapoint", folder / "stopped", resume=True)
    told["broken"] = broken(folder)
    told["full"] = full(folder / "full")
    data_parallel.all_reduce_flat = lambda terms: [total / distributed.world_size() for total in add(terms)]
    trained("Amortized", folder / "mean")
    data_parallel.all_reduce_flat = add
    told["lines"] = [command(line, folder) for line in LINES]
    (folder / f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))


def stopped(folder):
    """How a training ends in which the second process alone is sent a signal, in its second step."""
    event = (1 + 2 + 1, lambda: signal.raise_signal(signal.SIGTERM)) if distributed.rank() else None
    with pytest.raises(TrainingInterrupt) as stop:
        trained("PerDatapoint", folder, event=event)
    return str(stop.value)


def broken(folder):
    """How a training ends in which the second process's loss alone turns NaN."""

    def spoil():
        raise data_parallel.NonFiniteLoss("the log-density of site 'x' is not finite")

    with pytest.raises((UserError, PeerFailed)) as error:
        trained("Amortized", folder / "broken", event=(4, spoil) if distributed.rank() else None)
    return [type(error.value).__name__, str(error.value)]


def full(folder):
    """How a training ends in which the second process alone can't write its part, after a checkpoint was kept."""

    def refuse(folder, part, tensors):
        raise UserError("no space")

    trained("Amortized", folder, epochs=1)
    write = checkpoints.write_part
    checkpoints.write_part = refuse if distributed.rank() else write
    with pytest.raises((UserError, PeerFailed)) as error:
        trained("Amortized", folder, resume=True)
    checkpoints.write_part = write
    return [type(error.value).__name__, str(error.value)]


LINES = (
    "fit --data {0}/rows.npy --batch-size 7 --out {0}/run",
    "fit --data {0}/rows.npy --likelihood Gaussian --guide PerDatapoint --latent 2 --epochs 30 --out {0}/run",
    "evaluate {0}/run",
)


def command(line, folder):
    """Exit status and both outputs of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = app.main(line.format(folder).split())
    return status, out.getvalue(), err.getvalue()


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.append("tests")
import tests.training.test_data_parallel as test_distributed
test_distributed.child(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of what two processes have done, and what each has told."""
    folder = tmp_path_factory.mktemp("two")
    trained("PerDatapoint", folder / "of one", epochs=1)
    random = np.random.default_rng(0)
    np.save(folder / "rows.npy", 5 * random.random((60, 1)) + random.random((60, 6)))  # one factor and noise
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder)],
            cwd=Path(__file__).parents[2],
            env=os.environ | given | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return folder, [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]


def by_hand(source):
    """The same fit in this process alone: the shards' batches, draws and gradients in turn, then a step on the sum."""
    vae, guide = modules(source)
    data, optimizer = tiny(), FusedAdam(vae, guide, learning_rate=0.01)
    seeds = [int(np.random.SeedSequence([SEED, rank]).generate_state(1)[0]) for rank in range(2)]
    streams = [stream_after_the_check(vae, data, own, s) for own, s in zip(SHARDS, seeds, strict=True)]
    vae.train(), guide.train()
    for epoch in range(EPOCHS):
        orders = [own.start + order(len(own), seed, epoch) for own, seed in zip(SHARDS, seeds, strict=True)]
        for indices in zip(orders[0].split(4), orders[1].split([4, 4, 5]), strict=True):
            for rank, index in enumerate(indices):
                streams[rank].restore()
                x = torch.bernoulli(data.train[index])
                ELBO().differentiable_loss(vae.model, guide, x, index).backward()
                streams[rank] = RandomState()
                for table in optimizer.tables:
                    table.step_local_params()
            optimizer.step_parameters()
    owners = {"model": vae, "guide": guide}
    names = {id(p): f"adam.{kind}.{n}" for kind, owner in owners.items() for n, p in owner.named_parameters()}
    own = {f"{kind}.{n}": tensor for kind, owner in owners.items() for n, tensor in owner.state_dict().items()}
    return own | optimizer.state_tensors(names)


def stream_after_the_check(vae, data, own, seed):
    """The random stream of this seed after the draw with which a fit looks at the support."""
    with seeded(seed):
        check_support(vae.model, replace(data, train=data.train[own.start : own.stop]))
        return RandomState()


def order(rows, seed, epoch):
    """The order of an epoch."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def kept(folder, but="random."):
    """The tensors of a checkpoint."""
    return {name: tensor for name, tensor in checkpoints.read(folder)[0].items() if not name.startswith(but)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name], values, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("engine", ["pyro", "traced"])
@pytest.mark.parametrize("source", ["Amortized", "PerDatapoint"])
def test_two_processes_find_what_one_finds_that_adds_their_gradients(source, engine, two):
    folder, told = two
    with seeded(0):
        close(kept(folder / f"{source}-{engine}"), by_hand(source))
    first, second = (each[f"{source}-{engine}"] for each in told)
    assert [row["objective"] for row in first] == [row["objective"] for row in second]
    assert [row.get("validation_elbo") for row in first] == [row.get("validation_elbo") for row in second]


def test_without_noise_they_find_what_plain_training_on_all_rows_finds(two, tmp_path):
    trained("Delta", tmp_path, tiny("none"), batch_size=26)
    close(kept(two[0] / "Delta"), kept(tmp_path))


def test_the_mean_of_gradients_would_be_seen(two):
    with seeded(0), pytest.raises(AssertionError, match="exp_avg"):
        close(kept(two[0] / "mean"), by_hand("Amortized"))


def test_nothing_is_sent_but_gradients_of_global_parameters(two):
    for told in two[1]:
        sent, steps, flags = told["sent"], 3 * EPOCHS, 2
        per_datapoint = sent[-steps:]  # of the last fit
        assert per_datapoint == [4 * (told["size"] + flags)] * steps


def test_going_on_is_the_whole_bit_for_bit(two):
    whole = checkpoints.read(two[0] / "PerDatapoint-pyro", (), SHARDS[1])[0]
    for name in ("resumed", "stopped"):
        assert same(checkpoints.read(two[0] / name, (), SHARDS[1])[0], whole)


def test_a_signal_to_one_stops_all_at_the_same_step(two):
    folder, told = two
    assert [each["stop"] for each in told] == [
        f"stopped in epoch 1 by SIGTERM; saved in {folder / 'stopped'}; the same command with resume=True goes on"
    ] * 2


def test_one_that_diverges_ends_all_and_alone_says_why(two):
    first, second = (each["broken"] for each in two[1])
    assert first[0] == "PeerFailed"
    assert second[0] == "UserError"
    assert "diverged in epoch 1: the log-density of site 'x' is not finite" in second[1]


def test_a_part_that_cannot_be_written_ends_all_and_leaves_the_old_checkpoint(two):
    folder, told = two
    assert [each["full"] for each in told] == [["PeerFailed", "process 1 has failed"], ["UserError", "no space"]]
    assert checkpoints.read(folder / "full")[1]["epoch"] == 1


def test_a_checkpoint_of_one_is_read_by_two_and_the_reverse(two, tmp_path):
    folder = two[0]
    trained("PerDatapoint", tmp_path / "one", epochs=1)
    assert len(checkpoints.read(folder / "of one")[1]["parts"]) == 2
    assert same(kept(folder / "of one"), kept(tmp_path / "one"))
    before = kept(folder / "resumed")
    trained("PerDatapoint", folder / "resumed", resume=True)
    assert same(kept(folder / "resumed"), before)
    assert not list((folder / "resumed").glob(checkpoints.PARTS))


def test_a_change_of_processes_is_said_and_the_rows_go_on(two, capsys):
    trained("PerDatapoint", two[0] / "PerDatapoint-traced", resume=True, epochs=EPOCHS + 1)
    assert "2 processes before, 1 now: epoch 3 and the draws begin anew" in capsys.readouterr().err
    assert (kept(two[0] / "PerDatapoint-traced")["guide.row_steps"] == 2 * (EPOCHS + 1)).all()


def test_the_command_line_speaks_once(two):
    first, second = (each["lines"] for each in two[1])
    assert [line[0] for line in first] == [line[0] for line in second] == [2, 0, 2]
    assert all(out == err == "" for _, out, err in second)
    assert "--batch-size is 7, but 2 processes share it; set a multiple of 2" in first[0][2]
    assert first[2][2].startswith("error: pvae evaluate is a job for one process")


def test_their_run_is_loaded_and_judged_by_one(two):
    folder = two[0] / "run"
    own = recipe.read_recipe(folder)
    data = recipe.load_recipe_data(own)
    loaded = run_folder.load_fit(folder, data)
    model, guide = loaded.model, loaded.guide
    found = bounds(model, guide, data.test, K=10, seed=own.seed).summary()["elbo"]
    assert f"test ELBO {number(found)} nats over 12 rows" in two[1][0]["lines"][1][1]
    places = torch.arange(48)
    own, others = (bounds(model, guide, data.train, i).summary()["elbo"] for i in (places, places.roll(24)))
    assert own.mean > others.mean + 3 * others.se


# What needs no second process


def place(monkeypatch, rank, world):
    monkeypatch.setitem(distributed._state, "here", RankInfo(rank, world, rank))


@pytest.mark.parametrize(("rows", "world", "own"), [(25, 2, 4), (24, 2, 4), (7, 3, 1), (10, 4, 5), (3, 3, 8)])
def test_shards_and_their_batches_hold_each_row_once_in_as_many_steps(rows, world, own, monkeypatch):
    whole = Dataset("rows", torch.arange(rows).float().unsqueeze(1), *[torch.zeros(0, 1)] * 2, (1,))
    steps, seen = -(-(rows // world) // own), []
    for rank in range(world):
        place(monkeypatch, rank, world)
        shard = whole.shard()
        batches = [x for x, _ in shard.batches(own, 0, 0, 0, steps)]
        assert len(batches) == steps
        assert all(1 <= len(x) <= own + 1 for x in batches)
        seen.append(torch.cat(batches))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert sorted(torch.cat(seen).flatten().tolist()) == list(range(rows))


def test_a_shard_on_disk_reads_its_own_rows(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.arange(40, dtype=np.float32).reshape(10, 4))
    train = MemmapRows(tmp_path / "x.npy", np.array([3, 1, 4, 5, 9, 2, 6]))
    whole = Dataset("x", train, torch.zeros(0, 4), torch.zeros(0, 4), (4,))
    place(monkeypatch, 1, 2)
    monkeypatch.setattr(MemmapRows, "_read", lambda self, places: torch.tensor(places))
    shard = whole.shard()
    assert sorted(torch.cat([x for x, _ in shard.batches(2, 0, 0)]).tolist()) == [2, 5, 6, 9]


def test_streams_are_each_process_s_own_and_one_alone_has_the_seed(monkeypatch):
    found = {distributed.rank_seed(SEED)}
    assert found == {SEED}
    for rank in range(4):
        place(monkeypatch, rank, 4)
        found.add(distributed.rank_seed(SEED))
    assert len(found) == 5


def parted(folder, tensors, mark, rows=7):
    """A checkpoint of three processes, but for the file that names its parts."""
    parts = [
        checkpoints.CheckpointShard(f"checkpoint.{mark}-{a}.safetensors", a, b) for a, b in ((0, 2), (2, 4), (4, rows))
    ]
    for part in parts:
        stream = {"random.cpu": torch.full((2,), part.start)}
        checkpoints.write_part(folder, part, {n: t[part.start : part.stop] for n, t in tensors.items()} | stream)
    return {"parts": parts}


def test_parts_give_the_tensors_of_the_single_file_for_any_rows(tmp_path):
    table = {"guide.table": torch.randn(7, 3), "guide.row_steps": torch.arange(7, dtype=torch.int32)}
    shared = {"model.weight": torch.randn(2, 2)}
    checkpoints.write(tmp_path / "one", shared | table, {})
    header = parted(tmp_path / "three", table, "a")
    checkpoints.write(tmp_path / "three", shared, header)
    for rows in (None, range(7), range(3), range(3, 7), range(1, 6), range(2, 4)):
        own = slice(None) if rows is None else slice(rows.start, rows.stop)
        expected = shared | {name: tensor[own] for name, tensor in table.items()}
        for kind in ("one", "three"):
            found = checkpoints.read(tmp_path / kind, set(table), rows)[0]
            stream = found.pop("random.cpu", None)
            assert same(found, expected)
            assert (stream is not None) == (kind == "three" and rows == range(2, 4))


def test_a_checkpoint_is_the_old_one_until_its_last_file_is_written(tmp_path):
    old, new = ({"guide.table": torch.full((7, 3), value)} for value in (1.0, 2.0))
    checkpoints.write(tmp_path, {}, parted(tmp_path, old, "old"))
    header = parted(tmp_path, new, "new")
    assert same(kept(tmp_path), old)
    checkpoints.write(tmp_path, {}, header)
    assert same(kept(tmp_path), new)
    assert {path.name for path in tmp_path.glob(checkpoints.PARTS)} == {part.file for part in header["parts"]}


def test_a_checkpoint_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    old, new = ({"guide.table": torch.full((7, 3), value)} for value in (1.0, 2.0))
    checkpoints.write(tmp_path, {}, parted(tmp_path, old, "old"))
    read_part, replaced = checkpoints._read_part, []

    def slow(folder, part, rows):
        if part.start == 2 and not replaced:
            replaced.append(checkpoints.write(tmp_path, {}, parted(tmp_path, new, "new")))
        return read_part(folder, part, rows)

    monkeypatch.setattr(checkpoints, "_read_part", slow)
    assert same(kept(tmp_path), new)


def test_missing_parts_are_said_in_a_line(tmp_path):
    checkpoints.write(tmp_path, {}, parted(tmp_path, {"guide.table": torch.zeros(7, 3)}, "a"))
    checkpoints.remove(tmp_path)
    with pytest.raises(UserError, match="parts that it names are missing"):
        checkpoints.read(tmp_path)


def test_too_few_rows_for_so_many_processes_are_refused(monkeypatch):
    place(monkeypatch, 0, 26)
    with pytest.raises(UserError, match="25 training rows are too few for 26 processes"):
        loop.check_budget(tiny(), 1, 26, 0.1, None)
