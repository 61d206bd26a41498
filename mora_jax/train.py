"""THE train binary: teaches a frozen model one task after another and fills the matrix R.

    python -m mora_jax.train --config=configs/llm_cl.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]

Read it from top to bottom. It knows neither tokens nor pixels nor experts: it loops over tasks and steps, and asks the
model family for batches, a loss and predictions, the method for what is trained, and the task for a score.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax import config as configs
from mora_jax import experiment
from mora_jax.errors import MoraError
from mora_jax.methods import bank as banks
from mora_jax.methods import boundaries
from mora_jax.methods.method import from_config
from mora_jax.metrics.text import metric
from mora_jax.models import quantised
from mora_jax.planning import report as plans
from mora_jax.planning import topologies
from mora_jax.reporting import page
from mora_jax.runtime import distributed, hosts
from mora_jax.runtime.checkpoint import Checkpoints
from mora_jax.runtime.display import Display
from mora_jax.runtime.family import GateCounts, TrainData
from mora_jax.runtime.optimizer import make_optimizer
from mora_jax.runtime.progress import Progress, Stopped, StopSignals
from mora_jax.runtime.results import Results, versions
from mora_jax.runtime.state import TrainState, count_parameters
from mora_jax.runtime.step import TrainStep
from mora_jax.runtime.steplog import StepLog
from mora_jax.runtime.storage import locked
from mora_jax.runtime.writers import ZERO_SHOT_ROW, MetricsLog, row_name, write_lines

SPACE = "classes that eval.label_space=joint tells apart (scores over other classes cannot stand in one R)"


class Run:
    """One stream in one workdir. The methods stand in the order in which `teach` calls them."""

    def __init__(self, config: Any, workdir: Path, command: str):
        self.config, self.workdir = config, workdir
        self.display, self.signals, self.started = Display(), StopSignals(), time.monotonic()

        with hosts.together() as facts:
            self.load()
            facts |= {f"data of task {task.name}": task.digest for task in self.tasks}
            facts["weights"] = self.family.identity

        # ---------------------------------------------------------------- where it goes
        self.checkpoints = Checkpoints(workdir, config.checkpoint.keep)
        self.fingerprint = configs.fingerprint(config, self.family.identity)
        self.identity = configs.digest({"config": self.fingerprint, "stream": self.stream_record()})
        self.progress = self.resume()
        self.progress.widen(len(self.tasks))
        self.earlier_seconds = self.progress.wall_seconds
        self.earlier_traces = self.progress.train_traces
        self.log = MetricsLog(workdir, self.progress.step, config.log.tensorboard)
        self.results = Results(
            config,
            self.tasks,
            self.method,
            self.sites,
            frozen_parameters=count_parameters(quantised.plain(self.family.params)),
            chance=[self.family.chance(task) for task in self.tasks],
            prompt_tokens=[self.family.prompt_tokens(task) for task in self.tasks],
            fingerprint=self.identity,
            command=command,
            workdir=workdir,
            display=self.display,
        )

    def load(self) -> None:
        """Everything that does not depend on the workdir. Raises MoraError for what cannot be run."""
        # ---------------------------------------------------------------- tasks, method, model
        config = self.config
        self.tasks = experiment.load_tasks(config)
        self.names = [task.name for task in self.tasks]
        self.lengths = configs.lengths(config, self.names, {task.name: task.epochs for task in self.tasks})
        self.method = from_config(config.method, config.kernel)
        for task, (steps, epochs) in zip(self.tasks, self.lengths, strict=True):  # known before any work
            task.split(config.eval.split)
            records = len(task.split("train")) if self.method.trains else 0
            if self.method.trains and (not records or (not steps and epochs * records < config.train.batch_size)):
                raise MoraError(
                    f"task {task.name} has {records} training records, in {epochs} epoch(s) fewer than one batch of "
                    f"train.batch_size={config.train.batch_size}"
                )
        self.mesh, self.family, self.sites = experiment.load_family(config, self.method, self.tasks)

        # ---------------------------------------------------------------- what is trained, and how
        if self.method.trains and (distributed.chosen(config.mesh) or hosts.several()):
            distributed.check_mesh(self.mesh, {}, config.train.batch_size, config.train.accumulate)
        self.optimizer = make_optimizer(config.train)
        c, parts = config.train, (config.train.accumulate, self.family.weight)
        self.step = TrainStep(self.family.loss, self.optimizer, c.schedule, c.learning_rate, *parts)
        self.bank = self.state = None

    # -------------------------------------------------------------------- resume

    def stream_record(self) -> list[dict[str, Any]]:
        """What decides each task's part in the results; an old run's list must be a prefix of the new one's."""
        rows = [
            {"task": task.name, "data": task.digest, "steps": steps, "epochs": epochs, "made": task.made(epochs)}
            for task, (steps, epochs) in zip(self.tasks, self.lengths, strict=True)
        ]
        return [{key: value for key, value in row.items() if (key, value) != ("made", 1)} for row in rows]

    def target(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Shapes and shardings of the arrays in a checkpoint; refuses one of another experiment."""
        of_stream = configs.stream_differences(meta["stream"], self.stream_record())
        changed = configs.differences(meta["fingerprint"], self.fingerprint) + of_stream
        changed += configs.differences({SPACE: meta.get("label_space")}, {SPACE: self.family.label_space})
        if changed:
            raise MoraError(
                f"--workdir={self.workdir} holds another experiment; use another --workdir. {'; '.join(changed)}"
            )

        def make() -> dict[str, Any]:
            bank, fresh = banks.empty(self.sites, meta["capacity"]), {}
            if meta["phase"] == "training":
                fresh = banks.new_fresh(self.sites, self.method, 0, 0)
            return self.arrays(bank, TrainState.create(fresh, self.optimizer) if fresh else None)

        return distributed.abstract(self.mesh, jax.eval_shape(make))

    @staticmethod
    def arrays(bank: Any, state: TrainState | None) -> dict[str, Any]:
        """What a checkpoint holds: never the backbone."""
        kept = {"bank": bank, "layout": jnp.ones((), jnp.int32)}  # orbax wants at least one array
        return kept | ({"state": dict(vars(state))} if state else {})

    def resume(self) -> Progress:
        restored = self.checkpoints.restore(self.target)
        row = self.checkpoints.noted(self.identity)
        if restored is None:
            self.bank = self.new_bank()
            return Progress().with_row(row)
        meta, arrays = restored
        self.bank = arrays["bank"]
        if "state" in arrays:
            self.state = TrainState(**arrays["state"])
        progress = Progress(**meta["progress"]).with_row(row)
        where = "zero-shot" if progress.task < 0 else f"task {progress.task + 1} ({self.names[progress.task]})"
        self.display.say(f"resumed from {self.workdir} at step {progress.step}: {where}, {progress.phase}")
        return progress

    def new_bank(self) -> dict:
        return distributed.place(self.mesh, banks.empty(self.sites, self.method.capacity(0)))

    def save(self, phase: str) -> None:
        p = self.progress
        p.phase = phase
        self.clock()
        p.train_traces = max(self.earlier_traces, self.step.traces)
        meta = {
            "step": p.step,
            "task": p.task,
            "phase": phase,
            "capacity": banks.capacity_of(self.bank),
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "stream": self.stream_record(),
            "label_space": self.family.label_space,
            "random": f"every draw comes from seed {self.config.seed} and the task's number; there is no running state",
            "progress": dataclasses.asdict(p),
        }
        arrays = self.arrays(self.bank, self.state if phase == "training" else None)
        self.checkpoints.save(distributed.place(self.mesh, arrays), meta)

    def note(self) -> None:
        """Saves the entries that a row has so far, so that it goes on from there; the arrays are those last saved."""
        self.clock()
        self.checkpoints.note(self.identity, self.progress.row())

    def clock(self) -> None:
        self.progress.wall_seconds = self.earlier_seconds + time.monotonic() - self.started

    # -------------------------------------------------------------------- one task

    def open_task(self, index: int) -> TrainData:
        """The batches of task `index`: with fresh experts to train, or from where a restored run stopped."""
        p = self.progress
        data = self.family.train_data(self.tasks[index], index, *self.lengths[index])
        if p.task == index:  # phase is training: the checkpoint held fresh experts and optimiser
            data.batches.set_state(p.data)
            return data
        p.task, p.phase, p.task_step = index, "training", 0
        p.truncated.setdefault(self.names[index], {})["train"] = data.truncated
        bank, fresh = boundaries.append(self.method, self.sites, self.bank, self.config.seed, index)
        self.bank = distributed.place(self.mesh, bank)
        self.state = distributed.place(self.mesh, TrainState.create(fresh, self.optimizer))
        return data

    def train(self, index: int) -> None:
        """From the first (or the restored) step of task `index` to its last, then the freeze."""
        p, started = self.progress, time.monotonic()
        data = self.open_task(index)
        batches, steps = data.batches, data.steps
        spent = p.task_seconds[index]
        horizon = distributed.place(self.mesh, jnp.float32(steps))
        title = f"task {index + 1}/{len(self.tasks)} {self.names[index]}"
        with self.display.progress(title, "steps", steps, p.task_step) as advance:
            log = StepLog(self.log, self.config.log.every_steps, advance, self.family.rate)
            while p.task_step < steps:
                batch, traces = next(batches), self.step.traces
                placed = distributed.place_batch(self.mesh, batch)
                with jax.transfer_guard_host_to_device("disallow"):
                    self.state, metrics = self.step(self.state, self.family.params, self.bank, horizon, placed)
                p.step, p.task_step = p.step + 1, p.task_step + 1
                row = {
                    "step": p.step,
                    "task": self.names[index],
                    "task_step": p.task_step,
                    **self.family.count(batch),
                    "compiled": self.step.traces > traces,
                }
                log.add(row, metrics)
                stop = self.signals.here()
                save = stop or (p.task_step % self.config.checkpoint.every_steps == 0 and p.task_step < steps)
                log.settle(in_flight=0 if save or p.task_step == steps else 1)
                p.task_seconds[index] = spent + time.monotonic() - started
                if save:
                    p.data = batches.get_state()
                    p.skip(self.names[index], "train", tuple(data.skipped))
                    log.flush()
                    self.save("training")
                    log.restart_clock()
                if stop:
                    raise Stopped
            log.flush()
        p.skip(self.names[index], "train", tuple(data.skipped))
        self.bank = distributed.place(self.mesh, boundaries.freeze(self.bank, self.state.fresh))
        self.state, p.data = None, None
        self.save("trained")

    # -------------------------------------------------------------------- evaluation

    def prepare(self) -> Mapping[str, Any]:
        """What the evaluations of one row of R ask: the bank alone, and what their tasks share."""
        return self.family.prepare({"params": self.family.params} | ({"bank": self.bank} if self.method.trains else {}))

    def evaluate(self, variables: Mapping[str, Any], row: str, index: int) -> tuple[float, float, GateCounts]:
        """(score, lenient score, gate counts) on task `index`; predictions go to disk under `row`."""
        task, split = self.tasks[index], self.config.eval.split
        examples = task.split(split)

        def check() -> None:
            if self.signals.here():
                raise Stopped

        title = f"  {row} -> {task.name}"
        answer, percent, lenient = experiment.evaluate(self.family, variables, task, split, self.display, title, check)
        self.progress.truncated.setdefault(task.name, {})[split] = answer.truncated
        unread = [e.prompt for e, text in zip(examples, answer.texts, strict=True) if text is None]
        self.progress.skip(task.name, split, unread)
        scorer = metric(task.metric)
        write_lines(
            self.workdir / "predictions" / row / f"{task.name}.jsonl",
            (
                {
                    "prompt": e.prompt,
                    "answer": e.answer,
                    "prediction": text,
                    "score": round(scorer.of(text, e.answer, e.prompt), 4),
                }
                for e, text in zip(examples, answer.texts, strict=True)
                if text is not None
            ),
        )
        self.log.write_score(f"{task.name}", percent, self.progress.step)
        return percent, lenient, answer.gates

    def zero_shot(self) -> None:
        """The row before all training, for tasks that do not have it yet."""
        p = self.progress
        missing = [i for i, score in enumerate(p.zero_shot) if score is None]
        if missing:
            bank, self.bank = self.bank, self.new_bank()  # an empty bank: the frozen model
            variables = self.prepare()
            for i in missing:
                p.zero_shot[i], p.zero_shot_lenient[i], _ = self.evaluate(variables, ZERO_SHOT_ROW, i)
                self.note()
            self.bank = bank
        if p.task < 0 and (missing or p.phase != "evaluated"):
            self.save("evaluated")

    def fill_row(self, index: int) -> None:
        """Row `index` of R, but for the entries that it has already."""
        last, p = len(self.tasks) if self.config.eval.future_tasks else index + 1, self.progress
        missing = [i for i in range(last) if p.R[index][i] is None]
        variables = self.prepare() if missing else {}
        for i in missing:
            p.R[index][i], _, gates = self.evaluate(variables, row_name(index, self.names), i)
            p.gates[index][i] = list(gates)
            self.note()
        self.save("evaluated")

    def map_gates(self) -> None:
        """Once, at the end: the gates on the first evaluated record of every task, under the whole bank and, where no
        later task changes a row, as they were right after that task.
        """
        last = len(self.tasks) - 1
        lasting = boundaries.BOUNDARIES[self.method.boundary].lasting
        for index in range(0 if lasting else last, last + 1) if self.method.has_gates else ():
            if not hosts.gathered(self.results.gate_map_path(index).exists())[0]:
                asked = self.tasks if index == last else [self.tasks[index]]
                bank = banks.first(self.bank, self.method.live_after(index))
                variables = {"params": self.family.params, "bank": bank}
                maps = {t.name: self.family.gate_map(variables, t, t.split(self.config.eval.split)) for t in asked}
                self.results.write_gate_maps(index, maps)

    # -------------------------------------------------------------------- the stream

    def teach(self) -> None:
        p = self.progress
        self.results.introduce()
        self.zero_shot()
        self.write_results()
        while self.method.trains and not self.finished():
            index = p.task if p.task >= 0 and p.phase != "evaluated" else p.task + 1
            if p.task != index or p.phase == "training":
                self.train(index)
            self.fill_row(index)
            self.write_results()
        self.write_results()
        self.map_gates()
        self.results.conclude(p)
        if hosts.first():
            self.draw_report()

    def draw_report(self) -> None:
        """report.html. The run is complete by now, so a drawing that fails is told and ends nothing."""
        try:
            self.display.say(f"{page.write([self.workdir])} written")
        except Exception as problem:
            if not isinstance(problem, MoraError):
                traceback.print_exc()  # a bug of ours
            print(f"warning: no report ({problem}); the run is complete without it", file=sys.stderr)

    def finished(self) -> bool:
        p = self.progress
        return not self.method.trains or (p.task == len(self.tasks) - 1 and p.phase == "evaluated")

    def write_results(self) -> None:
        self.clock()
        self.results.write(self.progress, self.log.timing(), complete=self.finished())


def dry_run(config: Any) -> None:
    """What --dry_run prints: the steps of the last task compiled for the devices here. Nothing is loaded or written."""
    plan = plans.make_plan(config, topologies.here(jax.devices()), jax.devices(), plans.count_tasks(config))
    plans.show(plan, Display())


def teach(argv: Sequence[str]) -> None:
    """Everything but the handling of errors. Raises Stopped once it has saved because it was asked to stop."""
    if {"-h", "--help"} & set(argv):
        print(configs.USAGE)
        return
    invocation = configs.parse(argv)
    if invocation.config is None:
        experiment.print_known()
        return
    hosts.start(hosts.from_options(invocation.hosts))
    experiment.keep_compiled()
    if invocation.workdir is None:
        dry_run(invocation.config)
        return
    command = shlex.join(["python", "-m", "mora_jax.train", *argv])
    with contextlib.ExitStack() as stack:
        with hosts.together() as facts:
            facts |= configs.alike(invocation.config) | versions() | {"--workdir": str(invocation.workdir)}
            stack.enter_context(locked(invocation.workdir))
        with hosts.together():
            if not invocation.workdir.exists():
                raise MoraError(
                    f"--workdir={invocation.workdir} of process 0 is not there; all hosts must see one folder"
                )
        Run(invocation.config, invocation.workdir, command).teach()


def run(argv: Sequence[str]) -> None:
    """The same, where a run that was asked to stop has done its work."""
    try:
        teach(argv)
    except Stopped:
        Display().say("stopped as asked; the same command resumes")


def main() -> int:
    """The exit code: 0 when done or stopped as asked, else as `mora_jax.errors` lists them."""
    return hosts.exit_code(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
