"""Which mixers run on parts of time, by what their primitives do on the mesh.

A mixer is traced by itself, without computing anything. It has a form over time if a primitive runs on each device's part
(`layers.kernels.sequence_parallel`), none runs on whole rows, and no loop outside of these reads tokens, since no compiler
divides the steps of a loop.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Literal

from experiments.parallel.mesh import Devices
from layers.kernels import dispatch
from layers.mixer import Mixer

LOOPS = "scan", "while"
ATTENTION = "attention", "attention_with_lse"


def check_mixers(
    devices: Devices, mixers: Mapping[str, tuple[type[Mixer], Any]], rows: int, tokens: int
) -> None:
    """Raises ValueError for a mixer without a form over time, unless the mesh leaves it to the compiler.

    Args:
      devices: a mesh that divides time.
      mixers: class and config by path.
      rows, tokens: size of a batch.
    """
    if devices.otherwise == "partitioned":
        return
    checked: list[tuple[type[Mixer], Any]] = []
    for path, mixer in mixers.items():
        if mixer in checked:
            continue
        checked.append(mixer)
        reason = without_form(devices, *mixer, rows, tokens)
        if reason is not None:
            raise ValueError(
                f"{path}: {mixer[0].__name__} has no form over time for mesh.sequence={devices.mesh.shape['sequence']}: {reason}; "
                "use mesh.sequence=1 or another mixer, or mesh.otherwise='partitioned', which leaves it to the compiler, "
                "exactly but maybe with whole rows on every device"
            )


def without_form(devices: Devices, kind: type[Mixer], config: Any, rows: int, tokens: int) -> str | None:
    """Returns why a mixer cannot run on parts of time; None if it can, or if its attention is left to the compiler."""
    graph, variables = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((rows, tokens, config.width), config.dtype)
    with devices.active(), dispatch.over_time_noted() as calls, dispatch.explained():
        program = jax.make_jaxpr(lambda variables, x: nnx.merge(graph, variables).alone(x))(variables, x)
    if devices.method == "partitioned" and any(primitive in ATTENTION for primitive, _ in calls):
        return None
    if whole := [primitive for primitive, divided in calls if not divided]:
        return f"{whole[0]} takes whole rows here"
    if not calls:
        return "it calls no primitive that reads tokens"
    *parameters, _ = program.jaxpr.invars
    _, looped = _flow(program.jaxpr, [False] * len(parameters) + [True])
    return "a loop runs along whole rows" if looped else None


def _flow(program, reads: Sequence[bool]) -> tuple[list[bool], bool]:
    """Whether each result of a program depends on tokens, and whether a loop does that is on no device's part.

    Args:
      program: a jaxpr.
      reads: whether each argument depends on tokens.
    """
    known, looped = dict(zip(program.invars, reads, strict=True)), False
    for equation in program.eqns:
        inputs = [not isinstance(x, Literal) and known.get(x, False) for x in equation.invars]
        results = [any(inputs)] * len(equation.outvars)
        if equation.primitive.name in LOOPS:
            looped |= any(inputs)
        elif equation.primitive.name != "shard_map":
            for inner in _programs(equation):
                same = len(inner.invars) == len(inputs)
                found, inside = _flow(inner, inputs if same else [any(inputs)] * len(inner.invars))
                results = found if same and len(found) == len(results) else results
                looped |= inside
        known |= zip(equation.outvars, results, strict=True)
    return [not isinstance(x, Literal) and known.get(x, False) for x in program.outvars], looped


def _programs(equation) -> list[Any]:
    """The programs that an operation runs."""
    values = (getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(equation.params.values())))
    return [value for value in values if hasattr(value, "eqns")]
