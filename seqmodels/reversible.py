"""Layers whose inputs the backward pass computes from their outputs, so that it keeps those of no layer."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.segments import Segments
from layers.sharding import divide_batch
from layers.typing import Array, Float, Key


def doubled(x: Float[Array, "b t d"]) -> Float[Array, "b t 2*d"]:
    """Returns both streams before the first layer, which are x, in float32."""
    return jnp.concatenate([x, x], axis=-1).astype(jnp.float32)


def merged(x: Float[Array, "b t e"], dtype: Any) -> Float[Array, "b t e//2"]:
    """Returns the mean of both streams after the last layer."""
    first, second = jnp.split(x, 2, axis=-1)
    return ((first + second) / 2).astype(dtype)


def check(blocks: Sequence[nnx.Module]) -> None:
    """Raises ValueError if a block keeps statistics or losses, which a second run of a layer would write twice."""
    for layer, block in enumerate(blocks):
        kept = sorted(path for path, _ in nnx.to_flat_state(nnx.state(block, nnx.Not(nnx.Param))))
        if kept:
            raise ValueError(
                f"residual='reversible' runs layers twice, and layer {layer} keeps {'.'.join(map(str, kept[0]))}; expected a norm "
                "without statistics, and mixers and channel mixers without losses"
            )


def run(
    x: Float[Array, "b t e"],
    stacked: Sequence[nnx.Module],
    blocks: Sequence[nnx.Module],
    segments: Segments | None,
    keys: Key[Array, " n"] | None,
) -> Float[Array, "b t e"]:
    """Returns both streams after all layers.

    Args:
      x: both streams, side by side.
      stacked: blocks of a pattern with a leading axis of repeats; none if empty.
      blocks: those of the layers behind them.
      keys: one per layer, in training.
    """
    graphs, variables = zip(*(nnx.split(block) for block in (*stacked, *blocks)), strict=True)
    repeats = len(jax.tree.leaves(variables[0])[0]) if stacked else 0
    scanned = repeats * len(stacked)
    in_scan = None if keys is None else keys[:scanned].reshape(repeats, len(stacked), *keys.shape[1:])
    behind = None if keys is None else keys[scanned:]
    graphs = graphs[: len(stacked)], graphs[len(stacked) :]
    variables = variables[: len(stacked)], variables[len(stacked) :]
    return _run(graphs, x, variables, segments, (in_scan, behind))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(graphs, x, variables, segments, keys):
    (in_scan, behind), (stacked, blocks), (scan_keys, keys) = graphs, variables, keys

    def body(x, layer):
        parts, keys = layer
        for place, (graph, part) in enumerate(zip(in_scan, parts, strict=True)):
            x = _one(graph, part, x, segments, None if keys is None else keys[place])
        return x, None

    if in_scan:
        x, _ = jax.lax.scan(body, x, (stacked, scan_keys))
    for place, (graph, part) in enumerate(zip(behind, blocks, strict=True)):
        x = _one(graph, part, x, segments, None if keys is None else keys[place])
    return x


def _one(graph, part, x, segments, key):
    x, _ = nnx.merge(graph, part)(x, segment_ids=segments, key=key)
    return divide_batch(x)


def _forward(graphs, x, variables, segments, keys):
    x = _run(graphs, x, variables, segments, keys)
    return x, (x, variables, segments, keys)


def _backward(graphs, residuals, dx):
    x, (stacked, blocks), segments, (scan_keys, keys) = residuals
    (in_scan, behind), found = graphs, []
    for place in reversed(range(len(behind))):
        key = None if keys is None else keys[place]
        x, dx, gradient = _back(behind[place], blocks[place], x, dx, segments, key)
        found.insert(0, gradient)

    def body(carry, layer):
        (x, dx), (parts, keys), gradients = carry, layer, []
        for place in reversed(range(len(in_scan))):
            key = None if keys is None else keys[place]
            x, dx, gradient = _back(in_scan[place], parts[place], x, dx, segments, key)
            gradients.insert(0, gradient)
        return (x, dx), tuple(gradients)

    scanned = ()
    if in_scan:
        (x, dx), scanned = jax.lax.scan(body, (x, dx), (stacked, scan_keys), reverse=True)
    return dx, (scanned, tuple(found)), None, None


def _back(graph, part, x, dx, segments, key):
    """Returns the input of a layer and its gradient, and that of its variables, given its output and the gradient of that.

    With x_1 = u_1 + f(u_2) and x_2 = u_2 + g(x_1): u_2 = x_2 - g(x_1) and u_1 = x_1 - f(u_2).
    """

    def branch(name):
        return lambda part, u: nnx.merge(graph, part).branch(name, u, segments, key)

    (first, second), (dfirst, dsecond) = (jnp.split(each, 2, axis=-1) for each in (x, dx))
    y, pull = jax.vjp(branch("channel"), part, first)
    second = second - y
    of_channel, more = pull(dsecond)
    dfirst = dfirst + more
    y, pull = jax.vjp(branch("mixer"), part, second)
    first = first - y
    of_mixer, more = pull(dfirst)
    dsecond = dsecond + more
    gradient = jax.tree.map(jnp.add, of_channel, of_mixer)
    x, dx = (divide_batch(jnp.concatenate(pair, axis=-1)) for pair in ((first, second), (dfirst, dsecond)))
    # The gradient before the layer below, or else what it reads of every layer is in memory at once.
    return jax.lax.optimization_barrier((x, dx, gradient))


_run.defvjp(_forward, _backward)
