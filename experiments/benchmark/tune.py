"""The study `tune`: layouts of GPU kernels, each compiled, checked and timed, beside XLA and the byte floor.

Results are compared with the float64 reference at full size, in memory that was filled with NaN. A layout that fails or
is wrong is reported and left out; the others continue.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark import (
    tune_delta_rule,
    tune_gated_linear_attention,
    tune_linear_recurrence,
    tune_short_conv,
)
from experiments.benchmark.timing import interleaved

PROBLEMS = {
    "delta_rule": tune_delta_rule.problems,
    "gated_linear_attention": tune_gated_linear_attention.problems,
    "linear_recurrence": tune_linear_recurrence.problems,
    "short_conv": tune_short_conv.problems,
}
PARTS = ("forward", "backward", "both")
ALLOWED_ERROR = {"float32": 2e-5, "complex64": 2e-5, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a quick run: rows, tokens, a divisor of channels, and the number of timing rounds."""

    batch: int | None = None
    time: int | None = None
    narrower: int = 1
    rounds: int = 7


def selected(only: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yields the problems of these primitives, or these problems of them; all if empty.

    Raises:
      ValueError: a name is neither.
    """
    every = [(name, problem) for name, problems in PROBLEMS.items() for problem in problems()]
    known = {*PROBLEMS, *(f"{name}/{problem.name}" for name, problem in every)}
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"only={unknown[0]!r} has nothing to tune; choose from {', '.join(sorted(known))}")
    for name, problem in every:
        if not only or name in only or f"{name}/{problem.name}" in only:
            yield name, problem


def run(
    only: tuple[str, ...],
    sizes: Sizes,
    bandwidth: float,
    say: Callable[[str], None],
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Makes a row per layout of each pass of the chosen problems.

    `say` is called with each line as it is known, `keep` with all rows so far after each pass.

    Raises:
      ValueError: see `selected`; or the kernels cannot run here.
    """
    chosen = list(selected(only))
    rows: list[dict[str, Any]] = []
    for primitive, problem in chosen:
        if reason := problem.refusal():
            raise ValueError(f"only={primitive!r} cannot be tuned here: {reason}")
        started = time.perf_counter()
        prepared = problem.prepare(sizes)
        seconds = time.perf_counter() - started
        say(f"\n{primitive}/{problem.name}: {prepared.describe()}; reference in {seconds:.0f} s")
        best: dict[str, Any] = {}
        for part in PARTS:
            floor = 1e3 * prepared.bytes(part) / bandwidth
            found = _part(prepared, part, best, floor, sizes.rounds, say)
            rows += [{"primitive": primitive, "problem": problem.name, "part": part} | row for row in found]
            keep(rows)


def _part(
    prepared: Any, part: str, best: dict[str, Any], floor: float, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compiles, checks and times the trials of one pass; stores the fastest layout in `best`."""
    rows, able = [], {}
    arguments, expected = prepared.arguments(part), prepared.expected(part)
    trials = prepared.trials(part, best)
    for label, (settings, function) in trials.items():
        started = time.perf_counter()
        row: dict[str, Any] = {"layout": label, "floor_ms": floor}
        rows.append(row)
        try:
            compiled = jax.jit(function).lower(*arguments).compile()
            row["compile_s"] = time.perf_counter() - started
            say(f"  {part:8} {label:44} compiled in {row['compile_s']:.1f} s")
            _poison(expected)
            row["error"] = max(errors(compiled(*arguments), expected).values())
        except Exception as problem:  # noqa: BLE001 - a layout that does not fit is a result
            row["failure"] = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"
            say(f"  {part:8} {label:44} {row['failure']}")
            continue
        if not row["error"] <= ALLOWED_ERROR[prepared.dtype]:
            row["failure"] = f"wrong: relative error {row['error']:.1e}"
            say(f"  {part:8} {label:44} {row['failure']}")
            continue
        able[label] = (row, settings, compiled)
    if not able:
        return rows
    timings = interleaved({label: _call(entry[2], arguments) for label, entry in able.items()}, rounds)
    for label in sorted(able, key=lambda label: timings[label].median):
        row, settings, _ = able[label]
        row |= {"ms": timings[label].median, "quartiles_ms": [timings[label].low, timings[label].high]}
        row["over_floor"] = row["ms"] / floor
        if settings is not None:
            best.setdefault(part, settings)
        say(
            f"  {part:8} {label:44} {row['ms']:8.3f} ms  {row['over_floor']:5.2f} x floor  {row['error']:.1e}"
        )
    return rows


def _call(compiled: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: compiled(*arguments)


def _poison(tree: Mapping[str, Any]) -> None:
    """Fills memory that the next results may use with NaN, and releases it."""
    filled = [jnp.full(v.shape, jnp.nan, jnp.float32) for v in tree.values() for _ in range(2)]
    jax.block_until_ready(filled)
    for array in filled:
        array.delete()


def errors(got: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, float]:
    """Returns ||got - want|| / ||want|| of each array in `want`, in float64."""
    with jax.enable_x64(True):
        return {name: float(_relative(got[name], want[name])) for name in want}


@jax.jit
def _relative(got: Any, want: Any) -> Any:
    wide = got.astype(want.dtype)
    return jnp.linalg.norm((wide - want).ravel()) / jnp.maximum(jnp.linalg.norm(want.ravel()), 1e-30)
