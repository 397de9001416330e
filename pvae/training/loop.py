"""Training: one loop around Pyro's SVI, on resident data, that can be stopped at any step and goes on bit for bit."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pvae.data.dataset import Dataset
from pvae.errors import UserError
from pvae.inference.guides import Guide
from pvae.inference.importance import log_weights
from pvae.runtime import distributed
from pvae.runtime.files import write_text
from pvae.runtime.precision import matmul_precision
from pvae.runtime.progress import progress_bar
from pvae.runtime.pyro_params import Program, module_of
from pvae.runtime.signals import TrainingInterrupt, handle_first_signal
from pvae.runtime.torch_state import RandomState, no_validation, pick_device, seeded
from pvae.training import checkpoints
from pvae.training.cuda_graph import CudaGraphStep, with_cuda_graph
from pvae.training.data_parallel import DataParallelStep, data_parallel_step, supported_engine
from pvae.training.engines import EngineChoice, check_engine, choose_engine, recheck_engine
from pvae.training.objectives import ELBO, NonFiniteLoss, Objective
from pvae.training.optimizer import FusedAdam
from pvae.training.support import check_support

# Seconds between checkpoints: each epoch's end is one, unless the last is younger than this.
CHECKPOINT_SECONDS = 2.0


@dataclass
class Fit:
    """What a fit did.

    Attributes:
        history: a row for each epoch: ``epoch``, ``seconds`` of training so far, ``objective`` (its bound as it was
            trained, mean over the epoch, nats per datapoint) and ``validation_elbo`` where there is a validation split.
        seconds: of training, recording and compiling included, interruptions left out.
        stopped: why it ended: ``finished`` or ``early``.
        engine: which one made the steps, and why, in a line.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str = "finished"
    engine: str = ""


def fit(
    model: Program,
    guide: Program,
    data: Dataset | Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    objective: Objective | None = None,
    patience: int | None = None,
    seed: int = 0,
    device: str = "auto",
    engine: str = "auto",
    precision: str = "float32",
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Fit:
    r"""Maximize a bound over model and guide together, by default :math:`\sum_i E_q[\log p(x_i, z) - \log q(z|x_i)]`.

    Arguments:
        model, guide: Pyro programs of one signature ``(x, index)``: modules, or methods of modules.
        data: what to train on; a tensor [N, D] stands for a data set without test rows.
        epochs: visits of every datapoint.
        batch_size: datapoints in a step.
        learning_rate: of Adam on the global parameters.
        objective: the bound; the ELBO unless given.
        patience: stop when the validation ELBO has not risen for so many epochs, and go back to the best.
        seed: of batches and draws; the random stream outside is left alone.
        device: ``auto``, ``cpu`` or ``cuda``; model and guide are moved there.
        engine: how a step is made, see `engines`: ``pyro`` by ``SVI.step``, ``traced`` by replaying what it
            does, ``compiled`` by Inductor, ``graph`` in a CUDA graph; ``auto`` takes the quickest for this device and
            number of steps.
        precision: of the networks' layers, see `matmul_precision`.
        folder: where to keep checkpoints.
        resume: go on from the folder's checkpoint; on the CPU, to bit-identical results.
        progress: show a progress bar.

    Raises:
        UserError: a budget out of range, data outside the support, a checkpoint that doesn't fit, or a log-density
            that turns NaN (names epoch and site; the last good checkpoint stays).
        TrainingInterrupt: Ctrl-C or SIGTERM, after saving.
    """
    if isinstance(data, Tensor):
        data = Dataset("data", data, data[:0], data[:0], tuple(data.shape[1:]))
    place = pick_device(device)
    with (
        seeded(distributed.rank_seed(seed)),
        no_validation(),
        pyro.get_param_store().scope(),
        matmul_precision(precision, place),
    ):
        with distributed.fail_together():
            check_budget(data, epochs, batch_size, learning_rate, patience)
            check_engine(engine)
            steps = (batch_size, learning_rate, objective or ELBO())
            loop = _Loop(model, guide, data, distributed.local_device(place), *steps, patience, seed, folder)
            check_support(model, loop.data)
            if resume:
                loop.restore()
        wanted = progress and distributed.is_main_process()
        with (
            handle_first_signal(loop.caught.append),
            progress_bar("epochs", epochs, done=loop.epoch, wanted=wanted) as show,
        ):
            if loop.epoch < epochs and loop.report.stopped != "early":
                loop.start(engine, epochs, progress)
            while loop.epoch < epochs and loop.report.stopped != "early":
                loop.run_epoch()
                row, speed = loop.report.history[-1], loop.epoch / max(loop.report.seconds, 1e-9)
                show(loop.epoch, f"objective {row['objective']:.2f} nats, {speed:.3g} epochs/s")
            if number := distributed.all_reduce_max(max(loop.caught, default=0)):
                loop.interrupted(number)
        loop.finish()
    return loop.report


def check_budget(data: Dataset, epochs: int, batch_size: int, learning_rate: float, patience: int | None) -> None:
    """Refuse a training budget that is out of range; the message names the flag."""
    for name, value, least in (("epochs", epochs, 0), ("batch-size", batch_size, 1), ("patience", patience, 1)):
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}, but it must be at least {least}")
    if not 0 < learning_rate < float("inf"):
        raise UserError(f"--learning-rate is {learning_rate}, but it must be positive")
    if batch_size % distributed.world_size():
        raise UserError(
            f"--batch-size is {batch_size}, but {distributed.world_size()} processes share it; give a multiple"
        )
    if len(data.train) < distributed.world_size():
        raise UserError(
            f"{len(data.train)} training rows are too few for {distributed.world_size()} processes; start fewer"
        )
    if patience is not None and not len(data.validation):
        raise UserError("--patience: early stopping needs validation rows; give --validation-size")


