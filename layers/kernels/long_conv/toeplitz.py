"""`long_conv` by matrix products: the kernel as blocks of a Toeplitz matrix, for kernels of a few hundred taps.

A block of c outputs is the product of a c x (c + l - 1) Toeplitz matrix, the same for all blocks, with the window of
inputs that these outputs see. The blocks of all sequences are the columns of one product per channel. 16-bit inputs are
multiplied as they are, with the kernel rounded to their type and sums in float32. The windows overlap, so each input is
copied about (c + l) / c times. Long kernels are processed in groups of columns, which bounds that copy.

Bytes moved per channel in bfloat16: 2 r for the input and output of r = b t rows, 4 r (c + l) / c for the windows and
4 c (c + l) for the matrix; arithmetic 2 r (c + l).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.long_conv.gating import Convolution, gated

# Outputs per block.
BLOCK = 128
# Most elements of one channel's matrix that exist at a time.
MATRIX_ELEMENTS = 1 << 17


def long_conv(x, kernel, skip, input_gate, output_gate, initial_state, circular):
    """Returns outputs and the final state; the public function has checked the arguments."""
    return gated(TOEPLITZ, circular, x, kernel, skip, input_gate, output_gate, initial_state)


def _forward(u, past, kernel, circular, operand):
    kernel = _taps_that_count(u, past, kernel, circular)
    return _convolve(_with_past(u, past, kernel, circular), kernel, u.shape[1], operand, u.dtype)


def _transpose(u, past, kernel, circular, operand, g):
    taps = _taps_that_count(u, past, kernel, circular)
    before = 0 if past is None and not circular else taps.shape[1] - 1
    # Correlation is convolution with time reversed.
    reversed_g = jnp.pad(g[:, ::-1], ((0, 0), (taps.shape[1] - 1, before), (0, 0)))
    du = _convolve(reversed_g, taps, before + u.shape[1], operand, u.dtype)[:, ::-1]
    dpast, du = du[:, :before], du[:, before:]
    if circular and before:
        du = du.at[:, -before:].add(dpast)
    dtaps = _correlate(_with_past(u, past, taps, circular), g, taps, operand, u.dtype)
    return du, dpast, jnp.pad(dtaps, ((0, 0), (0, kernel.shape[1] - taps.shape[1])))


TOEPLITZ = Convolution(_forward, _transpose)


def _taps_that_count(u, past, kernel, circular):
    return kernel[:, : u.shape[1]] if past is None and not circular else kernel


def _with_past(u, past, kernel, circular):
    """The input with the l - 1 inputs before it, (b, l-1 + t, d)."""
    before = kernel.shape[1] - 1
    if circular:
        past = u[:, u.shape[1] - before :]
    elif past is None:
        return jnp.pad(u, ((0, 0), (before, 0), (0, 0)))
    return jnp.concatenate([past.astype(u.dtype), u], axis=1)


def _convolve(inputs, kernel, time, operand, dtype):
    """The `time` outputs that see all taps of the kernel, (b, time, d), from inputs (b, l-1 + time, d)."""
    plan = _Plan.of(time, kernel.shape[1])
    blocks = _input_blocks(inputs, time, plan, operand)
    rows = (inputs.shape[2], inputs.shape[0], plan.blocks, plan.block)

    def add_group(y, group):
        matrix = _matrix(kernel, plan, group, operand)
        return y + _product("dpw,dbiw->dbip", matrix, _windows(blocks, plan, group), dtype), None

    y = _over_groups(add_group, jnp.zeros(rows, dtype), plan)
    return jnp.moveaxis(y.reshape(*rows[:2], -1)[..., :time], 0, 2)


def _correlate(inputs, g, kernel, operand, dtype):
    """The cotangent of the kernel (d, l) of `_convolve`, whose outputs have the cotangent g (b, time, d)."""
    plan = _Plan.of(g.shape[1], kernel.shape[1])
    blocks = _input_blocks(inputs, g.shape[1], plan, operand)
    g = jnp.pad(g, ((0, 0), (0, plan.blocks * plan.block - g.shape[1]), (0, 0)))
    g = _operand(jnp.moveaxis(g, 2, 0).reshape(g.shape[2], g.shape[0], plan.blocks, plan.block), operand)
    kernel = kernel.astype(dtype)

    def add_group(total, group):
        dmatrix = _product("dbip,dbiw->dpw", g, _windows(blocks, plan, group), dtype)
        (dkernel,) = jax.linear_transpose(lambda k: _matrix(k, plan, group, dtype), kernel)(dmatrix)
        return total + dkernel, None

    return _over_groups(add_group, jnp.zeros_like(kernel), plan)


class _Plan(NamedTuple):
    """How `blocks` blocks of `block` outputs each read `groups` groups of `span` blocks of inputs each."""

    block: int
    blocks: int
    span: int
    groups: int

    @classmethod
    def of(cls, time, taps):
        block = min(BLOCK, time)
        spanned = -(-(block + taps - 1) // block)
        span = max(1, min(spanned, MATRIX_ELEMENTS // block**2))
        return cls(block, -(-time // block), span, -(-spanned // span))


def _over_groups(add_group, start, plan):
    if plan.groups == 1:
        return add_group(start, 0)[0]
    return jax.lax.scan(add_group, start, jnp.arange(plan.groups))[0]


def _input_blocks(inputs, time, plan, operand):
    """Inputs (b, l-1 + time, d) as (d, b, blocks, block), with zeros before and after to fill all windows."""
    batch, _, width = inputs.shape
    context = plan.span * plan.groups - 1
    before = context * plan.block - (inputs.shape[1] - time)
    inputs = jnp.pad(inputs, ((0, 0), (before, plan.blocks * plan.block - time), (0, 0)))
    return jnp.moveaxis(_operand(inputs, operand), 2, 0).reshape(
        width, batch, context + plan.blocks, plan.block
    )


def _windows(blocks, plan, group):
    """The inputs that each block of outputs sees through the columns of a group, (d, b, blocks, span * block)."""
    first = group * plan.span
    if plan.blocks == 1:
        window = jax.lax.dynamic_slice_in_dim(blocks, first, plan.span, axis=2)
        return window.reshape(*window.shape[:2], 1, -1)
    slices = [jax.lax.dynamic_slice_in_dim(blocks, first + m, plan.blocks, axis=2) for m in range(plan.span)]
    return jnp.concatenate(slices, axis=-1)


def _matrix(kernel, plan, group, operand):
    """Columns of the Toeplitz matrix, (d, block, span * block): [p, w] holds tap p - w + (l-1 and the zeros before it).

    Row p is row 0 shifted p places to the right: copies of row 0, end to end, cut into rows that are one shorter.
    """
    block, columns = plan.block, plan.span * plan.block
    total = columns * plan.groups
    taps = jnp.pad(_operand(kernel, operand), ((0, 0), (block, total - kernel.shape[1])))
    seen = jax.lax.dynamic_slice_in_dim(taps, total - (group + 1) * columns, columns + block, axis=1)
    row = jnp.roll(seen[:, ::-1], -(block - 1), axis=1)
    rows = jnp.broadcast_to(row[:, None], (row.shape[0], block, row.shape[1])).reshape(row.shape[0], -1)
    return rows[:, : block * (row.shape[1] - 1)].reshape(row.shape[0], block, -1)[:, :, :columns]


def _operand(v, operand):
    """`v` in the type of the products: the 16-bit type of the input, or its own."""
    return v.astype(operand) if jnp.dtype(operand).itemsize < 4 and not jnp.iscomplexobj(v) else v


def _product(equation, left, right, dtype):
    """A product with sums in `dtype`; 32-bit operands are not rounded to fewer bits."""
    precision = jax.lax.Precision.DEFAULT if left.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=dtype)
