"""Training loop around Pyro's SVI: epochs, validation, early stopping and checkpoints that resume bit for bit."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae.data.dataset import Dataset
from pvae.data.sources import SPLITS
from pvae.errors import UserError, check_range, param
from pvae.inference.batching import inference_mode
from pvae.inference.guides import Guide
from pvae.inference.importance import log_weights
from pvae.runtime import distributed
from pvae.runtime.files import write_text
from pvae.runtime.precision import matmul_precision
from pvae.runtime.progress import progress_bar
from pvae.runtime.pyro_params import Program, local_param_store, module_of
from pvae.runtime.signals import TrainingInterrupt, handle_first_signal
from pvae.runtime.threads import cpu_threads
from pvae.runtime.torch_state import RandomState, no_validation, pick_device, seeded
from pvae.training import checkpoints
from pvae.training.cuda_graph import with_cuda_graph
from pvae.training.data_parallel import data_parallel_step, supported_engine
from pvae.training.objectives import ELBO, NonFiniteLoss, Objective
from pvae.training.optimizer import FusedAdam
from pvae.training.support_check import check_support
from pvae.training.svi_engines import Parts, check_engine, choose_engine, recheck_engine

# Least seconds between the checkpoints at the ends of epochs.
CHECKPOINT_SECONDS = 2.0


@dataclass
class Fit:
    """Report of a fit.

    Attributes:
        history: a row for each epoch: ``epoch``, ``seconds`` of training so far, ``objective`` (the bound as it was
            trained, mean over the epoch, nats per datapoint) and ``validation_elbo`` where there is a validation split.
        seconds: duration of training, tracing and compiling included, interruptions left out.
        stopped: why training ended: ``finished`` or ``early``.
        engine: name of the engine that made the steps, empty before the first.
        engine_reason: why it was chosen, in a line.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str = "finished"
    engine: str = ""
    engine_reason: str = ""

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> Fit:
        """Return the report in a checkpoint's header; version 0.1 wrote engine and reason as one string.

        >>> header = {"history": [], "seconds": 1.0, "stopped": "finished", "engine": "pyro: as asked"}
        >>> Fit.from_header(header).engine, Fit.from_header(header).engine_reason
        ('pyro', 'as asked')
        """
        engine, _, reason = header.get("engine", "").partition(": ")
        return cls(header["history"], header["seconds"], header["stopped"], engine, header.get("engine_reason", reason))


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
    check_data: bool = True,
) -> Fit:
    r"""Train model and guide by stochastic variational inference (SVI).

    By default they maximize the ELBO, :math:`\sum_i E_q[\log p(x_i, z) - \log q(z|x_i)]`.

    Arguments:
        model, guide: Pyro programs of one signature ``(x, index)``: modules, or methods of modules.
        data: training data; a tensor [N, D] stands for a data set without test rows.
        epochs: number of passes over the training rows.
        batch_size: datapoints in a step.
        learning_rate: of Adam on the global parameters.
        objective: the bound to maximize; `ELBO` by default.
        patience: epochs without a rise of the validation ELBO after which training stops and returns to the best epoch.
        seed: of batches and draws; the random stream outside is left alone.
        device: ``auto``, ``cpu`` or ``cuda``; model and guide are moved there.
        engine: ``pyro`` (``SVI.step``), ``traced`` (replays the traced step), ``compiled`` (by Inductor), ``graph`` (a
            CUDA graph), or ``auto``, the quickest for this device and number of steps.
        precision: of the networks' layers, see `matmul_precision`.
        folder: where checkpoints are saved.
        resume: go on from the folder's checkpoint; on the CPU, to bit-identical results.
        progress: show a progress bar.
        check_data: refuse data outside the support first; False where the caller has done so.

    Raises:
        UserError: a budget out of range, data outside the support, a checkpoint that doesn't fit, or a log-density
            that turns NaN (names epoch and site; the last good checkpoint stays).
        TrainingInterrupt: Ctrl-C or SIGTERM, after saving.
    """
    if isinstance(data, Tensor):
        data = Dataset("data", data, data[:0], data[:0], tuple(data.shape[1:]))
    target = pick_device(device)
    rank_seed, objective = distributed.rank_seed(seed), objective or ELBO()
    with seeded(rank_seed), no_validation(), local_param_store(), matmul_precision(precision, target):
        with distributed.fail_together():
            check_budget(data, epochs, batch_size, learning_rate, patience)
            check_engine(engine)
            target = distributed.local_device(target)
            modules = [module_of(program).to(target).train() for program in (model, guide)]
            local_elbo = getattr(guide, "local_elbo", None)
            if local_elbo is not None and module_of(local_elbo.model) is not modules[0]:
                other = "the guide refines its rows on another model than the one that is trained"
                raise UserError(other, "give it model= of this one; copy or pickle a model and its guide together")
            optimizer = FusedAdam(*modules, learning_rate=learning_rate)
            loop = _Loop((model, guide, optimizer, objective), data, target, batch_size, rank_seed, folder)
            # Run even if no split is to be checked: its draws come before training's in the random stream.
            check_support(model, loop.data, splits=SPLITS if check_data else ())
            if resume:
                loop.restore()
        loop.run(epochs, patience, engine, progress)
    return loop.report


