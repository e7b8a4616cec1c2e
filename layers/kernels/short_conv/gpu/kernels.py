"""The Mosaic GPU kernels of `short_conv`, forward and backward, each in one pass over memory.

With m = w - 1, the pre-activation p and s = sigmoid(p),

    p_t = bias + sum_k weight_{m-k} x_{t-k},   y_t = p_t s_t,   k = 0 .. m
    dp_t = dy_t (s_t + y_t (1 - s_t)),   dx_t = sum_k weight_{m-k} dp_{t+k},   dweight_{m-k} = sum_t dp_t x_{t-k}.

Every lane walks forward through its own channels, with the last m inputs in registers. The backward pass computes p again. In
registers it also has the unfinished sums of the last m dx, so that a row of dx is complete m steps after its own, and the sums
dweight and dbias of its piece, which XLA adds over rows and pieces. A piece of time computes dp once more for the m tokens
behind it, whose sums count in the next one.

    forward   reads x        writes y     w + 6 operations per element, 2 of them on the unit for exponentials and reciprocals
    backward  reads x, dy    writes dx    3 w + 11

where a multiplication and an addition are one. At 4.2 TB/s, 8 x 4096 x 1536 in bfloat16 take 0.05 ms forward and 0.07 ms
backward. An H200 issues 28 operations per ns, which is 0.02 and 0.04 ms, and the special unit needs 0.03 ms in either pass, beside the others.
Memory bounds both passes.

A segment is a code per token: k is taken where code_t >= k, both from x_{t-k} into p_t and from dp_t into dx_{t-k}. What is
not taken is selected away, never multiplied by zero.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.mosaic_gpu import launch, pl, plgpu, sigmoid
from layers.kernels.short_conv.gpu.tiles import FEWEST_ROWS, Block, Plan, Settings, Values, buffers, plan_of


def forward(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    codes: jax.Array | None,
    silu: bool,
    settings: Settings,
) -> jax.Array:
    """Returns y, (b, t, d) in the type of x.

    Args:
      x: (b, t, d), rows a multiple of 16 bytes.
      weight: (w, d), w at least 2.
      bias: (d).
      state: (b, m, d), the inputs before the first.
      codes: (b, t), int32: how many tokens before each one its taps take, at most m; -1 at padding.
    """
    memory = weight.shape[0] - 1
    size = x.dtype.itemsize
    plan = plan_of(x.shape, memory, settings, size, size, size)
    steps, width = plan.settings.steps, plan.settings.width
    scratch = {
        **buffers(plan, codes is not None, 1, x=x.dtype),
        "x_before": plgpu.SMEM((memory, width), x.dtype),
        "y_tiles": plgpu.SMEM((2, steps, width), x.dtype),
    }

    def body(*, x, weight, y, x_tiles, y_tiles, bias=None, **refs):
        block = Block(plan, {"x": x, "x_tiles": x_tiles} | refs, "x")
        block.fetch_beside()
        taps, offset = _parameters(block, weight, bias)

        def tile(number, first, slot, window):
            turn = jax.lax.rem(number, 2)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            def run(rows, window):
                read = [(block.load(x_tiles.at[slot, row]), block.count(slot, row)) for row in rows]
                for row, (value, count) in zip(rows, read, strict=True):
                    inputs = (*window, value)
                    p = _sum(_taken(block, inputs, count), taps, offset)
                    result = p * sigmoid(p) if silu else p
                    if count is not None:
                        result = jnp.where(block.scalar(count >= 0), result, 0.0)
                    y_tiles[turn, row] = result.astype(y_tiles.dtype)
                    window = inputs[1:]
                return window

            window = block.rows(run, window)
            plgpu.commit_smem()
            block.send(y_tiles, turn, y, first, steps)
            return window

        block.stream(tile, block.enter())
        plgpu.wait_smem_to_gmem(0)

    return launch(
        body,
        name="short_conv",
        grid=plan.grid,
        inputs={"x": x, **_padded(plan, weight, bias, state, codes)},
        outputs={"y": jax.ShapeDtypeStruct(x.shape, x.dtype)},
        scratch=scratch,
    )["y"]


def backward(
    x: jax.Array,
    dy: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    codes: jax.Array | None,
    silu: bool,
    settings: Settings,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Returns dx in the type of x, and dweight, dbias and dstate in float32; arguments as for `forward`."""
    memory, channels = weight.shape[0] - 1, x.shape[2]
    size, given = x.dtype.itemsize, dy.dtype.itemsize
    plan = plan_of(x.shape, memory, settings, size + given, size, 2 * size + given)
    steps, width = plan.settings.steps, plan.settings.width
    sums = weight.shape[0] + (bias is not None)
    outputs = {
        "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "sums": jax.ShapeDtypeStruct((plan.batch, plan.pieces, sums, plan.padded), jnp.float32),
    }
    if state is not None:
        outputs["dstate"] = jax.ShapeDtypeStruct((plan.batch, memory, plan.padded), jnp.float32)
    scratch = {
        **buffers(plan, codes is not None, 3 + (codes is not None), x=x.dtype, dy=dy.dtype),
        "x_before": plgpu.SMEM((memory, width), x.dtype),
        "x_after": plgpu.SMEM((memory, width), x.dtype),
        "dy_after": plgpu.SMEM((memory, width), dy.dtype),
        "dx_tiles": plgpu.SMEM((2, steps, width), x.dtype),
    }
    if codes is not None:
        scratch["codes_after"] = plgpu.SMEM((32,), jnp.int32)

    def body(*, weight, dx, sums, dx_tiles, bias=None, dstate=None, **refs):
        block = Block(plan, refs, "x", "dy")
        block.fetch_beside("x", "dy")
        taps, offset = _parameters(block, weight, bias)
        x_tiles, dy_tiles = refs["x_tiles"], refs["dy_tiles"]

        def step(window, unfinished, value, gradient, count, real):
            """Returns the inputs, dp, and the sums dx up to the current token with dp added."""
            inputs = (*window, value)
            taken = _taken(block, inputs, count)
            dp = gradient
            if silu:
                dp = _before_activation(_sum(taken, taps, offset), gradient, count is not None)
            if count is not None:
                real = count >= 0 if real is None else jnp.logical_and(real, count >= 0)
            if real is not None:
                dp = jnp.where(block.scalar(real), dp, 0.0)
            unfinished = _spread(block, (*unfinished, block.zeros()), dp, count, taps)
            return inputs, taken, dp, unfinished

        def tile(number, first, slot, carry):
            turn = jax.lax.rem(number, 2)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            def run(rows, carry):
                read = [
                    (
                        block.load(x_tiles.at[slot, row]),
                        block.load(dy_tiles.at[slot, row]),
                        block.count(slot, row),
                        first + row < plan.time if plan.ragged else None,
                    )
                    for row in rows
                ]
                window, unfinished, totals = carry
                for row, one in zip(rows, read, strict=True):
                    if plan.overruns:
                        one = (_select(block.scalar(one[-1]), one[0]), *one[1:])  # no token of another row
                    inputs, taken, dp, unfinished = step(window, unfinished, *one)
                    totals = _count_in(totals, taken, dp, one[2] is not None)
                    done, *unfinished = unfinished
                    dx_tiles[turn, row] = done.astype(dx_tiles.dtype)
                    if dstate is not None and isinstance(row, int) and row < memory:
                        _write_at_start(block, dstate, row, done, first)
                    window, unfinished = inputs[1:], tuple(unfinished)
                return window, unfinished, totals

            carry = block.rows(run, carry, apart=dstate is not None)
            plgpu.commit_smem()
            pl.when(number == 0)(lambda: block.send(dx_tiles, turn, dx, first, steps, skip=memory))
            pl.when(number > 0)(lambda: block.send(dx_tiles, turn, dx, first - memory, steps))
            return carry

        zeros = (block.zeros(),) * memory, (block.zeros(),) * sums.shape[2]
        tiles, (window, unfinished, totals) = block.stream(tile, (block.enter(), *zeros))
        for i, total in enumerate(totals):
            sums[block.row, block.piece, i, block.channels] = total

        turn, end = jax.lax.rem(tiles, 2), block.start + tiles * steps
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        rows = max(memory, FEWEST_ROWS)
        for i in range(rows - memory):  # the last of the tile once more
            again = block.load(dx_tiles.at[1 - turn, steps - (rows - memory) + i])
            dx_tiles[turn, i] = again.astype(dx_tiles.dtype)
        for i in range(memory):
            value, gradient = (block.load(refs[name].at[i]) for name in ("x_after", "dy_after"))
            count = block.count(i, tiles="codes_after")
            window, _, _, unfinished = step(window, unfinished, value, gradient, count, end + i < plan.time)
            done, *unfinished = unfinished
            dx_tiles[turn, rows - memory + i] = done.astype(dx_tiles.dtype)
            window = window[1:]
        plgpu.commit_smem()
        block.send(dx_tiles, turn, dx, end - rows, rows)
        plgpu.wait_smem_to_gmem(0)

    results = launch(
        body,
        name="short_conv_backward",
        grid=plan.grid,
        inputs={"x": x, "dy": dy, **_padded(plan, weight, bias, state, codes)},
        outputs=outputs,
        scratch=scratch,
    )
    totals = results["sums"].sum((0, 1))[:, :channels]
    dstate = None if state is None else results["dstate"][..., :channels]
    return results["dx"], totals[: memory + 1], None if bias is None else totals[-1], dstate


