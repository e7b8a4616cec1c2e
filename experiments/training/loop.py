"""The training loop: steps, log lines, evaluations, checkpoints and interruptions."""

import dataclasses
import math
import sys
from contextlib import ExitStack
from typing import Any

import jax

from experiments.analysis.utilization import Utilization, peak_memory
from experiments.parallel import hosts
from experiments.parallel.mesh import Devices
from experiments.runs.checkpoints import CheckpointError, Checkpoints
from experiments.runs.directory import RunDirectory
from experiments.runs.files import finite
from experiments.runs.interrupts import Interrupted, Stop
from experiments.runs.logs import Logs, elapsing, progress_bar
from experiments.training.batches import TrainBatches
from experiments.training.compilation import PerShape
from experiments.training.evaluation import Evaluator
from experiments.training.experiment import Experiment
from experiments.training.finite import check_finite
from experiments.training.pretrained import initial_state
from experiments.training.records import StepRecords, Stopwatch
from experiments.training.state import StateLayout, TrainState

VALIDATION, TEST = "validation", "test"
# Number of steps in flight while the metrics of earlier ones are fetched, so that the device does not wait for the log.
LAG = 2
# Number of steps between checks whether any process asks to stop: each check waits for the slowest process.
STEPS_BETWEEN_QUESTIONS = 10


