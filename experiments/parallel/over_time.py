"""Which mixers run on parts of time, by what their primitives do on the mesh.

A mixer is traced by itself, without computing anything. It has a form over time if a primitive runs on each device's part
(`layers.kernels.sequence_parallel`), none runs on whole rows, and no loop runs outside of these, since no compiler divides the
steps of a loop.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

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
        reason = _without_form(devices, *mixer, rows, tokens)
        if reason is not None:
            raise ValueError(
                f"{path}: {mixer[0].__name__} has no form over time for mesh.sequence={devices.mesh.shape['sequence']}: {reason}; "
                "use mesh.sequence=1 or another mixer, or mesh.otherwise='partitioned', which leaves it to the compiler, "
                "exactly but maybe with whole rows on every device"
            )


def _without_form(devices, kind, config, rows, tokens) -> str | None:
    """Why a mixer cannot run on parts of time; None if it can, or if its attention is left to the compiler."""
    graph, variables = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((rows, tokens, config.width), config.dtype)
    with devices.active(), dispatch.over_time_noted() as calls, dispatch.explained():
        program = jax.make_jaxpr(lambda variables, x: nnx.merge(graph, variables)(x)[0])(variables, x)
    if devices.method == "partitioned" and any(primitive in ATTENTION for primitive, _ in calls):
        return None
    if whole := [primitive for primitive, divided in calls if not divided]:
        return f"{whole[0]} takes whole rows here"
    if not calls:
        return "it calls no primitive that reads tokens"
    loops = [name for name in _outside_of_parts(program.jaxpr) if name in LOOPS]
    return "a loop runs along whole rows" if loops else None


def _outside_of_parts(program) -> Iterator[str]:
    """The operations of a program that do not run on each device's part."""
    for equation in program.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "shard_map":
            for inner in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _outside_of_parts(inner)
