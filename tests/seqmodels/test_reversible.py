"""Reversible layers: their equations, gradients beside those of plain differentiation, states, and memory that does not grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.segments import Segments
from seqmodels import reversible
from seqmodels.config import StackConfig
from seqmodels.stack import Stack

PATTERN = ("attention", "linear_attention+mlp")
WIDTH = 8


def make(depth=5, pattern=PATTERN, **options):
    given = {"heads": 2} if pattern is PATTERN else {}
    config = StackConfig(
        width=WIDTH, depth=depth, pattern=pattern, mixer_defaults=given, residual="reversible", **options
    )
    stack = Stack(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    # So that norms, and maps that start at zero, take part.
    graph, variables = nnx.split(stack)
    drawn = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(rng.standard_normal(x.shape), x.dtype), variables)
    return nnx.merge(graph, drawn)


def inputs(seed=1, time=6):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, time, WIDTH)), jnp.float32)


IDS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])


@pytest.mark.slow
def test_two_streams_add_to_each_other():
    """The equations, layer by layer, with the mixer and the channel mixer of each."""
    stack, x = make(), inputs()
    segments = Segments.of(IDS)
    first = second = jnp.where(segments.real[..., None], x, 0)
    for block in stack.layers:
        mixed, _ = block.mixer(block.mixer_norm(second, mask=segments.real, training=False), segment_ids=IDS)
        first = first + mixed
        second = second + block.channel(block.channel_norm(first, mask=segments.real, training=False))
    y, state = stack(x, segment_ids=IDS)
    assert state is None
    real = np.asarray(segments.real)
    np.testing.assert_allclose(np.asarray(y)[real], np.asarray((first + second) / 2)[real], atol=2e-6)


@pytest.mark.parametrize(
    "pattern, scan, key",
    [
        (("fnet", "fnet+mlp"), True, jax.random.key(2)),
        pytest.param(PATTERN, True, jax.random.key(2), marks=pytest.mark.slow),
        pytest.param(PATTERN, False, None, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_plain_differentiation(monkeypatch, pattern, scan, key):
    """With two repeats in a scan and a layer behind it, dropout and packed rows."""
    stack, x = make(pattern=pattern, scan=scan, dropout=0.2), inputs()
    graph, variables = nnx.split(stack)

    def loss(variables, x):
        y, _ = nnx.merge(graph, variables, copy=True)(x, segment_ids=IDS, key=key)
        return jnp.sum(jnp.sin(y) * jnp.where(IDS[..., None] > 0, 1 + x, 0))

    found = jax.jit(jax.value_and_grad(loss, (0, 1)))(variables, x)
    monkeypatch.setattr(reversible, "_run", reversible._run.fun)
    plain = jax.jit(jax.value_and_grad(loss, (0, 1)))(variables, x)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.slow
def test_steps_are_the_whole_pass():
    stack, x = make(), inputs()
    whole, _ = stack(x)
    state, outputs = stack.init_state(2, max_length=6), []
    for start, end in ((0, 4), (4, 5), (5, 6)):
        y, state = stack(x[:, start:end], state)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_memory_does_not_grow_with_the_depth(scan):
    """What four more layers add to the temporaries of a training step; unrolled, XLA on a CPU adds some to the forward pass alone."""

    def temporaries(depth, residual):
        config = StackConfig(
            width=WIDTH,
            depth=depth,
            pattern=("attention",),
            mixer_defaults={"heads": 2},
            residual=residual,
            scan=scan,
        )
        graph, variables = nnx.split(Stack(config, rngs=nnx.Rngs(0)))

        def loss(variables, x):
            return jnp.sum(jnp.square(nnx.merge(graph, variables)(x)[0]))

        x = jax.ShapeDtypeStruct((1, 4096, WIDTH), jnp.float32)
        compiled = jax.jit(jax.grad(loss)).lower(variables, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    stream = 4096 * WIDTH * 4
    more = {kind: temporaries(8, kind) - temporaries(4, kind) for kind in ("reversible", "separate")}
    assert more["separate"] > 4 * stream
    assert more["reversible"] < (stream if scan else more["separate"] / 4)
