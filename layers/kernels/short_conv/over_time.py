"""The short convolution on a mesh that divides time: a part needs the last w - 1 inputs before it.

They are the halo that the device before sends, where padding stands only at the end and a part holds at least w - 1 tokens.
Otherwise they may lie further back, and all devices gather the last inputs of every part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels import partition
from layers.kernels.partition import SEQUENCE_AXIS
from layers.kernels.sequence_parallel import (
    Arguments,
    Cut,
    Recurrence,
    across,
    entries_of,
    of_last,
    part_of_segments,
    spec,
    spec_of,
    tokens_of,
)
from layers.kernels.shard_map_types import vary_alike


class Convolution(Recurrence):
    """The form over time of `short_conv`."""

    def __call__(self, run: Callable[..., Any], impl: str | None, arguments: Arguments) -> Any:
        """Returns what `short_conv` returns for whole arrays; `run` takes the arguments of one device."""
        arguments = dict(arguments)
        segments = arguments.pop("segments")
        given = {name: arguments.pop(name) for name in self.axes if arguments.get(name) is not None}
        entries = entries_of(self.axes, given)

        def local(given, tokens):
            given, tokens = vary_alike((given, tokens))
            part, begins = part_of_segments(segments, tokens)
            everything = dict.fromkeys(self.axes) | arguments | given
            x, initial = given["x"], given.get("initial_state")
            memory = given["weight"].shape[0] - 1
            beside = x.shape[1] >= memory and (part is None or part.padding == "end")
            if beside:
                tail = slice(x.shape[1] - memory, x.shape[1])
                cut = None if part is None else part.cut(tail.start, tail.stop)
                halo = self.summarize(everything | {"x": x[:, tail]}, cut, impl).state
                own = _from_before(halo, initial)
                if begins is not None:
                    own = jnp.where(begins[:, None, None], 0, own)
            if not beside or part is not None:
                # The last real inputs of a row may lie on any device.
                piece = self.summarize(everything, part, impl)
                gathered, after = across(piece, self.compose, Cut.of(part, begins), initial)
                own = own if beside else gathered
            y, final = run(**everything | {"initial_state": own}, segments=part)
            return y, of_last(final if part is None else after)

        specs = {name: spec_of(self.axes, name, x, entries) for name, x in given.items()}
        rows = spec("b t", entries)
        results = spec(self.outputs, entries), spec(self.state, entries)
        return partition.over_shards(local, (given, tokens_of(segments)), (specs, rows), results)


def _from_before(halo, initial):
    """The halo of the device before; on the first device the initial state, zero if None."""
    count = jax.lax.axis_size(SEQUENCE_AXIS)
    halo = jax.lax.ppermute(halo, SEQUENCE_AXIS, [(i, i + 1) for i in range(count - 1)])
    if initial is None:
        return halo
    return jnp.where(jax.lax.axis_index(SEQUENCE_AXIS) == 0, initial.astype(halo.dtype), halo)