def _padded(
    plan: Plan,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    codes: jax.Array | None,
) -> dict[str, jax.Array]:
    """The other inputs of a launch: channels in whole blocks, and codes in rows of a multiple of 16 bytes."""
    inputs = {"weight": weight, "bias": bias, "state": state}
    more = plan.padded - plan.channels
    inputs = {
        name: jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, more)]) if more else v
        for name, v in inputs.items()
        if v is not None
    }
    if codes is not None:
        inputs["codes"] = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)), constant_values=-1)
    return inputs


def _parameters(block: Block, weight: Any, bias: Any) -> tuple[Values, jax.Array | None]:
    taps = tuple(block.channel(weight.at[i]) for i in range(weight.shape[0]))
    return taps, None if bias is None else block.channel(bias)


def _reaches(block: Block, count: Any, distance: int) -> jax.Array | None:
    """Whether a token takes the one at a distance before it, for all lanes; None where that is known."""
    return None if count is None or distance == 0 else block.scalar(count >= distance)


def _select(condition: jax.Array | None, value: jax.Array) -> jax.Array:
    return value if condition is None else jnp.where(condition, value, 0.0)


def _taken(block: Block, inputs: Values, count: Any) -> Values:
    """The inputs that a token takes, zero in the place of others; at padding only the last is not zero."""
    last = len(inputs) - 1
    return tuple(_select(_reaches(block, count, last - i), value) for i, value in enumerate(inputs))