@dataclasses.dataclass
class Note:
    """The part of a checkpoint beside the training state, as JSON.

    Attributes:
      data: position in the training data.
      records: metrics collected from the steps (see `StepRecords.save`).
      validation: validation metrics, if the checkpoint follows an evaluation.
      training_seconds, eval_seconds, compile_seconds: seconds spent on each, over all sessions of the run.
      logs: `Logs.seal` of process 0 at this step; None from versions up to 0.2.0.
    """

    data: Any = None
    records: dict[str, Any] | None = None
    validation: dict[str, float] | None = None
    training_seconds: float = 0.0
    eval_seconds: float = 0.0
    compile_seconds: float = 0.0
    logs: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a finished training.

    Attributes:
      best_step: step of the checkpoint with the best validation.
      validation: validation metrics of that checkpoint.
      test: its test metrics, or None if the task has no test split.
      note: note of the last checkpoint.
    """

    best_step: int
    validation: dict[str, float]
    test: dict[str, float] | None
    note: Note


def train(experiment: Experiment, run: RunDirectory, *, devices: Devices, stop: Stop) -> Outcome:
    """Trains from the newest checkpoint, or from the start, to the end, and returns the outcome.

    Interruptions change neither the steps nor, on a CPU, any bit of the losses.

    Raises:
      Interrupted: if `stop` asks for it, after saving.
      records.NonFiniteError: a number is not finite; names the step. All checkpoints are of earlier steps.
    """
    with ExitStack() as stack:
        return _Training(experiment, run, devices, stop, stack).to_the_end()


def restore_newest(layout: StateLayout, checkpoints: Checkpoints) -> tuple[TrainState, Note] | None:
    """Returns the state and the note of the newest checkpoint that is intact; None if there is no checkpoint.

    Damaged ones that are newer are named on standard error and set aside.

    Raises:
      CheckpointError: if all are damaged, or the checkpoint cannot be read or does not fit the model.
    """
    if checkpoints.latest is None:
        return None
    step = checkpoints.intact(reversed(checkpoints.steps))
    if step is None:
        raise CheckpointError(
            f"no checkpoint in {checkpoints.folder} is intact; restore one from a copy, "
            "or train anew in another workdir"
        )
    try:
        restored = restore(layout, checkpoints, step)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if step != checkpoints.latest:
        checkpoints.set_aside_after(step)
        if hosts.is_main():
            print(f"Resuming from the checkpoint of step {step}, the newest that is intact.", file=sys.stderr)
    return restored


def restore(
    layout: StateLayout, checkpoints: Checkpoints, step: int, beside: TrainState | None = None
) -> tuple[TrainState, Note]:
    """Returns the state, on the devices of `layout`, and the note of a checkpoint.

    Args:
      beside: see `StateLayout.from_stored`.

    Raises:
      ValueError: if there is no such checkpoint, or it does not fit the model.
    """
    layout.check_stored(checkpoints.shapes(step))
    arrays, note = checkpoints.load(step, layout.abstract_stored)
    return layout.from_stored(arrays, beside), Note(**note)


class _Training:
    """One session of a run."""

    def __init__(
        self, experiment: Experiment, run: RunDirectory, devices: Devices, stop: Stop, stack: ExitStack
    ):
        options = experiment.train
        self._experiment, self._devices, self._stop = experiment, devices, stop
        functions = experiment.step_functions(devices)
        self._train_step = PerShape(functions.train)
        self._layout = functions.layout
        self._evaluate = Evaluator(experiment, functions, devices)
        self._checkpoints = stack.enter_context(Checkpoints(run.checkpoints, keep_last=options.keep_last))
        stop.nothing_to_save = True
        restored = restore_newest(self._layout, self._checkpoints)
        self._state, self._note = restored or (initial_state(experiment, self._layout, devices), Note())
        self._step = int(self._state.step)
        # The end of a run that is extended since was evaluated, where the longer run is not.
        extended = self._note.validation is not None and not self._evaluates(self._step)
        if extended:
            self._checkpoints.drop_score(self._step)
        self._checkpoints.prune(provisional=self._is_provisional(self._step))
        part = devices.my_rows(experiment.train.batch_size)
        self._compiled_before = self._note.compile_seconds
        self._teacher = experiment.teacher(devices) if self._step < experiment.total_steps else None
        batches = experiment.train_batches(part)
        self._batches = TrainBatches(batches, devices, self._note.data, self._teacher)
        self._logs = None
        if hosts.is_main():
            if change := run.add_session(step=self._step, devices=devices.describe()):
                print(f"{change}; numbers may differ in their last digits.", file=sys.stderr)
            self._logs = stack.enter_context(
                Logs(
                    run.folder,
                    after_step=self._step,
                    config=experiment.config,
                    tensorboard=options.tensorboard,
                    wandb=options.wandb,
                    seal=self._note.logs,
                    drop_validation=extended,
                )
            )
        self._bar = stack.enter_context(
            progress_bar(step=self._step, total=experiment.total_steps, shown=hosts.is_main())
        )
        self._stopwatch = Stopwatch(self._note.training_seconds)
        kinds = [device.device_kind for device in devices.mesh.devices.flat]
        self._utilization = Utilization(experiment.model, experiment.task.loss, kinds)
        first = devices.mesh.local_devices[0]
        self._records = StepRecords(
            functions.train_metric_names,
            log_every=options.log_every,
            stopwatch=self._stopwatch,
            emit=self._write_steps,
            saved=self._note.records,
            skip_norm=experiment.optimizer.config.skip_norm,
            peak=self._utilization.peak,
            memory=lambda: peak_memory(first),
        )

    def to_the_end(self) -> Outcome:
        """Takes all remaining steps, tests the best checkpoint and returns the outcome."""
        options, total = self._experiment.train, self._experiment.total_steps
        if self._step < total:
            self._compile()
        self._bar.set_description("training")
        self._stopwatch.start()
        self._stop.nothing_to_save = False
        while self._step < total:
            self._take_step()
            evaluate = self._evaluates(self._step)
            save = options.checkpoint_every is not None and self._step % options.checkpoint_every == 0
            reason = self._reason_to_leave()
            if evaluate or save or reason:
                self._records.collect(self._step)
                with self._stopwatch.paused():
                    self._save(evaluate=evaluate)
            if reason:
                raise Interrupted(f"{reason} after step {self._step} of {total}")
        self._stopwatch.stop()
        return self._test()

    def _evaluates(self, step: int) -> bool:
        return step % self._experiment.eval_interval == 0 or step == self._experiment.total_steps

    def _is_provisional(self, step: int) -> bool:
        """Whether a longer run has no evaluation after this step."""
        return step % self._experiment.eval_interval != 0

    def _reason_to_leave(self) -> str | None:
        """Returns why to save and stop now, or None. Several processes agree on it every few steps."""
        if jax.process_count() == 1:
            return self._stop.reason
        if self._step % STEPS_BETWEEN_QUESTIONS:
            return None
        reason = self._stop.reason
        return (reason or "another process") if hosts.any_process(reason is not None) else None

    def _compile(self) -> None:
        with elapsing(self._bar, "compiling"):
            batches = map(self._devices.abstract_batch, self._experiment.example_train_batches())
            if self._teacher is not None:
                batches = map(self._teacher.abstract, batches)
            self._train_step.compile(self._state, batches=batches)
            self._evaluate.compile(self._state, VALIDATION)
        self._bar.unpause()

    def _take_step(self) -> None:
        batch = next(self._batches)
        self._state, metrics = self._train_step(self._state, batch)
        self._step += 1
        self._records.add(self._step, metrics, self._utilization.flops(batch))
        self._bar.update()
        if (self._step - LAG) % self._experiment.train.log_every == 0:
            self._records.collect(self._step - LAG)

    def _validate(self) -> dict[str, float]:
        self._bar.set_description("evaluating")
        metrics = self._evaluate(self._state, VALIDATION)
        self._say_if_not_finite(VALIDATION, self._step, metrics)
        self._note.eval_seconds += metrics["seconds"]
        self._write(VALIDATION, self._step, metrics)
        self._bar.set_description("training")
        return metrics

    def _say_if_not_finite(self, split: str, step: int, metrics: dict[str, float]) -> None:
        bad = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad and hosts.is_main():
            print(f"\n{split} at step {step} is not finite: {', '.join(bad)}", file=sys.stderr)

    def _save(self, *, evaluate: bool) -> None:
        arrays = self._layout.to_stored(self._state)
        check_finite(self._step, arrays)
        note = self._note
        note.validation = self._validate() if evaluate else None
        note.data = self._batches.position
        note.records = self._records.save()
        note.logs = None if self._logs is None else self._logs.seal
        note.training_seconds = self._stopwatch.seconds
        note.compile_seconds = (
            self._compiled_before + self._train_step.compile_seconds + self._evaluate.compile_seconds
        )
        score = None if note.validation is None else self._experiment.score(note.validation)
        provisional = self._is_provisional(self._step)
        stored = finite(dataclasses.asdict(note))
        self._checkpoints.save(self._step, arrays, stored, score=score, provisional=provisional)

    def _test(self) -> Outcome:
        self._checkpoints.wait()
        self._stop.nothing_to_save = True
        # Without a finite score, the last one is tested.
        best = self._checkpoints.intact([*self._checkpoints.from_best, self._step])
        if best is None:
            raise CheckpointError(f"no checkpoint in {self._checkpoints.folder} is intact")
        state, note = restore(self._layout, self._checkpoints, best, self._state)
        test = None
        if TEST in self._experiment.task.splits:
            with elapsing(self._bar, "testing"):
                self._evaluate.compile(state, TEST)
                test = self._evaluate(state, TEST)
            self._say_if_not_finite(TEST, best, test)
            self._write(TEST, self._step, test)
        return Outcome(best, note.validation or {}, test, self._note)

    def _write_steps(self, step: int, values: dict[str, float]) -> None:
        self._write("train", step, values)
        shown = {"loss": f"{values['loss']:.4g}", "tokens/s": f"{values['tokens_per_second']:.3g}"}
        self._bar.set_postfix(shown, refresh=False)

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if self._logs is None:
            return
        epoch = {"epoch": round(step / self._experiment.steps_per_epoch, 4)}
        self._logs.write(kind, step, epoch | values)
