"""The Hopper kernels of `delta_rule` on devices that divide time, under the interpreter and on GPUs.

Under the interpreter all devices are one, and what they exchange is the axis of a map.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels import mosaic_gpu
from layers.kernels.delta_rule import compose, delta_rule, gpu
from layers.kernels.segments import Segments
from layers.kernels.sequence_parallel import Crossing, Cut, part_of_segments, tokens_of
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.test_delta_rule_gpu import TOLERANCE, arguments_of
from tests.layers.kernels.test_sequence_parallel import permuted_on_one_device

DEVICES, TIME = 3, 96
# The first device ends inside a segment, the second one begins another and holds its end, the third begins with padding.
IDS = np.repeat([1, 2, 0, 3, 0, 3, 4], [96, 60, 10, 26, 8, 68, 20])[None].astype(np.int32)


def weights_of(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def on_one_device(arguments, segment_ids, method, pieces):
    """Outputs, final state and gradients by name, from devices that a map stands for."""
    segments = None if segment_ids is None else Segments.of(jnp.asarray(segment_ids))
    crossing = Crossing(compose, method=method)

    def parts(x):
        return jnp.moveaxis(x.reshape(x.shape[0], DEVICES, TIME, *x.shape[2:]), 1, 0)

    def whole(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    def loss(given, tokens, weights, of_final):
        part, begins = part_of_segments(segments, tokens)
        o, final = gpu.delta_rule_across(
            **{"log_decay": None} | given,
            scale=0.25,
            normalize_qk=False,
            segments=part,
            crossing=crossing,
            cut=Cut.of(part, begins),
            settings=gpu.Settings(pieces=pieces, workers=1),
        )
        last = jax.lax.axis_index("sequence") == DEVICES - 1
        return (o * weights).sum() + jnp.where(last, (final * of_final).sum(), 0), (o, final)

    run = jax.grad(loss, has_aux=True)
    initial = arguments["initial_state"]
    given = {name: parts(x) for name, x in arguments.items() if name != "initial_state"}
    given["initial_state"] = jnp.broadcast_to(initial, (DEVICES, *initial.shape))
    weights = (
        parts(weights_of(arguments["v"].shape, 0)),
        jnp.broadcast_to(weights_of(initial.shape, 1), given["initial_state"].shape),
    )
    gradients, (o, final) = jax.jit(jax.vmap(run, axis_name="sequence"))(
        given, jax.tree.map(parts, tokens_of(segments)), *weights
    )
    found = {f"gradient of {name}": whole(x) for name, x in gradients.items() if name != "initial_state"}
    found["gradient of initial_state"] = gradients["initial_state"].sum(0)
    return found | {"o": whole(o), "final_state": final[-1]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "segment_ids, method, pieces, decay",
    [
        (None, "all_scan", 1, True),
        (IDS, "all_gather", 2, True),
        (IDS, "all_scan", 1, False),
        (None, "all_gather", 2, False),
    ],
)
def test_interpreted(segment_ids, method, pieces, decay, monkeypatch):
    monkeypatch.setattr(jax.lax, "ppermute", permuted_on_one_device(jax.lax.ppermute))
    arguments = arguments_of(np.random.default_rng(0), 1, DEVICES * TIME, heads=pieces, decay=decay)
    want = of_reference(arguments, segment_ids)
    with mosaic_gpu.interpreted():
        got = on_one_device(arguments, segment_ids, method, pieces)
    assert got.keys() == want.keys()
    for name, expected in want.items():
        shared.close(got[name], expected, TOLERANCE, name)


def of_reference(arguments, segment_ids):
    """What `on_one_device` returns, in float64 by the reference."""
    ids = None if segment_ids is None else jnp.asarray(segment_ids)

    def loss(arguments):
        o, final = delta_rule(**arguments, scale=0.25, segment_ids=ids, impl="reference")
        total = (o * weights_of(o.shape, 0)).sum() + (final * weights_of(final.shape, 1)).sum()
        return total, (o, final)

    with jax.enable_x64(True):
        exact = jax.tree.map(jnp.asarray, shared.wide(arguments))
        gradients, (o, final) = jax.jit(jax.grad(loss, has_aux=True))(exact)
    found = {f"gradient of {name}": x for name, x in gradients.items()}
    return jax.tree.map(np.asarray, found | {"o": o, "final_state": final})