def _sum(inputs: Values, taps: Values, offset: jax.Array | None) -> jax.Array:
    total = offset
    for tap, value in zip(taps, inputs, strict=True):
        total = tap * value if total is None else total + tap * value
    return total


def _before_activation(p: jax.Array, gradient: jax.Array, masked: bool) -> jax.Array:
    """The gradient before a SiLU; if `masked`, zero where the gradient is, also where p is not finite."""
    s = sigmoid(p)
    y = p * s
    result = gradient * (s + y * (1.0 - s))
    return jnp.where(gradient == 0.0, 0.0, result) if masked else result


def _spread(block: Block, unfinished: Values, dp: jax.Array, count: Any, taps: Values) -> Values:
    """Adds dp to the dx of the tokens that it reaches."""
    last = len(taps) - 1
    return tuple(
        total + tap * _select(_reaches(block, count, last - i), dp)
        for i, (total, tap) in enumerate(zip(unfinished, taps, strict=True))
    )


def _count_in(totals: Values, taken: Values, dp: jax.Array, masked: bool) -> Values:
    """Adds a token to dweight and dbias; if `masked`, only where dp is not zero, also where x is not finite."""
    kept = dp != 0.0 if masked else None
    factors = tuple(_select(kept, value) for value in taken)
    sums = tuple(total + dp * value for total, value in zip(totals, factors, strict=False))
    return sums if len(totals) == len(taken) else (*sums, totals[-1] + dp)


def _write_at_start(block: Block, ref: Any, i: int, value: jax.Array, first: Any) -> None:
    """Writes the gradient of the i-th input before the first, if this tile is the first."""

    @pl.when(first == 0)
    def _():
        ref[block.row, i, block.channels] = value
