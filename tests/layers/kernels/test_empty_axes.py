"""Axes of size zero: every primitive gives arrays of the right shapes, or refuses what has no meaning by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.ssm_kernel import ssm_kernel
from tests.layers.kernels.suites import SUITES

SIZES = {
    "b": 2,
    "t": 5,
    "h": 2,
    "k": 3,
    "v": 4,
    "d": 3,
    "n": 2,
    "g": 1,
    "w": 3,
    "m": 2,
    "l": 4,
    "r": 1,
    "s": 3,
}
# Shapes of arguments, outputs and final states.
SHAPES = {
    "attention": ({"q": "b t h k", "k": "b t h k", "v": "b t h v"}, "b t h v", None),
    "delta_rule": (
        {"q": "b t h k", "k": "b t h k", "v": "b t h v", "beta": "b t h", "log_decay": "b t h"},
        "b t h v",
        "b h k v",
    ),
    "dplr_delta_rule": (
        dict.fromkeys(("q", "k", "a", "b", "log_decay"), "b t h k") | {"v": "b t h v"},
        "b t h v",
        "b h k v",
    ),
    "gated_linear_attention": (
        {"q": "b t h k", "k": "b t h k", "v": "b t h v", "log_decay": "b t h k"},
        "b t h v",
        "b h k v",
    ),
    "linear_recurrence": ({"a": "b t d", "x": "b t d"}, "b t d", "b d"),
    "long_conv": ({"x": "b t d", "kernel": "d l"}, "b t d", "b s d"),
    "selective_scan": (
        {"x": "b t d", "dt": "b t d", "a": "d n", "b": "b t g n", "c": "b t g n"},
        "b t d",
        "b d n",
    ),
    "short_conv": ({"x": "b t d", "weight": "w d"}, "b t d", "b m d"),
    "ssm_kernel": ({"a": "d n", "b": "d n", "c": "d n", "dt": "d"}, "d l", None),
}
# Axes that cannot be empty, and the words of the refusal.
REFUSED = {
    ("attention", "h"): "heads",
    ("attention", "k"): "q has",
    ("delta_rule", "h"): "heads",
    ("delta_rule", "k"): "k has",
    ("dplr_delta_rule", "k"): "k has",
    ("gated_linear_attention", "h"): "heads",
    ("gated_linear_attention", "k"): "k has",
    ("long_conv", "l"): "kernel has shape",
    ("selective_scan", "g"): "groups",
    ("short_conv", "w"): "weight has 0 taps",
}
CALLS = [
    pytest.param(
        name,
        letter,
        impl,
        marks=[pytest.mark.slow] * (impl != "xla" or not (letter == "b" or (name, letter) in REFUSED)),
    )
    for name, (shapes, _, _) in SHAPES.items()
    for letter in dict.fromkeys(" ".join(shapes.values()).split())
    for impl in ("reference", *SUITES[name].implementations)
]


@pytest.mark.parametrize("name, letter, impl", CALLS)
def test_an_empty_axis(name, letter, impl):
    shapes, output, state = SHAPES[name]
    sizes = {**SIZES, letter: 0}

    def shape(pattern):
        return tuple(sizes[one] for one in pattern.split())

    signs = {"a": -1, "log_decay": -1} if name != "linear_recurrence" else {}
    arguments = {key: jnp.full(shape(pattern), 0.5 * signs.get(key, 1)) for key, pattern in shapes.items()}
    options = {"length": 4} if name == "ssm_kernel" else {}
    if state is not None and name != "long_conv":
        arguments["initial_state"] = jnp.ones(shape(state))

    function = ssm_kernel if name == "ssm_kernel" else SUITES[name].function

    def run(arguments):
        out = function(**arguments, **options, impl=impl)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out)), out

    if (name, letter) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, letter]):
            run(arguments)
        return
    (_, out), gradients = jax.value_and_grad(run, has_aux=True)(arguments)
    out, final = (out, None) if state is None else out
    assert out.shape == shape(output)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, arguments)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))
    if final is not None:
        assert final.shape == shape(state)
        if letter == "t" and "initial_state" in arguments:
            np.testing.assert_array_equal(final, arguments["initial_state"])
