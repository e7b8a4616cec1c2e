"""The calls and layouts of Hopper kernels that `tune` compares for `delta_rule`."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule import gpu, xla
from layers.kernels.delta_rule.gpu import Settings
from layers.kernels.segments import Segments

Arrays = dict[str, Any]

_FORWARD = (
    Settings(),
    Settings(forward=2),
    Settings(workers=3),
    Settings(workers=2),
    Settings(refinements=0),
    Settings(refinements=2),
)
_BACKWARD = (
    Settings(),
    Settings(states=2),
    Settings(states=4),
    Settings(backward=1),
    Settings(turns=8),
    Settings(turns=1),
)
_PIECES = tuple(Settings(pieces=pieces) for pieces in (None, 8, 1))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of (batch, time, heads, size per head), bfloat16, with the layouts to try, beside XLA."""

    name: str
    shape: tuple[int, int, int, int]
    decay: bool = True
    segments: bool = False
    dtype: str = "bfloat16"
    forward: tuple[Settings, ...] = (Settings(),)
    backward: tuple[Settings, ...] = (Settings(),)

    def refusal(self) -> str | None:
        """Returns the reason why the kernels cannot run here, or None."""
        probe, beta = jnp.zeros((1, 1, 1, 64), jnp.bfloat16), jnp.zeros((1, 1, 1))
        return gpu.unsupported_reason(probe, probe, probe, beta, None, None)

    def prepare(self, sizes: Any) -> "Prepared":
        """Returns the arguments on the device, at the size to run, and the float64 results."""
        batch, time, heads, size = self.shape
        shape = (sizes.batch or batch, sizes.time or time, max(1, heads // sizes.narrower), size)
        return Prepared(dataclasses.replace(self, shape=shape))


def problems() -> Iterator[Problem]:
    """Yields the shapes of speed comparisons, packed rows, and one long row of few heads."""
    wide = (8, 4096, 16, 128)
    yield Problem("gated", wide, forward=_FORWARD, backward=_BACKWARD)
    yield Problem("no decay", wide, decay=False)
    yield Problem("segments", wide, segments=True)
    yield Problem("small heads", (8, 4096, 32, 64), forward=_FORWARD[:2], backward=_BACKWARD[:3])
    yield Problem("one long row", (1, 32768, 8, 128), forward=_PIECES, backward=_PIECES)
    yield Problem("few heads", (2, 8192, 8, 128), forward=_PIECES, backward=_PIECES)
    yield Problem("short row", (1, 2048, 8, 128), forward=_PIECES[:1], backward=_PIECES[:1])


class Prepared:
    """The arrays of a problem, and the functions to time: each takes `arguments(part)` and returns arrays by name."""

    def __init__(self, problem: Problem):
        self.problem, self.dtype = problem, problem.dtype
        batch, time, heads, size = problem.shape
        keys = iter(jax.random.split(jax.random.key(0), 9))

        def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
            return jax.random.normal(next(keys), shape, dtype)

        k = normal(batch, time, heads, size, dtype=jnp.float32)
        decays = jax.nn.softplus(normal(batch, time, heads, dtype=jnp.float32))
        self._arrays = {
            "q": normal(batch, time, heads, size),
            "k": (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype(jnp.bfloat16),
            "v": normal(batch, time, heads, size),
            "beta": jax.nn.sigmoid(normal(batch, time, heads)),
            "state": normal(batch, heads, size, size, dtype=jnp.float32),
        }
        if problem.decay:
            self._arrays["log_decay"] = -0.2 * decays
        self._cotangents = {
            "o": normal(batch, time, heads, size),
            "final": normal(batch, heads, size, size, dtype=jnp.float32),
        }
        self._segments = None
        if problem.segments:
            starts = jax.random.bernoulli(next(keys), 0.005, (batch, time))
            ids = 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
            self._segments = Segments.of(ids.at[:, -time // 50 :].set(0), padding="end")
        self._expected = self._exact()

    def _exact(self) -> Arrays:
        """Returns both passes of the chunked form in float64, row by row to save memory."""
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: x.astype(jnp.float64), (self._arrays, self._cotangents))

            def row(inputs: Any) -> Arrays:
                arrays, cotangents, ids = jax.tree.map(lambda x: x[None], inputs)
                results = _both(functools.partial(_call, xla.delta_rule, ids))(arrays, cotangents)
                return jax.tree.map(lambda x: x[0], results)

            expected = jax.jit(functools.partial(jax.lax.map, row))((*wide, self._segments))
            return jax.block_until_ready(expected)

    def describe(self) -> str:
        return f"{' x '.join(map(str, self.problem.shape))} {self.dtype}"

    def bytes(self, part: str) -> int:
        """Returns the fewest bytes through memory: q, k, v, o forward; these but o, and do, dq, dk, dv backward."""
        size = self._arrays["q"].nbytes
        return {"forward": 4 * size, "backward": 7 * size, "both": 11 * size}[part]

    def arguments(self, part: str) -> tuple[Any, ...]:
        return (self._arrays,) if part == "forward" else (self._arrays, self._cotangents)

    def expected(self, part: str) -> Arrays:
        wanted = {
            "forward": {"o", "final"},
            "backward": {name for name in self._expected if name not in ("o", "final")},
        }
        return {name: v for name, v in self._expected.items() if name in wanted.get(part, self._expected)}

    def trials(self, part: str, best: dict[str, Settings]) -> dict[str, tuple[Settings | None, Any]]:
        """Returns the trials of a pass: the settings (None for other implementations) and a function."""

        def on(function: Any, **settings: Any) -> Any:
            return functools.partial(_call, functools.partial(function, **settings), self._segments)

        if part == "forward":
            tried = {_name(s): (s, on(gpu.delta_rule, settings=s)) for s in self.problem.forward}
            return tried | {"xla": (None, on(xla.delta_rule))}
        if part == "backward":
            return {_name(s): (s, _gradients(on(gpu.delta_rule, settings=s))) for s in self.problem.backward}
        forward, backward = (best.get(name, Settings()) for name in ("forward", "backward"))
        taken = {name: getattr(forward, name) for name in ("forward", "workers", "pieces")}
        fastest = dataclasses.replace(backward, **taken)
        changed = {
            "the fastest of both": {},
            "likewise, states again": {"keep": False},
            "likewise, two refinements": {"refinements": 2},
        }
        trials = {
            f"gpu, {name}": (
                None,
                _both(on(gpu.delta_rule, settings=dataclasses.replace(fastest, **change))),
            )
            for name, change in changed.items()
        }
        return trials | {"xla": (None, _both(on(xla.delta_rule)))}


def _call(function: Any, ids: Any, arrays: Arrays) -> Arrays:
    names = ("q", "k", "v", "beta")
    size = arrays["q"].shape[-1]
    o, final = function(
        *(arrays[name] for name in names),
        arrays.get("log_decay"),
        scale=size**-0.5,
        normalize_qk=False,
        initial_state=arrays["state"],
        segments=ids,
    )
    return {"o": o, "final": final}


def _both(call: Any) -> Any:
    def run(arrays: Arrays, cotangents: Arrays) -> Arrays:
        output, pullback = jax.vjp(call, arrays)
        given = {name: cotangents[name].astype(output[name].dtype) for name in output}
        (gradients,) = pullback(given)
        return output | {f"d{name}": gradient for name, gradient in gradients.items()}

    return run


def _gradients(call: Any) -> Any:
    """Returns the backward pass alone: it uses no output of the forward pass, which is therefore not compiled."""

    def run(arrays: Arrays, cotangents: Arrays) -> Arrays:
        results = _both(call)(arrays, cotangents)
        return {name: x for name, x in results.items() if name not in ("o", "final")}

    return run


def _name(settings: Settings) -> str:
    """Returns the settings that differ from the defaults, as text."""
    changed = {field: x for field, x in dataclasses.asdict(settings).items() if x != getattr(Settings, field)}
    return ", ".join(f"{field} {value}" for field, value in changed.items()) or "default"
