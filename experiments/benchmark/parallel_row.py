"""One long row read twice: in chunks by one device that carries the state, and at once by devices that each hold a part."""

import time as clock
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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


def compare(
    length: int,
    chunk: int,
    devices: Sequence[jax.Device],
    config: Mapping[str, Any] = MODEL,
    turn: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Returns how far the outputs of the two ways lie apart, relative to the largest, and the seconds of each.

    Outputs are the vectors of all tokens before the output matrix, and the logits of the last token. Each way is timed the
    second time.

    Args:
      length: tokens of the row.
      chunk: tokens that one device, the first, reads at once.
      devices: those that the row is cut over.
      config: the section `model`, of a language model.
      turn: context in which programs run.

    Raises:
      ValueError: chunks do not divide the row, or devices do not.
    """
    check(length, chunk, devices)
    model = build_model(config, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (1, length), np.int32)

    @jax.jit
    def read(parameters, tokens, state):
        outputs, state = nnx.merge(graph, parameters).unprojected(tokens, state)
        return (outputs.x, outputs._replace(x=outputs.x[:, -1:]).logits), state

    pieces = [jnp.asarray(tokens[:, first : first + chunk]) for first in range(0, length, chunk)]
    initial = model.init_state(1)
    with jax.set_mesh(_mesh(devices[:1])):
        compiled = read.lower(parameters, pieces[0], initial).compile()

        def in_chunks(compiled=compiled, parameters=parameters):
            state, found = initial, []
            for piece in pieces:
                (vectors, last), state = compiled(parameters, piece, state)
                found.append(vectors)
            return found, last

        with turn():
            (found, last), chunked_seconds = _timed(in_chunks)
    chunked = np.concatenate([np.asarray(vectors, np.float32) for vectors in found], axis=1), np.asarray(last)
    del found
    mesh = _mesh(devices)
    with jax.set_mesh(mesh):
        cut = jax.device_put(tokens, NamedSharding(mesh, P(None, "sequence")))
        parameters = jax.device_put(parameters, NamedSharding(mesh, P()))
        compiled = read.lower(parameters, cut, None).compile()
        with turn():
            ((vectors, last), _), divided_seconds = _timed(lambda: compiled(parameters, cut, None))
    parts = {shard.data.shape[1] for shard in vectors.addressable_shards}
    divided = np.asarray(vectors, np.float32), np.asarray(last)
    differences = [
        float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(chunked, divided, strict=True)
    ]
    return dict(
        time=length,
        chunk=chunk,
        devices=len(devices),
        tokens_per_device=sorted(parts),
        model=config,
        difference=differences[0],
        last_logits_difference=differences[1],
        last_token_agrees=bool(chunked[1].argmax() == divided[1].argmax()),
        chunked_seconds=chunked_seconds,
        divided_seconds=divided_seconds,
    )


def _timed(run):
    """What `run` returns, and the seconds of its second call."""
    jax.block_until_ready(run())
    start = clock.perf_counter()
    return jax.block_until_ready(run()), clock.perf_counter() - start


def _mesh(devices):
    """A mesh that divides time over these devices."""
    shape = tuple(len(devices) if name == "sequence" else 1 for name in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(shape), devices=devices)


def line(found: dict[str, Any]) -> str:
    """Returns what `compare` found as text."""
    return (
        f"\nA row of {found['time']} tokens: in chunks of {found['chunk']} on one device {found['chunked_seconds']:.2f} s, at once on "
        f"{found['devices']} devices {found['divided_seconds']:.2f} s; outputs differ by {found['difference']:.1e} of the largest, "
        f"the last logits by {found['last_logits_difference']:.1e}"
    )
