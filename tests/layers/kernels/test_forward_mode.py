"""Forward-mode differentiation of the primitives: it works, or says which implementation it works for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.kernels.suites import SUITES
from tests.layers.kernels.test_primitives import call, cast, draw, parted

WITHOUT = [name for name in SUITES if name != "ssm_kernel"]
# Hand-written passes that hold products with gradients of their own.
NOT_OVER_REVERSE = ("delta_rule", "dplr_delta_rule", "gated_linear_attention")


def loss_of(name, impl, time=3):
    """A loss of the float arguments of the first case of a primitive, those arguments, and tangents."""
    suite = SUITES[name]
    case = suite.cases[0]
    moving, fixed = parted(cast(draw(case, 1, time), "float32"))

    def loss(moving):
        out = call(suite, case, impl, moving | fixed)
        return sum(jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in jax.tree.leaves(out))

    return loss, moving, jax.tree.map(jnp.ones_like, moving)


def inner(gradient, tangents):
    parts = jax.tree.map(lambda g, t: jnp.sum(g * t).real, gradient, tangents)
    return sum(jax.tree.leaves(parts))


@pytest.mark.slow
@pytest.mark.parametrize("name, impl", [*((name, "reference") for name in WITHOUT), ("ssm_kernel", "xla")])
def test_forward_mode_agrees_with_reverse_mode(name, impl):
    loss, moving, tangents = loss_of(name, impl)

    @jax.jit
    def both(moving):
        return jax.jvp(loss, (moving,), (tangents,))[1], inner(jax.grad(loss)(moving), tangents)

    np.testing.assert_allclose(*both(moving), rtol=1e-4)


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize(
    "transform", [jax.jit, *(pytest.param(f, marks=pytest.mark.slow) for f in (lambda f: f, jax.vmap))]
)
def test_a_hand_written_backward_pass_says_so(name, transform):
    loss, moving, tangents = loss_of(name, "xla")
    words = f"impl='xla' of {name} has a backward pass of its own.*use impl='reference'"
    if transform is jax.vmap:
        moving, tangents = (jax.tree.map(lambda x: x[None], tree) for tree in (moving, tangents))
    with pytest.raises(TypeError, match=words):
        transform(lambda m, t: jax.jvp(loss, (m,), (t,)))(moving, tangents)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("long_conv", "delta_rule")))
        for name in WITHOUT
    ],
)
def test_forward_over_reverse(name):
    """The product of the Hessian with a vector, forward over reverse, agrees with the reference's, or says so."""
    loss, moving, tangents = loss_of(name, "xla")

    def product(loss):
        return jax.jit(lambda m: jax.jvp(jax.grad(loss), (m,), (tangents,))[1])(moving)

    if name in NOT_OVER_REVERSE:
        with pytest.raises(
            TypeError, match=f"impl='xla' of {name} have no forward-mode.*use impl='reference'"
        ):
            product(loss)
        return
    got, want = product(loss), product(loss_of(name, "reference")[0])
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