class _Loop:
    """The state of a training run: everything that a checkpoint holds, and the step that changes it."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: Dataset,
        device: torch.device,
        batch_size: int,
        learning_rate: float,
        objective: Objective,
        patience: int | None,
        seed: int,
        folder: Path | None,
    ) -> None:
        self.model, self.guide, self.data = model, guide, data.shard().to(device)
        self.rows, self.batch_size, self.patience, self.folder = len(data.train), batch_size, patience, folder
        self.seed, self.share = distributed.rank_seed(seed), batch_size // distributed.world_size()
        # Shards' sizes differ by a row at most. Where that row would take a step of its own, it joins the last one's.
        self.steps = -(-(self.rows // distributed.world_size()) // self.share)
        self.modules = {"model": module_of(model), "guide": module_of(guide)}
        for module in self.modules.values():
            module.to(device).train()
        self.optimizer, self.objective = FusedAdam(*self.modules.values(), learning_rate=learning_rate), objective
        self.names = {id(p): f"adam.{k}.{n}" for k, m in self.modules.items() for n, p in m.named_parameters()}
        self.report, self.epoch, self.batch = Fit(), 0, 0
        self.total: float | Tensor = 0.0
        self.best: dict[str, Tensor] = {}
        self.caught: list[int] = []
        self.tables = self._table_names()
        self.example: Sequence[Tensor] = ()
        self.digest = data.digest if folder and distributed.is_main_process() else ""
        self.saved_at = time.perf_counter()

    def start(self, asked: str, epochs: int, progress: bool) -> None:
        """Choose how steps are made: a run that goes on keeps its engine, and with it its bits."""
        begin, engine = time.perf_counter(), asked
        if engine == "auto" and self.report.engine:
            engine = self.report.engine.split(":")[0]
        steps, stream = epochs * self.steps, RandomState()
        batches = self.data.batches(self.share, self.seed, 0, steps=self.steps)
        self.example = example = next(batches)
        self._tell_epoch()
        parts = (self.model, self.guide, self.optimizer, self.objective)
        engine = supported_engine(engine, self.data.train.device)
        self.engine: EngineChoice = choose_engine(engine, parts, (example, next(batches, example)), steps)
        if distributed.world_size() > 1:
            self.engine = data_parallel_step(self.engine, parts, self.caught)
        else:
            self.engine = with_cuda_graph(self.engine, engine, self.data, self.share)
        if not self.report.engine.startswith(f"{self.engine.name}:"):
            self._say_engine(progress or asked not in ("auto", self.engine.name))
        stream.restore()
        self.report.seconds += time.perf_counter() - begin

    def _say_engine(self, aloud: bool) -> None:
        self.report.engine = f"{self.engine.name}: {self.engine.why}"
        if aloud and distributed.is_main_process():
            print(f"  engine {self.report.engine}", file=sys.stderr, flush=True)

    def _confirm_engine(self) -> None:
        """After the first epoch, when parameters have moved: does a recording still give Pyro's loss?"""
        parts = (self.model, self.guide, self.optimizer, self.objective)
        if distributed.world_size() == 1 and self.example:
            found, self.example = recheck_engine(self.engine, parts, self.example), ()
            if found is not self.engine:
                self.engine = found
                self._say_engine(True)

    def run_epoch(self) -> None:
        """The rest of the current epoch, its row in the history, and a checkpoint where one is due."""
        start = time.perf_counter()
        source = self.engine.step if isinstance(self.engine.step, CudaGraphStep) else self.data
        for batch in source.batches(self.share, self.seed, self.epoch, self.batch, self.steps):
            self._tell_epoch()
            try:
                self.total -= self.engine.step(*batch)
            except NonFiniteLoss as error:
                raise self._diverged(str(error), self.epoch + 1) from error
            self.batch += 1
            if number := self._signal():
                self.report.seconds += time.perf_counter() - start
                self.interrupted(number)
        self.report.seconds += time.perf_counter() - start
        self._confirm_engine()
        mean = float(self.total) / self.rows
        with distributed.fail_together():
            if not math.isfinite(mean):
                raise self._diverged("the loss is not finite", self.epoch + 1)
        row = {"epoch": self.epoch + 1, "seconds": self.report.seconds, "objective": mean}
        self.epoch, self.batch, self.total = self.epoch + 1, 0, 0.0
        if len(self.data.validation):
            row["validation_elbo"] = self._validate()
        self.report.history.append(row)
        if self.patience:
            self._stop_early(self.patience)
        if distributed.broadcast_int(time.perf_counter() - self.saved_at > CHECKPOINT_SECONDS):
            self.save()

    def _signal(self) -> int:
        """A signal that training is to end for: one that all processes know of."""
        step = self.engine.step
        return step.signal if isinstance(step, DataParallelStep) else max(self.caught, default=0)

    def _tell_epoch(self) -> None:
        """Where training stands, for what changes with it: the KL weight of objective and rows' own bound."""
        epoch = self.epoch + self.batch * self.batch_size / self.rows
        self.objective.weight = self.objective.weight_at(epoch)
        if isinstance(self.modules["guide"], Guide):
            self.modules["guide"].kl_weight = self.objective.weight

    def finish(self) -> None:
        """Save, go back to the best epoch if there was early stopping, and leave the modules ready to evaluate."""
        self._tell_epoch()
        self.save()
        if self.best:
            self._load_modules(self.best)
        for module in self.modules.values():
            module.eval()

    def _validate(self) -> float:
        with seeded(self.seed), torch.no_grad():
            for module in self.modules.values():
                module.eval()
            own = distributed.shard(len(self.data.validation))
            rows = self.data.validation[own.start : own.stop].split(1024) if own else ()
            total = sum(log_weights(self.model, self.guide, x, None, 8).log_w.mean(0).sum().item() for x in rows)
            for module in self.modules.values():
                module.train()
        return distributed.all_reduce_sum(total) / len(self.data.validation)

    def _stop_early(self, patience: int) -> None:
        values = [row["validation_elbo"] for row in self.report.history]
        top = max(range(len(values)), key=values.__getitem__)
        if top == len(values) - 1:
            self.best = {name: tensor.clone() for name, tensor in self._module_tensors().items()}
        if len(values) - 1 - top >= patience:
            self.report.stopped = "early"

    def _module_tensors(self) -> dict[str, Tensor]:
        return {f"{kind}.{name}": t for kind, m in self.modules.items() for name, t in m.state_dict().items()}

    def _load_modules(self, tensors: dict[str, Tensor]) -> None:
        for kind, module in self.modules.items():
            checkpoints.load_module(module, kind, tensors, self.folder or Path())

    def _table_names(self) -> set[str]:
        """Names of the tensors that have a row for each datapoint."""
        rows = {id(values) for table in self.optimizer.tables for values in table.buffers(recurse=False)}
        own = {f"{k}.{n}" for k, m in self.modules.items() for n, t in m.named_buffers() if id(t) in rows}
        return own | {f"{checkpoints.BEST}{name}" for name in own}

    def save(self) -> None:
        """Write a checkpoint, unless a parameter is no longer finite: the last good one stays."""
        with distributed.fail_together():
            tensors = self._finite()
        if self.folder is None:
            return
        tensors |= self.optimizer.state_tensors(self.names)
        tensors |= {f"{checkpoints.BEST}{name}": tensor for name, tensor in self.best.items()}
        own = {name: tensors.pop(name) for name in self.tables & tensors.keys()}
        own[f"{checkpoints.RANDOM}cpu"] = torch.get_rng_state()
        if self.data.train.is_cuda:
            own[f"{checkpoints.RANDOM}cuda"] = torch.cuda.get_rng_state()
        position = {"epoch": self.epoch, "batch": self.batch, "total": float(self.total), "digest": self.digest}
        header = position | {
            "seconds": self.report.seconds,
            "stopped": self.report.stopped,
            "engine": self.report.engine,
            "history": self.report.history,
        }
        if distributed.world_size() == 1:
            checkpoints.write(self.folder, tensors | own, header)
        else:
            self._save_shared(self.folder, tensors, own, header)
        if distributed.is_main_process():
            columns = list(self.report.history[0]) if self.report.history else ["epoch", "seconds", "objective"]
            rows = [",".join(str(row[name]) for name in columns) for row in self.report.history]
            write_text(self.folder / "history.csv", "\n".join([",".join(columns), *rows]) + "\n")
        self.saved_at = time.perf_counter()

    def _finite(self) -> dict[str, Tensor]:
        tensors = self._module_tensors()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self._diverged(f"parameter '{name}' is not finite", self.epoch + bool(self.batch))
        return tensors

    def _save_shared(
        self, folder: Path, tensors: dict[str, Tensor], own: dict[str, Tensor], header: dict[str, Any]
    ) -> None:
        """Each process writes its part, then the first one what they share: until then the old checkpoint is valid."""
        mark = distributed.broadcast_int(time.time_ns())
        shares = enumerate(distributed.shards(self.rows))
        parts = [
            checkpoints.CheckpointShard(f"checkpoint.{mark:x}-{r}.safetensors", s.start, s.stop) for r, s in shares
        ]
        with distributed.fail_together():
            checkpoints.write_part(folder, parts[distributed.rank()], own)
        with distributed.fail_together():
            if distributed.is_main_process():
                checkpoints.write(folder, tensors, header | {"parts": parts})

    def restore(self) -> None:
        """Take up the folder's checkpoint."""
        if self.folder is None:
            raise UserError("resume needs the folder of the run")
        own = distributed.shard(self.rows) if distributed.world_size() > 1 else None
        tensors, header = checkpoints.read(self.folder, self.tables, own)
        if distributed.is_main_process() and header["digest"] != self.digest:
            raise UserError(f"--resume: {self.folder} was fitted to other rows than {self.data.identity} has now")
        self._load_modules(tensors)
        self.optimizer.load_tensors(self.names, tensors)
        self.best = checkpoints.best_params(tensors)
        self.epoch, self.batch, self.total = header["epoch"], header["batch"], header["total"]
        self.report = Fit(header["history"], header["seconds"], header["stopped"], header.get("engine", ""))
        before = len(header.get("parts", [checkpoints.FILE]))
        if before != distributed.world_size():
            self._begin_anew(before)
            return
        torch.set_rng_state(tensors[f"{checkpoints.RANDOM}cpu"])
        if self.data.train.is_cuda and f"{checkpoints.RANDOM}cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{checkpoints.RANDOM}cuda"])

    def _begin_anew(self, before: int) -> None:
        """Other shards have other batches: begin the epoch anew, with draws of its own."""
        self.batch, self.total = 0, 0.0
        if distributed.is_main_process():
            now = f"{before} processes before, {distributed.world_size()} now"
            print(f"--resume: {now}: epoch {self.epoch + 1} and the draws begin anew", file=sys.stderr)

    def interrupted(self, number: int) -> None:
        """Save, and say which signal stopped the run and how to go on."""
        self.save()
        kept = f"saved in {self.folder}; the same command with --resume goes on" if self.folder else "nothing was kept"
        raise TrainingInterrupt(f"stopped in epoch {self.epoch + 1} by {signal.Signals(number).name}; {kept}", number)

    def _diverged(self, reason: str, epoch: int) -> UserError:
        there = self.folder is not None and (self.folder / checkpoints.FILE).is_file()
        kept = f"; the last good checkpoint is kept in {self.folder}" if there else ""
        return UserError(f"training diverged in epoch {epoch}: {reason}; lower --learning-rate{kept}")
