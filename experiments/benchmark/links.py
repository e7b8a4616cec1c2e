"""What the links between devices take: the time of a collective operation against its bytes, and the model that this makes.

    seconds = latency + bytes / bandwidth

Operations run in a chain, each on the result of the one before, and a long chain less a short one is free of what starting a
program costs.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmark.timing import ceilings, interleaved

SHORT, LONG = 4, 36  # operations of a chain
AXIS = "devices"


def _send(x, count):
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % count) for i in range(count)])


def _gather(x, count):
    """The part that another device holds, of what all hold."""
    index = (jax.lax.axis_index(AXIS) + 1) % count
    everything = jax.lax.optimization_barrier(jax.lax.all_gather(x, AXIS))
    return jax.lax.dynamic_index_in_dim(everything, index, keepdims=False)


def _exchange(x, count):
    return jax.lax.all_to_all(x.reshape(count, -1), AXIS, 0, 0).reshape(x.shape)


OPERATIONS = {"send": _send, "all_gather": _gather, "all_to_all": _exchange}


def _sent(name, count):
    """Bytes that a device sends for each that it holds."""
    return {"send": 1, "all_gather": count - 1, "all_to_all": (count - 1) / count}[name]


def measure(devices: Sequence[jax.Device], sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Returns the seconds of each operation at each size, and latency, bandwidth and FLOPs per second of the model.

    Latency and bandwidth are those of "send": a line through the smallest and the largest size. The rate is that of a large
    product in bfloat16 on one device.

    Args:
      devices: at least two.
      sizes: bytes that a device holds; multiples of 4 times the number of devices.
      rounds: measurements of each chain.
    """
    count = len(devices)
    if count < 2:
        raise ValueError(
            "links lie between devices, and JAX sees one; on a CPU set XLA_FLAGS as for `parallel`"
        )
    mesh = Mesh(np.asarray(devices), (AXIS,))
    rows = [_timed(name, size, mesh, rounds) for name in OPERATIONS for size in sorted(sizes)]
    sends = [row for row in rows if row["operation"] == "send"]
    first, last = sends[0], sends[-1]
    bandwidth = (last["sent_bytes"] - first["sent_bytes"]) / max(last["seconds"] - first["seconds"], 1e-12)
    latency = max(first["seconds"] - first["sent_bytes"] / bandwidth, 1e-9)
    return dict(
        devices=count,
        operations=rows,
        links=dict(latency=latency, bandwidth=bandwidth, flops=ceilings("bfloat16").matrix),
    )


def _timed(name, size, mesh, rounds):
    function, count = OPERATIONS[name], mesh.size
    sent = _sent(name, count) * size
    cut = P(AXIS)
    x = jax.device_put(jnp.zeros(count * size // 4, jnp.float32), NamedSharding(mesh, cut))

    def chain(length):
        def local(x):
            for _ in range(length):
                x = jax.lax.optimization_barrier(function(x, count))
            return x

        run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=cut, out_specs=cut))
        # Programs of emulated devices that overlap may wait for each other.
        return lambda: jax.block_until_ready(run(x))

    times = interleaved({"short": chain(SHORT), "long": chain(LONG)}, rounds)
    seconds = max((times["long"].median - times["short"].median) / 1e3 / (LONG - SHORT), 1e-9)
    return dict(
        operation=name,
        bytes=size,
        sent_bytes=sent,
        seconds=seconds,
        bytes_per_second=sent / seconds,
    )
