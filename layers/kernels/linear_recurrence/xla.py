"""`linear_recurrence` in plain JAX: a blocked scan with its own backward pass.

The sequence is cut into blocks of a few steps. A first pass reads the inputs and reduces each block to its total decay
and its contribution to the state. The same problem, shorter, gives the state at the start of every block. A last pass
runs through all blocks at once. Every pass is a few elementwise operations over slices, which XLA fuses, whereas
`jax.lax.associative_scan` makes two passes over memory for each of log2(t) levels.

The backward pass is the same recurrence in the other direction,

    g_t = dh_t + a_{t+1} g_{t+1},    dx_t = g_t,    da_t = g_t h_{t-1},    dh_0 = a_1 g_1,

and needs only a and the output h.
"""

import functools

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.promotion import joint_dtype, promoting
from layers.kernels.segments import reset_mask
from layers.kernels.shard_map_types import vary_like
from layers.kernels.sizes import in_chunks, known

# Steps per block.
BLOCK = {"gpu": 16, "cpu": 8}


def linear_recurrence(a, x, initial_state, segments, reverse):
    """Returns every state and the last; the public function has checked the arguments."""
    dtype = accumulation_dtype(a, x, initial_state)
    state = (
        jnp.zeros((x.shape[0], x.shape[2]), dtype) if initial_state is None else initial_state.astype(dtype)
    )
    start = padding = None
    if segments is not None:
        start, padding = reset_mask(segments, reverse), ~segments.real
    return _recurrence(vary_like(a, x), x, vary_like(state, x), start, padding, reverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _recurrence(a, x, state, start, padding, reverse):
    """Outputs in the type of x (complex if a is), and the final state in the type of `state`."""
    return _forward(a, x, state, start, padding, reverse)[0]


def _forward(a, x, state, start, padding, reverse):
    decay, inputs = _masked(a, x, state.dtype, padding)
    h, final = _scan(decay, inputs, state, start, reverse)
    h = h.astype(joint_dtype(x.dtype, jnp.complex64) if jnp.iscomplexobj(a) else x.dtype)
    return (h, final), (a, x, state, start, padding, h)


def _backward(reverse, residuals, cotangents):
    a, x, state, start, padding, h = residuals
    dh, dfinal = cotangents
    decay, _ = _masked(a, x, state.dtype, padding)
    first, last = (-1, 0) if reverse else (0, -1)
    # The gradient of the final state enters with that of the last output; what `later` holds there then meets zero.
    dh = dh.astype(state.dtype).at[:, last].add(dfinal)
    # An output that is not finite has no gradient, and neither have the later ones of its segment, which are not finite
    # either: what multiplies their gradients may be zero.
    fit = jnp.isfinite(h)
    dh = jnp.where(fit, dh, 0)
    h, state, decay = jnp.where(fit, h, 0), _finite(state), _finite(decay)
    later = decay if decay.shape[1] == 1 else jnp.roll(decay, 1 if reverse else -1, axis=1)
    resets = None
    if start is not None:
        resets = jnp.roll(start, 1 if reverse else -1, axis=1).at[:, last].set(True)
    g, _ = _scan(later, dh, jnp.zeros_like(state), resets, not reverse)
    earlier = jnp.concatenate([h[:, 1:], state[:, None]] if reverse else [state[:, None], h[:, :-1]], axis=1)
    dstate = decay[:, first] * g[:, first]
    da, dx = g * earlier.astype(state.dtype), g
    if padding is not None:
        da = jnp.where((padding if start is None else start | padding)[..., None], 0, da)
        dx = jnp.where(padding[..., None], 0, dx)
    da = da.sum([axis for axis in (0, 1) if a.shape[axis] == 1], keepdims=True)
    return _cast(da, a.dtype), _cast(dx, x.dtype), dstate, None, None


_recurrence.defvjp(promoting(_forward), promoting(_backward))


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def _masked(a, x, dtype, padding):
    """Decay and input, with padding as steps that keep the state."""
    a, x = a.astype(dtype), x.astype(dtype)
    if padding is None:
        return a, x
    a = jnp.where(padding[..., None], 1, a)
    return a, jnp.where(padding[..., None], 0, x)


def _scan(a, x, state, start, reverse):
    """Every state and the last; a may have a single step that stands for all, and `start` (b, t) or None resets the state."""
    if reverse:
        start = None if start is None else start[:, ::-1]
        h, final = _scan(a[:, ::-1], x[:, ::-1], state, start, False)
        return h[:, ::-1], final
    time, block = x.shape[1], BLOCK.get(jax.default_backend(), 8)
    start = None if start is None else start[..., None]
    if known(time) and time <= block:
        h = _run(_steps(a, time), _steps(x, time), _steps(start, time), state)
        return jnp.stack(h, axis=1), h[-1]
    decays, inputs, starts = (_steps(_in_blocks(v, block), block) for v in (a, x, start))
    total = functools.reduce(jnp.multiply, decays)
    contribution = _run(decays, inputs, starts, jnp.zeros((), x.dtype))[-1]
    begins = None if start is None else functools.reduce(jnp.logical_or, starts)[..., 0]
    across = _scan if known(time) else _one_by_one
    ends, _ = across(total, contribution, state, begins, False)
    before = jnp.concatenate([state[:, None], ends[:, :-1]], axis=1)
    h = jnp.stack(_run(decays, inputs, starts, before), axis=2)
    h = h.reshape(h.shape[0], h.shape[1] * block, h.shape[-1])[:, :time]
    return h, h[:, -1]


def _one_by_one(a, x, state, start, reverse):
    """What `_scan` returns, for a number of steps that is not known."""
    a = jnp.broadcast_to(a, x.shape)

    def step(h, inputs):
        a, x, *start = inputs
        h = _run([a], [x], start or [None], h)[0]
        return h, h

    inputs = [a, x] if start is None else [a, x, start[..., None]]
    final, h = jax.lax.scan(step, state, tuple(v.swapaxes(0, 1) for v in inputs), reverse=reverse)
    return h.swapaxes(0, 1), final


def _in_blocks(v, block):
    """(b, t, d) to (b, blocks, block, d), padded with zeros; a single step that stands for all stays one."""
    if v is None:
        return None
    if v.shape[1] == 1:
        return v[:, None]
    whole = in_chunks(v.shape[1], block)
    v = jnp.pad(v, ((0, 0), (0, whole - v.shape[1]), (0, 0)))
    return v.reshape(v.shape[0], whole // block, block, v.shape[-1])


def _steps(v, count):
    """The slices of the next-to-last axis, one per step."""
    if v is None:
        return [None] * count
    return [v[..., 0 if v.shape[-2] == 1 else i, :] for i in range(count)]


def _run(decays, inputs, starts, state):
    """The unrolled recurrence: the list of states after each step.

    A start selects zero: the state of the segment before may be infinite, and its decay NaN.
    """
    states = []
    for a, x, start in zip(decays, inputs, starts, strict=True):
        carried = a * state
        state = (carried if start is None else jnp.where(start, 0, carried)) + x
        states.append(state)
    return states


def _cast(v, dtype):
    """`v` in `dtype`; the gradient of a real argument is the real part."""
    return (v if jnp.issubdtype(dtype, jnp.complexfloating) else v.real).astype(dtype)
