"""`long_conv` on Hopper GPUs, by Pallas's Triton backend, for bfloat16 inputs.

layout.py lays out inputs by channel, and kernels.py convolves them by the transforms of transforms.py. Plain JAX brings outputs back to
the layout of the input.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from layers.kernels import pallas_triton, partition
from layers.kernels.isolation import reached_by
from layers.kernels.long_conv.gpu.kernels import convolve, gradients
from layers.kernels.long_conv.gpu.layout import by_channel
from layers.kernels.long_conv.gpu.transforms import plan_of, scale_to
from layers.kernels.mosaic_gpu import MAX_GRID, lowered_once
from layers.kernels.promotion import promoting
from layers.kernels.shard_map_types import vary_as

MOST_ELEMENTS = 2**31 - 1


def unsupported_reason(
    x, kernel, skip, input_gate, output_gate, initial_state, circular, **_: Any
) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if initial_state is not None:
        return "initial_state is given; the kernels take rows that begin with x"
    if circular:
        return "circular=True; the kernels take causal convolutions"
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}; expected bfloat16"
    for name, v in {
        "kernel": kernel,
        "skip": skip,
        "input_gate": input_gate,
        "output_gate": output_gate,
    }.items():
        if v is not None and v.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} has dtype {v.dtype}; expected float32 or bfloat16"
    plan, (batch, _, width) = plan_of(x.shape[1], kernel.shape[1], backward=True), x.shape
    if batch > MAX_GRID:
        return f"x has {batch} rows; expected at most {MAX_GRID}"
    if 2 * (batch + 1) * width * plan.tokens > MOST_ELEMENTS:
        return f"x has shape {x.shape}; expected at most {MOST_ELEMENTS // 2} numbers, a row and whole blocks included"
    if jax.typeof(x).sharding.spec[1] is not None:
        return f"x is sharded {jax.typeof(x).sharding.spec}; expected whole rows, time not sharded"
    return pallas_triton.refusal(_probe)


def long_conv(x, kernel, skip, input_gate, output_gate, initial_state, circular):
    """Returns the outputs; the public function has checked the arguments."""
    del initial_state, circular
    taps = kernel[:, : x.shape[1]].astype(jnp.float32)
    if skip is not None:
        taps = taps.at[:, 0].add(skip.astype(jnp.float32))
    rows, _, split = partition.spec_of(x, heads=2)
    series = P(rows, None, split)
    arrays = {"x": (x, series), "taps": (taps, P(split, None))}
    gates = {"input_gate": input_gate, "output_gate": output_gate}
    arrays |= {name: (gate, series) for name, gate in gates.items() if gate is not None}

    def run(*given):
        local = dict(zip(arrays, (vary_as(v, *given) for v in given), strict=True))
        return _gated(local["x"], local["taps"], *(local.get(name) for name in gates))

    return partition.over_shards(run, *zip(*arrays.values(), strict=True), series)


@jax.custom_vjp
def _gated(x, taps, input_gate, output_gate):
    return forward(x, taps, input_gate, output_gate)[0]


@lowered_once()
def forward(x, taps, input_gate, output_gate):
    """Returns the outputs, the tokens that are not finite, (b, t), and the outputs that they reach, (b, t)."""
    plan = plan_of(x.shape[1], taps.shape[1])
    u, peak, unfit = by_channel(x, input_gate, None, plan.tokens, cleaned=True)
    reached = reached_by(unfit, taps.shape[1])
    if output_gate is not None:
        reached |= ~jnp.isfinite(output_gate).all(2)
    y = _by_token(convolve(u, scale_to(peak), taps, plan), x)
    y = y if output_gate is None else (y * output_gate).astype(x.dtype)
    return jnp.where(reached[..., None], jnp.nan, y), unfit, reached


def _forward(x, taps, input_gate, output_gate):
    y, unfit, reached = forward(x, taps, input_gate, output_gate)
    return y, (x, taps, input_gate, output_gate, unfit, reached)


@lowered_once()
def backward(residuals, dy):
    """The backward pass, from the arguments alone."""
    x, taps, input_gate, output_gate, unfit, reached = residuals
    plan = plan_of(x.shape[1], taps.shape[1], backward=True)
    u, peak, _ = by_channel(x, input_gate, None, plan.tokens, cleaned=True)
    g, peak_of_g, _ = by_channel(dy, output_gate, reached.astype(jnp.int32), plan.tokens, cleaned=False)
    scale = scale_to(peak)
    du, dtaps = gradients(u, scale, g, scale_to(peak_of_g), taps, plan)
    dx, dinput, doutput = _by_token(du, x), None, None
    if input_gate is not None:
        dinput = _without(unfit, dx * x, input_gate)
        dx = dx * input_gate
    if output_gate is not None:
        plan = plan_of(u.shape[2], taps.shape[1])
        doutput = _without(reached, dy * _by_token(convolve(u, scale, taps, plan), x), output_gate)
    return _without(unfit, dx, x), dtaps, dinput, doutput


_gated.defvjp(promoting(_forward), promoting(backward))


def _by_token(y, like):
    """Series by channel, (b, d, tokens), as (b, t, d)."""
    return y[:, :, : like.shape[1]].swapaxes(1, 2)


def _without(flags, x, like):
    return jnp.where(flags[..., None], 0, x).astype(like.dtype)


def _probe() -> None:
    """Lowers both passes of a small call."""

    def loss(x, taps):
        return _gated(x, taps, x, x).sum()

    x = jax.ShapeDtypeStruct((2, 16, 16), jnp.bfloat16)
    taps = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    with jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        jax.jit(jax.grad(loss, (0, 1))).trace(x, taps).lower(lowering_platforms=("cuda",))
