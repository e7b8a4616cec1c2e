"""One long row read twice: in chunks by one device that carries the state, and at once by devices that each hold a part."""

import time as clock
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.sharding import MESH_AXES
from seqmodels import build_model

MODEL = dict(
    kind="language_model",
    vocab_size=64,
    width=16,
    depth=2,
    pattern=("mamba2", "gated_deltanet"),
    mixers={
        "mamba2": {"head_dim": 8, "state_size": 8},
        "gated_deltanet": {"heads": 2, "key_dim": 8, "value_dim": 8},
    },
)


def check(length: int, chunk: int, devices: Sequence[jax.Device]) -> None:
    """Raises ValueError unless chunks and devices divide the row."""
    for name, divisor in (("chunk", chunk), ("num_devices", len(devices))):
        if length % divisor:
            raise ValueError(f"row={length} cannot be divided by {name}={divisor}; use a multiple of it")


def compare(length: int, chunk: int, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Returns how far the logits of the two ways lie apart, relative to the largest, and the seconds of each.

    Seconds are those of the first run, in which the divided row is compiled and one chunk is.

    Raises:
      ValueError: chunks do not divide the row, or devices do not.
    """
    check(length, chunk, devices)
    model = build_model(MODEL, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (1, length), np.int32)

    @jax.jit
    def read(parameters, tokens, state):
        return nnx.merge(graph, parameters)(tokens, state)

    start, state, pieces = clock.perf_counter(), model.init_state(1), []
    for first in range(0, length, chunk):
        output, state = read(parameters, jnp.asarray(tokens[:, first : first + chunk]), state)
        pieces.append(np.asarray(output))
    chunked, middle = np.concatenate(pieces, axis=1), clock.perf_counter()
    shape = tuple(len(devices) if name == "sequence" else 1 for name in MESH_AXES)
    mesh = jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(shape), devices=devices)
    with jax.set_mesh(mesh):
        cut = jax.device_put(tokens, NamedSharding(mesh, P(None, "sequence")))
        divided = read(jax.device_put(parameters, NamedSharding(mesh, P())), cut, None)[0]
        parts = {shard.data.shape[1] for shard in divided.addressable_shards}
        divided = np.asarray(divided)
    end = clock.perf_counter()
    return dict(
        length=length,
        chunk=chunk,
        devices=len(devices),
        tokens_per_device=sorted(parts),
        model=MODEL,
        difference=float(np.abs(chunked - divided).max() / np.abs(chunked).max()),
        chunked_seconds=middle - start,
        divided_seconds=end - middle,
    )


def line(found: dict[str, Any]) -> str:
    """Returns what `compare` found as text."""
    return (
        f"\nA row of {found['length']} tokens: in chunks of {found['chunk']} on one device {found['chunked_seconds']:.0f} s, at once on "
        f"{found['devices']} devices {found['divided_seconds']:.0f} s; logits differ by {found['difference']:.1e} of the largest"
    )
