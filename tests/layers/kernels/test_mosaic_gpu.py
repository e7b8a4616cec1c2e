"""What every kernel that uses `product` must hold to, for the compiler's sake; checked in what it is given."""

import jax
import jax.numpy as jnp
import pytest

from layers.kernels.delta_rule import gpu as delta_rule
from layers.kernels.gated_linear_attention import gpu as gated_linear_attention

TOKENS = jax.ShapeDtypeStruct((1, 130, 1, 128), jnp.bfloat16)
NUMBERS = jax.ShapeDtypeStruct((1, 130, 1), jnp.float32)
STATE = jax.ShapeDtypeStruct((1, 1, 128, 128), jnp.float32)
IDS = jnp.ones((1, 130), jnp.int32)


def _attend(q, k, v, g, state):
    return gated_linear_attention.gated_linear_attention(q, k, v, g, None, 1.0, False, state, IDS, 0)


def _delta(q, k, v, g, state):
    return delta_rule.delta_rule(q, k, v, g, g, 1.0, False, state, IDS)


def _inner(equation):
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _starts(jaxpr):
    """How often the value that a product starts with is used, for every product that starts with one."""
    used = [x for equation in jaxpr.eqns for x in equation.invars] + jaxpr.outvars
    for equation in jaxpr.eqns:
        if equation.primitive.name == "run_state":
            start = equation.invars[-1]
            assert (start.aval.dtype, start.aval.ndim) == (jnp.float32, 2)
            yield sum(x is start for x in used)
        for inner in _inner(equation):
            yield from _starts(inner)


@pytest.mark.parametrize("call", [_attend, _delta])
def test_what_a_product_starts_with_is_used_nowhere_else(call):
    """On a GPU, a sum over it can come out as the same sum over the result; the interpreter does not show that."""

    def both(*arguments):
        output, pullback = jax.vjp(call, *arguments)
        return output, pullback(output)

    uses = list(_starts(jax.jit(both).trace(TOKENS, TOKENS, TOKENS, NUMBERS, STATE).jaxpr.jaxpr))
    assert len(uses) > 5
    assert set(uses) == {1}
