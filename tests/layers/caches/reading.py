"""One layer of attention that reads a prompt under a policy, and then some tokens one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.caches import read_cache
from layers.caches.kept import Kept
from layers.mixer import MixerState
from layers.mixers.attention.attention import Attention
from layers.parts.attention_config import AttentionConfig

WIDTH, HEADS, GROUPS, PROMPT, STEPS = 12, 4, 2, 19, 4
# The second row has fewer tokens, and padding before them.
LENGTHS = (PROMPT, 13)
TIME = PROMPT + STEPS


@functools.cache
def layer(**options):
    made = Attention(
        AttentionConfig(width=WIDTH, heads=HEADS, kv_heads=GROUPS, head_dim=4, **options),
        rngs=nnx.Rngs(0),
    )
    # Weights of attention that differ from token to token.
    made.query.kernel[...] = 4 * made.query.kernel[...]
    return made


@functools.cache
def inputs():
    return np.asarray(jax.random.normal(jax.random.key(1), (2, TIME, WIDTH)))


def ids():
    """Segment ids of the prompt."""
    return np.array([[0] * (PROMPT - n) + [1] * n for n in LENGTHS], np.int32)


def tokens(row):
    """The inputs of one row without its padding."""
    return inputs()[row, PROMPT - LENGTHS[row] :]


def projected(row, model=None):
    """Queries, keys and values of the tokens of one row in float64."""
    x = jnp.asarray(tokens(row))[None]
    made = (model or layer()).project(x, jnp.arange(x.shape[1])[None], None)
    return [np.asarray(one[0], np.float64) for one in made]


@functools.partial(jax.jit, static_argnames=("policy", "calls"))
def run(model, x, segment_ids, policy, calls=1):
    """Returns the outputs of the prompt and of each step, the state after the prompt, and what is held after each step."""
    empty = model.init_state(x.shape[0], max_length=PROMPT if policy.compresses else TIME)
    state = MixerState(policy.begin(empty.carried, HEADS, 0), empty.place)
    size = -(-PROMPT // calls)
    read = []
    for start in range(0, PROMPT, size):
        piece = slice(start, min(start + size, PROMPT))
        y, state = model(x[:, piece], state, segment_ids=segment_ids[:, piece])
        read.append(y)
    if policy.compresses:
        (kept,) = policy.compressed(
            [state.carried], [model.view()], room=STEPS, surprise=jnp.zeros(segment_ids.shape)
        )
        state = MixerState(kept, state.place)
    first = state

    def step(state, x):
        y, state = model(x[:, None], state)
        return state, (y[:, 0], held(state.carried))

    _, (outputs, after) = jax.lax.scan(step, state, jnp.moveaxis(x[:, PROMPT:], 1, 0))
    return jnp.concatenate(read, axis=1), jnp.moveaxis(outputs, 0, 1), first.carried, after


@functools.partial(jax.jit, static_argnames=("policy",))
def _read(model, x, segment_ids, policy):
    empty = model.init_state(x.shape[0], max_length=PROMPT)
    state = MixerState(policy.begin(empty.carried, HEADS, 0), empty.place)
    return model(x[:, :PROMPT], state, segment_ids=segment_ids)[1].carried


def read_prompt(text):
    """The state after the prompt, before it is compressed."""
    return _read(layer(), jnp.asarray(inputs()), jnp.asarray(ids()), read_cache(text))


def held(carried):
    """What tells the tokens that are held, where that changes from token to token."""
    return (carried.numbers, carried.positions, carried.extra) if isinstance(carried, Kept) else ()


def positions(numbers, positions, row):
    """The positions that each key/value head of a row holds, in the order of slots."""
    return [
        np.asarray(positions)[row, :, g][np.asarray(numbers)[row, :, g] != 0].tolist() for g in range(GROUPS)
    ]


def output(o, model=None):
    """The output of the layer, given what its heads read, (h, v)."""
    projection = (model or layer()).output
    bias = 0.0 if projection.bias is None else np.asarray(projection.bias[...], np.float64)
    return o.reshape(-1) @ np.asarray(projection.kernel[...], np.float64) + bias


@functools.cache
def plain():
    """The outputs of attention without a policy."""
    padded = np.concatenate([ids(), np.ones((2, STEPS), np.int32)], axis=1)
    y, _ = layer()(jnp.asarray(inputs()), segment_ids=jnp.asarray(padded))
    return np.asarray(y)


def given(policy, **options):
    """`run` on the inputs."""
    return run(layer(), jnp.asarray(inputs()), jnp.asarray(ids()), policy, **options)
