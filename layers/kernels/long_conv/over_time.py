"""The long convolution on a mesh that divides time: devices exchange time for channels, convolve whole rows, and exchange back.

Channels do not mix, so that each device transforms t tokens of d / P channels, as DeepSpeed-Ulysses (Jacobs et al. 2023,
arXiv:2309.14509) does with heads. A device sends b (t / P) d (P - 1) / P numbers for the input, each gate and the output.
"""

from collections.abc import Callable
from typing import Any

import jax

from layers.kernels import partition
from layers.kernels.partition import SEQUENCE_AXIS
from layers.kernels.sequence_parallel import Arguments, entries_of, parts_of_time, spec, spec_of
from layers.kernels.shard_map_types import vary_alike

# c are channels that belong to a device after the exchange, h those before it.
AXES = {
    "x": ("b t h",),
    "input_gate": ("b t h",),
    "output_gate": ("b t h",),
    "kernel": ("c l",),
    "skip": ("c",),
    "initial_state": ("b s c",),
}
TOKENS = "x", "input_gate", "output_gate"


class Exchange:
    """The form over time of `long_conv`."""

    def takes(self, arguments: Arguments) -> bool:
        """Returns whether the mesh in force divides time, and also the channels of each device."""
        x = arguments["x"]
        parts, heads = parts_of_time(x.shape[1]), entries_of(AXES, {"x": x})["h"]
        return parts > 1 and x.shape[2] % (partition.parts(heads) * parts) == 0

    def __call__(self, run: Callable[..., Any], impl: str | None, arguments: Arguments) -> jax.Array:
        """Returns what `long_conv` returns for whole arrays; `run` takes the arguments of one device."""
        del impl  # part of `run`
        arguments = dict(arguments)
        given = {name: arguments.pop(name) for name in AXES if arguments.get(name) is not None}
        entries = entries_of(AXES, given)
        entries |= {"c": (*(entries["h"] or ()), SEQUENCE_AXIS)}

        def local(given):
            given = vary_alike(given)
            given |= {name: _exchanged(given[name], 2, 1) for name in TOKENS if name in given}
            return _exchanged(run(**dict.fromkeys(AXES) | arguments | given), 1, 2)

        specs = {name: spec_of(AXES, name, x, entries) for name, x in given.items()}
        return partition.over_shards(local, (given,), (specs,), spec("b t h", entries))


def _exchanged(x, split, joined):
    """Cuts x along the axis `split`, one part for each device, and joins what arrives along the other axis."""
    return jax.lax.all_to_all(x, SEQUENCE_AXIS, split_axis=split, concat_axis=joined, tiled=True)


OVER_TIME = Exchange()
