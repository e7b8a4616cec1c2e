"""Log lines from the metrics of steps on the device, without making the device wait at each step."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from experiments.parallel import hosts
from experiments.training.step import STEP_METRICS, means
from layers.typing import Array, Float

# Least number of steps over which the tokens per second are measured. The device works a few steps ahead, and steps that
# are fetched together, before an evaluation, have the same time.
RATE_STEPS = 10


class NonFiniteError(ArithmeticError):
    """A loss, a gradient norm or the training state is infinite or NaN.

    Attributes:
      step: step in which it occurs.
    """

    def __init__(self, step: int, what: str):
        self.step = step
        super().__init__(f"step {step}: {what}")


class Stopwatch:
    """A stopwatch of training seconds, over all sessions of a run."""

    def __init__(self, seconds: float = 0.0):
        """Creates a stopped stopwatch that continues from `seconds`."""
        self._before = seconds
        self._start: float | None = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._before + running

    def start(self) -> None:
        """Starts the stopwatch."""
        self._start = time.perf_counter()

    def stop(self) -> None:
        """Stops the stopwatch."""
        self._before, self._start = self.seconds, None

    @contextmanager
    def paused(self):
        """Stops the stopwatch within the context."""
        self.stop()
        try:
            yield
        finally:
            self.start()


class StepRecords:
    """Collects the metrics of steps and emits a line per `log_every` steps.

    Attributes:
      tokens: number of real tokens of all collected steps, over all sessions of the run.
    """

    def __init__(
        self,
        metric_names: tuple[str, ...],
        *,
        log_every: int,
        stopwatch: Stopwatch,
        emit: Callable[[int, dict[str, float]], None],
        saved: Mapping[str, Any] | None = None,
        skip_norm: float | None = None,
        peak: float | None = None,
        memory: Callable[[], int | None] = lambda: None,
    ):
        """Creates empty records, or resumes from the value of `save`.

        Args:
          metric_names: names of the sums over examples.
          emit: function called with the last step and the measurements of a line.
          skip_norm: gradient norm above which a step changes no parameter (see `OptimizerConfig`); lines count such steps.
          peak: peak FLOP/s of the devices, for the "mfu" of a line; None for none.
          memory: function that returns the "peak_memory_bytes" of a line, or None for none.
        """
        self._names = (*metric_names, *STEP_METRICS)
        self._sums = len(metric_names)
        self._log_every, self._stopwatch, self._emit = log_every, stopwatch, emit
        self._skip_norm = None if skip_norm is None else float(np.float32(skip_norm))
        self._peak, self._memory = peak, memory
        saved = saved or dict(interval=[], tokens=0)
        self._on_device: deque[tuple[int, Array, float]] = deque()
        self._said_unlabelled = False
        self._interval: list[Sequence[float]] = list(saved["interval"])
        self.tokens: int = saved["tokens"]
        self._flops: float = saved.get("flops", 0.0)
        # Step, seconds, tokens and FLOPs at the ends of the last lines. Versions up to 0.2.0 store none, or no FLOPs.
        self._marks: deque[tuple[int, float, int, float]] = deque(
            (*mark, 0.0)[:4] for mark in saved.get("marks") or [(0, 0.0, 0)]
        )

    def add(self, step: int, metrics: Float[Array, "m"], flops: float = 0.0) -> None:
        """Adds the metrics of a step, which stay on the device, and its FLOPs."""
        self._on_device.append((step, metrics, flops))

    def collect(self, last_step: int) -> None:
        """Fetches the metrics up to a step, checks them, and emits the lines that are complete.

        Raises:
          NonFiniteError: a loss or gradient norm is not finite; names the first such step.
        """
        while self._on_device and self._on_device[0][0] <= last_step:
            due = []
            while self._on_device and self._on_device[0][0] <= last_step:
                due.append(self._on_device.popleft())
                if due[-1][0] % self._log_every == 0:
                    break
            fetched = jax.device_get([metrics for _, metrics, _ in due])
            for (step, _, flops), metrics in zip(due, fetched, strict=True):
                self._flops += flops
                self._take(step, np.asarray(metrics))

    def save(self) -> dict[str, Any]:
        """Returns the collected metrics that are not emitted yet, as JSON."""
        return dict(interval=self._interval, marks=list(self._marks), tokens=self.tokens, flops=self._flops)

    def _take(self, step: int, metrics: np.ndarray) -> None:
        values = dict(zip(self._names, map(float, metrics), strict=True))
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            raise NonFiniteError(step, f"loss {values['loss']}, gradient_norm {values['gradient_norm']}")
        if values["count"] == 0 and not self._said_unlabelled and hosts.is_main():
            self._said_unlabelled = True
            print(
                f"\nstep {step}: the batch has no label, and the step changes no parameter; "
                "this is said once per session",
                file=sys.stderr,
            )
        if self._skips(values["gradient_norm"]) and hosts.is_main():
            print(
                f"\nstep {step}: the gradient norm {values['gradient_norm']:.4g} is above optimizer.skip_norm="
                f"{self._skip_norm:.4g}, and the step changes no parameter",
                file=sys.stderr,
            )
        self.tokens += round(values["tokens"])
        self._interval.append(list(map(float, metrics)))
        if step % self._log_every == 0:
            seconds = self._stopwatch.seconds
            self._emit(step, self._line(step, seconds))
            self._interval = []
            self._marks.append((step, seconds, self.tokens, self._flops))
            while len(self._marks) > 1 and step - self._marks[1][0] >= RATE_STEPS:
                self._marks.popleft()

    def _line(self, step: int, seconds: float) -> dict[str, float]:
        rows = np.array(self._interval, np.float64)
        last = dict(zip(self._names, self._interval[-1], strict=True))
        mark = next((m for m in reversed(self._marks) if step - m[0] >= RATE_STEPS), self._marks[0])
        elapsed, norms = max(seconds - mark[1], 1e-9), rows[:, self._names.index("gradient_norm")]
        line = means(self._names[: self._sums], rows[:, : self._sums].sum(axis=0)) | dict(
            gradient_norm=float(norms.mean()),
            learning_rate=last["learning_rate"],
            tokens_per_second=(self.tokens - mark[2]) / elapsed,
            seconds=seconds,
        )
        if self._skip_norm is not None:
            line["skipped_steps"] = sum(map(self._skips, norms))
        if self._peak is not None:
            line["mfu"] = (self._flops - mark[3]) / (elapsed * self._peak)
        if (memory := self._memory()) is not None:
            line["peak_memory_bytes"] = memory
        return line

    def _skips(self, norm: float) -> bool:
        return self._skip_norm is not None and norm > self._skip_norm
