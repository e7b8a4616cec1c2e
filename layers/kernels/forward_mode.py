"""An error of our own where forward-mode differentiation meets a backward pass that is written by hand.

A `jax.custom_vjp` has no forward mode: JAX says so without the name of what has none. Arguments of such an implementation
pass through `reverse_mode_only`, an identity that vanishes from compiled programs. Its derivative is an identity
too, which reverse mode transposes and never runs. Forward mode runs it, and that raises the error.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

REFERENCE = "impl='reference', for layers `with layers.kernels.dispatch.preferred('reference')`"
NOT_OVER_REVERSE = (
    "the passes of impl='xla' of {primitive} have no forward-mode differentiation (jax.hessian, jax.jacfwd of jax.grad); use "
    f"{REFERENCE}, or reverse mode twice (jax.jacrev of jax.grad)"
)


def no_forward_mode(what: str, instead: str) -> str:
    """Returns the message of something whose backward pass is written by hand, and what to use in its place."""
    return (
        f"{what} has a backward pass of its own and no forward-mode differentiation (jax.jvp, jax.jacfwd); use {instead}, or "
        "reverse mode (jax.grad, jax.vjp, jax.jacrev)"
    )


def reverse_mode_only(arguments: Any, message: str) -> Any:
    """Returns a tree of arrays unchanged; differentiating it forward, by `jax.jvp` or `jax.jacfwd`, raises `message`.

    Forward over reverse, as in `jax.hessian`, passes: its forward mode meets only the passes of the custom gradient.

    Raises:
      TypeError: when forward-mode differentiation runs or compiles.
    """

    def one(leaf):
        real = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        # An array that is known has no derivative.
        return _marked.bind(leaf, message=message) if real and isinstance(leaf, jax.core.Tracer) else leaf

    return jax.tree.map(one, arguments)


_marked, _tangent = Primitive("reverse_mode_only"), Primitive("reverse_mode_only_tangent")


def _jvp(primals, tangents, *, message):
    (x,), (dx,) = primals, tangents
    return x, dx if isinstance(dx, ad.Zero) else _tangent.bind(dx, message=message)


def _refuse(*_, message):
    raise TypeError(message)


def _batched(arguments, axes, *, message):
    return _marked.bind(*arguments, message=message), axes[0]


for _primitive in (_marked, _tangent):
    _primitive.def_abstract_eval(lambda x, *, message: x)  # noqa: ARG005 - JAX passes it by name
batching.primitive_batchers[_marked] = _batched
# `jax.jacfwd` and `jax.hessian` batch tangents, and JAX would refuse to batch those of a `custom_vjp` in words of its own.
batching.primitive_batchers[_tangent] = _refuse
_marked.def_impl(lambda x, *, message: x)  # noqa: ARG005
_tangent.def_impl(_refuse)
mlir.register_lowering(_marked, lambda _, x, *, message: [x])  # noqa: ARG005
mlir.register_lowering(_tangent, _refuse)
ad.primitive_jvps[_marked] = _jvp
ad.deflinear2(_tangent, lambda cotangent, _, *, message: [cotangent])  # noqa: ARG005
