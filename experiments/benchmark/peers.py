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


# What jax-linear-attention calls our cases.
_JAX_LINEAR_ATTENTION = {
    ("gated_linear_attention", "scalar decay"): "simple_gla",
    ("gated_linear_attention", "channel decay"): "gla",
    ("gated_linear_attention", "Mamba-2"): "simple_gla",
    ("delta_rule", "delta rule"): "deltanet",
    ("delta_rule", "gated delta rule"): "gated_deltanet",
    ("delta_rule", "KDA"): "kda",
}


def _jax_linear_attention(primitive: str, case: str) -> dict[str, Function]:
    """The plain-JAX ("chunked") forms, which take float32 precision from every product, and the Hopper kernels."""
    kind = _JAX_LINEAR_ATTENTION.get((primitive, case))
    if kind is None:
        return {}
    from jla.ops import linear_attention

    def function(impl: str) -> Function:
        def run(q, k, v, beta=None, log_decay=None):
            gates = {"beta": beta, "g": log_decay}
            return linear_attention(kind, q, k, v, impl=impl, **gates)[0]

        return run

    forms = ["chunked", "mosaic_gpu"] if jax.default_backend() == "gpu" else ["chunked"]
    if case == "Mamba-2":
        forms.remove("chunked")  # has no groups of keys
    return {f"jax-linear-attention, {impl}": function(impl) for impl in forms}
