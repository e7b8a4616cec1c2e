"""Pieces of mixers written out in NumPy float64, for comparing a module with its equation."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.mixers import make_mixer


def stirred(model):
    """The model with every parameter moved at random, so that none stands at a value which hides it."""
    rng = np.random.default_rng(0)
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parameter[...] += jnp.asarray(0.2 * rng.standard_normal(parameter.shape), jnp.float32)
    return model


def drawn(name, width, **options):
    """A mixer in which every number is drawn at random; nothing but what a test calls is compiled."""
    given = {"width": width, "dtype": jnp.dtype("float32")}
    return filled(lambda: make_mixer(name, options, given=given, rngs=nnx.Rngs(0)))


def filled(make):
    """What `make` returns with every number drawn at random, without running it."""
    model = nnx.eval_shape(make)
    rng = np.random.default_rng(0)
    graph, variables = nnx.split(model)
    numbers = jax.tree.map(lambda v: jnp.asarray(0.4 * rng.standard_normal(v.shape), jnp.float32), variables)
    return nnx.merge(graph, numbers)


def tokens(time, width, rows=2):
    return jnp.asarray(np.random.default_rng(1).standard_normal((rows, time, width)), jnp.float32)


def in_two_calls(model, x):
    """Outputs of two calls of one compiled function, half of x each, and the last state."""
    return in_calls(model, x, 2)


def in_calls(model, x, count):
    """Outputs of so many calls of one compiled function, equal parts of x each, and the last state."""
    graph, variables = nnx.split(model)

    @jax.jit
    def run(x, state):
        return nnx.merge(graph, variables, copy=True)(x, state)

    # The numbers of a state before the first token are part of what a test compiles.
    state = jax.jit(lambda: model.init_state(x.shape[0], max_length=x.shape[1]))()
    outputs = []
    for part in jnp.split(x, count, axis=1):
        y, state = run(part, state)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


def wide(parameter):
    """A parameter as float64."""
    return np.asarray(parameter[...], np.float64)


def apply(linear, x):
    """x W + b."""
    y = x @ wide(linear.kernel)
    return y if linear.bias is None else y + wide(linear.bias)


def low_rank(module, x, activation=lambda v: v):
    """activation(x W_1) W_2 + b."""
    return apply(module.outer, activation(apply(module.inner, x)))


def heads(x, count):
    """(t, h k) -> (t, h, k)."""
    return x.reshape(len(x), count, x.shape[1] // count)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def log_sigmoid(x):
    return -softplus(-x)


def layer_norm(x, epsilon):
    return rms(x - x.mean(-1, keepdims=True), epsilon)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def rms(x, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)


def l2(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def filtered(x, taps):
    """The causal filter of every channel by itself; the last of the taps (w, d) meets the token itself."""
    y = np.zeros_like(x)
    for j in range(min(len(taps), len(x))):
        y[j:] += taps[-1 - j] * x[: len(x) - j]
    return y


def convolved(memory, x):
    """q, k and v of a `DeltaMemory` by heads: silu of the causal filter of every channel, then norms of 1."""
    y = filtered(apply(memory.projection, x), wide(memory.convolution.weight))
    keys = memory.key_heads * memory.key_dim
    q, k, v = np.split(silu(y), [keys, 2 * keys], axis=1)
    return l2(heads(q, memory.key_heads)), l2(heads(k, memory.key_heads)), heads(v, memory.value_heads)


def by_row(function, x):
    """Applies a function of (t, d) to every row of a float64 copy of x."""
    return np.stack([function(row) for row in np.asarray(x, np.float64)])


def masked_softmax(logits, seen):
    """Rows of weights over what is seen, zero elsewhere and in rows that see nothing."""
    weights = np.where(seen, np.exp(np.where(seen, logits, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)
