"""The calls and layouts of Hopper kernels that `tune` compares for `linear_recurrence`."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark.peers import PLAIN
from layers.kernels.linear_recurrence import gpu, reference, xla
from layers.kernels.linear_recurrence.gpu.kernels import Settings
from layers.kernels.segments import Segments

Arrays = dict[str, Any]


def _layouts(*, stages_of_steps: dict[int, tuple[int, ...]], vectors: tuple[int, ...]) -> list[Settings]:
    return [
        Settings(vector=vector, steps=steps, stages=stages)
        for vector in vectors
        for steps, counts in stages_of_steps.items()
        for stages in counts
    ]


_FORWARD = _layouts(stages_of_steps={8: (6,), 16: (4, 6), 32: (2, 3, 4, 5), 64: (2,)}, vectors=(1,))
_FORWARD += _layouts(stages_of_steps={8: (4,), 16: (3, 5), 32: (2,)}, vectors=(2,))
_FORWARD += [Settings(unroll=4), Settings(unroll=16), Settings(pieces=2)]
_BACKWARD = _layouts(stages_of_steps={8: (4, 6), 16: (2, 3, 4), 32: (2,)}, vectors=(1,))
_BACKWARD += _layouts(stages_of_steps={8: (3, 4), 16: (2,)}, vectors=(2,))
_BACKWARD += [Settings(stages=3, unroll=4), Settings(stages=3, unroll=16)]
_FEW = [
    *(Settings(steps=steps, stages=stages) for steps, stages in ((8, 4), (16, 2), (16, 4), (32, 3))),
    Settings(vector=2, steps=16, stages=3),
]
_SMALL = [
    *(Settings(steps=steps, stages=stages) for steps, stages in ((16, 4), (32, 3), (32, 4), (64, 2))),
    *(Settings(vector=2, steps=steps, stages=stages) for steps, stages in ((16, 4), (32, 3))),
]


def _pieces(*counts: int) -> list[Settings]:
    return [
        Settings(steps=steps, stages=3, pieces=pieces, fold=False)
        for steps, pieces in itertools.product((8, 16), counts)
    ]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of one size, with the layouts to try forward and backward, beside XLA and perhaps `associative_scan`."""

    name: str
    shape: tuple[int, int, int]
    dtype: str = "float32"
    constant: bool = False
    segments: bool = False
    scan: bool = False
    forward: tuple[Settings, ...] = tuple(_FEW)
    backward: tuple[Settings, ...] = tuple(_FEW)

    def refusal(self) -> str | None:
        """Returns the reason why the kernels cannot run here, or None."""
        probe = jnp.zeros((1, 1, 8), jnp.float32)
        return gpu.unsupported_reason(probe, probe, None)

    def prepare(self, sizes: Any) -> "Prepared":
        """Returns the arguments on the device, at the size to run, and the float64 results."""
        batch, time, channels = self.shape
        shape = (sizes.batch or batch, sizes.time or time, max(8, channels // sizes.narrower))
        return Prepared(dataclasses.replace(self, shape=shape))


def problems() -> Iterator[Problem]:
    """Yields shapes of S5, LRU and RG-LRU: many rows of many channels, few of either, packed rows."""
    wide = (8, 4096, 2048)
    yield Problem("real", wide, scan=True, forward=tuple(_FORWARD), backward=tuple(_BACKWARD))
    yield Problem("bfloat16", wide, dtype="bfloat16", forward=tuple(_SMALL), backward=tuple(_SMALL))
    yield Problem("segments", wide, segments=True, forward=(Settings(),), backward=tuple(_FEW[1:2]))
    yield Problem("half the machine", (4, 4096, 2048), forward=_try(1, 2), backward=_try(1, 2))
    yield Problem("one row", (1, 65536, 256), forward=_try(8, 32, 64), backward=_try(8, 32, 64))
    yield Problem("complex", (64, 1024, 128), dtype="complex64", scan=True)
    yield Problem(
        "S5 on Pathfinder",
        (64, 1024, 128),
        dtype="complex64",
        constant=True,
        forward=_try(1, 2, 4),
        backward=_try(1, 2, 4),
    )
    yield Problem(
        "S5 on ListOps",
        (50, 2048, 8),
        dtype="complex64",
        constant=True,
        forward=(Settings(), *_try(1, 2, 5, 10)),
        backward=(Settings(stages=3), *_try(1, 2, 5, 10)),
    )


def _try(*counts: int) -> tuple[Settings, ...]:
    return (Settings(stages=3, fold=False), *_pieces(*counts))


class Prepared:
    """The arrays of a problem, and the functions to time: each takes `arguments(part)` and returns arrays by name."""

    def __init__(self, problem: Problem):
        self.problem, self.dtype = problem, problem.dtype
        keys = jax.random.split(jax.random.key(0), 7)
        shape, dtype = problem.shape, jnp.dtype(problem.dtype)
        decay_shape = (1, 1, shape[2]) if problem.constant else shape
        a = jax.random.uniform(keys[0], decay_shape, jnp.float32, 0.5, 0.999)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            a = a * jnp.exp(1j * jax.random.uniform(keys[1], decay_shape, jnp.float32, -3.0, 3.0))
        wide = jnp.promote_types(dtype, jnp.float32)
        self._arrays = {
            "a": a.astype(dtype),
            "x": jax.random.normal(keys[2], shape, dtype),
            "state": jax.random.normal(keys[3], shape[::2], wide),
        }
        self._cotangents = (
            jax.random.normal(keys[4], shape, dtype),
            jax.random.normal(keys[5], shape[::2], wide),
        )
        self._segments = None
        if problem.segments:
            starts = jax.random.bernoulli(keys[6], 0.005, shape[:2])
            ids = 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
            self._segments = Segments.of(ids.at[:, -shape[1] // 50 :].set(0), padding="end")
        with jax.enable_x64(True):
            self._expected = jax.jit(self._both(reference.linear_recurrence))(
                *jax.tree.map(_widened, (self._arrays, self._cotangents))
            )
        jax.block_until_ready(self._expected)
        self._h = self._expected["h"].astype(dtype)

    def describe(self) -> str:
        return f"{' x '.join(map(str, self.problem.shape))} {self.dtype}"

    def bytes(self, part: str) -> int:
        """Returns the fewest bytes through memory: a, x and h forward; a, h and gradients of h, a and x backward."""
        decays, inputs = self._arrays["a"].nbytes, self._arrays["x"].nbytes
        passes = {"forward": decays + 2 * inputs, "backward": 2 * decays + 3 * inputs}
        return sum(passes.values()) if part == "both" else passes[part]

    def arguments(self, part: str) -> tuple[Any, ...]:
        if part == "forward":
            return (self._arrays,)
        return (self._arrays, self._cotangents) + ((self._h,) if part == "backward" else ())

    def expected(self, part: str) -> Arrays:
        names = {"forward": ("h", "final"), "backward": ("da", "dx", "dstate")}
        return {
            name: v for name, v in self._expected.items() if name in names.get(part, tuple(self._expected))
        }

    def trials(self, part: str, best: dict[str, Settings]) -> dict[str, tuple[Settings | None, Any]]:
        """Returns the trials of a pass: the settings (None for other implementations) and a function."""
        if part == "forward":
            tried = {_name(s): (s, self._forward(_gpu(forward=s))) for s in self.problem.forward}
            others = {name: (None, self._forward(f)) for name, f in self._others().items()}
        elif part == "backward":
            return {_name(s): (s, functools.partial(self._backward, s)) for s in self.problem.backward}
        else:
            tried = {"gpu, the fastest of both": (None, self._both(_gpu(**best)))}
            others = {name: (None, self._both(f)) for name, f in self._others().items()}
        return tried | others

    def _others(self) -> dict[str, Any]:
        others = {"xla": xla.linear_recurrence}
        if self.problem.scan:
            scan = PLAIN["linear_recurrence", "real"]["lax.associative_scan"]
            others["lax.associative_scan"] = functools.partial(_by_scan, scan)
        return others

    def _forward(self, function: Any) -> Any:
        def run(arrays: Arrays) -> Arrays:
            h, final = function(arrays["a"], arrays["x"], arrays["state"], self._segments, False)
            return {"h": h, "final": final}

        return run

    def _backward(self, settings: Settings, arrays: Arrays, cotangents: Any, h: Any) -> Arrays:
        call = gpu.Call(False, arrays["x"].dtype, gpu.FORWARD, settings)
        residuals = (arrays["a"], arrays["state"], gpu.token_codes(self._segments, False), h)
        da, dx, dstate, _ = gpu.gradients(call, residuals, cotangents)
        return {"da": da, "dx": dx, "dstate": dstate}

    def _both(self, function: Any) -> Any:
        def run(arrays: Arrays, cotangents: Any) -> Arrays:
            output, pullback = jax.vjp(self._forward(function), arrays)
            given = dict(zip(("h", "final"), cotangents, strict=True))
            (gradients,) = pullback({name: given[name].astype(output[name].dtype) for name in given})
            return output | {f"d{name}": gradient for name, gradient in gradients.items()}

        return run


def _gpu(**settings: Settings) -> Any:
    return functools.partial(gpu.linear_recurrence, **settings)


def _by_scan(scan: Any, a: Any, x: Any, state: Any, segments: Any, reverse: bool) -> Any:
    """Returns the recurrence by `jax.lax.associative_scan`, with the state added to the first input."""
    del segments, reverse
    x = x.at[:, 0].add((a[:, 0] * state).astype(x.dtype))
    h = scan(jnp.broadcast_to(a, x.shape), x)
    return h, h[:, -1].astype(state.dtype)


def _name(settings: Settings) -> str:
    return ", ".join(
        f"{field} {value}" for field, value in dataclasses.asdict(settings).items() if value is not None
    )


def _widened(array: Any) -> Any:
    return array.astype(jnp.promote_types(array.dtype, jnp.float64))
