"""The study `kernels`: every implementation of every primitive, side by side, with errors, memory and floors."""

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from experiments.benchmark import calls, processes
from experiments.benchmark.peers import peers
from experiments.benchmark.timing import Ceilings, interleaved
from layers.kernels import dispatch
from layers.kernels.suite import Benchmark, Suite
from layers.kernels.suites import SUITES

ERROR_TIME = 256  # length at which the float64 reference and all its intermediate states fit


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the study.

    Attributes:
      only: primitives, or "primitive/case"; all if empty.
      dtype: dtype of real inputs; that of each benchmark if None.
      batch, time: sizes that replace those of the benchmark.
      narrower: divisor of the number of heads or channels.
      rounds: number of measurements per function.
      peers: whether other libraries are timed too.
      workers: number of processes that trace and compile.
      patience: seconds in which an implementation of a case must compile and be checked; no limit if None.
    """

    only: tuple[str, ...] = ()
    dtype: str | None = None
    batch: int | None = None
    time: int | None = None
    narrower: int = 1
    rounds: int = 15
    peers: bool = False
    workers: int = 4
    patience: float | None = None


def selected(only: tuple[str, ...]) -> Iterator[tuple[str, Suite, Benchmark]]:
    """Yields the benchmarks of these primitives, or these cases of them.

    Raises:
      ValueError: a name is neither.
    """
    every = [(name, suite, case) for name, suite in SUITES.items() for case in suite.benchmarks]
    known = {*SUITES, *(f"{name}/{case.name}" for name, _, case in every)}
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"only={unknown[0]!r} is no benchmark; choose from {', '.join(sorted(known))}")
    for name, suite, case in every:
        if not only or name in only or f"{name}/{case.name}" in only:
            yield name, suite, case


def failures(rows: list[dict]) -> list[dict]:
    """Returns the rows of our implementations that raised an error other than a refusal of the case."""
    return [row for row in rows if row["ours"] and "problem" in row and not row["refused"]]


def run(
    options: Options,
    ceilings: Mapping[str, Ceilings],
    report: Callable[[dict], None],
    say: Callable[[str], None],
) -> list[dict]:
    """Returns the rows of the study; everything is compiled and checked before anything is timed.

    Args:
      ceilings: ceilings of the device by dtype of the inputs.
      report: function called with each row as soon as it is known.
      say: function called with a line for each function that is ready to be timed.

    Raises:
      ValueError: see `selected`.
    """
    keys = [(name, case.name) for name, _, case in selected(options.only)]
    return processes.run(functools.partial(_prepare, options, ceilings), keys, options.workers, report, say)


def _prepare(
    options: Options, ceilings: Mapping[str, Ceilings], key: tuple[str, str], say: processes.Say
) -> processes.Ready:
    (entry,) = selected(("/".join(key),))
    study = Study(*entry, options, say)
    return processes.Ready(lambda: study.measure(ceilings[study.dtype], options.rounds), study.peak_bytes)


def _refusal(problem: Exception) -> dict[str, Any]:
    text = (str(problem).splitlines() or [""])[0]
    refused = isinstance(problem, ValueError) and "cannot take this call" in text
    return {"problem": f"{type(problem).__name__}: {text[:200]}", "refused": refused}


@contextlib.contextmanager
def _within(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError in the context after this time, as soon as Python runs again; in the main thread only."""
    if seconds is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not ready within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Study:
    """One benchmark: its inputs on the host, and all implementations, compiled and checked.

    Attributes:
      dtype: dtype of the real inputs.
      peak_bytes: largest memory that a function needs.
    """

    def __init__(
        self,
        primitive: str,
        suite: Suite,
        benchmark: Benchmark,
        options: Options,
        say: Callable[[str], None],
    ):
        self.primitive, self.suite = primitive, suite
        self.benchmark = benchmark.resized(
            options.batch or benchmark.batch, options.time or benchmark.time, options.narrower
        )
        # As many heads as are timed, because kernel autotuning is repeated per number of heads.
        self._small = self.benchmark.resized(1, min(self.benchmark.time, ERROR_TIME))
        self._patience = options.patience
        self.dtype = options.dtype or benchmark.dtype
        self._arrays = calls.draw(self.benchmark, self.dtype)
        self._default = self._choice()
        ours = self._own_functions()
        others = peers(primitive, benchmark.name) if options.peers else {}
        functions = ours | others
        self._cotangent = calls.cotangent(
            calls.with_implementation(suite, self.benchmark, "reference"), self._arrays
        )
        self._check = calls.check(suite, self._small, calls.draw(self._small, self.dtype))
        self._ours = set(ours)
        self._contestants = {}
        for name, function in functions.items():
            started = time.perf_counter()
            self._contestants[name] = self._prepare(function)
            say(f"{primitive}/{benchmark.name}, {name}: ready after {time.perf_counter() - started:.0f} s")
        self.peak_bytes = max(c.get("both_peak_bytes", 0) for c in self._contestants.values())

    def _choice(self) -> str | None:
        """Returns the implementation that `impl=None` chooses, or None if it fails."""
        function = calls.with_implementation(self.suite, self.benchmark, None)
        with dispatch.noted() as taken, contextlib.suppress(Exception):
            jax.eval_shape(lambda arrays: function(**arrays), self._arrays)
        return next((name for primitive, name in taken if primitive == self.primitive), None)

    def _own_functions(self) -> dict[str, calls.JaxFunction]:
        on_gpu = self.suite.gpu_implementations if jax.default_backend() == "gpu" else ()
        names = dict.fromkeys((self._default, *self.suite.implementations, *on_gpu))
        return {
            name or "default": calls.JaxFunction(calls.with_implementation(self.suite, self.benchmark, name))
            for name in names
        }

    def _prepare(self, function: Any) -> dict[str, Any]:
        """Returns the compiled functions with their errors and memory, or the reason why there are none."""
        try:
            with _within(self._patience):
                compiled = function.compiled(self._arrays, self._cotangent)
                error, gradient_error = calls.errors(function, self._check)
        except Exception as problem:  # noqa: BLE001 - one that fails must not cost the results of the others
            return _refusal(problem)
        return {
            "functions": (compiled.forward, compiled.both),
            "error": error,
            "gradient_error": gradient_error,
            "forward_peak_bytes": compiled.forward_peak_bytes,
            "both_peak_bytes": compiled.both_peak_bytes,
        }

    def measure(self, ceilings: Ceilings, rounds: int) -> list[dict[str, Any]]:
        """Returns one row per implementation of this benchmark."""
        arrays, cotangent = jax.device_put((self._arrays, self._cotangent))
        able = {
            name: (
                functools.partial(c["functions"][0], arrays),
                functools.partial(c["functions"][1], arrays, cotangent),
            )
            for name, c in self._contestants.items()
            if "functions" in c
        }
        for name, passes in list(able.items()):
            try:
                for run in passes:
                    jax.block_until_ready(run())
            except Exception as problem:  # noqa: BLE001 - the memory may not suffice for all
                del able[name]
                self._contestants[name] = _refusal(problem)
        forward, both = ({name: passes[part] for name, passes in able.items()} for part in (0, 1))
        forward_times, both_times = interleaved(forward, rounds), interleaved(both, rounds)
        floors = self._floors(ceilings)
        common = {
            "primitive": self.primitive,
            "case": self.benchmark.name,
            "dtype": self.dtype,
            "shapes": {name: list(array.shape) for name, array in self._arrays.items()},
        } | {
            f"{part}_{what}": getattr(self.benchmark, f"{part}_{what}")
            for part in ("forward", "backward")
            for what in ("bytes", "flops")
        }
        rows = []
        for name, contestant in self._contestants.items():
            row = common | {
                "implementation": name,
                "ours": name in self._ours,
                "default": name == self._default,
            }
            row |= {key: value for key, value in contestant.items() if key != "functions"}
            if name in able:
                for part, times, floor in zip(
                    ("forward", "both"), (forward_times, both_times), floors, strict=True
                ):
                    row |= {
                        f"{part}_ms": times[name].median,
                        f"{part}_quartiles_ms": [times[name].low, times[name].high],
                        f"{part}_floor_ms": floor,
                        f"{part}_over_floor": times[name].median / floor,
                    }
                    if self._default in able:
                        row[f"{part}_over_default"] = times[name].median / times[self._default].median
            rows.append(row)
        return rows

    def _floors(self, ceilings: Ceilings) -> tuple[float, float]:
        """Returns lower bounds in milliseconds of the forward pass and of both passes."""
        b = self.benchmark
        rate = ceilings.matrix if b.matrix_products else ceilings.vector

        def floor(moved: int, flops: int) -> float:
            return 1e3 * max(moved / ceilings.bytes, flops / rate)

        forward = floor(b.forward_bytes, b.forward_flops)
        return forward, forward + floor(b.backward_bytes, b.backward_flops)
