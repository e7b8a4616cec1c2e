"""The same calculations by other libraries, and by plain JAX: baselines to divide by.

`peers(primitive, name)` gives functions of the arrays of a benchmark, by a name to print. A library that cannot be
imported is left out.
"""

import importlib.util
from typing import Any

import jax

from experiments.benchmark.calls import Function


def peers(primitive: str, case: str) -> dict[str, Function]:
    """Whatever else here computes the case called `case` of a primitive."""
    found = dict(PLAIN.get((primitive, case), {}))
    if importlib.util.find_spec("jla") is not None:
        found |= _jax_linear_attention(primitive, case)
    return found


def _associative_scan(a: Any, x: Any) -> Any:
    """The recurrence as JAX users write it today."""

    def step(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(step, (a, x), axis=1)[1]


def _dense_attention(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


PLAIN = {
    ("linear_recurrence", "real"): {"lax.associative_scan": _associative_scan},
    ("attention", "causal"): {"jax.nn, dense": _dense_attention},
}


def _jax_linear_attention(primitive: str, case: str) -> dict[str, Function]:
    """The plain-JAX ("chunked") forms of jax-linear-attention, which take float32 precision from every product."""
    from jla.ops import chunked

    table: dict[tuple[str, str], Function] = {
        ("gated_linear_attention", "scalar decay"): lambda q, k, v, log_decay: chunked.simple_gla(
            q, k, v, log_decay
        ),
        ("gated_linear_attention", "channel decay"): lambda q, k, v, log_decay: chunked.gla(
            q, k, v, log_decay
        ),
        ("delta_rule", "delta rule"): lambda q, k, v, beta: chunked.delta_rule(q, k, v, beta),
        ("delta_rule", "gated delta rule"): lambda q, k, v, beta, log_decay: chunked.gated_delta_rule(
            q, k, v, log_decay, beta
        ),
        ("delta_rule", "KDA"): lambda q, k, v, beta, log_decay: chunked.kda(q, k, v, log_decay, beta),
    }
    function = table.get((primitive, case))
    return {} if function is None else {"jax-linear-attention, chunked": lambda **a: function(**a)[0]}