def check_budget(data: Dataset, epochs: int, batch_size: int, learning_rate: float, patience: int | None) -> None:
    """Refuse a training budget that is out of range."""
    check_range(least=0, epochs=epochs)
    if epochs % 1:
        raise UserError(f"{param('epochs')} is {epochs}, but it must be a whole number")
    check_range(least=1, batch_size=batch_size, patience=1 if patience is None else patience)
    check_range(learning_rate=learning_rate)
    if batch_size % (world := distributed.world_size()):
        shared = f"{param('batch_size')} is {batch_size}, but {world} processes share it"
        raise UserError(shared, f"set a multiple of {world}")
    if len(data.train) < world:
        raise UserError(f"{len(data.train)} training rows are too few for {world} processes; start fewer")
    if patience is not None and not len(data.validation):
        needs = f"{param('patience')}: early stopping needs validation rows"
        raise UserError(needs, f"set {param('validation_size')}")


class _Loop:
    """State of a training run: the content of a checkpoint, and the step that changes it."""

    def __init__(
        self, parts: Parts, data: Dataset, device: torch.device, batch_size: int, seed: int, folder: Path | None
    ) -> None:
        self.data, self.seed, self.folder = data.shard().to(device), seed, folder
        self.num_rows, self.batch_size = len(data.train), batch_size
        self.rank_batch_size = batch_size // distributed.world_size()
        # Shards' sizes differ by a row at most. Where that row would take a step of its own, it joins the last one's.
        self.steps_per_epoch = -(-(self.num_rows // distributed.world_size()) // self.rank_batch_size)
        self.parts, (model, guide, self.optimizer, self.objective) = parts, parts
        self.modules = {"model": module_of(model), "guide": module_of(guide)}
        self.names = {id(p): f"adam.{k}.{n}" for k, m in self.modules.items() for n, p in m.named_parameters()}
        self.report, self.epoch, self.batch = Fit(), 0, 0
        self.total: float | Tensor = 0.0
        self.best: dict[str, Tensor] = {}
        self.caught: list[int] = []
        # Signals to stop for: with several ranks those that all ranks know of.
        self.agreed = self.caught if distributed.world_size() == 1 else []
        rows = self.optimizer.row_tables()
        tables = {f"{k}.{n}" for k, m in self.modules.items() for n, t in m.named_buffers() if id(t) in rows}
        # Names of the tensors that have a row for each datapoint.
        self.tables = tables | {f"{checkpoints.BEST}{name}" for name in tables}
        self.example: Sequence[Tensor] = ()
        self.digest = data.digest if folder and distributed.is_main_process() else ""
        self.saved_at = time.perf_counter()

    def run(self, epochs: int, patience: int | None, engine: str, progress: bool) -> None:
        """Train until so many epochs are done or early stopping ends them, save, and leave the modules in eval mode."""
        with (
            handle_first_signal(self.caught.append),
            progress_bar("epochs", epochs, done=self.epoch, wanted=progress and distributed.is_main_process()) as show,
        ):
            if self.epoch < epochs and self.report.stopped != "early":
                self._start(engine, epochs, progress)
            while self.epoch < epochs and self.report.stopped != "early":
                self._run_epoch(patience)
                row, speed = self.report.history[-1], self.epoch / max(self.report.seconds, 1e-9)
                show(self.epoch, f"objective {row['objective']:.2f} nats, {speed:.3g} epochs/s")
            if number := distributed.all_reduce_max(max(self.caught, default=0)):
                self._interrupt(number)
        self._set_kl_weight()
        self._save()
        if self.best:
            self._load_modules(self.best)
        for module in self.modules.values():
            module.eval()

    def _start(self, requested: str, epochs: int, progress: bool) -> None:
        """Choose how steps are made: a resumed run keeps its engine, and with it its bits."""
        start, stream = time.perf_counter(), RandomState()
        resumed = self.report.engine if requested == "auto" else ""
        engine = supported_engine(resumed or requested, self.data.train.device)
        batches = self.data.batches(self.rank_batch_size, self.seed, 0, steps=self.steps_per_epoch)
        self.example = example = next(batches)
        self._set_kl_weight()
        pair = (example, next(batches, example))
        self.engine = choose_engine(engine, self.parts, pair, epochs * self.steps_per_epoch)
        if distributed.world_size() > 1:
            self.engine = data_parallel_step(self.engine, self.parts, self.caught, self.agreed)
        else:
            self.engine = with_cuda_graph(self.engine, engine, self.data, self.rank_batch_size)
        if self.report.engine != self.engine.name:
            self._report_engine(progress or requested not in ("auto", self.engine.name))
        stream.restore()
        self.report.seconds += time.perf_counter() - start

    def _report_engine(self, show: bool) -> None:
        self.report.engine, self.report.engine_reason = self.engine.name, self.engine.reason
        if show and distributed.is_main_process():
            print(f"  engine {self.engine.name}: {self.engine.reason}", file=sys.stderr, flush=True)

    def _recheck_engine(self) -> None:
        """Compare the traced step with Pyro's loss once more after the first epoch, when parameters have moved."""
        if distributed.world_size() == 1 and self.example:
            before, self.engine = self.engine, recheck_engine(self.engine, self.parts, self.example)
            self.example = ()
            if self.engine is not before:
                self._report_engine(True)

    def _run_epoch(self, patience: int | None) -> None:
        """Run the rest of the current epoch, add its row to the history, and save if a checkpoint is due."""
        self._run_steps()
        self._recheck_engine()
        mean = float(self.total) / self.num_rows
        with distributed.fail_together():
            if not math.isfinite(mean):
                raise self._diverged("the loss is not finite", self.epoch + 1)
        row = {"epoch": self.epoch + 1, "seconds": self.report.seconds, "objective": mean}
        self.epoch, self.batch, self.total = self.epoch + 1, 0, 0.0
        if len(self.data.validation):
            row["validation_elbo"] = self._validate()
        self.report.history.append(row)
        if patience:
            self._stop_early(patience)
        if distributed.broadcast_int(time.perf_counter() - self.saved_at > CHECKPOINT_SECONDS):
            self._save()

    def _run_steps(self) -> None:
        start, batches = time.perf_counter(), self.engine.batches or self.data.batches
        with cpu_threads(self.engine.op_size):
            for batch in batches(self.rank_batch_size, self.seed, self.epoch, self.batch, self.steps_per_epoch):
                self._set_kl_weight()
                try:
                    self.total -= self.engine.step(*batch)
                except NonFiniteLoss as error:
                    raise self._diverged(str(error), self.epoch + 1) from error
                self.batch += 1
                if self.agreed:
                    self.report.seconds += time.perf_counter() - start
                    self._interrupt(max(self.agreed))
        self.report.seconds += time.perf_counter() - start

    def _set_kl_weight(self) -> None:
        """Set the KL weight of the objective and of the guide's local ELBO for the current (fractional) epoch."""
        epoch = self.epoch + self.batch * self.batch_size / self.num_rows
        self.objective.weight = self.objective.weight_at(epoch)
        if isinstance(self.modules["guide"], Guide):
            self.modules["guide"].kl_weight = self.objective.weight

    def _validate(self) -> float:
        """Return the ELBO of the validation rows from 8 draws, in nats per datapoint."""
        model, guide, *_ = self.parts
        shard = distributed.shard(len(self.data.validation))
        batches = self.data.validation[shard.start : shard.stop].split(1024) if shard else ()
        with inference_mode(model, guide, seed=self.seed):
            total = sum(log_weights(model, guide, x, None, 8).log_w.mean(0).sum().item() for x in batches)
        for module in self.modules.values():
            module.train()
        return distributed.all_reduce_sum(total) / len(self.data.validation)

    def _stop_early(self, patience: int) -> None:
        values = [row["validation_elbo"] for row in self.report.history]
        best = max(range(len(values)), key=values.__getitem__)
        if best == len(values) - 1:
            self.best = {name: tensor.clone() for name, tensor in self._module_tensors().items()}
        if len(values) - 1 - best >= patience:
            self.report.stopped = "early"

    def _module_tensors(self) -> dict[str, Tensor]:
        return {f"{kind}.{name}": t for kind, m in self.modules.items() for name, t in m.state_dict().items()}

    def _load_modules(self, tensors: dict[str, Tensor]) -> None:
        for kind, module in self.modules.items():
            checkpoints.load_module(module, kind, tensors, self.folder or Path())

    def _save(self) -> None:
        """Write a checkpoint, unless a parameter is no longer finite: the last good one stays."""
        with distributed.fail_together():
            tensors = self._module_tensors()
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise self._diverged(f"parameter '{name}' is not finite", self.epoch + bool(self.batch))
        if self.folder is None:
            return
        tensors |= self.optimizer.state_tensors(self.names)
        tensors |= {f"{checkpoints.BEST}{name}": tensor for name, tensor in self.best.items()}
        shard = {name: tensors.pop(name) for name in self.tables & tensors.keys()}
        shard[f"{checkpoints.RANDOM}cpu"] = torch.get_rng_state()
        if self.data.train.is_cuda:
            shard[f"{checkpoints.RANDOM}cuda"] = torch.cuda.get_rng_state()
        position = {"epoch": self.epoch, "batch": self.batch, "total": float(self.total), "digest": self.digest}
        checkpoints.write_ranks(self.folder, tensors, shard, position | vars(self.report), self.num_rows)
        if distributed.is_main_process():
            columns = list(self.report.history[0]) if self.report.history else ["epoch", "seconds", "objective"]
            rows = [",".join(str(row[name]) for name in columns) for row in self.report.history]
            write_text(self.folder / "history.csv", "\n".join([",".join(columns), *rows]) + "\n")
        self.saved_at = time.perf_counter()

    def restore(self) -> None:
        if self.folder is None:
            raise UserError(f"{param('resume', True)} needs the folder of the run")
        shard = distributed.shard(self.num_rows) if distributed.world_size() > 1 else None
        tensors, header = checkpoints.read(self.folder, self.tables, shard)
        name = param("resume", True)
        if distributed.is_main_process() and header["digest"] != self.digest:
            raise UserError(f"{name}: {self.folder} was fitted to other rows than {self.data.identity} has now")
        self._load_modules(tensors)
        self.optimizer.load_tensors(self.names, tensors)
        self.best = checkpoints.best_params(tensors)
        self.epoch, self.batch, self.total = header["epoch"], header["batch"], header["total"]
        self.report = Fit.from_header(header)
        world_size = len(header.get("parts", [checkpoints.FILE]))
        if world_size != distributed.world_size():
            self.batch, self.total = 0, 0.0  # other shards have other batches
            if distributed.is_main_process():
                change = f"{world_size} processes before, {distributed.world_size()} now"
                print(f"{name}: {change}: epoch {self.epoch + 1} and the draws begin anew", file=sys.stderr)
            return
        torch.set_rng_state(tensors[f"{checkpoints.RANDOM}cpu"])
        if self.data.train.is_cuda and f"{checkpoints.RANDOM}cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{checkpoints.RANDOM}cuda"])

    def _interrupt(self, number: int) -> None:
        """Save, and say which signal stopped the run and how to go on."""
        self._save()
        how = f"the same command with {param('resume', True)} goes on"
        saved = f"saved in {self.folder}; {how}" if self.folder else "nothing was kept"
        raise TrainingInterrupt(f"stopped in epoch {self.epoch + 1} by {signal.Signals(number).name}; {saved}", number)

    def _diverged(self, reason: str, epoch: int) -> UserError:
        has_checkpoint = self.folder is not None and (self.folder / checkpoints.FILE).is_file()
        where = f"; the last good checkpoint is kept in {self.folder}" if has_checkpoint else ""
        return UserError(f"training diverged in epoch {epoch}: {reason}", f"lower {param('learning_rate')}{where}")
