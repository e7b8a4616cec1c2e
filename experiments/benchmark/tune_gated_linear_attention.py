"""The calls and layouts of Hopper kernels that `tune` compares for `gated_linear_attention`."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention import gpu, xla
from layers.kernels.gated_linear_attention.gpu.kernels import Settings
from layers.kernels.segments import Segments

Arrays = dict[str, Any]


def _stages(*counts: int) -> tuple[Settings, ...]:
    return tuple(Settings(stages=count) for count in counts)


# Layouts of heads that share queries and keys: in pairs, and alone like heads that do not.
_GROUPED = (Settings(), Settings(stages=1), Settings(pairs=False), Settings(pairs=False, stages=3))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of one size, with the layouts to try forward and backward, beside XLA.

    Attributes:
      shape: sizes of batch, time, heads, heads of queries and keys, key features and value features.
    """

    name: str
    shape: tuple[int, int, int, int, int, int]
    decay: bool = True
    segments: bool = False
    forward: tuple[Settings, ...] = _stages(2)
    backward: tuple[Settings, ...] = _stages(2)

    def refusal(self) -> str | None:
        """Returns the reason why the kernels cannot run here, or None."""
        probe = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
        return gpu.unsupported_reason(probe, probe, probe, None, None, False, None)

    def prepare(self, sizes: Any) -> "Prepared":
        """Returns the arguments on the device, at the size to run, and the results of XLA in float32."""
        batch, time, heads, shared, keys, values = self.shape
        heads = max(1, heads // sizes.narrower)
        shape = (sizes.batch or batch, sizes.time or time, heads, min(heads, shared), keys, values)
        return Prepared(dataclasses.replace(self, shape=shape))


def problems() -> Iterator[Problem]:
    """Yields the shapes of the tables: 16 heads of 128, Mamba-2's, small heads, packed rows, and one row of few heads."""
    wide = (8, 4096, 16, 16, 128, 128)
    yield Problem("scalar decay", wide, forward=_stages(2, 3, 1), backward=_stages(2, 1))
    yield Problem("no decay", wide, decay=False)
    mamba2 = (8, 4096, 64, 1, 128, 64)
    yield Problem("Mamba-2", mamba2, forward=_GROUPED, backward=_GROUPED)
    yield Problem("segments", wide, segments=True)
    small = (8, 4096, 32, 32, 64, 64)
    yield Problem("heads of 64", small, forward=_stages(2, 3), backward=_stages(2, 3))
    pieces = tuple(Settings(pieces=pieces) for pieces in (None, 8, 32, 1))
    yield Problem("one row", (1, 32768, 8, 8, 128, 128), forward=pieces, backward=pieces)
    yield Problem("short row", (1, 2048, 8, 8, 128, 128))


class Prepared:
    """The arrays of a problem, and the functions to time: each takes `arguments(part)` and returns arrays by name."""

    dtype = "bfloat16"

    def __init__(self, problem: Problem):
        self.problem = problem
        batch, time, heads, shared, keys, values = problem.shape
        draw = iter(jax.random.split(jax.random.key(0), 8))

        def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
            return jax.random.normal(next(draw), shape, dtype)

        self._arrays = {
            "q": normal(batch, time, shared, keys),
            "k": normal(batch, time, shared, keys),
            "v": normal(batch, time, heads, values),
            "state": normal(batch, heads, keys, values, dtype=jnp.float32),
        }
        if problem.decay:
            g = -jax.random.uniform(next(draw), (batch, time, heads), jnp.float32, 0.0, 0.2)
            self._arrays["log_decay"] = g
        self._cotangents = {
            "o": normal(batch, time, heads, values),
            "final": normal(batch, heads, keys, values, dtype=jnp.float32),
        }
        self._segments = None
        if problem.segments:
            starts = jax.random.bernoulli(next(draw), 0.005, (batch, time))
            ids = 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
            self._segments = Segments.of(ids.at[:, -time // 50 :].set(0), padding="end")
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (self._arrays, self._cotangents))
        self._expected = jax.block_until_ready(jax.jit(self._both(xla.gated_linear_attention))(*wide))
        self._states = jax.block_until_ready(jax.jit(self._kept)(self._arrays))

    def describe(self) -> str:
        batch, time, heads, shared, keys, values = self.problem.shape
        return f"{batch} x {time}, {heads} heads of {keys} x {values}, queries and keys of {shared}"

    def bytes(self, part: str) -> int:
        """Returns the fewest bytes through memory: inputs and outputs, all of them and their gradients backward."""
        moved = sum(
            self._arrays[name].nbytes for name in ("q", "k", "v", "log_decay") if name in self._arrays
        )
        out = self._cotangents["o"].nbytes
        passes = {"forward": moved + out, "backward": 2 * moved + out}
        return sum(passes.values()) if part == "both" else passes[part]

    def arguments(self, part: str) -> tuple[Any, ...]:
        if part == "forward":
            return (self._arrays,)
        return (self._arrays, self._cotangents) + ((self._states,) if part == "backward" else ())

    def expected(self, part: str) -> Arrays:
        names = {
            "forward": ("o", "final"),
            "backward": [name for name in self._expected if name not in ("o", "final")],
        }
        return {name: self._expected[name] for name in names.get(part, tuple(self._expected))}

    def trials(self, part: str, best: dict[str, Settings]) -> dict[str, tuple[Settings | None, Any]]:
        """Returns the trials of a pass: the settings (None for other implementations) and a function."""
        if part == "forward":
            tried = {_name(s): (s, self._forward(_gpu(forward=s))) for s in self.problem.forward}
            return tried | {"xla": (None, self._forward(xla.gated_linear_attention))}
        if part == "backward":
            return {_name(s): (s, functools.partial(self._backward, s)) for s in self.problem.backward}
        return {
            "gpu, the fastest of both": (None, self._both(_gpu(**best))),
            "xla": (None, self._both(xla.gated_linear_attention)),
        }

    def _forward(self, function: Any) -> Any:
        def run(arrays: Arrays) -> Arrays:
            q, k, v, g = (arrays.get(name) for name in ("q", "k", "v", "log_decay"))
            o, final = function(q, k, v, g, None, self._scale, False, arrays["state"], self._segments, 1e-6)
            return {"o": o, "final": final}

        return run

    @property
    def _scale(self) -> float:
        return self.problem.shape[4] ** -0.5

    def _residuals(self, arrays: Arrays) -> tuple[Any, ...]:
        q, k, v, g = (arrays.get(name) for name in ("q", "k", "v", "log_decay"))
        number = None
        if self._segments is not None:
            number = self._segments.numbers
            g = jnp.where((number == 0)[..., None], 0, g)
        return q, k, v, g, number

    def _call(self, settings: Settings) -> gpu.Call:
        return gpu.Call(self._scale, self.problem.shape[2], gpu.SPAN, gpu.FORWARD, settings)

    def _kept(self, arrays: Arrays) -> jax.Array:
        call = self._call(gpu.BACKWARD)
        return gpu.forward(*self._residuals(arrays), arrays["state"], call, call.span)[1]

    def _backward(self, settings: Settings, arrays: Arrays, cotangents: Arrays, states: Any) -> Arrays:
        call, inputs = self._call(settings), self._residuals(arrays)
        _, length = gpu.layout_backward(*inputs[:3], call)
        residuals = (*inputs, states[:, :, :: max(1, length // call.span)])
        given = cotangents["o"], cotangents["final"]
        dq, dk, dv, dg, _, dstate = gpu.gradients(call, residuals, given)
        if dg is not None and self._segments is not None:
            dg = jnp.where(~self._segments.real[..., None], 0, dg)
        gradients = {"dq": dq, "dk": dk, "dv": dv, "dstate": dstate, "dlog_decay": dg}
        return {name: x for name, x in gradients.items() if x is not None}

    def _both(self, function: Any) -> Any:
        def run(arrays: Arrays, cotangents: Arrays) -> Arrays:
            output, pullback = jax.vjp(self._forward(function), arrays)
            given = {name: cotangents[name].astype(output[name].dtype) for name in output}
            (gradients,) = pullback(given)
            return output | {f"d{name}": gradient for name, gradient in gradients.items()}

        return run


def _gpu(**settings: Settings) -> Any:
    return functools.partial(gpu.gated_linear_attention, **settings)


def _name(settings: Settings) -> str:
    """Returns the stages, and the settings that differ from the defaults, as text."""
    usual = dataclasses.asdict(Settings())
    given = dataclasses.asdict(settings)
    return ", ".join(f"{name} {x}" for name, x in given.items() if name == "stages" or x != usual[name])
