"""The calls and layouts of Hopper kernels that `tune` compares for `short_conv`."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.segments import Segments
from layers.kernels.short_conv import gpu, reference, xla
from layers.kernels.short_conv.gpu.tiles import Settings

Arrays = dict[str, Any]

TAPS = 4


def _layouts(vector: int, stages_of_steps: dict[int, tuple[int, ...]]) -> tuple[Settings, ...]:
    return tuple(
        Settings(vector=vector, steps=steps, stages=stages)
        for steps, counts in stages_of_steps.items()
        for stages in counts
    )


_BFLOAT16 = _layouts(2, {8: (4, 6), 16: (2, 3, 4), 32: (2, 3)}) + _layouts(1, {16: (4,), 32: (2, 3)})
_BFLOAT16 += (Settings(steps=16, unroll=16), Settings(steps=32, stages=2, unroll=16))
_FLOAT32 = _layouts(1, {8: (3, 4), 16: (2, 3, 4), 32: (2,)}) + _layouts(2, {8: (2, 3, 4), 16: (2,)})
_FEW = (*_layouts(2, {8: (4,), 16: (3,), 32: (2,)}), *_layouts(1, {8: (4,), 16: (3, 4)}))
_PIECES = tuple(Settings(stages=3, pieces=pieces) for pieces in (None, 4, 8, 16, 32))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of one size with four taps, bias and SiLU, with the layouts to try forward and backward, beside XLA."""

    name: str
    shape: tuple[int, int, int]
    dtype: str = "bfloat16"
    segments: bool = False
    state: bool = False
    forward: tuple[Settings, ...] = _FEW
    backward: tuple[Settings, ...] = _FEW

    def refusal(self) -> str | None:
        """Returns the reason why the kernels cannot run here, or None."""
        x, weight = jnp.zeros((1, 1, 8), self.dtype), jnp.zeros((TAPS, 8), jnp.float32)
        return gpu.unsupported_reason(x, weight, None, None, None)

    def prepare(self, sizes: Any) -> "Prepared":
        """Returns the arguments on the device, at the size to run, and the float64 results."""
        batch, time, channels = self.shape
        shape = (sizes.batch or batch, sizes.time or time, max(8, channels // sizes.narrower))
        return Prepared(dataclasses.replace(self, shape=shape))


def problems() -> Iterator[Problem]:
    """Yields the channels of models of 125M to 1.3B parameters, in either type, packed rows, and rows with a state."""
    wide = (8, 4096, 1536)
    yield Problem("bfloat16", wide, forward=_BFLOAT16, backward=_BFLOAT16)
    yield Problem("float32", (8, 4096, 2048), dtype="float32", forward=_FLOAT32, backward=_FLOAT32)
    yield Problem("pieces", wide, forward=_PIECES, backward=_PIECES)
    yield Problem("bfloat16, 768", (8, 4096, 768))
    yield Problem("bfloat16, 2048", (8, 4096, 2048))
    yield Problem("float32, 768", (8, 4096, 768), dtype="float32")
    yield Problem("float32, 1536", wide, dtype="float32")
    yield Problem("segments", wide, segments=True)
    yield Problem("state", wide, segments=True, state=True)
    yield Problem("one row", (1, 32768, 768))


class Prepared:
    """The arrays of a problem, and the functions to time: each takes `arguments(part)` and returns arrays by name."""

    def __init__(self, problem: Problem):
        self.problem, self.dtype = problem, problem.dtype
        keys = jax.random.split(jax.random.key(0), 7)
        (batch, time, channels), dtype = problem.shape, jnp.dtype(problem.dtype)
        self._arrays = {
            "x": jax.random.normal(keys[0], problem.shape, dtype),
            "weight": jax.random.uniform(keys[1], (TAPS, channels), jnp.float32, -0.5, 0.5),
            "bias": jax.random.normal(keys[2], (channels,), jnp.float32),
        }
        self._cotangents = {"y": jax.random.normal(keys[3], problem.shape, dtype)}
        if problem.state:
            shape = (batch, TAPS - 1, channels)
            self._arrays["state"] = jax.random.normal(keys[4], shape, jnp.float32)
            self._cotangents["final"] = jax.random.normal(keys[5], shape, jnp.float32)
        self._segments = None
        if problem.segments:
            starts = jax.random.bernoulli(keys[6], 0.005, (batch, time))
            ids = 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
            self._segments = Segments.of(ids.at[:, -time // 50 :].set(0), padding="end")
        with jax.enable_x64(True):
            exact = _both(functools.partial(_call, reference.short_conv, self._segments))
            self._expected = jax.jit(exact)(*jax.tree.map(_widened, (self._arrays, self._cotangents)))
        jax.block_until_ready(self._expected)

    def describe(self) -> str:
        return f"{' x '.join(map(str, self.problem.shape))} {self.dtype}"

    def bytes(self, part: str) -> int:
        """Returns the fewest bytes through memory: x and y forward, x and gradients of x and y backward."""
        return {"forward": 2, "backward": 3, "both": 5}[part] * self._arrays["x"].nbytes

    def arguments(self, part: str) -> tuple[Any, ...]:
        return (self._arrays,) if part == "forward" else (self._arrays, self._cotangents)

    def expected(self, part: str) -> Arrays:
        outputs = {"y", "final"}
        wanted = {"forward": outputs, "backward": self._expected.keys() - outputs}
        return {name: v for name, v in self._expected.items() if name in wanted.get(part, self._expected)}

    def trials(self, part: str, best: dict[str, Settings]) -> dict[str, tuple[Settings | None, Any]]:
        """Returns the trials of a pass: the settings (None for other implementations) and a function."""

        def on(function: Any, **settings: Any) -> Any:
            return functools.partial(_call, functools.partial(function, **settings), self._segments)

        if part == "forward":
            tried = {_name(s): (s, on(gpu.short_conv, forward=s)) for s in self.problem.forward}
            return tried | {"xla": (None, on(xla.short_conv))}
        if part == "backward":
            tried = {_name(s): (s, _gradients(on(gpu.short_conv, backward=s))) for s in self.problem.backward}
            return tried | {"xla": (None, _gradients(on(xla.short_conv)))}
        tried = {"gpu, the fastest of both": (None, _both(on(gpu.short_conv, **best)))}
        return tried | {"xla": (None, _both(on(xla.short_conv)))}


def _call(function: Any, segments: Segments | None, arrays: Arrays) -> Arrays:
    """Returns y, and the final state of calls that have one."""
    x, weight, bias, state = (arrays.get(name) for name in ("x", "weight", "bias", "state"))
    y, final = function(x, weight, bias, "silu", state, segments)
    return {"y": y} if state is None else {"y": y, "final": final}


def _both(call: Any) -> Any:
    def run(arrays: Arrays, cotangents: Arrays) -> Arrays:
        output, pullback = jax.vjp(call, arrays)
        (gradients,) = pullback({name: cotangents[name].astype(output[name].dtype) for name in output})
        return output | {f"d{name}": gradient for name, gradient in gradients.items()}

    return run


def _gradients(call: Any) -> Any:
    """Returns the backward pass alone: it uses no output of the forward pass, which is therefore not compiled."""

    def run(arrays: Arrays, cotangents: Arrays) -> Arrays:
        results = _both(call)(arrays, cotangents)
        return {name: x for name, x in results.items() if name not in ("y", "final")}

    return run


def _name(settings: Settings) -> str:
    return ", ".join(
        f"{field} {value}" for field, value in dataclasses.asdict(settings).items() if value is not None
    )


def _widened(array: Any) -> Any:
    return array.astype(jnp.promote_types(array.dtype, jnp.float64))
