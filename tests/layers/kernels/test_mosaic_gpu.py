"""What every kernel that uses `product` must hold to, for the compiler's sake; checked in what it is given."""

import re

import jax
import jax.numpy as jnp
import pytest

from layers.kernels.delta_rule import gpu as delta_rule
from layers.kernels.gated_linear_attention import gpu as gated_linear_attention
from layers.kernels.segments import Segments
from layers.kernels.short_conv import gpu as short_conv

TOKENS = jax.ShapeDtypeStruct((1, 130, 1, 128), jnp.bfloat16)
NUMBERS = jax.ShapeDtypeStruct((1, 130, 1), jnp.float32)
STATE = jax.ShapeDtypeStruct((1, 1, 128, 128), jnp.float32)
SEGMENTS = Segments.of(jnp.ones((1, 130), jnp.int32))


def _attend(q, k, v, g, state):
    return gated_linear_attention.gated_linear_attention(q, k, v, g, None, 1.0, False, state, SEGMENTS, 0)


def _attend_grouped(q, k, v, g, state):
    v, g, state = jnp.repeat(v[..., :64], 8, 2), jnp.repeat(g, 8, 2), jnp.repeat(state[..., :64], 8, 1)
    return _attend(q, k, v, g, state)


def _delta(q, k, v, g, state):
    return delta_rule.delta_rule(q, k, v, g, g, 1.0, False, state, SEGMENTS)


def _inner(equation):
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _uses(jaxpr, variable):
    used = [x for equation in jaxpr.eqns for x in equation.invars] + jaxpr.outvars
    return sum(x is variable for x in used)


def _starts(jaxpr, given=None):
    """How often the value that a product starts with is used, for every product that starts with one.

    Args:
      given: uses outside of the variables that come from there.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "run_state":
            start = equation.invars[-1]
            assert (start.aval.dtype, start.aval.ndim) == (jnp.float32, 2)
            yield _uses(jaxpr, start)
        if equation.primitive.name == "wgmma_accumulator_store_p":
            start = equation.invars[1]
            yield _uses(jaxpr, start) * (given or {}).get(start, 1)
        for inner in _inner(equation):
            outside = {}
            if equation.primitive.name == "run_scoped":
                assert len(inner.constvars) == len(equation.invars)
                outside = {x: _uses(jaxpr, y) for x, y in zip(inner.constvars, equation.invars, strict=True)}
            yield from _starts(inner, outside)


@pytest.mark.parametrize("call", [_attend, _attend_grouped, _delta])
def test_what_a_product_starts_with_is_used_nowhere_else(call):
    """On a GPU, a sum over it can come out as the same sum over the result; the interpreter does not show that."""

    def both(*arguments):
        output, pullback = jax.vjp(call, *arguments)
        return output, pullback(output)

    uses = list(_starts(jax.jit(both).trace(TOKENS, TOKENS, TOKENS, NUMBERS, STATE).jaxpr.jaxpr))
    assert len(uses) > 5
    assert set(uses) == {1}


def test_operands_are_copied_where_they_are_parts_of_an_array():
    """A bias that starts within 256 bytes of a packed array: every operand comes from a barrier, behind which XLA copies parts."""

    def run(packed, x):
        weight, bias = packed[: 4 * 128].reshape(4, 128), packed[4 * 128 + 24 :]
        return short_conv.short_conv(x, weight, bias, None, None, None)[0]

    packed = jax.ShapeDtypeStruct((4 * 128 + 24 + 128,), jnp.float32)
    x = jax.ShapeDtypeStruct((1, 64, 128), jnp.float32)
    text = jax.jit(run).trace(packed, x).lower(lowering_platforms=("cuda",)).as_text()
    behind = set()
    for name, count in re.findall(r"(%\w+)(?::(\d+))? = stablehlo.optimization_barrier", text):
        behind.update([name] if not count else [f"{name}#{number}" for number in range(int(count))])
    [operands] = re.findall(r"custom_call @mosaic_gpu_v2\(([^)]*)\)", text)
    operands = operands.split(", ")
    assert len(operands) == 3
    assert behind.issuperset(operands)
